"""`scripts/benchmark background`: what a batch job costs those who wait for an answer, and what they cost it.

The same interactive requests at the same times, with and without a job behind them that is sent at once, and the job
alone; each policy in turn.
"""

import argparse
import sys
from dataclasses import replace
from typing import Final

import numpy as np

from audioldm2_triton.server.settings import ARRIVAL, LAXITY
from benchmarks.commands.goodput import Way, running, send
from benchmarks.run import add_common_arguments, read_run
from simulation.workload import FRAMES_PER_S, Request, mixed_requests, shortened

JOB_LENGTH_IN_S: Final = 10.24
JOB_STEPS: Final = 50
SHARE: Final = 0.1  # of the job's rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "background")
    parser.add_argument("--job", type=int, default=200, help="clips of 10.24 s, 50 steps (default: %(default)s)")
    parser.add_argument("--share", type=float, default=SHARE, help="of interactive arrivals (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="each with other requests (default: %(default)s)")
    parser.add_argument("--length-divisor", type=int, default=1, help="of the audio's length (default: %(default)s)")
    parser.add_argument("--step-divisor", type=int, default=1, help="of the steps (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "background")
    divisors = (arguments.length_divisor, arguments.step_divisor)
    clip = Request(0.0, round(JOB_LENGTH_IN_S * FRAMES_PER_S), JOB_STEPS, is_batch=True)
    job = shortened([clip] * arguments.job, *divisors)
    print("| policy | run | interactive | p99 s: without, with | ratio | clips per s of the job: alone, with | ratio |")
    print("|---" * 7 + "|")
    with running((ARRIVAL, LAXITY), run, 10 * arguments.job) as ways:
        for way in ways:
            send(way, job[:8])
        alone = {way.name: len(job) / max(send(way, job)) for way in ways}
        for seed in range(arguments.runs):
            interactive = _interactive(len(job), arguments.share * alone[ARRIVAL], alone[ARRIVAL], seed, divisors)
            for way in ways if seed % 2 == 0 else reversed(ways):
                print(_row(way, seed, interactive, job, alone[way.name]), flush=True)
    print(f"\n{run.record.checkpoint}, {run.record.device}, {run.record.dtype}, {run.record.commit}", file=sys.stderr)


def _interactive(clips: int, rate: float, job_rate: float, seed: int, divisors: tuple[int, int]) -> list[Request]:
    """Draws requests for as long as the job takes alone."""
    drawn = mixed_requests(clips, rate, "poisson", seed + 1)
    lasting = [replace(each, is_batch=False) for each in drawn if each.arrived < clips / job_rate]
    return shortened(lasting, *divisors)


def _row(way: Way, seed: int, interactive: list[Request], job: list[Request], job_alone: float) -> str:
    without = float(np.percentile(send(way, interactive), 99))
    latencies = send(way, [*job, *interactive])
    beside = float(np.percentile(latencies[len(job) :], 99))
    with_others = len(job) / max(latencies[: len(job)])
    cells = [
        *(way.name, str(seed + 1), str(len(interactive))),
        *(f"{without:.3g}, {beside:.3g}", f"{beside / without:.2f}"),
        *(f"{job_alone:.3g}, {with_others:.3g}", f"{with_others / job_alone:.2f}"),
    ]
    return f"| {' | '.join(cells)} |"
