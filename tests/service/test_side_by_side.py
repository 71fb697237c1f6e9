"""Two checkpoints on one server: each model gives its own reference's audio, and nothing of one is the other's.

The second one's vocoder makes 48 kHz, at lengths on and off its grid of mel frames.
"""

import json
import os
import shutil
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.cli import main
from metrics_page import read_metrics, wait_for_metrics
from server_faults import faults_found_in, held_steps, wait_for_requests
from serving.local_server import LocalServer, local_server
from supervised_server import health, wait_until

MUSIC = "music_audioldm2"
SUCCESSES = 'audioldm2_requests_total{{engine="cpu",model="{}",outcome="success"}}'
RATE = 48000
UPSAMPLING = {"upsample_rates": [6, 5, 4, 2, 2], "upsample_kernel_sizes": [16, 15, 8, 4, 4]}
LENGTHS_IN_S = (0.5, 0.505, 0.5099, 1.005)  # whole frames, half a frame more, nearly a frame more


@pytest.fixture(scope="module")
def music_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights than the tiny checkpoint's, in each stage, another native length, and another sampling rate."""
    path = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("checkpoints") / "music")
    for component in ("text_encoder_2", "unet", "vae"):
        (weights,) = (path / component).glob("*.safetensors")
        save_file({name: tensor * 0.9 for name, tensor in load_file(weights).items()}, weights)
    config = path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 64}))
    vocoder_config = json.loads((path / "vocoder" / "config.json").read_text())
    shutil.rmtree(path / "vocoder")
    torch.manual_seed(0)
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**vocoder_config, **UPSAMPLING, "sampling_rate": RATE}))
    with torch.no_grad():
        for parameter in vocoder.parameters():
            # The library's own random weights leave almost nothing of the input.
            parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    vocoder.save_pretrained(path / "vocoder")
    return path


@pytest.fixture(scope="module")
def both(
    tiny_checkpoint: Path, music_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    # What is set for all models at once must not make one of the two.
    with (
        faults_found_in(fault_directory),
        mock.patch.dict(os.environ, {"AUDIOLDM2_CHECKPOINT": str(music_checkpoint)}),
        local_server(
            tiny_checkpoint, tmp_path_factory.mktemp("both") / "log", f"--also=music={music_checkpoint}"
        ) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def music_reference(music_checkpoint: Path) -> Reference:
    return Reference(music_checkpoint)


def test_each_model_is_told_of_its_own_checkpoint(both: LocalServer) -> None:
    with AudioLDM2Client(both.grpc_url) as plain, AudioLDM2Client(both.grpc_url, model=MUSIC) as other:
        infos = [client.server_info() for client in (plain, other)]
    assert [str(info.checkpoint).rpartition("/")[2] for info in infos] == ["tiny", "music"]
    assert [info.native_audio_length_in_s for info in infos] == [10.24, pytest.approx(2.56)]
    assert [info.sampling_rate for info in infos] == [16000, RATE]
    assert [info.models for info in infos] == [("audioldm2", MUSIC)] * 2


@pytest.mark.parametrize("ensemble", [True, False], ids=["ensemble", "stream"])
@pytest.mark.parametrize("length_in_s", LENGTHS_IN_S)
def test_audio_is_the_references_and_silence_up_to_the_length(
    length_in_s: float, ensemble: bool, music_reference: Reference, both: LocalServer, tmp_path: Path
) -> None:
    call = Call("Rain on a tin roof", "low quality", length_in_s, 3, 3.5, seed=5)
    with AudioLDM2Client(both.grpc_url, model=MUSIC) as client:
        result = generate(client, call, ensemble)
    expected = music_reference.generate(call)
    made = expected.shape[1]
    assert np.abs(expected).max() > 0.01
    assert result.audio.shape[1] == int(length_in_s * RATE)
    assert difference(result.audio[:, :made], expected) <= music_reference.tolerance(call)
    assert not result.audio[:, made:].any()
    result.save(tmp_path / "out.wav")
    with wave.open(str(tmp_path / "out.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, int(length_in_s * RATE))


def test_the_other_model_has_audio_of_its_own(
    both: LocalServer, reference: Reference, music_reference: Reference
) -> None:
    call = Call("Rain on a tin roof", "low quality", 0.5, 3, 3.5, seed=5)
    expected = reference.generate(call)
    assert difference(music_reference.generate(call)[:, ::3], expected) > 0.1
    with AudioLDM2Client(both.grpc_url) as client:
        for ensemble in (True, False):
            assert difference(generate(client, call, ensemble).audio, expected) <= reference.tolerance(call)


def test_scores_are_claps_own(music_reference: Reference, both: LocalServer) -> None:
    with AudioLDM2Client(both.grpc_url, model=MUSIC) as client:
        result = client.generate(
            "rain", audio_length_in_s=1.005, num_inference_steps=2, num_waveforms_per_prompt=2, seed=3
        )
    np.testing.assert_allclose(result.scores, music_reference.score("rain", result.audio), atol=2e-5)


def test_metrics_are_of_one_model(both: LocalServer) -> None:
    with AudioLDM2Client(both.http_url, model=MUSIC) as client:
        before = read_metrics(both)
        list(client.stream("rain", audio_length_in_s=0.2, num_inference_steps=2))
        after = wait_for_metrics(both, lambda page: page["audioldm2_requests_in_flight"] == 0, "an idle server")
    gained = {
        model: after[name] - before[name]
        for model in ("denoiser", "music_denoiser")
        if (name := SUCCESSES.format(model))
    }
    assert gained == {"denoiser": 0, "music_denoiser": 1}
    stages = ("audioldm2_stream", "decoder", "denoiser", "text_conditioning")
    gauges = {f'audioldm2_stage_requests{{model="{prefix}{stage}"}}' for stage in stages for prefix in ("", "music_")}
    assert gauges <= after.keys()


def test_the_command_takes_either(both: LocalServer, tmp_path: Path) -> None:
    path = tmp_path / "music.wav"
    options = [f"--url={both.grpc_url}", f"--model={MUSIC}", "--num-inference-steps=2", f"--output={path}"]
    assert main(["rain", *options]) == 0
    info = soundfile.info(path)
    assert (info.duration, info.samplerate) == (2.56, RATE)


def test_stopping_waits_for_the_requests_of_both(both: LocalServer, fault_directory: Path) -> None:
    """The last test with this server."""
    late: list[float] = []

    def generate_late() -> None:
        with AudioLDM2Client(both.grpc_url, model=MUSIC) as client:
            client.server_info()
            late.append(client.generate(["rain"], num_inference_steps=20, seed=1)[0].duration_in_s)

    thread = threading.Thread(target=generate_late)
    with held_steps(fault_directory):
        thread.start()
        wait_for_requests(both, 1, "music_denoiser")
        both.process.terminate()
        wait_until(lambda: health(both)[1]["state"] == "draining", "the drain")
    assert both.process.wait(timeout=120) == 0
    thread.join(timeout=60)
    assert late == [2.56]
