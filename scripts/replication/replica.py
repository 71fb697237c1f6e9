"""One of several servers: started, drained and killed as an orchestrator would, always on the same ports."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from replication.envoy import Balancer, Upstream, envoy, find_envoy
from serving.local_server import LocalServer, free_ports, serve_command, server_on
from serving.server_error import ServerError
from serving.stage_processes import kill_group

MAX_FAILURES_IN_A_ROW: Final = 3
PATIENCE_IN_S: Final = 1800.0  # for whatever a busy machine may take long for


@dataclass
class Replica:
    """A server that can be replaced; `environment` is added to that of this process."""

    checkpoint: Path
    log: Path
    ports: Sequence[int]  # HTTP, gRPC, metrics, health
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    failures: int = 0  # how often it ended by itself
    failures_in_a_row: int = 0

    @property
    def running(self) -> LocalServer:
        if self.process is None:
            raise ServerError(f"{self.log.name}: got a server that was not started but expected one that runs")
        return server_on(self.process, self.ports, self.log)

    @property
    def upstream(self) -> Upstream:
        http_port, grpc_port, _, health_port = self.ports
        return Upstream(grpc_port, http_port, health_port)

    def start(self) -> None:
        """Starts it, and does not wait."""
        command = [*serve_command(self.checkpoint, self.ports), *self.options]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, **self.environment},
                start_new_session=True,  # so that all of it can be killed, and Ctrl-C reaches only who starts it
            )

    def revive(self) -> None:
        """Starts it anew if it has ended by itself. Raises `ServerError` if it has done so too often in a row."""
        code = self.running.process.poll()
        if code is None:
            return
        self.wait()
        self.failures += 1
        self.failures_in_a_row += 1
        if self.failures_in_a_row == MAX_FAILURES_IN_A_ROW:
            raise ServerError(f"a server ended again and again, now with {code}:\n{self.log.read_text()[-4000:]}")
        self.start()

    def stop(self) -> None:
        """Has it drain, and does not wait."""
        self.running.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Returns its exit code once it has ended."""
        process = self.running.process
        code = process.wait(timeout=PATIENCE_IN_S)
        if process.stdout:
            process.stdout.close()
        return code

    def kill(self) -> None:
        """Ends all of its processes at once, as the end of its machine would."""
        kill_group(self.running.process.pid)
        self.wait()


@contextmanager
def replicated(replicas: Sequence[Replica], log: Path, grpc_port: int = 0, http_port: int = 0) -> Iterator[Balancer]:
    """Runs the servers behind Envoy; drains them at the end.

    Raises `ServerError` if anything does not start, or a server ends with another exit code than 0.
    """
    find_envoy()  # before anything is started
    try:
        for replica in replicas:
            replica.start()
        with envoy([replica.upstream for replica in replicas], log, grpc_port, http_port) as balancer:
            wait_until_all_are_ready(replicas, balancer)
            yield balancer
    finally:
        living = [replica for replica in replicas if replica.process and replica.process.poll() is None]
        for replica in living:
            replica.stop()
        codes = [replica.wait() for replica in living]
    if any(codes):
        raise ServerError(f"got servers that ended with {codes} but expected 0; logs: {replicas[0].log.parent}")


def wait_until_all_are_ready(replicas: Sequence[Replica], balancer: Balancer) -> None:
    """Starts anew what ends meanwhile, as an orchestrator would. Raises `ServerError` if it takes too long."""
    deadline = time.monotonic() + PATIENCE_IN_S
    while (healthy := balancer.healthy()) != len(replicas):
        for replica in replicas:
            replica.revive()
        if time.monotonic() > deadline:
            raise ServerError(f"Envoy: got {healthy} healthy servers but expected {len(replicas)}")
        time.sleep(0.1)
    for replica in replicas:
        replica.failures_in_a_row = 0


def make_replicas(checkpoint: Path, count: int, folder: Path, options: Sequence[str] = ()) -> list[Replica]:
    """Returns servers on free ports that have not been started, with logs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(4 * count)
    return [
        Replica(checkpoint, folder / f"server-{number + 1}.log", ports[4 * number : 4 * number + 4], options)
        for number in range(count)
    ]
