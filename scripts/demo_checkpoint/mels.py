"""The log-mel spectrograms that the VAE and the vocoder of the demo checkpoint speak."""

from functools import cache
from typing import Final

import torch
from torch import Tensor

from .signals import SAMPLING_RATE

BINS: Final = 64
HOP: Final = 160  # samples: 10 ms
_WINDOW: Final = 1024  # samples
_FLOOR: Final = 1e-5
# To about zero mean and unit variance over the library; a checkpoint is free to choose its units.
_MEAN, _STD = -6.0, 3.0


def log_mel(waveforms: Tensor) -> Tensor:
    """Standardised log-mel spectrograms [clips, samples // HOP, BINS] of waveforms [clips, samples], float32."""
    pad = (_WINDOW - HOP) // 2
    padded = torch.nn.functional.pad(waveforms.unsqueeze(1), (pad, pad), mode="reflect").squeeze(1)
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(padded, _WINDOW, HOP, window=window, center=False, return_complex=True).abs()
    mels = (_filters() @ spectrum).clamp(min=_FLOOR).log()
    return ((mels - _MEAN) / _STD).transpose(1, 2)


@cache
def _filters() -> Tensor:
    """Triangles [BINS, frequencies] of unit area on the mel scale of O'Shaughnessy, 2595 log10(1 + f / 700)."""
    top = 2595 * torch.log10(torch.tensor(1 + SAMPLING_RATE / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, float(top), BINS + 2) / 2595) - 1)
    frequencies = torch.linspace(0, SAMPLING_RATE / 2, _WINDOW // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None] * 100
