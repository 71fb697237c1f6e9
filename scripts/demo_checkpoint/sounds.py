"""Procedural sounds of 18 kinds, told apart by their spectrum and their rhythm.

Every sound fills its clip: it starts in the middle of whatever it repeats and is cut off at the end. The ranges behind
the two values of an attribute have a gap between them, so that a classifier or a plain feature can tell them apart.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from .signals import (
    SAMPLING_RATE,
    Signal,
    band,
    burst,
    decaying,
    delayed,
    gate,
    integrate,
    overlay,
    position,
    repeat,
    seconds,
    tone,
    wander,
    white,
)

NOISE_FLOOR: Final = 1e-3  # of the peak: -60 dB

Range = tuple[float, float]

PITCH: Final = ("high", "low")
RATE: Final = ("fast", "slow")
SLOPE: Final = ("rising", "falling")
FLOW: Final = ("steady", "pulsing")


# Drawing the parameters


def log_uniform(generator: np.random.Generator, bounds: Range) -> float:
    """A number between the bounds, spread evenly over its logarithm, as pitch and pace are heard."""
    return float(np.exp(generator.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def pick_pitch(attributes: Sequence[str], generator: np.random.Generator, *, low: Range, high: Range) -> float:
    """A frequency in Hz: from the range of the named value, or from both and the gap between them."""
    bounds = high if "high" in attributes else low if "low" in attributes else (low[0], high[1])
    return log_uniform(generator, bounds)


def pick_rate(attributes: Sequence[str], generator: np.random.Generator, *, slow: Range, fast: Range) -> float:
    """Events per second: from the range of the named value, or from both and the gap between them."""
    bounds = fast if "fast" in attributes else slow if "slow" in attributes else (slow[0], fast[1])
    return log_uniform(generator, bounds)


def pick_either(attributes: Sequence[str], generator: np.random.Generator, axis: tuple[str, str]) -> str:
    """The named value of an axis that has nothing between its two values, or either of them."""
    return next((value for value in axis if value in attributes), axis[int(generator.integers(2))])


def pulse(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """The loudness of a sound that is steady or pulses 3 to 4.5 times per second, `[samples]`."""
    if pick_either(attributes, generator, FLOW) == "steady":
        return np.ones(samples, np.float32)
    rate = generator.uniform(3.0, 4.5)
    return 0.02 + 0.98 * gate(position(rate, samples, generator), generator.uniform(0.45, 0.6), rate, ramp_s=0.03)


# The kinds: each takes the named attributes, the length in samples and a generator


def beep(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Plain tones that switch on and off."""
    pitch = pick_pitch(attributes, generator, low=(280, 450), high=(1600, 2500))
    rate = pick_rate(attributes, generator, slow=(1.6, 2.2), fast=(5, 7))
    switched = gate(position(rate, samples, generator), generator.uniform(0.45, 0.6), rate)
    return tone(pitch * seconds(samples), (1.0, 0.0, 0.12)) * switched


def siren(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """A wail that glides up and down without a break, over most of an octave, with overtones."""
    pitch = pick_pitch(attributes, generator, low=(330, 450), high=(1000, 1350))
    rate = pick_rate(attributes, generator, slow=(1.2, 1.5), fast=(3.5, 4.5))
    glide = np.sin(2 * np.pi * position(rate, samples, generator))
    return tone(integrate(pitch * 2 ** (0.5 * generator.uniform(0.8, 1.0) * (1 + glide))), (1.0, 0.5, 0.3))


def sweep(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Pure tones that each run through three octaves and start again."""
    rate = pick_rate(attributes, generator, slow=(1.3, 1.7), fast=(4, 5.5))
    bottom = generator.uniform(350, 550)
    where = position(rate, samples, generator)
    height = where if pick_either(attributes, generator, SLOPE) == "rising" else 1 - where
    return tone(integrate(bottom * 2 ** (generator.uniform(2.9, 3.3) * height))) * gate(where, 0.93, rate, 0.01)


def hiss(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Noise of the highest frequencies only."""
    noise = band(white(samples, generator), generator.uniform(3000, 4500), SAMPLING_RATE / 2, order=4)
    return noise * pulse(attributes, samples, generator)


def rain(_: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Drops of several sizes at random over a bed of noise."""
    mixed = 0.05 * band(white(samples, generator), 600, 6000, order=1)
    density = generator.uniform(25, 45)  # drops per second and size
    for frequency in (900.0, 1900.0, 3400.0, 5200.0):
        drops = np.zeros(samples, np.float32)
        count = max(1, int(generator.poisson(density * samples / SAMPLING_RATE)))
        drops[generator.integers(0, samples, count)] = generator.uniform(0.15, 1.0, count) ** 2
        # A resonance per size: each drop rings for about 5 ms.
        turn = 2 * np.pi * frequency * generator.uniform(0.85, 1.15) / SAMPLING_RATE
        radius = np.exp(-1 / (0.005 * SAMPLING_RATE))
        ringing = lfilter([np.sin(turn)], [1, -2 * radius * np.cos(turn), radius**2], drops)
        mixed += ringing.astype(np.float32)
    return mixed


def wind(_: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """A low howl: a narrow band of noise that wanders between 200 and 900 Hz."""
    noise = white(samples, generator)
    height = 1.5 + 1.6 * wander(samples, generator.uniform(1.5, 2.5), generator)
    mixed = np.zeros(samples, np.float32)
    for number, centre in enumerate((200.0, 330.0, 545.0, 900.0)):
        mixed += band(noise, centre / 1.18, centre * 1.18) * np.exp(-((height - number) ** 2) / 0.5)
    return mixed * (0.7 + 0.3 * wander(samples, 2.0, generator))


def waves(_: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Surf: broad noise that swells and draws back, its highs most of all."""
    noise = white(samples, generator)
    where = position(generator.uniform(0.55, 0.8), samples, generator)
    top = generator.uniform(0.35, 0.5)
    swell = np.where(where < top, where / top, (1 - where) / (1 - top))
    swell = (0.5 - 0.5 * np.cos(np.pi * swell)).astype(np.float32)
    low, foam = band(noise, 100, 700, order=1), band(noise, 700, 5500, order=1)
    return low * (0.15 + 0.85 * swell) + foam * (0.05 + 0.95 * swell**2)


def engine(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """A rough buzz of many harmonics whose pitch drifts."""
    pitch = pick_pitch(attributes, generator, low=(38, 58), high=(135, 190))
    drift = 1 + 0.05 * wander(samples, 3.0, generator).astype(np.float64)
    cycles = integrate(pitch * drift)
    buzz = tone(cycles, tuple(k**-0.7 for k in range(1, 13)))
    exhaust = band(white(samples, generator), pitch * 2, pitch * 12, order=1) * (0.4 + 0.6 * tone(cycles)) * 0.7
    return (buzz + exhaust) * pulse(attributes, samples, generator)


def clock(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Short metallic clicks at 2 to 5 kHz, tick and tock in turns."""
    rate = pick_rate(attributes, generator, slow=(2.0, 2.5), fast=(6.5, 8.5))
    pitch = generator.uniform(3600, 4600)
    grains = [
        overlay(
            decaying(pitch * ratio, 0.014, 0.07),
            0.6 * decaying(pitch * ratio * 1.47, 0.01, 0.05),
            0.5 * burst(generator, 2500, 7000, 0.004, 0.02, 0.0005),
        )
        for ratio in (1.0, 0.62)
    ]
    return repeat(lambda number: grains[number % 2], rate, samples, generator)


def heartbeat(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Muffled double thumps below 150 Hz."""
    rate = pick_rate(attributes, generator, slow=(1.3, 1.6), fast=(2.6, 3.2))
    pitch = generator.uniform(48, 62)
    lub = decaying(pitch, 0.05, 0.16, (1.0, 0.4))
    dub = 0.75 * decaying(pitch * 1.4, 0.04, 0.13, (1.0, 0.4))
    beat = overlay(lub, delayed(dub, 0.34 / rate))
    return repeat(lambda _: beat, rate, samples, generator, jitter=0.02)


def footsteps(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """A dull heel and then a scrape of the sole, both noise between 100 and 1500 Hz."""
    rate = pick_rate(attributes, generator, slow=(1.6, 2.0), fast=(4.2, 5.2))
    top = generator.uniform(1100, 1600)

    def step(_: int) -> Signal:
        heel = burst(generator, 100, 450, 0.025, 0.1)
        sole = burst(generator, 500, top, 0.05, 0.15, attack_s=0.02)
        return generator.uniform(0.8, 1.0) * overlay(heel, delayed(0.6 * sole, min(0.06, 0.25 / rate)))

    return repeat(step, rate, samples, generator, jitter=0.03)


def knocking(_: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Three raps on wood, a pause, three raps: resonances from 450 to 2000 Hz."""
    pitch = generator.uniform(430, 620)
    knock = overlay(
        decaying(pitch, 0.03, 0.12),
        0.6 * decaying(pitch * 2.13, 0.018, 0.08),
        0.35 * decaying(pitch * 3.4, 0.012, 0.05),
        0.3 * burst(generator, 800, 3000, 0.004, 0.02, 0.0005),
    )
    gap = generator.uniform(0.13, 0.17)
    group = overlay(knock, delayed(0.9 * knock, gap), delayed(knock, 2 * gap))
    return repeat(lambda _: group, 1 / (2 * gap + generator.uniform(0.45, 0.55)), samples, generator)


def drums(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Kick, hat, snare, hat: the steps of a plain beat."""
    rate = pick_rate(attributes, generator, slow=(3.2, 4.0), fast=(8, 10))
    time = seconds(round(0.16 * SAMPLING_RATE))
    fall = integrate(50 + generator.uniform(110, 150) * np.exp(-time / 0.02))
    kick = (tone(fall) * np.exp(-time / 0.05) * (1 - time / 0.16)).astype(np.float32)
    snare = overlay(
        0.7 * burst(generator, 1200, 5500, 0.04, 0.13), 0.5 * decaying(generator.uniform(180, 220), 0.03, 0.1)
    )
    hat = 0.45 * burst(generator, 6000, SAMPLING_RATE / 2, 0.02, 0.06)
    pattern = (kick, hat, snare, hat)
    shift = int(generator.integers(4))
    return repeat(lambda number: pattern[(number + shift) % 4], rate, samples, generator)


def pluck(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """A plucked string that runs through a scale of eight notes again and again."""
    pitch = pick_pitch(attributes, generator, low=(130, 190), high=(620, 900))
    scale = (0, 2, 4, 7, 9, 12, 14, 16)
    if pick_either(attributes, generator, SLOPE) == "falling":
        scale = scale[::-1]
    shift = int(generator.integers(len(scale)))

    def note(number: int) -> Signal:
        frequency = pitch * 2 ** (scale[(number + shift) % len(scale)] / 12)
        # The upper harmonics of a string die first.
        body = decaying(frequency, 0.12, 0.35, (1.0, 0.4))
        return overlay(body, decaying(frequency, 0.04, 0.15, (0.0, 0.2, 0.35)))

    return repeat(note, generator.uniform(7, 9), samples, generator)


def organ(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """A sustained chord of pipes."""
    pitch = pick_pitch(attributes, generator, low=(90, 135), high=(480, 680))
    third = 1.25 if generator.uniform() < 0.5 else 1.2
    time = seconds(samples)
    chord = np.zeros(samples, np.float32)
    for ratio in (1.0, third, 1.5, 2.0):
        chord += tone(pitch * ratio * time + generator.uniform(), (1.0, 0.6, 0.0, 0.3))
    return chord * pulse(attributes, samples, generator)


def bell(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """A struck bell: partials that are no harmonics, the higher the shorter."""
    pitch = pick_pitch(attributes, generator, low=(230, 340), high=(1100, 1500))
    rate = pick_rate(attributes, generator, slow=(1.3, 1.7), fast=(4, 5.2))
    partials = ((0.5, 0.5), (1.0, 1.0), (1.19, 0.8), (1.71, 0.6), (2.0, 0.6), (2.74, 0.45), (3.76, 0.35), (4.9, 0.2))
    strike = overlay(
        *(
            level * decaying(pitch * ratio, 0.35 / (0.5 + ratio / 2), min(0.9, 1.1 / ratio**0.5))
            for ratio, level in partials
        ),
        0.4 * burst(generator, 2000, 7000, 0.005, 0.03, 0.0005),
    )
    return repeat(lambda _: strike, rate, samples, generator)


def telephone(_: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """The ring of a desk telephone: two tones in quick turns for half a second, then a pause."""
    low = generator.uniform(1000, 1200)
    turns = position(generator.uniform(8.5, 10.5), samples, generator) < 0.5
    warble = tone(integrate(np.where(turns, low, low * 1.5)), (1.0, 0.5, 0.3))
    rate = generator.uniform(1.05, 1.25)
    return warble * gate(position(rate, samples, generator), generator.uniform(0.58, 0.66), rate)


def birdsong(attributes: Sequence[str], samples: int, generator: np.random.Generator) -> Signal:
    """Chirps between 2.8 and 6.5 kHz that each bend another way."""
    rate = pick_rate(attributes, generator, slow=(3.0, 4.0), fast=(8, 10.5))
    length = 0.62 / rate
    progress = np.arange(round(length * SAMPLING_RATE)) / (length * SAMPLING_RATE)
    envelope = np.sin(np.pi * np.minimum(progress, 1)) ** 0.7

    def chirp(_: int) -> Signal:
        start, middle, end = generator.uniform((3000, 3800, 2800), (5200, 6500, 4800))
        arc = start + (end - start) * progress + (middle - (start + end) / 2) * np.sin(np.pi * progress)
        return (tone(integrate(arc)) * envelope * generator.uniform(0.7, 1.0)).astype(np.float32)

    return repeat(chirp, rate, samples, generator, jitter=0.06)


Synthesiser = Callable[[Sequence[str], int, np.random.Generator], Signal]
Axes = tuple[tuple[str, ...], ...]

_LIBRARY: Final[Mapping[str, tuple[Synthesiser, Axes]]] = MappingProxyType(
    {
        "beep": (beep, (PITCH, RATE)),
        "siren": (siren, (PITCH, RATE)),
        "sweep": (sweep, (SLOPE, RATE)),
        "hiss": (hiss, (FLOW,)),
        "rain": (rain, ()),
        "wind": (wind, ()),
        "waves": (waves, ()),
        "engine": (engine, (PITCH, FLOW)),
        "clock": (clock, (RATE,)),
        "heartbeat": (heartbeat, (RATE,)),
        "footsteps": (footsteps, (RATE,)),
        "knocking": (knocking, ()),
        "drums": (drums, (RATE,)),
        "pluck": (pluck, (PITCH, SLOPE)),
        "organ": (organ, (PITCH, FLOW)),
        "bell": (bell, (PITCH, RATE)),
        "telephone": (telephone, ()),
        "birdsong": (birdsong, (RATE,)),
    }
)

KINDS: Final[tuple[str, ...]] = tuple(_LIBRARY)
ATTRIBUTES: Final[Mapping[str, Axes]] = MappingProxyType({kind: axes for kind, (_, axes) in _LIBRARY.items()})


def check_names(kind: str, attributes: Sequence[str]) -> None:
    """Raises a ValueError unless the kind exists and has each attribute, at most one per axis."""
    if kind not in ATTRIBUTES:
        raise ValueError(f"kind: got {kind!r} but expected one of {', '.join(KINDS)}")
    axes = ATTRIBUTES[kind]
    known = [value for axis in axes for value in axis]
    for value in attributes:
        if value not in known:
            raise ValueError(f"attributes: got {value!r} but expected one of {known} for the kind {kind!r}")
    for axis in axes:
        if len(named := [value for value in attributes if value in axis]) > 1:
            raise ValueError(f"attributes: got {named} but expected at most one of {list(axis)}")


def synthesise(
    kind: str, attributes: Sequence[str], length_in_s: float, generator: np.random.Generator
) -> NDArray[np.float32]:
    """A sound, `[samples]` at `SAMPLING_RATE`, with a peak between 0.5 and 0.7.

    `attributes` names at most one value per axis of `ATTRIBUTES[kind]`; an axis that is not named is drawn at random.
    """
    check_names(kind, attributes)
    if not length_in_s > 0:
        raise ValueError(f"length_in_s: got {length_in_s} but expected more than 0")
    samples = max(1, round(length_in_s * SAMPLING_RATE))
    signal = _LIBRARY[kind][0](attributes, samples, generator)
    peak = generator.uniform(0.5, 0.7)
    # A clip that is very short can fall between two events; it is left silent rather than divided by zero.
    signal = signal * np.float32(peak / max(float(np.abs(signal).max()), 1e-6))
    return (signal + NOISE_FLOOR * peak / 3 * white(samples, generator)).astype(np.float32)
