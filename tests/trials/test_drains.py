"""A short run of `scripts/drains`, and its verdict; `commands/test_supervision.py` has a drain step by step."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from trials.drains import drain_during_start, drain_under_load, failures


def test_what_was_lost_or_wrong_is_a_failure() -> None:
    found = Counter({"right": 5, "refused, since the server is shutting down": 16, "lost: Socket closed": 2})
    assert failures(found) == ["2 times lost: Socket closed"]


@pytest.mark.slow
def test_nothing_is_lost(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = drain_under_load(tiny_checkpoint, tmp_path / "log", Random(0))
    assert found["right"]
    assert found["refused, since the server is shutting down"]
    assert not failures(found)
    assert drain_during_start(tiny_checkpoint, tmp_path / "log", Random(0)) == 0
