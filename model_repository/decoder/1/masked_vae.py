"""Decodes latents of different lengths in one forward of the VAE's decoder, each as if it were alone.

Row `i` of `[rows, channels, frames, width]` is valid for its first `valid_frames[i]` frames and padded after them.
Padding shows in three places: a convolution reads zeros beyond the end of a row run alone, so padded frames are zeroed
before every convolution wider than one position; group normalisation averages over all positions, so its statistics
are taken over the valid frames; self-attention looks at all positions, so padded keys are masked. Upsampling by two
copies frame `d // 2` to frame `d`, so the valid frames double with it.

The modules of the `AutoencoderKL` stay unchanged. The masks are derived from `valid_frames` inside the function, so
that a compiled graph of one shape serves all lengths up to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from audioldm2_triton.server.own_kernels import kernels_for
from vae_walk import walk


@dataclass(frozen=True)
class ValidFrames:
    """Which frames of one resolution count."""

    frames: Tensor  # int64 [rows]
    padding: Tensor  # bool [rows, 1, frames, 1], True on padded frames
    count: Tensor  # float32 [rows, 1, 1, 1, 1], number of valid frames


@dataclass(frozen=True)
class Rows:
    """An activation of all rows."""

    hidden: Tensor  # [rows, channels, frames, width]
    valid: ValidFrames


def decode_masked(vae: Any, latents: Tensor, valid_frames: Tensor) -> Tensor:
    """Computes what `vae.decode` gives for each row's valid frames alone.

    Args:
        vae: an `AutoencoderKL` that `check_followed` accepts.
        latents: `[rows, channels, frames, width]`, divided by the scaling factor; finite on the padded frames.
        valid_frames: int64 `[rows]`, each from 1 to `frames`.

    Returns:
        `[rows, out channels, frames * scale, width * scale]`, meaningless on the padded frames.
    """
    return walk(_MaskedLayers(), vae, Rows(latents, _valid_frames(valid_frames, latents.shape[2]))).hidden


class _MaskedLayers:
    """Implements `Layers` for `Rows`."""

    def convolve(self, convolution: Any, rows: Rows) -> Rows:
        return Rows(_convolve(convolution, rows.hidden, rows.valid), rows.valid)

    def resnet(self, resnet: Any, rows: Rows) -> Rows:
        return Rows(_resnet(resnet, rows.hidden, rows.valid), rows.valid)

    def attend(self, attention: Any, rows: Rows) -> Rows:
        return Rows(_attend(attention, rows.hidden, rows.valid), rows.valid)

    def upsample(self, upsampler: Any, rows: Rows) -> Rows:
        hidden = functional.interpolate(rows.hidden, scale_factor=2.0, mode="nearest")
        valid = _valid_frames(rows.valid.frames * 2, hidden.shape[2])
        return Rows(_convolve(upsampler.conv, hidden, valid), valid)

    def finish(self, norm: Any, activation: Any, convolution: Any, rows: Rows) -> Rows:  # noqa: ARG002
        return Rows(convolution(_normalise(norm, rows.hidden, rows.valid, activate=True)), rows.valid)


def _valid_frames(valid_frames: Tensor, frames: int) -> ValidFrames:
    padding = torch.arange(frames, device=valid_frames.device) >= valid_frames[:, None]
    return ValidFrames(valid_frames, padding[:, None, :, None], valid_frames.float().view(-1, 1, 1, 1, 1))


def _convolve(convolution: Any, hidden: Tensor, valid: ValidFrames) -> Tensor:
    if convolution.kernel_size[0] > 1:
        hidden = hidden.clone().masked_fill_(valid.padding, 0)  # keeps the layout, which `masked_fill` does not
    convolved: Tensor = convolution(hidden)
    return convolved


def _normalise(norm: nn.GroupNorm, hidden: Tensor, valid: ValidFrames, activate: bool = False) -> Tensor:
    """Group normalisation (Wu and He, 2018) over the valid frames, and SiLU; the padded ones become zeros.

    Mean and (biased) variance in float32 or better, in two passes: the mean first, then the squares of the distances.
    """
    kernels = kernels_for(hidden)
    if kernels is not None:
        positions = valid.frames * hidden.shape[3]
        return kernels.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps, activate, positions)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    grouped = wide.unflatten(1, (norm.num_groups, -1))
    padding = valid.padding.unsqueeze(1)
    positions = valid.count * (grouped.shape[2] * grouped.shape[4])
    mean = grouped.masked_fill(padding, 0).sum((2, 3, 4), keepdim=True) / positions
    centred = (grouped - mean).masked_fill(padding, 0)
    variance = centred.square().sum((2, 3, 4), keepdim=True) / positions
    normed = (centred * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
    scaled = torch.addcmul(norm.bias.view(1, -1, 1, 1), normed, norm.weight.view(1, -1, 1, 1))
    normed = scaled.masked_fill(valid.padding, 0).to(hidden.dtype)
    return functional.silu(normed, inplace=True) if activate else normed


def _resnet(resnet: Any, hidden: Tensor, valid: ValidFrames) -> Tensor:
    """A `ResnetBlock2D`. The activation keeps the norm's zeros, so the convolution finds its padding zeroed."""
    inner = resnet.conv1(_normalise(resnet.norm1, hidden, valid, activate=True))
    inner = resnet.conv2(_normalise(resnet.norm2, inner, valid, activate=True))
    shortcut = hidden if resnet.conv_shortcut is None else resnet.conv_shortcut(hidden)
    output: Tensor = (shortcut + inner) / resnet.output_scale_factor
    return output


def _attend(attention: Any, hidden: Tensor, valid: ValidFrames) -> Tensor:
    """The `Attention` of the mid block: over all positions of a row, with a residual connection."""
    frames, width = hidden.shape[2:]
    positions = _normalise(attention.group_norm, hidden, valid).flatten(2).transpose(1, 2)
    query, key, value = (
        layer(positions).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    # A position is its frame times the width, plus its column.
    keys = ~valid.padding.expand(-1, -1, -1, width).flatten(2)[:, :, None]
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=keys)
    projected = attention.to_out[0](attended.transpose(1, 2).flatten(2))
    output: Tensor = projected.transpose(1, 2).unflatten(2, (frames, width)) + hidden
    return output / attention.rescale_output_factor
