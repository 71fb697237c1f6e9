"""What a simulation says: throughput, latencies, and goodput."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.laxity import OBJECTIVE
from simulation.engine import Job


@dataclass(frozen=True)
class Report:
    """The figures of one run. Times are seconds; shares are of all requests that came."""

    requests: int
    refused: int
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
    done = [job for job in jobs if job is not None]
    good = [job is not None and job.latency <= OBJECTIVE * job.alone for job in jobs]
    first = min(job.request.arrived for job in done)
    last = max(job.finished or 0.0 for job in done)
    urgent = [job.latency for job in done if not job.request.is_batch]
    latencies = [job.latency for job in done]
    of_urgent = [fits for fits, counts in zip(good, interactive, strict=True) if counts]
    return Report(
        requests=len(jobs),
        refused=len(jobs) - len(done),
        throughput=len(done) / (last - first),
        p50=float(np.percentile(latencies, 50)),
        p99=float(np.percentile(latencies, 99)),
        interactive_p99=float(np.percentile(urgent, 99)) if urgent else float("nan"),
        goodput=sum(good) / len(good),
        interactive_goodput=sum(of_urgent) / len(of_urgent) if of_urgent else float("nan"),
    )
