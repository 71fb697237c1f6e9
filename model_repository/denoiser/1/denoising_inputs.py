"""Parses a request's tensors, from the text stage or from a direct caller, into what the engines take."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.contract import MAX_GUIDANCE_SCALE, MAX_SEED, SCHEDULERS, Limits
from audioldm2_triton.errors import invalid
from audioldm2_triton.server.geometry import AudioGeometry, read_audio_geometry
from audioldm2_triton.server.journal import TENSOR as JOURNAL
from audioldm2_triton.server.journal import WIDTH as JOURNAL_WIDTH
from audioldm2_triton.server.settings import Settings
from audioldm2_triton.server.stage_tensors import COLUMNS, NEGATIVE_TEXT, OPTIONAL, TEXT
from audioldm2_triton.server.tensor_checks import check_equal, check_floats, check_priority, check_range, check_shape
from audioldm2_triton.server.text_lengths import resolve_max_new_tokens
from stepping.request import DenoisingRequest, DenoisingRow, TextStates
from stepping.windows import Windowing


@dataclass(frozen=True)
class TensorShapes:
    """The dimensions that the tensors must have for one checkpoint."""

    geometry: AudioGeometry
    prompt_dim: int  # D1
    generated_dim: int  # D0
    generated_tokens: int  # T
    limits: Limits

    @property
    def max_latent_frames(self) -> int:
        return self.geometry.latent_frames(self.limits.max_audio_length_in_s)


def read_tensor_shapes(settings: Settings) -> TensorShapes:
    """Reads the components' `config.json`. Raises `OSError` and `KeyError` for an incomplete checkpoint."""
    checkpoint = Path(settings.checkpoint)
    unet = json.loads((checkpoint / "unet" / "config.json").read_text())
    generated_dim, prompt_dim = [dim for dim in unet["cross_attention_dim"][0] if dim is not None]
    tokens = resolve_max_new_tokens(checkpoint, settings.max_new_tokens)
    return TensorShapes(read_audio_geometry(checkpoint), prompt_dim, generated_dim, tokens, settings.limits)


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Draws float32 noise of unit variance from a CPU generator, so that a seed gives the same sound on any device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def parse_denoising_request(inputs: Mapping[str, np.ndarray], shapes: TensorShapes) -> DenoisingRequest:
    """Parses the stage's tensors, by name; see the table in `model_repository/README.md`.

    The text stage's tensors can be trusted, but this stage can be called directly, and one tensor of a wrong shape
    would fail all waveforms that share its forward. Raises `InvalidArgumentError`, which names the tensor.
    """
    _check(inputs, shapes)
    rows = tuple(_parse_row(inputs, row, shapes.geometry) for row in range(len(inputs["latent_frames"])))
    deadline_ns = int(inputs["deadline_ns"][0, 0]) if "deadline_ns" in inputs else 0
    return DenoisingRequest(rows, deadline_ns, check_priority(inputs))


def _check(inputs: Mapping[str, np.ndarray], shapes: TensorShapes) -> None:
    guided = "guidance_scale" in inputs and bool((inputs["guidance_scale"] > 1.0).any())
    source = "noise" if "noise" in inputs else "seed"
    for name in (*TEXT, *(NEGATIVE_TEXT if guided else ()), *COLUMNS, source):
        if name not in inputs:
            raise invalid(name, None, "a tensor; direct calls to this stage must provide it")
    rows = len(inputs["latent_frames"])
    # The counts first, because shapes follow from them.
    for name, high in (
        ("latent_frames", shapes.max_latent_frames),
        ("num_inference_steps", shapes.limits.max_num_inference_steps),
        ("num_waveforms_per_prompt", shapes.limits.max_num_waveforms_per_prompt),
    ):
        check_shape(name, inputs[name], (rows, 1))
        check_range(name, inputs[name], 1, high)
    for name in ("num_waveforms_per_prompt", "latent_frames"):
        check_equal(name, inputs[name])
    # The states before the masks, whose length follows from them.
    for name in sorted((*TEXT, *NEGATIVE_TEXT, *COLUMNS, *OPTIONAL), key=lambda name: name.endswith("mask")):
        if name not in inputs:
            continue
        check_shape(name, inputs[name], _expected_shape(name, inputs, rows, shapes))
        check_floats(name, inputs[name])
    check_range("guidance_scale", inputs["guidance_scale"], 0, MAX_GUIDANCE_SCALE)
    if source == "seed":
        check_range("seed", inputs["seed"], 0, MAX_SEED)


def _expected_shape(
    name: str, inputs: Mapping[str, np.ndarray], rows: int, shapes: TensorShapes
) -> tuple[int | None, ...]:
    """Returns the shape; None where any number except 0 will do."""
    if name.endswith("generated_prompt_embeds"):
        return rows, shapes.generated_tokens, shapes.generated_dim
    if name.endswith("prompt_embeds"):
        return rows, None, shapes.prompt_dim
    if name.endswith("attention_mask"):
        states = inputs.get(name.replace("attention_mask", "prompt_embeds"))
        return rows, None if states is None else states.shape[1]
    if name == "noise":
        geometry = shapes.geometry
        waveforms, frames = int(inputs["num_waveforms_per_prompt"][0, 0]), int(inputs["latent_frames"][0, 0])
        return rows, waveforms, geometry.latent_channels, frames, geometry.latent_width
    return rows, JOURNAL_WIDTH if name == JOURNAL else 1


def _parse_row(inputs: Mapping[str, np.ndarray], row: int, geometry: AudioGeometry) -> DenoisingRow:
    guidance_scale = float(inputs["guidance_scale"][row, 0])
    scheduler = inputs["scheduler"][row, 0].decode(errors="replace")
    if scheduler not in SCHEDULERS:
        raise invalid("scheduler", scheduler, f"one of {', '.join(SCHEDULERS)}")
    return DenoisingRow(
        positive=_text_states(inputs, row, TEXT),
        negative=_text_states(inputs, row, NEGATIVE_TEXT) if guidance_scale > 1.0 else None,
        guidance_scale=guidance_scale,
        num_inference_steps=int(inputs["num_inference_steps"][row, 0]),
        scheduler=scheduler,
        noise=_noise(inputs, row, geometry),
        windowing=_windowing(inputs, row),
    )


def _noise(inputs: Mapping[str, np.ndarray], row: int, geometry: AudioGeometry) -> Tensor:
    """Returns the caller's own noise, or draws it from the seed."""
    waveforms, frames = (int(inputs[name][row, 0]) for name in ("num_waveforms_per_prompt", "latent_frames"))
    if "noise" in inputs:
        return torch.tensor(inputs["noise"][row])
    shape = (waveforms, geometry.latent_channels, frames, geometry.latent_width)
    return draw_noise(int(inputs["seed"][row, 0]), shape)


def _windowing(inputs: Mapping[str, np.ndarray], row: int) -> Windowing | None:
    frames, overlap = (
        int(inputs[name][row, 0]) if name in inputs else 0 for name in ("window_frames", "overlap_frames")
    )
    if frames == 0:
        return None
    if frames < 1:
        raise invalid("window_frames", frames, "0, or the length of a window")
    if not 0 <= overlap <= frames // 2:
        raise invalid("overlap_frames", overlap, f"an integer from 0 to half of the window, {frames // 2}")
    return Windowing(frames, overlap)


def _text_states(inputs: Mapping[str, np.ndarray], row: int, names: tuple[str, ...]) -> TextStates:
    # Copies, because Triton's buffers are gone once execute() has returned.
    prompt_embeds, mask, generated = (torch.tensor(inputs[name][row]) for name in names)
    # The prompts of a request are padded to the longest of them.
    length = max(1, int(mask.nonzero().max()) + 1) if bool(mask.any()) else 1
    return TextStates(prompt_embeds[:length], mask[:length], generated)
