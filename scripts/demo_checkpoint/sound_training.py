"""Training of what makes waveforms: the VAE on mels, the vocoder on mels and waveforms."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from . import parts
from .corpus import Corpus, tensor
from .mels import BINS, HOP, log_mel
from .training import Draw, Plan, train

VAE_PLAN: Final = Plan(steps=6_000, learning_rate=1.5e-3, warmup=100)
VOCODER_PLAN: Final = Plan(steps=13_000, learning_rate=1e-3, warmup=100)
_VAE_BATCH: Final = 4
_VAE_CROP: Final = 128  # frames
_KL: Final = 0.004  # nats per latent, against the mean absolute error per bin
_VOCODER_BATCH: Final = 6
_VOCODER_CROP: Final = 48  # frames
# FFT sizes of the spectral loss; the hop is a quarter. None is finer in frequency than the frame rate of 100 Hz: the
# vocoder makes the same 10 ms again for the same mel, so a steady tone can only be had as multiples of 100 Hz, and a
# loss that sees the difference prefers silence.
_RESOLUTIONS: Final = (512, 256, 128, 64)
# Of the mean absolute error of the mels: it tells how loud each band is however high, as the distances do not.
_MEL_WEIGHT: Final = 0.5
_MEL_NOISE: Final = 0.1  # what the VAE leaves wrong
_HELD_OUT: Final = 16


def train_vae(corpus: Corpus, folder: Path, plan: Plan = VAE_PLAN) -> Any:
    """The KL autoencoder: mean absolute error of the mels plus a little divergence from the unit Gaussian."""

    def loss(model: Any, draw: Draw) -> Tensor:
        mels = _crops(corpus.mels, corpus.trained, _VAE_BATCH, _VAE_CROP, draw)
        posterior = model.encode(mels).latent_dist
        decoded = model.decode(posterior.sample(draw.torch)).sample
        divergence = posterior.kl().sum() / posterior.mean.numel()
        return (decoded - mels).abs().mean() + _KL * divergence

    whole = tensor(corpus.mels, range(corpus.trained, corpus.trained + _HELD_OUT)).unsqueeze(1)

    def held_out(model: Any) -> float:
        return float((model.decode(model.encode(whole).latent_dist.mode()).sample - whole).abs().mean())

    torch.manual_seed(0)
    return train("vae", parts.vae(), loss, held_out, plan, folder)


def train_vocoder(start: Any, corpus: Corpus, folder: Path, plan: Plan = VOCODER_PLAN) -> Any:
    """Trains the vocoder `start` by distances of mels and of spectra in several resolutions (Yamamoto et al., 2020)."""

    def loss(model: Any, draw: Draw) -> Tensor:
        mels, target = _pairs(corpus, _VOCODER_BATCH, draw)
        mels = mels + _MEL_NOISE * torch.rand((), generator=draw.torch) * torch.randn(mels.shape, generator=draw.torch)
        return _distance(model(mels), target)

    whole = tensor(corpus.mels, range(corpus.trained, corpus.trained + _HELD_OUT))
    waveforms = tensor(corpus.waveforms, range(corpus.trained, corpus.trained + _HELD_OUT))

    def held_out(model: Any) -> float:
        return float(_distance(model(whole), waveforms))

    return train("vocoder", start, loss, held_out, plan, folder)


def _crops(mels: np.ndarray, count: int, batch: int, frames: int, draw: Draw) -> Tensor:
    """Mels [batch, 1, frames, bins] from random sounds and places, starts on whole latent frames."""
    rows = []
    for index in draw.numpy.integers(count, size=batch):
        start = 4 * int(draw.numpy.integers((mels.shape[1] - frames) // 4 + 1))
        rows.append(mels[index, start : start + frames].astype(np.float32))
    return torch.from_numpy(np.stack(rows)).unsqueeze(1)


def _pairs(corpus: Corpus, batch: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mels [batch, frames, bins] and the waveforms [batch, samples] that they belong to."""
    mels = np.empty((batch, _VOCODER_CROP, BINS), np.float32)
    waveforms = np.empty((batch, _VOCODER_CROP * HOP), np.float32)
    for row, index in enumerate(draw.numpy.choice(corpus.trained, batch, p=corpus.shares)):
        start = int(draw.numpy.integers(corpus.mels.shape[1] - _VOCODER_CROP + 1))
        mels[row] = corpus.mels[index, start : start + _VOCODER_CROP]
        waveforms[row] = corpus.waveforms[index, start * HOP : (start + _VOCODER_CROP) * HOP]
    return torch.from_numpy(mels), torch.from_numpy(waveforms)


def _distance(waveforms: Tensor, targets: Tensor) -> Tensor:
    return _spectral_distance(waveforms, targets) + _MEL_WEIGHT * nn.functional.l1_loss(
        log_mel(waveforms), log_mel(targets)
    )


def _spectral_distance(waveforms: Tensor, targets: Tensor) -> Tensor:
    total = waveforms.new_zeros(())
    for size in _RESOLUTIONS:
        ours, theirs = _magnitudes(waveforms, size), _magnitudes(targets, size)
        # Of each clip by itself: the few bins of a tone count as much as the many of a noise.
        convergence = ((ours - theirs).square().sum((1, 2)) / theirs.square().sum((1, 2))).sqrt().mean()
        total = total + (convergence + 0.5 * nn.functional.l1_loss(ours.log(), theirs.log())) / len(_RESOLUTIONS)
    return total


def _magnitudes(waveforms: Tensor, size: int) -> Tensor:
    spectrum = torch.stft(waveforms, size, size // 4, window=torch.hann_window(size), return_complex=True)
    # Below the noise floor of the library there is nothing to learn.
    return (spectrum.real.square() + spectrum.imag.square() + 1e-4).sqrt()
