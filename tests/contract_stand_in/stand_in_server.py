"""Starts a real Triton from the wheel `nvidia-pytriton` with the stand-in behind the ensemble `audioldm2`."""

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from audioldm2_triton import contract
from contract_stand_in.stand_in_audio import NATIVE_AUDIO_LENGTH_IN_S, SAMPLING_RATE
from serving.installation import find_triton

SOURCES = Path(__file__).parent
STEP = "stand_in"
START_TIMEOUT_IN_S = 60

PARAMETERS: Mapping[str, str] = {
    "checkpoint": "stand-in",
    "native_audio_length_in_s": str(NATIVE_AUDIO_LENGTH_IN_S),
    "sampling_rate": str(SAMPLING_RATE),
    "schedulers": ",".join(contract.SCHEDULERS[:3]),
    "max_audio_length_in_s": "30",
    "max_num_inference_steps": "100",
    "max_num_waveforms_per_prompt": "4",
}


@dataclass(frozen=True)
class StandInServer:
    """A running server."""

    grpc: str  # host:port
    http: str  # host:port

    @property
    def urls(self) -> tuple[str, str]:
        return f"grpc://{self.grpc}", f"http://{self.http}"


@contextlib.contextmanager
def stand_in_server(
    directory: Path, parameters: Mapping[str, str] = PARAMETERS, options: Sequence[str] = ()
) -> Iterator[StandInServer]:
    """A server with its repository in `directory`, ready; `parameters` is what it publishes about itself."""
    repository = _write_repository(directory / "models", parameters)
    triton = find_triton(directory)
    http, grpc, metrics = _free_ports(3)
    command = [
        str(triton.binary),
        *triton.arguments,
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=2",
        *(f"--{name}-port={port}" for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics))),
        *options,
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, env=triton.environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, http, directory / "log")
            yield StandInServer(f"localhost:{grpc}", f"localhost:{http}")
        finally:
            process.terminate()
            process.wait()


def _write_repository(repository: Path, parameters: Mapping[str, str]) -> Path:
    (repository / STEP / "1").mkdir(parents=True)
    (repository / contract.ENSEMBLE / "1").mkdir(parents=True)
    for name in ("model.py", "stand_in_audio.py"):
        shutil.copy(SOURCES / name, repository / STEP / "1" / name)
    tensors = _tensors()
    names = [(kind, name) for kind in ("input", "output") for name in getattr(contract, f"{kind.upper()}S")]
    maps = " ".join(f'{kind}_map {{ key: "{name}" value: "{name}" }}' for kind, name in names)
    published = " ".join(
        f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()
    )
    (repository / STEP / "config.pbtxt").write_text(f'backend: "python" max_batch_size: 8 {tensors}')
    (repository / contract.ENSEMBLE / "config.pbtxt").write_text(
        f'platform: "ensemble" max_batch_size: {contract.MAX_BATCH_SIZE} {tensors} {published} '
        f'ensemble_scheduling {{ step [ {{ model_name: "{STEP}" model_version: -1 {maps} }} ] }}'
    )
    return repository


def _tensors() -> str:
    dims = {"audio": "-1, -1", "score": "-1"}
    return " ".join(
        f'{kind} {{ name: "{name}" data_type: TYPE_{"STRING" if dtype == "BYTES" else dtype} '
        f"dims: [ {dims.get(name, '1')} ] {'optional: true' if kind == 'input' and name != 'prompt' else ''} }}"
        for kind, tensors in (("input", contract.INPUTS), ("output", contract.OUTPUTS))
        for name, dtype in tensors.items()
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("", 0))
        return [item.getsockname()[1] for item in sockets]


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(START_TIMEOUT_IN_S * 20):
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://localhost:{port}/v2/health/ready")
            return
        time.sleep(0.05)
    raise RuntimeError(f"the stand-in server does not get ready:\n{log.read_text()[-3000:]}")
