"""`scripts/chaos`: one stage after the other is killed or stopped under load, and the network is bad.

No audio may be wrong, no call may hang, and the next server must serve soon.
"""

import argparse
import itertools
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from signal import SIGKILL, SIGSTOP, Signals
from typing import Final

import numpy as np
import psutil

from audioldm2_triton import AudioLDM2Client, AudioLDM2Error, UnavailableError
from serving.local_server import LocalServer, local_server
from serving.stage_processes import find_stages
from trials.command import add_common_arguments, end, tiny_checkpoint
from trials.proxy import Toxics, proxy
from trials.requests import Known, generate, known_requests
from trials.watching import left_behind, left_in_memory, restarts

MODELS: Final = ("denoiser", "text_conditioning", "decoder", "audioldm2_stream")
IN_FLIGHT: Final = 16  # plain calls at the moment of each fault, over gRPC, HTTP and as streams
ENDED_WITHIN_IN_S: Final = {SIGKILL: 5.0, SIGSTOP: 15.0}
SERVED_WITHIN_IN_S: Final = {SIGKILL: 20.0, SIGSTOP: 30.0}
_PATIENCE_IN_S: Final = 120.0
_PAUSE_IN_S: Final = 0.2
# The network of the clients that send again; it changes with every round.
_TOXICS: Final = (Toxics(), Toxics(latency_in_s=0.02), Toxics(slicer_bytes=100), Toxics(limit_bytes=200_000))


@dataclass
class Round:
    """A fault, and what followed; seconds after it."""

    model: str
    signal: Signals
    calls_ended_in_s: float = 0.0
    hung: int = 0
    wrong: int = 0  # answers with audio that is not their own
    served_in_s: float = 0.0
    noticed_in_s: float = 0.0

    def failures(self) -> list[str]:
        found = [f"{self.hung} calls hung"] if self.hung else []
        if self.wrong:
            found.append(f"the audio of {self.wrong} answers was wrong")
        if self.calls_ended_in_s > ENDED_WITHIN_IN_S[self.signal]:
            found.append(f"the last call ended after {self.calls_ended_in_s:.1f} s")
        if self.served_in_s > SERVED_WITHIN_IN_S[self.signal]:
            found.append(f"the next right answer came after {self.served_in_s:.1f} s")
        return [f"{self.signal.name} of {self.model}: {what}" for what in found]


@dataclass
class Resent:
    """What has become of the requests of the clients that send again."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: list[tuple[float, bool]] = field(default_factory=list)  # when, and whether with right audio
    wrong: list[str] = field(default_factory=list)

    def note(self, right: bool, wrong: str = "") -> None:
        with self.lock:
            self.ended.append((time.monotonic(), right))
            if wrong:
                self.wrong.append(wrong)


def chaos(
    server: LocalServer, known: Sequence[Known], minutes: float, stops_every: int, random: Random
) -> tuple[list[Round], Resent, list[float]]:
    """Strikes for so many minutes, 10 to 20 s after the server is ready each time; returns also when it struck.

    Args:
        stops_every: every so many rounds the stage is stopped instead of killed.
    """
    rounds: list[Round] = []
    struck: list[float] = []
    resent, over = Resent(), threading.Event()
    until = time.monotonic() + 60 * minutes
    with ExitStack() as stack:
        grpc_proxy, http_proxy = (stack.enter_context(proxy(port)) for port in (server.grpc_port, server.http_port))
        pool = stack.enter_context(ThreadPoolExecutor(4 + IN_FLIGHT))
        urls = [f"grpc://localhost:{grpc_proxy.port}", f"http://localhost:{http_proxy.port}"] * 2
        loads = [pool.submit(keep_sending, url, known, resent, over, Random(random.random())) for url in urls]
        try:
            for number in itertools.count():
                if time.monotonic() > until:
                    break
                grpc_proxy.toxics = http_proxy.toxics = _TOXICS[number % len(_TOXICS)]
                time.sleep(random.uniform(10, 20))
                signal = SIGSTOP if stops_every and number % stops_every == stops_every - 1 else SIGKILL
                struck.append(time.monotonic())
                rounds.append(_strike(server, pool, known, MODELS[number % len(MODELS)], signal))
                print(rounds[-1], flush=True)
        finally:
            over.set()
            for load in loads:
                load.result()
    return rounds, resent, struck


def keep_sending(
    url: str,
    known: Sequence[Known],
    resent: Resent,
    over: threading.Event,
    random: Random,
    patience_in_s: float = _PATIENCE_IN_S,
) -> None:
    """Sends one request after the other until it is over, each again and again for at most that long."""
    with AudioLDM2Client(url, max_retries=1000) as client:
        while not over.is_set():
            chosen = random.choice(known)
            try:
                # Not as a stream of the caller's, which is never sent again.
                right = chosen.is_right(client.generate(**chosen.arguments, timeout=patience_in_s).audio)
                resent.note(right, "" if right else f"the audio of {chosen.arguments}")
            except AudioLDM2Error as error:
                resent.note(False)
                print(f"{type(error).__name__}: {error}", file=sys.stderr)


def _strike(
    server: LocalServer, pool: ThreadPoolExecutor, known: Sequence[Known], model: str, signal: Signals
) -> Round:
    """Strikes with 16 calls inside that nobody sends again."""
    calls = [pool.submit(_call, server, known[number % len(known)], number) for number in range(IN_FLIGHT)]
    time.sleep(0.3)
    (stage,) = (process for process, name in find_stages(server.process.pid).items() if name == model)
    old = restarts(server)
    stage.send_signal(signal)
    at = time.monotonic()
    found = Round(model, signal)
    while restarts(server) == old and time.monotonic() - at < _PATIENCE_IN_S:
        time.sleep(0.05)
    found.noticed_in_s = round(time.monotonic() - at, 1)
    found.wrong += not known[0].is_right(_first_audio(server, known[0]))
    found.served_in_s = round(time.monotonic() - at, 1)
    ends = [_end_of(call) for call in calls]
    found.hung = sum(end is None for end in ends)
    found.wrong += sum(not end.right for end in ends if end is not None)
    found.calls_ended_in_s = round(max([end.time_s - at for end in ends if end is not None], default=0.0), 1)
    return found


def _first_audio(server: LocalServer, known: Known) -> np.ndarray:
    """Asks again and again without the client's growing pauses, which would count as the server's."""
    until = time.monotonic() + _PATIENCE_IN_S
    with AudioLDM2Client(server.grpc_url, max_retries=0) as client:
        while True:
            try:
                return client.generate(**known.arguments, timeout=_PATIENCE_IN_S).audio
            except UnavailableError:
                if time.monotonic() > until:
                    raise
            time.sleep(_PAUSE_IN_S)


@dataclass(frozen=True)
class _End:
    """The end of a call: an error, or audio."""

    time_s: float
    right: bool  # unless it was audio, and not its own


def _call(server: LocalServer, known: Known, number: int) -> _End:
    """Makes a call that nobody sends again."""
    url = (server.grpc_url, server.http_url)[number % 2]
    right = True
    with AudioLDM2Client(url, max_retries=0) as client, suppress(AudioLDM2Error):
        right = known.is_right(generate(client, known, Random(number)))
    return _End(time.monotonic(), right)


def _end_of(call: Future[_End]) -> _End | None:
    try:
        return call.result(timeout=_PATIENCE_IN_S)
    except TimeoutError:
        return None


def success_rates(resent: Resent, struck: Sequence[float]) -> dict[bool, tuple[int, int]]:
    """Returns right and all answers, by whether they came within 20 s after a fault."""
    rates = {True: (0, 0), False: (0, 0)}
    for ended, right in resent.ended:
        within = any(0 <= ended - at <= SERVED_WITHIN_IN_S[SIGKILL] for at in struck)
        rates[within] = (rates[within][0] + right, rates[within][1] + 1)
    return rates


def orphans() -> list[str]:
    """Returns the stages that no server has any more."""
    stubs = [
        process.pid
        for process in psutil.process_iter(["name", "ppid"])
        if process.info["name"].startswith("triton_python") and process.info["ppid"] == 1
    ]
    return [f"process {stub} is an orphan" for stub in stubs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30, help="default: %(default)s")
    parser.add_argument("--stops-every", type=int, default=5, help="rounds; 0: kills only (default: %(default)s)")
    add_common_arguments(parser, "chaos")


def measure(arguments: argparse.Namespace) -> None:
    """Raises `SystemExit` if audio was wrong, a call hung or took too long, or something was left behind."""
    checkpoint = tiny_checkpoint(arguments)
    memory = set(Path("/dev/shm").iterdir())
    options = ("--max-restarts=100000", "--max-restart-delay-in-s=0")
    with local_server(checkpoint, arguments.log, *options) as server:
        known = known_requests(server)
        result = chaos(server, known, arguments.minutes, arguments.stops_every, Random(arguments.seed))
        rounds, resent, struck = result
        held = left_behind(server)
    for model, signal in itertools.product(MODELS, ENDED_WITHIN_IN_S):
        those = [each for each in rounds if (each.model, each.signal) == (model, signal)]
        if those:
            calls, served = (max(getattr(each, f"{what}_in_s") for each in those) for what in ("calls_ended", "served"))
            noticed = max(each.noticed_in_s for each in those)
            print(
                f"{len(those):4} {signal.name} of {model}: noticed within {noticed} s, calls ended within {calls} s, "
                f"the next right answer within {served} s"
            )
    for within, (right, count) in success_rates(resent, struck).items():
        print(f"{right} of {count} requests right {'within 20 s of a fault' if within else 'outside'}")
    wrong = [*resent.wrong, *(failure for each in rounds for failure in each.failures()), *held, *orphans()]
    outside_right, outside = success_rates(resent, struck)[False]
    if outside_right < outside:
        wrong.append(f"{outside - outside_right} requests failed though no fault was near")
    wrong += left_in_memory(memory)
    end("chaos", wrong, arguments.log)
