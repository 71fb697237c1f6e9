"""What a client gets of a stream: progress, audio in chunks, and the result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.result import GenerationResult


@dataclass(frozen=True)
class Progress:
    """One evaluation of the UNet is done."""

    step: int  # from 1
    num_steps: int  # evaluations in all, which some schedulers need more of than steps


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """A part of every waveform. The waveforms are in generation order: which is best is known only at the end."""

    audio: NDArray[np.float32]  # float32 [N, samples of this chunk]
    chunk: int  # from 0
    num_chunks: int


@dataclass(frozen=True, eq=False)
class Finished:
    """The last event of a stream that succeeds."""

    result: GenerationResult  # the chunks joined, best waveform first


StreamEvent: TypeAlias = Progress | AudioChunk | Finished
OnProgress: TypeAlias = Callable[[Progress], None]
