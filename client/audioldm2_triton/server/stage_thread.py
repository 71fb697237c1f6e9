"""The one thread of a stage that computes: several requests together, and the interactive ones first."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, TypeVar

from audioldm2_triton.contract import BATCH, INTERACTIVE, PRIORITIES
from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.server.settings import LAXITY

BATCH_ROWS: Final = 8
"""Rows of low priority that are computed together: enough to share a call, and few, since others may come meanwhile."""

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class StageThread(Generic[T]):
    """Answers the requests of a stage, in order of arrival within each priority.

    Of those that wait, interactive ones are answered first, together, and then one group of low priority, so that none
    waits for ever. That group lets those in that have come since, wherever its computation calls `give_way`.

    Args:
        stage: its name, for messages.
        answer: answers requests of one priority, which it is given; it should raise nothing.
        num_rows: the rows of a request.
        most_rows: of interactive requests that are answered together.
        show_progress: called whenever the thread gets on; `answer` may call it too.
        scheduling: the setting; by `arrival`, all requests count as interactive.
    """

    def __init__(
        self,
        stage: str,
        answer: Callable[[list[T], str], None],
        num_rows: Callable[[T], int],
        most_rows: int,
        show_progress: Callable[[], None],
        scheduling: str = LAXITY,
    ) -> None:
        self._stage = stage
        self._answer = answer
        self._show_progress = show_progress
        self._num_rows = num_rows
        self._by_priority = scheduling == LAXITY
        self._most_rows = {INTERACTIVE: most_rows, BATCH: BATCH_ROWS}
        self._waiting: dict[str, deque[T]] = {priority: deque() for priority in PRIORITIES}
        self._closed = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=stage)

    def run(self, function: Callable[[], R]) -> R:
        """Returns the result of `function`, called on the thread that owns what is compiled or captured there."""
        return self._executor.submit(function).result()

    def add(self, request: T, priority: str) -> None:
        """Answers a request soon. Raises `RuntimeError` if the thread cannot be started, or is closed."""
        self._waiting[priority if self._by_priority else INTERACTIVE].append(request)
        self._executor.submit(self._take_turn)

    def give_way(self) -> None:
        """Answers the interactive requests that wait; for `answer` to call at low priority before each forward.

        Raises `UnavailableError` once it is closed, since nobody waits for the rest.
        """
        if self._closed:
            raise UnavailableError(f"{self._stage} is shutting down; try again")
        self._show_progress()
        self._answer_first(INTERACTIVE)

    def close(self) -> None:
        """Starts nothing more. Waits for nothing."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _take_turn(self) -> None:
        # Once for each request that has come; there may be none left.
        self._answer_first(INTERACTIVE)
        self._answer_first(BATCH)

    def _answer_first(self, priority: str) -> None:
        if self._closed:  # whoever waits is answered by the settlements
            return
        batch = take_batch(self._waiting[priority], self._num_rows, self._most_rows[priority])
        try:
            if batch:
                self._show_progress()
                self._answer(batch, priority)
        except BaseException:  # a future would keep it, and nobody asks for that
            logger.exception("requests of the priority %s could not be answered", priority)


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
