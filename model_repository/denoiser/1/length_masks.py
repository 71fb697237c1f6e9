"""Rows of different latent lengths in one forward of the UNet, each as if it were alone.

Latents are `[rows, channels, frames, width]`; row `i` is valid for its first `valid_frames[i]` frames and padded
after them. Padding shows in three places, and only there:

* a convolution reads its neighbours, and beyond the end of a row run alone it reads zeros: so padded frames are zeroed
  before every convolution wider than one position;
* group normalisation averages over all positions: so its statistics are taken over the valid frames only;
* self-attention looks at all positions: so padded keys are masked.

Everything else (1x1 convolutions, layer normalisation, feed-forward, cross-attention to text) works position by
position. A strided convolution makes `ceil(h / 2)` frames of `h`, and upsampling to whatever size copies frame
`d // 2` to frame `d`, padded or not, so the valid frames of each level follow from those of the latents.

The masked UNet is a second tree of modules over the same parameters. The UNet it was made from stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn

# Memory-efficient attention copies a mask whose rows do not start at multiples of this, at every call.
MASK_ALIGNMENT = 8  # elements


@dataclass(frozen=True)
class LevelMasks:
    """The masks of one resolution of the UNet, of `frames` x `width` positions."""

    padding: Tensor  # bool [rows, 1, frames, 1], True on padded frames
    positions: Tensor  # float32 [rows, 1, 1, 1, 1], number of valid positions
    keys: Tensor  # compute dtype [rows * heads, 1, frames * width], added to attention scores; empty without attention


@dataclass(frozen=True)
class LengthMasks:
    """The masks of one composition of a batch, the finest level first. Computed once, used for many steps."""

    levels: tuple[LevelMasks, ...]

    def copy_(self, source: LengthMasks) -> None:
        """Overwrites these masks in place with others of the same shapes, for a captured graph that reads these."""
        for mine, other in zip(self.levels, source.levels, strict=True):
            for field in fields(LevelMasks):
                getattr(mine, field.name).copy_(getattr(other, field.name))


def level_sizes(size: int, levels: int) -> tuple[int, ...]:
    """Frames (or width) at each level of the UNet, halved and rounded up from one to the next."""
    return tuple(-(-size // 2**level) for level in range(levels))


def length_masks(
    valid_frames: Sequence[int],
    frames: int,
    width: int,
    heads: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LengthMasks:
    """Masks for rows padded to `frames` latent frames.

    Args:
        valid_frames: latent frames of each row, 1 to `frames`.
        frames, width: size of the padded latents.
        heads: attention heads at each level of the UNet, finest first; 0 where the level has no attention.
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
        zip(level_sizes(frames, len(heads)), level_sizes(width, len(heads)), strict=True)
    ):
        valid = torch.tensor([-(-value // 2**level) for value in valid_frames])
        padding = torch.arange(height) >= valid[:, None]
        aligned = -(-height * breadth // MASK_ALIGNMENT) * MASK_ALIGNMENT
        keys = torch.full((rows * heads[level], 1, aligned), excluded, dtype=dtype)
        # A position's key is its frame times the breadth, plus its column.
        keys[:, 0, : height * breadth].masked_fill_(
            (~padding).repeat_interleave(breadth, 1).repeat_interleave(heads[level], 0), 0
        )
        levels.append(
            LevelMasks(
                padding=padding[:, None, :, None].to(device),
                positions=(valid * breadth).float().view(rows, 1, 1, 1, 1).to(device),
                keys=keys.to(device)[:, :, : height * breadth],
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


class MaskSlot:
    """Where the modules of one masked UNet find the masks of the forward under way."""

    def __init__(self) -> None:
        self.masks: LengthMasks | None = None

    def level(self, level: int) -> LevelMasks:
        """The masks of a level. Raises RuntimeError outside a forward of the masked UNet."""
        if self.masks is None:
            raise RuntimeError("A module of a masked UNet was called outside the masked UNet's forward.")
        return self.masks.levels[level]


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation of `[rows, channels, frames, width]` over the valid frames of its level."""

    slot: MaskSlot
    level: int

    def forward(self, input: Tensor) -> Tensor:
        masks = self.slot.level(self.level)
        return masked_group_norm(input, self.num_groups, self.weight, self.bias, self.eps, masks)


class MaskedConv2d(nn.Conv2d):
    """Convolution of `[rows, channels, frames, width]` that reads zeros on the padded frames of its level."""

    slot: MaskSlot
    level: int

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.masked_fill(self.slot.level(self.level).padding, 0))


class MaskedSelfAttention(Attention):
    """Self-attention over `[rows, frames * width, channels]` without the padded keys of its level.

    The processor gets the mask as `attention_mask` `[rows * heads, 1, keys]`: the processors of diffusers take it as
    it is.
    """

    slot: MaskSlot
    level: int

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 - the UNet has none to pass
        **kwargs: Any,
    ) -> Tensor:
        keys = self.slot.level(self.level).keys
        output: Tensor = super().forward(hidden_states, encoder_hidden_states, keys, **kwargs)
        return output


class MaskedUNet(nn.Module):
    """A UNet whose rows have lengths of their own; it shares its parameters with the UNet it is made from.

    Make it after the weights are loaded and before anything is compiled. Moving or casting the original in place
    (`unet.to(...)`) moves this one too. What is done later to the *modules* of the original (other attention
    processors, fused projections) does not reach this one: do it before, or to both.

    One forward at a time: each engine has its own. Nothing is shared between two of them but parameters.

    Args:
        unet: the original, which is not changed.

    Raises:
        ValueError: the UNet's configuration has an option that this does not follow (no AudioLDM 2 checkpoint has).
    """

    def __init__(self, unet: AudioLDM2UNet2DConditionModel) -> None:
        super().__init__()
        for option, followed in (("resnet_time_scale_shift", "default"), ("downsample_padding", 1)):
            if unet.config[option] != followed:
                raise ValueError(f"Got {option} {unet.config[option]!r}, but expected {followed!r}.")
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        self.unet: AudioLDM2UNet2DConditionModel = copy.deepcopy(unet, shared)
        self.slot = MaskSlot()
        self.heads: tuple[int, ...] = self._install()

    def masks(self, valid_frames: Sequence[int], frames: int, width: int = 16) -> LengthMasks:
        """Masks for rows of `valid_frames` latent frames padded to `frames`, in this UNet's dtype, on its device.

        Raises ValueError for a length that is not in 1 to `frames`.
        """
        return length_masks(valid_frames, frames, width, self.heads, self.unet.dtype, self.unet.device)

    def forward(
        self,
        masks: LengthMasks,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_1: Tensor | None = None,
        encoder_attention_mask_1: Tensor | None = None,
    ) -> Tensor:
        """One forward, each row as the original UNet would give it alone.

        Args:
            masks: from `masks`, for these rows and this size.
            sample: latents `[rows, 8, frames, width]`; anything at all on the padded frames.
            timestep: `[rows]` or a scalar tensor.
            encoder_hidden_states: GPT-2 states `[rows, tokens, features]`.
            encoder_hidden_states_1: T5 states `[rows, tokens, features]`.
            encoder_attention_mask_1: `[rows, tokens]`, 1 for a token to attend to.

        Returns:
            The model's output `[rows, 8, frames, width]`, zeros on the padded frames.
        """
        self.slot.masks = masks
        try:
            (output,) = self.unet(
                sample,
                timestep,
                encoder_hidden_states,
                encoder_hidden_states_1=encoder_hidden_states_1,
                encoder_attention_mask_1=encoder_attention_mask_1,
                return_dict=False,
            )
        finally:
            self.slot.masks = None
        zeroed: Tensor = output.masked_fill(masks.levels[0].padding, 0)
        return zeroed

    def _install(self) -> tuple[int, ...]:
        """Turns the modules that see padding into their masked kind; returns the attention heads at each level."""
        levels = len(self.unet.down_blocks)
        heads = [0] * levels
        by_level = [
            *enumerate(self.unet.down_blocks),
            (levels - 1, self.unet.mid_block),
            *((levels - 1 - index, block) for index, block in enumerate(self.unet.up_blocks)),
            (0, self.unet.conv_norm_out),
        ]
        self._mask(self.unet.conv_in, MaskedConv2d, 0)
        for level, block in by_level:
            for module in list(block.modules()):
                if isinstance(module, nn.GroupNorm):
                    # Its zeros stay zeros in the activation, so the convolution that follows finds its padding zeroed.
                    self._mask(module, MaskedGroupNorm, level)
                elif isinstance(module, Attention) and not module.is_cross_attention:
                    self._mask(module, MaskedSelfAttention, level)
                    heads[level] = module.heads
                elif isinstance(module, Downsample2D):
                    self._mask(module.get_submodule("conv"), MaskedConv2d, level)
                elif isinstance(module, Upsample2D):
                    self._mask(module.get_submodule("conv"), MaskedConv2d, level - 1)
        return tuple(heads)

    def _mask(self, module: nn.Module, kind: type[nn.Module], level: int) -> None:
        # The class alone changes: the module keeps its parameters, its name and its place in the tree.
        module.__class__ = kind
        module.slot = self.slot  # type: ignore[assignment]
        module.level = level  # type: ignore[assignment]
