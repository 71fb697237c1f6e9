"""What can be measured of a sound without knowing what made it: spectrum, envelope, onsets, periodicity, pitch."""

import itertools
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.signal import find_peaks, stft

from demo_checkpoint.signals import SAMPLING_RATE

Array = NDArray[np.float64]

WINDOW: Final = 1024  # samples, 64 ms
HOP: Final = 160  # samples, 10 ms
FRAME_RATE: Final = SAMPLING_RATE / HOP
NUM_BANDS: Final = 24
_BAND_EDGES: Final = np.geomspace(40, SAMPLING_RATE / 2, NUM_BANDS + 1)  # Hz
_ENVELOPE_EDGES: Final = (0.0, 300.0, 1200.0, 3500.0, SAMPLING_RATE / 2)  # Hz
_MODULATION_EDGES: Final = (0.4, 1.0, 1.5, 2.2, 3.2, 4.6, 6.5, 9.0, 13.0, 20.0)  # Hz
_FLOOR: Final = 1e-5  # of the loudest: -50 dB, above what a vocoder adds
_MAX_GLIDE: Final = 0.5  # octaves per frame; what moves further is another sound
_PITCHES: Final = (40.0, 1000.0)  # Hz


def features(waveform: NDArray[np.float32]) -> Array:
    """The features of a waveform, float32 `[samples]` at 16 kHz and at least 0.3 s long, whatever its loudness."""
    frequencies, _, spectrum = stft(waveform, SAMPLING_RATE, nperseg=WINDOW, noverlap=WINDOW - HOP, boundary=None)
    power = np.abs(spectrum.astype(np.complex128)) ** 2
    power = power / max(float(power.sum(0).max()), 1e-20)
    return np.concatenate(
        [
            _bands(power, frequencies),
            _frames(power, frequencies),
            _envelopes(power, frequencies),
            _onsets(power),
            _glides(power, frequencies),
            _periodicity(waveform),
        ]
    )


def _bands(power: Array, frequencies: Array) -> Array:
    """Mean level and variation over time of each band, in dB."""
    edges = np.searchsorted(frequencies, _BAND_EDGES)
    bands = np.stack([power[low : max(high, low + 1)].sum(0) for low, high in itertools.pairwise(edges)])
    levels = 10 * np.log10(bands + _FLOOR)
    means = 10 * np.log10(bands.mean(1) / max(float(bands.mean(1).sum()), 1e-20) + _FLOOR)
    return np.concatenate([means, levels.std(1)])


def _frames(power: Array, frequencies: Array) -> Array:
    """Centroid, bandwidth, roll-off, flatness and prominence of the loudest bin: mean and deviation, by loudness."""
    heights = np.log2(np.maximum(frequencies, 40) / 40)[:, None]
    total = power.sum(0) + 1e-20
    centroid = (heights * power).sum(0) / total
    bandwidth = np.sqrt(((heights - centroid) ** 2 * power).sum(0) / total)
    rolloff = heights[np.argmax(np.cumsum(power, 0) >= 0.85 * total, 0), 0]
    flatness = np.log10(np.exp(np.log(power + 1e-12).mean(0)) / (power.mean(0) + 1e-12))
    prominence = power.max(0) / total
    weights = total / total.sum()
    rows = np.stack([centroid, bandwidth, rolloff, flatness, prominence])
    means = rows @ weights
    return np.concatenate([means, np.sqrt(np.maximum((rows - means[:, None]) ** 2 @ weights, 0))])


def _envelopes(power: Array, frequencies: Array) -> Array:
    """Depth and modulation spectrum of the loudness, of the whole and of four parts of the spectrum."""
    edges = np.searchsorted(frequencies, _ENVELOPE_EDGES)
    parts = [power.sum(0), *(power[low:high].sum(0) for low, high in itertools.pairwise(edges))]
    values: list[Array] = []
    for part in parts:
        envelope = np.sqrt(part + _FLOOR)
        modulation = np.abs(np.fft.rfft((envelope - envelope.mean()) * np.hanning(len(envelope)), 1024)) ** 2
        rates = np.fft.rfftfreq(1024, 1 / FRAME_RATE)
        shares = np.array(
            [modulation[(rates >= low) & (rates < high)].sum() for low, high in itertools.pairwise(_MODULATION_EDGES)]
        )
        values += [shares / (shares.sum() + 1e-9), np.array([envelope.std() / envelope.mean()])]
    return np.concatenate(values)


def _onsets(power: Array) -> Array:
    """Onsets per second, plain and strong ones, and the rate and strength of the rhythm that they make."""
    levels = 10 * np.log10(power + _FLOOR)
    flux = np.maximum(levels[:, 1:] - levels[:, :-1], 0).mean(0)
    duration = len(flux) / FRAME_RATE
    height = max(float(flux.max()), 1e-9)
    counts = [len(find_peaks(flux, share * height, distance=5)[0]) / duration for share in (0.3, 0.6)]
    centred = flux - flux.mean()
    correlation = np.correlate(centred, centred, "full")[len(centred) - 1 :]
    correlation = correlation / max(float(correlation[0]), 1e-12)
    lags = slice(8, min(100, len(correlation)))  # 12.5 to 1 per second
    best = int(np.argmax(correlation[lags])) + 8
    return np.array([*counts, FRAME_RATE / best, correlation[best], float(flux.max() / (flux.mean() + 1e-9))])


def _glides(power: Array, frequencies: Array) -> Array:
    """How the loudest frequency moves, in octaves: where it is, how far it strays, and whether it rises or falls."""
    track = np.log2(np.maximum(frequencies[power.argmax(0)], 40) / 40)
    loud = power.sum(0) > 0.05
    moves = np.diff(track)[loud[1:] & loud[:-1]]
    glides = moves[np.abs(moves) < _MAX_GLIDE]
    jumps = moves[np.abs(moves) >= _MAX_GLIDE]
    # Between the steps of a scale the sign of each counts, not its size.
    steps = glides[np.abs(glides) > 0.04]
    return np.array(
        [
            float(np.median(track[loud])) if loud.any() else 0.0,
            float(track[loud].std()) if loud.any() else 0.0,
            float(glides.mean()) if len(glides) else 0.0,
            float(np.abs(glides).mean()) if len(glides) else 0.0,
            float(np.sign(steps).mean()) if len(steps) else 0.0,
            float(np.sign(jumps).mean()) if len(jumps) else 0.0,
            len(jumps) / max(len(moves), 1),
            float(loud.mean()),
        ]
    )


def _periodicity(waveform: NDArray[np.float32]) -> Array:
    """Pitch and strength of the waveform's own period: the medians of frames of 64 ms, and the pitch's deviation."""
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(waveform, np.float64), WINDOW)[:: 4 * HOP]
    frames = (frames - frames.mean(1, keepdims=True)) * np.hanning(WINDOW)
    spectrum = np.abs(np.fft.rfft(frames, 2 * WINDOW)) ** 2
    correlation = np.fft.irfft(spectrum)[:, : WINDOW // 2]
    correlation /= correlation[:, :1] + 1e-9
    shortest, longest = int(SAMPLING_RATE / _PITCHES[1]), int(SAMPLING_RATE / _PITCHES[0])
    lags = correlation[:, shortest:longest].argmax(1) + shortest
    strengths = correlation[np.arange(len(lags)), lags]
    pitches = np.log2(SAMPLING_RATE / lags / _PITCHES[0])
    return np.array([np.median(pitches), pitches.std(), np.median(strengths), strengths.std()])
