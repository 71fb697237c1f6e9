"""Starts a real Triton with the stand-in behind the ensemble `audioldm2`, and as `audioldm2_stream`."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from audioldm2_triton import contract
from contract_stand_in.stand_in_audio import NATIVE_AUDIO_LENGTH_IN_S, SAMPLING_RATE
from serving.installation import find_triton
from serving.local_server import free_ports
from serving.loopback import read_page

SOURCES = Path(__file__).parent
STEP = "stand_in"
START_TIMEOUT_IN_S = 60

STREAM_OUTPUTS: Mapping[str, str] = {
    "step": "INT32",
    "num_steps": "INT32",
    "chunk": "INT32",
    "num_chunks": "INT32",
    "order": "INT32",
}

PARAMETERS: Mapping[str, str] = {
    "checkpoint": "stand-in",
    "native_audio_length_in_s": str(NATIVE_AUDIO_LENGTH_IN_S),
    "sampling_rate": str(SAMPLING_RATE),
    "schedulers": ",".join(contract.SCHEDULERS[:3]),
    "models": "audioldm2,music_audioldm2",
    "max_audio_length_in_s": "30",
    "max_num_inference_steps": "100",
    "max_num_waveforms_per_prompt": "4",
}


@dataclass(frozen=True)
class StandInServer:
    """A running server."""

    grpc: str  # host:port
    http: str  # host:port
    process: subprocess.Popen[bytes]

    @property
    def urls(self) -> tuple[str, str]:
        return f"grpc://{self.grpc}", f"http://{self.http}"


@contextlib.contextmanager
def stand_in_server(
    directory: Path,
    parameters: Mapping[str, str] = PARAMETERS,
    options: Sequence[str] = (),
    *,
    with_stream: bool = True,
) -> Iterator[StandInServer]:
    """A server with its repository in `directory`, ready; `parameters` is what it publishes about itself."""
    repository = _write_repository(directory / "models", parameters)
    if with_stream:
        outputs = {**contract.OUTPUTS, **STREAM_OUTPUTS}
        _write_model(
            repository,
            contract.STREAM,
            "stream_model.py",
            f"max_batch_size: 1 model_transaction_policy {{ decoupled: true }} {_tensors(outputs)}",
        )
    triton = find_triton(directory)
    http, grpc, metrics = free_ports(3)
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
        process = subprocess.Popen(
            command, env=triton.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_ready(process, http, directory / "log")
            yield StandInServer(f"localhost:{grpc}", f"localhost:{http}", process)
            if process.poll() not in (None, -signal.SIGKILL):  # which is how tests end it
                end = "\n".join((directory / "log").read_text(errors="replace").splitlines()[-30:])
                raise AssertionError(f"the stand-in has ended by itself with exit code {process.returncode}:\n{end}")
        finally:
            process.terminate()
            process.wait()
            with contextlib.suppress(ProcessLookupError):
                # The models' processes, which outlive a server that was killed or whose exit timeout is over.
                os.killpg(process.pid, signal.SIGKILL)


def _write_repository(repository: Path, parameters: Mapping[str, str]) -> Path:
    _write_model(repository, STEP, "model.py", f"max_batch_size: 8 {_tensors(contract.OUTPUTS)}")
    (repository / contract.ENSEMBLE / "1").mkdir(parents=True)
    names = [(kind, name) for kind in ("input", "output") for name in getattr(contract, f"{kind.upper()}S")]
    maps = " ".join(f'{kind}_map {{ key: "{name}" value: "{name}" }}' for kind, name in names)
    published = " ".join(
        f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()
    )
    (repository / contract.ENSEMBLE / "config.pbtxt").write_text(
        f'platform: "ensemble" max_batch_size: {contract.MAX_BATCH_SIZE} {_tensors(contract.OUTPUTS)} {published} '
        f'ensemble_scheduling {{ step [ {{ model_name: "{STEP}" model_version: -1 {maps} }} ] }}'
    )
    return repository


def _write_model(repository: Path, name: str, source: str, config: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    shutil.copy(SOURCES / source, repository / name / "1" / "model.py")
    for module in ("stand_in_audio.py", "stand_in_commands.py"):
        shutil.copy(SOURCES / module, repository / name / "1" / module)
    (repository / name / "config.pbtxt").write_text(f'backend: "python" {config}')


def _tensors(outputs: Mapping[str, str]) -> str:
    dims = {"audio": "-1, -1", "score": "-1", "order": "-1", "encoded_audio": "-1"}
    return " ".join(
        f'{kind} {{ name: "{name}" data_type: TYPE_{"STRING" if dtype == "BYTES" else dtype} '
        f"dims: [ {dims.get(name, '1')} ] {'optional: true' if kind == 'input' and name != 'prompt' else ''} }}"
        for kind, tensors in (("input", contract.INPUTS), ("output", outputs))
        for name, dtype in tensors.items()
    )


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(START_TIMEOUT_IN_S * 20):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            read_page(port, "/v2/health/ready", timeout=5)
            return
        time.sleep(0.05)
    raise RuntimeError(f"the stand-in server does not get ready:\n{log.read_text()[-3000:]}")
