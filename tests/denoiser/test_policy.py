"""The engine's decisions alone: a simulator of a few lines, without a UNet and without torch."""

import subprocess
import sys
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine.policy import Group, InFlight, Waiting, admit, next_group, plan_groups
from project import ROOT
from stepping.forward_plan import ALWAYS_MIX, NEVER_MIX, Bucket, ForwardCosts, LinearCost

SIZES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), max_size=6)


def test_it_runs_without_torch() -> None:
    code = "import sys, engine.policy; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "model_repository/denoiser/1", check=True)


def test_later_arrivals_do_not_overtake() -> None:
    assert admit([Waiting((2, 2)), Waiting((3, 3)), Waiting((1,))], 8, is_empty=True) == [2, 1]
    assert admit([Waiting((2, 2)), Waiting((3,)), Waiting((1,))], 8, is_empty=False) == [2, 1, 1]
    assert admit([Waiting((9,)), Waiting((1,))], 8, is_empty=False) == [0]


def test_the_first_always_has_room_where_nothing_is_in_flight() -> None:
    assert admit([Waiting((9, 9)), Waiting((1,))], 8, is_empty=True) == [1]
    assert admit([], 8, is_empty=True) == []


@given(SIZES, st.integers(0, 30), st.booleans())
def test_what_enters_is_the_longest_beginning_that_fits(
    sizes: list[tuple[int, ...]], room: int, is_empty: bool
) -> None:
    counts = admit([Waiting(frames) for frames in sizes], room, is_empty)
    entered = [frames for request, count in zip(sizes, counts, strict=False) for frames in request[:count]]
    every = [frames for request in sizes for frames in request]
    assert entered == every[: len(entered)]
    assert sum(entered) <= room or (is_empty and len(entered) == 1)
    if len(entered) < len(every):
        assert sum(every[: len(entered) + 1]) > room
        assert entered or not is_empty


def test_windows_that_take_turns_are_grouped_by_request() -> None:
    waveforms = [
        *(InFlight(1, 2, 8, False), InFlight(2, 6, 4, True), InFlight(1, 2, 8, False)),
        *(InFlight(3, 6, 4, True), InFlight(2, 6, 4, True), InFlight(4, 2, 5, False)),
    ]
    assert plan_groups(waveforms, NEVER_MIX) == [
        *(Group((0, 2), False), Group((5,), False), Group((1, 4), True), Group((3,), True))
    ]
    assert plan_groups(waveforms, ALWAYS_MIX)[0] == Group((0, 2, 5), False)
    assert plan_groups([], ALWAYS_MIX) == []


def test_a_bucket_is_taken_where_it_is_cheaper() -> None:
    bucket = Bucket(4, 8, False)
    costs = ForwardCosts(LinearCost(1.0, 1.0), LinearCost(1.0, 1.0), {bucket: 2.0})
    assert plan_groups([InFlight(1, 2, 8, False)] * 2, costs) == [Group((0, 1), False, bucket)]


def test_a_forward_is_cut_to_what_has_room() -> None:
    waveforms = [InFlight(1, 2, 8, False), InFlight(2, 1, 6, False), InFlight(3, 2, 8, False), InFlight(4, 1, 4, False)]
    cut = [group.indices for group in plan_groups(waveforms, ALWAYS_MIX, room=24)]
    assert cut == [(0,), (2, 1), (3,)]
    # One waveform is a forward of its own, with or without room.
    assert [group.indices for group in plan_groups(waveforms, ALWAYS_MIX, room=1)] == [(0,), (2,), (1,), (3,)]
    assert len(plan_groups(waveforms, ALWAYS_MIX)) == 1


@dataclass
class Simulated:
    """A request of one waveform."""

    number: int
    items: int
    frames: int
    steps_left: int
    last_step: float = 0.0


def simulate(requests: list[Simulated], room: int, costs: ForwardCosts) -> list[list[int]]:
    """The numbers of the requests in each forward, by the engine's policy and the given costs."""
    waiting, flight, forwards, now = list(requests), list[Simulated](), list[list[int]](), 0.0
    while waiting or flight:
        free = room - sum(request.items * request.frames for request in flight)
        sizes = [Waiting((request.items * request.frames,)) for request in waiting]
        for _ in range(sum(admit(sizes, free, not flight))):
            flight.append(waiting.pop(0))
        plain = [InFlight(request.number, request.items, request.frames, False) for request in flight]
        groups = [[flight[index] for index in group.indices] for group in plan_groups(plain, costs)]
        group = groups[next_group([min(request.last_step for request in group) for group in groups])]
        lengths = {request.frames for request in group}
        now += costs.cheapest(sum(request.items for request in group), max(lengths), len(lengths) > 1)[0]
        for request in group:
            request.last_step, request.steps_left = now, request.steps_left - 1
        forwards.append([request.number for request in group])
        flight = [request for request in flight if request.steps_left]
    return forwards


def test_lengths_that_cannot_share_a_forward_take_turns() -> None:
    forwards = simulate([Simulated(n, 2, frames, 3) for n, frames in enumerate((8, 8, 5, 3))], 100, NEVER_MIX)
    assert forwards == [[0, 1], [2], [3]] * 3


def test_who_waits_enters_as_soon_as_there_is_room() -> None:
    requests = [Simulated(1, 2, 4, 2), Simulated(2, 2, 4, 4), Simulated(3, 2, 6, 1), Simulated(4, 2, 1, 1)]
    assert simulate(requests, 16, ALWAYS_MIX) == [[1, 2], [1, 2], [2], [2], [3, 4]]
