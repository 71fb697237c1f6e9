"""Exactly one final answer for every request that a model takes, whatever is raised, in whichever thread.

A `Settlement` is created at the moment a model takes a request, and alone sends its final answer. A request cannot be
forgotten: when the last reference to its settlement is gone, when its deadline has long passed, and when the model
stops, a thread of the `Settlements` answers instead.
"""

import logging
import threading
import time
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeAlias, TypeVar

from audioldm2_triton.errors import DEADLINE_EXCEEDED, DeadlineExceededError, InternalError, UnavailableError

T = TypeVar("T")
R = TypeVar("R")
Prepare: TypeAlias = Callable[[T | BaseException], Any]
"""Makes the final response from an outcome: the result, or the error."""
Send: TypeAlias = Callable[[Any], None]
"""Sends a final response."""
Told: TypeAlias = Callable[[T | BaseException], None]
"""Is told what was answered."""

GRACE_IN_S: Final = 1.0
"""How long after the deadline the stage may still answer, since its message says more; less than a client's margin."""
_LONGEST_WAIT_IN_S: Final = 3600.0
_LAST_ANSWERS_IN_S: Final = 5.0

logger = logging.getLogger(__name__)


class AnsweredError(InternalError):
    """The request has already had its final answer."""


class Settlement(Generic[T]):
    """The one final answer to one request, from any thread."""

    def __init__(self, open_request: "_OpenRequest[T]", dropped: "SimpleQueue[_OpenRequest[Any] | None]") -> None:
        self._open = open_request
        self._dropped = dropped

    def __del__(self) -> None:
        # This may run anywhere, so it must not take a lock; `SimpleQueue.put` is documented to be safe.
        if not self._open.settled:
            self._dropped.put(self._open)

    @property
    def settled(self) -> bool:
        """Returns whether the request has been answered, or is about to be."""
        return self._open.settled

    def settle(self, outcome: T | BaseException) -> bool:
        """Sends the answer and returns True, unless there was one before. Raises nothing: failures are logged."""
        return self._open.answer(outcome)

    def while_open(self, call: Callable[[], R]) -> R:
        """Returns the result of `call`, during which no answer is sent. Raises `AnsweredError` if one has been."""
        return self._open.while_open(call)

    def expect_by(self, deadline_ns: int) -> None:
        """Sets the deadline, on the monotonic clock in ns; 0: none."""
        self._open.expect_by(deadline_ns)


class Settlements:
    """The requests that one model has taken and not yet answered.

    Args:
        stage: the model's name, for the answers that are given in its place.
        count: adds to the gauge of the requests in progress.
    """

    def __init__(self, stage: str, count: Callable[[int], None], grace_in_s: float = GRACE_IN_S) -> None:
        self.stage = stage
        self._count = count
        self._grace_ns = int(grace_in_s * 1e9)
        self._lock = threading.Lock()
        self._open: set[_OpenRequest[Any]] = set()
        self._closed = False
        self._wakes_at = inf  # in ns; the thread looks at the open requests no later
        # None: a deadline is sooner than that, or the model stops.
        self._dropped: SimpleQueue[_OpenRequest[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name=f"settlements-{stage}", daemon=True)
        self._thread.start()

    def take(self, prepare: Prepare[T], send: Send, told: Told[T] | None = None) -> Settlement[T]:
        """Opens the settlement of a request that has just arrived.

        Args:
            prepare: makes the response, and may be slow: until it returns, another thread may answer instead.
            send: called once, and once more with an error if that failed.
            told: called once, after the answer.
        """
        open_request: _OpenRequest[T] = _OpenRequest(self, prepare, send, told)
        self._add(1)
        with self._lock:
            self._open.add(open_request)
            closed = self._closed
        settlement = Settlement(open_request, self._dropped)
        if closed:
            settlement.settle(self._shutting_down())
        return settlement

    def close(self) -> None:
        """Answers every open request."""
        with self._lock:
            self._closed = True
            left = list(self._open)
        for open_request in left:
            open_request.answer(self._shutting_down())
        self._dropped.put(None)
        self._thread.join(_LAST_ANSWERS_IN_S)

    def expect(self, open_request: "_OpenRequest[Any]", deadline_ns: int) -> None:
        with self._lock:
            open_request.deadline_ns = deadline_ns
            is_sooner = deadline_ns > 0 and deadline_ns + self._grace_ns < self._wakes_at
            if is_sooner:
                self._wakes_at = deadline_ns + self._grace_ns
        if is_sooner:  # the thread looks at all that are open: not for each request that arrives
            self._dropped.put(None)

    def forget(self, open_request: "_OpenRequest[Any]") -> None:
        with self._lock:
            self._open.discard(open_request)
        self._add(-1)

    def _add(self, requests: int) -> None:
        try:
            self._count(requests)
        except Exception:
            logger.exception("%s: the gauge of its requests is wrong from now on", self.stage)

    def _shutting_down(self) -> UnavailableError:
        return UnavailableError(f"{self.stage} is shutting down; try again")

    def _watch(self) -> None:
        while not self._closed:
            try:
                self._answer_dropped(self._seconds_to_wait())
                self._answer_late()
            except BaseException:
                # Nothing here is expected to raise, but no other thread would answer in its place.
                logger.exception("%s: open requests could not be checked", self.stage)

    def _seconds_to_wait(self) -> float:
        with self._lock:
            deadlines = [each.deadline_ns for each in self._open if each.deadline_ns > 0 and not each.settled]
            self._wakes_at = wakes_at = min(deadlines) + self._grace_ns if deadlines else inf
        left = (wakes_at - time.monotonic_ns()) / 1e9
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
    """The means to answer a request. It outlives its `Settlement`, so it holds no reference to it."""

    def __init__(self, settlements: Settlements, prepare: Prepare[T], send: Send, told: Told[T] | None) -> None:
        self._told = told
        self.deadline_ns = 0
        self._settlements = settlements
        self._ways: tuple[Prepare[T], Send] | None = (prepare, send)
        self._claim = threading.Lock()  # taken by whoever answers, and never released
        self._sending = threading.Lock()  # held while the response sender is used

    @property
    def settled(self) -> bool:
        return self._claim.locked()

    def answer(self, outcome: T | BaseException) -> bool:
        ways = self._ways
        prepared, answered = (None, outcome) if ways is None or self.settled else self._prepare(outcome, ways[0])
        if not self._claim.acquire(blocking=False):
            kind = type(outcome).__name__
            logger.warning("%s: not sent, since the request has been answered: %s", self._settlements.stage, kind)
            return False
        assert ways is not None  # it is set until the answer is claimed
        try:
            with self._sending:
                error = self._deliver(prepared, *ways)
            self._tell(answered if error is None else error)
        except BaseException:
            logger.exception("%s: a request could not be answered", self._settlements.stage)
        finally:
            self._ways = self._told = None  # with all that they refer to
            self._settlements.forget(self)
        return True

    def expect_by(self, deadline_ns: int) -> None:
        self._settlements.expect(self, deadline_ns)

    def while_open(self, call: Callable[[], R]) -> R:
        with self._sending:
            if self.settled:
                raise AnsweredError(f"{self._settlements.stage}: the request has already had its final answer")
            return call()

    def _prepare(self, outcome: T | BaseException, prepare: Prepare[T]) -> tuple[Any, T | BaseException]:
        """Makes the response, and says of what; None if not even an error could be made."""
        try:
            return prepare(outcome), outcome
        except BaseException as error:
            logger.exception("%s: an answer could not be made", self._settlements.stage)
            instead = self._not_sent(error)
            try:
                return prepare(instead), instead
            except BaseException:
                logger.exception("%s: nor could an error", self._settlements.stage)
                return None, instead

    def _deliver(self, prepared: Any, prepare: Prepare[T], send: Send) -> InternalError | None:
        """Returns the error that was sent instead, if there was one."""
        try:
            send(prepared)
        except BaseException as error:
            # The answer may have been too large for the shared memory.
            logger.exception("%s: an answer could not be sent", self._settlements.stage)
            instead = self._not_sent(error)
            send(prepare(instead))
            return instead
        return None

    def _tell(self, answered: T | BaseException) -> None:
        try:
            if self._told is not None:
                self._told(answered)
        except BaseException:
            logger.exception("%s: an answer was sent, but not recorded", self._settlements.stage)

    def _not_sent(self, error: BaseException) -> InternalError:
        stage = self._settlements.stage
        return InternalError(f"{stage} failed: its answer could not be sent ({type(error).__name__})")
