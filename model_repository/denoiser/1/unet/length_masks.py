"""Masks for rows of different latent lengths in one forward of the UNet, each as if it were alone.

Latents are `[rows, channels, frames, width]`; row `i` is valid for its first `valid_frames[i]` frames and padded
after them. Padding shows in three places, and only there:

* a convolution reads its neighbours, and zeros beyond the end of a row that runs alone: so padded frames are zeroed
  before every convolution wider than one position;
* group normalisation averages over all positions: so its statistics are taken over the valid frames only;
* self-attention looks at all positions: so padded keys are masked.

Everything else (1x1 convolutions, layer normalisation, feed-forward, cross-attention to text) works position by
position. A strided convolution makes `ceil(h / 2)` frames of `h`, and upsampling to whatever size copies frame
`d // 2` to frame `d`, padded or not, so the valid frames of each level follow from those of the latents.

`unet.layers` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Memory-efficient attention copies a mask whose rows do not start at multiples of this, at every call.
MASK_ALIGNMENT = 8  # elements


@dataclass(frozen=True)
class LevelMasks:
    """The masks of one resolution of the UNet, of `frames` x `width` positions."""

    padding: Tensor  # bool [rows, 1, frames, 1], True on padded frames
    positions: Tensor  # float32 [rows, 1, 1, 1, 1], number of valid positions
    keys: Tensor  # compute dtype [rows, 1, 1, frames * width], added to attention scores


@dataclass(frozen=True)
class LengthMasks:
    """The masks of one composition of a batch, the finest level first. Computed once, used for many steps."""

    levels: tuple[LevelMasks, ...]


def level_sizes(size: int, levels: int) -> tuple[int, ...]:
    """Frames (or width) at each level of the UNet, halved and rounded up from one to the next."""
    return tuple(-(-size // 2**level) for level in range(levels))


def length_masks(
    valid_frames: Sequence[int],
    frames: int,
    width: int,
    num_levels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LengthMasks:
    """Masks for rows padded to `frames` latent frames.

    Args:
        valid_frames: latent frames of each row, 1 to `frames`.
        frames, width: size of the padded latents.
        num_levels: resolutions of the UNet.
        dtype: what the UNet computes in.

    Raises:
        ValueError: no rows, or a length that is not in 1 to `frames`.
    """
    if not valid_frames or not all(1 <= valid <= frames for valid in valid_frames):
        raise ValueError(f"Got valid_frames {list(valid_frames)}, but expected at least one, each in 1 to {frames}.")
    rows = len(valid_frames)
    # Half of the lowest number: it stays finite when a score is added to it or it is scaled by log2(e), exp of it is 0.
    excluded = torch.finfo(dtype).min / 2
    levels = []
    for level, (height, breadth) in enumerate(
        zip(level_sizes(frames, num_levels), level_sizes(width, num_levels), strict=True)
    ):
        valid = torch.tensor([-(-value // 2**level) for value in valid_frames])
        padding = torch.arange(height) >= valid[:, None]
        aligned = -(-height * breadth // MASK_ALIGNMENT) * MASK_ALIGNMENT
        keys = torch.full((rows, 1, 1, aligned), excluded, dtype=dtype)
        # A position's key is its frame times the breadth, plus its column.
        keys[:, 0, 0, : height * breadth].masked_fill_((~padding).repeat_interleave(breadth, 1), 0)
        levels.append(
            LevelMasks(
                padding=padding[:, None, :, None].to(device),
                positions=(valid * breadth).float().view(rows, 1, 1, 1, 1).to(device),
                keys=keys.to(device)[..., : height * breadth],
            )
        )
    return LengthMasks(tuple(levels))


def masked_group_norm(
    hidden_states: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    masks: LevelMasks,
) -> Tensor:
    """Group normalisation over the valid frames; the padded ones become zeros.

    As in `torch.nn.functional.group_norm` (Wu and He, 2018), with mean and (biased) variance of the valid positions,
    in float32 or better, in two passes: the mean first, then the squares of the distances to it.

    Args:
        hidden_states: `[rows, channels, frames, width]`; anything at all on the padded frames.
        weight, bias: `[channels]`.

    Returns:
        The same shape and dtype.
    """
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    grouped = wide.unflatten(1, (groups, -1))
    padding = masks.padding.unsqueeze(1)
    count = masks.positions * grouped.shape[2]
    # Sums over the width first: the mask is then applied to a sixteenth, or at least half, of the values.
    mean = grouped.sum(4, keepdim=True).masked_fill(padding, 0).sum((2, 3), keepdim=True) / count
    centred = grouped - mean
    variance = centred.square().sum(4, keepdim=True).masked_fill(padding, 0).sum((2, 3), keepdim=True) / count
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight.view(1, groups, -1, 1, 1)
    normed = centred * scale if bias is None else torch.addcmul(bias.view(1, groups, -1, 1, 1), centred, scale)
    return normed.masked_fill_(padding, 0).flatten(1, 2).to(hidden_states.dtype)
