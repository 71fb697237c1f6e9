"""The events of a stream: progress, audio in chunks, and the result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.result import GenerationResult


@dataclass(frozen=True)
class Progress:
    """Reports that one more evaluation of the UNet is done."""

    step: int  # from 1
    num_steps: int  # evaluations in total: 2n - 1 for n steps of the second-order schedulers, n for the others


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """A part of every waveform, in generation order, because the ranking is known only at the end."""

    audio: NDArray[np.float32]  # float32 [N, samples of this chunk]
    chunk: int  # from 0
    num_chunks: int
    sampling_rate: int  # Hz


@dataclass(frozen=True, eq=False)
class Finished:
    """The last event of a stream that succeeds."""

    result: GenerationResult  # the chunks joined, best waveform first


StreamEvent: TypeAlias = Progress | AudioChunk | Finished
OnProgress: TypeAlias = Callable[[Progress], None]
