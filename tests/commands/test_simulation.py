"""The simulator, on cases whose answer is known by hand; and the bound of every wait."""

import subprocess
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from audioldm2_triton.server.settings import ARRIVAL, LAXITY
from engine.limits import EngineLimits
from project import ROOT
from simulation.costs import read_costs, write_costs
from simulation.engine import SimulatedEngine, simulate
from simulation.pace import Pace, Step, pace_of
from simulation.report import report, worst_share_of_bound
from simulation.workload import Request, mixed_requests, read_trace
from stepping.forward_plan import Bucket, ForwardCosts, LaunchBoundCost, LinearCost

# A second for each item and frame: nothing is gained by sharing. And: up to 8 of them take 8 seconds.
LINEAR = ForwardCosts(LinearCost(0.0, 1.0), LinearCost(inf, 1.0))
SHARED = ForwardCosts(LaunchBoundCost(8.0, 1.0), LaunchBoundCost(8.0, 1.0))
LIMITS = EngineLimits(max_active_rows=8, max_waiting=100, row_frames=1)


def one(arrived: float, steps: int, **options: int | bool) -> Request:
    return Request(arrived, 1, steps, items=1, **options)  # type: ignore[arg-type]


def ends(
    requests: list[Request], costs: ForwardCosts, policy: str, devices: int = 1, limits: EngineLimits = LIMITS
) -> list[float | None]:
    engines = [SimulatedEngine(costs, replace(limits, scheduling=policy)) for _ in range(devices)]
    return [None if job is None else job.finished for job in simulate(requests, engines)]


@pytest.mark.parametrize("policy", [ARRIVAL, LAXITY])
def test_alone(policy: str) -> None:
    assert ends([one(5, 10)], LINEAR, policy) == [15]
    assert ends([one(5, 10, waveforms=3)], LINEAR, policy) == [35]
    assert ends([one(5, 10, waveforms=3)], SHARED, policy) == [85]
    assert ends([one(0, 1), one(50, 2)], LINEAR, policy) == [1, 52]


def test_in_order_of_arrival_all_share() -> None:
    # Four forwards of 1 s; the one that began at 3 s ends before the second is in; then 2 s each.
    assert ends([one(0, 10), one(3.5, 2)], LINEAR, ARRIVAL) == [12, 8]
    assert ends([one(0, 10), one(4, 2)], SHARED, ARRIVAL) == [80, 24]


def test_by_laxity_the_short_one_goes_first_and_the_long_one_pauses() -> None:
    # At 4 s the objective of the first comes in 26 s, that of the second in 5.5 s.
    assert ends([one(0, 10), one(3.5, 2)], LINEAR, LAXITY) == [12, 6]
    # Sharing is free up to 8 items.
    assert ends([one(0, 10), one(4, 2)], SHARED, LAXITY) == [80, 24]


def test_interactive_goes_before_batch() -> None:
    assert ends([one(0, 5, is_batch=True), one(0.5, 9)], LINEAR, LAXITY) == [14, 10]
    assert ends([one(0, 4), one(0.5, 9)], LINEAR, LAXITY) == [4, 13]


def test_those_that_are_alike_share_by_either_policy() -> None:
    for policy in (ARRIVAL, LAXITY):
        assert ends([one(0, 5), one(0.5, 9)], LINEAR, policy) == [9, 14]
        assert ends([one(0, 5), one(0.5, 9)], SHARED, policy) == [40, 80]


def test_whoever_cannot_be_in_time_is_dropped_and_whom_others_make_late_is_refused() -> None:
    tight = one(0.5, 4, timeout=4.2)
    for policy in (ARRIVAL, LAXITY):
        # At 1 s it has 3.7 s left, and needs 4.
        assert ends([one(0, 10, waveforms=8), tight], LINEAR, policy) == [80, None]
    # After one forward it has 18.5 s left and needs 14. That before it still takes 16, of which half is sure.
    first = one(0, 3, waveforms=8, timeout=26)
    for policy in (ARRIVAL, LAXITY):
        for timeout, is_refused in ((25, True), (100, False)):
            engine = SimulatedEngine(LINEAR, replace(LIMITS, scheduling=policy))
            jobs = simulate([first, one(1.5, 14, timeout=timeout)], [engine])
            assert [job is None for job in jobs] == [False, is_refused]


def test_each_device_takes_its_share() -> None:
    requests = [one(0, 10) for _ in range(4)]
    for policy in (ARRIVAL, LAXITY):
        assert ends(requests, LINEAR, policy, devices=2) == [20] * 4
        assert ends(requests, LINEAR, policy, devices=4) == [10] * 4


def test_what_finds_no_room_waits_and_more_is_refused() -> None:
    limits = EngineLimits(max_active_rows=1, max_waiting=1, row_frames=1)
    assert ends([one(0, 4), one(1, 4), one(2, 4), one(5, 1)], LINEAR, ARRIVAL, limits=limits) == [4, 8, None, 9]


def test_the_pace_of_a_run_is_read_interval_by_interval() -> None:
    steps = [Step(1, 2.0, 2.0), Step(4, 2.0, 4.0), Step(6, 1.0, 3.0), Step(26, 4.0, 4.0)]
    assert pace_of(steps) == Pace((13 / 9,), inf)
    pace = pace_of(steps, 5)
    assert pace == Pace((1.5, 3.0, 3.0, 3.0, 3.0, 1.0), 5)  # in those from 10 to 25 s there is no step
    assert [pace.at(now) for now in (0, 4.9, 5, 24, 25, 1000)] == [1.5, 1.5, 3.0, 3.0, 1.0, 1.0]
    assert [pace.changes_after(now) for now in (0, 5, 24, 25)] == [5, 10, 25, inf]


@pytest.mark.parametrize("policy", [ARRIVAL, LAXITY])
def test_forwards_take_what_the_machine_lets_them(policy: str) -> None:
    def end(pace: Pace, *requests: Request) -> list[float | None]:
        engine = SimulatedEngine(LINEAR, replace(LIMITS, scheduling=policy), pace)
        return [None if job is None else job.finished for job in simulate(list(requests), [engine])]

    assert end(Pace((2.0,)), one(0, 10)) == [20]
    # Six forwards of 1 s, of which the last begins at 5 s, and four of 2 s.
    assert end(Pace((1.0, 2.0), 6), one(0, 10)) == [14]
    assert end(Pace((1.0, 2.0), 6), one(0, 3), one(7, 1)) == [3, 9]


def test_the_report_counts() -> None:
    engine = SimulatedEngine(LINEAR, EngineLimits(1, 2, 1))
    requests = [one(0, 4), one(0, 4), one(0, 2), one(1, 1)]  # the last is refused; the third took 10 s, not 6
    found = report(simulate(requests, [engine]), [True, True, True, False])
    assert (found.requests, found.refused, found.throughput, found.p50) == (4, 1, 0.3, 8)
    assert (found.goodput, found.interactive_goodput) == (0.5, 2 / 3)


def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("arrived_s,frames,steps,priority\n2,25,10,batch\n1,50,4,\n")
    assert read_trace(file) == [Request(1, 50, 4), Request(2, 25, 10, is_batch=True)]
    file.write_text("arrived_s,frames,steps,priority\n2,25,10,soon\n")
    with pytest.raises(ValueError, match="got 'soon' but expected one of interactive, batch"):
        read_trace(file)


def test_bursts_have_the_same_rate() -> None:
    arrivals = [request.arrived for request in mixed_requests(4000, 2.0, "bursty", 1)]
    assert arrivals == sorted(arrivals)
    assert all(arrived % 20 <= 10 for arrived in arrivals)
    assert 4000 / arrivals[-1] == pytest.approx(2.0, rel=0.1)


def test_costs_are_kept(tmp_path: Path) -> None:
    costs = replace(SHARED, masked=LinearCost(1.0, 2.0), compiled={Bucket(2, 256, True): 0.5})
    write_costs(tmp_path / "costs.json", costs)
    assert read_costs(tmp_path / "costs.json") == costs


def test_a_wait_is_compared_with_its_bound() -> None:
    # Alone 4 and 2 s. The first: 9 * 4 s and 5 rounds. The second has the first ahead: 9 * 6 s and 7 rounds.
    requests = [one(0, 4), one(1, 2)]
    assert worst_share_of_bound(requests, [23.0, 1.0], LINEAR, 2.0) == 23 / 46
    assert worst_share_of_bound(requests, [2.0, 34.0], LINEAR, 2.0) == 34 / 68
    assert worst_share_of_bound(requests, [0.5, 34.0], LINEAR, 2.0) == 34 / 24  # nobody ahead


def check_bounds(costs: ForwardCosts, rate_per_s: float, arrivals: str, seed: int) -> tuple[SimulatedEngine, float]:
    """Simulates 1,500 requests; returns the engine, and the largest share that one took of its bound."""
    requests = [
        replace(request, frames=1 + request.frames // 250, items=1)
        for request in mixed_requests(1500, rate_per_s, arrivals, seed)
    ]
    engine = SimulatedEngine(costs, EngineLimits(8, 40, 1, LAXITY))
    done = [job for job in simulate(requests, [engine]) if job is not None]
    assert len(done) < len(requests) or rate_per_s < 0.02, "it was never full"
    assert min(job.latency for job in done) > 0
    worst = worst_share_of_bound(
        [job.request for job in done], [job.latency for job in done], costs, engine.longest_round
    )
    assert worst <= 1
    return engine, worst


@pytest.mark.parametrize("costs", [LINEAR, SHARED], ids=["linear", "shared"])
def test_no_wait_is_longer_than_its_bound(costs: ForwardCosts) -> None:
    engine, _ = check_bounds(costs, 0.02, "bursty", 5)
    assert engine.pauses > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_wait_of_100_000_is_longer_than_its_bound() -> None:
    pauses, worst = 0, 0.0
    for seed in range(17):
        for costs in (LINEAR, SHARED):
            for arrivals in ("poisson", "bursty"):
                engine, share = check_bounds(costs, (0.005, 0.02, 0.05)[seed % 3], arrivals, seed)
                pauses, worst = pauses + engine.pauses, max(worst, share)
    print(f"{17 * 4 * 1500} requests, {pauses} pauses; the worst took {worst:.0%} of its bound")


def test_the_command_prints_a_row_for_each_policy_and_load(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", SHARED)
    plot = tmp_path / "goodput.png"
    options = ["--requests=50", "--loads", "0.5", "2", "--devices", "1", "2", f"--plot={plot}"]
    command = [ROOT / "scripts/simulate", "run", tmp_path / "costs.json", *options]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [[f"| {policy}", load] for load in ("0.5", "2") for policy in (ARRIVAL, LAXITY)]
    assert [line.split(" | ")[:2] for line in lines if line.startswith(("| arrival", "| laxity"))] == [*rows, *rows]
    assert plot.stat().st_size > 10_000
