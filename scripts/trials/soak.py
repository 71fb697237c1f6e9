"""`scripts/soak`: mixed load for as long as wanted, part of it cancelled, late, or from clients that are killed.

All others must get the right audio, and the server must not grow.
"""

import argparse
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Final

from audioldm2_triton import AudioLDM2Client, AudioLDM2Error, DeadlineExceededError, UnavailableError
from serving.local_server import LocalServer, local_server
from trials.command import add_common_arguments, add_load_arguments, end, tiny_checkpoint
from trials.proxy import Proxy, proxy
from trials.requests import Known, generate, known_requests
from trials.watching import Sample, growth, left_behind, table, watched

CANCELLED_SHARE: Final = 0.10
LATE_SHARE: Final = 0.05
KILLED_SHARE: Final = 0.05


@dataclass
class Outcomes:
    """What has become of the requests; shared by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, wrong: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            if wrong:
                self.wrong.append(wrong)


class Soaker:
    """Sends requests from one thread, over connections of its own that it can cut."""

    def __init__(self, server: LocalServer, known: Sequence[Known], outcomes: Outcomes, random: Random) -> None:
        self._stack = ExitStack()
        self._known, self._outcomes, self._random = known, outcomes, random
        self._proxies = [self._stack.enter_context(proxy(port)) for port in (server.grpc_port, server.http_port)]
        schemes = zip(("grpc", "http"), self._proxies, strict=True)
        urls = [f"{scheme}://localhost:{each.port}" for scheme, each in schemes]
        self._clients = [self._stack.enter_context(AudioLDM2Client(url)) for url in urls]
        self._mortal = [self._stack.enter_context(AudioLDM2Client(url, max_retries=0)) for url in urls]

    def close(self) -> None:
        self._stack.close()

    def send(self) -> None:
        """Sends one request, and notes what has become of it."""
        known, way, fate = self._random.choice(self._known), self._random.randrange(2), self._random.random()
        try:
            if fate < CANCELLED_SHARE:
                self._cancel(self._clients[way], known)
            elif fate < CANCELLED_SHARE + LATE_SHARE:
                self._be_late(self._clients[way], known)
            elif fate < CANCELLED_SHARE + LATE_SHARE + KILLED_SHARE:
                self._kill(self._mortal[way], self._proxies[way], known)
            else:
                right = known.is_right(generate(self._clients[way], known, self._random))
                self._outcomes.note("right" if right else "wrong", "" if right else f"the audio of {known.arguments}")
        except AudioLDM2Error as error:
            self._outcomes.note("failed", f"{type(error).__name__}: {error}")

    def _cancel(self, client: AudioLDM2Client, known: Known) -> None:
        events = client.stream(**known.arguments)
        for _ in itertools.islice(events, self._random.randint(1, 3)):
            pass
        events.close()
        self._outcomes.note("cancelled")

    def _be_late(self, client: AudioLDM2Client, known: Known) -> None:
        try:
            audio = generate(client, known, self._random, timeout=self._random.choice([0.001, 0.02, 0.1]))
        except DeadlineExceededError:
            self._outcomes.note("late")
        else:
            right = known.is_right(audio)
            self._outcomes.note("in time", "" if right else f"the audio of {known.arguments}, in time")

    def _kill(self, client: AudioLDM2Client, through: Proxy, known: Known) -> None:
        try:
            for _ in client.stream(**known.arguments):
                through.reset()
        except UnavailableError:
            pass
        self._outcomes.note("killed")


def soak(server: LocalServer, count: int, clients: int, seed: int) -> tuple[Outcomes, list[Sample]]:
    """Sends `count` requests, `clients` at a time, and watches the server."""
    known = known_requests(server)
    outcomes = Outcomes()

    def work(index: int) -> None:
        soaker = Soaker(server, known, outcomes, Random(seed * 1000 + index))
        try:
            for _ in range(index, count, clients):
                soaker.send()
        finally:
            soaker.close()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(clients)]
    with watched(server.process.pid) as samples:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes, samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_load_arguments(parser, 10_000)
    add_common_arguments(parser, "soak")


def measure(arguments: argparse.Namespace) -> None:
    """Raises `SystemExit` if a request had another outcome than it should, or the server has grown."""
    checkpoint = tiny_checkpoint(arguments)
    started = time.monotonic()
    with local_server(checkpoint, arguments.log) as server:
        outcomes, samples = soak(server, arguments.requests, arguments.clients, arguments.seed)
        held = left_behind(server)
    for what, count in outcomes.counts.most_common():
        print(f"{count:8} {what}")
    print(*table(samples), f"{time.monotonic() - started:.0f} s in all", sep="\n")
    wrong = [*outcomes.wrong[:50], *growth(samples), *held]
    end("soak", wrong, arguments.log)
