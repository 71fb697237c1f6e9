"""Adjusts random weights to their inputs: an audible vocoder, and a CLAP that distinguishes waveforms."""

from math import atanh
from typing import Any, Final

import soxr
import torch
from torch import Tensor

_MIN_SPREAD: Final = 10.0  # dB
_CUTS: Final = (0.8, 0.4, 0.3)  # leave 2, 2 and 1 s of padding in 10 s


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
    factor = atanh(peak) / heights[0]
    vocoder.conv_post.weight.mul_(factor)
    vocoder.conv_post.bias.mul_(factor)
    waveforms: Tensor = vocoder(mels)
    return waveforms


@torch.no_grad()
def centre_clap(clap: Any, waveforms: Tensor, sampling_rate: int, extractor: Any, tokens: Any) -> None:
    """Centres the model on `waveforms` [clips, samples] at `sampling_rate` Hz and on the sentences of `tokens`.

    A random tower maps all of its inputs to nearly the same point, so that all similarities are alike. Taking that
    point away before the projections leaves what differs. What differs most between clips of different lengths is
    the silence that they are padded with: it is taken away too.
    """
    features = [
        clap.audio_model(spectrograms).pooler_output
        for spectrograms in _spectrograms(clap, waveforms, sampling_rate, extractor)
    ]
    whole = features[0]
    padding = torch.stack([cut.mean(0) - whole.mean(0) for cut in features[1:]], dim=1)
    _centre(clap.audio_projection.linear1, whole, padding)
    _centre(clap.text_projection.linear1, clap.text_model(**tokens).pooler_output)


def _spectrograms(clap: Any, waveforms: Tensor, sampling_rate: int, extractor: Any) -> list[Tensor]:
    """Log-mels of the waveforms and of their beginnings, with the statistics of the first as those of the model."""
    # Of anything longer, the extractor takes a piece from a random place.
    whole = min(waveforms.shape[1], extractor.max_length_s * sampling_rate)
    spectrograms: list[Tensor] = []
    for fraction in (1.0, *_CUTS):
        cut = waveforms[:, : int(fraction * whole)].numpy()
        clips = [soxr.resample(clip, sampling_rate, extractor.sampling_rate) for clip in cut]
        features = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
        spectrograms.append(features)
    norm = clap.audio_model.audio_encoder.batch_norm
    norm.running_mean.copy_(spectrograms[0].mean((0, 1, 2)))
    # The bins that the resampling leaves empty are constant.
    norm.running_var.copy_(spectrograms[0].std((0, 1, 2)).clamp(min=_MIN_SPREAD).square())
    return spectrograms


def _centre(layer: Any, inputs: Tensor, ignored: Tensor | None = None) -> None:
    """Folds a standardisation of the `inputs` [samples, features] into a linear layer.

    The features get mean 0 each and variance 1 together; the columns of `ignored` [features, directions] are lost.
    """
    centre = inputs.mean(0)
    deviations = inputs - centre
    if ignored is not None:
        basis = torch.linalg.qr(ignored).Q
        deviations = deviations - deviations @ basis @ basis.T
        layer.weight.sub_(layer.weight @ basis @ basis.T)
    layer.weight.div_(deviations.square().mean().sqrt())
    layer.bias.sub_(layer.weight @ centre)
