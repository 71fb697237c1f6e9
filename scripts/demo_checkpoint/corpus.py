"""The training corpus: sounds of the library with their captions and mels, made once and memory-mapped."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch

from . import library
from .mels import log_mel
from .signals import SAMPLING_RATE

CLIP_LENGTH_IN_S: Final = 2.56
_SEED: Final = 2
_CHUNK: Final = 200
# How often a kind is drawn, where others are once: tones that must be sharp lines, and drops, take longest to learn.
_EMPHASIS: Final = {
    **dict.fromkeys(("siren", "sweep"), 4.0),
    "rain": 2.5,
    **dict.fromkeys(("beep", "telephone", "pluck", "organ", "bell"), 2.0),
}


@dataclass(frozen=True)
class Corpus:
    folder: Path
    size: int
    held_out: int  # the last ones

    @property
    def trained(self) -> int:
        return self.size - self.held_out

    @cached_property
    def waveforms(self) -> np.ndarray:
        """float16 [sounds, samples]"""
        return np.load(self.folder / "waveforms.npy", mmap_mode="r")

    @cached_property
    def mels(self) -> np.ndarray:
        """float16 [sounds, frames, bins]"""
        return np.load(self.folder / "mels.npy", mmap_mode="r")

    @cached_property
    def captions(self) -> list[str]:
        return [label["caption"] for label in self.labels]

    @cached_property
    def labels(self) -> list[dict]:
        """Per sound its `caption`, `kinds` and `attributes`."""
        labels: list[dict] = json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))
        return labels

    @cached_property
    def shares(self) -> np.ndarray:
        """How likely each sound to train on, by its kind, is to be drawn for a place in a batch, float64 [trained]."""
        shares = np.array([_EMPHASIS.get(label["kinds"][0], 1.0) for label in self.labels[: self.trained]])
        return shares / shares.sum()


def tensor(array: np.ndarray, index: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Rows of a memory-mapped array as float32."""
    return torch.from_numpy(np.stack([array[int(i)] for i in index]).astype(np.float32))


def make(folder: Path, size: int = 30_000, held_out: int = 400) -> Corpus:
    """The corpus in `folder`, made now unless it is there."""
    corpus = Corpus(folder, size, held_out)
    if (folder / "labels.json").exists():
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    samples = round(CLIP_LENGTH_IN_S * SAMPLING_RATE)
    shape = (size, samples)
    waveforms = np.lib.format.open_memmap(folder / "waveforms.npy", "w+", np.float16, shape)
    mels = np.lib.format.open_memmap(folder / "mels.npy", "w+", np.float16, (size, samples // 160, 64))
    labels: list[dict] = []
    for index, sound in enumerate(library.stream(_SEED, size, length_in_s=CLIP_LENGTH_IN_S)):
        waveforms[index] = sound.waveform
        labels.append({"caption": sound.caption, "kinds": sound.kinds, "attributes": sound.attributes})
    for start in range(0, size, _CHUNK):
        chunk = torch.from_numpy(waveforms[start : start + _CHUNK].astype(np.float32))
        mels[start : start + _CHUNK] = log_mel(chunk).numpy()
    # Last, so that an interrupted corpus does not look whole.
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    return corpus
