"""The metrics that all stages have on Triton's `/metrics`.

Imports `triton_python_backend_utils`, which exists only inside Triton's Python backend.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import triton_python_backend_utils as pb_utils

from audioldm2_triton.audio.origin import PACKAGE
from audioldm2_triton.errors import REASONS
from audioldm2_triton.server.memory import peak_memory_bytes
from audioldm2_triton.server.metric_names import (
    PEAK_MEMORY_BYTES,
    REQUEST_DURATION_SECONDS,
    REQUEST_REAL_TIME_FACTOR,
    REQUEST_STEPS,
    STAGE_DURATION_SECONDS,
    STAGE_FAILURES_TOTAL,
    STAGE_INFO,
    STAGE_PROGRESS_TOTAL,
    STAGE_REQUESTS,
    STAGE_REQUESTS_TAKEN_TOTAL,
    TEXT_CACHE_HITS_TOTAL,
    TEXT_CACHE_MISSES_TOTAL,
    TIME_TO_FIRST_AUDIO_SECONDS,
)
from audioldm2_triton.server.reports import Reports
from audioldm2_triton.server.request_record import SUCCESS, RequestRecord, outcome_name

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@cache
def _requests_family() -> Any:
    return pb_utils.MetricFamily(
        name=STAGE_REQUESTS, description="Requests in progress in a stage", kind=pb_utils.MetricFamily.GAUGE
    )


class RequestsGauge:
    """Gauge of requests in progress in a stage. scripts/serve waits for zero before it stops the server."""

    def __init__(self, model: str) -> None:
        self._metric = _requests_family().Metric(labels={"model": model})
        self._lock = threading.Lock()
        # On the page at 0 from the start: a rate does not see a series that begins at 1.
        _taken.add(0, model=model)
        for reason in REASONS:
            _failures.add(0, model=model, reason=reason)

    def add(self, requests: int) -> None:
        # Two concurrent operations on one metric bring down the whole server (2.51.0): they share a buffer.
        with self._lock:
            self._metric.increment(requests)


requests_gauge = cache(RequestsGauge)


class _Counters:
    """Counters of one family by their labels, safe from any thread. The family is made with its first counter."""

    def __init__(self, name: str, description: str) -> None:
        self._family = cache(lambda: pb_utils.MetricFamily(name, description, pb_utils.MetricFamily.COUNTER))
        self._counters: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()

    def add(self, count: int, **labels: str) -> None:
        """Adds to a counter; 0 shows it on the page. Raises nothing: a count must not cost the answer."""
        try:
            with self._lock:  # as `RequestsGauge`
                key = tuple(labels.values())
                if key not in self._counters:
                    self._counters[key] = self._family().Metric(labels=labels)
                if count:  # each operation is a round trip to the server
                    self._counters[key].increment(count)
        except Exception:
            logger.exception("%d cannot be counted: %s", count, labels)


_failures = _Counters(STAGE_FAILURES_TOTAL, "Requests that a stage has answered with an error")
_taken = _Counters(
    STAGE_REQUESTS_TAKEN_TOTAL, "Requests that a stage has taken, refused ones too; not those for progress"
)


def count_taken(model: str, requests: int) -> None:
    """Counts requests that a stage has taken."""
    _taken.add(requests, model=model)


def count_failure(model: str, reason: str) -> None:
    """Counts a request that a stage has answered with an error."""
    _failures.add(1, model=model, reason=reason)


_PROGRESS_INTERVAL_IN_S: Final = 1.0
_progress = _Counters(STAGE_PROGRESS_TOTAL, "Grows up to once a second while a stage works on its requests")


class Progress:
    """Shows that a stage gets on, however long its requests take and whoever answers them."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._shown = -_PROGRESS_INTERVAL_IN_S
        _progress.add(0, model=model)

    def show(self) -> None:
        """Is called by one thread as often as it likes. Raises nothing, and waits for nothing."""
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_INTERVAL_IN_S:
            self._shown = now
            _reports().put(lambda: _progress.add(1, model=self._model))


_hits = _Counters(TEXT_CACHE_HITS_TOTAL, "Texts whose encoding was in the cache")
_misses = _Counters(TEXT_CACHE_MISSES_TOTAL, "Texts that had to be encoded")


def count_texts(model: str, hits: int, misses: int) -> None:
    """Counts texts that needed no encoding, and those that did; 0 shows the counters on the page."""
    _hits.add(hits, model=model)
    _misses.add(misses, model=model)


SECONDS_BUCKETS: Final = tuple(0.01 * 2**power for power in range(17))
"""From 0.01 to 81.92 as OpenTelemetry has them for generated contents, and on to 655.36 for long clips."""
STEPS_BUCKETS: Final = tuple(float(2**power) for power in range(11))


class Histogram:
    """A histogram by its labels. Observations are put in a thread's queue, so that no answer waits for them."""

    def __init__(self, name: str, description: str, buckets: Sequence[float]) -> None:
        self._family = cache(lambda: pb_utils.MetricFamily(name, description, pb_utils.MetricFamily.HISTOGRAM))
        self._buckets = list(buckets)
        self._metrics: dict[tuple[str, ...], Any] = {}

    def show(self, **labels: str) -> None:
        """Puts a series on the page before its first observation, which a rate would not see otherwise."""
        self._metric(labels)

    def observe(self, value: float, **labels: str) -> None:
        """Adds an observation. Raises nothing, and waits for nothing."""
        _reports().put(lambda: self._metric(labels).observe(value))

    def _metric(self, labels: dict[str, str]) -> Any:
        key = tuple(labels.values())
        if key not in self._metrics:
            self._metrics[key] = self._family().Metric(labels=labels, buckets=self._buckets)
        return self._metrics[key]


@cache
def _reports() -> Reports:
    return Reports("of-requests")


_stage_duration = Histogram(STAGE_DURATION_SECONDS, "Time that a request is in a model", SECONDS_BUCKETS)
_duration = Histogram(REQUEST_DURATION_SECONDS, "Time from a request's arrival to its end", SECONDS_BUCKETS)
_first_audio = Histogram(TIME_TO_FIRST_AUDIO_SECONDS, "Time to the first audio of a stream", SECONDS_BUCKETS)
_real_time_factor = Histogram(REQUEST_REAL_TIME_FACTOR, "Time of a request over that of its audio", SECONDS_BUCKETS)
_steps = Histogram(REQUEST_STEPS, "Denoising steps that a request asks for", STEPS_BUCKETS)


def show_histograms(model: str) -> None:
    """Puts the histograms of a model on the page, before it has any request."""
    record = RequestRecord(model)
    _stage_duration.show(model=model)
    if record.gives_the_answer:
        _duration.show(model=record.door, outcome=SUCCESS)
        _real_time_factor.show(model=record.door)
        _steps.show(model=record.door)
    if record.is_stream:
        _first_audio.show(model=record.door)


def measure_request(record: RequestRecord, outcome: object, ended_ns: int) -> None:
    """Observes a request that has ended in a model."""
    if record.is_watched:
        _stage_duration.observe((ended_ns - record.arrived_ns) / 1e9, model=record.model)
    if not record.ends_with(outcome):
        return
    seconds = (ended_ns - record.journal.arrived_ns) / 1e9
    name = outcome_name(outcome)
    _duration.observe(seconds, model=record.door, outcome=name)
    if record.first_audio_ns:
        _first_audio.observe((record.first_audio_ns - record.journal.arrived_ns) / 1e9, model=record.door)
    if name == SUCCESS and record.journal.audio_ms:
        _real_time_factor.observe(seconds * 1000 / record.journal.audio_ms, model=record.door)
        _steps.observe(record.journal.steps, model=record.door)


def close_metrics() -> None:
    """Reports what is left. What is observed afterwards is not shown any more."""
    _reports().close()


class InfoSeries:
    """A series that is always 1, whose labels say what a stage has resolved its settings to; logged too."""

    def __init__(self, model: str, resolved: Mapping[str, object]) -> None:
        resolved = {**resolved, "version": version(PACKAGE)}
        # Names of folders may have letters that are no text at all.
        labels = {name: str(value).encode("ascii", "backslashreplace").decode() for name, value in resolved.items()}
        family = pb_utils.MetricFamily(
            name=STAGE_INFO, description="What a stage runs", kind=pb_utils.MetricFamily.GAUGE
        )
        self._metric = family.Metric(labels={"model": model, **labels})
        self._metric.set(1)
        self._family = family  # both are gone from the page with their objects
        logger.info("ready: %s", ", ".join(f"{name} {value}" for name, value in labels.items()))


@cache
def _memory_family() -> Any:
    return pb_utils.MetricFamily(
        name=PEAK_MEMORY_BYTES,
        description="Peak memory of a stage: on its GPU, or the resident set of its process",
        kind=pb_utils.MetricFamily.GAUGE,
    )


class MemoryGauge:
    """Gauge of the peak memory of a stage on one device since its start."""

    def __init__(self, stage: str, device: "torch.device") -> None:
        self._device = device
        self._metric = _memory_family().Metric(labels={"model": stage, "device": str(device)})
        self._lock = threading.Lock()
        self.update()

    def update(self) -> None:
        """Reports a measurement. Raises nothing, because a measurement must not fail a request."""
        try:
            with self._lock:  # as `RequestsGauge`
                self._metric.set(peak_memory_bytes(self._device))
        except Exception:
            logger.exception("the peak memory cannot be measured")
