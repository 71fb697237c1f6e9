"""Folders whose names have letters outside ASCII and blanks, wherever a server takes a folder from its user."""

import shutil
from pathlib import Path

import pytest

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from serving.local_server import local_server


@pytest.mark.parametrize("options", [("--offload=on",), pytest.param(("--compile=on",), marks=pytest.mark.slow)])
def test_letters_in_every_folder(
    options: tuple[str, ...],
    tiny_checkpoint: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "modèle 模型")
    for variable in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = tmp_path / f"für {variable}"
        folder.mkdir()
        monkeypatch.setenv(variable, str(folder))
    call = Call("rain", audio_length_in_s=0.2, num_inference_steps=2, seed=1)
    with (
        local_server(checkpoint, tmp_path / "log", *options, "--compile-lengths-in-s=0.2") as server,
        AudioLDM2Client(server.grpc_url) as client,
    ):
        assert client.server_info().checkpoint == f"{checkpoint.parent.name}/modèle 模型"
        result = generate(client, call)
    assert difference(result.audio, reference.generate(call)) <= reference.tolerance(call)
