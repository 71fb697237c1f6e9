"""Where the kernels of our own run: on a GPU, with a PyTorch that brings the Triton language."""

from typing import Any

import torch
from torch import Tensor

gpu_kernels: Any
try:
    from audioldm2_triton.server import gpu_kernels
except ImportError:  # PyTorch without CUDA comes without the Triton language
    gpu_kernels = None


def launch_on(device: torch.device) -> None:
    """Makes a GPU the current one of this thread: there our kernels are launched, wherever their tensors are."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def kernels_for(hidden: Tensor) -> Any | None:
    """Returns the module `gpu_kernels` if its kernels accept this tensor."""
    return gpu_kernels if hidden.is_cuda and hidden.dtype != torch.float64 else None
