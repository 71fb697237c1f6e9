"""Parity on the real shape of `cvssp/audioldm2`, with random weights: minutes and 10 GB of memory."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from conftest import ROOT
from serving.local_server import LocalServer, local_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def base_checkpoint() -> Path:
    """Kept between runs: it takes minutes to build and 4.2 GB."""
    path = ROOT / ".cache" / "checkpoints" / "base"
    if not path.exists():
        subprocess.run([ROOT / "scripts" / "checkpoint", "build", "base", "--out", path], check=True)
    return path


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
    assert difference(audio, Reference(base_checkpoint).generate(call)) < 1e-4
