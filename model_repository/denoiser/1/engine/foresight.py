"""Whether a request can be done in time, foretold: what others still have to do is known, and the time of a forward.

Pure functions over plain data, as in `policy`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final

from engine.laxity import Held, least_item_seconds, rank, standing
from stepping.forward_plan import ForwardCosts

SURE_SHARE: Final = 0.5
"""Of the wait that is foretold: forwards become cheaper when long waveforms leave, and requests may be cancelled."""


@dataclass(frozen=True)
class Ahead:
    """A waveform that is not finished."""

    room: int  # latent frames that it takes of the engine's room
    rounds: int  # evaluations left; in a round each waveform in flight takes one


def lateness(left: float, needed: float, wait: float) -> float:
    """Returns by how many seconds others make a request late at least; not above 0: they do not, or it is late alone.

    Args:
        left: seconds until its deadline.
        needed: seconds that it takes by itself.
        wait: seconds that those before it take.
    """
    return 0.0 if left < needed else SURE_SHARE * wait + needed - left


def rounds_until_entry(in_flight: Iterable[Ahead], waiting: Iterable[Ahead], free: int) -> int:
    """Returns after how many rounds the last of those that wait enters, in order of arrival.

    Args:
        waiting: in the order in which they enter.
        free: room; negative while a waveform longer than the limit is in flight, which is there alone.
    """
    ends = [(waveform.rounds, waveform.room) for waveform in in_flight]
    heapify(ends)
    now = 0
    for waveform in waiting:
        while ends and free < waveform.room:
            now, room = heappop(ends)
            free += room
        free -= waveform.room
        heappush(ends, (now + waveform.rounds, waveform.room))
    return now


def seconds_ahead(held: Sequence[Held], now: float, costs: ForwardCosts, items: int, pace: float) -> float:
    """Returns what those before the last request take at the highest throughput, by laxity.

    Only of those with a sooner objective: rather too little is foretold than too much.

    Args:
        items: UNet batch items of a forward at most.
    """
    standings = [standing(request, now, costs, pace) for request in held]
    ranked = rank(held, standings)
    before = ranked[: ranked.index(len(held) - 1)]
    parts = [
        part for index in before if standings[index].within <= standings[-1].within for part in held[index].waveforms
    ]
    least = {frames: least_item_seconds(frames, costs, items) for frames in {part.frames for part in parts}}
    return pace * sum(part.evaluations * part.items * least[part.frames] for part in parts)
