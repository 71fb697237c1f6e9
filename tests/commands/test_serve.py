"""`scripts/serve` as a user meets it: how it starts, how it refuses to, how it stops."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.contract import SCHEDULERS
from audioldm2_triton.server.settings import Settings, SettingsError, read_settings
from project import ROOT
from serving.local_server import LocalServer, free_ports, local_server
from serving.loopback import read_page

SERVE = str(ROOT / "scripts" / "serve")


def refused(*arguments: str, **environment: str) -> str:
    """What `scripts/serve` says on standard error when it refuses to start; the last line is the reason."""
    command = [SERVE, "--health-port=0", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr


def test_a_port_in_use_is_one_line(tiny_checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(f"--checkpoint={tiny_checkpoint}", f"--grpc-port={port}", "--http-port=0", "--metrics-port=0")
    assert said == f"scripts/serve: --grpc-port: port {port} is in use\n"


def test_a_broken_checkpoint_is_refused_before_the_server_starts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    http, grpc, metrics = free_ports(3)
    said = refused(f"--checkpoint={broken}", f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}")
    assert "unet" in said
    assert "tritonserver" not in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "--checkpoint: got nothing but expected a directory or a hub id"),
        (("--checkpoint=./nowhere",), "--checkpoint: got './nowhere' but expected a directory or a hub id"),
        (("--dtype=float16", "--device=cpu"), "float16 needs a GPU"),
        (("--dtype=fp8",), "dtype: got 'fp8' but expected one of auto, float32, float16, bfloat16"),
        (("--device=tpu",), "device: got 'tpu' but expected auto, cpu, cuda or cuda:INDEX"),
        pytest.param(
            *(("--dtype=float16",), "dtype: got 'float16' on a CPU but expected float32 or bfloat16"),
            marks=pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is a CUDA device here"),
        ),
        (("--compile=graphs", "--device=cpu"), "compile: got 'graphs' on cpu but expected auto, on or off"),
        pytest.param(
            *(("--device=cuda",), "device: got 'cuda' but expected cpu: there is no CUDA device here"),
            marks=pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is a CUDA device here"),
        ),
        (("--max-active-rows=-1",), "max_active_rows: got '-1' but expected a whole number from 0 to 4096"),
        (("--max-num-inference-steps=1001",), "expected a whole number from 1 to 1000"),
        (("--also=./music",), "--also: got './music' but expected NAME=CHECKPOINT"),
        (("--also=a-b=./music",), "--also: got 'a-b=./music' but expected NAME=CHECKPOINT"),
        (("--also=music=./nowhere",), "--also: got './nowhere' but expected a directory or a hub id"),
    ],
)
def test_bad_settings_are_one_line(arguments: tuple[str, ...], reason: str, tiny_checkpoint: Path) -> None:
    checkpoint = () if not arguments or "checkpoint" in arguments[0] else (f"--checkpoint={tiny_checkpoint}",)
    http, grpc, metrics = free_ports(3)
    said = refused(*checkpoint, *arguments, f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}")
    last = said.strip().splitlines()[-1]
    assert last.startswith("scripts/serve: ")
    assert reason in last


def test_the_environment_overrides_parameters() -> None:
    parameters = {"checkpoint": "/a", "dtype": "float32", "max_waiting": "5"}
    environment = {"AUDIOLDM2_CHECKPOINT": "/b", "AUDIOLDM2_MAX_WAITING": "7", "AUDIOLDM2_DTYPE": ""}
    assert read_settings(parameters, environment) == Settings("/b", dtype="float32", max_waiting=7)
    with pytest.raises(SettingsError, match="AUDIOLDM2_CHECKPOINT"):
        read_settings({}, {})


def test_clients_are_told_limits_and_schedulers(server: LocalServer) -> None:
    for url in (server.grpc_url, server.http_url):
        with AudioLDM2Client(url) as client:
            info = client.server_info()
        assert info.schedulers == SCHEDULERS
        assert info.native_audio_length_in_s == 10.24
        assert info.sampling_rate == 16000
        assert info.limits.max_audio_length_in_s == 300
        assert info.limits.max_num_inference_steps == 200
        assert info.limits.max_num_waveforms_per_prompt == 8


def test_what_was_resolved_is_on_the_page(server: LocalServer) -> None:
    page = read_page(server.metrics_port, "/metrics", 10).decode()
    series = {line.rpartition(" ")[0] for line in page.splitlines() if line.startswith("audioldm2_stage_info{")}
    assert len(series) == 3
    for part in ('dtype="float32"', 'device="cpu"', 'compile="off"', '/tiny"'):
        assert all(part in one for one in series), (part, series)
    (denoiser,) = (one for one in series if 'model="denoiser"' in one)
    assert 'max_active_rows="32"' in denoiser
    assert 'max_waiting="64"' in denoiser


@pytest.mark.slow
def test_ctrl_c_exits_with_0(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with local_server(tiny_checkpoint, tmp_path / "log") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 0
