"""Random weights that behave: every input matters, nothing explodes, and the waveform is audible.

The libraries' own initialisations are made for training. Read as a checkpoint they give constant conditioning (GPT-2,
CLAP), silence (the vocoder: peaks of 1e-6) and latents of a hundred times their size (the UNet).
"""

import hashlib
from typing import Any, Final

import torch
from torch import Tensor, nn

_CHANNELS_LAST_FAN: Final = "Conv1D"  # transformers' name for a linear layer with its weight transposed


def generator(seed: int, component: str) -> torch.Generator:
    """A generator of its own for each component, so that no component's weights depend on another's shape."""
    digest = hashlib.sha256(f"{seed}/{component}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """Overwrites every parameter: layers keep the variance of their input times `gain`**2, norms are near identity.

    Ends training mode too, in which dropout and batch normalisation would disturb the calibration.
    Norms and biases are random too: left at ones and zeros, an implementation that forgets them would pass.
    """
    module.eval()
    seen: set[int] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            if isinstance(layer, nn.Embedding) or parameter.dim() == 0:
                mean, std = 0.0, 1.0
            elif "norm" in type(layer).__name__.lower():
                mean, std = float(name == "weight"), 0.1
            elif name.endswith("bias"):
                mean, std = 0.0, 0.1
            elif parameter.dim() == 1:  # the projection's sos and eos
                mean, std = 0.0, 1.0
            else:
                mean, std = 0.0, gain * _fan_in(layer, parameter) ** -0.5
            parameter.normal_(mean, std, generator=generator)


def _fan_in(layer: nn.Module, weight: Tensor) -> float:
    """Returns the number of inputs that are summed into one output (fan-in)."""
    if isinstance(layer, nn.ConvTranspose1d):
        return weight.shape[0] * weight.shape[2] / layer.stride[0]
    if type(layer).__name__ == _CHANNELS_LAST_FAN:
        return weight.shape[0]
    return weight[0].numel()


@torch.no_grad()
def pass_noise_through(unet: Any, perturbation: float) -> None:
    """Makes the UNet predict its own input as the noise, plus about `perturbation` times what the random weights say.

    A sampler divides by the signal level, 0.014 at the first step, so the error of a purely random prediction would
    be amplified seventyfold. The input travels as x and -x in the first channels of the first feature map, which is
    the last skip connection, to the output; the activation in between is undone: silu(x) - silu(-x) = x.
    """
    channels = unet.config.in_channels
    width = unet.conv_in.out_channels
    if width < 2 * channels:
        raise ValueError(f"first width of the UNet: got {width} but expected at least {2 * channels}")
    last = unet.up_blocks[-1].resnets[-1]
    skip = last.conv_shortcut.in_channels - width
    for damped in (last.conv_shortcut, last.conv2, unet.conv_out):
        damped.weight.mul_(perturbation)
        damped.bias.mul_(perturbation)
    unet.conv_norm_out.weight.sub_(1).mul_(perturbation).add_(1)
    unet.conv_norm_out.bias.mul_(perturbation)
    for index in range(2 * channels):
        sign = 1.0 if index < channels else -1.0
        unet.conv_in.weight[index] *= perturbation
        unet.conv_in.bias[index] *= perturbation
        unet.conv_in.weight[index, index % channels, 1, 1] += sign
        last.conv_shortcut.weight[index, skip + index, 0, 0] += 1
        unet.conv_out.weight[index % channels, index, 1, 1] += sign


@torch.no_grad()
def damp_attention(model: nn.Module, head_width: int) -> None:
    """Scales the queries of a T5, whose attention does not divide by the root of the head's width."""
    for name, parameter in model.named_parameters():
        if name.endswith(".q.weight"):
            parameter.mul_(head_width**-0.5)
