"""Runs `tritonserver` in the foreground, and stops it cleanly."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Final

from audioldm2_triton.server.metric_names import STAGE_REQUESTS
from serving.loopback import read_page
from serving.metrics import read_metrics

EXIT_TIMEOUT_IN_S: Final = 30
SETTLING_TIME_IN_S: Final = 0.5  # a request between two stages is counted by neither
_LOAD_FAILURE: Final = re.compile(r"failed to load '(\w+)' version \d+: (.*)")


class ServerError(RuntimeError):
    """The server did not start, or stopped unexpectedly."""


def check_ports_free(ports: Mapping[str, int]) -> None:
    """Raises `ServerError`, which names the option and the port that is in use."""
    for option, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                raise ServerError(f"{option}: port {port} is in use") from None


def run_server(
    command: Sequence[str],
    environment: Mapping[str, str],
    http_port: int,
    metrics_port: int,
    on_ready: Callable[[], None],
) -> None:
    """Runs the server until SIGTERM, or Ctrl-C unless ignored. Raises `ServerError` if it stops unexpectedly."""
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C must reach only this process, which then stops the server
    )
    stopping = threading.Event()

    def stop(*_: object) -> None:
        # Only once: a second signal makes Triton exit immediately, with requests in flight.
        if not stopping.is_set():
            stopping.set()
            threading.Thread(target=_drain_and_terminate, args=(process, metrics_port), daemon=True).start()

    # A shell starts background jobs with Ctrl-C ignored, so that they survive when another job receives it.
    obeyed = [signal.SIGTERM, *([] if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else [signal.SIGINT])]
    previous = {number: signal.signal(number, stop) for number in obeyed}
    failures: list[str] = []
    log = threading.Thread(target=_forward_log, args=(process, failures), daemon=True)
    log.start()
    threading.Thread(target=_report_ready, args=(process, http_port, metrics_port, on_ready), daemon=True).start()
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    log.join(timeout=5)
    if not stopping.is_set():
        raise ServerError(failures[0] if failures else f"tritonserver stopped by itself with exit code {code}")


def _drain_and_terminate(process: subprocess.Popen[str], metrics_port: int) -> None:
    """Lets running requests finish first: Triton before 25.05 drops gRPC requests that are inside an ensemble."""
    deadline = time.monotonic() + EXIT_TIMEOUT_IN_S
    idle_since = time.monotonic()
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if _requests_inside(metrics_port):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > SETTLING_TIME_IN_S:
                break
            time.sleep(SETTLING_TIME_IN_S / 10)
    finally:
        process.terminate()


def _requests_inside(metrics_port: int) -> float:
    """Returns the number of requests in progress in all stages."""
    try:
        metrics = read_metrics(metrics_port)
    except (OSError, HTTPException, ValueError):  # the server has gone, or sent half a page
        return 0
    return metrics.get(STAGE_REQUESTS, 0.0)


def _forward_log(process: subprocess.Popen[str], failures: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        # Even if this fails, the server must be able to go on writing.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line)
            sys.stderr.flush()
        if match := _LOAD_FAILURE.search(line):
            failures.append(f"{match[1]} did not load: {match[2].strip()}")


def _report_ready(
    process: subprocess.Popen[str], http_port: int, metrics_port: int, on_ready: Callable[[], None]
) -> None:
    # Triton opens the metrics port last.
    while process.poll() is None:
        try:
            read_page(http_port, "/v2/health/ready", timeout=5)
            read_page(metrics_port, "/metrics", timeout=5)
        except (OSError, HTTPException):
            time.sleep(0.1)
        else:
            on_ready()
            return
