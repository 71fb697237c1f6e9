"""The engine without Triton: who shares a forward and who enters when; forwards are counted, not timed."""

import random
import threading
import time
from pathlib import Path

import diffusers
import pytest
import torch

from audioldm2_triton.contract import DEFAULT_SCHEDULER, SCHEDULERS
from audioldm2_triton.errors import (
    UnavailableError,
)
from denoiser_stage import load_schedule_tables
from engine.engine import Engine
from engine.limits import EngineLimits
from engine.pool import EnginePool
from engine_workload import (
    CPU,
    SCHEDULER_CONFIG,
    TABLES,
    Outcomes,
    WatchedUNet,
    assert_is_reference,
    latents,
    make_engine,
    make_request,
    random_request,
    reference_latents,
    wait_until,
)
from stepping.forward_plan import ALWAYS_MIX, NEVER_MIX, ForwardCosts


@pytest.mark.parametrize("costs", [ALWAYS_MIX, NEVER_MIX], ids=["mixed", "grouped"])
def test_any_mixture_equals_the_reference_loop(costs: ForwardCosts, unet: WatchedUNet) -> None:
    generator = random.Random(3)
    requests = [random_request(tag, generator, SCHEDULERS, max_steps=30) for tag in range(1, 41)]
    engine, outcomes = make_engine(unet, TABLES, costs=costs), Outcomes()
    for tag, request in enumerate(requests, 1):
        time.sleep(generator.random() * 0.01)
        engine.submit(request, outcomes.callback(tag))
    collected = outcomes.collect(len(requests))
    engine.close()
    for tag, request in enumerate(requests, 1):
        assert_is_reference(collected[tag], request)
    assert max(len(set(tags)) for tags in unet.forwards) > 1, "nothing was batched"


def test_a_short_request_overtakes_a_long_one(engine: Engine, unet: WatchedUNet) -> None:
    unet.gate = threading.Semaphore(20)
    outcomes = Outcomes()
    engine.submit(make_request(1, steps=200, scheduler="HeunDiscreteScheduler"), outcomes.callback(1))
    wait_until(lambda: len(unet.forwards) == 20, "the long request to be in flight")
    engine.submit(make_request(2, steps=4), outcomes.callback(2))
    # A forward that waits for a permit began without the new request; each of the next four advances both.
    unet.gate.release(5)
    tag, outcome = outcomes.next()
    assert tag == 2
    assert_is_reference(outcome, make_request(2, steps=4))
    assert [set(tags) for tags in unet.forwards if 2 in tags] == [{1, 2}] * 4


def test_lengths_that_cannot_share_a_forward_take_turns(unet: WatchedUNet) -> None:
    engine, outcomes = make_engine(unet, TABLES, costs=NEVER_MIX), Outcomes()
    unet.gate = threading.Semaphore(0)
    for tag in (1, 2, 3):
        engine.submit(make_request(tag, steps=30, frames=tag), outcomes.callback(tag))
    unet.gate.release(33)
    wait_until(lambda: len(unet.forwards) >= 33, "33 forwards")
    turns = [sum(tag in tags for tags in unet.forwards[3:33]) for tag in (1, 2, 3)]
    unet.gate.release(1000)
    outcomes.collect(3)
    engine.close()
    assert max(turns) - min(turns) <= 2, turns


def test_newcomers_of_another_length_leave_the_turns_as_they_are(unet: WatchedUNet) -> None:
    engine, outcomes = make_engine(unet, TABLES, costs=NEVER_MIX, max_active_rows=100), Outcomes()
    unet.gate = threading.Semaphore(0)
    engine.submit(make_request(1, steps=10, frames=9), outcomes.callback(1))
    for tag in range(2, 22):
        engine.submit(make_request(tag, steps=4), outcomes.callback(tag))
        unet.gate.release(1)  # a newcomer before each forward
        wait_until(lambda tag=tag: len(unet.forwards) == tag - 1, "a forward")
    own = sum(1 in tags for tags in unet.forwards)
    unet.gate.release(1000)
    outcomes.collect(21)
    engine.close()
    assert own >= 9, own


def test_forwards_fill_up_and_nobody_waits_where_there_is_room(engine: Engine, unet: WatchedUNet) -> None:
    unet.gate = threading.Semaphore(0)
    outcomes = Outcomes()
    for tag in range(1, 21):
        engine.submit(make_request(tag, steps=3, frames=5), outcomes.callback(tag))
    unet.gate.release(1)
    wait_until(lambda: engine.load.active_rows == 16, "a full engine")
    assert engine.load.waiting_requests == 12
    unet.gate.release(1000)
    outcomes.collect(20)
    sizes = [len(tags) for tags in unet.forwards]
    assert max(sizes) == engine.limits.max_active_rows
    order = [tag for tags in unet.forwards for tag in tags]
    first_seen = sorted(set(order), key=order.index)
    assert first_seen == sorted(first_seen), "requests did not enter in order of arrival"
    # While anybody waited, every forward was full.
    assert all(size == 16 for size in sizes[1:4])


def test_long_rows_count_by_their_length(unet: WatchedUNet) -> None:
    """The room is 8 rows of 3 frames, 24 frames; shorter rows count as 3."""
    engine, outcomes = make_engine(unet, TABLES, max_active_rows=8, costs=NEVER_MIX, row_frames=3), Outcomes()
    unet.gate = threading.Semaphore(0)
    requests = {1: make_request(1, frames=6), 2: make_request(2, frames=1), 3: make_request(3, frames=4)}
    for tag, request in requests.items():
        engine.submit(request, outcomes.callback(tag))
    unet.gate.release(1)
    # Two rows of 6 frames and two that count as 3 leave room for 6; two rows of 4 are too much.
    wait_until(lambda: engine.load.active_rows == 4, "the first two in flight")
    assert engine.load.free_frames == 24 - 12 - 6 - 8
    assert (engine.load.pending_rows, engine.load.waiting_requests) == (2, 1)
    unet.gate.release(1000)
    collected = outcomes.collect(3)
    engine.close()
    first_of_third = next(index for index, tags in enumerate(unet.forwards) if 3 in tags)
    before, after = unet.forwards[:first_of_third], unet.forwards[first_of_third:]
    assert not all(any(tag in tags for tags in after) for tag in (1, 2)), "it did not wait for either"
    assert all(any(tag in tags for tags in before) for tag in (1, 2))
    for tag, request in requests.items():
        assert_is_reference(collected[tag], request)


def test_what_is_longer_than_the_limit_is_in_flight_alone(unet: WatchedUNet) -> None:
    engine, outcomes = make_engine(unet, TABLES, max_active_rows=8, max_waiting=1, row_frames=1), Outcomes()
    unet.gate = threading.Semaphore(0)
    requests = {1: make_request(1, waveforms=3, frames=9), 2: make_request(2, frames=1)}
    for tag, request in requests.items():
        engine.submit(request, outcomes.callback(tag))
    with pytest.raises(UnavailableError, match="1 requests in flight and 1 waiting"):
        engine.submit(make_request(3), outcomes.callback(3))
    unet.gate.release(1000)
    collected = outcomes.collect(2)
    engine.close()
    # Each of its waveforms is too long for the limit of 8 frames by itself: one after the other, and nothing beside it.
    assert [tags for tags in unet.forwards if 1 in tags] == [(1, 1)] * 12
    assert [tags for tags in unet.forwards if 2 in tags] == [(2, 2)] * 4
    for tag, request in requests.items():
        assert_is_reference(collected[tag], request)


def test_rows_without_guidance_take_one_item(engine: Engine, unet: WatchedUNet) -> None:
    outcomes = Outcomes()
    engine.submit(make_request(1, guidance_scale=1.0, waveforms=3), outcomes.callback(1))
    engine.submit(make_request(2, guidance_scale=1.01, waveforms=3), outcomes.callback(2))
    collected = outcomes.collect(2)
    assert max(tags.count(1) for tags in unet.forwards) == 3
    assert max(tags.count(2) for tags in unet.forwards) == 6
    assert_is_reference(collected[1], make_request(1, guidance_scale=1.0, waveforms=3))


def test_progress_is_told_once_it_is_made(engine: Engine, unet: WatchedUNet) -> None:
    unet.gate = threading.Semaphore(0)
    outcomes, told = Outcomes(), []
    job = engine.submit(make_request(1, steps=3, scheduler="HeunDiscreteScheduler"), outcomes.callback(1))
    engine.listen(job, 0, lambda step, total: told.append((step, total)))
    engine.listen(job, 2, lambda step, total: told.append((step, total)))
    assert told == []
    unet.gate.release(1)
    wait_until(lambda: told, "the first step")
    assert told == [(1, 5)]
    unet.gate.release(100)
    outcomes.collect(1)
    assert told == [(1, 5), (3, 5)]
    engine.listen(job, 5, lambda step, total: told.append((step, total)))
    assert told[-1] == (0, 0)


def test_requests_go_to_the_engine_with_most_room() -> None:
    unets = [WatchedUNet(), WatchedUNet()]
    for unet in unets:
        unet.gate = threading.Semaphore(0)
    pool, outcomes = EnginePool([make_engine(unet, TABLES) for unet in unets], TABLES), Outcomes()
    TABLES.get(DEFAULT_SCHEDULER, 4)  # requests whose schedule must be built first would be taken by another thread
    for tag, waveforms in enumerate([4, 1, 1, 1, 1], 1):
        pool.submit(make_request(tag, waveforms=waveforms), outcomes.callback(tag))
    for unet in unets:
        unet.gate.release(1000)
    collected = outcomes.collect(5)
    pool.close()
    assert [{tag for tags in unet.forwards for tag in tags} for unet in unets] == [{1}, {2, 3, 4, 5}]
    for tag, waveforms in enumerate([4, 1, 1, 1, 1], 1):
        assert_is_reference(collected[tag], make_request(tag, waveforms=waveforms))


def test_what_one_engine_refuses_another_one_takes() -> None:
    unets = [WatchedUNet(), WatchedUNet()]
    for unet in unets:
        unet.gate = threading.Semaphore(0)
    engines = [make_engine(unet, TABLES, max_waiting=1) for unet in unets]
    pool, outcomes = EnginePool(engines, TABLES), Outcomes()
    TABLES.get(DEFAULT_SCHEDULER, 4)
    # The first has more room, but no place for one more that waits; the second has, behind one that takes two rounds.
    for tag, waveforms in ((1, 8), (2, 16), (3, 2), (4, 1)):
        pool.submit(make_request(tag, waveforms=waveforms), outcomes.callback(tag))
    assert [engine.load.waiting_requests for engine in engines] == [1, 1]
    pool.submit(make_request(5, waveforms=2), outcomes.callback(5))
    tag, refused = outcomes.next()
    assert tag == 5
    assert "denoiser is full" in str(refused)
    for unet in unets:
        unet.gate.release(1000)
    outcomes.collect(4)
    pool.close()


def test_torch_is_not_left_in_inference_mode_by_the_engine(engine: Engine) -> None:
    outcomes = Outcomes()
    engine.submit(make_request(1), outcomes.callback(1))
    result = latents(outcomes.collect(1)[1])
    torch.add(result, 1.0)
    assert result.numpy().flags.writeable


def test_guidance_in_a_part_of_the_steps(unet: WatchedUNet) -> None:
    limits = EngineLimits(16, 100)
    engine = Engine(unet, TABLES, limits, lambda: ALWAYS_MIX, CPU, torch.float32, None, (0.25, 0.75))
    outcomes = Outcomes()
    requests = {1: make_request(1, steps=8), 2: make_request(2, steps=4, guidance_scale=1.0)}
    for tag, request in requests.items():
        engine.submit(request, outcomes.callback(tag))
    collected = outcomes.collect(2)
    engine.close()
    assert [tags.count(1) for tags in unet.forwards if 1 in tags] == [1, 1, 2, 2, 2, 2, 1, 1]
    assert_is_reference(collected[2], requests[2])
    # Without guidance in a step, its scale is one.
    expected = reference_latents(requests[1], SCHEDULER_CONFIG, lambda step: 2 <= step < 6)
    assert (latents(collected[1]) - expected).abs().max() / expected.abs().max() < 1e-4
    exact = reference_latents(requests[1], SCHEDULER_CONFIG)
    assert (latents(collected[1]) - exact).abs().max() / exact.abs().max() > 1e-3


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras", "lu_lambdas", "exponential"])
def test_spacings_are_those_of_diffusers(spacing: str, tiny_checkpoint: Path) -> None:
    own = load_schedule_tables(tiny_checkpoint).get("DPMSolverMultistepScheduler", 8)
    table = load_schedule_tables(tiny_checkpoint, spacing).get("DPMSolverMultistepScheduler", 8)
    option = {"karras": "use_karras_sigmas", "lu_lambdas": "use_lu_lambdas", "exponential": "use_exponential_sigmas"}
    changes = {option[spacing]: True} if spacing in option else {"timestep_spacing": spacing}
    solver = diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULER_CONFIG | changes)
    solver.set_timesteps(8)
    assert torch.equal(table.timesteps, solver.timesteps.float())
    assert not torch.equal(table.timesteps, own.timesteps)
