"""Which of the waiting requests are encoded together."""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def take_batch(waiting: deque[T], num_rows: Callable[[T], int], most_rows: int) -> list[T]:
    """Removes the first requests from `waiting`, as many as have `most_rows` rows together; at least one, if any waits.

    In order of arrival: a request that does not fit holds up those behind it.
    """
    batch: list[T] = []
    rows = 0
    while waiting and (not batch or rows + num_rows(waiting[0]) <= most_rows):
        batch.append(waiting.popleft())
        rows += num_rows(batch[-1])
    return batch
