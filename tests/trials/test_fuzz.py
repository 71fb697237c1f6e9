"""A short run of `scripts/fuzz`, and what its requests are made of."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from audioldm2_triton import contract
from audioldm2_triton.server import faults
from server_faults import faults_found_in
from serving.local_server import LocalServer, local_server
from trials.fuzz import LIMITS, Tally, attack, fuzz, wrong_afterwards
from trials.hostile import hostile, hostile_body, valid
from trials.sending import ANSWERED, NONE, REFUSED


@pytest.fixture(scope="module")
def limited(
    tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("limited") / "log"
    with faults_found_in(fault_directory), local_server(tiny_checkpoint, log, *LIMITS) as server:
        yield server


def test_hostile_requests_by_every_way_are_answered(limited: LocalServer) -> None:
    tally = fuzz(limited, count=800, seed=7, clients=4)
    assert not tally.failures
    assert not wrong_afterwards(limited)
    assert tally.checks == 4 * 2  # of the valid requests between them
    for way in ("gRPC", "gRPC stream", "HTTP binary", "HTTP JSON", "generate"):
        assert tally.kinds[f"{way}: {ANSWERED}"] > 0
        assert tally.kinds[f"{way}: {REFUSED}"] > 30
    assert tally.kinds[f"HTTP body: {REFUSED}"] > 10


def test_what_is_wrong_is_seen(limited: LocalServer, fault_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: a stage that fails a few times after the first right audio."""

    def attack_what_fails(server: LocalServer, count: int, random: Random, right: np.ndarray) -> Tally:
        faults.arm(fault_directory, "decoder.parse", faults.RAISE, times=3)
        return attack(server, count, random, right)

    monkeypatch.setattr("trials.fuzz.attack", attack_what_fails)
    tally = fuzz(limited, count=100, seed=7, clients=1)
    assert sum(count for failure, count in tally.failures.items() if "fault at decoder.parse" in failure) == 3
    assert not any(NONE in failure for failure in tally.failures)
    assert not wrong_afterwards(limited)


def test_a_seed_gives_the_same_requests() -> None:
    first, second = ([hostile(Random(seed)) for seed in range(300)] for _ in range(2))
    assert first == second
    assert [hostile_body(Random(seed)) for seed in range(50)] == [hostile_body(Random(seed)) for seed in range(50)]
    kinds = {change for request in first for change in request.done}
    assert len(kinds) >= 16


def test_the_requests_that_are_broken_were_right_before() -> None:
    for seed in range(100):
        for tensor in valid(Random(seed), contract.ENSEMBLE).tensors:
            assert tensor.datatype == contract.INPUTS[tensor.name]
