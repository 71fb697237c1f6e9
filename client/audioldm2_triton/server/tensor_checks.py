"""Checks of the tensors between the stages, which anybody may send: a stage can be called directly."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from audioldm2_triton.contract import DEFAULT_PRIORITY, PRIORITIES
from audioldm2_triton.errors import invalid

MAX_MAGNITUDE: Final = 1e4
"""Of the floats that a stage takes. What the stages send each other stays far below; much more overflows inside."""


def check_shape(name: str, array: np.ndarray, expected: tuple[int | None, ...]) -> None:
    """Raises `InvalidArgumentError` for another shape; None in `expected`: any number except 0."""
    fits = len(array.shape) == len(expected) and all(
        size == wanted or (wanted is None and size > 0) for size, wanted in zip(array.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise invalid(name, list(array.shape), f"the shape [{wanted}]")


def check_floats(name: str, array: np.ndarray) -> None:
    """Raises `InvalidArgumentError` for a float that is not finite, or so large that the networks overflow."""
    if array.dtype != np.float32:
        return
    fits = np.abs(array) <= MAX_MAGNITUDE  # false for NaN
    if not fits.all():
        raise invalid(name, array[~fits][0].item(), f"finite values of at most {MAX_MAGNITUDE:g}")


def check_range(name: str, array: np.ndarray, low: float, high: float) -> None:
    """Raises `InvalidArgumentError` for a number outside of `low` to `high`."""
    outside = (array < low) | (array > high)
    if outside.any():
        raise invalid(name, array[outside][0].item(), f"a number from {low:g} to {high:g}")


def check_equal(name: str, array: np.ndarray) -> None:
    """Raises `InvalidArgumentError` if rows of one request differ."""
    if (array != array[:1]).any():
        raise invalid(name, array[:, 0].tolist(), "the same value in all rows of one request")


def check_priority(inputs: Mapping[str, np.ndarray]) -> str:
    """Returns the priority of a request, or the default. Raises `InvalidArgumentError` for an unknown one."""
    if "priority" not in inputs:
        return DEFAULT_PRIORITY
    check_equal("priority", inputs["priority"])
    priority: str = inputs["priority"][0, 0].decode(errors="replace")
    if priority not in PRIORITIES:
        raise invalid("priority", priority, f"one of {', '.join(PRIORITIES)}")
    return priority
