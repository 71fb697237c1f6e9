"""Resampling in plain PyTorch, on any device, as librosa does it with its defaults."""

from functools import lru_cache
from math import ceil, floor, gcd
from typing import Final

import torch
from torch import Tensor

# The low-pass filter of soxr's quality "HQ" (librosa's `soxr_hq`) is a sinc in a Kaiser window. These three reproduce
# the impulse response of soxr 1.1.0 from 16 to 48 kHz to 1e-7 of its peak: 0 dB up to 0.91 of the lower of the two
# Nyquist frequencies, -6 dB at `_CUTOFF`, below -130 dB from the Nyquist frequency on. For other ratios soxr splits the
# work into stages, whose slope between 0.91 and 1 differs a little.
_CUTOFF: Final = 0.956872  # of the lower Nyquist frequency
_KAISER_BETA: Final = 13.04003
_HALF_WIDTH: Final = 290.5 / 3  # samples at the lower rate


def resample(waveforms: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited resampling of `[M, S]` to `[M, ceil(S * new_rate / rate)]`, as `librosa.resample` of each row.

    The filter is applied to the spectrum of the whole waveform, padded so that nothing wraps around: the same linear
    convolution as in the time domain, without the images (-130 dB) that its stopband lets through. A convolution on a
    GPU may round to TF32, which is loud in CLAP's bands above the old Nyquist frequency; Fourier transforms do not.

    Args:
        waveforms: float32 or float64, of one length.
        rate, new_rate: Hz.

    Returns:
        The dtype and the device of `waveforms`.
    """
    if rate == new_rate:
        return waveforms
    length = ceil(waveforms.shape[-1] * new_rate / rate)
    common = gcd(rate, new_rate)
    # A size that is fast to transform, times the smallest one that is a whole number of samples at both rates.
    unit, new_unit = rate // common, new_rate // common
    tail = ceil(_HALF_WIDTH * max(1.0, rate / new_rate)) + 1
    blocks = _fast_size(ceil((waveforms.shape[-1] + tail) / unit))
    response = _filter_response(rate, new_rate, blocks, waveforms.dtype, waveforms.device)
    spectrum = torch.fft.rfft(waveforms, n=blocks * unit)[..., : len(response)] * response
    return torch.fft.irfft(spectrum, n=blocks * new_unit)[..., :length]


def _fast_size(at_least: int) -> int:
    """The smallest power of two, times 1, 3, 5, 9 or 15 (which fill the gaps between them)."""
    return min(odd * 2 ** (ceil(at_least / odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


@lru_cache(maxsize=16)
def _filter_response(rate: int, new_rate: int, blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gain `[bins]` at the frequencies of a transform over `blocks` of `resample`'s units, as far as both rates go.

    It contains the ratio of the rates, by which the inverse transform divides too much.
    """
    size, new_size = (blocks * each // gcd(rate, new_rate) for each in (rate, new_rate))
    step = max(rate, new_rate) / min(rate, new_rate)
    half_width = _HALF_WIDTH * step
    offsets = torch.arange(floor(half_width) + 1, dtype=torch.float64)
    window = torch.special.i0(_KAISER_BETA * (1 - (offsets / half_width).square()).sqrt())
    window /= torch.special.i0(torch.tensor(_KAISER_BETA, dtype=torch.float64))
    half = torch.sinc(offsets * _CUTOFF / step) * window * (_CUTOFF / step)
    # Centred at zero, and symmetric, so that the spectrum is real: no delay.
    taps = torch.zeros(max(size, new_size), dtype=torch.float64)
    taps[: len(half)] = half
    taps[1 - len(half) :] += half[1:].flip(0)
    response = torch.fft.rfft(taps).real[: min(size, new_size) // 2 + 1] * (new_size / size)
    return response.to(device, dtype)
