"""Linear layers on a CPU, by oneDNN.

PyTorch computes products in float32 with MKL. On an AMD EPYC with AVX-512, oneDNN, which computes PyTorch's
convolutions, takes less than half the time; other processors were not measured. The results differ by rounding. For
bfloat16 PyTorch uses oneDNN anyway.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

PRODUCT: Final = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's product, in builds of PyTorch that have it."""
WORTHWHILE: Final = 2**21
"""oneDNN is faster from this number of multiplications: a call costs 10 microseconds more than one of MKL."""


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: `hidden` [..., K], `weight` [N, K], `bias` [N], to [..., N].

    Training, compiled code and small products use PyTorch's own: oneDNN's has no gradient, and compilers choose their
    own kernels.
    """
    if (
        PRODUCT is None
        or hidden.device.type != "cpu"
        or hidden.dtype != torch.float32
        or hidden.numel() * weight.shape[0] < WORTHWHILE
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return functional.linear(hidden, weight, bias)
    product: Tensor = PRODUCT(hidden, weight, bias, "none", [], "")
    return product


class Linear(nn.Module):
    """A layer of PyTorch, or transformers' `Conv1D` with its weight [K, N], whose parameters it shares."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.transposed = isinstance(layer, Conv1D)

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight.t() if self.transposed else self.weight, self.bias)


def replace_linear_layers(module: nn.Module) -> None:
    """Replaces all linear layers of a module by `Linear`; their parameters and names stay."""
    for name, layer in list(module.named_modules()):
        if type(layer) in (nn.Linear, Conv1D):
            module.set_submodule(name, Linear(layer))
