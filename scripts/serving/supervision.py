"""Runs `tritonserver` in the foreground, replaces it when it fails, and stops it without losing a request."""

import contextlib
import errno
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Final

import psutil

from audioldm2_triton.server.entrance import Entrance, show_full_decoders
from audioldm2_triton.server.metric_names import STAGE_REQUESTS
from serving import health as states
from serving.diagnosis import Lasting, Observation, Patience, RestartLimit, diagnose, full_decoders, restart_delay
from serving.health import Health
from serving.loopback import read_page
from serving.metrics import read_metrics
from serving.model_control import read_states, was_unloaded
from serving.run_directory import end_server, note_server
from serving.server_error import DRAIN_TIMEOUT_IN_S, ServerError
from serving.stage_processes import find_stages, observe_stages

logger = logging.getLogger(__name__)

EXIT_TIMEOUT_IN_S: Final = 5  # of a server with nothing in it, which may wait for idle connections
SETTLING_TIME_IN_S: Final = 0.5  # a request between two stages is counted by neither
_TICK_IN_S: Final = 0.1
_OBSERVATION_INTERVAL_IN_S: Final = 1.0
_PAGE_TIMEOUT_IN_S: Final = 5.0
_LOAD_FAILURE: Final = re.compile(r"failed to load '(\w+)' version \d+: (.*)")


class StopSignals:
    """Counts SIGTERM, SIGHUP and Ctrl-C, each unless it is ignored, as long as the `with` block lasts."""

    def __init__(self) -> None:
        self.count = 0
        self.raises = True
        """Returns whether the first one raises SystemExit: right as long as there is nothing to stop."""

    def __enter__(self) -> "StopSignals":
        # A shell starts background jobs with Ctrl-C ignored, nohup with SIGHUP ignored.
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        obeyed = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._count) for number in obeyed}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.raises:
            raise SystemExit(0)


@dataclass(frozen=True)
class ServerCommand:
    """The command of a server, and its addresses."""

    words: Sequence[str]
    environment: Mapping[str, str]
    host: str
    http_port: int
    metrics_port: int
    directory: Path  # of the run
    admin_key: str = ""
    models_may_change: bool = False  # while the server runs, by requests to load and unload them


@dataclass
class _Running:
    """A server that has been started."""

    process: subprocess.Popen[str]
    log: threading.Thread
    failures: list[str]  # of models that did not load
    ready: bool = False  # was it ever?
    stages: dict[psutil.Process, str] = field(default_factory=dict)  # once it is ready


def check_ports_free(host: str, ports: Mapping[str, int]) -> None:
    """Raises `ServerError`, which names the option and the port that is no port, in use, or given twice."""
    for option, port in ports.items():
        if not 0 <= port <= 65535:
            raise ServerError(f"{option}: got {port} but expected a port from 0 to 65535")
        twin = next((other for other, number in ports.items() if number == port and other != option and port), None)
        if twin:
            raise ServerError(f"{option}: got {port}, the port of {twin}, but expected another")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except socket.gaierror:
                raise ServerError(f"--host: got {host!r} but expected an address of this machine") from None
            except OSError as error:
                reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
                raise ServerError(f"{option}: port {port} {reason}") from None


def run_server(
    command: ServerCommand,
    stop: StopSignals,
    health: Health,
    on_ready: Callable[[], None],
    drain_timeout_in_s: float = DRAIN_TIMEOUT_IN_S,
    patience: Patience | None = None,
    limit: RestartLimit | None = None,
) -> None:
    """Runs the server until a stop signal; replaces it whenever it crashes, or fails after it was ready.

    Calls `on_ready` once, when it is ready for the first time.

    A first stop signal drains: new requests are refused, those inside are answered, at most `drain_timeout_in_s` long.
    A second one stops at once.

    Raises `ServerError` if the server does not become ready at its first start, fails more often than `limit` allows,
    or stops with requests inside.
    """
    patience, limit = patience or Patience(), limit or RestartLimit()
    stop.raises = False
    failures: tuple[float, ...] = ()
    announced = False

    def announce() -> None:
        nonlocal announced
        if announced:
            logger.info("ready again after restart %d", health.restarts)
        else:
            on_ready()
        announced = True

    try:
        while True:
            running = _start(command)
            reason = _watch(running, command, stop, health, announce, patience)
            if reason is None:
                health.state = states.DRAINING
                _drain(running, command, stop, drain_timeout_in_s)
                return
            end_server(command.directory)
            running.process.wait()
            running.log.join(timeout=5)
            # A signal that ends a server while it starts is no refusal: 2.51.0 aborts on a machine that is starved.
            refused = running.failures or running.process.returncode >= 0
            if not failures and health.state == states.STARTING and refused:
                raise ServerError(running.failures[0] if running.failures else reason)
            failures += (time.monotonic(),)
            delay = restart_delay(failures, limit)
            if delay is None:
                raise ServerError(f"{reason}; given up after {limit.count} restarts in {limit.window_in_s:g} s")
            logger.error("%s; restarting the server in %g s", reason, delay)
            health.state, health.reason, health.restarts = states.RESTARTING, reason, health.restarts + 1
            until = time.monotonic() + delay
            while time.monotonic() < until and not stop.count:
                time.sleep(_TICK_IN_S)
            if stop.count:
                return
    finally:
        health.state = states.STOPPED
        end_server(command.directory)


def _start(command: ServerCommand) -> _Running:
    process = subprocess.Popen(
        command.words,
        env=dict(command.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C must reach only this process, which then stops the server
    )
    note_server(command.directory, process.pid)
    failures: list[str] = []
    log = threading.Thread(target=_forward_log, args=(process, failures), daemon=True)
    log.start()
    return _Running(process, log, failures)


def _watch(
    running: _Running,
    command: ServerCommand,
    stop: StopSignals,
    health: Health,
    on_ready: Callable[[], None],
    patience: Patience,
) -> str | None:
    """Returns why the server has failed, or None once it is to stop."""
    previous: Observation | None = None
    lasting: Lasting = {}
    next_look = 0.0
    show_full_decoders(command.directory, ())  # of a predecessor
    while not stop.count:
        if (code := running.process.poll()) is not None:
            return f"tritonserver stopped by itself with exit code {code}"
        now = time.monotonic()
        if now >= next_look:
            next_look = now + _OBSERVATION_INTERVAL_IN_S
            if running.ready:
                if command.models_may_change:
                    _follow_models(running, command)
                    health.state = states.READY if _is_ready(command) else states.UNLOADED
                observation = Observation(now, observe_stages(running.stages), _metrics(command))
                reason, lasting = diagnose(observation, previous, lasting, patience)
                if reason:
                    return reason
                previous = observation
                if observation.metrics is not None:  # else nothing is known that should change it
                    show_full_decoders(command.directory, full_decoders(observation))
            elif _is_ready(command):
                running.ready, running.stages = True, find_stages(running.process.pid)
                health.state = states.READY
                on_ready()
            else:
                next_look = now + _TICK_IN_S
        time.sleep(_TICK_IN_S)
    return None


def _drain(running: _Running, command: ServerCommand, stop: StopSignals, timeout_in_s: float) -> None:
    """Lets running requests finish first: Triton before 25.05 drops gRPC requests that are inside an ensemble.

    Raises `ServerError` if requests were inside when the time was up, or a stage died with them.
    """
    Entrance(command.directory).close()
    logger.info("draining: new requests are refused")
    deadline = time.monotonic() + timeout_in_s
    idle_since = time.monotonic()
    inside = 0.0
    while running.process.poll() is None and running.ready:
        inside = (_metrics(command) or {}).get(STAGE_REQUESTS, 0.0)
        now = time.monotonic()
        if inside:
            idle_since = now
        elif now - idle_since > SETTLING_TIME_IN_S:
            break
        if now > deadline or stop.count > 1 or not all(stage.alive for stage in observe_stages(running.stages)):
            break
        time.sleep(SETTLING_TIME_IN_S / 10)
    # Nothing is lost any more by a short exit: Triton would wait for idle connections, and for models to unload.
    if running.process.poll() is None and stop.count == 1:
        running.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(timeout=EXIT_TIMEOUT_IN_S)
    end_server(command.directory)
    running.process.wait()
    running.log.join(timeout=5)
    if inside:
        raise ServerError(f"stopped with {inside:g} requests inside")


def _follow_models(running: _Running, command: ServerCommand) -> None:
    """Watches the processes of models that were loaded since the last look, and forgets those of unloaded ones."""
    running.stages |= find_stages(running.process.pid)
    observed = dict(zip(running.stages, observe_stages(running.stages), strict=True))
    if all(stage.alive for stage in observed.values()):
        return
    try:
        models = read_states(command.http_port, command.host, command.admin_key, _PAGE_TIMEOUT_IN_S)
    except (OSError, HTTPException, ValueError):  # of a server that has gone, or keeps it to itself
        return
    living: dict[str, float] = {}
    for process, stage in observed.items():
        if stage.alive:
            living[stage.model] = max(process.create_time(), living.get(stage.model, 0.0))
    for process, stage in observed.items():
        if not stage.alive and was_unloaded(stage.model, process.create_time(), models, living):
            logger.info("%s was unloaded", stage.model)
            del running.stages[process]


def _is_ready(command: ServerCommand) -> bool:
    # Triton opens the metrics port last.
    try:
        read_page(command.http_port, "/v2/health/ready", _PAGE_TIMEOUT_IN_S, command.host)
    except (OSError, HTTPException):
        return False
    return _metrics(command) is not None


def _metrics(command: ServerCommand) -> dict[str, float] | None:
    try:
        return read_metrics(command.metrics_port, command.host, _PAGE_TIMEOUT_IN_S)
    except (OSError, HTTPException, ValueError):  # the server has gone, or sent half a page
        return None


def _forward_log(process: subprocess.Popen[str], failures: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        # Even if this fails, the server must be able to go on writing.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line)
            sys.stderr.flush()
        if match := _LOAD_FAILURE.search(line):
            said, _, _ = match[2].partition(r"\n\nAt:")  # where it was raised is in the log
            failures.append(f"{match[1]} did not load: {said.strip()}")
