"""The engine's decisions: who enters, who steps together, and whose turn it is.

Pure functions over plain data, which a simulator can run as well. Nothing here needs a UNet, a lock, a clock or torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stepping.forward_plan import Bucket, Forward, ForwardCosts, PlannedWaveform, plan_forwards


@dataclass(frozen=True)
class Waiting:
    """A request with waveforms that are not in flight yet."""

    frames: tuple[int, ...]  # the room that each of these waveforms takes, in generation order


@dataclass(frozen=True)
class InFlight:
    """A waveform between two steps."""

    request: int  # a number of the request that it belongs to
    items: int  # UNet batch items of its next evaluation
    frames: int  # latent frames of each item
    in_turns: bool  # whether its windows take several forwards a step


@dataclass(frozen=True)
class Group:
    """Waveforms that take their steps together."""

    indices: tuple[int, ...]
    in_turns: bool  # whether a step takes several forwards; the bucket of each is chosen when it is due
    bucket: Bucket | None = None  # where compiled code runs the one forward


def admit(waiting: Iterable[Waiting], room: int, is_empty: bool) -> list[int]:
    """Returns how many waveforms enter of each of the first requests; none of the later requests enter.

    They enter in order of arrival while there is room; later arrivals do not overtake.

    Args:
        waiting: in order of arrival; read no further than there is room.
        room: latent frames.
        is_empty: whether nothing is in flight; then the first waveform always has room.
    """
    entering = []
    for request in waiting:
        count = 0
        for frames in request.frames:
            if frames > room and not is_empty:
                break
            room -= frames
            is_empty = False
            count += 1
        entering.append(count)
        if count < len(request.frames):
            break
    return entering


def plan_groups(waveforms: Sequence[InFlight], costs: ForwardCosts, room: int | None = None) -> list[Group]:
    """Returns the cheapest groups, and one more for each request whose windows take several forwards a step.

    Args:
        room: latent frames of all items of a forward, at most, unless it has only one waveform; None: any number.
    """
    whole = [
        PlannedWaveform(index, waveform.items, waveform.frames)
        for index, waveform in enumerate(waveforms)
        if not waveform.in_turns
    ]
    turns: dict[int, list[int]] = {}
    for index, waveform in enumerate(waveforms):
        if waveform.in_turns:
            turns.setdefault(waveform.request, []).append(index)
    groups = [
        Group(part.indices, False, part.bucket)
        for forward in plan_forwards(whole, costs)
        for part in _cut(forward, waveforms, costs, room)
    ]
    return groups + [Group(tuple(indices), True) for indices in turns.values()]


def _cut(forward: Forward, waveforms: Sequence[InFlight], costs: ForwardCosts, room: int | None) -> Iterator[Forward]:
    """Yields a forward, or several that have room."""
    if room is None:
        yield forward
        return
    parts: list[list[int]] = [[]]
    for index in forward.indices:
        if parts[-1] and sum(waveforms[each].items for each in [*parts[-1], index]) * forward.frames > room:
            parts.append([])
        parts[-1].append(index)
    for part in parts:
        lengths = {waveforms[index].frames for index in part}
        items = sum(waveforms[index].items for index in part)
        bucket = costs.cheapest(items, max(lengths), len(lengths) > 1)[1]
        yield Forward(tuple(part), max(lengths), len(lengths) > 1, bucket)


def next_group(last_steps: Sequence[float]) -> int:
    """Returns the group that has waited longest for a step.

    Args:
        last_steps: when the waveform of each group that has waited longest took its last step, or entered.
    """
    return min(range(len(last_steps)), key=last_steps.__getitem__)
