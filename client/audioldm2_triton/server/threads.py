"""Chooses how many threads a stage's process computes with on a CPU.

Three stages share the cores. More threads than the work can use only take cores from the other stages: the small
kernels of a small checkpoint are slower on two threads than on one.
"""

import logging
import os
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

WORTHWHILE: Final = 0.85
"""More threads must reduce the time to at most this share."""
_REPEATS: Final = 3


def set_measured_threads(work: Callable[[], object]) -> int:
    """Sets PyTorch's threads to as many as `work` can use: 1, 2, 4 ... up to the cores, as long as doubling pays.

    Measures nothing if OMP_NUM_THREADS is set. Call it before other threads of this process compute: each adopts the
    number when it first does.
    """
    import torch

    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    work()  # the first call includes one-time costs
    threads, seconds = 1, _time(work)
    while threads < cores:
        more = min(2 * threads, cores)
        torch.set_num_threads(more)
        with_more = _time(work)
        if with_more > WORTHWHILE * seconds:
            break
        threads, seconds = more, with_more
    torch.set_num_threads(threads)
    logger.info("%d of %d cores: %.1f ms", threads, cores, 1000 * seconds)
    return threads


def _time(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
