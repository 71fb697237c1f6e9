"""The layers of the lean UNet: those of diffusers, with the inputs that no step changes taken from outside.

A layer keeps the parameters of the diffusers module that it is made from; `FusedInputs` collects those that are fused.
A sum is made in place, in the tensor that a layer has just created: the memory of another one costs more than the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from audioldm2_triton.server.linear import linear
from audioldm2_triton.server.own_kernels import kernels_for
from unet.length_masks import LengthMasks, LevelMasks, masked_group_norm

SMALL: Final = 2**17
"""Values up to which copying them takes less than the additional calls of a norm in two passes."""


@dataclass(frozen=True)
class TextKeys:
    """Cross-attention's keys and values of a batch, of all attentions side by side. Computed once, used at every step.

    K0 and K1 are twice the widths of all attentions of the stream.
    """

    states: Tensor  # [U, T, K0] of GPT-2's states
    states_1: Tensor  # [U, L, K1] of T5's states
    bias_1: Tensor  # [U, 1, 1, L] added to the scores of T5's tokens


@dataclass(frozen=True)
class Step:
    """The input that all blocks of one forward share."""

    time_biases: Tensor
    text: TextKeys
    masks: LengthMasks | None

    def level(self, level: int) -> LevelMasks | None:
        return None if self.masks is None else self.masks.levels[level]


class FusedInputs:
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


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


class Conv(nn.Module):
    """A convolution that reads zeros on padded frames."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden: Tensor, masks: LevelMasks | None) -> Tensor:
        if masks is not None:
            hidden = hidden.clone().masked_fill_(masks.padding, 0)  # keeps the layout, which `masked_fill` does not
        output: Tensor = self.conv(hidden)
        return output


class Pointwise(nn.Module):
    """A 1x1 convolution or a linear layer, of `[..., channels]`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = frozen(layer.weight.flatten(1))
        self.bias = None if layer.bias is None else frozen(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)


class GroupNorm(nn.Module):
    """Group normalisation over the valid frames, and SiLU where asked for; with masks, the padded ones become zeros."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor, masks: LevelMasks | None, activate: bool = False) -> Tensor:
        norm = self.norm
        kernels = kernels_for(hidden)
        if kernels is not None:
            valid = None if masks is None else masks.positions.flatten()
            return kernels.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps, activate, valid)
        normed: Tensor
        if masks is not None:
            normed = masked_group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps, masks)
        elif hidden.device.type == "cpu" and not hidden.is_contiguous() and not torch.compiler.is_compiling():
            normed = _channels_last_norm(hidden, norm)
        else:
            normed = norm(hidden)
        return functional.silu(normed, inplace=True) if activate else normed


def _channels_last_norm(hidden: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalisation of a channels-last tensor on a CPU, as exact as that of a contiguous one.

    PyTorch's kernel for channels-last takes the variance from one pass, as the mean of the squares minus the square of
    the mean. That loses the digits that the two have in common, and more by adding up many values one by one. Here the
    mean comes first, then the squares of the distances to it. A small tensor is copied for PyTorch's contiguous kernel,
    which has two passes as well: that is fewer calls. Half precision loses nothing: the kernel computes it in float32.
    CUDA's kernels and compiled code have no such pass.
    """
    if torch.finfo(hidden.dtype).bits < 32:
        half: Tensor = norm(hidden)
        return half
    if hidden.numel() <= SMALL:
        small: Tensor = norm(hidden.contiguous())
        return small.contiguous(memory_format=torch.channels_last)
    each = hidden.shape[1] // norm.num_groups

    def group_means(values: Tensor) -> Tensor:
        means = values.mean((2, 3)).unflatten(1, (-1, each)).mean(2)
        return means.repeat_interleave(each, 1)[:, :, None, None]

    centred = hidden - group_means(hidden)
    scale = torch.rsqrt(group_means(centred.square()) + norm.eps) * norm.weight.view(1, -1, 1, 1)
    return torch.addcmul(norm.bias.view(1, -1, 1, 1), centred, scale, out=centred)


class Resnet(nn.Module):
    def __init__(self, resnet: Any, fused: FusedInputs) -> None:
        super().__init__()
        self.norm1 = GroupNorm(resnet.norm1)
        self.conv1 = resnet.conv1
        self.norm2 = GroupNorm(resnet.norm2)
        self.conv2 = resnet.conv2
        self.shortcut = None if resnet.conv_shortcut is None else Pointwise(resnet.conv_shortcut)
        self.time = fused.add_time(resnet.time_emb_proj)

    def forward(self, hidden: Tensor, step: Step, level: int) -> Tensor:
        masks = step.level(level)
        # The norms zero the padding, and the activation keeps it so, before each convolution.
        inner = self.conv1(self.norm1(hidden, masks, activate=True))
        inner += step.time_biases[:, self.time, None, None]
        inner = self.conv2(self.norm2(inner, masks, activate=True))
        if self.shortcut is not None:
            hidden = self.shortcut(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        output: Tensor = inner.add_(hidden)
        return output


class SelfAttention(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.heads
        weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        self.to_qkv = frozen(torch.cat(weights))
        self.to_out = Pointwise(attention.to_out[0])

    def forward(self, hidden: Tensor, step: Step, level: int) -> Tensor:
        masks = step.level(level)
        query, key, value = linear(hidden, self.to_qkv).chunk(3, dim=-1)
        return attend(self, query, key, value, None if masks is None else masks.keys)


class CrossAttention(nn.Module):
    def __init__(self, attention: Any, stream: int, fused: FusedInputs) -> None:
        super().__init__()
        self.heads: int = attention.heads
        self.stream = stream
        self.to_q = Pointwise(attention.to_q)
        self.to_out = Pointwise(attention.to_out[0])
        self.keys_and_values = fused.add_text(stream, attention)

    def forward(self, hidden: Tensor, step: Step, level: int) -> Tensor:  # noqa: ARG002 - as self-attention
        text = step.text
        states, bias = (text.states, None) if self.stream == 0 else (text.states_1, text.bias_1)
        key, value = states[..., self.keys_and_values].chunk(2, dim=-1)
        return attend(self, self.to_q(hidden), key, value, bias)


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention of `[U, positions, heads * width]`, and the output's projection."""

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=bias)
    output: Tensor = attention.to_out(attended.transpose(1, 2).flatten(2))
    return output


class TransformerBlock(nn.Module):
    def __init__(self, block: Any, stream: int, fused: FusedInputs) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn1 = SelfAttention(block.attn1)
        self.norm2 = block.norm2
        # Where a block has no text, its second attention is another self-attention.
        is_cross = block.attn2.is_cross_attention
        self.attn2 = CrossAttention(block.attn2, stream, fused) if is_cross else SelfAttention(block.attn2)
        self.norm3 = block.norm3
        self.ff_in = Pointwise(block.ff.net[0].proj)
        self.ff_out = Pointwise(block.ff.net[2])

    def forward(self, hidden: Tensor, step: Step, level: int) -> Tensor:
        hidden = self.attn1(self.norm1(hidden), step, level).add_(hidden)
        hidden = self.attn2(self.norm2(hidden), step, level).add_(hidden)
        output: Tensor = self.ff_out(_gated_gelu(self.ff_in(self.norm3(hidden)))).add_(hidden)
        return output


def _gated_gelu(hidden: Tensor) -> Tensor:
    kernels = kernels_for(hidden)
    if kernels is not None:
        return kernels.gated_gelu(hidden)
    value, gate = hidden.chunk(2, dim=-1)
    return functional.gelu(gate).mul_(value)


class Transformer(nn.Module):
    def __init__(self, transformer: Any, stream: int, fused: FusedInputs) -> None:
        super().__init__()
        self.norm = GroupNorm(transformer.norm)
        self.proj_in = Pointwise(transformer.proj_in)
        blocks = transformer.transformer_blocks
        self.blocks = nn.ModuleList(TransformerBlock(block, stream, fused) for block in blocks)
        self.proj_out = Pointwise(transformer.proj_out)

    def forward(self, hidden: Tensor, step: Step, level: int) -> Tensor:
        rows, _, frames, width = hidden.shape
        inner = self.norm(hidden, step.level(level)).permute(0, 2, 3, 1).flatten(1, 2)
        inner = self.proj_in(inner)
        for block in self.blocks:
            inner = block(inner, step, level)
        inner = self.proj_out(inner).view(rows, frames, width, -1).permute(0, 3, 1, 2)
        output: Tensor = inner.add_(hidden)
        return output


class Layer(nn.Module):
    """A residual block and the transformers behind it; the first two read GPT-2's states, where they read any."""

    def __init__(self, resnet: Any, attentions: Sequence[Any], fused: FusedInputs) -> None:
        super().__init__()
        self.resnet = Resnet(resnet, fused)
        self.transformers = nn.ModuleList(
            Transformer(transformer, 0 if index <= 1 else 1, fused) for index, transformer in enumerate(attentions)
        )

    def forward(self, hidden: Tensor, step: Step, level: int) -> Tensor:
        hidden = self.resnet(hidden, step, level)
        for transformer in self.transformers:
            hidden = transformer(hidden, step, level)
        return hidden


def layers_of(block: Any, fused: FusedInputs) -> nn.ModuleList:
    """The layers of a block of diffusers; the last of a middle block has no transformers."""
    attentions = list(getattr(block, "attentions", ()))
    per_layer = len(getattr(block, "cross_attention_dim", ()))
    return nn.ModuleList(
        Layer(resnet, attentions[index * per_layer : (index + 1) * per_layer], fused)
        for index, resnet in enumerate(block.resnets)
    )
