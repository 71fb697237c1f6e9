"""An in-flight batching engine: its unit of scheduling is the denoising step, not the request.

At every step it takes the waveforms in flight, runs one UNet forward over them and advances each by its own
schedule; the finished leave and the waiting enter in between. Waveforms of different lengths share a forward where
that is the cheapest, else groups of them take turns.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from audioldm2_triton.errors import (
    DEADLINE_EXCEEDED,
    DeadlineExceededError,
    InvalidArgumentError,
    RequestCancelledError,
    UnavailableError,
    as_exception,
    invalid,
)
from audioldm2_triton.server import faults
from audioldm2_triton.server.residency import Residency
from engine.device import RunAhead, device_works
from engine.job import Job, OnProgress, call_all
from engine.limits import EngineLimits, EngineLoad, GuardedObserver, Observer
from engine.step_group import StepGroup
from stepping.forward_plan import Bucket, Flight, ForwardCosts, plan_forwards
from stepping.request import DenoisingRequest, OnDone
from stepping.schedule_table import ScheduleError, ScheduleTables
from stepping.step_batch import StepBatch, UNet, WaveformState, stack_waveforms, start_waveform
from stepping.windows import plan_windows

logger = logging.getLogger(__name__)

CANCELLATION_POLL_NS: Final = 20_000_000  # asking Triton costs more than a flag, so not before every step of 5 ms
MAX_FAILED_STEPS: Final = 3  # in a row; after these the engine counts as broken
CLOSE_TIMEOUT_IN_S: Final = 20.0  # for the step under way; less than the server's own exit timeout


class Engine:
    """Denoises requests with one UNet on one device, in a thread of its own.

    Args:
        unet: the UNet, on `device`.
        tables: the schedules of the checkpoint.
        measure_costs: warms the UNet up and tells what its forwards cost, by which the engine chooses which waveforms
            share one; called in the engine's thread.
        guidance_interval: from and to which share of its steps a waveform has guidance.
        residency: of the UNet's weights; the engine is inside it while waveforms are in flight, and gives way between
            steps.
    """

    def __init__(
        self,
        unet: UNet,
        tables: ScheduleTables,
        limits: EngineLimits,
        measure_costs: Callable[[], ForwardCosts],
        device: torch.device,
        dtype: torch.dtype,
        observer: Observer | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        residency: Residency | None = None,
    ) -> None:
        self.limits = limits
        self.broken: Exception | None = None
        self._unet = unet
        self._tables = tables
        self._measure_costs = measure_costs
        self._costs: ForwardCosts | None = None
        self._device = device
        self._dtype = dtype
        self._observer = GuardedObserver(observer)
        self._guidance_interval = guidance_interval
        self._residency = residency or Residency()
        self._changed = threading.Condition()
        self._jobs: list[Job] = []  # in order of arrival
        self._owners: dict[int, Job] = {}  # by id() of a waveform in flight
        self._flight: list[WaveformState] = []
        self._groups: deque[StepGroup] = deque()  # the first is next to take a forward
        self._stale = False  # the waveforms in flight are not those of the groups
        self._failed_steps = 0
        self._run_ahead = RunAhead(device)
        self._last_step = time.perf_counter()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{device}", daemon=True)
        self._thread.start()

    # -- called from any thread

    def submit(self, request: DenoisingRequest, on_done: OnDone, is_cancelled: Callable[[], bool] | None = None) -> Job:
        """Takes a request in, without blocking; `on_done` is called once, later, from the engine's thread.

        Args:
            is_cancelled: asked between steps.

        Raises `InvalidArgumentError` for a schedule that cannot be run and for a request that can never fit, and
        `UnavailableError` where there is no room and the waiting list is full.
        """
        faults.at("denoiser.submit")
        items = self.limits.held_items(request)
        if items > self.limits.max_active_rows:
            raise invalid(
                "num_waveforms_per_prompt",
                request.rows[0].num_waveforms,
                f"a request of at most {self.limits.max_active_rows} UNet rows, not {items} "
                "(waveforms of all its rows, counted twice with guidance)",
            )
        job = Job(request, self._start_waveforms(request), on_done, is_cancelled)
        with self._changed:
            if self._closed or self.broken:
                raise UnavailableError(f"denoiser: the engine is {'broken' if self.broken else 'shutting down'}")
            load = self._load()
            job.must_wait = bool(self._jobs) and self._frames(job.waveforms) > load.free_frames
            if job.must_wait and load.waiting_requests >= self.limits.max_waiting:
                raise UnavailableError(
                    f"denoiser is full: {load.active_requests} requests in flight and {load.waiting_requests} waiting;"
                    " try again later"
                )
            self._jobs.append(job)
            load = self._load()
            self._changed.notify_all()
        self._observer.changed(load)
        return job

    def cancel(self, job: Job) -> None:
        """Takes effect before the next step; a job that is done is left alone."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def listen(self, job: Job, after: int, on_progress: OnProgress) -> None:
        """Calls `on_progress` once: as soon as more than `after` evaluations are done, or when the job has ended."""
        with self._changed:
            if not job.done:
                job.listeners.append((after, on_progress))
                calls = job.progressed()
            else:
                calls = [lambda: on_progress(0, 0)]
        call_all(calls)

    @property
    def load(self) -> EngineLoad:
        with self._changed:
            return self._load()

    def wait_until_warm(self) -> None:
        """Raises what went wrong in the warm-up."""
        with self._changed:
            self._changed.wait_for(lambda: self._costs is not None or self.broken)
        if self.broken:
            raise self.broken

    def close(self) -> None:
        """Fails what is in flight and waiting, and ends the thread, unless a step holds it for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_IN_S)
        if self._thread.is_alive():
            logger.error("the engine on %s does not come out of its step", self._device)
            self._fail_all()

    def _start_waveforms(self, request: DenoisingRequest) -> tuple[WaveformState, ...]:
        waveforms = []
        for row in request.rows:
            try:
                table = self._tables.get(row.scheduler, row.num_inference_steps)
            except ScheduleError as error:
                raise InvalidArgumentError(f"`scheduler`, `num_inference_steps`: {error}") from error
            windows = None
            if row.windowing is not None and row.num_windows > 1:
                windows = plan_windows(row.windowing, row.latent_frames, self._device)
            held = self.limits.held_windows(request, row)
            for noise in row.noise:
                waveform = start_waveform(
                    *(row.positive, row.negative, row.guidance_scale, table, noise, self._guidance_interval),
                    windows=windows,
                    held_windows=held,
                )
                waveforms.append(waveform)
        return tuple(waveforms)

    # -- the engine's thread

    def _run(self) -> None:
        try:
            self._warm_up()
            with torch.inference_mode():
                while self._wait_for_work():
                    faults.at("denoiser.loop")
                    self._drop_cancelled()
                    self._admit()
                    self._step()
        except BaseException as error:
            # Whose fault it is cannot be told, nor what state the engine is in: it must not go on.
            self._break(as_exception(error))
        try:
            self._residency.leave()
        except BaseException:
            logger.exception("the weights on %s could not be taken out", self._device)
        self._fail_all()

    def _warm_up(self) -> None:
        with self._residency:
            costs = self._measure_costs()
        with self._changed:
            self._costs = costs
            self._changed.notify_all()

    def _break(self, error: Exception) -> None:
        with self._changed:
            self.broken = error
            self._changed.notify_all()
        logger.error("the engine on %s is broken and takes no more requests", self._device, exc_info=error)
        # The error stays; what its frames hold must not: a request that is lost in one is answered when it is let go.
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        self._observer.broke(error)

    def _fail_all(self) -> None:
        """Answers everything that is held; nothing more can come in."""
        reason = "broken" if self.broken else "shutting down"
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            try:
                self._finish(job, UnavailableError(f"denoiser: the engine is {reason}; try again"))
            except BaseException:
                logger.exception("the engine on %s could not let a request go", self._device)

    def _wait_for_work(self) -> bool:
        if not self._jobs:
            self._residency.leave()
        with self._changed:
            if not self._jobs:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                self._last_step = time.perf_counter()
            return not self._closed and not self.broken

    def _load(self) -> EngineLoad:
        waiting = sum(job.must_wait and not job.started for job in self._jobs)
        return EngineLoad(
            active_rows=sum(waveform.unet_items for waveform in self._flight),
            pending_rows=sum(waveform.unet_items for job in self._jobs for waveform in job.pending),
            active_requests=len(self._jobs) - waiting,
            waiting_requests=waiting,
            free_frames=self.limits.max_active_frames
            - self._frames(self._flight)
            - sum(self._frames(job.pending) for job in self._jobs),
        )

    def _frames(self, waveforms: Iterable[WaveformState]) -> int:
        return sum(self.limits.frames(waveform.unet_items, waveform.row_frames) for waveform in waveforms)

    def _drop_cancelled(self) -> None:
        now = time.monotonic_ns()
        for job in list(self._jobs):
            steps = f"after {job.evaluations_done} of {job.num_evaluations} steps"
            try:
                cancelled = job.cancelled or self._poll_cancelled(job, now)
            except BaseException as error:
                self._finish(job, as_exception(error))
                continue
            if cancelled:
                self._finish(job, RequestCancelledError(f"cancelled {steps}"))
            elif 0 < job.request.deadline_ns <= now:
                self._finish(job, DeadlineExceededError(f"{DEADLINE_EXCEEDED} {steps}"))

    def _poll_cancelled(self, job: Job, now: int) -> bool:
        if job.is_cancelled is None or now - job.polled_ns < CANCELLATION_POLL_NS:
            return False
        job.polled_ns = now
        faults.at("denoiser.is_cancelled")
        return job.is_cancelled()

    def _admit(self) -> None:
        """Waveforms enter in order of arrival, as far as there is room; the first always has it."""
        admitted: list[Job] = []
        failed: list[tuple[Job, Exception]] = []
        with self._changed:
            room = self.limits.max_active_frames - self._frames(self._flight)
            for job in self._jobs:
                try:
                    room = self._admit_job(job, room, admitted)
                except BaseException as error:
                    failed.append((job, as_exception(error)))
                    continue
                if job.pending:
                    break  # later arrivals do not overtake
        for job, reason in failed:
            self._finish(job, reason)
        for job in admitted:
            self._observer.admitted((time.monotonic_ns() - job.submitted_ns) / 1e9)
        if admitted:
            self._observer.changed(self.load)

    def _admit_job(self, job: Job, room: int, admitted: list[Job]) -> int:
        """Lets a job's waveforms in. Returns how much room is left."""
        while job.pending and (not self._flight or self._frames([job.pending[0]]) <= room):
            faults.at("denoiser.admit")
            waveform = job.pending.popleft()
            room -= self._frames([waveform])
            self._owners[id(waveform)] = job
            self._flight.append(waveform)
            self._stale = True
            if not job.started:
                job.started = True
                admitted.append(job)
        return room

    def _step(self) -> None:
        """One forward of the group whose turn it is."""
        waveforms: Sequence[WaveformState] = self._flight
        try:
            self._residency.give_way()
            self._residency.enter()
            if self._stale:
                waveforms = self._flight
                self._regroup()
            if not self._groups:
                return
            group = self._groups[0]
            waveforms = group.waveforms
            faults.at("denoiser.step")
            items = group.advance(self._unet)
            self._run_ahead.limit()
            self._groups.rotate(-1)
            self._account(group, items)
            self._failed_steps = 0
        except BaseException as error:
            self._fail_step(waveforms, as_exception(error))

    def _regroup(self) -> None:
        """Plans the forwards anew after something entered or left."""
        in_flight = {id(waveform) for waveform in self._flight}
        for group in self._groups:
            group.unstack()
        groups = [group for group in self._groups if group.amid_step and id(group.waveforms[0]) in in_flight]
        kept = {id(waveform) for group in groups for waveform in group.waveforms}
        self._groups.clear()
        # Unstacked first, and all of them: a waveform's history is a part of its old batch until it is stacked again.
        for waveform in self._flight:
            waveform.history = faults.at("denoiser.regroup", waveform.history.to(self._device, non_blocking=True))
        flights = [
            Flight(index, waveform.step_items, waveform.row_frames)
            for index, waveform in enumerate(self._flight)
            if not waveform.in_turns
        ]
        assert self._costs is not None
        for forward in plan_forwards(flights, self._costs) if flights else []:
            waveforms = [self._flight[index] for index in forward.indices]
            groups.append(StepGroup(waveforms, partial(self._stack, bucket=forward.bucket)))
        turns = [waveform for waveform in self._flight if waveform.in_turns and id(waveform) not in kept]
        for job in self._owners_of(turns):
            own = {id(waveform) for waveform in job.waveforms}
            groups.append(StepGroup([w for w in turns if id(w) in own], self._stack_turn))
        # Lengths take turns: whoever has waited longest for a step goes first.
        groups.sort(key=lambda group: min(waveform.last_step for waveform in group.waveforms))
        self._groups.extend(groups)
        self._stale = False

    def _stack(self, rows: Sequence[WaveformState], bucket: Bucket | None) -> StepBatch:
        return stack_waveforms(self._unet, rows, self._device, self._dtype, bucket)

    def _stack_turn(self, rows: Sequence[WaveformState]) -> StepBatch:
        """The rows of one of several forwards a step, in the cheapest bucket."""
        assert self._costs is not None
        lengths = {row.frames for row in rows}
        items = sum(row.step_items for row in rows)
        return self._stack(rows, self._costs.cheapest(items, max(lengths), len(lengths) > 1)[1])

    def _account(self, group: StepGroup, items: int) -> None:
        now = time.perf_counter()
        self._observer.stepped(items, now - self._last_step)
        self._last_step = now
        for waveform in group.waveforms:
            waveform.last_step = now
        if group.amid_step:
            return
        with self._changed:
            for waveform in group.waveforms:
                guidance = waveform.guidance
                waveform.evaluation += 1
                self._stale |= waveform.guidance is not guidance  # it takes more or fewer items from now on
            jobs = self._owners_of(group.waveforms)
            calls = [call for job in jobs for call in job.progressed()]
        call_all(calls)
        finished = [waveform for waveform in group.waveforms if waveform.finished]
        if finished:
            group.unstack()
            self._leave(finished)
            for job in jobs:
                if all(waveform.finished for waveform in job.waveforms):
                    self._finish(job, job.collect())

    def _fail_step(self, waveforms: Sequence[WaveformState], error: Exception) -> None:
        """The requests of a failed step fail; the others start over from their last good state."""
        for job in self._owners_of(waveforms):
            self._finish(job, error)
        if not self._flight:
            self._groups.clear()  # which may not even be taken apart
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS or not device_works(self._device):
            self._break(error)

    def _owners_of(self, waveforms: Sequence[WaveformState]) -> list[Job]:
        jobs = {id(job): job for job in (self._owners.get(id(waveform)) for waveform in waveforms) if job is not None}
        return list(jobs.values())

    def _leave(self, waveforms: Sequence[WaveformState]) -> None:
        """Takes waveforms out of the flight; the next step plans anew."""
        leaving = {id(waveform) for waveform in waveforms}
        with self._changed:
            if not any(id(waveform) in leaving for waveform in self._flight):
                return
            self._flight = [waveform for waveform in self._flight if id(waveform) not in leaving]
            self._stale = True
            for key in leaving:
                self._owners.pop(key, None)

    def _finish(self, job: Job, outcome: Tensor | Exception) -> None:
        """Lets a job go and answers it, once; raises nothing."""
        self._leave(job.waveforms)
        with self._changed:
            if job.done:
                return
            self._jobs.remove(job)
            job.done = True
            calls: list[Callable[[], None]] = [
                lambda listener=listener: listener(0, 0)  # type: ignore[misc]
                for _, listener in job.listeners
            ]
            job.listeners = []
            load = self._load()
        call_all(calls)
        self._observer.finished(job.request, outcome)
        self._observer.changed(load)
        call_all([lambda: job.answer(outcome)])
