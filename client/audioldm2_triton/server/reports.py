"""A thread that tells others what happens: the server what the metrics are to show, a collector what is traced.

Each operation on a metric is a round trip of 0.1 to 2 ms, for which no step and no answer should wait. Being the only
one, the thread also keeps apart the operations of one metric: two at a time bring down the server (2.51.0).
"""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

CLOSE_TIMEOUT_IN_S: Final = 2.0

logger = logging.getLogger(__name__)


class Reports:
    """Carries out operations in the order in which they are put."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"reports-{name}", daemon=True)
        self._thread.start()

    def put(self, operation: Callable[[], object], max_waiting: int = 0) -> None:
        """Has an operation carried out, unless more than `max_waiting` wait for it already; 0: in any case."""
        if not max_waiting or self._queue.qsize() < max_waiting:
            self._queue.put(operation)

    def close(self) -> None:
        """Carries out what is left, and ends the thread."""
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_IN_S)

    def _run(self) -> None:
        while (operation := self._queue.get()) is not None:
            try:
                operation()
            except BaseException:  # no other thread would tell the rest
                logger.exception("something could not be reported")
