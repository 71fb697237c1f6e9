"""The engine's metrics on Triton's `/metrics` endpoint. Triton's own cover only `execute()`, which returns at once."""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
import triton_python_backend_utils as pb_utils
from torch import Tensor

from audioldm2_triton.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    RequestCancelledError,
    UnavailableError,
)
from audioldm2_triton.server import metric_names as names
from audioldm2_triton.server.entrance import FullSign
from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.reports import Reports
from audioldm2_triton.server.triton_metrics import SECONDS_BUCKETS, MemoryGauge
from engine.limits import EngineLimits, EngineLoad
from stepping.request import DenoisingRequest

SHOWN_WITHIN_IN_S: Final = 1.0
ROWS_BUCKETS = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
STEP_BUCKETS = [0.000625 * 2**power for power in range(15)]  # seconds, up to 10.24
# Subclasses before their base classes.
OUTCOMES: Mapping[type[Exception], str] = {
    DeadlineExceededError: "deadline_exceeded",
    RequestCancelledError: "cancelled",
    InvalidArgumentError: "refused",
    UnavailableError: "unavailable",
}


class DenoiserMetrics:
    """The metric families, which exist once per process, and their observers, one per engine.

    Args:
        model: the name that the metrics are labelled with.
        full_sign: is told which engines are full.
    """

    def __init__(self, geometry: AudioGeometry, model: str, full_sign: FullSign) -> None:
        self.model = model
        self.full_sign = full_sign
        self.seconds_per_frame = geometry.vae_scale_factor * geometry.frame_length_in_s
        gauge, counter, histogram = (
            pb_utils.MetricFamily.GAUGE,
            pb_utils.MetricFamily.COUNTER,
            pb_utils.MetricFamily.HISTOGRAM,
        )
        self.rows_in_flight = _family(names.ROWS_IN_FLIGHT, "UNet batch items in flight", gauge)
        self.rows_waiting = _family(names.ROWS_WAITING, "UNet batch items that wait for room", gauge)
        self.requests_in_flight = _family(names.REQUESTS_IN_FLIGHT, "Requests with rows in flight", gauge)
        self.requests_waiting = _family(names.REQUESTS_WAITING, "Requests that wait for room", gauge)
        self.rows_in_flight_limit = _family(names.ROWS_IN_FLIGHT_LIMIT, "UNet batch items that may be in flight", gauge)
        self.requests_waiting_limit = _family(names.REQUESTS_WAITING_LIMIT, "Requests that may wait", gauge)
        self.engine_broken = _family(names.ENGINE_BROKEN, "1 where an engine was taken out", gauge)
        self.rows_per_forward = _family(names.ROWS_PER_FORWARD, "UNet batch items of each forward", histogram)
        self.steps = _family(names.STEPS_TOTAL, "Denoising steps run", counter)
        self.step_duration = _family(names.STEP_DURATION_SECONDS, "Time from one step to the next", histogram)
        self.queue_seconds = _family(names.REQUEST_QUEUE_SECONDS, "Time before a request's first step", histogram)
        self.requests = _family(names.REQUESTS_TOTAL, "Requests finished, by outcome", counter)
        self.audio_seconds = _family(names.AUDIO_SECONDS_TOTAL, "Seconds of audio denoised", counter)

        self._engines: list[EngineMetrics] = []

    def observer(self, device: torch.device) -> "EngineMetrics":
        self._engines.append(EngineMetrics(self, device))
        return self._engines[-1]

    def show_limits(self, limits: Sequence[EngineLimits]) -> None:
        """Reports the limits of the engines, in the order of their observers."""
        for engine, of_engine in zip(self._engines, limits, strict=True):
            engine.limited(of_engine)

    def close(self) -> None:
        """Reports what is left. Nothing may be observed any more."""
        for engine in self._engines:
            engine.close()


class EngineMetrics:
    """Implements the engine's `Observer`.

    Never waits for the server: a thread of its own tells it.
    """

    def __init__(self, families: DenoiserMetrics, device: torch.device) -> None:
        labels = {"model": families.model, "engine": str(device)}
        self._memory = MemoryGauge(families.model, device)
        self._seconds_per_frame = families.seconds_per_frame
        self._rows_in_flight = families.rows_in_flight.Metric(labels=labels)
        self._rows_waiting = families.rows_waiting.Metric(labels=labels)
        self._requests_in_flight = families.requests_in_flight.Metric(labels=labels)
        self._requests_waiting = families.requests_waiting.Metric(labels=labels)
        self._engine_broken = families.engine_broken.Metric(labels=labels)
        self._rows_per_forward = families.rows_per_forward.Metric(labels=labels, buckets=ROWS_BUCKETS)
        self._steps = families.steps.Metric(labels=labels)
        self._step_duration = families.step_duration.Metric(labels=labels, buckets=STEP_BUCKETS)
        self._queue_seconds = families.queue_seconds.Metric(labels=labels, buckets=list(SECONDS_BUCKETS))
        self._requests = {
            outcome: families.requests.Metric(labels={**labels, "outcome": outcome})
            for outcome in ("success", "failure", *OUTCOMES.values())
        }
        self._audio_seconds = families.audio_seconds.Metric(labels=labels)
        self._limits = [
            family.Metric(labels=labels) for family in (families.rows_in_flight_limit, families.requests_waiting_limit)
        ]
        self._show_full = families.full_sign.add_engine()
        self._busy = False
        self._newest = 0
        self._shown: dict[Any, int] = {}  # a round trip to the server for each gauge that has changed
        self._changing = threading.Lock()
        self._reports = Reports(str(device))

    def limited(self, limits: EngineLimits) -> None:
        for gauge, limit in zip(self._limits, (limits.max_active_rows, limits.max_waiting), strict=True):
            self._reports.put(partial(gauge.set, limit))

    def stepped(self, rows: int, seconds: float) -> None:
        self._reports.put(partial(self._rows_per_forward.observe, rows))
        self._reports.put(partial(self._steps.increment, 1))
        self._reports.put(partial(self._step_duration.observe, seconds))

    def admitted(self, waited_s: float) -> None:
        self._reports.put(partial(self._queue_seconds.observe, waited_s))

    def finished(self, request: DenoisingRequest, outcome: Tensor | Exception) -> None:
        self._reports.put(self._memory.update)
        if isinstance(outcome, Exception):
            kinds = [name for kind, name in OUTCOMES.items() if isinstance(outcome, kind)]
            self._reports.put(partial(self._requests[kinds[0] if kinds else "failure"].increment, 1))
            return
        self._reports.put(partial(self._requests["success"].increment, 1))
        frames = sum(row.num_waveforms * row.latent_frames for row in request.rows)
        self._reports.put(partial(self._audio_seconds.increment, frames * self._seconds_per_frame))

    def changed(self, load: EngineLoad) -> None:
        with self._changing:
            if load.number < self._newest:
                return  # overtaken: the entrance could stay closed for good
            self._newest = load.number
            for gauge, value in (
                (self._rows_in_flight, load.active_rows),
                (self._rows_waiting, load.pending_rows),
                (self._requests_in_flight, load.active_requests),
                (self._requests_waiting, load.waiting_requests),
            ):
                if self._shown.get(gauge) != value:
                    self._shown[gauge] = value
                    self._reports.put(partial(gauge.set, value))
            was_busy, self._busy = self._busy, load.active_requests + load.waiting_requests > 0
            self._show_full(load.is_full)
        if self._busy and not was_busy:
            # Work is shown before it begins, and its end only after all that it counts for.
            shown = threading.Event()
            self._reports.put(shown.set)
            shown.wait(SHOWN_WITHIN_IN_S)

    def broke(self, _: Exception) -> None:
        self._show_full(None)
        self._reports.put(partial(self._engine_broken.set, 1))

    def close(self) -> None:
        """Reports what is left, and ends the thread."""
        self._reports.close()


def _family(name: str, description: str, kind: Any) -> Any:
    return pb_utils.MetricFamily(name=name, description=description, kind=kind)
