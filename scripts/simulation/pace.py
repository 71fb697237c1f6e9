"""How long a shared machine's forwards take, as multiples of what they cost when they were timed."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, NamedTuple


class Step(NamedTuple):
    ended: float  # seconds since the start of the run
    expected: float  # seconds that its forward should have taken
    took: float


@dataclass(frozen=True)
class Pace:
    """A factor for each of consecutive intervals; the last one goes on for ever."""

    factors: tuple[float, ...] = (1.0,)
    interval: float = inf  # seconds

    def at(self, now: float) -> float:
        return self.factors[self._index(now)]

    def changes_after(self, now: float) -> float:
        """Returns when the interval of a moment ends."""
        index = self._index(now)
        return inf if index == len(self.factors) - 1 else (index + 1) * self.interval

    def _index(self, now: float) -> int:
        return min(int(now / self.interval), len(self.factors) - 1)


STEADY: Final = Pace()


def pace_of(steps: Sequence[Step], interval: float = inf) -> Pace:
    """Returns the pace of some measured steps; an interval without any has that of the one before."""
    whole = sum(step.took for step in steps) / sum(step.expected for step in steps)
    if interval == inf:
        return Pace((whole,))
    ends = [step.ended for step in steps]
    factors: list[float] = []
    for index in range(int(ends[-1] / interval) + 1):
        first, end = (bisect.bisect_left(ends, (index + more) * interval) for more in (0, 1))
        part = steps[first:end]
        before = factors[-1] if factors else whole
        factors.append(sum(step.took for step in part) / sum(step.expected for step in part) if part else before)
    return Pace(tuple(factors), interval)
