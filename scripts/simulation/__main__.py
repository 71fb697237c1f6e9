"""`scripts/simulate`: the denoiser under load, by its own policies and measured costs.

`measure` times the forwards of a checkpoint on this machine; `run` prints a row for each policy and load.
"""

import argparse
import sys
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path
from typing import Final

from project import add_stages_to_path

add_stages_to_path()

from audioldm2_triton.server.settings import ARRIVAL, LAXITY  # noqa: E402
from engine.laxity import OBJECTIVE  # noqa: E402
from engine.limits import EngineLimits  # noqa: E402
from simulation.costs import measure_costs, read_costs, scaled_costs, write_costs  # noqa: E402
from simulation.engine import SimulatedEngine, simulate  # noqa: E402
from simulation.goodput_plot import save_goodput_plot  # noqa: E402
from simulation.pace import pace_of  # noqa: E402
from simulation.report import Report, report, time_alone, worst_share_of_bound  # noqa: E402
from simulation.workload import LOADS, Request, mixed_requests, read_trace, shortened  # noqa: E402
from stepping.forward_plan import ForwardCosts  # noqa: E402

HEAD: Final = (
    "| policy | load | requests | refused | expired | per s | p50 s | p99 s | interactive p99 s | good | interactive |"
)

CHECK_HEAD: Final = "| policy | load | | per s | p50 s | p99 s | good |"
SHORTER: Final = 8  # the lengths and steps of a real run
SATURATING: Final = 200  # requests at once
PACE_INTERVAL_IN_S: Final = 5.0


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.command == "measure":
        write_costs(arguments.out, measure_costs(arguments.checkpoint))
        return 0
    if arguments.command == "check":
        return _check(arguments)
    if arguments.command == "bound":
        return _bound(arguments)
    costs = read_costs(arguments.costs)
    limits = EngineLimits(arguments.max_active_rows, arguments.max_waiting, arguments.row_frames)
    if arguments.trace is not None and arguments.plot is not None:
        sys.exit("scripts/simulate: got --trace and --plot, but a trace has one load")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for devices in arguments.devices:
        lines = _print_table(arguments, costs, limits, devices)
        panels["1 device" if devices == 1 else f"{devices} devices"] = lines
    if arguments.plot is not None:
        save_goodput_plot(arguments.plot, f"Done within {OBJECTIVE:g} times the time alone, simulated", panels)
    return 0


def _print_table(
    arguments: argparse.Namespace, costs: ForwardCosts, limits: EngineLimits, devices: int
) -> dict[str, list[tuple[float, float]]]:
    """Returns goodput over load, by policy."""
    plans: list[tuple[float, list[Request]]]
    if arguments.trace is not None:
        plans = [(nan, read_trace(arguments.trace))]
    else:
        drawn = (arguments.requests, arguments.arrivals, arguments.seed)
        rate = capacity(costs, limits, arguments.requests, arguments.seed) * devices
        print(f"capacity {rate:.4g} requests per s on {devices} devices, simulated")
        plans = [(load, mixed_requests(drawn[0], load * rate, *drawn[1:])) for load in arguments.loads]
    if arguments.timeout is not None:
        plans = [
            (load, [replace(each, timeout=arguments.timeout * time_alone(each, costs)) for each in requests])
            for load, requests in plans
        ]
    print(f"{HEAD}\n{'|---' * 11}|")
    lines: dict[str, list[tuple[float, float]]] = {ARRIVAL: [], LAXITY: []}
    for load, requests in plans:
        for policy, points in lines.items():
            result = run(requests, costs, replace(limits, scheduling=policy), devices)
            points.append((load, result.goodput))
            print(_row(policy, "trace" if isnan(load) else f"{load:g}", result), flush=True)
    return lines


def capacity(costs: ForwardCosts, limits: EngineLimits, count: int, seed: int) -> float:
    """Returns the requests per second of one device that is never short of work, in order of arrival."""
    requests = mixed_requests(count, inf, "poisson", seed)
    unbounded = replace(limits, scheduling=ARRIVAL, max_waiting=count)
    return run(requests, costs, unbounded, 1).throughput


def run(requests: list[Request], costs: ForwardCosts, limits: EngineLimits, devices: int) -> Report:
    engines = [SimulatedEngine(costs, limits) for _ in range(devices)]
    return report(simulate(requests, engines), [not request.is_batch for request in requests])


def _check(arguments: argparse.Namespace) -> int:
    """Prints what the engine did, and below it what the simulator says of the same requests."""
    from simulation.check import RealEngine, figures

    real = RealEngine(arguments.checkpoint)
    limits = EngineLimits(32, arguments.requests, 256)
    saturating = shortened(mixed_requests(arguments.requests, inf, "poisson", 0), SHORTER, SHORTER)
    rate = figures(saturating, real.run(saturating, limits)[0], real.costs).throughput
    print(f"{real.costs.plain}; capacity {rate:.4g} requests per s, measured\n{CHECK_HEAD}\n{'|---' * 7}|")
    for load in arguments.loads:
        requests = shortened(
            mixed_requests(arguments.requests, load * rate, "poisson", arguments.seed), SHORTER, SHORTER
        )
        for policy in (ARRIVAL, LAXITY):
            scheduled = replace(limits, scheduling=policy)
            measured, steps = real.run(requests, scheduled)
            costs = scaled_costs(real.costs, pace_of(steps).at(0))
            jobs = simulate(requests, [SimulatedEngine(real.costs, scheduled, pace_of(steps, PACE_INTERVAL_IN_S))])
            simulated = [inf if job is None else job.latency for job in jobs]
            for name, latencies in (("engine", measured), ("simulated", simulated)):
                found = figures(requests, latencies, costs)
                cells = f"{found.throughput:.3g} | {found.p50:.3g} | {found.p99:.3g} | {found.goodput:.1%}"
                print(f"| {policy} | {load:g} | {name} | {cells} |", flush=True)
    return 0


def _bound(arguments: argparse.Namespace) -> int:
    """Prints which share of its bound the worst of many requests took on the engine, by laxity."""
    from simulation.check import RealEngine, figures

    real = RealEngine(arguments.checkpoint)
    saturating = shortened(mixed_requests(SATURATING, inf, "poisson", 0), SHORTER, SHORTER)
    limits = EngineLimits(32, max(SATURATING, arguments.requests), 256, LAXITY)
    rate = figures(saturating, real.run(saturating, replace(limits, scheduling=ARRIVAL))[0], real.costs).throughput
    requests = shortened(mixed_requests(arguments.requests, rate, arguments.arrivals, 1), SHORTER, SHORTER)
    latencies, _ = real.run(requests, limits)
    simulated = SimulatedEngine(real.costs, limits)
    simulate(requests, [simulated])
    worst = worst_share_of_bound(requests, latencies, real.costs, simulated.longest_round)
    print(
        f"{len(requests)} requests, {rate:.3g} arrivals per s, {simulated.pauses} pauses if simulated;"
        f" the longest wait {max(latencies):.1f} s; none took more than {worst:.0%} of its bound"
    )
    return 0


def _row(policy: str, name: str, result: Report) -> str:
    figures = (result.throughput, result.p50, result.p99, result.interactive_p99)
    shares = (result.goodput, result.interactive_goodput)
    cells = [policy, name, str(result.requests), str(result.refused), str(result.expired)]
    return f"| {' | '.join([*cells, *(f'{x:.3g}' for x in figures), *(f'{x:.1%}' for x in shares)])} |"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="time the forwards of a checkpoint")
    measuring.add_argument("checkpoint", type=Path)
    measuring.add_argument("--out", type=Path, required=True, help="a file for the costs")
    checking = commands.add_parser("check", help="the real engine beside the simulator, on this machine")
    checking.add_argument("checkpoint", type=Path)
    checking.add_argument("--requests", type=int, default=100)
    checking.add_argument("--loads", type=float, nargs="+", default=LOADS, help="multiples of the measured capacity")
    checking.add_argument("--seed", type=int, default=1)
    bounding = commands.add_parser("bound", help="the longest wait on the real engine, beside its bound")
    bounding.add_argument("checkpoint", type=Path)
    bounding.add_argument("--requests", type=int, default=2000)
    bounding.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    running = commands.add_parser("run", help="simulate")
    running.add_argument("costs", type=Path, help="a file that `measure` has written")
    running.add_argument("--trace", type=Path, help="a CSV: arrived_s, frames, steps, waveforms, items, priority")
    running.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    running.add_argument("--requests", type=int, default=2000)
    running.add_argument("--loads", type=float, nargs="+", default=LOADS, help="multiples of the capacity")
    running.add_argument("--devices", type=int, nargs="+", default=[1], help="a table for each number (default: 1)")
    running.add_argument("--plot", type=Path, help="a .png file: goodput over load, for each number of devices")
    running.add_argument("--timeout", type=float, help="of each request, in times alone (default: none)")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--max-active-rows", type=int, default=32)
    running.add_argument("--max-waiting", type=int, default=64)
    running.add_argument("--row-frames", type=int, default=256, help="latent frames of the native length")
    return parser


if __name__ == "__main__":
    sys.exit(main())
