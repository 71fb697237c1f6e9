"""A server that knows nothing of steps: the reference pipeline as a model, requests batched whole or not at all."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from serving.installation import find_triton
from serving.local_server import free_ports
from serving.loopback import read_page
from serving.server_error import ServerError

MODEL: Final = "whole_requests"
VERSION: Final = Path(__file__).resolve().parent / "whole_request_model"
MAX_QUEUE_DELAY_US: Final = 10_000
START_TIMEOUT_S: Final = 300
STOP_TIMEOUT_S: Final = 60

CONFIG: Final = """
name: "{model}"
backend: "python"
max_batch_size: {max_batch}
input [
  {{ name: "prompt" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "negative_prompt" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "audio_length_in_s" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "num_inference_steps" data_type: TYPE_INT32 dims: [ 1 ] }},
  {{ name: "seed" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "num_waveforms_per_prompt" data_type: TYPE_INT32 dims: [ 1 ] optional: true }}
]
output [ {{ name: "audio" data_type: TYPE_FP32 dims: [ -1 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters [
  {{ key: "checkpoint" value: {{ string_value: "{checkpoint}" }} }},
  {{ key: "device" value: {{ string_value: "{device}" }} }},
  {{ key: "dtype" value: {{ string_value: "{dtype}" }} }}
]
"""
DYNAMIC_BATCHING: Final = "dynamic_batching {{ max_queue_delay_microseconds: {delay} }}\n"


def write_whole_request_repository(
    target: Path, checkpoint: Path, device: torch.device, dtype: str, max_batch: int
) -> None:
    """A model repository of one model; with `max_batch` of 1 each request is computed alone."""
    model = target / MODEL
    model.mkdir(parents=True)
    config = CONFIG.format(model=MODEL, max_batch=max_batch, checkpoint=checkpoint, device=device, dtype=dtype)
    if max_batch > 1:
        config += DYNAMIC_BATCHING.format(delay=MAX_QUEUE_DELAY_US)
    (model / "config.pbtxt").write_text(config)
    (model / "1").symlink_to(VERSION, target_is_directory=True)


@contextmanager
def whole_request_server(checkpoint: Path, device: torch.device, dtype: str, max_batch: int) -> Iterator[int]:
    """Its gRPC port. Raises `ServerError` where it does not become ready."""
    http_port, grpc_port, metrics_port = free_ports(3)
    with tempfile.TemporaryDirectory() as directory:
        repository, log = Path(directory) / "models", Path(directory) / "log"
        write_whole_request_repository(repository, checkpoint, device, dtype, max_batch)
        triton = find_triton(Path(directory))
        command = [
            *(str(triton.binary), *triton.arguments, f"--model-repository={repository}"),
            *(f"--http-port={http_port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"),
            "--disable-auto-complete-config",
            "--backend-config=python,stub-timeout-seconds=120",
        ]
        # As `scripts/serve` has it: idle threads must not spin.
        environment = {**triton.environment, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, http_port, log)
            yield grpc_port
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", http_port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            read_page(http_port, "/v2/health/ready", timeout=5)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise ServerError(f"the server of whole requests did not start:\n{log.read_text()[-4000:]}")
