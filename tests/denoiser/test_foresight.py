"""What a request has to wait for: by order of arrival against a simulation, round by round; by laxity by hand."""

from collections import deque
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from engine.foresight import Ahead, lateness, rounds_until_entry, seconds_ahead
from engine.laxity import Held, HeldWaveform
from engine.policy import Waiting, admit
from stepping.forward_plan import ForwardCosts, LinearCost

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


def test_others_make_late_whoever_would_be_in_time_alone() -> None:
    assert lateness(left=10.0, needed=4.0, wait=20.0) == 4.0  # half of the wait is sure
    assert lateness(left=10.0, needed=4.0, wait=12.0) == 0.0
    assert lateness(left=10.0, needed=11.0, wait=99.0) == 0.0  # it is late anyhow, and said to be so elsewhere


def test_by_laxity_those_before_it_count_at_the_highest_throughput() -> None:
    fixed = ForwardCosts(LinearCost(8.0, 1.0), LinearCost(inf, 1.0))  # 3 s an item, where 4 share a forward

    def held(arrived: float, deadline: float = inf, steps: int = 10, is_batch: bool = False) -> Held:
        return Held(arrived, deadline, is_batch, 9.0 * steps, (HeldWaveform(1, 1, 1, steps),))

    tight, loose, late, batch = held(0, 100), held(0), held(-300), held(0, 95, is_batch=True)
    newcomer = held(1)  # its objective is 271
    assert seconds_ahead([tight, newcomer], 1.0, fixed, 4, 1.0) == 30.0
    assert seconds_ahead([tight, loose, newcomer], 1.0, fixed, 4, 1.0) == 60.0
    assert seconds_ahead([tight, loose, newcomer], 1.0, fixed, 4, 2.0) == 60.0  # the first is lost, and gives way
    assert seconds_ahead([late, newcomer], 1.0, fixed, 4, 1.0) == 30.0  # its equal
    assert seconds_ahead([held(-1000, steps=30), newcomer], 1.0, fixed, 4, 1.0) == 0.0  # late, and longer
    assert seconds_ahead([batch, newcomer], 1.0, fixed, 4, 1.0) == 0.0
    # Its laxity is less now, but not any more when the newcomer's is used up.
    assert seconds_ahead([held(0, 280, steps=28), newcomer], 1.0, fixed, 4, 1.0) == 0.0
    assert seconds_ahead([tight, held(1, is_batch=True)], 1.0, fixed, 4, 1.0) == 30.0
