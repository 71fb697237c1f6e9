"""Which waveforms share a forward: equal lengths unmasked, or different lengths masked, by measured cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True)
class LinearCost:
    """Seconds of one forward: a fixed part, and a part for every frame of every UNet batch item."""

    fixed: float
    per_frame: float

    def seconds(self, items: int, frames: int) -> float:
        return self.fixed + self.per_frame * items * frames


@dataclass(frozen=True)
class LaunchBoundCost:
    """Seconds of one eager forward on a GPU: what launching its kernels takes, or computing them if that is more."""

    launching: float
    per_frame: float

    def seconds(self, items: int, frames: int) -> float:
        return max(self.launching, self.per_frame * items * frames)


@dataclass(frozen=True)
class Bucket:
    """A shape that there is compiled code for."""

    items: int  # UNet batch items
    frames: int  # latent frames
    masked: bool


@dataclass(frozen=True)
class ForwardCosts:
    """The costs of a forward of the UNet on one device."""

    plain: LinearCost | LaunchBoundCost
    masked: LinearCost | LaunchBoundCost
    compiled: Mapping[Bucket, float] = field(default_factory=dict)  # seconds of each bucket

    def cheapest(self, items: int, frames: int, mixed: bool) -> tuple[float, Bucket | None]:
        """Seconds of the cheapest way to run so many items padded to so many frames, and its bucket if it has one.

        Args:
            mixed: whether the items' lengths differ.
        """
        ways: list[tuple[float, Bucket | None]] = [
            ((self.masked if mixed else self.plain).seconds(items, frames), None)
        ]
        ways += [
            (seconds, bucket)
            for bucket, seconds in self.compiled.items()
            if items <= bucket.items and frames <= bucket.frames and bucket.masked == (mixed or frames < bucket.frames)
        ]
        return min(ways, key=lambda way: way[0])


@dataclass(frozen=True)
class PlannedWaveform:
    """A waveform, as far as a plan needs to know it."""

    index: int
    items: int  # UNet batch items
    frames: int  # latent frames


@dataclass(frozen=True)
class Forward:
    """Waveforms that share a forward."""

    indices: tuple[int, ...]
    frames: int  # of the longest
    mixed: bool  # whether their lengths differ
    bucket: Bucket | None = None  # where compiled code runs them


NEVER_MIX = ForwardCosts(LinearCost(0.0, 1.0), LinearCost(float("inf"), 1.0))
ALWAYS_MIX = ForwardCosts(LinearCost(1.0, 0.0), LinearCost(1.0, 0.0))


def fit_cost(few: tuple[int, int, float], many: tuple[int, int, float]) -> LinearCost:
    """The cost that goes through two measurements (items, frames, seconds); noise cannot make a part negative."""
    (few_items, few_frames, few_seconds), (many_items, many_frames, many_seconds) = few, many
    slope = (many_seconds - few_seconds) / (many_items * many_frames - few_items * few_frames)
    per_frame = max(slope, 0.0)
    return LinearCost(max(few_seconds - per_frame * few_items * few_frames, 0.0), per_frame)


def fit_launch_bound(few: tuple[int, int, float], many: tuple[int, int, float]) -> LaunchBoundCost:
    """The cost by one measurement (items, frames, seconds) that fills no GPU, and one that does."""
    items, frames, seconds = many
    return LaunchBoundCost(few[2], seconds / (items * frames))


def plan_forwards(waveforms: Sequence[PlannedWaveform], costs: ForwardCosts) -> list[Forward]:
    """The cheapest partition, longest first, for one step of every waveform.

    Sorted by length, the waveforms of a forward are neighbours: a forward is padded to its longest, so exchanging two
    to make it so never costs more. Dynamic programming over the distinct lengths, quadratic in their number.
    """
    by_length = sorted(waveforms, key=lambda waveform: -waveform.frames)
    lengths = [list(group) for _, group in groupby(by_length, key=lambda waveform: waveform.frames)]
    best: list[tuple[float, list[Forward]]] = [(0.0, [])]
    for stop in range(1, len(lengths) + 1):
        candidates = []
        for start in range(stop):
            together = [waveform for length in lengths[start:stop] for waveform in length]
            mixed, frames = stop - start > 1, together[0].frames
            seconds, bucket = costs.cheapest(sum(waveform.items for waveform in together), frames, mixed)
            forward = Forward(tuple(waveform.index for waveform in together), frames, mixed, bucket)
            candidates.append((best[start][0] + seconds, [*best[start][1], forward]))
        best.append(min(candidates, key=lambda candidate: candidate[0]))
    return best[-1][1]
