"""A request while it is in the engine."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from math import inf
from typing import Final

import torch
from torch import Tensor

from audioldm2_triton.errors import (
    DEADLINE_EXCEEDED,
    DeadlineExceededError,
    InvalidArgumentError,
    NonFiniteError,
    RequestCancelledError,
    as_exception,
)
from audioldm2_triton.server import faults
from engine.limits import EngineLimits
from stepping.request import DenoisingRequest, OnDone
from stepping.schedule_table import ScheduleError, ScheduleTables
from stepping.waveform import WaveformState, start_waveform
from stepping.windows import plan_windows

logger = logging.getLogger(__name__)

CANCELLATION_POLL_NS: Final = 20_000_000
CANCELLATION_POLL_PER_REQUEST_NS: Final = 1_500_000
"""With many requests held: asking Triton whether a client has gone takes long, for 200 longer than a small step."""

OnProgress = Callable[[int, int], None]
"""Receives the number of UNet evaluations done and in total; zeros if the request is no longer in flight."""


class JobStatus(Enum):
    """The state of a request in the engine."""

    ADMISSIBLE = auto()  # there was room on arrival
    WAITING = auto()  # there was no room on arrival
    IN_FLIGHT = auto()  # since its first waveform has entered
    DONE = auto()  # answered, or about to be


class Job:
    """A request in the engine. Its fields belong to the engine's lock."""

    def __init__(
        self,
        request: DenoisingRequest,
        waveforms: tuple[WaveformState, ...],
        on_done: OnDone,
        is_cancelled: Callable[[], bool] | None,
        evaluation_costs: tuple[float, ...] = (),
    ) -> None:
        self.request = request
        self.waveforms = waveforms
        self.pending = deque(waveforms)  # not yet in flight, in generation order
        self.on_done = on_done
        self.is_cancelled = is_cancelled
        self.status = JobStatus.ADMISSIBLE
        self.cancelled = False  # a client or its door wants it to end
        self.alone: float | None = None  # seconds that it takes by itself; None: not asked yet
        self.most: float | None = None  # seconds that it takes from others at most; None: not asked yet
        self.has_turn = False  # by age: it is not paused any more
        self.evaluation_costs = evaluation_costs  # of each waveform in seconds, at least; none: unknown
        self.submitted_ns = time.monotonic_ns()
        self.polled_ns = 0
        self.whole_seconds = self.least_seconds  # before its first step
        self.listeners: list[tuple[int, OnProgress]] = []

    @property
    def evaluations_done(self) -> int:
        """The number of evaluations done by the waveform with the most left to do."""
        return self.num_evaluations - max(w.table.num_evaluations - w.evaluation for w in self.waveforms)

    @property
    def least_seconds(self) -> float:
        """The cost of what is left to do, at least: that of the waveform with the most, by itself; 0: unknown."""
        costs = zip(self.waveforms, self.evaluation_costs, strict=False)
        return max(((w.table.num_evaluations - w.evaluation) * cost for w, cost in costs), default=0.0)

    @property
    def unfinished(self) -> list[WaveformState]:
        return [waveform for waveform in self.waveforms if not waveform.finished]

    @property
    def num_evaluations(self) -> int:
        return max(waveform.table.num_evaluations for waveform in self.waveforms)

    def reason_to_end(self, now: int, pace: float, held: int, may_ask: bool = True) -> Exception | None:
        """Returns why it must not take another step: cancelled, late, or its client cannot be asked. None if it may.

        It is late as soon as it cannot be done in time any more.

        Args:
            pace: what an evaluation takes at least, as a multiple of its cost; 0: unknown.
            held: how many requests the engine has; the more, the less often each client is asked.
            may_ask: whether its client may be asked now.
        """
        try:
            cancelled = self.cancelled or (may_ask and self._poll_cancelled(now, held))
        except BaseException as error:
            return as_exception(error)
        left_s = (self.request.deadline_ns - now) / 1e9 if self.request.deadline_ns > 0 else inf
        if not cancelled and left_s > max(0.0, self.whole_seconds * pace):
            return None  # as nearly always, for each request held before each step
        steps = f"after {self.evaluations_done} of {self.num_evaluations} steps"
        if cancelled:
            return RequestCancelledError(f"cancelled {steps}")
        needed_s = self.least_seconds * pace
        if left_s <= 0:
            return DeadlineExceededError(f"{DEADLINE_EXCEEDED} {steps}")
        if left_s < needed_s:
            return DeadlineExceededError(
                f"{DEADLINE_EXCEEDED} {steps}: {left_s:.3g} s are left, but the others take at least {needed_s:.3g} s"
            )
        return None

    def _poll_cancelled(self, now: int, held: int) -> bool:
        pause_ns = max(CANCELLATION_POLL_NS, held * CANCELLATION_POLL_PER_REQUEST_NS)
        if self.is_cancelled is None or now - self.polled_ns < pause_ns:
            return False
        self.polled_ns = now
        faults.at("denoiser.is_cancelled")
        return self.is_cancelled()

    def listen(self, after: int, on_progress: OnProgress) -> list[Callable[[], None]]:
        """Registers a listener for more than `after` evaluations. Returns the calls that are due."""
        if self.status is JobStatus.DONE:
            return [lambda: on_progress(0, 0)]
        self.listeners.append((after, on_progress))
        return self.progressed()

    def stepped(self, seconds: float, items: int) -> list[Callable[[], None]]:
        """Returns the calls that are due after one of its evaluations."""
        on_stepped = self.request.on_stepped
        told = [] if on_stepped is None else [partial(on_stepped, seconds, items)]
        return [*told, *self.progressed()]

    def progressed(self) -> list[Callable[[], None]]:
        """Returns the calls that are due to progress listeners."""
        done, total = self.evaluations_done, self.num_evaluations
        due = [listener for after, listener in self.listeners if done > after]
        self.listeners = [(after, listener) for after, listener in self.listeners if done <= after]
        return [lambda listener=listener: _tell(listener, done, total) for listener in due]  # type: ignore[misc]

    def end(self) -> list[Callable[[], None]]:
        """Marks the job as done. Returns the last calls to its progress listeners."""
        self.status = JobStatus.DONE
        calls: list[Callable[[], None]] = [
            lambda listener=listener: listener(0, 0)  # type: ignore[misc]
            for _, listener in self.listeners
        ]
        self.listeners = []
        return calls

    def answer(self, outcome: Tensor | Exception) -> None:
        faults.at("denoiser.callback")
        self.on_done(outcome)

    def collect(self) -> Tensor | Exception:
        """Returns the latents [B, N, C, H, W] on the host, once all waveforms are finished, or the error instead."""
        try:
            faults.at("denoiser.collect")
            latents = torch.stack([waveform.latents for waveform in self.waveforms]).to("cpu")
            if not bool(torch.isfinite(latents).all()):
                return NonFiniteError("denoiser: the latents are not finite")
            return latents.unflatten(0, (len(self.request.rows), -1))
        except BaseException as error:
            return as_exception(error)


def start_waveforms(
    request: DenoisingRequest,
    tables: ScheduleTables,
    limits: EngineLimits,
    device: torch.device,
    guidance_interval: tuple[float, float],
) -> tuple[WaveformState, ...]:
    """Returns the waveforms of a request before their first steps, in generation order.

    Raises `InvalidArgumentError` for a schedule that cannot be run.
    """
    waveforms = []
    for row in request.rows:
        try:
            table = tables.get(row.scheduler, row.num_inference_steps)
        except ScheduleError as error:
            raise InvalidArgumentError(f"`scheduler`, `num_inference_steps`: {error}") from error
        windows = None
        if row.windowing is not None and row.num_windows > 1:
            windows = plan_windows(row.windowing, row.latent_frames, device)
        held = limits.held_windows(request, row)
        for noise in row.noise:
            waveform = start_waveform(
                *(row.positive, row.negative, row.guidance_scale, table, noise, guidance_interval),
                windows=windows,
                held_windows=held,
            )
            waveforms.append(waveform)
    return tuple(waveforms)


def _tell(listener: OnProgress, done: int, total: int) -> None:
    faults.at("denoiser.listener")
    listener(done, total)


def call_all(calls: Sequence[Callable[[], None]]) -> None:
    """Makes every call; one that raises is logged and does not stop the others."""
    for call in calls:
        try:
            call()
        except BaseException:
            # A client that cannot be answered must not end the thread on which all others depend.
            logger.exception("denoiser: an answer could not be sent")
