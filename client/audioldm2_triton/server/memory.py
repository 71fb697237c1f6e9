"""The most memory that a process has held."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_memory_bytes(device: "torch.device") -> int:
    """Returns the most that PyTorch has reserved on a GPU, CUDA graphs included; on a CPU, the process's peak resident
    set, or 0 if unknown.

    Counts from the start, or from a reset of the peak (`torch.cuda.reset_peak_memory_stats`; `/proc/PID/clear_refs`).
    """
    if device.type != "cuda":
        return peak_resident_bytes()
    import torch

    return torch.cuda.max_memory_reserved(device)


def peak_resident_bytes(process: int | str = "self") -> int:
    """Returns `VmHWM` of a process by its id; 0 on systems without it. Raises `OSError` if the process has ended."""
    status = Path(f"/proc/{process}/status")
    if process == "self" and not status.exists():
        return 0
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
