"""Parity on the real shapes of `cvssp/audioldm2` and `-large`, with random weights: minutes and 10 GB of memory."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from project import ROOT
from serving.local_server import LocalServer, local_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def built(size: str) -> Path:
    """Kept between runs: it takes minutes to build and 4.2 GB, or 5.7 GB for large."""
    path = ROOT / ".cache" / "checkpoints" / size
    if not path.exists():
        subprocess.run([ROOT / "scripts" / "checkpoint", "build", size, "--out", path], check=True)
    return path


@pytest.fixture(scope="module")
def base_checkpoint() -> Path:
    return built("base")


@pytest.fixture(scope="module")
def base_server(base_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(base_checkpoint, tmp_path_factory.mktemp("base") / "log") as running:
        yield running


def test_audio_equals_the_reference(base_server: LocalServer, base_checkpoint: Path) -> None:
    call = Call(
        "A hammer hits a wooden surface",
        negative_prompt="low quality",
        audio_length_in_s=1.93,
        num_inference_steps=3,
        seed=5,
    )
    with AudioLDM2Client(base_server.grpc_url) as client:
        audio = generate(client, call, ensemble=False).audio
    reference = Reference(base_checkpoint)
    assert difference(audio, reference.generate(call)) <= reference.tolerance(call)


def test_one_step_of_large_equals_the_reference(tmp_path: Path) -> None:
    """The server is gone before the reference comes: together they would need twice the memory."""
    checkpoint = built("large")
    call = Call("Techno music with a strong beat", "low quality", 0.64, 1, seed=7)
    with local_server(checkpoint, tmp_path / "log") as running, AudioLDM2Client(running.grpc_url) as client:
        audio = generate(client, call, ensemble=False).audio
    reference = Reference(checkpoint)
    assert difference(audio, reference.generate(call)) <= reference.tolerance(call)
