"""Settlements without Triton: every request gets exactly one final answer, and the gauge comes down."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import pytest

from audioldm2_triton.errors import DeadlineExceededError, InternalError, UnavailableError
from audioldm2_triton.server.settlement import AnsweredError, Settlement, Settlements

STAGE = "some_stage"
GRACE_IN_S = 0.05
WAIT_IN_S = 30


class Client:
    """Who has sent a request: gets its answers."""

    def __init__(self) -> None:
        self.answers: SimpleQueue[object] = SimpleQueue()

    def answer(self) -> object:
        return self.answers.get(timeout=WAIT_IN_S)

    def has_more(self) -> bool:
        try:
            self.answers.get_nowait()
        except Empty:
            return False
        return True


def same(outcome: object) -> object:
    return outcome


class Gauge:
    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, requests: int) -> None:
        with self._lock:
            self.value += requests

    def wait_for_zero(self) -> None:
        deadline = time.monotonic() + WAIT_IN_S
        while self.value:
            assert time.monotonic() < deadline, f"the gauge stays at {self.value}"
            time.sleep(0.001)


@pytest.fixture
def gauge() -> Gauge:
    return Gauge()


@pytest.fixture
def settlements(gauge: Gauge) -> Iterator[Settlements]:
    settlements = Settlements(STAGE, gauge.add, GRACE_IN_S)
    yield settlements
    settlements.close()
    assert gauge.value == 0


def now_and(seconds: float) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def test_the_first_answer_is_the_only_one(
    settlements: Settlements, gauge: Gauge, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client()
    settlement: Settlement[object] = settlements.take(same, client.answers.put)
    assert gauge.value == 1
    assert not settlement.settled
    assert settlement.settle("sound")
    assert settlement.settled
    assert not settlement.settle(ValueError("too late"))
    assert "has been answered: ValueError" in caplog.text
    assert client.answer() == "sound"
    assert not client.has_more()
    assert gauge.value == 0


def test_of_many_threads_one_answers(settlements: Settlements) -> None:
    for _ in range(50):
        client, start = Client(), threading.Barrier(8)
        settlement: Settlement[object] = settlements.take(same, client.answers.put)
        won: list[bool] = []

        def settle(
            settlement: Settlement[object] = settlement, start: threading.Barrier = start, won: list[bool] = won
        ) -> None:
            start.wait()
            won.append(settlement.settle(threading.get_ident()))

        threads = [threading.Thread(target=settle) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won.count(True) == 1
        client.answer()
        assert not client.has_more()


def lose_by_returning(settlement: Settlement[object]) -> None:
    """Does nothing with it."""


def lose_in_a_future_that_nobody_reads(settlement: Settlement[object]) -> None:
    def work(settlement: Settlement[object]) -> None:
        raise ImportError(f"no scipy, {settlement.settled}")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work, settlement)


def lose_in_a_cycle(settlement: Settlement[object]) -> None:
    cycle: list[object] = [settlement]
    cycle.append(cycle)


@pytest.mark.parametrize("lose", [lose_by_returning, lose_in_a_future_that_nobody_reads, lose_in_a_cycle])
def test_a_dropped_request_is_answered(
    lose: Callable[[Settlement[object]], None],
    settlements: Settlements,
    gauge: Gauge,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client()
    lose(settlements.take(same, client.answers.put))
    gc.collect()
    answer = client.answer()
    assert isinstance(answer, InternalError)
    assert STAGE in str(answer)
    assert "dropped without an answer" in caplog.text
    gauge.wait_for_zero()


def test_what_is_late_is_answered_although_every_callback_is_lost(settlements: Settlements, gauge: Gauge) -> None:
    clients = [Client() for _ in range(3)]
    held: list[Settlement[object]] = [settlements.take(same, client.answers.put) for client in clients]
    held[0].expect_by(now_and(3600))
    deadline = now_and(0.05)
    held[1].expect_by(deadline)
    answer = clients[1].answer()
    assert time.monotonic_ns() >= deadline + GRACE_IN_S * 1e9, "the stage itself would have had more to say"
    assert isinstance(answer, DeadlineExceededError)
    assert str(answer) == f"deadline exceeded in {STAGE}"
    assert not held[1].settle("sound, after all")
    # Those with another deadline, or with none, are left alone.
    assert not held[0].settled
    assert not held[2].settled
    assert gauge.value == 2
    held[2].expect_by(now_and(-10))
    assert isinstance(clients[2].answer(), DeadlineExceededError)
    held[0].settle("sound")
    assert clients[0].answer() == "sound"


@pytest.mark.parametrize("deadline_ns", [0, now_and(3600)], ids=["none", "alike"])
def test_a_burst_of_requests_is_not_looked_at_once_for_each(
    deadline_ns: int, settlements: Settlements, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    look = settlements._answer_late
    monkeypatch.setattr(settlements, "_answer_late", lambda: (looks.append(None), look()))
    client, lost = Client(), Client()
    held: list[Settlement[object]] = [settlements.take(same, client.answers.put) for _ in range(100)]
    for settlement in held:
        settlement.expect_by(deadline_ns)
    settlements.take(same, lost.answers.put)  # nobody keeps it; the thread sees it after all that it was told before
    assert isinstance(lost.answer(), InternalError)
    assert len(looks) < 10
    for settlement in held:
        settlement.settle("sound")


def test_an_answer_that_cannot_be_sent_becomes_an_error(
    settlements: Settlements, gauge: Gauge, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client()

    def send(outcome: object) -> None:
        if outcome == "too much sound":
            raise MemoryError("no shared memory")
        client.answers.put(outcome)

    settlement: Settlement[object] = settlements.take(same, send)
    assert settlement.settle("too much sound")
    answer = client.answer()
    assert isinstance(answer, InternalError)
    assert str(answer) == f"{STAGE} failed: its answer could not be sent (MemoryError)"
    assert "no shared memory" in caplog.text
    assert gauge.value == 0


def test_an_answer_that_cannot_be_made_becomes_an_error(
    settlements: Settlements, gauge: Gauge, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client()

    def prepare(outcome: object) -> object:
        if isinstance(outcome, ValueError):
            raise UnicodeError("no such letter")
        return outcome

    settlement: Settlement[object] = settlements.take(prepare, client.answers.put)
    assert settlement.settle(ValueError("\ud800"))
    assert str(client.answer()) == f"{STAGE} failed: its answer could not be sent (UnicodeError)"
    assert "no such letter" in caplog.text
    assert gauge.value == 0


def test_an_answer_that_takes_too_long_to_make_is_late(
    settlements: Settlements, caplog: pytest.LogCaptureFixture
) -> None:
    client, answered = Client(), threading.Event()

    def prepare(outcome: object) -> object:
        if outcome == "sound":
            assert answered.wait(WAIT_IN_S)
        return outcome

    settlement: Settlement[object] = settlements.take(prepare, client.answers.put)
    settlement.expect_by(now_and(0.05))
    with ThreadPoolExecutor(1) as pool:
        settled = pool.submit(settlement.settle, "sound")
        assert isinstance(client.answer(), DeadlineExceededError)
        answered.set()
        assert not settled.result()
    assert not client.has_more()
    assert caplog.text.count("unanswered after its deadline") == 1


def test_what_is_being_sent_is_not_late(settlements: Settlements, caplog: pytest.LogCaptureFixture) -> None:
    """Nor does the thread that looks after it turn in circles meanwhile."""
    client, sending, sent = Client(), threading.Event(), threading.Event()

    def send(outcome: object) -> None:
        sending.set()
        assert sent.wait(WAIT_IN_S)
        client.answers.put(outcome)

    settlement: Settlement[object] = settlements.take(same, send)
    with ThreadPoolExecutor(1) as pool:
        settled = pool.submit(settlement.settle, "sound")
        assert sending.wait(WAIT_IN_S)
        settlement.expect_by(now_and(0.01))
        time.sleep(0.01 + 3 * GRACE_IN_S)
        sent.set()
        assert settled.result()
    assert client.answer() == "sound"
    assert "deadline" not in caplog.text


def test_a_client_that_cannot_be_reached_is_logged_and_counted_down(
    settlements: Settlements, gauge: Gauge, caplog: pytest.LogCaptureFixture
) -> None:
    def send(_: object) -> None:
        raise SystemError("the response sender is gone")

    settlement: Settlement[object] = settlements.take(same, send)
    assert settlement.settle("sound")
    assert "could not be answered" in caplog.text
    assert gauge.value == 0


def test_what_uses_the_sender_comes_before_the_final_answer_only(settlements: Settlements) -> None:
    client = Client()
    settlement: Settlement[object] = settlements.take(same, client.answers.put)
    assert settlement.while_open(lambda: client.answers.put("part") or 7) == 7
    settlement.settle("sound")
    with pytest.raises(AnsweredError, match="has already had its final answer"):
        settlement.while_open(lambda: client.answers.put("part"))
    assert [client.answer(), client.answer()] == ["part", "sound"]
    assert not client.has_more()


def test_no_answer_is_sent_while_the_sender_is_used(settlements: Settlements) -> None:
    client, asking, done = Client(), threading.Event(), threading.Event()
    settlement: Settlement[object] = settlements.take(same, client.answers.put)

    def ask() -> None:
        asking.set()
        assert done.wait(WAIT_IN_S)
        client.answers.put("asked")

    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(settlement.while_open, ask)
        assert asking.wait(WAIT_IN_S)
        answered = pool.submit(settlement.settle, "sound")
        while not settlement.settled:
            time.sleep(0.001)
        done.set()
        asked.result()
        assert answered.result()
    assert [client.answer(), client.answer()] == ["asked", "sound"]


def test_closing_answers_what_is_open_and_what_comes_after(gauge: Gauge) -> None:
    settlements, clients = Settlements(STAGE, gauge.add), [Client() for _ in range(4)]
    held: list[Settlement[object]] = [settlements.take(same, client.answers.put) for client in clients[:3]]
    held[0].settle("sound")
    settlements.close()
    held.append(settlements.take(same, clients[3].answers.put))
    assert clients[0].answer() == "sound"
    for client in clients[1:]:
        answer = client.answer()
        assert isinstance(answer, UnavailableError)
        assert str(answer) == f"{STAGE} is shutting down; try again"
    assert not any(client.has_more() for client in clients)
    assert gauge.value == 0


def test_a_broken_gauge_does_not_break_a_request(caplog: pytest.LogCaptureFixture) -> None:
    def count(_: int) -> None:
        raise RuntimeError("no such metric")

    settlements, client = Settlements(STAGE, count), Client()
    settlement: Settlement[object] = settlements.take(same, client.answers.put)
    settlement.settle("sound")
    settlements.close()
    assert client.answer() == "sound"
    assert "gauge" in caplog.text


def test_a_request_that_is_answered_keeps_nothing_alive(settlements: Settlements) -> None:
    class Sender:
        def send(self, _: object) -> None:
            pass

    sender, gone = Sender(), threading.Event()
    gone_when_deleted = gone.set
    Sender.__del__ = lambda _: gone_when_deleted()  # type: ignore[attr-defined]
    settlement: Settlement[object] = settlements.take(same, sender.send)
    settlement.settle("sound")
    del sender
    assert gone.wait(WAIT_IN_S)


def test_a_great_number_of_requests_lost_and_late_and_answered(
    settlements: Settlements, gauge: Gauge, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    clients = [Client() for _ in range(3000)]
    late: list[Settlement[object]] = []
    for index, client in enumerate(clients):
        settlement: Settlement[object] = settlements.take(same, client.answers.put)
        if index % 3 == 0:
            settlement.settle("sound")
        elif index % 3 == 1:
            settlement.expect_by(now_and(0.001 * (index % 50)))
            late.append(settlement)
        del settlement
    kinds = {index: type(client.answer()) for index, client in enumerate(clients)}
    assert [kinds[index] for index in range(3)] == [str, DeadlineExceededError, InternalError]
    assert all(kind is kinds[index % 3] for index, kind in kinds.items())
    assert not any(client.has_more() for client in clients)
    gauge.wait_for_zero()


def test_the_answer_is_told_once_and_afterwards(gauge: Gauge) -> None:
    settlements, client = Settlements(STAGE, gauge.add), Client()
    told: list[tuple[object, bool, int]] = []

    def tell(outcome: object) -> None:
        told.append((outcome, client.has_more(), gauge.value))
        raise RuntimeError("nobody listens")

    settlement: Settlement[object] = settlements.take(same, client.answers.put, tell)
    settlement.settle("the answer")
    settlement.settle("another")
    assert told == [("the answer", True, 1)]
    gauge.wait_for_zero()
    settlements.close()


def test_what_could_not_be_sent_is_not_told(gauge: Gauge) -> None:
    settlements, told = Settlements(STAGE, gauge.add), SimpleQueue[object]()

    def send(response: object) -> None:
        if not isinstance(response, InternalError):
            raise RuntimeError("too large")

    settlement: Settlement[object] = settlements.take(same, send, told.put)
    settlement.settle("the answer")
    assert isinstance(told.get(timeout=WAIT_IN_S), InternalError)
    assert told.empty()
    settlements.close()
