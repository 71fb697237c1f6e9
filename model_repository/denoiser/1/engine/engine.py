"""An in-flight batching engine: its unit of scheduling is the denoising step, not the request.

At every step it takes the waveforms in flight, runs one UNet forward over them and advances each by its own
schedule; the finished leave and the waiting enter in between. Waveforms of different lengths share a forward where
that is the cheapest, else groups of them take turns.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest
from typing import Final

import torch
from torch import Tensor

from audioldm2_triton.errors import UnavailableError, as_exception
from audioldm2_triton.server import faults
from audioldm2_triton.server.memory import clear_frames, is_out_of_memory
from audioldm2_triton.server.own_kernels import launch_on
from audioldm2_triton.server.residency import Residency
from engine.device import RunAhead, device_works
from engine.job import Job, JobStatus, OnProgress, call_all, start_waveforms
from engine.limits import EngineLimits, EngineLoad, GuardedObserver, Observer
from engine.pace import Pace, evaluation_costs
from engine.roster import Roster
from engine.step_group import StepGroup
from engine.step_groups import StepGroups
from stepping.forward_plan import ForwardCosts
from stepping.request import DenoisingRequest, OnDone
from stepping.schedule_table import ScheduleTables
from stepping.step_batch import UNet
from stepping.waveform import WaveformState

logger = logging.getLogger(__name__)

MOST_ASKED: Final = 16  # clients before one step
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
        self.device = device
        self._observer = GuardedObserver(observer)
        self._guidance_interval = guidance_interval
        self._residency = residency or Residency()
        self._changed = threading.Condition()
        self._roster = Roster(limits)
        self._groups = StepGroups(unet, device, dtype)
        self._pace = Pace(is_behind=device.type == "cuda")
        self._failed_steps = 0
        self._run_ahead = RunAhead(device)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{device}", daemon=True)
        self._thread.start()

    # -- called from any thread

    def submit(self, request: DenoisingRequest, on_done: OnDone, is_cancelled: Callable[[], bool] | None = None) -> Job:
        """Takes a request in, without blocking; `on_done` is called once, later, from the engine's thread.

        `is_cancelled` is asked between steps. Raises `InvalidArgumentError` for a schedule that cannot be run, and
        `UnavailableError` where there is no room and the waiting list is full, or others before it make it late.
        """
        faults.at("denoiser.submit")
        waveforms = start_waveforms(request, self._tables, self.limits, self.device, self._guidance_interval)
        job = Job(request, waveforms, on_done, is_cancelled, evaluation_costs(waveforms, self.costs))
        with self._changed:
            if self._closed or self.broken:
                raise UnavailableError(f"denoiser: the engine is {'broken' if self.broken else 'shutting down'}")
            self._roster.add(job, self.costs, self._pace)
            load = self._roster.load
            self._changed.notify_all()
        self._observer.changed(load)
        return job

    def cancel(self, job: Job) -> None:
        """Cancels a job before its next step; does nothing to one that is done."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def listen(self, job: Job, after: int, on_progress: OnProgress) -> None:
        """Calls `on_progress` once, as soon as more than `after` evaluations are done or the job has ended."""
        with self._changed:
            calls = job.listen(after, on_progress)
        call_all(calls)

    @property
    def load(self) -> EngineLoad:
        with self._changed:
            return self._roster.load

    @property
    def costs(self) -> ForwardCosts | None:
        """The measured costs of a forward; None until the UNet is warm."""
        return self._groups.costs

    def wait_until_warm(self) -> None:
        """Waits for the warm-up, and raises its error if it failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.costs is not None or self.broken)
        if self.broken:
            raise self.broken

    def close(self) -> None:
        """Fails all requests in flight and waiting, and ends the thread unless a step hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_IN_S)
        if self._thread.is_alive():
            logger.error("the engine on %s does not come out of its step", self.device)
            self._fail_all()

    # -- the engine's thread

    def _run(self) -> None:
        try:
            launch_on(self.device)
            self._warm_up()
            with torch.inference_mode():
                while self._wait_for_work():
                    faults.at("denoiser.loop")
                    self._drop_cancelled()
                    self._admit()
                    self._step()
        except BaseException as error:
            # Neither the cause nor the state of the engine is known, so it must not go on.
            self._break(as_exception(error))
        try:
            self._residency.leave()
        except BaseException:
            logger.exception("the weights on %s could not be taken out", self.device)
        self._fail_all()

    def _warm_up(self) -> None:
        with self._residency:
            costs = self._measure_costs()
        with self._changed:
            self._groups.costs = costs
            self._changed.notify_all()

    def _break(self, error: Exception) -> None:
        with self._changed:
            self.broken = error
            self._changed.notify_all()
        logger.error("the engine on %s is broken and takes no more requests", self.device, exc_info=error)
        clear_frames(error)  # a request that only a frame still holds is answered once it is released
        self._observer.broke(error)

    def _fail_all(self) -> None:
        """Answers every request held. No more can come in."""
        reason = "broken" if self.broken else "shutting down"
        with self._changed:
            jobs = list(self._roster.jobs)
        for job in jobs:
            try:
                self._finish(job, UnavailableError(f"denoiser: the engine is {reason}; try again"))
            except BaseException:
                logger.exception("the engine on %s could not let a request go", self.device)

    def _wait_for_work(self) -> bool:
        if not self._roster.jobs:
            self._residency.leave()
            self._groups.room = None
        with self._changed:
            if not self._roster.jobs:
                self._changed.wait_for(lambda: self._roster.jobs or self._closed)
                self._pace.begin()
            return not self._closed and not self.broken

    def _drop_cancelled(self) -> None:
        now, jobs = time.monotonic_ns(), list(self._roster.jobs)
        asked = set(nsmallest(MOST_ASKED, jobs, key=lambda job: job.polled_ns))
        for job in jobs:
            if (reason := job.reason_to_end(now, self._pace.least, len(jobs), job in asked)) is not None:
                self._finish(job, reason)

    def _admit(self) -> None:
        while True:
            with self._changed:
                admission = self._roster.admit(self.costs, self._pace.usual, self._groups.amid_step)
                self._groups.stale |= admission.has_changed
            for job, reason in admission.failed:
                self._finish(job, reason)
            for job in admission.started:
                call_all([job.request.on_admitted])
                self._observer.admitted((time.monotonic_ns() - job.submitted_ns) / 1e9)
            if admission.has_changed:
                self._observer.changed(self.load)
            if not admission.failed:
                return  # later requests must not take the room meant for these

    def _step(self) -> None:
        """Runs one forward of the group whose turn it is."""
        waveforms = self._roster.at_stake(self._groups.waveforms)
        try:
            self._residency.give_way()
            self._residency.enter()
            if self._groups.stale:
                with self._changed:
                    request_of = self._roster.request_of()
                self._groups.regroup(request_of)
            group = self._groups.next()
            if group is None:
                return
            waveforms = tuple(group.waveforms)
            faults.at("denoiser.step")
            items = group.advance(self._unet)
            self._run_ahead.limit()
            self._account(group, items)
            self._failed_steps = 0
        except BaseException as error:
            if not (is_out_of_memory(error) and self._groups.halve(waveforms, error)):
                self._fail_step(waveforms, as_exception(error))

    def _account(self, group: StepGroup, items: int) -> None:
        now, seconds = self._pace.stepped(group.waveforms, items, self.costs)
        self._observer.stepped(items, seconds)
        for waveform in group.waveforms:
            waveform.last_step = now
        if group.amid_step:
            return
        with self._changed:
            for waveform in group.waveforms:
                guidance = waveform.guidance
                waveform.evaluation += 1
                self._groups.stale |= waveform.guidance is not guidance  # it needs more or fewer items from now on
            jobs = self._roster.owners_of(group.waveforms)
            calls = [call for job in jobs for call in job.stepped(seconds, items)]
        call_all(calls)
        finished = [waveform for waveform in group.waveforms if waveform.finished]
        if finished:
            group.unstack()
            owners = self._roster.owners_of(finished)
            self._leave(finished)
            for job in owners:
                if not job.unfinished:
                    self._finish(job, job.collect())
            self._observer.changed(self.load)

    def _fail_step(self, waveforms: Sequence[WaveformState], error: Exception) -> None:
        """Fails the requests of a failed step; the others resume from their last good state."""
        self._failed_steps += not is_out_of_memory(error)  # which says nothing of the engine
        if self._failed_steps >= MAX_FAILED_STEPS or not device_works(self.device):
            self._break(error)  # first: whoever sends again must not meet this engine
        for job in self._roster.owners_of(waveforms):
            self._finish(job, error)
        if not self._roster.in_flight:
            self._groups.clear()  # unstacking could fail too

    def _leave(self, waveforms: Iterable[WaveformState]) -> None:
        """Removes waveforms from flight; the next step regroups the rest."""
        with self._changed:
            self._groups.stale |= self._roster.leave(waveforms)

    def _finish(self, job: Job, outcome: Tensor | Exception) -> None:
        """Releases a job and answers it, once. Raises nothing."""
        with self._changed:
            self._leave(job.waveforms)
            if job.status is JobStatus.DONE:
                return
            self._roster.remove(job)
            calls = job.end()
            load = self._roster.load
        call_all(calls)
        self._observer.finished(job.request, outcome)
        self._observer.changed(load)
        call_all([lambda: job.answer(outcome)])
