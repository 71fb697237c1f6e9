"""Chooses how many threads a stage's process computes with on a CPU.

Three stages share the cores. More threads than the work can use only take cores from the other stages: the small
kernels of a small checkpoint are slower on two threads than on one.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

SHARE_IN_S: Final = 0.05
"""A thread's share of the work, in seconds of CPU time, below which it does not pay."""
_REPEATS: Final = 2


def set_measured_threads(work: Callable[[], object]) -> int:
    """Sets PyTorch's threads to as many as `work` can use: one for each `SHARE_IN_S` that it takes, up to the cores.

    Takes the CPU time of one thread, not the time of several: while a server starts, its stages compete for the cores,
    and whether a second thread pays would be a matter of luck, for as long as the server lives.

    Measures nothing if OMP_NUM_THREADS is set. Call it before other threads of this process compute: each adopts the
    number when it first does.
    """
    import torch

    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    cores = usable_cores()
    torch.set_num_threads(1)
    work()  # the first call includes one-time costs
    seconds = min(_cpu_time(work) for _ in range(_REPEATS))
    threads = max(1, min(cores, int(seconds / SHARE_IN_S)))
    torch.set_num_threads(threads)
    logger.info("%d of %d cores: one thread takes %.1f ms", threads, cores, 1000 * seconds)
    return threads


def usable_cores(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns how many cores this process may keep busy: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota(control_groups)
    return cores if quota is None else max(1, min(cores, ceil(quota)))


def _quota(control_groups: Path) -> float | None:
    """Returns the CPUs' worth of time that the control group allows, as `docker run --cpus` sets it; None: all."""
    with contextlib.suppress(OSError, ValueError):  # version 2: "200000 100000" or "max 100000"
        quota, period = (control_groups / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1: -1 for all
        given, every = (
            int((control_groups / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
        return given / every if given > 0 else None
    return None


def _cpu_time(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start
