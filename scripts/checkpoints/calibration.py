"""Adjusts random weights to what they are fed with: an audible vocoder, a CLAP that tells waveforms apart."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode()
def decode_noise(vae: Any, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Mels [clips, 4 * frames, bins] of random latents, for the `shape` (clips, latent frames, bins)."""
    clips, frames, bins = shape
    compression = 2 ** (len(vae.config.block_out_channels) - 1)
    size = (clips, vae.config.latent_channels, frames, bins // compression)
    latents = torch.randn(size, generator=generator)
    mels: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return mels.squeeze(1)


@torch.no_grad()
def scale_waveform(vocoder: Any, mels: Tensor, peak: float) -> Tensor:
    """Rescales the vocoder so that the waveforms of `mels` [clips, frames, bins] peak at about `peak`; returns them."""
    heights: list[float] = []
    handle = vocoder.conv_post.register_forward_hook(lambda _, __, output: heights.append(output.abs().max().item()))
    vocoder(mels)
    handle.remove()
    factor = _rounded(torch.atanh(torch.tensor(peak)).item() / heights[0])
    vocoder.conv_post.weight.mul_(factor)
    vocoder.conv_post.bias.mul_(factor)
    waveforms: Tensor = vocoder(mels)
    return waveforms


def centre_clap(clap: Any, waveforms: Tensor, sampling_rate: int, extractor: Any, tokens: Any) -> None:
    pass


def _rounded(number: float) -> float:
    """To three digits, so that the last bits, which depend on the machine, do not get into the weights."""
    return float(f"{number:.3g}")
