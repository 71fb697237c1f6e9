"""Pairs of a synthesised sound and a caption of it, drawn at random."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .captions import caption, mixture_caption
from .sounds import ATTRIBUTES, KINDS, check_names, synthesise

TEXTURES: Final = ("hiss", "rain", "wind", "waves", "engine")
MIXTURE_SHARE: Final = 0.2
NAMED_SHARE: Final = 0.6
BACKGROUND_DB: Final = (-10.0, -8.0)
PEAK: Final = 0.7


@dataclass(frozen=True)
class Sound:
    """One example; `waveform` is float32, `[samples]` at 16 kHz."""

    waveform: NDArray[np.float32]
    caption: str
    kinds: tuple[str, ...]  # one or two, the foreground first
    attributes: tuple[str, ...]  # those of the foreground that the caption names


@dataclass(frozen=True)
class Label:
    """A sound without its waveform."""

    caption: str
    kinds: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """One or two kinds, the foreground first, each with the attributes that the caption names."""

    kinds: tuple[str, ...]
    attributes: tuple[tuple[str, ...], ...]


def draw_attributes(kind: str, generator: np.random.Generator) -> tuple[str, ...]:
    """The attributes that the caption will name: each axis is left out with probability 0.4."""
    return tuple(
        axis[int(generator.integers(len(axis)))] for axis in ATTRIBUTES[kind] if generator.uniform() < NAMED_SHARE
    )


def root_mean_square(signal: NDArray[np.float32]) -> float:
    """The level of a signal, `[samples]`, as an amplitude."""
    return float(np.sqrt(np.mean(np.square(signal, dtype=np.float64))))


def mix(
    foreground: NDArray[np.float32], background: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Both signals, `[samples]`, with the mean level of the background 8 to 10 dB below the foreground's."""
    level = 10 ** (generator.uniform(*BACKGROUND_DB) / 20)
    gain = level * root_mean_square(foreground) / max(root_mean_square(background), 1e-9)
    mixed = foreground + gain * background
    return (mixed * min(1.0, PEAK / float(np.abs(mixed).max()))).astype(np.float32)


def draw_scene(generator: np.random.Generator, kind: str | None, mixture: bool | None) -> Scene:
    """Draws a scene: any kind unless it is given, and for one in five a texture of another kind behind it."""
    first = KINDS[int(generator.integers(len(KINDS)))] if kind is None else kind
    check_names(first, ())
    attributes = draw_attributes(first, generator)
    if not (generator.uniform() < MIXTURE_SHARE if mixture is None else mixture):
        return Scene((first,), (attributes,))
    others = [texture for texture in TEXTURES if texture != first]
    second = others[int(generator.integers(len(others)))]
    return Scene((first, second), (attributes, draw_attributes(second, generator)))


def describe(scene: Scene, generator: np.random.Generator, held_out: bool) -> str:
    """A caption of the scene."""
    parts = tuple(zip(scene.kinds, scene.attributes, strict=True))
    if len(parts) == 1:
        return caption(*parts[0], generator, held_out)
    return mixture_caption(parts[0], parts[1], generator, held_out)


def draw(
    generator: np.random.Generator,
    length_in_s: float = 2.56,
    kind: str | None = None,
    mixture: bool | None = None,
    held_out: bool = False,
) -> Sound:
    """A sound and its caption.

    Without `kind`, each is as likely; without `mixture`, one in five has a texture of another kind in the background.
    The caption is drawn last, so that the same generator gives the same sound with and without `held_out`.
    """
    scene = draw_scene(generator, kind, mixture)
    waveforms = [
        synthesise(kind, attributes, length_in_s, generator)
        for kind, attributes in zip(scene.kinds, scene.attributes, strict=True)
    ]
    waveform = waveforms[0] if len(waveforms) == 1 else mix(waveforms[0], waveforms[1], generator)
    return Sound(waveform, describe(scene, generator, held_out), scene.kinds, scene.attributes[0])


def draw_caption(
    generator: np.random.Generator, kind: str | None = None, mixture: bool | None = None, held_out: bool = False
) -> Label:
    """Returns the caption that `draw` gives a sound, without making the sound."""
    scene = draw_scene(generator, kind, mixture)
    return Label(describe(scene, generator, held_out), scene.kinds, scene.attributes[0])


def stream(seed: int, count: int, **kw: Any) -> Iterator[Sound]:
    """`count` sounds; number i depends on the seed and i alone. The keywords are those of `draw`."""
    for number in range(count):
        yield draw(np.random.default_rng((seed, number)), **kw)
