"""Fixtures: a tiny checkpoint, a real server on it, and the reference pipeline on the same weights."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before anything imports torch: idle OpenMP threads that spin take the cores from the server's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "scripts", *sorted((ROOT / "model_repository").glob("*/1"))):
    sys.path.insert(0, str(folder))

from audioldm2_pipeline import Reference  # noqa: E402


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    metrics_port: int
    log: Path

    @property
    def grpc_url(self) -> str:
        return f"grpc://localhost:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://localhost:{self.http_port}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("localhost", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


@contextmanager
def running_server(checkpoint: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """`scripts/serve` on free ports; the server must stop cleanly at the end."""
    http_port, grpc_port, metrics_port = free_ports(3)
    command = [
        str(ROOT / "scripts" / "serve"),
        *("--checkpoint", str(checkpoint)),
        *("--http-port", str(http_port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)),
        *arguments,
    ]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    ready = process.stdout.readline()
    assert ready.startswith("ready:"), f"no server: {log.read_text()[-4000:]}"
    try:
        yield Server(process, http_port, grpc_port, metrics_port, log)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 0, f"the server ended with {code}: {log.read_text()[-4000:]}"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    subprocess.run([ROOT / "scripts" / "checkpoint", "build", "tiny", "--out", path], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tiny_checkpoint, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Reference:
    return Reference(tiny_checkpoint)
