"""When a request can enter: against a simulation, round by round, of admission in order of arrival."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from engine.foresight import Ahead, rounds_until_entry
from engine.policy import Waiting, admit

LIMIT = 8
waveforms = st.builds(Ahead, room=st.integers(1, LIMIT + 3), rounds=st.integers(1, 9))


def simulated(waiting: list[Ahead]) -> int:
    """The round in which the last enters, if all arrive at once at an empty engine."""
    pending, in_flight, now = deque(waiting), list[list[int]](), 0
    while True:
        room = LIMIT - sum(room for room, _ in in_flight)
        entering = admit([Waiting((waveform.room,)) for waveform in pending], room, not in_flight)
        for _ in range(sum(entering)):
            waveform = pending.popleft()
            in_flight.append([waveform.room, waveform.rounds])
        if not pending:
            return now
        now += 1
        for each in in_flight:
            each[1] -= 1
        in_flight = [each for each in in_flight if each[1]]


@given(st.lists(waveforms, min_size=1, max_size=12))
def test_equals_a_simulation(waiting: list[Ahead]) -> None:
    assert rounds_until_entry([], waiting, LIMIT) == simulated(waiting)


def test_those_in_flight_come_first() -> None:
    assert rounds_until_entry([Ahead(5, 3), Ahead(3, 7)], [Ahead(4, 1)], 0) == 3
    assert rounds_until_entry([Ahead(5, 3), Ahead(3, 7)], [Ahead(6, 1)], 0) == 7
    assert rounds_until_entry([Ahead(5, 3)], [Ahead(3, 1)], 3) == 0


def test_whoever_is_longer_than_the_limit_is_waited_for() -> None:
    assert rounds_until_entry([Ahead(12, 4)], [Ahead(1, 1)], LIMIT - 12) == 4
