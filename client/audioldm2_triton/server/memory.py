"""The most memory that a process has held."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_memory_bytes(device: "torch.device") -> int:
    """The most that PyTorch has reserved on a GPU, CUDA graphs included; else the highest resident set of this
    process; 0 where unknown.

    Since the start, or since the peak was reset (`torch.cuda.reset_peak_memory_stats`; `/proc/PID/clear_refs`).
    """
    if device.type != "cuda":
        return peak_resident_bytes()
    import torch

    return torch.cuda.max_memory_reserved(device)


def peak_resident_bytes(process: int | str = "self") -> int:
    """`VmHWM` of a process by its id; 0 on systems that do not tell it. Raises `OSError` where it has ended."""
    status = Path(f"/proc/{process}/status")
    if process == "self" and not status.exists():
        return 0
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
