"""Tells which schedulers clip under a checkpoint's configuration. Clipping is not linear, so they cannot be served.

A denoising step is a table of coefficients, which a scheduler that clips its predictions does not have. Neither do the
official checkpoints clip.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from audioldm2_triton.contract import SCHEDULERS

_SOLVERS_THAT_THRESHOLD: Final = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
_CLIPPING: Final[Mapping[str, Mapping[str, bool]]] = {
    "DDIMScheduler": {"clip_sample": True, "thresholding": False},
    "HeunDiscreteScheduler": {"clip_sample": False},
    **{solver: {"thresholding": False} for solver in _SOLVERS_THAT_THRESHOLD},
}
"""The keys that make a scheduler of diffusers clip, each with its default."""


def clipping_keys(config: Mapping[str, Any], scheduler: str) -> tuple[str, ...]:
    """Returns the keys of a `scheduler_config.json` that make this scheduler clip, set or by default; mostly none."""
    return tuple(key for key, default in _CLIPPING.get(scheduler, {}).items() if config.get(key, default))


def clipping_schedulers(checkpoint: Path) -> dict[str, str]:
    """Returns the offered schedulers that a checkpoint makes clip, each with why, in words for an error message.

    Raises `OSError` and `ValueError` if its configuration cannot be read.
    """
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    reasons = {}
    for scheduler in SCHEDULERS:
        keys = clipping_keys(config, scheduler)
        if keys:
            how = " and ".join(f"{key} {'' if key in config else '(by default) '}is true" for key in keys)
            reasons[scheduler] = f"in the checkpoint's scheduler_config.json {how}, and clipping is not supported"
    return reasons
