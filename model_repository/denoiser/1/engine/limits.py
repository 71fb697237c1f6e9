"""The limits of an engine, its load, and its observer."""

import logging
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from audioldm2_triton.server import faults
from audioldm2_triton.server.settings import ARRIVAL
from stepping.request import DenoisingRequest, DenoisingRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """The most that an engine holds.

    Memory grows with the frames, so a row longer than `row_frames` counts by its length. A waveform that alone exceeds
    the limit is in flight alone; of a request that exceeds it, some waveforms enter later.
    """

    max_active_rows: int  # UNet batch items in flight, which is also the largest forward
    max_waiting: int  # requests that may wait for room
    row_frames: int = 256  # latent frames up to which a UNet batch item counts as one row; 10.24 s
    scheduling: str = ARRIVAL  # who steps first

    @property
    def max_started(self) -> int:
        """The most waveforms in flight or paused where some may pause: each of the paused ones keeps its history."""
        return 2 * self.max_active_rows

    @property
    def max_active_frames(self) -> int:
        return self.max_active_rows * self.row_frames

    def frames(self, items: int, frames: int) -> int:
        """Returns the share of `max_active_frames` that UNet batch items of this many latent frames take."""
        return items * max(frames, self.row_frames)

    def held_windows(self, request: DenoisingRequest, row: DenoisingRow) -> int:
        """Returns how many windows of each waveform of a row share a forward; the others take turns with them.

        All of them, unless the request has more than fit in half of the engine. Then its waveforms share that half:
        the memory does not grow with the length, and other requests find room beside it.
        """
        half = self.max_active_rows // 2
        if request.unet_items <= half:
            return row.num_windows
        num_waveforms = sum(row.num_waveforms for row in request.rows)
        return min(row.num_windows, max(1, half // (num_waveforms * row.items_per_window)))


@dataclass(frozen=True)
class EngineLoad:
    """The load of an engine at one moment."""

    number: int  # of the looks at it: threads may tell of two in the wrong order
    active_rows: int  # UNet batch items in flight, those that rest without guidance included
    pending_rows: int  # UNet batch items that wait for room or are paused
    active_requests: int
    waiting_requests: int
    is_full: bool  # no more requests may wait
    free_frames: int  # of `EngineLimits.max_active_frames`; negative if more waits than there is room for


class Observer(Protocol):
    """Is told what an engine does. Implementations must be quick, and `changed` safe to call from any thread."""

    def stepped(self, rows: int, seconds: float) -> None:
        """One forward of this many UNet batch items has run; also the time since the last one, or since work came."""

    def admitted(self, waited_s: float) -> None:
        """A request's first waveform has entered."""

    def finished(self, request: DenoisingRequest, outcome: Tensor | Exception) -> None:
        """A request was answered."""

    def changed(self, load: EngineLoad) -> None:
        """The load has changed."""

    def broke(self, error: Exception, /) -> None:
        """The engine has given up."""


class GuardedObserver:
    """Calls an observer, if there is one. Logs what it raises, which concerns neither a request nor the engine."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer

    def stepped(self, rows: int, seconds: float) -> None:
        self._tell("stepped", rows, seconds)

    def admitted(self, waited_s: float) -> None:
        self._tell("admitted", waited_s)

    def finished(self, request: DenoisingRequest, outcome: Tensor | Exception) -> None:
        self._tell("finished", request, outcome)

    def changed(self, load: EngineLoad) -> None:
        self._tell("changed", load)

    def broke(self, error: Exception, /) -> None:
        self._tell("broke", error)

    def _tell(self, what: str, *arguments: object) -> None:
        if self._observer is None:
            return
        try:
            faults.at("denoiser.observer")
            getattr(self._observer, what)(*arguments)
        except BaseException:
            logger.exception("denoiser: the metrics miss something (%s)", what)
