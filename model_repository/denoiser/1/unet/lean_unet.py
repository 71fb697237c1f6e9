"""The UNet of AudioLDM 2 as a step needs it: the same function, without everything that no step changes.

`diffusers.AudioLDM2UNet2DConditionModel` is the reference. The differences, each exact up to rounding:

* the keys and values of the text come from outside: they are the same at every step, so they are computed once, with
  one product for all attentions of a stream;
* so do the time embeddings' projections, which depend on the timestep alone and come from a table;
* queries, keys and values of self-attention are one product, and 1x1 convolutions are matrix products;
* rows may have different lengths, by the masks of `length_masks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from audioldm2_triton.server.linear import linear
from unet.layers import Conv, FusedInputs, GroupNorm, Step, TextKeys, frozen, layers_of
from unet.length_masks import LengthMasks, length_masks

_FOLLOWED = {
    "act_fn": "silu",
    "class_embed_type": None,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "upcast_attention": False,
}

EXCLUDED = -10000.0
"""What the reference adds to the score of a token that is masked."""


class LeanUNet(nn.Module):
    """The step's function of one UNet, in its dtype and on its device.

    Args:
        unet: the original, whose convolutions and norms are shared; the fused weights are copies, so drop it.

    Raises:
        ValueError: its configuration has an option that this does not follow (no AudioLDM 2 checkpoint has).
    """

    def __init__(self, unet: AudioLDM2UNet2DConditionModel) -> None:
        super().__init__()
        for option, followed in _FOLLOWED.items():
            if unet.config[option] != followed:
                raise ValueError(f"Got {option} {unet.config[option]!r}, but expected {followed!r}.")
        model: Any = unet
        self.config = unet.config
        self.levels = len(model.down_blocks)
        fused = FusedInputs()
        self.conv_in = Conv(model.conv_in)
        self.down_blocks = nn.ModuleList(_DownBlock(block, fused) for block in model.down_blocks)
        self.mid_layers = layers_of(model.mid_block, fused)
        self.up_blocks = nn.ModuleList(_UpBlock(block, fused) for block in model.up_blocks)
        self.conv_norm_out = GroupNorm(model.conv_norm_out)
        self.conv_out = Conv(model.conv_out)
        self.time_proj = model.time_proj
        self.time_embedding = model.time_embedding
        self.time_weight = frozen(torch.cat([layer.weight for layer in fused.time_layers]))
        self.time_bias = frozen(torch.cat([layer.bias for layer in fused.time_layers]))
        self.text_weights = nn.ParameterList(frozen(torch.cat(weights)) for weights in fused.text_weights)
        self.layout = torch.channels_last
        self.to(memory_format=self.layout)  # type: ignore[call-overload]

    @property
    def dtype(self) -> torch.dtype:
        return self.time_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.time_weight.device

    def masks(self, valid_frames: Sequence[int], frames: int, width: int = 16) -> LengthMasks:
        """Masks for rows of `valid_frames` latent frames padded to `frames`, in this UNet's dtype, on its device.

        Raises ValueError for a length that is not in 1 to `frames`.
        """
        return length_masks(valid_frames, frames, width, self.levels, self.dtype, self.device)

    def time_biases(self, timesteps: Tensor) -> Tensor:
        """Computes what the residual blocks add at each timestep.

        Args:
            timesteps: `[E]`, whole or not.

        Returns:
            `[E, channels of all residual blocks]` in the UNet's dtype.
        """
        embedding = self.time_embedding(self.time_proj(timesteps.to(self.device)).to(self.dtype))
        return linear(functional.silu(embedding), self.time_weight, self.time_bias)

    def text_keys(
        self, encoder_hidden_states: Tensor, encoder_hidden_states_1: Tensor, encoder_attention_mask_1: Tensor
    ) -> TextKeys:
        """Computes the keys and values of a batch of texts.

        Args:
            encoder_hidden_states: GPT-2 states `[U, T, D0]` in the UNet's dtype.
            encoder_hidden_states_1: T5 states `[U, L, D1]` in the UNet's dtype.
            encoder_attention_mask_1: `[U, L]`, 1 for a token to attend to.
        """
        bias = (1 - encoder_attention_mask_1.to(self.dtype)) * EXCLUDED
        return TextKeys(
            linear(encoder_hidden_states, self.text_weights[0]),
            linear(encoder_hidden_states_1, self.text_weights[1]),
            bias[:, None, None],
        )

    def forward(self, sample: Tensor, time_biases: Tensor, text: TextKeys, masks: LengthMasks | None) -> Tensor:
        """Runs one forward; each row is what the original UNet would give for it alone.

        Args:
            sample: latents `[U, C, frames, width]`; with masks, anything at all on the padded frames.
            time_biases: `[U, channels of all residual blocks]`, each row's of its timestep.
            text: of these rows.
            masks: of these rows and this size, where their lengths differ.

        Returns:
            The model's output `[U, C, frames, width]`; with masks, zeros on the padded frames.
        """
        step = Step(time_biases, text, masks)
        hidden = self.conv_in(sample.contiguous(memory_format=self.layout), step.level(0))
        skips = [hidden]
        for level, block in enumerate(self.down_blocks):
            hidden = block(hidden, skips, step, level)
        for layer in self.mid_layers:
            hidden = layer(hidden, step, self.levels - 1)
        for index, block in enumerate(self.up_blocks):
            hidden = block(hidden, skips, step, self.levels - 1 - index)
        # The norm zeroes the padding that the convolution reads.
        output: Tensor = self.conv_out(self.conv_norm_out(hidden, step.level(0), activate=True), None)
        return output if masks is None else output.masked_fill(masks.levels[0].padding, 0)


class _DownBlock(nn.Module):
    def __init__(self, block: Any, fused: FusedInputs) -> None:
        super().__init__()
        self.layers = layers_of(block, fused)
        self.downsampler = None if block.downsamplers is None else Conv(block.downsamplers[0].conv)

    def forward(self, hidden: Tensor, skips: list[Tensor], step: Step, level: int) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, step, level)
            skips.append(hidden)
        if self.downsampler is not None:
            hidden = self.downsampler(hidden, step.level(level))
            skips.append(hidden)
        return hidden


class _UpBlock(nn.Module):
    def __init__(self, block: Any, fused: FusedInputs) -> None:
        super().__init__()
        self.layers = layers_of(block, fused)
        self.upsampler = None if block.upsamplers is None else Conv(block.upsamplers[0].conv)

    def forward(self, hidden: Tensor, skips: list[Tensor], step: Step, level: int) -> Tensor:
        for layer in self.layers:
            hidden = layer(torch.cat([hidden, skips.pop()], dim=1), step, level)
        if self.upsampler is not None:
            # To the size that the next block's skips have, which an odd size had been halved from.
            hidden = functional.interpolate(hidden, size=skips[-1].shape[2:], mode="nearest")
            hidden = self.upsampler(hidden, step.level(level - 1))
        return hidden
