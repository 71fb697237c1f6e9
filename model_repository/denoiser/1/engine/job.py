"""A request while it is in the engine."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from audioldm2_triton.errors import InternalError, as_exception
from audioldm2_triton.server import faults
from stepping.request import DenoisingRequest, OnDone
from stepping.step_batch import WaveformState

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with the UNet evaluations done and in all; with zeros where the request is not in flight any more."""


class Job:
    """A request in the engine. Its fields belong to the engine's lock."""

    def __init__(
        self,
        request: DenoisingRequest,
        waveforms: tuple[WaveformState, ...],
        on_done: OnDone,
        is_cancelled: Callable[[], bool] | None,
    ) -> None:
        self.request = request
        self.waveforms = waveforms
        self.pending = deque(waveforms)  # not yet in flight, in generation order
        self.on_done = on_done
        self.is_cancelled = is_cancelled
        self.cancelled = False
        self.started = False
        self.done = False
        self.must_wait = False  # there was no room when it came
        self.submitted_ns = time.monotonic_ns()
        self.polled_ns = 0
        self.listeners: list[tuple[int, OnProgress]] = []

    @property
    def evaluations_done(self) -> int:
        """Of the waveform with the most left to do."""
        return self.num_evaluations - max(w.table.num_evaluations - w.evaluation for w in self.waveforms)

    @property
    def num_evaluations(self) -> int:
        return max(waveform.table.num_evaluations for waveform in self.waveforms)

    def progressed(self) -> list[Callable[[], None]]:
        """The calls that are due to those who wait for progress."""
        done, total = self.evaluations_done, self.num_evaluations
        due = [listener for after, listener in self.listeners if done > after]
        self.listeners = [(after, listener) for after, listener in self.listeners if done <= after]
        return [lambda listener=listener: _tell(listener, done, total) for listener in due]  # type: ignore[misc]

    def answer(self, outcome: Tensor | Exception) -> None:
        faults.at("denoiser.callback")
        self.on_done(outcome)

    def collect(self) -> Tensor | Exception:
        """The latents [B, N, C, H, W] on the host, once all waveforms are finished, or why they cannot be had."""
        try:
            faults.at("denoiser.collect")
            latents = torch.stack([waveform.latents for waveform in self.waveforms]).to("cpu")
            if not bool(torch.isfinite(latents).all()):
                return InternalError("denoiser: the latents are not finite")
            return latents.unflatten(0, (len(self.request.rows), -1))
        except BaseException as error:
            return as_exception(error)


def _tell(listener: OnProgress, done: int, total: int) -> None:
    faults.at("denoiser.listener")
    listener(done, total)


def call_all(calls: Sequence[Callable[[], None]]) -> None:
    """Makes each call, whatever others raise."""
    for call in calls:
        try:
            call()
        except BaseException:
            # One client that cannot be answered must not end the thread that all others depend on.
            logger.exception("denoiser: an answer could not be sent")
