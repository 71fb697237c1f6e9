"""Whom a stage answers first, and with whom; a request is its number of rows here."""

import threading
from collections import deque
from concurrent.futures import CancelledError
from contextlib import suppress

import pytest

from audioldm2_triton.contract import BATCH, INTERACTIVE
from audioldm2_triton.server.settings import ARRIVAL, LAXITY
from audioldm2_triton.server.stage_thread import BATCH_ROWS, StageThread, take_batch

WAIT_IN_S = 30.0


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


class Answering:
    """A stage thread that says what it has answered, and waits before its first answer."""

    def __init__(self, scheduling: str = LAXITY, forwards: int = 0) -> None:
        self.answered: list[tuple[str, list[int]]] = []
        self.forwards = forwards  # before each of which a group of low priority gives way
        self.fails = False
        self.closes = False  # at its first answer
        self.progress = 0
        self.come: list[int] = []  # interactive requests that come while it works, one before each forward
        self.thread: StageThread[int] = StageThread("stage", self.answer, int, 4, self.show_progress, scheduling)
        self._may_begin = threading.Event()
        self._executor = self.thread._executor
        self._executor.submit(self._may_begin.wait, WAIT_IN_S)

    def show_progress(self) -> None:
        self.progress += 1

    def answer(self, requests: list[int], priority: str) -> None:
        if self.fails:
            self.fails = False
            raise RuntimeError("no answer")
        if self.closes:
            self.thread.close()
        for _ in range(self.forwards if priority == BATCH else 0):
            if self.come:
                self.thread.add(self.come.pop(0), INTERACTIVE)
            self.thread.give_way()
        self.answered.append((priority, requests))

    def run(self) -> list[tuple[str, list[int]]]:
        last = self._executor.submit(lambda: None)
        self._may_begin.set()
        with suppress(CancelledError):
            last.result(WAIT_IN_S)
        self._executor.shutdown()
        return self.answered


def test_interactive_requests_are_answered_first_and_then_a_group_of_low_priority() -> None:
    answering = Answering()
    for rows in (5, 3, 1, 7):
        answering.thread.add(rows, BATCH)
    for rows in (2, 2, 3):
        answering.thread.add(rows, INTERACTIVE)
    assert BATCH_ROWS == 8
    # The group between the two: so that those of low priority never wait for ever.
    assert answering.run() == [(INTERACTIVE, [2, 2]), (BATCH, [5, 3]), (INTERACTIVE, [3]), (BATCH, [1, 7])]


def test_a_group_of_low_priority_lets_in_those_that_come_while_it_is_computed() -> None:
    answering = Answering(forwards=4)
    answering.come = [1, 2]
    for rows in (5, 3):
        answering.thread.add(rows, BATCH)
    assert answering.run() == [(INTERACTIVE, [1]), (INTERACTIVE, [2]), (BATCH, [5, 3])]
    assert answering.progress == 3 + answering.forwards  # at each group, and each forward


def test_by_arrival_nothing_overtakes() -> None:
    answering = Answering(ARRIVAL)
    for rows, priority in ((2, BATCH), (1, INTERACTIVE), (2, BATCH), (2, INTERACTIVE)):
        answering.thread.add(rows, priority)
    assert answering.run() == [(INTERACTIVE, [2, 1]), (INTERACTIVE, [2, 2])]


def test_an_answer_that_fails_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    answering = Answering()
    answering.fails = True
    for rows in (4, 4):
        answering.thread.add(rows, INTERACTIVE)
    assert answering.run() == [(INTERACTIVE, [4])]
    assert "could not be answered" in caplog.text


@pytest.mark.parametrize("priority", [INTERACTIVE, BATCH])
def test_nothing_more_is_begun_once_it_is_closed(priority: str, caplog: pytest.LogCaptureFixture) -> None:
    answering = Answering(forwards=2)
    for each in (priority, BATCH, BATCH):
        answering.thread.add(5, each)
    answering.closes = True
    # A group of low priority ends at its next forward.
    assert answering.run() == ([(INTERACTIVE, [5])] if priority == INTERACTIVE else [])
    assert ("stage is shutting down" in caplog.text) == (priority == BATCH)


def test_what_is_loaded_belongs_to_the_thread_that_answers() -> None:
    found: list[int] = []
    thread: StageThread[int] = StageThread(
        "stage", lambda _, __: found.append(threading.get_ident()), int, 4, lambda: None
    )
    found.append(thread.run(threading.get_ident))
    thread.add(1, BATCH)
    thread.run(lambda: None)
    thread.close()
    assert found[0] == found[1] != threading.get_ident()
    with pytest.raises(RuntimeError):
        thread.add(1, BATCH)
