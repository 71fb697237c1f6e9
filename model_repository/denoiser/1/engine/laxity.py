"""By laxity: which waveforms step next, which wait, and which pause between two of their steps.

Pure functions over plain data, as in `policy`. A request without a closer deadline has the objective to be done within
`OBJECTIVE` times its time alone. Its laxity is the time that it can still wait and meet this; without any it is late.
The ranks:

1. The request whose turn has come by age, at most one at a time. It is not paused until it is done.
2. Interactive requests. Those in time go by the soonest objective: by least laxity, requests that are alike would pause
   each other again and again, since only the laxity of those that wait shrinks. A late one goes behind the last of them
   that is shorter or has a sooner objective, and whoever misses its deadline behind all.
3. Batch requests, in the same order.

A request is shorter if its objective is less than `1 / LONGER` as long. So a late request makes no shorter one late,
and requests that are alike step as in order of arrival.

While any interactive request steps, a waveform joins only where it shares a forward, by its length or because all are
done sooner than one after the other: batch up to the knee, beyond which more waveforms make every step longer and the
device less and less faster, if no interactive one waits; interactive ones if nobody in time is shorter, or if all who
are shorter stay in time and the round is not as good as full.

The turn by age bounds the wait: `AGED_SHARE` of the device's time goes to the oldest requests. A request gets its turn
after the older ones, and each of them no later than it takes to earn its time alone at that share.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from engine.policy import InFlight, plan_groups
from stepping.forward_plan import ForwardCosts

OBJECTIVE: Final = 3.0
"""In times alone: what serving systems are measured by. A `timeout` says when to give up, not when it is wanted."""
AGED_SHARE: Final = 0.1
KNEE: Final = 0.3
"""The share of the highest throughput up to which batch joins a round of interactive requests."""
FULL: Final = 0.9
"""The share of the highest throughput beyond which nothing is gained by sharing a round."""
LONGER: Final = 2.0
"""How many times as long as that of another an objective must be to give way to it."""
ROUNDING: Final = 1e-9
"""The share by which sums of costs may differ that are equal."""


@dataclass(frozen=True)
class HeldWaveform:
    """A waveform that is not finished."""

    items: int  # UNet batch items of its next evaluation
    frames: int  # latent frames of each item
    room: int  # latent frames that it takes of the engine's room
    evaluations: int  # left
    in_turns: bool = False  # whether its windows take several forwards a step
    started: bool = False  # it is in flight or paused
    amid_step: bool = False  # some of its windows have made the current step: it cannot pause


@dataclass(frozen=True)
class Held:
    """A request that is not finished. Times are seconds on one clock."""

    arrived: float
    deadline: float  # inf: none
    is_batch: bool
    alone: float  # seconds that all of it takes by itself
    waveforms: tuple[HeldWaveform, ...]  # in generation order
    has_turn: bool = False  # by age
    has_begun: bool = False  # a waveform of it has stepped, and may be finished


@dataclass(frozen=True)
class Standing:
    """How a request stands at a time."""

    remaining: float  # seconds that the rest of it takes by itself
    objective: float  # seconds from its arrival to its objective
    within: float  # seconds until its objective
    misses_deadline: bool

    @property
    def laxity(self) -> float:
        return self.within - self.remaining

    @property
    def is_late(self) -> bool:
        return self.laxity < 0

    def is_longer_than(self, other: "Standing") -> bool:
        return self.objective > LONGER * other.objective


@dataclass(frozen=True)
class Room:
    """What one engine can hold."""

    frames: int  # latent frames of the waveforms in flight
    items: int  # UNet batch items of a forward
    started: int  # waveforms in flight or paused, besides those whose turn it is by age; each of them holds memory


@dataclass(frozen=True)
class Schedule:
    """Which waveforms step until something changes."""

    counts: list[int]  # of each request, how many of its first waveforms step
    turn: int | None  # the request whose turn by age begins
    review_at: float  # when to decide anew, even if nothing changes; inf: never


def seconds_alone(waveforms: Sequence[HeldWaveform], costs: ForwardCosts) -> float:
    """Returns the seconds that the evaluations left take, if nothing else steps; the waveforms share forwards."""
    seconds, done = 0.0, 0
    for left in sorted({waveform.evaluations for waveform in waveforms}):
        stepping = [waveform for waveform in waveforms if waveform.evaluations >= left]
        seconds += (left - done) * round_seconds(stepping, costs)
        done = left
    return seconds


def round_seconds(waveforms: Sequence[HeldWaveform], costs: ForwardCosts) -> float:
    """Returns the seconds in which each of these waveforms takes one step."""
    items_of: Counter[int] = Counter()  # by length: those of a length share a forward
    for waveform in waveforms:
        if not waveform.in_turns:
            items_of[waveform.frames] += waveform.items
    plain = [InFlight(0, items, frames, False) for frames, items in items_of.items()]
    in_turns = [waveform for waveform in waveforms if waveform.in_turns]
    plain += [InFlight(number, each.items, each.frames, True) for number, each in enumerate(in_turns)]
    seconds = 0.0
    for group in plan_groups(plain, costs):
        lengths = {plain[index].frames for index in group.indices}
        items = sum(plain[index].items for index in group.indices)
        seconds += costs.cheapest(items, max(lengths), len(lengths) > 1)[0]
    return seconds


def least_item_seconds(frames: int, costs: ForwardCosts, items: int) -> float:
    """Returns the seconds that an item of so many frames takes at the highest throughput of up to so many items."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < items] + [items]
    return min(costs.cheapest(size, frames, False)[0] / size for size in sizes)


def schedule(
    held: Sequence[Held], now: float, since: float, costs: ForwardCosts, room: Room, pace: float = 1.0
) -> Schedule:
    """Returns who steps, for requests in order of arrival; at least one waveform steps.

    Args:
        since: when the last turn by age ended, or work came after a rest.
        pace: what a forward takes, as a multiple of its cost.
    """
    due = _turn_due(held, since, costs, pace)
    is_amid_step = any(waveform.amid_step for request in held for waveform in request.waveforms)
    turn = 0 if due <= now and not is_amid_step else None
    standings = [standing(request, now, costs, pace) for request in held]
    ranked = rank(held, standings, turn)
    chosen, must_step = _fill(held, ranked, turn, room)
    if due <= now and is_amid_step:
        chosen = chosen[:must_step]  # the others wait until all are between two steps, and the turn has its room
    elif any(not held[index].is_batch for index, _ in chosen):
        chosen = _fill_round(held, standings, chosen, must_step, costs, room, pace)
    counts = [0] * len(held)
    for index, _ in chosen:
        counts[index] += 1
    if is_amid_step:
        return Schedule(counts, None, now)  # whoever waits for its room must not wait longer
    return Schedule(counts, turn, due if turn is None else inf)


def standing(request: Held, now: float, costs: ForwardCosts, pace: float) -> Standing:
    objective = min(request.deadline - request.arrived, OBJECTIVE * request.alone * pace)
    remaining = seconds_alone(request.waveforms, costs) if request.has_begun else request.alone
    misses_deadline = now + remaining * pace > request.deadline
    return Standing(remaining * pace, objective, request.arrived + objective - now, misses_deadline)


def rank(held: Sequence[Held], standings: Sequence[Standing], turn: int | None = None) -> list[int]:
    """Returns who goes first.

    Args:
        turn: the request whose turn by age begins.
    """
    ranked = [index for index, request in enumerate(held) if request.has_turn or index == turn]
    for is_batch in (False, True):
        among = [index for index, each in enumerate(held) if each.is_batch == is_batch and index not in ranked]
        in_time = sorted((each for each in among if not standings[each].is_late), key=lambda i: standings[i].within)
        late = sorted((each for each in among if standings[each].is_late), key=lambda i: standings[i].remaining)
        before = [standings[each] for each in in_time]
        places = {each: _place(standings[each], before) for each in late}
        for place in range(len(in_time) + 2):
            ranked += [each for each in late if places[each] == place]
            ranked += in_time[place : place + 1]
    return ranked


def _place(late: Standing, in_time: Sequence[Standing]) -> int:
    """Returns how many of those in time go before a late one: all up to the last that is shorter, or was to be sooner.

    One more than all for whoever misses its deadline: it must not take steps from those that can be answered.
    """
    if late.misses_deadline:
        return len(in_time) + 1
    before = (late.is_longer_than(other) or other.within <= late.within for other in in_time)
    return max((place for place, goes_before in enumerate(before, 1) if goes_before), default=0)


def _turn_due(held: Sequence[Held], since: float, costs: ForwardCosts, pace: float) -> float:
    """Returns when the turn by age of the oldest request begins; inf while another has it."""
    if not held or any(request.has_turn for request in held):
        return inf
    return since + seconds_alone(held[0].waveforms, costs) * pace * (1 / AGED_SHARE - 1)


def _fill(
    held: Sequence[Held], ranked: Sequence[int], turn: int | None, room: Room
) -> tuple[list[tuple[int, int]], int]:
    """Returns the waveforms that have room, as pairs of indices; the first so many of them must step."""
    chosen = []
    for index, request in enumerate(held):
        amid_step = [part for part, waveform in enumerate(request.waveforms) if waveform.amid_step]
        # With those before it, which are in flight too: the first ones of a request step, whichever they are.
        chosen += [(index, part) for part in range(max(amid_step, default=-1) + 1)]
    taken = set(chosen)
    left = room.frames - sum(held[index].waveforms[part].room for index, part in chosen)
    started = sum(waveform.started for request in held for waveform in request.waveforms)
    must_step = len(chosen)
    for index in ranked:
        has_turn = held[index].has_turn or index == turn
        for part, waveform in enumerate(held[index].waveforms):
            if (index, part) in taken:
                continue
            if not waveform.started and started >= room.started and not has_turn:
                break  # whoever is behind and has started still goes on
            if waveform.room > left and chosen:
                return chosen, must_step  # later ones must not take the room meant for this one
            left -= waveform.room
            started += not waveform.started
            chosen.append((index, part))
            if has_turn:
                must_step = len(chosen)
    return chosen, must_step


def _fill_round(
    held: Sequence[Held],
    standings: Sequence[Standing],
    chosen: Sequence[tuple[int, int]],
    must_step: int,
    costs: ForwardCosts,
    room: Room,
    pace: float,
) -> list[tuple[int, int]]:
    """Returns which waveforms step: all that must, the first of the others, and those that may join them."""
    waveforms = [held[index].waveforms[part] for index, part in chosen]
    least = {frames: least_item_seconds(frames, costs, room.items) for frames in {each.frames for each in waveforms}}
    # A request whose turn has come by age, or a step that has begun, does not stop whoever goes first for long.
    count = must_step + 1
    stepping, joined = waveforms[:count], list(chosen[:count])
    seconds = round_seconds(stepping, costs)
    passed_over: set[int] = set()
    interactive = sum(len(request.waveforms) for request in held if not request.is_batch)
    for (index, part), waveform in zip(chosen[count:], waveforms[count:], strict=True):
        if index in passed_over:
            continue
        together = round_seconds([*stepping, waveform], costs)
        at_best = sum(each.items * least[each.frames] for each in stepping)
        if together <= seconds:
            joins = True  # for nothing
        elif not (
            index == joined[-1][0]
            or _share_a_length(waveform, stepping)
            or together < (seconds + round_seconds([waveform], costs)) * (1 - ROUNDING)
        ):
            joins = False
        elif held[index].is_batch:
            all_interactive_step = interactive == sum(not held[each].is_batch for each, _ in joined)
            joins = all_interactive_step and at_best < KNEE * seconds
        else:
            shorter = [
                (standings[other], held[other].waveforms[which])
                for other, which in joined
                if not held[other].is_batch
                and not standings[other].is_late
                and standings[index].is_longer_than(standings[other])
            ]
            stay_in_time = all(each.evaluations * together * pace <= other.within for other, each in shorter)
            joins = not shorter or (at_best < FULL * seconds and stay_in_time)
        if joins:
            stepping, seconds = [*stepping, waveform], together
            joined.append((index, part))
        else:
            passed_over.add(index)  # a request's first waveforms step
    return joined


def _share_a_length(waveform: HeldWaveform, others: Sequence[HeldWaveform]) -> bool:
    """Returns whether a forward has room for it beside one of the others, whatever its bucket."""
    return not waveform.in_turns and any(each.frames == waveform.frames and not each.in_turns for each in others)
