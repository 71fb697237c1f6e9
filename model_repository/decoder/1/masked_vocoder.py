"""Vocodes mel spectrograms of different lengths in one forward, each as if it were alone.

The vocoder is a stack of convolutions, so padding matters in one way only: a convolution near the end of a row run
alone reads zeros beyond it. So positions after the end are zeroed before every convolution. The end of a row is tracked
through the transposed convolutions, each of which turns `n` positions into `(n - 1) * stride - 2 * padding + kernel`.

Zeroed in place: `masked_fill` would change the memory layout, and `where` copies its zero to the device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def vocode_masked(vocoder: Any, spectrograms: Tensor, valid_frames: Tensor) -> Tensor:
    """Computes what a `SpeechT5HifiGan` gives for each row's valid frames alone.

    Args:
        spectrograms: `[rows, frames, mel bins]`; finite on the padded frames.
        valid_frames: int64 `[rows]`, each from 1 to `frames`.

    Returns:
        `[rows, samples]`, meaningless after the samples of the valid frames.
    """
    if vocoder.config.normalize_before:
        spectrograms = (spectrograms - vocoder.mean) / vocoder.scale
    padding = _padding(valid_frames, spectrograms.shape[1])
    hidden = vocoder.conv_pre(spectrograms.transpose(1, 2).clone().masked_fill_(padding, 0)).masked_fill_(padding, 0)
    resblocks = iter(vocoder.resblocks)
    for upsampler in vocoder.upsampler:
        hidden = upsampler(functional.leaky_relu(hidden, vocoder.config.leaky_relu_slope))
        kernel, stride, cropped = upsampler.kernel_size[0], upsampler.stride[0], upsampler.padding[0]
        valid_frames = (valid_frames - 1) * stride - 2 * cropped + kernel
        padding = _padding(valid_frames, hidden.shape[2])
        hidden = hidden.masked_fill_(padding, 0)
        branches = [_resblock(next(resblocks), hidden, padding) for _ in range(vocoder.num_kernels)]
        hidden = sum(branches[1:], start=branches[0]) / vocoder.num_kernels
    # With the function's default slope, as in the original.
    waveforms: Tensor = torch.tanh(vocoder.conv_post(functional.leaky_relu(hidden))).squeeze(1)
    return waveforms


def _padding(valid: Tensor, positions: int) -> Tensor:
    """Bool `[rows, 1, positions]`, True from `valid[row]` on."""
    return (torch.arange(positions, device=valid.device) >= valid[:, None])[:, None]


def _resblock(block: Any, hidden: Tensor, padding: Tensor) -> Tensor:
    """A `HifiGanResidualBlock`, of zeros after the end to zeros after the end."""
    for first, second in zip(block.convs1, block.convs2, strict=True):
        inner = first(functional.leaky_relu(hidden, block.leaky_relu_slope)).masked_fill_(padding, 0)
        inner = second(functional.leaky_relu(inner, block.leaky_relu_slope))
        hidden = (inner + hidden).masked_fill_(padding, 0)
    return hidden
