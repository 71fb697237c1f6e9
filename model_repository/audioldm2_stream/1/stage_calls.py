"""What the stream asks of the stages, and what it offers while it waits; with no Triton in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from audioldm2_triton.errors import AudioLDM2Error

Tensors: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class StageCall:
    """One request to a stage of the same checkpoint."""

    model: str  # without the prefix that tells several checkpoints of one server apart
    inputs: Tensors
    outputs: Sequence[str]
    parameters: Mapping[str, str | int] = field(default_factory=dict)
    timeout_us: int = 0  # 0: none


CallStage: TypeAlias = Callable[[StageCall], Tensors]
"""Blocks until the stage has answered. Raises an `AudioLDM2Error` with the stage's own message."""

Send: TypeAlias = Callable[[Tensors], None]
"""Sends one response that is not the last."""

Interruption: TypeAlias = Callable[[], AudioLDM2Error | None]
"""Why the stream should end before its time, or None."""
