"""`scripts/benchmark background`: what a batch job costs those who wait for an answer, and what they cost it.

The same interactive requests at the same times, with and without a job behind them that is sent at once, and the job
alone; each policy in turn.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from audioldm2_triton.server.settings import ARRIVAL, LAXITY
from benchmarks.commands.goodput import Way, running, send
from benchmarks.run import add_common_arguments, read_run
from simulation.workload import FRAMES_PER_S, Request, mixed_requests, shortened

JOB_LENGTH_IN_S: Final = 10.24
JOB_STEPS: Final = 50
SHARE: Final = 0.1  # of the job's rate


@dataclass(frozen=True)
class Found:
    """One run of one policy."""

    without: list[float]  # seconds of the interactive requests
    beside: list[float]  # the same with the job behind them
    alone: float  # clips per second of the job alone
    job: float  # and with the interactive requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "background")
    parser.add_argument("--job", type=int, default=200, help="clips of 10.24 s, 50 steps (default: %(default)s)")
    parser.add_argument("--share", type=float, default=SHARE, help="of interactive arrivals (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, help="of different requests, taken together (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first run's requests (default: %(default)s)")
    parser.add_argument("--length-divisor", type=int, default=1, help="of the audio's length (default: %(default)s)")
    parser.add_argument("--step-divisor", type=int, default=1, help="of the steps (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "background")
    divisors = (arguments.length_divisor, arguments.step_divisor)
    clip = Request(0.0, round(JOB_LENGTH_IN_S * FRAMES_PER_S), JOB_STEPS, is_batch=True)
    job = shortened([clip] * arguments.job, *divisors)
    found: dict[str, list[Found]] = {ARRIVAL: [], LAXITY: []}
    with running(tuple(found), run, 10 * arguments.job) as ways:
        # The first run warms up.
        rate = max(len(job) / max(send(way, job)) for _ in range(2) for way in ways)
        for seed in range(arguments.runs):
            interactive = _interactive(len(job), arguments.share * rate, rate, arguments.seed + seed, divisors)
            if not interactive:
                sys.exit("scripts/benchmark background: got a share without any request but expected a larger one")
            for way in ways if seed % 2 == 0 else reversed(ways):
                found[way.name].append(_measure(way, interactive, job))
                print(f"{way.name}, run {seed + 1} of {arguments.runs}", file=sys.stderr)
    print(
        "| policy | interactive | p50 s: without, with | p99 s | ratio | clips per s of the job: alone, with | ratio |"
    )
    print("|---" * 7 + "|")
    for name, runs in found.items():
        print(_row(name, runs))
    print(f"\n{run.record.checkpoint}, {run.record.device}, {run.record.dtype}, {run.record.commit}", file=sys.stderr)


def _interactive(clips: int, rate: float, job_rate: float, seed: int, divisors: tuple[int, int]) -> list[Request]:
    """Draws requests for as long as the job takes alone."""
    drawn = mixed_requests(clips, rate, "poisson", seed + 1)
    lasting = [replace(each, is_batch=False) for each in drawn if each.arrived < clips / job_rate]
    return shortened(lasting, *divisors)


def _measure(way: Way, interactive: list[Request], job: list[Request]) -> Found:
    without = send(way, interactive)
    alone = send(way, job)
    latencies = send(way, [*job, *interactive])
    return Found(without, latencies[len(job) :], len(job) / max(alone), len(job) / max(latencies[: len(job)]))


def _row(policy: str, runs: list[Found]) -> str:
    without, beside = (np.concatenate([getattr(each, name) for each in runs]) for name in ("without", "beside"))
    before, behind = (np.percentile(latencies, (50, 99)) for latencies in (without, beside))
    alone, job = (statistics.fmean(getattr(each, name) for each in runs) for name in ("alone", "job"))
    cells = [
        *(policy, str(len(without)), f"{before[0]:.3g}, {behind[0]:.3g}", f"{before[1]:.3g}, {behind[1]:.3g}"),
        *(f"{behind[1] / before[1]:.2f}", f"{alone:.3g}, {job:.3g}", f"{job / alone:.2f}"),
    ]
    return f"| {' | '.join(cells)} |"
