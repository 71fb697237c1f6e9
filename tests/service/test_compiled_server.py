"""A real server with compiled stages: the reference's audio, also from kept code. Compiling takes minutes."""

from pathlib import Path

import pytest

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from serving.local_server import local_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CALL = Call("Rain on a tin roof", "low quality", 0.64, 3, 3.5, seed=7)
SHORTER = Call("A dog barks", "", 0.4, 2, 1.0, seed=8)


def test_compiled_stages_give_the_references_audio(
    tiny_checkpoint: Path, tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    arguments = ("--compile=on", "--compile-lengths-in-s=0.64")
    for start in ("first", "second"):
        log = tmp_path / start
        with local_server(tiny_checkpoint, log, *arguments) as server, AudioLDM2Client(server.grpc_url) as client:
            for call in (CALL, SHORTER):
                audio = generate(client, call, ensemble=False).audio
                assert difference(audio, reference.generate(call)) <= reference.tolerance(call)
        assert "going on without" not in (said := log.read_text()), said
