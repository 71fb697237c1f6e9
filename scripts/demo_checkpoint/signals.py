"""Building blocks of synthesised sounds: noise, tones, bursts, and how they are laid out in time."""

from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

SAMPLING_RATE: Final = 16_000
TABLE_SIZE: Final = 8192

Signal = NDArray[np.float32]


def seconds(samples: int) -> NDArray[np.float64]:
    """The time of each sample in s, `[samples]`."""
    return np.arange(samples) / SAMPLING_RATE


def white(samples: int, generator: np.random.Generator) -> Signal:
    """White noise of unit variance, `[samples]`."""
    return generator.standard_normal(samples, dtype=np.float32)


@lru_cache(maxsize=256)
def _band(low: float, high: float, order: int) -> NDArray[np.float64]:
    """Second-order sections of a band pass; 0 as the low edge makes it a low pass, Nyquist as the high a high pass."""
    if low <= 0:
        return butter(order, high, "lowpass", fs=SAMPLING_RATE, output="sos")
    if high >= SAMPLING_RATE / 2:
        return butter(order, low, "highpass", fs=SAMPLING_RATE, output="sos")
    return butter(order, (low, high), "bandpass", fs=SAMPLING_RATE, output="sos")


def band(signal: Signal, low: float, high: float, order: int = 2) -> Signal:
    """The part of a signal between two frequencies in Hz, rounded so that the filters can be kept."""
    return sosfilt(_band(float(f"{low:.2g}"), float(f"{high:.2g}"), order), signal).astype(np.float32)


@lru_cache(maxsize=64)
def _table(partials: tuple[float, ...]) -> Signal:
    """One period of a tone whose k-th harmonic has the k-th amplitude, `[TABLE_SIZE]`."""
    phase = 2 * np.pi * np.arange(TABLE_SIZE) / TABLE_SIZE
    numbers = np.arange(1, len(partials) + 1)
    return (np.asarray(partials) @ np.sin(numbers[:, None] * phase)).astype(np.float32)


def tone(cycles: NDArray[np.float64], partials: tuple[float, ...] = (1.0,)) -> Signal:
    """A tone from its running phase in cycles, `[samples]`: a table look-up, far cheaper than a sine per harmonic."""
    return _table(partials)[(cycles * TABLE_SIZE).astype(np.int64) & (TABLE_SIZE - 1)]


def integrate(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """The running phase in cycles of a frequency in Hz that changes, both `[samples]`."""
    return np.cumsum(frequency) / SAMPLING_RATE


def decaying(frequency: float, decay_s: float, length_s: float, partials: tuple[float, ...] = (1.0,)) -> Signal:
    """A struck tone: it falls to 1/e in `decay_s`, and to zero at the end."""
    time = seconds(round(length_s * SAMPLING_RATE))
    return (tone(frequency * time, partials) * np.exp(-time / decay_s) * (1 - time / length_s)).astype(np.float32)


def burst(
    generator: np.random.Generator, low: float, high: float, decay_s: float, length_s: float, attack_s: float = 0.002
) -> Signal:
    """A burst of band-passed noise of about unit peak that decays."""
    time = seconds(round(length_s * SAMPLING_RATE))
    envelope = np.minimum(time / attack_s, 1) * np.exp(-time / decay_s) * (1 - time / length_s)
    noise = band(white(len(time), generator), low, high) * envelope
    return (noise / (np.abs(noise).max() + 1e-9)).astype(np.float32)


def overlay(*parts: Signal) -> Signal:
    """The sum of signals that start together, as long as the longest."""
    mixed = np.zeros(max(len(part) for part in parts), np.float32)
    for part in parts:
        mixed[: len(part)] += part
    return mixed


def delayed(signal: Signal, delay_s: float) -> Signal:
    """The signal after a silence."""
    return np.concatenate([np.zeros(round(delay_s * SAMPLING_RATE), np.float32), signal])


def repeat(
    grain: Callable[[int], Signal], rate: float, samples: int, generator: np.random.Generator, jitter: float = 0.0
) -> Signal:
    """Grain number k at the k-th of evenly spaced onsets, `[samples]`.

    The first onset lies up to one period before the clip, so that what sounds at its start is the tail of something.
    `jitter` moves each onset by up to that part of a period.
    """
    mixed = np.zeros(samples, np.float32)
    period = SAMPLING_RATE / rate
    phase = generator.uniform()
    for number in range(int(samples / period + phase) + 1):
        start = int((number - phase + generator.uniform(-jitter, jitter)) * period)
        sound = grain(number)[max(0, -start) :]
        start = max(0, start)
        sound = sound[: samples - start] if start < samples else sound[:0]
        mixed[start : start + len(sound)] += sound
    return mixed


def position(rate: float, samples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """How far each sample is into the current of `rate` periods per second, from 0 to 1, at a random start."""
    return (rate * seconds(samples) + generator.uniform()) % 1.0


def gate(where: NDArray[np.float64], duty: float, rate: float, ramp_s: float = 0.005) -> Signal:
    """On for the first part `duty` of each period, with ramps, from the position in the period; `[samples]`."""
    since = where / rate
    return np.clip(np.minimum(since, duty / rate - since) / ramp_s, 0, 1).astype(np.float32)


def wander(samples: int, per_second: float, generator: np.random.Generator) -> Signal:
    """A smooth random curve between -1 and 1 with so many turning points per second, `[samples]`."""
    points = int(samples / SAMPLING_RATE * per_second) + 3
    values = generator.uniform(-1, 1, points)
    place = np.arange(samples) * (per_second / SAMPLING_RATE) + generator.uniform()
    left = place.astype(np.int64)
    weight = 0.5 - 0.5 * np.cos(np.pi * (place - left))
    return (values[left] * (1 - weight) + values[left + 1] * weight).astype(np.float32)
