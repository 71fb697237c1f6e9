"""Parses and validates requests and fills in defaults. Nothing else does: the later stages trust the result."""

import math
import secrets
from collections.abc import Mapping

import numpy as np

from audioldm2_triton import contract
from audioldm2_triton.contract import Limits
from audioldm2_triton.errors import invalid
from audioldm2_triton.server.generation_row import GenerationRow, shortest_decimal
from audioldm2_triton.server.wanted_file import split_format


def parse_rows(
    inputs: Mapping[str, np.ndarray],
    limits: Limits,
    native_audio_length_in_s: float,
    speaks: bool,
    clipping: Mapping[str, str],
) -> tuple[GenerationRow, ...]:
    """Parses and checks the rows of one request.

    Args:
        inputs: the tensors of the contract by name, each [B, 1]; BYTES as object arrays of `bytes`.
        limits: what this server accepts.
        native_audio_length_in_s: the default length.
        speaks: whether the checkpoint takes a transcription.
        clipping: the schedulers that cannot be used with the checkpoint, each with why.

    Raises `InvalidArgumentError`, which names the argument, what was given and what is accepted.
    """
    if "prompt" not in inputs:
        raise invalid("prompt", None, "one text per row")
    rows = inputs["prompt"].shape[0]
    for name, array in inputs.items():
        if array.shape != (rows, 1):
            raise invalid(name, list(array.shape), f"the shape [{rows}, 1], one value per row of `prompt`")
    parsed = tuple(_parse_row(inputs, row, limits, native_audio_length_in_s, speaks, clipping) for row in range(rows))
    for name in ("audio_length_in_s", "num_waveforms_per_prompt", "priority", "audio_format"):
        given = [getattr(row, name) for row in parsed]
        if len(set(given)) > 1:
            raise invalid(name, given, "the same value in all rows of one request")
    return parsed


def _parse_row(
    inputs: Mapping[str, np.ndarray],
    row: int,
    limits: Limits,
    native_audio_length_in_s: float,
    speaks: bool,
    clipping: Mapping[str, str],
) -> GenerationRow:
    prompt = _text(inputs, "prompt", row, "")
    if not prompt.strip():
        raise invalid("prompt", prompt, "text that is not blank")
    num_waveforms = _whole_number(
        inputs,
        "num_waveforms_per_prompt",
        row,
        contract.DEFAULT_NUM_WAVEFORMS_PER_PROMPT,
        1,
        limits.max_num_waveforms_per_prompt,
    )
    scheduler = _text(inputs, "scheduler", row, contract.DEFAULT_SCHEDULER)
    if scheduler not in contract.SCHEDULERS or scheduler in clipping:
        accepted = ", ".join(name for name in contract.SCHEDULERS if name not in clipping)
        reason = f": {clipping[scheduler]}" if scheduler in clipping else ""
        raise invalid("scheduler", scheduler, f"one of {accepted}{reason}")
    return_scores = bool(inputs["return_scores"][row, 0]) if "return_scores" in inputs else False
    return GenerationRow(
        prompt=prompt,
        negative_prompt=_text(inputs, "negative_prompt", row, contract.DEFAULT_NEGATIVE_PROMPT),
        audio_length_in_s=_audio_length(inputs, row, limits, native_audio_length_in_s),
        num_inference_steps=_whole_number(
            inputs,
            "num_inference_steps",
            row,
            contract.DEFAULT_NUM_INFERENCE_STEPS,
            1,
            limits.max_num_inference_steps,
        ),
        guidance_scale=_guidance_scale(inputs, row),
        num_waveforms_per_prompt=num_waveforms,
        seed=_seed(inputs, row),
        scheduler=scheduler,
        # Ranking needs the scores.
        return_scores=return_scores or num_waveforms > 1,
        transcription=_transcription(inputs, row, speaks),
        window_length_in_s=_window_length(inputs, row, limits),
        priority=_priority(inputs, row),
        audio_format=_audio_format(inputs, row),
    )


def _priority(inputs: Mapping[str, np.ndarray], row: int) -> str:
    priority = _text(inputs, "priority", row, contract.DEFAULT_PRIORITY)
    if priority not in contract.PRIORITIES:
        raise invalid("priority", priority, f"one of {', '.join(contract.PRIORITIES)}")
    return priority


def _transcription(inputs: Mapping[str, np.ndarray], row: int, speaks: bool) -> str:
    name = "transcription"
    if not speaks:
        if name in inputs:
            raise invalid(name, _text(inputs, name, row, ""), "none, because the server's checkpoint does not speak")
        return ""
    if name not in inputs:
        raise invalid(name, None, "the words to say, one text per row, because the server's checkpoint speaks")
    text = _text(inputs, name, row, "")
    if not text.strip():
        raise invalid(name, text, "text that is not blank")
    return text


def _text(inputs: Mapping[str, np.ndarray], name: str, row: int, default: str) -> str:
    if name not in inputs:
        return default
    given: bytes = inputs[name][row, 0]
    try:
        text = given.decode()
    except UnicodeDecodeError:
        raise invalid(name, given, "UTF-8 text") from None
    if len(text) > contract.MAX_PROMPT_CHARACTERS:
        raise invalid(name, text, f"at most {contract.MAX_PROMPT_CHARACTERS} characters, not {len(text)}")
    return text


def _whole_number(inputs: Mapping[str, np.ndarray], name: str, row: int, default: int, low: int, high: int) -> int:
    value = int(inputs[name][row, 0]) if name in inputs else default
    if not low <= value <= high:
        raise invalid(name, value, f"an integer from {low} to {high}")
    return value


def _audio_length(inputs: Mapping[str, np.ndarray], row: int, limits: Limits, native: float) -> float:
    name = "audio_length_in_s"
    value = shortest_decimal(inputs[name][row, 0]) if name in inputs else native
    low, high = contract.MIN_AUDIO_LENGTH_IN_S, limits.max_audio_length_in_s
    if not (math.isfinite(value) and low <= value <= high):
        raise invalid(name, value, f"a finite number of seconds from {low:g} to {high:g}")
    return value


def _window_length(inputs: Mapping[str, np.ndarray], row: int, limits: Limits) -> float:
    name = "window_length_in_s"
    value = shortest_decimal(inputs[name][row, 0]) if name in inputs else contract.DEFAULT_WINDOW_LENGTH_IN_S
    low, high = contract.MIN_WINDOW_LENGTH_IN_S, limits.max_audio_length_in_s
    if value != 0 and not (math.isfinite(value) and low <= value <= high):
        raise invalid(name, value, f"0 for no windows, or a finite number of seconds from {low:g} to {high:g}")
    return value


def _audio_format(inputs: Mapping[str, np.ndarray], row: int) -> str:
    given = _text(inputs, "audio_format", row, "")
    if given:
        split_format(given)
    return given


def _guidance_scale(inputs: Mapping[str, np.ndarray], row: int) -> float:
    name = "guidance_scale"
    value = shortest_decimal(inputs[name][row, 0]) if name in inputs else contract.DEFAULT_GUIDANCE_SCALE
    if not (math.isfinite(value) and 0 <= value <= contract.MAX_GUIDANCE_SCALE):
        raise invalid(name, value, f"a finite number from 0 to {contract.MAX_GUIDANCE_SCALE:g}")
    return value


def _seed(inputs: Mapping[str, np.ndarray], row: int) -> int:
    if "seed" not in inputs:
        return secrets.randbelow(contract.NUM_DRAWN_SEEDS)
    value = int(inputs["seed"][row, 0])
    if value < 0:
        raise invalid("seed", value, f"an integer from 0 to {contract.MAX_SEED}")
    return value
