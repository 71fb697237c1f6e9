"""Items that wait are computed together, in order of arrival, as in a stage's thread on a server."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Calls `compute` with all items that have come while it was busy, on a thread of its own."""

    def __init__(self, compute: Callable[[Sequence[T]], Sequence[R]], max_items: int) -> None:
        self._compute = compute
        self._max_items = max_items
        self._changed = threading.Condition()
        self._waiting: list[tuple[T, Future[R]]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, item: T) -> "Future[R]":
        future: Future[R] = Future()
        with self._changed:
            self._waiting.append((item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch, self._waiting = self._waiting[: self._max_items], self._waiting[self._max_items :]
            try:
                results = self._compute([item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
