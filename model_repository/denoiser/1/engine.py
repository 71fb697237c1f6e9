"""An in-flight batching engine: its unit of scheduling is the denoising step, not the request.

At every step it takes the waveforms in flight, runs one UNet forward over them and advances each by its own
schedule; the finished leave and the waiting enter in between.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from audioldm2_triton.errors import (
    DEADLINE_EXCEEDED,
    DeadlineExceededError,
    InternalError,
    RequestCancelledError,
    UnavailableError,
    invalid,
)
from denoising_request import DenoisingRequest, OnDone
from schedule_table import ScheduleTables
from step_batch import (
    StepBatch,
    UNetForward,
    WaveformState,
    advance,
    stack_waveforms,
    start_waveform,
    unstack_waveforms,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    max_active_rows: int  # UNet batch items in flight, which is also the largest forward
    max_waiting: int  # requests that may wait for room


@dataclass(eq=False)
class Job:
    """A request in the engine; its fields belong to the engine's thread, but for `cancelled`."""

    request: DenoisingRequest
    on_done: OnDone
    is_cancelled: Callable[[], bool] | None
    pending: deque[WaveformState]  # not yet in flight, in generation order
    waveforms: tuple[WaveformState, ...]  # all of them
    counts_as_waiting: bool
    cancelled: bool = False
    started: bool = False

    @property
    def evaluations_done(self) -> int:
        return min(waveform.evaluation for waveform in self.waveforms)

    @property
    def num_evaluations(self) -> int:
        return max(waveform.table.num_evaluations for waveform in self.waveforms)


@dataclass
class _Group:
    """Waveforms of one latent length, which share a forward, and their stacked state while nothing changes."""

    waveforms: list[WaveformState] = field(default_factory=list)
    batch: StepBatch | None = None


class Engine:
    """Denoises requests with one UNet on one device, in a thread of its own.

    Args:
        unet: the forward of the UNet, on `device`.
        tables: the schedules of the checkpoint.
    """

    def __init__(
        self, unet: UNetForward, tables: ScheduleTables, limits: EngineLimits, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.limits = limits
        self._unet = unet
        self._tables = tables
        self._device = device
        self._dtype = dtype
        self._changed = threading.Condition()
        self._jobs: list[Job] = []  # in order of arrival
        self._groups: dict[int, _Group] = {}  # by latent frames; the first is next to step
        self._owners: dict[int, Job] = {}  # by id() of a waveform in flight
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{device}", daemon=True)
        self._thread.start()

    # -- called from any thread

    def submit(self, request: DenoisingRequest, on_done: OnDone, is_cancelled: Callable[[], bool] | None = None) -> Job:
        """Takes a request in, without blocking; `on_done` is called once, later, from the engine's thread.

        Args:
            is_cancelled: asked before every step.

        Raises `InvalidArgumentError` for a schedule that cannot be run and for a request that can never fit, and
        `UnavailableError` where there is no room and the waiting list is full.
        """
        if request.unet_items > self.limits.max_active_rows:
            raise invalid(
                "num_waveforms_per_prompt",
                request.rows[0].num_waveforms,
                f"a request of at most {self.limits.max_active_rows} UNet rows, not {request.unet_items} "
                "(waveforms of all its rows, counted twice with guidance)",
            )
        waveforms = tuple(
            start_waveform(
                row.positive,
                row.negative,
                row.guidance_scale,
                self._tables.get(row.scheduler, row.num_inference_steps),
                noise,
            )
            for row in request.rows
            for noise in row.noise
        )
        with self._changed:
            if self._closed:
                raise UnavailableError("denoiser: the engine is shutting down")
            pending = sum(waveform.unet_items for job in self._jobs for waveform in job.pending)
            fits = self._active_rows() + pending + request.unet_items <= self.limits.max_active_rows
            waiting = self._waiting_requests()
            if not fits and waiting >= self.limits.max_waiting:
                raise UnavailableError(
                    f"denoiser is full: {len(self._jobs) - waiting} requests in flight and {waiting} waiting; try later"
                )
            job = Job(request, on_done, is_cancelled, deque(waveforms), waveforms, counts_as_waiting=not fits)
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Takes effect before the next step; a job that is done is left alone."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    @property
    def active_rows(self) -> int:
        """UNet batch items in flight."""
        with self._changed:
            return self._active_rows()

    @property
    def waiting_requests(self) -> int:
        with self._changed:
            return self._waiting_requests()

    def close(self) -> None:
        """Fails what is in flight and waiting, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # -- the engine's thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                self._step()
        for job in list(self._jobs):
            self._finish(job, UnavailableError("denoiser: the engine is shutting down"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            return not self._closed

    def _active_rows(self) -> int:
        return sum(waveform.unet_items for group in self._groups.values() for waveform in group.waveforms)

    def _waiting_requests(self) -> int:
        return sum(job.counts_as_waiting and not job.started for job in self._jobs)

    def _drop_cancelled(self) -> None:
        now = time.monotonic_ns()
        for job in list(self._jobs):
            steps = f"after {job.evaluations_done} of {job.num_evaluations} steps"
            if job.cancelled or (job.is_cancelled is not None and job.is_cancelled()):
                self._finish(job, RequestCancelledError(f"cancelled {steps}"))
            elif 0 < job.request.deadline_ns <= now:
                self._finish(job, DeadlineExceededError(f"{DEADLINE_EXCEEDED} {steps}"))

    def _admit(self) -> None:
        """Waveforms enter in order of arrival, as far as there is room."""
        with self._changed:
            room = self.limits.max_active_rows - self._active_rows()
            for job in self._jobs:
                while job.pending:
                    if job.pending[0].unet_items > room:
                        return
                    waveform = job.pending.popleft()
                    waveform.history = waveform.history.to(self._device, non_blocking=True)
                    room -= waveform.unet_items
                    job.started = True
                    self._owners[id(waveform)] = job
                    self._join(waveform)

    def _join(self, waveform: WaveformState) -> None:
        group = self._groups.setdefault(waveform.latents.shape[1], _Group())
        self._unstack(group)
        group.waveforms.append(waveform)

    def _unstack(self, group: _Group) -> None:
        if group.batch is not None:
            unstack_waveforms(group.batch, group.waveforms)
            group.batch = None

    def _step(self) -> None:
        """One forward of the group whose turn it is."""
        if not self._groups:
            return
        frames, group = next(iter(self._groups.items()))
        try:
            if group.batch is None:
                group.batch = stack_waveforms(group.waveforms, self._device, self._dtype)
            group.batch = advance(self._unet, group.batch)
        except Exception as error:
            group.batch = None
            for job in {id(job): job for job in map(self._owner, group.waveforms)}.values():
                self._finish(job, error)
            return
        for waveform in group.waveforms:
            waveform.evaluation += 1
        with self._changed:
            self._groups[frames] = self._groups.pop(frames)  # to the end: lengths take turns
        if any(waveform.finished for waveform in group.waveforms):
            self._release(group)

    def _owner(self, waveform: WaveformState) -> Job:
        return self._owners[id(waveform)]

    def _release(self, group: _Group) -> None:
        self._unstack(group)
        finished = [waveform for waveform in group.waveforms if waveform.finished]
        jobs = [self._owner(waveform) for waveform in finished]
        self._leave(finished)
        for job in {id(job): job for job in jobs}.values():
            if all(waveform.finished for waveform in job.waveforms):
                self._finish(job, _collect(job))

    def _leave(self, waveforms: Sequence[WaveformState]) -> None:
        leaving = {id(waveform) for waveform in waveforms}
        with self._changed:
            for frames, group in list(self._groups.items()):
                if any(id(waveform) in leaving for waveform in group.waveforms):
                    self._unstack(group)
                    group.waveforms = [waveform for waveform in group.waveforms if id(waveform) not in leaving]
                if not group.waveforms:
                    del self._groups[frames]
            for key in leaving:
                self._owners.pop(key, None)

    def _finish(self, job: Job, outcome: Tensor | Exception) -> None:
        self._leave(job.waveforms)
        with self._changed:
            self._jobs.remove(job)
        try:
            job.on_done(outcome)
        except Exception:
            logger.exception("denoiser: a finished request could not be answered")


def _collect(job: Job) -> Tensor | Exception:
    """The latents [B, N, C, H, W] of a finished job on the host."""
    try:
        latents = torch.stack([waveform.latents for waveform in job.waveforms]).to("cpu")
    except Exception as error:
        return error
    if not bool(torch.isfinite(latents).all()):
        return InternalError("denoiser: the latents are not finite")
    return latents.unflatten(0, (len(job.request.rows), -1))
