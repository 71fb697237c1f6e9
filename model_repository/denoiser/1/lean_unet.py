"""The UNet of AudioLDM 2 as a step needs it: the same function, with everything left out that no step changes.

`diffusers.AudioLDM2UNet2DConditionModel` is the reference. What is done differently here, each exact up to rounding:

* the keys and values of the text come from outside: they are the same at every step, so they are computed once, with
  one product for all attentions of a stream;
* so do the time embeddings' projections, which depend on the timestep alone and come from a table;
* queries, keys and values of self-attention are one product, and 1x1 convolutions are matrix products;
* rows may have different lengths, by the masks of `length_masks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from length_masks import LengthMasks, LevelMasks, length_masks, masked_group_norm

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


@dataclass(frozen=True)
class TextKeys:
    """Cross-attention's keys and values of a batch, of all attentions side by side. Computed once, used at every step.

    K0 and K1 are twice the widths of all attentions of the stream.
    """

    states: Tensor  # [U, T, K0] of GPT-2's states
    states_1: Tensor  # [U, L, K1] of T5's states
    bias_1: Tensor  # [U, 1, 1, L] added to the scores of T5's tokens


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
        fused = _FusedInputs()
        self.conv_in = _Conv(model.conv_in)
        self.down_blocks = nn.ModuleList(_DownBlock(block, fused) for block in model.down_blocks)
        self.mid_block = _MidBlock(model.mid_block, fused)
        self.up_blocks = nn.ModuleList(_UpBlock(block, fused) for block in model.up_blocks)
        self.conv_norm_out = _GroupNorm(model.conv_norm_out)
        self.conv_out = _Conv(model.conv_out)
        self.time_proj = model.time_proj
        self.time_embedding = model.time_embedding
        self.time_weight = _frozen(torch.cat([layer.weight for layer in fused.time_layers]))
        self.time_bias = _frozen(torch.cat([layer.bias for layer in fused.time_layers]))
        self.text_weights = nn.ParameterList(_frozen(torch.cat(weights)) for weights in fused.text_weights)
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
        """What the residual blocks add at each timestep.

        Args:
            timesteps: `[E]`, whole or not.

        Returns:
            `[E, channels of all residual blocks]` in the UNet's dtype.
        """
        embedding = self.time_embedding(self.time_proj(timesteps.to(self.device)).to(self.dtype))
        return functional.linear(functional.silu(embedding), self.time_weight, self.time_bias)

    def text_keys(
        self, encoder_hidden_states: Tensor, encoder_hidden_states_1: Tensor, encoder_attention_mask_1: Tensor
    ) -> TextKeys:
        """The keys and values of a batch of texts.

        Args:
            encoder_hidden_states: GPT-2 states `[U, T, D0]` in the UNet's dtype.
            encoder_hidden_states_1: T5 states `[U, L, D1]` in the UNet's dtype.
            encoder_attention_mask_1: `[U, L]`, 1 for a token to attend to.
        """
        bias = (1 - encoder_attention_mask_1.to(self.dtype)) * EXCLUDED
        return TextKeys(
            functional.linear(encoder_hidden_states, self.text_weights[0]),
            functional.linear(encoder_hidden_states_1, self.text_weights[1]),
            bias[:, None, None],
        )

    def forward(self, sample: Tensor, time_biases: Tensor, text: TextKeys, masks: LengthMasks | None) -> Tensor:
        """One forward, each row as the original UNet would give it alone.

        Args:
            sample: latents `[U, C, frames, width]`; with masks, anything at all on the padded frames.
            time_biases: `[U, channels of all residual blocks]`, each row's of its timestep.
            text: of these rows.
            masks: of these rows and this size, where their lengths differ.

        Returns:
            The model's output `[U, C, frames, width]`; with masks, zeros on the padded frames.
        """
        step = _Step(time_biases, text, masks)
        hidden = self.conv_in(sample.contiguous(memory_format=self.layout), step.level(0))
        skips = [hidden]
        for level, block in enumerate(self.down_blocks):
            hidden = block(hidden, skips, step, level)
        hidden = self.mid_block(hidden, step, self.levels - 1)
        for index, block in enumerate(self.up_blocks):
            hidden = block(hidden, skips, step, self.levels - 1 - index)
        # The norm zeroes the padding that the convolution reads.
        output: Tensor = self.conv_out(functional.silu(self.conv_norm_out(hidden, step.level(0))), None)
        return output if masks is None else output.masked_fill(masks.levels[0].padding, 0)


@dataclass(frozen=True)
class _Step:
    """What every block of one forward needs."""

    time_biases: Tensor
    text: TextKeys
    masks: LengthMasks | None

    def level(self, level: int) -> LevelMasks | None:
        return None if self.masks is None else self.masks.levels[level]


class _FusedInputs:
    """Collects the layers whose inputs no step changes; a block takes its slice of what they give together."""

    def __init__(self) -> None:
        self.time_layers: list[Any] = []
        self.text_weights: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add_time(self, layer: Any) -> slice:
        start = sum(other.out_features for other in self.time_layers)
        self.time_layers.append(layer)
        return slice(start, start + layer.out_features)

    def add_text(self, stream: int, attention: Any) -> slice:
        weights = self.text_weights[stream]
        start = sum(len(weight) for weight in weights)
        weights += [attention.to_k.weight, attention.to_v.weight]
        return slice(start, sum(len(weight) for weight in weights))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


class _Conv(nn.Module):
    """A convolution that reads zeros on padded frames."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden: Tensor, masks: LevelMasks | None) -> Tensor:
        if masks is not None:
            hidden = hidden.masked_fill(masks.padding, 0)
        output: Tensor = self.conv(hidden)
        return output


class _Pointwise(nn.Module):
    """A 1x1 convolution or a linear layer, of `[..., channels]`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = _frozen(layer.weight.flatten(1))
        self.bias = None if layer.bias is None else _frozen(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight, self.bias)


class _GroupNorm(nn.Module):
    """Group normalisation over the valid frames; with masks, the padded ones become zeros."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor, masks: LevelMasks | None) -> Tensor:
        norm = self.norm
        if masks is None:
            plain: Tensor = norm(hidden)
            return plain
        return masked_group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps, masks)


class _Resnet(nn.Module):
    def __init__(self, resnet: Any, fused: _FusedInputs) -> None:
        super().__init__()
        self.norm1 = _GroupNorm(resnet.norm1)
        self.conv1 = resnet.conv1
        self.norm2 = _GroupNorm(resnet.norm2)
        self.conv2 = resnet.conv2
        self.shortcut = None if resnet.conv_shortcut is None else _Pointwise(resnet.conv_shortcut)
        self.time = fused.add_time(resnet.time_emb_proj)

    def forward(self, hidden: Tensor, step: _Step, level: int) -> Tensor:
        masks = step.level(level)
        # The norms zero the padding, and the activation keeps it so, before each convolution.
        inner = self.conv1(functional.silu(self.norm1(hidden, masks)))
        inner = inner + step.time_biases[:, self.time, None, None]
        inner = self.conv2(functional.silu(self.norm2(inner, masks)))
        if self.shortcut is not None:
            hidden = self.shortcut(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        output: Tensor = hidden + inner
        return output


class _SelfAttention(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.heads
        weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        self.to_qkv = _frozen(torch.cat(weights))
        self.to_out = _Pointwise(attention.to_out[0])

    def forward(self, hidden: Tensor, step: _Step, level: int) -> Tensor:
        masks = step.level(level)
        query, key, value = functional.linear(hidden, self.to_qkv).chunk(3, dim=-1)
        return _attend(self, query, key, value, None if masks is None else masks.keys)


class _CrossAttention(nn.Module):
    def __init__(self, attention: Any, stream: int, fused: _FusedInputs) -> None:
        super().__init__()
        self.heads: int = attention.heads
        self.stream = stream
        self.to_q = _Pointwise(attention.to_q)
        self.to_out = _Pointwise(attention.to_out[0])
        self.keys_and_values = fused.add_text(stream, attention)

    def forward(self, hidden: Tensor, step: _Step, level: int) -> Tensor:  # noqa: ARG002 - as self-attention
        text = step.text
        states, bias = (text.states, None) if self.stream == 0 else (text.states_1, text.bias_1)
        key, value = states[..., self.keys_and_values].chunk(2, dim=-1)
        return _attend(self, self.to_q(hidden), key, value, bias)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention of `[U, positions, heads * width]`, and the output's projection."""

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=bias)
    output: Tensor = attention.to_out(attended.transpose(1, 2).flatten(2))
    return output


class _TransformerBlock(nn.Module):
    def __init__(self, block: Any, stream: int, fused: _FusedInputs) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn1 = _SelfAttention(block.attn1)
        self.norm2 = block.norm2
        # Where a block has no text, its second attention is another self-attention.
        is_cross = block.attn2.is_cross_attention
        self.attn2 = _CrossAttention(block.attn2, stream, fused) if is_cross else _SelfAttention(block.attn2)
        self.norm3 = block.norm3
        self.ff_in = _Pointwise(block.ff.net[0].proj)
        self.ff_out = _Pointwise(block.ff.net[2])

    def forward(self, hidden: Tensor, step: _Step, level: int) -> Tensor:
        hidden = hidden + self.attn1(self.norm1(hidden), step, level)
        hidden = hidden + self.attn2(self.norm2(hidden), step, level)
        value, gate = self.ff_in(self.norm3(hidden)).chunk(2, dim=-1)
        output: Tensor = hidden + self.ff_out(value * functional.gelu(gate))
        return output


class _Transformer(nn.Module):
    def __init__(self, transformer: Any, stream: int, fused: _FusedInputs) -> None:
        super().__init__()
        self.norm = _GroupNorm(transformer.norm)
        self.proj_in = _Pointwise(transformer.proj_in)
        blocks = transformer.transformer_blocks
        self.blocks = nn.ModuleList(_TransformerBlock(block, stream, fused) for block in blocks)
        self.proj_out = _Pointwise(transformer.proj_out)

    def forward(self, hidden: Tensor, step: _Step, level: int) -> Tensor:
        rows, _, frames, width = hidden.shape
        inner = self.norm(hidden, step.level(level)).permute(0, 2, 3, 1).flatten(1, 2)
        inner = self.proj_in(inner)
        for block in self.blocks:
            inner = block(inner, step, level)
        inner = self.proj_out(inner).view(rows, frames, width, -1).permute(0, 3, 1, 2)
        output: Tensor = inner + hidden
        return output


def _transformers(block: Any, fused: _FusedInputs) -> nn.ModuleList:
    """A block's transformers in order; the first two of each layer read GPT-2's states where they read any."""
    attentions = getattr(block, "attentions", [])
    per_layer = len(getattr(block, "cross_attention_dim", ())) or 1
    return nn.ModuleList(
        _Transformer(transformer, 0 if index % per_layer <= 1 else 1, fused)
        for index, transformer in enumerate(attentions)
    )


class _DownBlock(nn.Module):
    def __init__(self, block: Any, fused: _FusedInputs) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(resnet, fused) for resnet in block.resnets)
        self.transformers = _transformers(block, fused)
        self.downsampler = None if block.downsamplers is None else _Conv(block.downsamplers[0].conv)

    def forward(self, hidden: Tensor, skips: list[Tensor], step: _Step, level: int) -> Tensor:
        for layer, resnet in enumerate(self.resnets):
            hidden = resnet(hidden, step, level)
            hidden = _run(_of_layer(self.transformers, layer, len(self.resnets)), hidden, step, level)
            skips.append(hidden)
        if self.downsampler is not None:
            hidden = self.downsampler(hidden, step.level(level))
            skips.append(hidden)
        return hidden


class _MidBlock(nn.Module):
    def __init__(self, block: Any, fused: _FusedInputs) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(resnet, fused) for resnet in block.resnets)
        self.transformers = _transformers(block, fused)

    def forward(self, hidden: Tensor, step: _Step, level: int) -> Tensor:
        hidden = self.resnets[0](hidden, step, level)
        layers = len(self.resnets) - 1
        for layer in range(layers):
            hidden = _run(_of_layer(self.transformers, layer, layers), hidden, step, level)
            hidden = self.resnets[layer + 1](hidden, step, level)
        return hidden


class _UpBlock(nn.Module):
    def __init__(self, block: Any, fused: _FusedInputs) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(resnet, fused) for resnet in block.resnets)
        self.transformers = _transformers(block, fused)
        self.upsampler = None if block.upsamplers is None else _Conv(block.upsamplers[0].conv)

    def forward(self, hidden: Tensor, skips: list[Tensor], step: _Step, level: int) -> Tensor:
        for layer, resnet in enumerate(self.resnets):
            hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), step, level)
            hidden = _run(_of_layer(self.transformers, layer, len(self.resnets)), hidden, step, level)
        if self.upsampler is not None:
            # To the size that the next block's skips have, which an odd size had been halved from.
            hidden = functional.interpolate(hidden, size=skips[-1].shape[2:], mode="nearest")
            hidden = self.upsampler(hidden, step.level(level - 1))
        return hidden


def _of_layer(transformers: nn.ModuleList, layer: int, layers: int) -> list[nn.Module]:
    per_layer = len(transformers) // layers
    return list(transformers)[layer * per_layer : (layer + 1) * per_layer]


def _run(transformers: Sequence[nn.Module], hidden: Tensor, step: _Step, level: int) -> Tensor:
    for transformer in transformers:
        hidden = transformer(hidden, step, level)
    return hidden
