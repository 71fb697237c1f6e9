"""How requests end in the engine: cancelled, late, refused, failed, closed; forwards are counted, not timed."""

import random
import re
import threading
import time
from dataclasses import replace
from functools import partial
from math import inf

import pytest

from audioldm2_triton.contract import SCHEDULERS
from audioldm2_triton.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    RequestCancelledError,
    UnavailableError,
)
from engine import pace
from engine.engine import MOST_ASKED, Engine
from engine.job import Job, start_waveforms
from engine.limits import EngineLimits
from engine.pace import evaluation_costs
from engine.pool import EnginePool
from engine_workload import (
    CPU,
    TABLES,
    Outcomes,
    WatchedUNet,
    assert_is_reference,
    make_engine,
    make_request,
    random_request,
    wait_until,
)
from stepping.forward_plan import ForwardCosts, LinearCost


def test_at_most_one_step_after_a_cancel(engine: Engine, unet: WatchedUNet) -> None:
    unet.gate = threading.Semaphore(5)
    outcomes = Outcomes()
    job = engine.submit(make_request(1, steps=50), outcomes.callback(1))
    engine.submit(make_request(2, steps=9), outcomes.callback(2))
    wait_until(lambda: len(unet.forwards) == 5, "five steps")
    engine.cancel(job)
    unet.gate.release(1000)
    collected = outcomes.collect(2)
    assert isinstance(collected[1], RequestCancelledError)
    assert "of 50 steps" in str(collected[1])
    assert sum(1 in tags for tags in unet.forwards) <= 6
    assert_is_reference(collected[2], make_request(2, steps=9))


def test_a_cancelled_client_is_noticed_by_asking(engine: Engine, unet: WatchedUNet) -> None:
    outcomes, gone = Outcomes(), threading.Event()
    unet.fail = lambda _: time.sleep(0.001)
    engine.submit(make_request(1, steps=200, scheduler="HeunDiscreteScheduler"), outcomes.callback(1), gone.is_set)
    wait_until(lambda: unet.forwards, "a first step")
    gone.set()
    assert isinstance(outcomes.collect(1)[1], RequestCancelledError)


@pytest.mark.parametrize("deadline_ns", [0, 10**15])
@pytest.mark.parametrize(("held", "expected"), [(1, 50), (16, 42), (200, 4)])
def test_the_more_are_held_the_less_often_each_client_is_asked(held: int, expected: int, deadline_ns: int) -> None:
    """Asking 200 clients before each step would take longer than the step."""
    asked: list[int] = []
    request = make_request(1, deadline_ns=deadline_ns)
    waveforms = start_waveforms(request, TABLES, EngineLimits(16, 16), CPU, (0.0, 1.0))
    job = Job(request, waveforms, lambda _: None, lambda: bool(asked.append(1)))
    for millisecond in range(1, 1001):
        assert job.reason_to_end(10**12 + millisecond * 1_000_000, 1.0, held) is None
        assert job.reason_to_end(10**15 - 1, 1.0, held, may_ask=False) is None
    assert expected - 1 <= len(asked) <= expected + 1


def test_a_few_clients_are_asked_before_each_step_and_all_in_turn(engine: Engine, unet: WatchedUNet) -> None:
    unet.gate = threading.Semaphore(0)
    outcomes, asked = Outcomes(), [0] * 41

    def is_cancelled(tag: int) -> bool:
        asked[tag] += 1
        return False

    for tag in range(1, 41):
        engine.submit(make_request(tag), outcomes.callback(tag), partial(is_cancelled, tag))
    unet.gate.release(1)
    wait_until(lambda: engine.load.active_rows == 16, "a full engine")
    before = sum(asked)
    for step in range(1, 4):
        unet.gate.release(1)
        wait_until(lambda step=step: len(unet.forwards) > step, "the next forward")
    assert sum(asked) - before <= 3 * MOST_ASKED
    assert all(asked[1:])
    unet.gate.release(1000)
    outcomes.collect(40)


def test_a_cancelled_request_does_not_wait_for_room(engine: Engine, unet: WatchedUNet) -> None:
    unet.gate = threading.Semaphore(1)
    outcomes = Outcomes()
    engine.submit(make_request(1, waveforms=8, steps=50), outcomes.callback(1))
    waiting = engine.submit(make_request(2), outcomes.callback(2))
    assert engine.load.waiting_requests == 1
    engine.cancel(waiting)
    unet.gate.release(2)
    tag, outcome = outcomes.next()
    assert tag == 2
    assert isinstance(outcome, RequestCancelledError)


def test_deadlines_end_running_and_waiting_requests(engine: Engine, unet: WatchedUNet) -> None:
    unet.gate = threading.Semaphore(0)  # nothing has been timed, so nothing is foretold
    outcomes = Outcomes()
    soon = time.monotonic_ns() + 50_000_000
    engine.submit(make_request(1, waveforms=8, steps=50, deadline_ns=soon), outcomes.callback(1))
    engine.submit(make_request(2, deadline_ns=soon), outcomes.callback(2))
    later = time.monotonic_ns() + 3600 * 10**9
    engine.submit(make_request(3, deadline_ns=later), outcomes.callback(3))
    time.sleep(0.06)
    unet.gate.release(1000)
    collected = outcomes.collect(3)
    for tag in (1, 2):
        assert isinstance(collected[tag], DeadlineExceededError)
        assert str(collected[tag]).startswith("deadline exceeded")
    assert_is_reference(collected[3], make_request(3))


def test_what_cannot_be_done_in_time_ends_at_once(engine: Engine, unet: WatchedUNet) -> None:
    unet.fail = lambda _: time.sleep(0.02)  # at least; so 200 steps take more than 4 s on any machine
    outcomes = Outcomes()
    engine.submit(make_request(1), outcomes.callback(1))
    assert_is_reference(outcomes.collect(1)[1], make_request(1))
    start = time.monotonic_ns()
    hopeless = make_request(2, steps=200, deadline_ns=start + 4 * 10**9)
    engine.submit(hopeless, outcomes.callback(2))
    engine.submit(make_request(3, deadline_ns=start + 3600 * 10**9), outcomes.callback(3))
    collected = outcomes.collect(2)
    message = r"deadline exceeded after 0 of 200 steps: .* s are left, but the others take at least [\d.]+ s"
    assert re.fullmatch(message, str(collected[2])), collected[2]
    assert isinstance(collected[2], DeadlineExceededError)
    assert_is_reference(collected[3], make_request(3))
    assert not any(2 in tags for tags in unet.forwards)


def test_each_row_is_foretold_by_its_own_steps_and_items() -> None:
    short, long = make_request(1, steps=5), make_request(2, steps=100, guidance_scale=1.0)
    request = replace(short, rows=(*short.rows, *long.rows), deadline_ns=10**9)
    limits = EngineLimits(16, 16)
    costs = ForwardCosts(LinearCost(0.0, 1e-3), LinearCost(inf, 1.0))  # a millisecond for an item of one frame
    waveforms = start_waveforms(request, TABLES, limits, CPU, (0.0, 1.0))
    job = Job(request, waveforms, lambda _: None, None, evaluation_costs(waveforms, costs))
    assert job.least_seconds == pytest.approx(100 * 5 * 1e-3)  # 5 frames
    assert job.reason_to_end(10**9 // 2 - 1, 1.0, 1) is None
    assert isinstance(job.reason_to_end(10**9 // 2 + 1_000_000, 1.0, 1), DeadlineExceededError)


def test_a_gpus_forward_is_timed_when_the_next_one_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of 1 and 10 s take turns; on a GPU the host is told of each when the one before it has run."""
    waveforms = start_waveforms(make_request(1), TABLES, EngineLimits(16, 16), CPU, (0.0, 1.0))
    costs = ForwardCosts(LinearCost(0.0, 0.1), LinearCost(inf, 1.0))  # of 5 frames: half a second for an item
    now = 0.0
    monkeypatch.setattr(pace, "perf_counter", lambda: now)
    on_cpu, on_gpu = pace.Pace(), pace.Pace(is_behind=True)
    ends = [(2, 1.0), (20, 10.0)] * 5
    for items, seconds in ends:
        on_gpu.stepped(waveforms, items, costs)
        now += seconds
    now = 0.0
    for items, seconds in ends:
        now += seconds
        on_cpu.stepped(waveforms, items, costs)
    for each in (on_cpu, on_gpu):
        assert (each.least, each.usual) == (pytest.approx(1.0), pytest.approx(1.0))


def test_what_others_make_late_is_refused_with_a_time_to_try_again(engine: Engine, unet: WatchedUNet) -> None:
    unet.fail = lambda _: time.sleep(0.02)
    outcomes = Outcomes()
    engine.submit(make_request(1), outcomes.callback(1))
    outcomes.collect(1)
    engine.submit(make_request(2, waveforms=8, steps=200), outcomes.callback(2))  # at least 4 s
    wait_until(lambda: any(2 in tags for tags in unet.forwards), "a full engine")
    in_a_second = time.monotonic_ns() + 10**9
    message = r"denoiser is busy: .* s are left, but those before it take about .* s, .*; retry after \d+\.\d s"
    with pytest.raises(UnavailableError, match=message):
        engine.submit(make_request(3, deadline_ns=in_a_second), outcomes.callback(3))
    engine.submit(make_request(4, deadline_ns=in_a_second + 3600 * 10**9), outcomes.callback(4))
    collected = outcomes.collect(2)
    assert_is_reference(collected[2], make_request(2, waveforms=8, steps=200))
    assert_is_reference(collected[4], make_request(4))


def test_a_thousand_cancels_and_deadlines_leave_nothing_behind(unet: WatchedUNet) -> None:
    generator = random.Random(5)
    engine, outcomes = make_engine(unet, TABLES, max_active_rows=24, max_waiting=5000), Outcomes()
    # A forward for each permit: fewer than a doomed request has steps, so that none is done before its end comes.
    unet.gate, permits, steps = threading.Semaphore(0), 0, 250
    requests, doomed = {}, []
    for tag in range(1, 1501):
        if tag % 3 == 0:
            requests[tag] = random_request(tag, generator, SCHEDULERS[:3], max_steps=12)
            engine.submit(requests[tag], outcomes.callback(tag))
            continue
        lengths = {"steps": steps, "frames": generator.randint(1, 9), "waveforms": generator.randint(1, 3)}
        if generator.random() < 0.5:
            deadline = time.monotonic_ns() + generator.randrange(30_000_000)
            engine.submit(make_request(tag, **lengths, deadline_ns=deadline), outcomes.callback(tag))
        else:
            doomed.append(engine.submit(make_request(tag, **lengths), outcomes.callback(tag)))
        if tag % 5 == 0:
            unet.gate.release()
            permits += 1
            time.sleep(generator.random() * 0.004)
            generator.shuffle(doomed)
            while len(doomed) > 10:
                engine.cancel(doomed.pop())
    for job in doomed:
        engine.cancel(job)
    assert permits < steps
    wait_until(lambda: len(unet.forwards) > 100, "the engine to have met a good part of them in flight")
    time.sleep(0.03)  # the last deadline
    unet.gate.release(100_000)
    collected = outcomes.collect(1500)
    wait_until(lambda: engine.load.active_requests == 0, "the last request to leave")
    load = engine.load
    assert (load.active_rows, load.pending_rows, load.waiting_requests) == (0, 0, 0)
    engine.close()
    kinds = [type(outcome) for outcome in collected.values()]
    assert kinds.count(RequestCancelledError) + kinds.count(DeadlineExceededError) == 1000
    assert min(kinds.count(RequestCancelledError), kinds.count(DeadlineExceededError)) > 400
    for tag, request in requests.items():
        assert_is_reference(collected[tag], request)


def test_overload_is_refused_at_once_and_the_rest_is_right(unet: WatchedUNet) -> None:
    engine, outcomes = make_engine(unet, TABLES, max_active_rows=8, max_waiting=6), Outcomes()
    unet.gate = threading.Semaphore(0)
    taken, refused = [], []
    for tag in range(1, 101):
        try:
            engine.submit(make_request(tag), outcomes.callback(tag))
            taken.append(tag)
        except UnavailableError as error:
            refused.append(str(error))
    unet.gate.release(100_000)
    collected = outcomes.collect(len(taken))
    engine.close()
    assert len(taken) == 4 + 6, "four fit, six may wait"
    assert all("4 requests in flight and 6 waiting" in message for message in refused)
    for tag in taken:
        assert_is_reference(collected[tag], make_request(tag))


def test_more_than_fits_enters_in_portions(engine: Engine, unet: WatchedUNet) -> None:
    outcomes, large, small = Outcomes(), make_request(1, waveforms=20), make_request(2)
    engine.submit(large, outcomes.callback(1))
    engine.submit(small, outcomes.callback(2))
    collected = outcomes.collect(2)
    assert_is_reference(collected[1], large)
    assert_is_reference(collected[2], small)
    assert max(map(len, unet.forwards)) == 16, "never more than the limit"


def test_non_finite_latents_fail_their_own_request_only(engine: Engine) -> None:
    outcomes = Outcomes()
    poisoned = make_request(1)
    poisoned.rows[0].noise[0, 0, 0, 0] = float("nan")
    engine.submit(poisoned, outcomes.callback(1))
    engine.submit(make_request(2), outcomes.callback(2))
    collected = outcomes.collect(2)
    assert isinstance(collected[1], InternalError)
    assert "denoiser" in str(collected[1])
    assert_is_reference(collected[2], make_request(2))


def test_a_broken_engine_is_taken_out_and_the_others_go_on() -> None:
    unets = [WatchedUNet(), WatchedUNet()]

    def broken(_: tuple[int, ...]) -> None:
        raise RuntimeError("device-side assert triggered")

    unets[0].fail = broken
    pool, outcomes = EnginePool([make_engine(unet, TABLES) for unet in unets], TABLES), Outcomes()
    collected = {}
    for tag in range(1, 13):
        pool.submit(make_request(tag), outcomes.callback(tag))
        collected.update(outcomes.collect(1))
    failed = [tag for tag, outcome in collected.items() if isinstance(outcome, Exception)]
    assert failed == [1, 2, 3], "three failed steps in a row, then no more requests"
    assert [engine.broken is not None for engine in pool.engines] == [True, False]
    unets[1].fail = broken
    for tag in range(21, 25):
        pool.submit(make_request(tag), outcomes.callback(tag))
        last = outcomes.collect(1)[tag]
    assert isinstance(last, UnavailableError)
    assert "every engine is broken" in str(last)
    pool.close()


def test_one_failed_step_fails_its_requests_and_the_engine_goes_on(engine: Engine, unet: WatchedUNet) -> None:
    def fail_on_one(tags: tuple[int, ...]) -> None:
        if 1 in tags:
            raise RuntimeError("out of luck")

    unet.fail = fail_on_one
    outcomes = Outcomes()
    engine.submit(make_request(1), outcomes.callback(1))
    assert isinstance(outcomes.collect(1)[1], RuntimeError)
    engine.submit(make_request(2), outcomes.callback(2))
    assert_is_reference(outcomes.collect(1)[2], make_request(2))
    assert engine.broken is None


def test_a_schedule_that_diffusers_refuses_is_an_invalid_argument() -> None:
    pool, outcomes = EnginePool([make_engine(WatchedUNet(), TABLES)], TABLES), Outcomes()
    pool.submit(make_request(1, steps=1001, scheduler="DDIMScheduler"), outcomes.callback(1))
    outcome = outcomes.collect(1)[1]
    pool.close()
    assert isinstance(outcome, InvalidArgumentError)
    assert "DDIMScheduler cannot run 1001 steps" in str(outcome)


def test_closing_answers_everything() -> None:
    unet, outcomes = WatchedUNet(), Outcomes()
    unet.gate = threading.Semaphore(2)
    engine = make_engine(unet, TABLES, max_active_rows=4)
    for tag in range(1, 6):
        engine.submit(make_request(tag, steps=40), outcomes.callback(tag))
    wait_until(lambda: len(unet.forwards) == 2, "two steps")
    closing = threading.Thread(target=engine.close)
    closing.start()
    unet.gate.release(1000)
    closing.join(timeout=30)
    collected = outcomes.collect(5)
    assert all(isinstance(outcome, UnavailableError) for outcome in collected.values())
    with pytest.raises(UnavailableError, match="shutting down"):
        engine.submit(make_request(9), lambda _: None)
