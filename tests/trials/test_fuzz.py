"""A short run of `scripts/fuzz`, and what its requests are made of."""

from pathlib import Path
from random import Random

import numpy as np
import pytest

from audioldm2_triton import contract
from audioldm2_triton.server import faults
from serving.local_server import LocalServer
from trials.fuzz import Tally, attack, fuzz
from trials.hostile import hostile, hostile_body, valid
from trials.sending import ANSWERED, NONE, REFUSED


def test_hostile_requests_by_every_way_are_answered(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tally, wrong = fuzz(tiny_checkpoint, tmp_path / "log", count=800, seed=7, clients=4)
    assert not tally.failures
    assert not wrong
    assert tally.checks == 4 * 2  # of the valid requests between them
    for way in ("gRPC", "gRPC stream", "HTTP binary", "HTTP JSON", "generate"):
        assert tally.kinds[f"{way}: {ANSWERED}"] > 0
        assert tally.kinds[f"{way}: {REFUSED}"] > 30
    assert tally.kinds[f"HTTP body: {REFUSED}"] > 10


def test_what_is_wrong_is_seen(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: a stage that fails a few times after the first right audio."""

    def attack_what_fails(server: LocalServer, count: int, random: Random, right: np.ndarray) -> Tally:
        faults.arm(tmp_path, "decoder.parse", faults.RAISE, times=3)
        return attack(server, count, random, right)

    monkeypatch.setenv(faults.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr("trials.fuzz.attack", attack_what_fails)
    tally, wrong = fuzz(tiny_checkpoint, tmp_path / "log", count=100, seed=7, clients=1)
    assert sum(count for failure, count in tally.failures.items() if "fault at decoder.parse" in failure) == 3
    assert not any(NONE in failure for failure in tally.failures)
    assert not wrong


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
