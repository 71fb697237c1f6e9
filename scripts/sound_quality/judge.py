"""An independent judge: names the kind and the attributes of a sound from its features, never having heard a model.

It learns from sounds of the library that no part of the checkpoint was trained on, and is tested on others again. Half
of those that it learns from have lost their phases, as everything has that was made from a spectrogram.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.signal import istft, stft
from sklearn.ensemble import ExtraTreesClassifier

from demo_checkpoint.library import TEXTURES, mix
from demo_checkpoint.signals import SAMPLING_RATE, white
from demo_checkpoint.sounds import ATTRIBUTES, KINDS, synthesise
from sound_quality.features import HOP, features

Axis = tuple[str, ...]
Key = TypeVar("Key")

CLIP_LENGTH_IN_S: Final = 2.56
_LEARNING_SEED: Final = 101
_TEST_SEED: Final = 102
_MIXTURE_SHARE: Final = 0.3
_PHASELESS_SHARE: Final = 0.5
_WINDOWS: Final = (256, 512, 1024)  # samples
_NOISE: Final = 3e-3  # of the peak, at most: recordings have more noise than the library
_forest = partial(ExtraTreesClassifier, n_estimators=300, min_samples_leaf=2, random_state=0)


@dataclass(frozen=True)
class Example:
    """A sound of the library with all there is to know about it."""

    features: NDArray[np.float64]
    kind: str
    background: str | None
    attributes: tuple[str, ...]  # a value for every axis of the kind


@dataclass(frozen=True)
class Judge:
    """Trained classifiers; each takes features [clips, features]."""

    kinds: Any
    axes: dict[tuple[str, Axis], Any]  # of one kind's sounds
    textures: dict[str, Any]  # whether a texture is to be heard

    def name_kinds(self, sounds: NDArray[np.float64]) -> list[str]:
        return [str(kind) for kind in self.kinds.predict(sounds)]

    def kind_probability(self, sounds: NDArray[np.float64], kinds: Sequence[str]) -> NDArray[np.float64]:
        """Returns the probability that each sound is of its kind, float64 [clips]."""
        columns = [list(self.kinds.classes_).index(kind) for kind in kinds]
        probabilities: NDArray[np.float64] = self.kinds.predict_proba(sounds)[np.arange(len(sounds)), columns]
        return probabilities

    def name_values(self, sounds: NDArray[np.float64], places: Sequence[tuple[str, Axis]]) -> list[str]:
        """The value of each sound on an axis of a kind."""
        values = _in_groups(sounds, places, lambda place, own: self.axes[place].predict(own))
        return [str(value) for value in values]

    def texture_probability(self, sounds: NDArray[np.float64], textures: Sequence[str]) -> NDArray[np.float64]:
        """Returns the probability that each sound contains its texture, float64 [clips]."""
        return np.array(_in_groups(sounds, textures, lambda name, own: self.textures[name].predict_proba(own)[:, 1]))


def _in_groups(
    sounds: NDArray[np.float64], keys: Sequence[Key], answer: Callable[[Key, NDArray[np.float64]], Any]
) -> list[Any]:
    """Returns the forest's answer for each sound. Calls it once per key: one sound takes as long as many."""
    answers: list[Any] = [None] * len(sounds)
    for key in dict.fromkeys(keys):
        own = [place for place, other in enumerate(keys) if other == key]
        for place, value in zip(own, answer(key, sounds[own]), strict=True):
            answers[place] = value
    return answers


def axes_of(kind: str, attributes: Sequence[str]) -> Iterator[tuple[Axis, str]]:
    """The axes of a kind on which a value is named, each with that value."""
    for axis in ATTRIBUTES[kind]:
        for value in axis:
            if value in attributes:
                yield axis, value


def attributes_right(
    judge: Judge, asked_for: Sequence[tuple[str, Sequence[str]]], sounds: Sequence[NDArray[np.float64]]
) -> list[bool]:
    """Returns for every attribute in the caption, with its kind, whether the sound [features] has it."""
    wanted = [
        (sound, (kind, axis), value)
        for (kind, attributes), sound in zip(asked_for, sounds, strict=True)
        for axis, value in axes_of(kind, attributes)
    ]
    named = judge.name_values(np.stack([sound for sound, _, _ in wanted]), [place for _, place, _ in wanted])
    return [name == value for name, (_, _, value) in zip(named, wanted, strict=True)]


def examples(seed: int, per_kind: int, phaseless_share: float = 0.0) -> list[Example]:
    """Sounds of all kinds in turn; number i depends on the seed, i and the share of phaseless ones alone."""
    return [
        _example(np.random.default_rng((seed, number)), number, phaseless_share)
        for number in range(per_kind * len(KINDS))
    ]


def _example(generator: np.random.Generator, number: int, phaseless_share: float) -> Example:
    kind = KINDS[number % len(KINDS)]
    attributes = tuple(axis[int(generator.integers(len(axis)))] for axis in ATTRIBUTES[kind])
    waveform = synthesise(kind, attributes, CLIP_LENGTH_IN_S, generator)
    background = None
    if generator.uniform() < _MIXTURE_SHARE:
        others = [texture for texture in TEXTURES if texture != kind]
        background = others[int(generator.integers(len(others)))]
        waveform = mix(waveform, synthesise(background, (), CLIP_LENGTH_IN_S, generator), generator)
    if generator.uniform() < phaseless_share:
        waveform = _without_phases(waveform, generator)
    peak = float(np.abs(waveform).max())
    noise = generator.uniform(0, _NOISE) * peak * white(round(CLIP_LENGTH_IN_S * SAMPLING_RATE), generator)
    return Example(features((waveform + noise).astype(np.float32)), kind, background, attributes)


def _without_phases(waveform: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """The waveform [samples] of the same magnitudes in frames of 10 ms, each with phases of its own."""
    window = int(generator.choice(_WINDOWS))
    _, _, spectrum = stft(waveform, SAMPLING_RATE, nperseg=window, noverlap=window - min(HOP, window // 2))
    turns = np.exp(2j * np.pi * generator.uniform(size=spectrum.shape) * generator.choice((0.1, 0.5, 1.0)))
    _, changed = istft(np.abs(spectrum) * turns, SAMPLING_RATE, nperseg=window, noverlap=window - min(HOP, window // 2))
    return changed[: len(waveform)].astype(np.float32)


def train_judge(per_kind: int = 150) -> Judge:
    """Trains a judge, deterministically; about 2 s per sound of each kind on one core."""
    learned = examples(_LEARNING_SEED, per_kind, _PHASELESS_SHARE)
    sounds = np.stack([example.features for example in learned])
    axes = {}
    for kind in KINDS:
        own = [example for example in learned if example.kind == kind]
        for place, axis in enumerate(ATTRIBUTES[kind]):
            values = [example.attributes[place] for example in own]
            axes[kind, axis] = _forest().fit(np.stack([example.features for example in own]), values)
    textures = {
        texture: _forest(class_weight="balanced").fit(
            sounds, [texture in (example.kind, example.background) for example in learned]
        )
        for texture in TEXTURES
    }
    return Judge(_forest().fit(sounds, [example.kind for example in learned]), axes, textures)


@dataclass(frozen=True)
class Accuracy:
    """The judge's own, on sounds of the library that it has not learned from."""

    kinds: float
    attributes: float
    textures: float  # mean of the share found where there is one and not found where there is none


def own_accuracy(judge: Judge, per_kind: int = 40) -> Accuracy:
    tested = examples(_TEST_SEED, per_kind)
    sounds = np.stack([example.features for example in tested])
    named = judge.name_kinds(sounds)
    values = attributes_right(
        judge, [(example.kind, example.attributes) for example in tested], [example.features for example in tested]
    )
    shares = []
    for texture in TEXTURES:
        found = judge.texture_probability(sounds, [texture] * len(tested)) > 0.5
        there = np.array([texture in (example.kind, example.background) for example in tested])
        shares.append((found[there].mean() + (~found[~there]).mean()) / 2)
    right = [name == example.kind for name, example in zip(named, tested, strict=True)]
    return Accuracy(float(np.mean(right)), float(np.mean(values)), float(np.mean(shares)))
