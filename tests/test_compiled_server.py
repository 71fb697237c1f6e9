"""A real server with compiled stages: the reference's audio, and code that outlives it. Compiling takes minutes."""

from pathlib import Path

import pytest

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from serving.local_server import local_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CALL = Call("Rain on a tin roof", "low quality", 0.64, 3, 3.5, seed=7)
SHORTER = Call("A dog barks", "", 0.4, 2, 1.0, seed=8)


def test_compiled_stages_give_the_references_audio(tiny_checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    arguments = ("--compile=on", "--compile-lengths-in-s=0.64", f"--compile-cache={tmp_path / 'compiled'}")
    logs = []
    for start in ("first", "second"):
        log = tmp_path / start
        with local_server(tiny_checkpoint, log, *arguments) as server, AudioLDM2Client(server.grpc_url) as client:
            for call in (CALL, SHORTER):
                audio = generate(client, call, ensemble=False).audio
                assert difference(audio, reference.generate(call)) <= reference.tolerance(call)
        logs.append(log.read_text())
    for log_text in logs:
        assert "going on without" not in log_text, log_text
    assert sorted(path.name.rpartition("-")[0] for path in (tmp_path / "compiled").iterdir()) == [
        "decoder",
        "denoiser",
        "text_conditioning",
    ]
    assert "compile cache: restored" not in logs[0]
    for stage in ("decoder", "denoiser", "text_conditioning"):
        assert f"{stage}: compile cache: restored" in logs[1], logs[1]
