"""Makes forwards fast for a few fixed shapes."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from audioldm2_triton.server.cuda_graphs import CudaGraphRecorder, GraphedFunction

if TYPE_CHECKING:
    import torch


def for_fixed_shapes(
    function: Callable[..., Any],
    device: "torch.device",
    num_shapes: int,
    use_compiler: bool = True,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """Makes a function of tensors fast for a few shapes. Call it once with each of them before time matters.

    Args:
        function: as `GraphedFunction` takes it; compiled as a whole, so it must have no data-dependent branches.
        num_shapes: for how many shapes it may be compiled.
        use_compiler: whether `torch.compile` makes its kernels.
        backend: of `torch.compile`.

    On a GPU, the kernels are replayed as CUDA graphs, compiled or not.
    """
    return graphed(compiled(function, num_shapes, backend) if use_compiler else function, device)


def graphed(function: Callable[..., Any], device: "torch.device") -> Callable[..., Any]:
    """Returns a function that replays a CUDA graph for each shape; on a CPU the function itself."""
    return GraphedFunction(function, CudaGraphRecorder(device)) if device.type == "cuda" else function


def compiled(
    function: Callable[..., Any], num_shapes: int, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """Compiles for up to so many shapes. PyTorch's own limit is 8, for all graphs of the same code together."""
    import torch

    limits: dict[str, Any] = {"recompile_limit": num_shapes, "isolate_recompiles": True}
    if limits.keys() - inspect.signature(torch.compile).parameters.keys():
        # Before 2.13 the limit applies to the whole process.
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, num_shapes)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * num_shapes)
        limits = {}
    faster: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, **limits)
    return faster
