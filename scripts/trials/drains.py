"""`scripts/drains`: SIGTERM at random moments, under load and during the start. No accepted request may be lost."""

import argparse
import http.client
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Final

from audioldm2_triton import AudioLDM2Client, AudioLDM2Error, UnavailableError
from serving.local_server import LocalServer, free_ports, local_server, serve_command
from serving.server_error import ServerError
from trials.chaos import orphans
from trials.command import add_common_arguments, end, tiny_checkpoint
from trials.requests import Known, generate, known_requests
from trials.watching import left_in_memory

CLIENTS: Final = 16
_IDLE: Final = 4  # connections that are kept open without a request
_LONGEST_LOAD_IN_S: Final = 8.0
_LONGEST_START_IN_S: Final = 12.0
_PATIENCE_IN_S: Final = 120.0
_RIGHT: Final = "right"
_REFUSED: Final = "refused, since the server is shutting down"
_GONE: Final = "not connected, since the server had gone"


def drain_under_load(checkpoint: Path, log: Path, random: Random) -> Counter[str]:
    """Stops a server with 16 callers, each of which calls until it is refused. Returns how often each thing came back.

    Raises `ServerError` if the server does not end with exit code 0.
    """
    with ThreadPoolExecutor(CLIENTS) as pool, ExitStack() as idle:
        with local_server(checkpoint, log) as server:
            known = known_requests(server)
            for _ in range(_IDLE):
                _connect(server, idle)
            stopped = threading.Event()
            callers = [
                pool.submit(_call_until_refused, server, known, number, stopped, Random(random.random()))
                for number in range(CLIENTS)
            ]
            time.sleep(random.uniform(0, _LONGEST_LOAD_IN_S))
        stopped.set()
        return sum((caller.result(timeout=_PATIENCE_IN_S) for caller in callers), Counter())


def _connect(server: LocalServer, idle: ExitStack) -> None:
    connection = http.client.HTTPConnection("localhost", server.http_port)
    connection.request("GET", "/v2/health/ready")
    connection.getresponse().read()
    idle.callback(connection.close)


def _call_until_refused(
    server: LocalServer, known: Sequence[Known], number: int, stopped: threading.Event, random: Random
) -> Counter[str]:
    found: Counter[str] = Counter()
    with AudioLDM2Client((server.grpc_url, server.http_url)[number % 2], max_retries=0) as client:
        while not (found[_REFUSED] or found[_GONE]):
            # When the server has ended, no call that is made can be accepted.
            gone = stopped.is_set() or server.process.poll() is not None
            chosen = random.choice(known)
            try:
                right = chosen.is_right(generate(client, chosen, random, timeout=_PATIENCE_IN_S))
                found[_RIGHT if right else f"wrong audio of {chosen.arguments}"] += 1
            except UnavailableError as error:
                refused = "the server is shutting down" in str(error)
                found[_REFUSED if refused else _GONE if gone or _is_unconnected(error) else f"lost: {error}"] += 1
                if not (refused or gone):
                    break
            except AudioLDM2Error as error:
                found[f"lost: {type(error).__name__}: {error}"] += 1
                break
    return found


def _is_unconnected(error: UnavailableError) -> bool:
    """Whether a request was not sent: nothing listens any more."""
    return any(words in str(error).lower() for words in ("connection refused", "failed to connect"))


def drain_during_start(checkpoint: Path, log: Path, random: Random) -> int:
    """Stops a server that is starting; returns its exit code."""
    with log.open("w") as output:
        process = subprocess.Popen(serve_command(checkpoint, free_ports(4)), stdout=output, stderr=output)
    time.sleep(random.uniform(0, _LONGEST_START_IN_S))
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=_PATIENCE_IN_S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20, help="every fourth is during the start (default: 20)")
    add_common_arguments(parser, "drains")


def measure(arguments: argparse.Namespace) -> None:
    """Raises `SystemExit` if a request was lost, audio was wrong, or a server did not end with 0 and leave nothing."""
    checkpoint, random = tiny_checkpoint(arguments), Random(arguments.seed)
    before = set(Path("/dev/shm").iterdir())
    total: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(arguments.rounds):
        started = time.monotonic()
        try:
            if number % 4 == 3:
                code = drain_during_start(checkpoint, arguments.log, random)
                found = Counter({f"stopped during the start, exit code {code}": 1})
                wrong += [f"round {number}: exit code {code}"] if code else []
            else:
                found = drain_under_load(checkpoint, arguments.log, random)
        except ServerError as error:
            wrong.append(f"round {number}: {error}")
            continue
        print(f"round {number}, {time.monotonic() - started:.0f} s: {dict(found)}", flush=True)
        wrong += [f"round {number}: {failure}" for failure in failures(found)]
        total += found
    for what, count in total.most_common():
        print(f"{count:8} {what}")
    end("drains", [*wrong, *orphans(), *left_in_memory(before)], arguments.log)


def failures(found: Counter[str]) -> list[str]:
    """Returns what must not have come back, and how often it did."""
    return [f"{count} times {what}" for what, count in found.items() if what.startswith(("lost", "wrong"))]
