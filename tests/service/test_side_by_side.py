"""Two checkpoints on one server: each model gives its own reference's audio, and nothing of one is the other's."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import soundfile
from safetensors.torch import load_file, save_file

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.cli import main
from metrics_page import read_metrics, wait_for_metrics
from serving.local_server import LocalServer, local_server

CALL = Call("Rain on a tin roof", "low quality", 0.64, 3, 3.5, seed=7)
MUSIC = "music_audioldm2"
SUCCESSES = 'audioldm2_request_count{{engine="cpu",model="{}",outcome="success"}}'


@pytest.fixture(scope="module")
def music_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights than the tiny checkpoint's, in each stage, and another native length."""
    path = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("checkpoints") / "music")
    for component in ("text_encoder_2", "unet", "vae"):
        (weights,) = (path / component).glob("*.safetensors")
        save_file({name: tensor * 0.9 for name, tensor in load_file(weights).items()}, weights)
    config = path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 64}))
    return path


def test_two_checkpoints_on_one_server(
    tiny_checkpoint: Path,
    music_checkpoint: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is set for all models at once must not make one of the two.
    monkeypatch.setenv("AUDIOLDM2_CHECKPOINT", str(music_checkpoint))
    late: list[float] = []
    with local_server(tiny_checkpoint, tmp_path / "log", f"--also=music={music_checkpoint}") as server:
        music = Reference(music_checkpoint)
        assert_own_audio(server, reference, music)
        assert_own_metrics(server)
        assert_command_line(server, tmp_path / "music.wav")
        # Stopping waits for the requests of both.
        thread = threading.Thread(target=generate_late, args=(server, late))
        thread.start()
        busy = 'audioldm2_rows_in_flight{engine="cpu",model="music_denoiser"}'
        wait_for_metrics(server, lambda page: page[busy] > 0, "a request in flight")
    thread.join(timeout=60)
    assert late == [2.56]


def assert_own_audio(server: LocalServer, reference: Reference, music: Reference) -> None:
    with AudioLDM2Client(server.grpc_url) as plain, AudioLDM2Client(server.grpc_url, model=MUSIC) as other:
        names = [str(client.server_info().checkpoint).rpartition("/")[2] for client in (plain, other)]
        assert names == ["tiny", "music"]
        lengths = [client.server_info().native_audio_length_in_s for client in (plain, other)]
        assert lengths == [10.24, 2.56]
        expected, expected_music = reference.generate(CALL), music.generate(CALL)
        assert difference(expected_music, expected) > 0.1
        for ensemble in (True, False):
            assert difference(generate(plain, CALL, ensemble).audio, expected) <= reference.tolerance(CALL)
            assert difference(generate(other, CALL, ensemble).audio, expected_music) <= music.tolerance(CALL)


def assert_own_metrics(server: LocalServer) -> None:
    with AudioLDM2Client(server.http_url, model=MUSIC) as client:
        before = read_metrics(server)
        list(client.stream("rain", audio_length_in_s=0.2, num_inference_steps=2))
        after = wait_for_metrics(server, lambda page: page["audioldm2_requests_in_flight"] == 0, "an idle server")
    gained = {
        model: after[name] - before[name]
        for model in ("denoiser", "music_denoiser")
        if (name := SUCCESSES.format(model))
    }
    assert gained == {"denoiser": 0, "music_denoiser": 1}
    stages = ("audioldm2_stream", "decoder", "denoiser", "text_conditioning")
    gauges = {f'audioldm2_stage_requests{{model="{prefix}{stage}"}}' for stage in stages for prefix in ("", "music_")}
    assert gauges <= after.keys()


def assert_command_line(server: LocalServer, path: Path) -> None:
    options = [f"--url={server.grpc_url}", f"--model={MUSIC}", "--num-inference-steps=2", f"--output={path}"]
    assert main(["rain", *options]) == 0
    assert soundfile.info(path).duration == 2.56


def generate_late(server: LocalServer, lengths: list[float]) -> None:
    with AudioLDM2Client(server.grpc_url, model=MUSIC) as client:
        client.server_info()
        lengths.append(client.generate(["rain"], num_inference_steps=20, seed=1)[0].duration_in_s)
