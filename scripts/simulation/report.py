"""What a simulation says: throughput, latencies, and goodput."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import numpy as np

from engine.laxity import AGED_SHARE, OBJECTIVE, HeldWaveform, seconds_alone
from simulation.engine import Job
from simulation.workload import Request
from stepping.forward_plan import ForwardCosts


@dataclass(frozen=True)
class Report:
    """The figures of one run. Times are seconds; shares are of all requests that came."""

    requests: int
    refused: int
    expired: int  # they were not done by their deadlines
    throughput: float  # requests done per second
    p50: float
    p99: float
    interactive_p99: float
    goodput: float  # the share of requests done within `OBJECTIVE` times their time alone
    interactive_goodput: float  # the same of the interactive ones


def report(jobs: Sequence[Job | None], interactive: Sequence[bool]) -> Report:
    """Sums up a run.

    Args:
        interactive: whether each request is; needed for those that were refused.
    """
    taken = [job for job in jobs if job is not None]
    done = [job for job in taken if job.finished is not None]
    good = [job is not None and job.latency <= OBJECTIVE * job.alone for job in jobs]
    first = min((job.request.arrived for job in taken), default=0.0)
    last = max((job.finished or 0.0 for job in done), default=inf)
    urgent = [job.latency for job in done if not job.request.is_batch]
    latencies = [job.latency for job in done]
    of_urgent = [fits for fits, counts in zip(good, interactive, strict=True) if counts]
    return Report(
        requests=len(jobs),
        refused=len(jobs) - len(taken),
        expired=len(taken) - len(done),
        throughput=len(done) / (last - first),
        p50=percentile_of(latencies, 50),
        p99=percentile_of(latencies, 99),
        interactive_p99=percentile_of(urgent, 99),
        goodput=sum(good) / len(good),
        interactive_goodput=sum(of_urgent) / len(of_urgent) if of_urgent else nan,
    )


def percentile_of(latencies: Sequence[float], percentile: float) -> float:
    """Returns nan of none."""
    return float(np.percentile(latencies, percentile)) if latencies else nan


def time_alone(request: Request, costs: ForwardCosts) -> float:
    """Returns the seconds that a request takes by itself."""
    part = HeldWaveform(request.items, request.frames, 0, request.steps)
    return seconds_alone([part] * request.waveforms, costs)


def worst_share_of_bound(
    requests: Sequence[Request], latencies: Sequence[float], costs: ForwardCosts, longest_round: float
) -> float:
    """Returns the largest share that a request took of the bound of its wait.

    The bound: it and each of those that were there when it came earn their times alone at the share of the oldest, then
    have their rounds.

    Args:
        longest_round: seconds.
    """
    alone = [time_alone(request, costs) for request in requests]
    evaluations = [request.steps * request.waveforms for request in requests]
    ends = [request.arrived + latency for request, latency in zip(requests, latencies, strict=True)]
    worst = 0.0
    for index, request in enumerate(requests):
        held = [index, *(other for other in range(index) if ends[other] > request.arrived)]
        rounds = sum(evaluations[each] for each in held) + 1
        bound = sum(alone[each] for each in held) * (1 / AGED_SHARE - 1) + rounds * longest_round
        worst = max(worst, latencies[index] / bound)
    return worst
