"""`scripts/failover`: two servers behind one address, killed and restarted in turn under load.

No request may be lost, since the clients send again what a server that has gone did not answer; no audio may be wrong.
"""

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from replication.envoy import Balancer
from replication.replica import Replica, make_replicas, replicated, wait_until_all_are_ready
from trials.chaos import Resent, keep_sending, orphans
from trials.command import add_common_arguments, add_load_arguments, end, tiny_checkpoint
from trials.requests import Known, known_requests
from trials.watching import left_behind, left_in_memory

SERVERS: Final = 2
REQUEST_PATIENCE_IN_S: Final = 900.0  # a busy machine is not what is tried here
OPTIONS: Final = ("--drain-timeout-in-s=600",)  # for the same reason
KILL: Final = "killed"
ROLLOUT: Final = "restarted in turn"


@dataclass(frozen=True)
class Fault:
    """A server that went, and came back; seconds after it was struck."""

    kind: str
    server: int
    gone_in_s: float  # until it got no more requests
    back_in_s: float  # until it got some again
    exit_code: int = 0  # of one that was asked to go

    def failures(self) -> list[str]:
        return [f"server {self.server + 1} ended with exit code {self.exit_code}"] if self.exit_code else []


def under_load(
    balancer: Balancer,
    known: Sequence[Known],
    clients: int,
    random: Random,
    meanwhile: Callable[[Resent], list[Fault]],
) -> tuple[list[Fault], Resent]:
    """Has clients send one request after the other, over gRPC and over HTTP, while `meanwhile` runs."""
    resent, over = Resent(), threading.Event()
    with ThreadPoolExecutor(clients) as pool:
        urls = [balancer.urls[number % 2] for number in range(clients)]
        loads = [
            pool.submit(keep_sending, url, known, resent, over, Random(random.random()), REQUEST_PATIENCE_IN_S)
            for url in urls
        ]
        try:
            faults = meanwhile(resent)
        finally:
            over.set()
        for load in loads:
            load.result()
    return faults, resent


def kill(replicas: Sequence[Replica], balancer: Balancer, server: int) -> Fault:
    """Kills all processes of one server, and starts it anew once nothing is sent to it."""
    started = time.monotonic()
    replicas[server].kill()
    return _bring_back(KILL, replicas, balancer, server, started)


def roll_out(replicas: Sequence[Replica], balancer: Balancer) -> list[Fault]:
    """Restarts one server after the other: each drains, and the next has to wait until it is back."""
    faults = []
    for server, replica in enumerate(replicas):
        started = time.monotonic()
        replica.stop()
        faults.append(_bring_back(ROLLOUT, replicas, balancer, server, started))
    return faults


def _bring_back(kind: str, replicas: Sequence[Replica], balancer: Balancer, server: int, started: float) -> Fault:
    replica = replicas[server]
    while balancer.healthy() == SERVERS:
        time.sleep(0.1)
    gone = time.monotonic() - started
    code = replica.wait() if kind == ROLLOUT else 0
    replica.start()
    wait_until_all_are_ready(replicas, balancer)
    fault = Fault(kind, server, round(gone, 1), round(time.monotonic() - started, 1), code)
    print(fault, flush=True)
    return fault


def strike(
    replicas: Sequence[Replica],
    balancer: Balancer,
    requests: int,
    kinds: Sequence[str],
    random: Random,
    resent: Resent,
) -> list[Fault]:
    """Strikes as often as `kinds` says, evenly over that many requests, and waits until all of them have ended."""
    faults: list[Fault] = []
    for number, kind in enumerate(kinds, start=1):
        _wait_for(resent, number * requests // (len(kinds) + 1))
        if kind == KILL:
            faults.append(kill(replicas, balancer, random.randrange(SERVERS)))
        else:
            faults += roll_out(replicas, balancer)
    _wait_for(resent, requests)
    return faults


def _wait_for(resent: Resent, count: int) -> None:
    while len(resent.ended) < count:
        time.sleep(0.1)


def failures(faults: Sequence[Fault], resent: Resent) -> list[str]:
    """Returns what must not have happened."""
    wrong = [f"wrong: {what}" for what in resent.wrong]
    lost = sum(not right for _, right in resent.ended) - len(resent.wrong)
    return [
        *(failure for fault in faults for failure in fault.failures()),
        *wrong,
        *([f"{lost} of {len(resent.ended)} requests were lost"] if lost else []),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--rollouts", type=int, default=5, help="rolling restarts of both (default: %(default)s)")
    add_load_arguments(parser, 2000)
    add_common_arguments(parser, "failover")


def measure(arguments: argparse.Namespace) -> None:
    """Raises `SystemExit` if a request was lost, audio was wrong, or something was left behind."""
    checkpoint, random = tiny_checkpoint(arguments), Random(arguments.seed)
    memory = set(Path("/dev/shm").iterdir())
    kinds = [KILL] * arguments.kills + [ROLLOUT] * arguments.rollouts
    random.shuffle(kinds)
    logs = arguments.log.with_suffix("")
    replicas = make_replicas(checkpoint, SERVERS, logs, OPTIONS)
    with replicated(replicas, logs / "envoy.log") as balancer:
        known = known_requests(replicas[0].running)
        started = time.monotonic()
        faults, resent = under_load(
            balancer,
            known,
            arguments.clients,
            random,
            lambda resent: strike(replicas, balancer, arguments.requests, kinds, random, resent),
        )
        took = time.monotonic() - started
        held = [what for replica in replicas for what in left_behind(replica.running)]
    for kind in (KILL, ROLLOUT):
        those = [fault for fault in faults if fault.kind == kind]
        if those:
            gone, back = (max(getattr(fault, f"{what}_in_s") for fault in those) for what in ("gone", "back"))
            print(f"{len(those):4} {kind}: no more requests within {gone} s, some again within {back} s")
    right = sum(right for _, right in resent.ended)
    if failed := sum(replica.failures for replica in replicas):
        print(f"{failed:4} times a server ended by itself, and was started anew; the logs say why")
    print(f"{right} of {len(resent.ended)} requests right, in {took:.0f} s")
    end("failover", [*failures(faults, resent), *held, *orphans(), *left_in_memory(memory)], logs)
