"""The types of the stream's calls to the stages and of its own callbacks, without Triton."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from audioldm2_triton.errors import AudioLDM2Error

Tensors: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class StageCall:
    """One request to a stage of the same checkpoint."""

    model: str  # without the prefix that distinguishes the checkpoints of one server
    inputs: Tensors
    outputs: Sequence[str]
    parameters: Mapping[str, str | int] = field(default_factory=dict)
    timeout_us: int = 0  # 0: none


CallStage: TypeAlias = Callable[[StageCall], Tensors]
"""Calls a stage and waits for its answer. Raises an `AudioLDM2Error` with the stage's own message."""

Send: TypeAlias = Callable[[Tensors], None]
"""Sends one response before the last."""

Interruption: TypeAlias = Callable[[], AudioLDM2Error | None]
"""Returns why the stream should end early, or None."""
