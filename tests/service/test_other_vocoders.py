"""A checkpoint whose vocoder makes 48 kHz: the reference's audio, at lengths on and off its grid of mel frames."""

import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from serving.local_server import LocalServer, local_server

RATE = 48000
UPSAMPLING = {"upsample_rates": [6, 5, 4, 2, 2], "upsample_kernel_sizes": [16, 15, 8, 4, 4]}
LENGTHS_IN_S = (0.5, 0.505, 0.5099, 1.005)  # whole frames, half a frame more, nearly a frame more


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("checkpoints") / "48000")
    config = json.loads((path / "vocoder" / "config.json").read_text())
    shutil.rmtree(path / "vocoder")
    torch.manual_seed(0)
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**config, **UPSAMPLING, "sampling_rate": RATE}))
    with torch.no_grad():
        for parameter in vocoder.parameters():
            # The library's own random weights leave almost nothing of the input.
            parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    vocoder.save_pretrained(path / "vocoder")
    return path


@pytest.fixture(scope="module")
def reference_48k(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def server_48k(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(checkpoint, tmp_path_factory.mktemp("48000") / "log") as running:
        yield running


@pytest.mark.parametrize("ensemble", [True, False], ids=["audioldm2", "audioldm2_stream"])
@pytest.mark.parametrize("length_in_s", LENGTHS_IN_S)
def test_audio_is_the_references_and_silence_up_to_the_length(
    length_in_s: float, ensemble: bool, reference_48k: Reference, server_48k: LocalServer, tmp_path: Path
) -> None:
    call = Call("rain", audio_length_in_s=length_in_s, num_inference_steps=3, seed=5)
    with AudioLDM2Client(server_48k.grpc_url) as client:
        info = client.server_info()
        result = generate(client, call, ensemble)
    expected = reference_48k.generate(call)
    made = expected.shape[1]
    assert np.abs(expected).max() > 0.01
    assert result.audio.shape[1] == int(length_in_s * RATE)
    assert difference(result.audio[:, :made], expected) <= reference_48k.tolerance(call)
    assert not result.audio[:, made:].any()
    assert info.sampling_rate == RATE
    assert info.native_audio_length_in_s == pytest.approx(10.24)
    result.save(tmp_path / "out.wav")
    with wave.open(str(tmp_path / "out.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, int(length_in_s * RATE))


def test_scores_are_claps_own(reference_48k: Reference, server_48k: LocalServer) -> None:
    with AudioLDM2Client(server_48k.grpc_url) as client:
        result = client.generate(
            "rain", audio_length_in_s=1.005, num_inference_steps=2, num_waveforms_per_prompt=2, seed=3
        )
    np.testing.assert_allclose(result.scores, reference_48k.score("rain", result.audio), atol=2e-5)
