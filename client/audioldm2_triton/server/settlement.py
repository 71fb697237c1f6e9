"""One final answer for every request that a model takes, whatever is raised wherever.

A `Settlement` is made at the moment a model takes a request, and owns the sending of its one final answer. Forgetting
it is no way out: when the last reference to it is gone, when its deadline has long passed, and when the model stops, a
thread of the `Settlements` answers instead.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeAlias, TypeVar

from audioldm2_triton.errors import DEADLINE_EXCEEDED, DeadlineExceededError, InternalError, UnavailableError

T = TypeVar("T")
R = TypeVar("R")
Prepare: TypeAlias = Callable[[T | BaseException], Any]
"""Makes the final response of an outcome: what was asked for, or why it cannot be had."""
Send: TypeAlias = Callable[[Any], None]
"""Sends a final response."""

GRACE_IN_S: Final = 1.0
"""How long after its deadline a request is left to its stage, which can say more; less than a client's own margin."""
_LONGEST_WAIT_IN_S: Final = 3600.0
_LAST_ANSWERS_IN_S: Final = 5.0

logger = logging.getLogger(__name__)


class AnsweredError(InternalError):
    """The request has its final answer."""


class Settlement(Generic[T]):
    """The one final answer to one request, from any thread."""

    def __init__(self, open_request: "_OpenRequest[T]", dropped: "SimpleQueue[_OpenRequest[Any] | None]") -> None:
        self._open = open_request
        self._dropped = dropped

    def __del__(self) -> None:
        # Called anywhere, so no lock may be taken here: putting into this queue is safe by its documentation.
        if not self._open.settled:
            self._dropped.put(self._open)

    @property
    def settled(self) -> bool:
        """Whether the request has its answer, or is about to."""
        return self._open.settled

    def settle(self, outcome: T | BaseException) -> bool:
        """Sends the answer and returns True, unless there was one before. Raises nothing: what fails is logged."""
        return self._open.answer(outcome)

    def while_open(self, call: Callable[[], R]) -> R:
        """What `call` returns, during which no answer is sent. Raises `AnsweredError` if one was."""
        return self._open.while_open(call)

    def expect_by(self, deadline_ns: int) -> None:
        """Sets the deadline, on the monotonic clock in ns; 0: none."""
        self._open.deadline_ns = deadline_ns
        self._dropped.put(None)


class Settlements:
    """The requests that one model has taken and not answered yet.

    Args:
        stage: the model's name, for the answers that it did not give itself.
        count: adds to the gauge of the requests that the stage works on.
    """

    def __init__(self, stage: str, count: Callable[[int], None], grace_in_s: float = GRACE_IN_S) -> None:
        self.stage = stage
        self._count = count
        self._grace_ns = int(grace_in_s * 1e9)
        self._lock = threading.Lock()
        self._open: set[_OpenRequest[Any]] = set()
        self._closed = False
        # None: something else has changed.
        self._dropped: SimpleQueue[_OpenRequest[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name=f"settlements-{stage}", daemon=True)
        self._thread.start()

    def take(self, prepare: Prepare[T], send: Send) -> Settlement[T]:
        """The settlement of a request that has just arrived.

        Args:
            prepare: may take its time: until it is done, somebody else may answer.
            send: called once; once more with an error, if that failed.
        """
        open_request: _OpenRequest[T] = _OpenRequest(self, prepare, send)
        self._add(1)
        with self._lock:
            self._open.add(open_request)
            closed = self._closed
        settlement = Settlement(open_request, self._dropped)
        if closed:
            settlement.settle(self._shutting_down())
        return settlement

    def close(self) -> None:
        """Answers all that is open."""
        with self._lock:
            self._closed = True
            left = list(self._open)
        for open_request in left:
            open_request.answer(self._shutting_down())
        self._dropped.put(None)
        self._thread.join(_LAST_ANSWERS_IN_S)

    def forget(self, open_request: "_OpenRequest[Any]") -> None:
        with self._lock:
            self._open.discard(open_request)
        self._add(-1)

    def _add(self, requests: int) -> None:
        try:
            self._count(requests)
        except Exception:
            logger.exception("%s: the gauge of its requests is wrong from here on", self.stage)

    def _shutting_down(self) -> UnavailableError:
        return UnavailableError(f"{self.stage} is shutting down; try again")

    def _watch(self) -> None:
        while not self._closed:
            try:
                self._answer_dropped(self._seconds_to_wait())
                self._answer_late()
            except BaseException:
                # Nothing here is expected to raise; but this thread is the last that can answer.
                logger.exception("%s: open requests could not be looked after", self.stage)

    def _seconds_to_wait(self) -> float:
        with self._lock:
            deadlines = [each.deadline_ns for each in self._open if each.deadline_ns > 0 and not each.settled]
        if not deadlines:
            return _LONGEST_WAIT_IN_S
        left = (min(deadlines) + self._grace_ns - time.monotonic_ns()) / 1e9
        return min(max(left, 0.0), _LONGEST_WAIT_IN_S)

    def _answer_dropped(self, timeout_in_s: float) -> None:
        try:
            dropped = self._dropped.get(timeout=timeout_in_s)
        except Empty:
            return
        if dropped is not None and not dropped.settled:
            logger.error("%s: a request was dropped without an answer", self.stage)
            dropped.answer(InternalError(f"{self.stage} failed: the request was lost"))

    def _answer_late(self) -> None:
        now = time.monotonic_ns()
        with self._lock:
            late = [each for each in self._open if 0 < each.deadline_ns <= now - self._grace_ns and not each.settled]
        for open_request in late:
            logger.warning("%s: a request is still unanswered after its deadline", self.stage)
            open_request.answer(DeadlineExceededError(f"{DEADLINE_EXCEEDED} in {self.stage}"))


class _OpenRequest(Generic[T]):
    """What is needed to answer a request. It knows nothing of its `Settlement`, whose end it must outlive."""

    def __init__(self, settlements: Settlements, prepare: Prepare[T], send: Send) -> None:
        self.deadline_ns = 0
        self._settlements = settlements
        self._ways: tuple[Prepare[T], Send] | None = (prepare, send)
        self._claim = threading.Lock()  # taken by whoever answers, and never given back
        self._sending = threading.Lock()  # held while the response sender is used

    @property
    def settled(self) -> bool:
        return self._claim.locked()

    def answer(self, outcome: T | BaseException) -> bool:
        ways = self._ways
        prepared = None if ways is None or self.settled else self._prepare(outcome, ways[0])
        if not self._claim.acquire(blocking=False):
            kind = type(outcome).__name__
            logger.warning("%s: not sent, since the request has its answer: %s", self._settlements.stage, kind)
            return False
        assert ways is not None  # it is there until somebody has claimed the answer
        try:
            with self._sending:
                self._deliver(prepared, *ways)
        except BaseException:
            logger.exception("%s: a request could not be answered", self._settlements.stage)
        finally:
            self._ways = None  # with all that they refer to
            self._settlements.forget(self)
        return True

    def while_open(self, call: Callable[[], R]) -> R:
        with self._sending:
            if self.settled:
                raise AnsweredError(f"{self._settlements.stage}: the request has its final answer already")
            return call()

    def _prepare(self, outcome: T | BaseException, prepare: Prepare[T]) -> Any:
        """The response, or None where there is none."""
        try:
            return prepare(outcome)
        except BaseException as error:
            logger.exception("%s: an answer could not be made", self._settlements.stage)
            try:
                return prepare(self._not_sent(error))
            except BaseException:
                logger.exception("%s: nor could an error", self._settlements.stage)
                return None

    def _deliver(self, prepared: Any, prepare: Prepare[T], send: Send) -> None:
        try:
            send(prepared)
        except BaseException as error:
            # It may have been the answer, which is too large for the shared memory.
            logger.exception("%s: an answer could not be sent", self._settlements.stage)
            send(prepare(self._not_sent(error)))

    def _not_sent(self, error: BaseException) -> InternalError:
        stage = self._settlements.stage
        return InternalError(f"{stage} failed: its answer could not be sent ({type(error).__name__})")
