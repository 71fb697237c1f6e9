"""Request parameters that were meant to be inputs."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from audioldm2_triton import contract
from audioldm2_triton.errors import invalid

_OF_TRITON: Final = ("priority", "timeout")
_ALIKE: Final = 0.8
"""The share of equal letters from which a name is taken for another's: `num_inference_step`, but not `steps`."""


def check_parameters(names: Iterable[str]) -> None:
    """Raises `InvalidArgumentError` for the first name that is almost an input's.

    The endpoints `generate` and `generate_stream` make a parameter of every field of their JSON that is no input.
    """
    for name in names:
        meant = get_close_matches(name, contract.INPUTS, 1, _ALIKE)
        if meant and name not in _OF_TRITON:
            raise invalid("parameters", name, f"an input, such as {meant[0]}, or a name that resembles none")
