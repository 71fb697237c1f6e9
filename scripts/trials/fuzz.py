"""`scripts/fuzz`: hostile requests by every way into a server; each must be answered, and none may harm the others."""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Final

import numpy as np

from audioldm2_triton import AudioLDM2Client, AudioLDM2Error
from serving.local_server import LocalServer, local_server
from trials.command import add_common_arguments, add_load_arguments, end, tiny_checkpoint
from trials.hostile import Hostile, hostile, hostile_body
from trials.requests import TOLERANCE
from trials.sending import INTERNAL, LEFT_OUT, NONE, Answer, Ways
from trials.watching import left_behind, restarts

# So that no accepted request takes long.
LIMITS: Final = (
    "--max-audio-length-in-s=1",
    "--max-num-inference-steps=4",
    "--max-num-waveforms-per-prompt=2",
    "--default-timeout-in-s=30",
)
_BODY_SHARE: Final = 0.05  # of the requests that are no requests at all
_CHECK_EVERY: Final = 100
_SHOWN: Final = 160


@dataclass
class Tally:
    """What has come back so far; one for each thread."""

    kinds: Counter[str] = field(default_factory=Counter)  # by way and kind
    failures: Counter[str] = field(default_factory=Counter)
    checks: int = 0

    def add(self, way: str, done: tuple[str, ...], answer: Answer) -> None:
        self.kinds[f"{way}: {answer.kind}"] += 1
        if answer.kind in (INTERNAL, NONE):
            self.failures[f"{way}: {answer.kind}: {'+'.join(done)}: {answer.message[:_SHOWN]}"] += 1


def attack(server: LocalServer, count: int, random: Random, right: np.ndarray) -> Tally:
    """Sends `count` requests, one after the other, with a check of a right one's audio after every hundred."""
    tally, ways = Tally(), Ways(server)
    protocols = [AudioLDM2Client(url, max_retries=0) for url in (server.grpc_url, server.http_url)]
    try:
        for sent in range(count):
            if sent % _CHECK_EVERY == 0:
                _check(protocols[tally.checks % 2], right, tally)
            if random.random() < _BODY_SHARE:
                tally.add("HTTP body", (), ways.post("/v2/models/audioldm2/infer", hostile_body(random), {}))
                continue
            way, send = random.choice(list(ways.all.items()))
            request = hostile(random)
            tally.add(way, request.done, _sent(send, request))
    finally:
        ways.close()
        for client in protocols:
            client.close()
    return tally


def _sent(send: Callable[[Hostile], Answer], request: Hostile) -> Answer:
    try:
        return send(request)
    except (ValueError, TypeError, UnicodeError) as error:  # it cannot even be written down in this protocol
        return Answer(LEFT_OUT, str(error))


def _right_audio(client: AudioLDM2Client) -> np.ndarray:
    return client.generate("rain", audio_length_in_s=0.3, num_inference_steps=3, seed=1).audio


def _check(client: AudioLDM2Client, right: np.ndarray, tally: Tally) -> None:
    tally.checks += 1
    try:
        distance = float(np.abs(_right_audio(client) - right).max())
    except AudioLDM2Error as error:
        tally.failures[f"a valid request: {error}"] += 1
        return
    if distance > TOLERANCE:
        tally.failures[f"a valid request's audio is {distance:.1e} off"] += 1


def fuzz(server: LocalServer, count: int, seed: int, clients: int) -> Tally:
    """Sends `count` requests, `clients` at a time, and returns what has come back."""
    with AudioLDM2Client(server.grpc_url) as client:
        right = _right_audio(client)
    with ThreadPoolExecutor(clients) as pool:
        share = -(-count // clients)
        tallies = list(pool.map(lambda n: attack(server, share, Random(seed * 1000 + n), right), range(clients)))
    total = Tally()
    for tally in tallies:
        total.kinds += tally.kinds
        total.failures += tally.failures
        total.checks += tally.checks
    return total


def wrong_afterwards(server: LocalServer) -> list[str]:
    """Returns what is wrong with a server that has been attacked."""
    held, count = left_behind(server), restarts(server)
    return [*held, f"the server was restarted {count} times"] if count else held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_load_arguments(parser, 100_000)
    add_common_arguments(parser, "fuzz")


def measure(arguments: argparse.Namespace) -> None:
    """Raises `SystemExit` if a request was not answered, or a stage failed."""
    checkpoint = tiny_checkpoint(arguments)
    started = time.monotonic()
    with local_server(checkpoint, arguments.log, *LIMITS) as server:
        tally = fuzz(server, arguments.requests, arguments.seed, arguments.clients)
        wrong = wrong_afterwards(server)
    for name, count in sorted(tally.kinds.items()):
        print(f"{count:8} {name}")
    print(f"{tally.checks:8} valid requests between them, {time.monotonic() - started:.0f} s in all")
    failures = [f"{count} times: {failure}" for failure, count in tally.failures.most_common(50)]
    end("fuzz", [*failures, *wrong], arguments.log)
