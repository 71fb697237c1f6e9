"""Runs one long clip through the VAE's decoder, layer by layer, and each layer chunk by chunk along time.

The result equals the decoder's for the whole clip, except for rounding:

* a convolution sees one frame of each neighbouring chunk, and zeros beyond the clip's ends;
* the statistics of group normalisation are those of the whole clip, merged from the chunks' before it is applied;
* self-attention in the middle block looks at all positions, with the queries of one chunk at a time. PyTorch's fused
  kernels, on a CPU too, never store the scores; if no fused kernel applies, those of one chunk are stored, not the
  square of the clip.

**Memory.** A layer frees each chunk that it has read for the last time, and what it needs besides its input and output
does not grow with the clip. The peak is in the first residual block of the last resolution: its input and half as much
again. At the official widths (128, 256, 512) that is 96 Ki numbers per latent frame, at 25 frames per second: 9.4 MiB
per second of audio in float32, half of that in float16. What `between_chunks` needs comes on top.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from vae_walk import walk

CHUNK_FRAMES: Final = 128
"""Latent frames of a chunk, 5.12 s; the last one may be shorter."""

Chunks: TypeAlias = deque[Tensor]
"""An activation of one clip, [1, channels, frames of a chunk, width] each. A function that takes it empties it."""


def decode_chunked(
    vae: Any, latents: Tensor, chunk_frames: int = CHUNK_FRAMES, between_chunks: Callable[[], None] = lambda: None
) -> Tensor:
    """Computes `vae.decode`.

    Args:
        vae: an `AutoencoderKL` that `check_followed` accepts.
        latents: `[1, channels, frames, width]`, divided by the scaling factor.
        between_chunks: called before each chunk, in each layer.

    Returns:
        `[1, out channels, frames * scale, width * scale]`.
    """
    return torch.cat([*walk(_ChunkedLayers(between_chunks), vae, deque(latents.split(chunk_frames, dim=2)))], dim=2)


class _ChunkedLayers:
    """Implements `Layers` for `Chunks`."""

    def __init__(self, between_chunks: Callable[[], None]) -> None:
        self._between_chunks = between_chunks

    def convolve(self, convolution: Any, hidden: Chunks) -> Chunks:
        return deque(self._convolved(convolution, hidden, lambda window: window))

    def resnet(self, resnet: Any, hidden: Chunks) -> Chunks:
        # On a copy of the deque, because the chunks are read once more, for the shortcut.
        inner = deque(self._convolved(resnet.conv1, deque(hidden), _normed(resnet.norm1, resnet.nonlinearity, hidden)))
        outer = self._convolved(resnet.conv2, inner, _normed(resnet.norm2, resnet.nonlinearity, inner))
        output: Chunks = deque()
        for residual in outer:
            chunk = hidden.popleft()
            shortcut = chunk if resnet.conv_shortcut is None else resnet.conv_shortcut(chunk)
            output.append((shortcut + residual) / resnet.output_scale_factor)
        return output

    def attend(self, attention: Any, hidden: Chunks) -> Chunks:
        normed = _normed(attention.group_norm, lambda chunk: chunk, hidden)

        def project(layer: Any, chunk: Tensor) -> Tensor:
            """`[1, positions, channels]`; a position is its frame times the width, plus its column."""
            projected: Tensor = layer(normed(chunk).flatten(2).transpose(1, 2))
            return projected

        def split(states: Tensor) -> Tensor:
            return states.unflatten(2, (attention.heads, -1)).transpose(1, 2)

        key, value = (
            split(torch.cat([project(layer, chunk) for chunk in hidden], dim=1))
            for layer in (attention.to_k, attention.to_v)
        )
        output: Chunks = deque()
        while hidden:
            self._between_chunks()
            chunk = hidden.popleft()
            attended = functional.scaled_dot_product_attention(split(project(attention.to_q, chunk)), key, value)
            projected = attention.to_out[0](attended.transpose(1, 2).flatten(2))
            residual = projected.transpose(1, 2).unflatten(2, chunk.shape[2:])
            output.append((residual + chunk) / attention.rescale_output_factor)
        return output

    def upsample(self, upsampler: Any, hidden: Chunks) -> Chunks:
        def double(window: Tensor) -> Tensor:
            return functional.interpolate(window, scale_factor=2.0, mode="nearest")

        return deque(self._convolved(upsampler.conv, hidden, double, scale=2))

    def finish(self, norm: Any, activation: Any, convolution: Any, hidden: Chunks) -> Chunks:
        return deque(self._convolved(convolution, hidden, _normed(norm, activation, hidden)))

    def _convolved(
        self, convolution: Any, hidden: Chunks, prepare: Callable[[Tensor], Tensor], scale: int = 1
    ) -> Iterator[Tensor]:
        """Convolves the prepared chunks as if they were one clip; empties `hidden` as it goes.

        Args:
            convolution: a `Conv2d` that keeps the size, with one or three frames in its kernel.
            prepare: maps a slice [1, channels, frames, width] frame by frame, to `scale` frames each.
        """
        reach = convolution.kernel_size[0] // 2
        before: Tensor | None = None
        while hidden:
            self._between_chunks()
            chunk = hidden.popleft()
            after = hidden[0][:, :, :reach] if hidden else None
            window = prepare(torch.cat([part for part in (before, chunk, after) if part is not None], dim=2))
            # Crop the prepared neighbour frames to what the kernel reaches; beyond the clip's ends pad with zeros.
            first, last = (0 if side is None else side.shape[2] * (scale - 1) for side in (before, after))
            window = window[:, :, first : window.shape[2] - last]
            padding = [reach if side is None else 0 for side in (before, after)]
            if any(padding):
                window = functional.pad(window, (0, 0, *padding))
            before = chunk[:, :, chunk.shape[2] - reach :].clone()
            del chunk, after
            yield functional.conv2d(window, convolution.weight, convolution.bias, padding=(0, convolution.padding[1]))


def _normed(norm: Any, activation: Callable[[Tensor], Tensor], hidden: Chunks) -> Callable[[Tensor], Tensor]:
    """Returns group normalisation with the whole clip's statistics, then the activation, as a function of any part."""
    groups, wide = norm.num_groups, torch.promote_types(hidden[0].dtype, torch.float32)
    statistics = [
        torch.var_mean(chunk.to(wide).unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0) for chunk in hidden
    ]
    variances, means = (torch.stack(parts).double() for parts in zip(*statistics, strict=True))
    # Each chunk is weighted by its frames; squares are about the clip's mean (Chan, Golub and LeVeque, 1983).
    frames = torch.tensor([chunk.shape[2] for chunk in hidden], device=means.device, dtype=torch.float64)
    share = (frames / frames.sum())[:, None, None]
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    scale = torch.rsqrt(variance + norm.eps).view(groups, 1) * norm.weight.view(groups, -1)
    shift = norm.bias.view(groups, -1) - mean.view(groups, 1) * scale
    scale, shift = (values.to(wide).view(1, -1, 1, 1) for values in (scale, shift))

    def apply(part: Tensor) -> Tensor:
        return activation(torch.addcmul(shift, part.to(wide), scale).to(part.dtype))

    return apply
