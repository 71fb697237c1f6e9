"""The controls of the page, by what a server accepts; and a request out of what they say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from audioldm2_triton import contract
from audioldm2_triton.errors import invalid
from audioldm2_triton.server_info import ServerInfo
from audioldm2_triton.transport.wire import GenerateOptions

DEFAULT_AUDIO_LENGTH_IN_S: Final = 10.0  # where the server publishes none


@dataclass(frozen=True)
class Range:
    """A number between two others."""

    name: str  # the contract's
    label: str
    low: float
    high: float
    step: float
    default: float


def ranges(info: ServerInfo) -> tuple[Range, ...]:
    """Returns the numbers of a request."""
    limits = info.limits
    native = info.native_audio_length_in_s or min(DEFAULT_AUDIO_LENGTH_IN_S, limits.max_audio_length_in_s)
    shortest = contract.MIN_AUDIO_LENGTH_IN_S
    return (
        Range("audio_length_in_s", "Length in seconds", shortest, limits.max_audio_length_in_s, 0.01, native),
        Range(
            "num_inference_steps", "Steps", 1, limits.max_num_inference_steps, 1, contract.DEFAULT_NUM_INFERENCE_STEPS
        ),
        Range("guidance_scale", "Guidance", 0, contract.MAX_GUIDANCE_SCALE, 0.1, contract.DEFAULT_GUIDANCE_SCALE),
        Range("num_waveforms_per_prompt", "Candidates", 1, limits.max_num_waveforms_per_prompt, 1, 1),
        Range(
            "window_length_in_s",
            "Window in seconds (0: none)",
            *(0, limits.max_audio_length_in_s, 0.01, contract.DEFAULT_WINDOW_LENGTH_IN_S),
        ),
    )


def read_options(info: ServerInfo, values: Mapping[str, Any]) -> GenerateOptions:
    """Returns the arguments that differ from their defaults, out of the values of the controls.

    Raises `InvalidArgumentError` for a seed that is no number. All other checks are left to the server.
    """
    numbers = {each.name: each for each in ranges(info)}
    defaults = {
        **{name: number.default for name, number in numbers.items()},
        "audio_length_in_s": info.native_audio_length_in_s,
        "negative_prompt": contract.DEFAULT_NEGATIVE_PROMPT,
        "transcription": None,
        "scheduler": info.schedulers[0],
        "seed": None,
    }
    given = {**values, "seed": _seed(values["seed"])}
    # A browser makes no difference between 20 and 20.0.
    given |= {name: int(given[name]) for name, number in numbers.items() if number.step == 1}
    return cast(GenerateOptions, {name: value for name, value in given.items() if value != defaults[name]})


def _seed(given: str) -> int | None:
    try:
        return int(given) if given.strip() else None
    except ValueError:
        raise invalid("seed", given, "an integer, or nothing for a random one") from None
