"""A private server on free ports, for the duration of a `with` block."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Final

from serving.server_error import DRAIN_TIMEOUT_IN_S, ServerError

_PORTS: Final = range(20_000 + os.getpid() % 97, 32_000, 97)
_ports = cycle(_PORTS)

SERVE: Final = Path(__file__).resolve().parent.parent / "serve"


@dataclass(frozen=True)
class LocalServer:
    """A running server."""

    process: subprocess.Popen[str]  # scripts/serve
    http_port: int
    grpc_port: int
    metrics_port: int
    health_port: int
    log: Path

    @property
    def grpc_url(self) -> str:
        return f"grpc://localhost:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://localhost:{self.http_port}"


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine on which nothing listens at the moment.

    The server takes them seconds later. So they are none that the system gives to connections, whose range begins at
    32768 by default, and hardly ever those of another process that asks here.
    """
    free: list[int] = []
    for port in islice(_ports, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("0.0.0.0", port))
            free.append(port)
        if len(free) == count:
            return free
    raise OSError(f"got {len(free)} free ports but expected {count}")


def server_on(process: subprocess.Popen[str], ports: Sequence[int], log: Path) -> LocalServer:
    """Describes a server that was started by `serve_command` with these ports."""
    http_port, grpc_port, metrics_port, health_port = ports
    return LocalServer(process, http_port, grpc_port, metrics_port, health_port, log)


def serve_command(checkpoint: Path, ports: Sequence[int]) -> list[str]:
    """Returns the command that serves a checkpoint on these ports: HTTP, gRPC, metrics and health."""
    names = ("http", "grpc", "metrics", "health")
    options = [f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)]
    return [str(SERVE), f"--checkpoint={checkpoint}", *options]


@contextmanager
def local_server(checkpoint: Path, log: Path, *arguments: str) -> Iterator[LocalServer]:
    """Starts `scripts/serve` and stops it again.

    Args:
        log: the file for the server's output.
        arguments: more arguments for `scripts/serve`.

    Raises `ServerError`, with the end of the log, if the server does not become ready or does not stop cleanly.
    """
    ports = free_ports(4)
    with log.open("w") as output:
        command = [*serve_command(checkpoint, ports), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True)
    assert process.stdout is not None
    if not process.stdout.readline().startswith("ready:"):
        raise ServerError(f"the server did not start:\n{log.read_text()[-4000:]}")
    try:
        yield server_on(process, ports, log)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=3 * DRAIN_TIMEOUT_IN_S)  # draining, then stopping
        process.stdout.close()
    if code:
        raise ServerError(f"the server ended with exit code {code}:\n{log.read_text()[-4000:]}")
