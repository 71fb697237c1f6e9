"""Which waiting requests are encoded together; a request is its number of rows here."""

from collections import deque

import pytest

from gathering import take_batch


@pytest.mark.parametrize(
    ("waiting", "batch"),
    [
        ([], []),
        ([1, 2, 3], [1, 2, 3]),
        ([4, 4, 1], [4, 4]),
        ([3, 6, 1], [3]),
        ([20, 1], [20]),
        ([0, 8, 0, 1], [0, 8, 0]),
    ],
)
def test_the_first_that_fit_are_taken(waiting: list[int], batch: list[int]) -> None:
    left = deque(waiting)
    assert take_batch(left, int, 8) == batch
    assert [*batch, *left] == waiting
