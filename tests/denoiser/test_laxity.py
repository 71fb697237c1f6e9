"""Who steps by laxity, without a UNet; and the engine, which pauses waveforms between their steps."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audioldm2_triton.contract import BATCH, PRIORITIES, SCHEDULERS
from audioldm2_triton.errors import DeadlineExceededError, RequestCancelledError, UnavailableError
from audioldm2_triton.server.residency import Residency
from audioldm2_triton.server.settings import LAXITY
from engine import laxity
from engine.engine import Engine
from engine.laxity import Held, HeldWaveform, Room, schedule, seconds_alone
from engine.limits import EngineLimits
from engine_workload import (
    CPU,
    TABLES,
    Outcomes,
    WatchedUNet,
    assert_is_reference,
    make_request,
    random_request,
    wait_until,
)
from project import ROOT
from stepping.forward_plan import ForwardCosts, LaunchBoundCost, LinearCost
from stepping.windows import Windowing

# A second for every item and frame: nothing is gained by sharing. And: up to 8 items of 1 frame cost the same.
LINEAR = ForwardCosts(LinearCost(0.0, 1.0), LinearCost(inf, 1.0))
SHARED = ForwardCosts(LaunchBoundCost(8.0, 1.0), LaunchBoundCost(8.0, 1.0))
ROOM = Room(frames=16, items=16, started=32)


def request(
    arrived: float = 0.0,
    steps: int = 10,
    waveforms: int = 1,
    started: int = 0,
    costs: ForwardCosts = LINEAR,
    frames: int = 1,
    **options: float | bool,
) -> Held:
    """A request whose waveforms have one item."""
    parts = tuple(HeldWaveform(1, frames, frames, steps, started=part < started) for part in range(waveforms))
    alone = seconds_alone(parts, costs)
    return Held(
        arrived,
        **{"deadline": inf, "is_batch": False, "alone": alone, "has_begun": started > 0, **options},
        waveforms=parts,
    )  # type: ignore[arg-type]


def counts(held: Sequence[Held], now: float, costs: ForwardCosts = LINEAR, room: Room = ROOM) -> list[int]:
    return schedule(held, now, now, costs, room).counts


def test_it_runs_without_torch() -> None:
    code = "import sys, engine.laxity; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "model_repository/denoiser/1", check=True)


def test_time_alone_counts_shared_forwards_once() -> None:
    parts = (HeldWaveform(2, 3, 6, 10), HeldWaveform(1, 3, 3, 4))
    assert seconds_alone(parts, LINEAR) == 4 * 9 + 6 * 6
    assert seconds_alone(parts, SHARED) == 4 * 9 + 6 * 8


def test_the_soonest_objective_goes_first_and_who_is_late_waits_for_shorter_ones() -> None:
    # Objectives: 5, 35 and 12; the first cannot be met any more, and it takes more than twice as long as the last.
    held = [request(-25, 10, started=1), request(5, 10), request(0, 4)]
    assert counts(held, now=4.0) == [0, 0, 1]
    assert counts(held, now=9.0) == [1, 1, 1]  # the last is late as well, and nobody in time is shorter
    # Nobody in time is shorter: as many as have room, first whoever has least left.
    assert counts(held, now=26.0) == [1, 1, 1]
    assert counts(held, now=26.0, room=Room(2, 2, 4)) == [1, 0, 1]


def test_lengths_go_one_after_the_other_unless_they_share_a_forward() -> None:
    apart = ForwardCosts(LinearCost(8.0, 1.0), LinearCost(inf, 1.0))
    for costs, expected in ((LINEAR, [1, 0, 1]), (apart, [1, 0, 1]), (SHARED, [1, 1, 1])):
        held = [request(0, 10, costs=costs), request(1, 10, frames=2, costs=costs), request(2, 10, costs=costs)]
        assert counts(held, now=3.0, costs=costs) == expected


def test_a_turn_by_age_does_not_stop_the_others() -> None:
    old = request(0, 10, frames=2, started=1, is_batch=True, has_turn=True)
    assert counts([old, request(1, 10), request(2, 10), request(3, 10, frames=3)], now=30.0) == [1, 1, 1, 0]


def test_a_deadline_is_an_objective() -> None:
    assert counts([request(0, 5), request(0, 5, deadline=6.0)], now=0.0) == [0, 1]
    assert counts([request(0, 5), request(0, 5, deadline=60.0)], now=0.0) == [1, 1]


def test_whoever_misses_its_deadline_takes_no_steps_from_others() -> None:
    doomed = request(-30, 10, deadline=9.0)
    assert counts([doomed, request(0, 10)], now=0.0, room=Room(1, 1, 4)) == [0, 1]
    assert counts([replace(doomed, deadline=inf), request(0, 10)], now=0.0, room=Room(1, 1, 4)) == [1, 0]


def test_interactive_pauses_batch() -> None:
    batch = request(0, 50, waveforms=3, started=3, is_batch=True)
    assert counts([batch], now=1.0) == [3]
    assert counts([batch, request(1, 90)], now=1.0) == [0, 1]


def test_what_costs_nothing_is_shared_up_to_the_knee() -> None:
    batch = [request(0, 10, costs=SHARED, is_batch=True) for _ in range(16)]
    assert counts([request(0, 10, costs=SHARED), *batch], now=0.0, costs=SHARED) == [1] * 8 + [0] * 9
    fixed = ForwardCosts(LinearCost(8.0, 1.0), LinearCost(inf, 1.0))
    # At best 16 items take 24 s. Two in 10 s have 0.3 of that throughput, one in 9 s has not.
    assert counts([request(0, 10, costs=fixed), *batch], now=0.0, costs=fixed) == [1, 1] + [0] * 15
    assert sum(counts(batch, now=0.0, costs=SHARED)) == 16  # nobody urgent


def test_batch_joins_nobody_while_an_interactive_request_waits() -> None:
    fixed = ForwardCosts(LinearCost(8.0, 1.0), LinearCost(inf, 1.0))
    held = [request(0, 10, costs=fixed), request(0, 10, costs=fixed, is_batch=True)]
    assert counts(held, now=0.0, costs=fixed) == [1, 1]
    # Of another length, so that it shares no forward with the first.
    assert counts([*held, request(0, 10, frames=2, costs=fixed)], now=0.0, costs=fixed) == [1, 0, 0]
    # No more may start, so that it is not even considered.
    started = [replace(each, waveforms=(replace(each.waveforms[0], started=True),)) for each in held]
    waiting = request(0, 20, costs=fixed)
    assert counts([*started, waiting], now=0.0, costs=fixed, room=Room(16, 16, started=2)) == [1, 0, 0]


def test_beyond_the_knee_longer_ones_join_while_shorter_ones_are_in_time() -> None:
    fixed = ForwardCosts(LinearCost(8.0, 1.0), LinearCost(inf, 1.0))
    short = request(0, 10, costs=fixed)  # 90 s alone: the objective is 270
    held = [short, *(request(0, 21, costs=fixed) for _ in range(15))]
    assert sum(counts(held, now=0.0, costs=fixed)) == 12  # 20 s, where 18 would be the best
    assert sum(counts(held, now=100.0, costs=fixed)) == 9  # 10 evaluations of 17 s
    assert sum(counts(held, now=160.0, costs=fixed)) == 3
    assert sum(counts(held, now=175.0, costs=fixed)) == 1
    assert sum(counts(held, now=181.0, costs=fixed)) == 16  # it is late
    batch = [replace(each, is_batch=True) for each in held[1:]]
    assert sum(counts([short, *batch], now=0.0, costs=fixed)) == 2
    assert sum(counts([short, *batch], now=181.0, costs=fixed)) == 2  # late or not


@pytest.mark.parametrize("now", [0.0, 100.0, 175.0, 181.0, 1000.0])
def test_those_that_are_alike_share_as_in_order_of_arrival(now: float) -> None:
    fixed = ForwardCosts(LinearCost(8.0, 1.0), LinearCost(inf, 1.0))
    held = [request(arrived, steps, costs=fixed) for arrived, steps in enumerate([10, 15, 8, 9] * 5)]
    assert sum(counts(held, now, fixed)) == 16
    alike = [replace(each, waveforms=held[0].waveforms, alone=held[0].alone) for each in held]
    assert counts(alike, now, fixed) == [1] * 16 + [0] * 4


def test_those_that_are_alike_do_not_pause_each_other() -> None:
    begun = replace(request(0, 4, started=1), alone=10.0)  # 6 of 10 evaluations in 6 s
    assert counts([begun, request(1, 10)], now=6.0, room=Room(1, 1, 4)) == [1, 0]
    # Nor if the second is late, who was to be done later: 8 s are left to the first for 6, and 9 to the second for 10.
    begun = replace(request(2, 6, started=1), alone=10.0)
    assert counts([begun, request(3, 10)], now=24.0, room=Room(1, 1, 4)) == [1, 0]


def test_what_is_finished_is_not_left() -> None:
    # 2 of 10 candidates are left, none of them begun: 10 s within 11, and the other cannot wait for them.
    begun = replace(request(-89, 5, waveforms=2, deadline=11.0), alone=50.0, has_begun=True)
    assert schedule([begun, request(0, 5, deadline=11.5)], 0.0, 0.0, LINEAR, Room(1, 1, 4)).counts == [1, 0]


def test_memory_bounds_who_has_started() -> None:
    held = [request(0, 50, waveforms=4, started=4, is_batch=True), request(1, 5)]
    assert counts(held, now=1.0, room=Room(16, 16, 4)) == [4, 0]
    assert counts(held, now=1.0, room=Room(16, 16, 5)) == [0, 1]


def test_amid_a_step_nothing_pauses() -> None:
    parts = tuple(HeldWaveform(1, 1, 8, 9, in_turns=True, started=True, amid_step=part == 1) for part in range(2))
    held = [Held(0, inf, True, 18.0, parts), request(1, 5)]
    decided = schedule(held, 1.0, 1.0, LINEAR, ROOM)
    assert decided.counts == [2, 0]
    assert decided.review_at == 1.0
    # Two that are never between two steps at once: when a turn is due, nothing else begins a step.
    between = replace(held[0], waveforms=tuple(replace(part, amid_step=False) for part in parts))
    decided = schedule([between, held[0], request(1, 5)], 200.0, 0.0, LINEAR, ROOM)
    assert (decided.counts, decided.turn, decided.review_at) == ([0, 2, 0], None, 200.0)


def test_the_oldest_gets_its_turn() -> None:
    held = [request(0, 10, is_batch=True), request(1, 10), request(2, 10)]
    assert schedule(held, 89.9, 0.0, LINEAR, ROOM).turn is None
    assert schedule(held, 80.0, 0.0, LINEAR, ROOM).review_at == pytest.approx(90.0)
    due = schedule(held, 90.0, 0.0, LINEAR, ROOM)
    assert due.turn == 0
    assert due.counts[0] == 1
    others = [request(200, 10) for _ in range(3)]
    assert counts([request(0, 10, is_batch=True, has_turn=True, started=1), *others], now=200.0)[0] == 1


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(1, 9), st.booleans(), st.floats(-99, 0))),
    st.integers(1, 12),
    st.sampled_from([LINEAR, SHARED]),
)
@settings(deadline=None)
def test_whoever_is_held_some_step_and_all_have_room(
    drawn: list[tuple[int, int, int, bool, float]], frames: int, costs: ForwardCosts
) -> None:
    held = [
        request(arrived, steps, waveforms, started, costs, is_batch=is_batch)
        for waveforms, started, steps, is_batch, arrived in sorted(drawn, key=lambda each: each[-1])
    ]
    stepping = counts(held, 0.0, costs, Room(frames, frames, 8))
    assert all(count <= len(each.waveforms) for count, each in zip(stepping, held, strict=True))
    assert 1 <= sum(stepping) <= frames if held else stepping == []


def lax_engine(unet: WatchedUNet, rows: int = 8, costs: ForwardCosts = LINEAR, row_frames: int = 1) -> Engine:
    limits = EngineLimits(rows, 1000, row_frames, LAXITY)
    return Engine(unet, TABLES, limits, lambda: costs, CPU, torch.float32)


def test_an_urgent_request_pauses_a_batch_and_both_are_right(
    unet: WatchedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laxity, "AGED_SHARE", 1e-9)  # on a slow machine its turn could come
    unet.gate = threading.Semaphore(3)
    engine, outcomes = lax_engine(unet, rows=2, row_frames=5), Outcomes()  # room for one of them
    batch = make_request(1, steps=12, priority=BATCH)
    urgent = make_request(2, steps=4)
    engine.submit(batch, outcomes.callback(1))
    wait_until(lambda: len(unet.forwards) == 3, "the batch to be in flight")
    engine.submit(urgent, outcomes.callback(2))
    unet.gate.release(5)  # one forward may have begun without it
    tag, outcome = outcomes.next()
    assert tag == 2
    assert_is_reference(outcome, urgent)
    begin = next(place for place, tags in enumerate(unet.forwards) if 2 in tags)
    assert [set(tags) for tags in unet.forwards[begin : begin + 4]] == [{2}] * 4
    unet.gate.release(1000)
    assert_is_reference(outcomes.next()[1], batch)
    assert {tag for tags in unet.forwards[begin + 4 :] for tag in tags} == {1}
    engine.close()


def test_weights_that_do_not_fit_fail_who_was_just_paused_too(
    unet: WatchedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its history is in the batch of its group, which goes with those that step."""

    class Full(Residency):
        lacks = False

        def enter(self) -> None:
            if self.lacks:
                self.lacks = False
                raise MemoryError

    monkeypatch.setattr(laxity, "AGED_SHARE", 1e-9)
    unet.gate = threading.Semaphore(3)
    residency, outcomes = Full(), Outcomes()
    limits = EngineLimits(2, 1000, 5, LAXITY)
    engine = Engine(unet, TABLES, limits, lambda: LINEAR, CPU, torch.float32, residency=residency)
    engine.submit(make_request(1, steps=12, priority=BATCH), outcomes.callback(1))
    wait_until(lambda: len(unet.forwards) == 3, "the batch to be in flight")
    # In the engine's thread, when it has paused the batch.
    urgent = replace(make_request(2, steps=4), on_admitted=lambda: setattr(residency, "lacks", True))
    engine.submit(urgent, outcomes.callback(2))
    unet.gate.release(1000)
    collected = outcomes.collect(2)
    engine.close()
    assert all(isinstance(outcome, MemoryError) for outcome in collected.values()), collected


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("costs", [LINEAR, SHARED], ids=["grouped", "shared"])
def test_any_mixture_of_priorities_cancels_and_deadlines_equals_the_reference(
    costs: ForwardCosts, count: int, unet: WatchedUNet
) -> None:
    generator = random.Random(7)
    engine, outcomes = lax_engine(unet, 8, costs), Outcomes()
    requests = {tag: random_request(tag, generator, SCHEDULERS, max_steps=20) for tag in range(1, count + 1)}
    jobs, cancelled, late = {}, set(), set()
    for tag, plain in requests.items():
        time.sleep(generator.random() * 0.004)
        if tag % 3 == 0:  # in windows, many of them in several forwards a step; this UNet's outputs are the same
            plain = replace(plain, rows=tuple(replace(row, windowing=Windowing(4, 1)) for row in plain.rows))
        in_s = generator.choice([0, 0, 0, 1e-3, 1e6])
        deadline = time.monotonic_ns() + int(in_s * 1e9) if in_s else 0
        requests[tag] = mixed = replace(plain, priority=generator.choice(PRIORITIES), deadline_ns=deadline)
        late |= {tag} if in_s == 1e-3 else set()
        try:
            jobs[tag] = engine.submit(mixed, outcomes.callback(tag))
        except UnavailableError:  # those before it make it late
            assert tag in late
        if generator.random() < 0.2:
            victim = generator.choice(list(jobs))
            cancelled.add(victim)
            engine.cancel(jobs[victim])
    collected = outcomes.collect(len(jobs))
    engine.close()
    for tag, outcome in collected.items():
        if isinstance(outcome, DeadlineExceededError):
            assert tag in late
        elif isinstance(outcome, RequestCancelledError):
            assert tag in cancelled
        else:
            assert_is_reference(outcome, requests[tag])
    assert not engine._roster.paused
