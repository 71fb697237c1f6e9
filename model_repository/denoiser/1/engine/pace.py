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
    """

    def __init__(self) -> None:
        self.least = 0.0  # until two forwards have run
        self.usual = 1.0  # their median
        self._multiples: deque[float] = deque(maxlen=RECENT_FORWARDS)
        self._last = perf_counter()
        self._is_first = True

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
        # The first after a rest is only launched on a GPU; the next one waits for it.
        if costs is not None and not is_first:
            self._note(waveforms, items, seconds, costs)
        return now, seconds

    def _note(self, waveforms: Sequence[WaveformState], items: int, seconds: float, costs: ForwardCosts) -> None:
        lengths = {waveform.row_frames for waveform in waveforms}
        cost = costs.cheapest(items, max(lengths), len(lengths) > 1)[0]
        if 0 < cost < inf:
            self._multiples.append(seconds / cost)
            self.least = min(self._multiples)
            self.usual = median(self._multiples)


def least_evaluation_cost(waveforms: Sequence[WaveformState], costs: ForwardCosts | None) -> float:
    """Returns the seconds of the cheapest evaluation of the longest of these waveforms, by itself; 0: unknown."""
    if costs is None:
        return 0.0
    return max(
        costs.cheapest(
            # Without guidance it takes half the items.
            waveform.unet_items if len(waveform.guided) == waveform.table.num_evaluations else waveform.held_windows,
            waveform.row_frames,
            False,
        )[0]
        for waveform in waveforms
    )
