"""CLAP's log-mel features in plain PyTorch, batched, on any device."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

_FLOOR: Final = 1e-10  # of the mel power: -100 dB


@dataclass(frozen=True)
class ClapFrontEnd:
    """The parameters of a `ClapFeatureExtractor`; the tensors are float32 on the scorer's device."""

    sampling_rate: int
    window_samples: int  # what CLAP hears at once
    hop_length: int
    padding: str  # what follows shorter audio: repeatpad, repeat or pad
    window: Tensor  # [fft size]
    mel_filters: Tensor  # [fft size / 2 + 1, mel bands]


def clap_front_end(extractor: Any, device: torch.device) -> ClapFrontEnd:
    """Reads the parameters from a `ClapFeatureExtractor`, except `top_db`, which the extractor itself never uses.

    Raises ValueError for feature fusion, which needs a model that no AudioLDM 2 checkpoint has, and for an unknown
    padding.
    """
    if extractor.truncation != "rand_trunc":
        raise ValueError(f"truncation of the feature extractor: got {extractor.truncation!r} but expected 'rand_trunc'")
    if extractor.padding not in ("repeatpad", "repeat", "pad"):
        raise ValueError(
            f"padding of the feature extractor: got {extractor.padding!r} but expected repeatpad, repeat or pad"
        )
    return ClapFrontEnd(
        sampling_rate=extractor.sampling_rate,
        window_samples=extractor.nb_max_samples,
        hop_length=extractor.hop_length,
        padding=extractor.padding,
        window=torch.hann_window(extractor.fft_window_size, device=device),
        # Without fusion, the extractor takes the filters that librosa would make.
        mel_filters=torch.from_numpy(extractor.mel_filters_slaney).to(device, torch.float32),
    )


def audio_windows(waveforms: Tensor, front_end: ClapFrontEnd) -> Tensor:
    """Cuts waveforms `[M, S]` into consecutive windows `[M, K, window_samples]`; the last is aligned to the end.

    Shorter audio becomes one window, padded as the extractor does.
    """
    size, length = front_end.window_samples, waveforms.shape[-1]
    if length <= size:
        return _fill_up(waveforms, front_end)[:, None]
    starts = [*range(0, length - size, size), length - size]
    return torch.stack([waveforms[:, start : start + size] for start in starts], dim=1)


def _fill_up(waveforms: Tensor, front_end: ClapFrontEnd) -> Tensor:
    size, length = front_end.window_samples, waveforms.shape[-1]
    if front_end.padding == "repeat":
        return waveforms.repeat(1, size // length + 1)[:, :size]
    if front_end.padding == "repeatpad":
        waveforms = waveforms.repeat(1, size // length)
    return functional.pad(waveforms, (0, size - waveforms.shape[-1]))


def log_mel(windows: Tensor, front_end: ClapFrontEnd) -> Tensor:
    """Computes the mel power in dB, float32 `[M, 1, frames, bands]`, of float32 windows `[M, samples]`.

    As `transformers.audio_utils.spectrogram` with the extractor's arguments: a periodic Hann window, frames centred in
    the waveform reflected at its ends, power, mel filters, dB from a floor of -100.
    """
    spectrum = torch.stft(
        windows,
        n_fft=len(front_end.window),
        hop_length=front_end.hop_length,
        window=front_end.window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2)
    return (10 * (power @ front_end.mel_filters).clamp(min=_FLOOR).log10())[:, None]
