"""How fast an engine really is, beside what its forwards cost when they were timed at the start."""

from collections import deque
from collections.abc import Sequence
from math import inf
from statistics import median
from time import perf_counter
from typing import Final

from stepping.forward_plan import ForwardCosts
from stepping.waveform import WaveformState

RECENT_FORWARDS: Final = 64


class Pace:
    """The time of the last forwards as a multiple of their costs. Written by the engine's thread.

    The smallest multiple counts, so that what it foretells is the least time that something takes.

    Args:
        is_behind: a forward has only been launched when it is told of, and the one before it has run, as on a GPU.
    """

    def __init__(self, is_behind: bool = False) -> None:
        self.least = 0.0  # until two forwards have run
        self.usual = 1.0  # their median
        self._multiples: deque[float] = deque(maxlen=RECENT_FORWARDS)
        self._is_behind = is_behind
        self._last = perf_counter()
        self._is_first = True
        self._cost = inf  # of the last forward that it was told of

    def begin(self) -> None:
        """Work has come after a rest."""
        self._last, self._is_first = perf_counter(), True

    def stepped(
        self, waveforms: Sequence[WaveformState], items: int, costs: ForwardCosts | None
    ) -> tuple[float, float]:
        """A forward of so many UNet items has run. Returns when, and the seconds since the one before."""
        now = perf_counter()
        seconds, is_first = now - self._last, self._is_first
        self._last, self._is_first = now, False
        before, self._cost = self._cost, _cost(waveforms, items, costs)
        timed = before if self._is_behind else self._cost
        if not is_first and 0 < timed < inf:
            self._multiples.append(seconds / timed)
            self.least = min(self._multiples)
            self.usual = median(self._multiples)
        return now, seconds


def _cost(waveforms: Sequence[WaveformState], items: int, costs: ForwardCosts | None) -> float:
    """Returns the seconds of a forward; inf: unknown."""
    lengths = {waveform.row_frames for waveform in waveforms}
    return inf if costs is None else costs.cheapest(items, max(lengths), len(lengths) > 1)[0]


def evaluation_costs(waveforms: Sequence[WaveformState], costs: ForwardCosts | None) -> tuple[float, ...]:
    """Returns the seconds of the cheapest evaluation of each waveform, by itself; none: unknown."""
    if costs is None:
        return ()
    return tuple(
        costs.cheapest(
            # Without guidance it takes half the items.
            waveform.unet_items if len(waveform.guided) == waveform.table.num_evaluations else waveform.held_windows,
            waveform.row_frames,
            False,
        )[0]
        for waveform in waveforms
    )
