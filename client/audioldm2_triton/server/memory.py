"""The most memory that a process has held, and what to do when there is no more."""

import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

# PyTorch has an exception of its own for a GPU's allocator only; a CPU's raises RuntimeError, as do CUDA's libraries.
_OUT_OF_MEMORY: Final = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|ALLOC_FAILED|std::bad_alloc"
)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, on the host or on a GPU: then less work at once may succeed."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def release_memory(error: BaseException) -> None:
    """Frees what an error keeps alive: the tensors in its frames, and PyTorch's unused memory on the GPUs."""
    clear_frames(error)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def clear_frames(error: BaseException) -> None:
    """Keeps an error, but not the variables of the functions that it passed through."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
