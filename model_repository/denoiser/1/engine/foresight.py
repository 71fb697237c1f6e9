"""When a request can enter, foretold: what those before it still have to do is known, and so is the time of a forward.

Pure functions over plain data, as in `policy`, for admission in order of arrival.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True)
class Ahead:
    """A waveform that is not finished."""

    room: int  # latent frames that it takes of the engine's room
    rounds: int  # evaluations left; in a round each waveform in flight takes one


def rounds_until_entry(in_flight: Iterable[Ahead], waiting: Iterable[Ahead], free: int) -> int:
    """Returns after how many rounds the last of those that wait enters.

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
