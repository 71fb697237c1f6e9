"""How much the spectrum of a sound changes from one moment to the next, and whether more so at given places."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from sound_quality.bootstrap import mean_with_interval

HOP_IN_S: Final = 0.01
_FRAME_IN_S: Final = 0.032
_RANGE_IN_DB: Final = 80.0  # below the clip's peak nothing is told apart

Stretch = tuple[float, float]
"""From and to which second."""


@dataclass(frozen=True)
class SeamFlux:
    """The largest flux of each seam against that of equal stretches on both sides of it, in dB."""

    at_seams: float  # mean
    beside: float  # mean
    share: float  # of the pairs of a seam and its neighbour, where the seam has more; 0.5 if there is nothing to find
    pairs: int
    by_clip: tuple[float, ...]  # `at_seams` of each clip

    @property
    def ratio(self) -> float:
        return self.at_seams / self.beside


def spectral_flux(audio: np.ndarray, sampling_rate: int, scale_in_s: float) -> np.ndarray:
    """The mean change of the spectrum's level at every 10 ms of audio [S], in dB; NaN where too little is around.

    Args:
        scale_in_s: how long the stretches before and after are that are compared. Short ones find clicks, long ones
            changes of character.
    """
    size, hop = round(_FRAME_IN_S * sampling_rate), round(HOP_IN_S * sampling_rate)
    padded = np.pad(audio.astype(np.float64), (size // 2, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[: len(audio) + 1 : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    level = 10 * np.log10(np.maximum(power, power.max() * 10 ** (-_RANGE_IN_DB / 10) + 1e-30))
    count = max(1, round(scale_in_s / HOP_IN_S))
    summed = np.cumsum(np.concatenate([np.zeros((1, level.shape[1])), level]), axis=0)
    means = (summed[count:] - summed[:-count]) / count
    flux = np.full(len(level), np.nan)
    changes = np.abs(means[count:] - means[:-count]).mean(axis=1)
    flux[count : count + len(changes)] = changes
    return flux


def seam_flux(
    clips: Sequence[np.ndarray],
    sampling_rate: int,
    scale_in_s: float,
    seams: Sequence[Stretch],
    between: Sequence[Stretch],
) -> SeamFlux:
    """The flux of clips [S] at seams.

    Args:
        between: the stretches without a seam, one before, between and after all seams, as long as the seams.

    Raises `ValueError` for another number of them, and for a stretch without any flux.
    """
    if len(between) != len(seams) + 1:
        raise ValueError(f"between: got {len(between)} stretches but expected {len(seams) + 1}, one more than seams")
    at, beside, by_clip = [], [], []
    for clip in clips:
        flux = spectral_flux(clip, sampling_rate, scale_in_s)
        peaks, others = ([_peak(flux, stretch) for stretch in stretches] for stretches in (seams, between))
        by_clip.append(float(np.mean(peaks)))
        at += [peak for peak in peaks for _ in range(2)]
        beside += [other for pair in pairwise(others) for other in pair]
    more = [float(a > b) + 0.5 * (a == b) for a, b in zip(at, beside, strict=True)]
    return SeamFlux(float(np.mean(at)), float(np.mean(beside)), float(np.mean(more)), len(more), tuple(by_clip))


def flux_difference(ours: SeamFlux, theirs: SeamFlux) -> tuple[float, float, float]:
    """How much more flux there is at the seams of the same clips made in another way, in dB.

    Returns the mean over the clips and its 95 % confidence interval.
    """
    return mean_with_interval(np.array(ours.by_clip) - np.array(theirs.by_clip))


def _peak(flux: np.ndarray, stretch: Stretch) -> float:
    first, stop = (round(second / HOP_IN_S) for second in stretch)
    part = flux[max(0, first) : stop + 1]
    if not np.isfinite(part).any():
        raise ValueError(f"seams: got {stretch} s but expected a stretch of the clip")
    return float(np.nanmax(part))
