"""Lays out the decoder for a GPU, whose convolutions want channels-last memory: other tensors are re-laid at each call.

PyTorch knows that layout in two dimensions only, so the vocoder's one-dimensional convolutions become two-dimensional
ones of one column. Their inputs and outputs stay `[N, channels, positions]`, with the channels side by side in memory.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Conv1d(nn.Conv2d):
    """A `torch.nn.Conv1d`, `[N, C, L]` to `[N, C', L']`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.unsqueeze(3)).squeeze(3)


class ConvTranspose1d(nn.ConvTranspose2d):
    """A `torch.nn.ConvTranspose1d`, `[N, C, L]` to `[N, C', L']`."""

    def forward(self, hidden: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(hidden.unsqueeze(3), output_size).squeeze(3)


def use_channels_last(vae: nn.Module, vocoder: nn.Module) -> None:
    """Changes the layout of the VAE's weights, and replaces the vocoder's convolutions."""
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, layer in list(vocoder.named_modules()):
        if type(layer) is nn.Conv1d:
            vocoder.set_submodule(name, _in_two_dimensions(Conv1d, layer))
        elif type(layer) is nn.ConvTranspose1d:
            vocoder.set_submodule(name, _in_two_dimensions(ConvTranspose1d, layer))


def _in_two_dimensions(kind: type[Conv1d] | type[ConvTranspose1d], layer: Any) -> nn.Module:
    with torch.device("meta"):
        replacement = kind(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], 1),
            stride=(layer.stride[0], 1),
            padding=(layer.padding[0], 0),
            dilation=(layer.dilation[0], 1),
        )
    weight = layer.weight.detach().unsqueeze(3).contiguous(memory_format=torch.channels_last)
    replacement.weight = nn.Parameter(weight, requires_grad=False)
    replacement.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return replacement
