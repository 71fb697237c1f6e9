"""`scripts/simulate`: the denoiser under load, by its own policies and measured costs.

`measure` times the forwards of a checkpoint on this machine; `run` prints a row for each policy and load.
"""

import argparse
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Final

from project import add_stages_to_path

add_stages_to_path()

from audioldm2_triton.server.settings import ARRIVAL, LAXITY  # noqa: E402
from engine.limits import EngineLimits  # noqa: E402
from simulation.costs import measure_costs, read_costs, write_costs  # noqa: E402
from simulation.engine import SimulatedEngine, simulate  # noqa: E402
from simulation.report import Report, report  # noqa: E402
from simulation.workload import Request, mixed_requests, read_trace  # noqa: E402
from stepping.forward_plan import ForwardCosts  # noqa: E402

LOADS: Final = (0.5, 0.8, 1.0, 1.3, 2.0)
HEAD: Final = "| policy | load | requests | refused | per s | p50 s | p99 s | interactive p99 s | good | interactive |"

CHECK_HEAD: Final = "| policy | load | | per s | p50 s | p99 s | good |"
SHORTER: Final = 8  # the lengths and steps of a real run


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.command == "measure":
        write_costs(arguments.out, measure_costs(arguments.checkpoint))
        return 0
    if arguments.command == "check":
        return _check(arguments)
    costs = read_costs(arguments.costs)
    limits = EngineLimits(arguments.max_active_rows, arguments.max_waiting, arguments.row_frames)
    plans: list[tuple[str, list[Request]]]
    if arguments.trace is not None:
        plans = [("trace", read_trace(arguments.trace))]
    else:
        drawn = (arguments.requests, arguments.arrivals, arguments.seed)
        rate = capacity(costs, limits, arguments.requests, arguments.seed) * arguments.devices
        print(f"capacity {rate:.4g} requests per s on {arguments.devices} devices, simulated")
        plans = [(f"{load:g}", mixed_requests(drawn[0], load * rate, *drawn[1:])) for load in arguments.loads]
    print(HEAD)
    print("|---" * 10 + "|")
    for name, requests in plans:
        for policy in (ARRIVAL, LAXITY):
            result = run(requests, costs, replace(limits, scheduling=policy), arguments.devices)
            print(_row(policy, name, result), flush=True)
    return 0


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
    from simulation.check import RealEngine, short

    real = RealEngine(arguments.checkpoint)
    limits = EngineLimits(32, arguments.requests, 256)
    saturating = short(mixed_requests(arguments.requests, inf, "poisson", 0), SHORTER)
    rate = real.run(saturating, limits).throughput
    print(f"{real.costs.plain}; capacity {rate:.4g} requests per s, measured\n{CHECK_HEAD}\n{'|---' * 7}|")
    for load in arguments.loads:
        requests = short(mixed_requests(arguments.requests, load * rate, "poisson", 1), SHORTER)
        for policy in (ARRIVAL, LAXITY):
            scheduled = replace(limits, scheduling=policy)
            for name, found in (
                ("engine", real.run(requests, scheduled)),
                ("simulated", run(requests, real.costs, scheduled, 1)),
            ):
                figures = f"{found.throughput:.3g} | {found.p50:.3g} | {found.p99:.3g} | {found.goodput:.1%}"
                print(f"| {policy} | {load:g} | {name} | {figures} |", flush=True)
    return 0


def _row(policy: str, name: str, result: Report) -> str:
    figures = (result.throughput, result.p50, result.p99, result.interactive_p99)
    shares = (result.goodput, result.interactive_goodput)
    cells = [policy, name, str(result.requests), str(result.refused)]
    return f"| {' | '.join([*cells, *(f'{x:.3g}' for x in figures), *(f'{x:.1%}' for x in shares)])} |"


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
    running = commands.add_parser("run", help="simulate")
    running.add_argument("costs", type=Path, help="a file that `measure` has written")
    running.add_argument("--trace", type=Path, help="a CSV: arrived_s, frames, steps, waveforms, items, priority")
    running.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    running.add_argument("--requests", type=int, default=2000)
    running.add_argument("--loads", type=float, nargs="+", default=LOADS, help="multiples of the capacity")
    running.add_argument("--devices", type=int, default=1)
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--max-active-rows", type=int, default=32)
    running.add_argument("--max-waiting", type=int, default=64)
    running.add_argument("--row-frames", type=int, default=256, help="latent frames of the native length")
    return parser


if __name__ == "__main__":
    sys.exit(main())
