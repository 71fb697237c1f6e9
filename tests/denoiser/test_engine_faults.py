"""Faults inside one engine, in this process: who is concerned is answered, and nothing is left behind."""

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from audioldm2_triton.errors import InternalError, InvalidArgumentError, UnavailableError
from audioldm2_triton.server import faults
from audioldm2_triton.server.faults import NAN, PANIC, RAISE, STALL
from engine import engine as engine_module
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
    make_engine,
    make_request,
    wait_until,
)
from stepping.forward_plan import ALWAYS_MIX
from stepping.schedule_table import ScheduleTables

FATAL = "denoiser.loop"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    faults.use_directory(tmp_path)
    yield tmp_path
    faults.use_directory(None)


class Observed:
    """Counts what an engine tells."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def __getattr__(self, what: str) -> Callable[..., None]:
        return lambda *arguments: self.told.append((what, arguments))


def watched_engine(unet: WatchedUNet, observer: Any) -> Engine:
    return Engine(unet, TABLES, EngineLimits(4, 100), lambda: ALWAYS_MIX, CPU, torch.float32, observer)


def test_a_point_costs_nothing_where_nothing_is_armed(tmp_path: Path) -> None:
    value = object()
    assert faults.at("denoiser.step", value) is value
    faults.arm(tmp_path, "denoiser.step", RAISE)
    assert faults.at("denoiser.step", value) is value


@pytest.mark.parametrize("kind", [RAISE, PANIC])
def test_a_broken_engine_has_answered_everything_and_says_so(
    kind: str, directory: Path, unet: WatchedUNet, caplog: pytest.LogCaptureFixture
) -> None:
    observer, outcomes, progress = Observed(), Outcomes(), []
    engine = watched_engine(unet, observer)
    pool = EnginePool([engine], TABLES)
    unet.gate = threading.Semaphore(1)
    for tag in range(1, 6):
        pool.submit(make_request(tag, steps=40), outcomes.callback(tag), name=str(tag))
    pool.listen("1", 30, lambda *counts: progress.append(counts))
    assert pool.is_ready
    wait_until(lambda: len(unet.forwards) == 1, "a first step")
    faults.arm(directory, FATAL, kind)
    unet.gate.release(1000)
    collected = outcomes.collect(5)
    assert all(isinstance(outcome, UnavailableError) for outcome in collected.values())
    wait_until(lambda: engine.load.active_requests == 0, "the last request to leave")
    load = engine.load
    assert (load.active_rows, load.pending_rows, load.waiting_requests) == (0, 0, 0)
    assert progress == [(0, 0)]
    assert not pool.is_ready
    assert [what for what, _ in observer.told].count("broke") == 1
    assert f"fault at {FATAL}" in caplog.text
    pool.submit(make_request(9), outcomes.callback(9))
    assert "every engine is broken" in str(outcomes.collect(1)[9])
    pool.close()


def test_what_a_broken_engine_lost_in_the_middle_is_let_go(unet: WatchedUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is neither held nor answered any more, and would be kept by the frames of the engine's error."""

    class OnDone:
        def __call__(self, _: object) -> None:
            raise AssertionError("this test loses it before")

    def failing(_: Engine, job: Any, *__: object) -> None:
        raise RuntimeError(f"in the middle of {job}")

    engine, on_done = watched_engine(unet, None), OnDone()
    lost = weakref.ref(on_done)
    monkeypatch.setattr(Engine, "_finish", failing)
    monkeypatch.setattr(Engine, "_fail_all", lambda self: self._roster.jobs.clear() or self._roster.in_flight.clear())
    engine.submit(make_request(1), on_done, lambda: True)
    del on_done
    wait_until(lambda: engine.broken, "the engine to break")
    engine.close()
    assert "in the middle of" in str(engine.broken)
    assert lost() is None, "the error keeps the request"


def test_a_warm_up_that_panics_is_told_to_whoever_waits(unet: WatchedUNet) -> None:
    def measure_costs() -> Any:
        raise faults.Panic("no such kernel")

    engine = Engine(unet, TABLES, EngineLimits(4, 4), measure_costs, CPU, torch.float32)
    with pytest.raises(RuntimeError, match="no such kernel"):
        engine.wait_until_warm()
    with pytest.raises(UnavailableError, match="the engine is broken"):
        engine.submit(make_request(1), lambda _: None)
    engine.close()


def test_an_observer_that_always_fails_changes_nothing(unet: WatchedUNet, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def __getattr__(self, what: str) -> Callable[..., None]:
            raise RuntimeError(f"no metric for {what}")

    engine, outcomes = watched_engine(unet, Failing()), Outcomes()
    for tag in range(1, 4):
        engine.submit(make_request(tag), outcomes.callback(tag))
    collected = outcomes.collect(3)
    engine.close()
    for tag, outcome in collected.items():
        assert_is_reference(outcome, make_request(tag))
    assert "no metric for stepped" in caplog.text


def test_an_observer_is_told_whenever_rows_enter_or_leave(unet: WatchedUNet) -> None:
    observed, outcomes = Observed(), Outcomes()
    engine = watched_engine(unet, observed)
    engine.submit(make_request(1, waveforms=6, steps=3), outcomes.callback(1))  # room for two of them at a time
    assert_is_reference(outcomes.collect(1)[1], make_request(1, waveforms=6, steps=3))
    engine.close()
    loads = [arguments[0] for what, arguments in observed.told if what == "changed"]
    rows = [(load.active_rows, load.pending_rows) for load in sorted(loads, key=lambda load: load.number)]
    assert list(dict.fromkeys(rows)) == [(0, 12), (4, 8), (0, 8), (4, 4), (0, 4), (4, 0), (0, 0)]


def test_an_engine_launches_on_its_own_device(unet: WatchedUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on the first GPU. Here there is none, so this sees only who asks for which device."""
    asked: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        engine_module, "launch_on", lambda device: asked.append((threading.current_thread().name, device))
    )
    engine = make_engine(unet, TABLES)
    engine.wait_until_warm()
    engine.close()
    assert asked == [("engine-cpu", CPU)]


def test_whose_client_cannot_be_asked_fails_alone(unet: WatchedUNet) -> None:
    engine, outcomes = watched_engine(unet, None), Outcomes()

    def is_cancelled() -> bool:
        raise SystemError("the response sender is gone")

    unet.gate = threading.Semaphore(0)
    engine.submit(make_request(1), outcomes.callback(1), is_cancelled)
    for tag in (2, 3):
        engine.submit(make_request(tag), outcomes.callback(tag), lambda: False)
    unet.gate.release(1000)
    collected = outcomes.collect(3)
    engine.close()
    assert isinstance(collected[1], SystemError)
    for tag in (2, 3):
        assert_is_reference(collected[tag], make_request(tag))


def test_a_scheduler_that_lacks_a_package_is_the_servers_fault(
    unet: WatchedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusers has it without scipy; whoever asks for another scheduler is not concerned."""

    class LMSDiscreteScheduler:
        @classmethod
        def from_config(cls, *_: object) -> None:
            raise ImportError("LMSDiscreteScheduler requires the scipy library")

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", LMSDiscreteScheduler)
    tables = ScheduleTables(SCHEDULER_CONFIG)
    pool, outcomes = EnginePool([make_engine(unet, tables)], tables), Outcomes()
    pool.submit(make_request(1, scheduler="LMSDiscreteScheduler"), outcomes.callback(1))
    pool.submit(make_request(2), outcomes.callback(2))
    collected = outcomes.collect(2)
    pool.close()
    assert isinstance(collected[1], ImportError)
    assert_is_reference(collected[2], make_request(2))


def test_a_package_that_is_missed_in_a_schedule_is_no_invalid_argument(
    unet: WatchedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_timesteps(*_: object) -> None:
        raise ImportError("no scipy")

    monkeypatch.setattr(diffusers.DDIMScheduler, "set_timesteps", set_timesteps)
    tables = ScheduleTables(SCHEDULER_CONFIG)
    pool, outcomes = EnginePool([make_engine(unet, tables)], tables), Outcomes()
    pool.submit(make_request(1, scheduler="DDIMScheduler"), outcomes.callback(1))
    outcome = outcomes.collect(1)[1]
    pool.close()
    assert isinstance(outcome, ImportError)
    assert not isinstance(outcome, InvalidArgumentError)


def test_closing_answers_those_whose_schedules_are_not_built(unet: WatchedUNet, directory: Path) -> None:
    tables = ScheduleTables(SCHEDULER_CONFIG)
    pool, outcomes = EnginePool([make_engine(unet, tables)], tables), Outcomes()
    file = faults.arm(directory, "denoiser.schedule", STALL)
    for tag in range(1, 4):
        pool.submit(make_request(tag, steps=tag), outcomes.callback(tag))
    wait_until(lambda: faults.has_struck(file), "the schedules' thread to be held up")
    pool.close()
    waiting = [outcomes.next() for _ in range(2)]
    assert {tag for tag, _ in waiting} == {2, 3}
    file.unlink()
    tag, last = outcomes.next()
    assert tag == 1
    assert all(isinstance(outcome, UnavailableError) for outcome in (last, *(outcome for _, outcome in waiting)))


def test_closing_answers_although_a_step_never_ends(unet: WatchedUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CLOSE_TIMEOUT_IN_S", 0.05)
    engine, outcomes = watched_engine(unet, None), Outcomes()
    unet.gate = threading.Semaphore(0)
    for tag in range(1, 4):
        engine.submit(make_request(tag), outcomes.callback(tag))
    engine.close()
    collected = outcomes.collect(3)
    assert all(isinstance(outcome, UnavailableError) for outcome in collected.values())
    unet.gate.release(1000)
    wait_until(lambda: not engine._thread.is_alive(), "the thread to end")
    with pytest.raises(Empty):
        outcomes.next(timeout=0)


def test_groups_that_cannot_be_taken_apart_go_with_their_requests(unet: WatchedUNet, directory: Path) -> None:
    engine, outcomes = watched_engine(unet, None), Outcomes()
    faults.arm(directory, "denoiser.regroup", RAISE)
    engine.submit(make_request(1), outcomes.callback(1))
    assert isinstance(outcomes.collect(1)[1], RuntimeError)
    for tag in (2, 3):
        engine.submit(make_request(tag), outcomes.callback(tag))
        assert_is_reference(outcomes.collect(1)[tag], make_request(tag))
    assert engine.broken is None
    engine.close()


def test_latents_that_are_not_finite_fail_their_own_request(unet: WatchedUNet, directory: Path) -> None:
    engine, outcomes = watched_engine(unet, None), Outcomes()
    unet.gate = threading.Semaphore(0)
    faults.arm(directory, "denoiser.regroup", NAN)
    for tag in (1, 2):
        engine.submit(make_request(tag), outcomes.callback(tag))
    unet.gate.release(1000)
    collected: dict[int, Tensor | Exception] = outcomes.collect(2)
    engine.close()
    assert isinstance(collected[1], InternalError)
    assert_is_reference(collected[2], make_request(2))


def test_what_lacks_memory_is_retried_in_halves_and_only_a_request_too_large_alone_fails(unet: WatchedUNet) -> None:
    """Items of guided waveforms come in twos: more than three at once do not fit, and waveforms of tag 9 never do."""

    def lack_memory(tags: tuple[int, ...]) -> None:
        if len(tags) > 3 or 9 in tags:
            raise torch.OutOfMemoryError(f"no room for {len(tags)} items")

    engine, outcomes = make_engine(unet, TABLES), Outcomes()
    unet.gate, unet.fail = threading.Semaphore(0), lack_memory
    requests = {tag: make_request(tag, steps=3 + tag % 3, frames=3 + tag % 4) for tag in range(1, 7)}
    requests[9] = make_request(9)
    for tag, request in requests.items():
        engine.submit(request, outcomes.callback(tag))
    unet.gate.release(10_000)
    collected: dict[int, Tensor | Exception] = outcomes.collect(len(requests))
    assert isinstance(collected.pop(9), torch.OutOfMemoryError)
    for tag, outcome in collected.items():
        assert_is_reference(outcome, requests[tag])
    # Far fewer forwards fail than requests there are steps of: the size that fits is remembered.
    assert sum(len(tags) > 3 for tags in unet.forwards) <= 4
    # With memory again, and nothing in flight, the next are together again.
    unet.forwards.clear()
    unet.gate, unet.fail = threading.Semaphore(0), lambda _: None
    for tag in (1, 2, 3):
        engine.submit(make_request(tag), outcomes.callback(tag))
    unet.gate.release(1000)
    for tag, outcome in outcomes.collect(3).items():
        assert_is_reference(outcome, make_request(tag))
    assert max(map(len, unet.forwards)) == 6
    assert engine.broken is None
    engine.close()


def test_no_lack_of_memory_breaks_an_engine(unet: WatchedUNet) -> None:
    def lack_memory(tags: tuple[int, ...]) -> None:
        raise torch.OutOfMemoryError(f"no room for {len(tags)} items")

    engine, outcomes = make_engine(unet, TABLES), Outcomes()
    unet.fail = lack_memory
    for tag in range(2 * engine_module.MAX_FAILED_STEPS):
        engine.submit(make_request(tag), outcomes.callback(tag))
        assert isinstance(outcomes.collect(1)[tag], torch.OutOfMemoryError)
    unet.fail = lambda _: None
    engine.submit(make_request(20), outcomes.callback(20))
    assert_is_reference(outcomes.collect(1)[20], make_request(20))
    engine.close()
