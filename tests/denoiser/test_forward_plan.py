"""Which waveforms share a forward."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepping.forward_plan import (
    ALWAYS_MIX,
    NEVER_MIX,
    Forward,
    ForwardCosts,
    LinearCost,
    PlannedWaveform,
    fit_cost,
    plan_forwards,
)

WAVEFORMS = st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(1, 300)), min_size=1, max_size=7).map(
    lambda rows: [PlannedWaveform(index, items, frames) for index, (items, frames) in enumerate(rows)]
)
COSTS = st.builds(
    ForwardCosts,
    st.builds(LinearCost, st.floats(0, 10), st.floats(0, 0.1)),
    st.builds(LinearCost, st.floats(0, 10), st.floats(0, 0.1)),
)


def seconds(plan: list[Forward], waveforms: list[PlannedWaveform], costs: ForwardCosts) -> float:
    total = 0.0
    for forward in plan:
        cost = costs.masked if forward.mixed else costs.plain
        total += cost.seconds(sum(waveforms[index].items for index in forward.indices), forward.frames)
    return total


@given(WAVEFORMS, COSTS)
def test_every_waveform_is_in_one_forward_that_is_long_enough(
    waveforms: list[PlannedWaveform], costs: ForwardCosts
) -> None:
    plan = plan_forwards(waveforms, costs)
    assert sorted(index for forward in plan for index in forward.indices) == list(range(len(waveforms)))
    for forward in plan:
        lengths = [waveforms[index].frames for index in forward.indices]
        assert forward.frames == max(lengths)
        assert forward.mixed == (len(set(lengths)) > 1)


@given(WAVEFORMS, COSTS)
def test_no_cut_of_the_sorted_lengths_is_cheaper(waveforms: list[PlannedWaveform], costs: ForwardCosts) -> None:
    best = seconds(plan_forwards(waveforms, costs), waveforms, costs)
    lengths = sorted({waveform.frames for waveform in waveforms}, reverse=True)
    for count in range(len(lengths)):
        for cuts in combinations(range(1, len(lengths)), count):
            bounds = [0, *cuts, len(lengths)]
            plan = []
            for start, stop in pairwise(bounds):
                part = lengths[start:stop]
                indices = tuple(waveform.index for waveform in waveforms if waveform.frames in part)
                plan.append(Forward(indices, part[0], len(part) > 1))
            assert best <= seconds(plan, waveforms, costs) + 1e-9


def test_the_two_ends() -> None:
    waveforms = [
        PlannedWaveform(0, 2, 64),
        PlannedWaveform(1, 1, 8),
        PlannedWaveform(2, 2, 64),
        PlannedWaveform(3, 2, 100),
    ]
    assert len(plan_forwards(waveforms, NEVER_MIX)) == 3
    assert plan_forwards(waveforms, ALWAYS_MIX) == [Forward((3, 0, 2, 1), 100, True)]


def test_an_outlier_gets_a_forward_of_its_own() -> None:
    """One long clip and many short ones: padding all to the longest costs more than a second forward."""
    costs = ForwardCosts(LinearCost(0.1, 0.001), LinearCost(0.1, 0.001))
    waveforms = [PlannedWaveform(0, 2, 256), *(PlannedWaveform(index, 2, 8 + index) for index in range(1, 8))]
    assert [len(forward.indices) for forward in plan_forwards(waveforms, costs)] == [1, 7]


@pytest.mark.parametrize(("fixed", "per_frame"), [(0.5, 0.01), (0.0, 0.01), (0.5, 0.0)])
def test_fit_recovers_a_linear_cost(fixed: float, per_frame: float) -> None:
    true = LinearCost(fixed, per_frame)
    fitted = fit_cost((1, 16, true.seconds(1, 16)), (2, 64, true.seconds(2, 64)))
    assert fitted.fixed == pytest.approx(fixed, abs=1e-12)
    assert fitted.per_frame == pytest.approx(per_frame, abs=1e-12)


def test_noise_cannot_make_a_forward_cost_less_than_nothing() -> None:
    assert fit_cost((1, 16, 0.3), (2, 64, 0.2)) == LinearCost(0.3, 0.0)
