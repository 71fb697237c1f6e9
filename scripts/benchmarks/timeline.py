"""Which requests each forward of an engine served, and when: recorded while a plan of requests runs."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from audioldm2_triton.errors import RequestCancelledError
from engine.engine import Engine
from engine.job import Job
from engine.limits import EngineLoad
from stepping.request import DenoisingRequest
from stepping.waveform import WaveformState

CANCELLED: Final = "cancelled"
ANSWERED: Final = "answered"


@dataclass(frozen=True)
class Planned:
    """A request, and after how many forwards of the engine it comes and is cancelled, so that all runs are alike."""

    label: str
    request: DenoisingRequest
    comes_after: int
    cancelled_after: int | None = None


@dataclass(frozen=True)
class Forward:
    """One forward of the UNet. Times are in seconds since the first request came."""

    start: float
    end: float
    items: int  # of the UNet's batch
    requests: tuple[int, ...]  # whose waveforms made an evaluation, by their place in the plan


@dataclass(frozen=True)
class Life:
    """One request from its arrival to its answer."""

    label: str
    arrived: float
    ended: float
    outcome: str


@dataclass(frozen=True)
class Timeline:
    forwards: tuple[Forward, ...]
    lives: tuple[Life, ...]  # in the order of the plan


@dataclass
class _Running:
    """A request that has come."""

    label: str
    job: Job
    arrived: float
    done: dict[WaveformState, int]  # evaluations, at the last look
    ended: float = 0.0
    outcome: str = ""


class Recorder:
    """An engine's observer that also lets the requests of a plan come, in the engine's thread between two forwards."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # of all that follows; held while requests come, never by the engine meanwhile
        self._engine: Engine | None = None
        self._plan: Sequence[Planned] = ()
        self._running: dict[int, _Running] = {}
        self._times: list[tuple[float, float, int]] = []
        self._requests: list[tuple[int, ...]] = []
        self._ended = threading.Event()
        self._error: Exception | None = None

    def run(self, engine: Engine, plan: Sequence[Planned]) -> Timeline:
        """Runs a plan, the first of which comes at once. Raises what goes wrong, except cancellations."""
        with self._lock:
            self._engine, self._plan, self._error = engine, plan, None
            self._running, self._times, self._requests = {}, [], []
            self._ended.clear()
            self._come(0)
        self._ended.wait()
        if self._error is not None:
            raise self._error
        self._look()
        first = self._running[0].arrived
        times = zip(self._times, self._requests, strict=True)
        running = [self._running[number] for number in range(len(plan))]
        return Timeline(
            tuple(Forward(start - first, end - first, items, requests) for (start, end, items), requests in times),
            tuple(Life(each.label, each.arrived - first, each.ended - first, each.outcome) for each in running),
        )

    def stepped(self, rows: int, seconds: float) -> None:
        if self._engine is None:
            return
        end = time.perf_counter()
        with self._lock:
            # The evaluations of this forward are counted after this call: what the look finds are the last one's.
            if self._times:
                self._look()
            self._times.append((end - seconds, end, rows))
            for number, planned in enumerate(self._plan):
                if number not in self._running and planned.comes_after <= len(self._times):
                    self._come(number)
                if number in self._running and planned.cancelled_after == len(self._times):
                    self._engine.cancel(self._running[number].job)

    def _look(self) -> None:
        """Notes whose evaluations the last forward has made."""
        found = []
        for number, running in self._running.items():
            done = {waveform: waveform.evaluation for waveform in running.job.waveforms}
            if done != running.done:
                found.append(number)
            running.done = done
        self._requests.append(tuple(sorted(found)))

    def _come(self, number: int) -> None:
        assert self._engine is not None
        planned = self._plan[number]
        arrived = time.perf_counter()
        try:
            job = self._engine.submit(planned.request, lambda outcome: self._end(number, outcome))
        except Exception as error:
            self._stop(error)
            return
        self._running[number] = _Running(planned.label, job, arrived, dict.fromkeys(job.waveforms, 0))

    def _end(self, number: int, outcome: Tensor | Exception) -> None:
        with self._lock:
            running = self._running[number]
            running.ended = time.perf_counter()
            running.outcome = CANCELLED if isinstance(outcome, RequestCancelledError) else ANSWERED
            if isinstance(outcome, Exception) and self._plan[number].cancelled_after is None:
                self._stop(outcome)
            elif all(each.outcome for each in self._running.values()):
                left = [number for number in range(len(self._plan)) if number not in self._running]
                # Without this the engine would be idle, and wait for forwards that do not come.
                self._come(left[0]) if left else self._ended.set()

    def _stop(self, error: Exception) -> None:
        self._error = error
        self._ended.set()

    def admitted(self, waited_s: float) -> None:
        pass

    def finished(self, request: DenoisingRequest, outcome: Tensor | Exception) -> None:
        pass

    def changed(self, load: EngineLoad) -> None:
        pass

    def broke(self, error: Exception, /) -> None:
        self._stop(error)
