"""Times and memory of work in this process."""

import contextlib
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

from audioldm2_triton.server.memory import peak_memory_bytes


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, what was started on the device included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def time_repeatedly(work: Callable[[], object], repeats: int, device: torch.device, warm_up: int = 1) -> list[float]:
    """Seconds of each repetition, after some that do not count."""
    for _ in range(warm_up):
        work()
    return [time_once(work, device) for _ in range(repeats)]


def free_memory(device: torch.device) -> None:
    """Lets go of what nothing refers to any more, and starts the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Resets the peak only; where it cannot be written, the peak is that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float | None:
    """Since `free_memory`: what PyTorch held on a GPU, else the resident memory of this process; None if unknown."""
    return peak_memory_bytes(device) / 2**20 or None
