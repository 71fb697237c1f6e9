"""The stage: a checkpoint's UNet and schedules, and the resolved tensors of a request as the engine takes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor

from audioldm2_triton.contract import DEFAULT_SCHEDULER
from audioldm2_triton.errors import invalid
from audioldm2_triton.geometry import AudioGeometry
from audioldm2_triton.settings import Settings
from denoising_request import DenoisingRequest, DenoisingRow, TextStates
from engine import Engine, EngineLimits
from schedule_table import ScheduleTables
from step_batch import UNetForward

CPU_MAX_ACTIVE_ROWS: Final = 32
CPU_MAX_WAITING: Final = 64
GPU_MAX_ACTIVE_ROWS: Final = 62  # from 64 on, the UNet's upsampler gives up the channels-last layout
GPU_BYTES_PER_ROW: Final = 256 * 2**20  # an estimate of the activations of one row of 10 s, not measured yet


def load_unet(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The UNet in evaluation mode; its attention is PyTorch's SDPA, the default of diffusers."""
    unet = AudioLDM2UNet2DConditionModel.from_pretrained(
        str(checkpoint / "unet"), torch_dtype=dtype, local_files_only=True
    )
    return unet.to(device).eval()


def load_schedule_tables(checkpoint: Path) -> ScheduleTables:
    return ScheduleTables(json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text()))


def unet_forward(unet: Any) -> UNetForward:
    def forward(sample: Tensor, timestep: Tensor, generated: Tensor, prompt_embeds: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = unet(
            sample,
            timestep,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=prompt_embeds,
            encoder_attention_mask_1=mask,
            return_dict=False,
        )[0]
        return output

    return forward


def engine_limits(settings: Settings, device: torch.device) -> EngineLimits:
    """What is set, else what the device suggests: on a GPU, rows of the native length in half of the free memory."""
    rows, waiting = CPU_MAX_ACTIVE_ROWS, CPU_MAX_WAITING
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        rows = max(2, min(GPU_MAX_ACTIVE_ROWS, free // 2 // GPU_BYTES_PER_ROW))
        waiting = 8 * rows
    return EngineLimits(settings.max_active_rows or rows, settings.max_waiting or waiting)


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Float32 noise of unit variance from a CPU generator, whatever the device: the same seed, the same sound."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def parse_denoising_request(inputs: Mapping[str, np.ndarray], geometry: AudioGeometry) -> DenoisingRequest:
    """A request from the stage's resolved tensors, by name; see the table in `model_repository/README.md`.

    The values are trusted, but other people may call this stage: raises `InvalidArgumentError` where shapes disagree.
    """
    rows = len(inputs["seed"])
    for name, array in inputs.items():
        if len(array) != rows:
            raise invalid(name, list(array.shape), f"{rows} rows, as in `seed`")
    return DenoisingRequest(
        rows=tuple(_parse_row(inputs, row, geometry) for row in range(rows)),
        deadline_ns=int(inputs["deadline_ns"][0, 0]) if "deadline_ns" in inputs else 0,
    )


def _parse_row(inputs: Mapping[str, np.ndarray], row: int, geometry: AudioGeometry) -> DenoisingRow:
    guidance_scale = float(inputs["guidance_scale"][row, 0])
    waveforms, frames = int(inputs["num_waveforms_per_prompt"][row, 0]), int(inputs["latent_frames"][row, 0])
    shape = (waveforms, geometry.latent_channels, frames, geometry.latent_width)
    return DenoisingRow(
        positive=_text_states(inputs, row, ""),
        negative=_text_states(inputs, row, "negative_") if guidance_scale > 1.0 else None,
        guidance_scale=guidance_scale,
        num_inference_steps=int(inputs["num_inference_steps"][row, 0]),
        scheduler=inputs["scheduler"][row, 0].decode(),
        noise=draw_noise(int(inputs["seed"][row, 0]), shape),
    )


def _text_states(inputs: Mapping[str, np.ndarray], row: int, prefix: str) -> TextStates:
    # Copies: Triton's buffers are gone once execute() has returned.
    prompt_embeds, mask, generated = (
        torch.tensor(inputs[prefix + name][row])
        for name in ("prompt_embeds", "attention_mask", "generated_prompt_embeds")
    )
    # A shorter row of a request was padded to its longest.
    length = max(1, int(mask.nonzero().max()) + 1) if bool(mask.any()) else 1
    return TextStates(prompt_embeds[:length], mask[:length], generated)


def warm_up(engine: Engine, cross_attention_dims: Sequence[int | None], geometry: AudioGeometry) -> None:
    """One step of a short clip with guidance, so that the first request does not pay for what happens once.

    Args:
        cross_attention_dims: of one level of the UNet: none for self-attention, then GPT-2's and T5's.

    Raises what the step raises.
    """
    generated_dim, prompt_dim = [dim for dim in cross_attention_dims if dim is not None]
    text = TextStates(torch.zeros(4, prompt_dim), torch.ones(4, dtype=torch.int32), torch.zeros(8, generated_dim))
    noise = draw_noise(0, (1, geometry.latent_channels, geometry.latent_frames(1.0), geometry.latent_width))
    row = DenoisingRow(text, text, 2.0, 1, DEFAULT_SCHEDULER, noise)
    outcomes: SimpleQueue[Tensor | Exception] = SimpleQueue()
    engine.submit(DenoisingRequest((row,)), outcomes.put)
    outcome = outcomes.get()
    if isinstance(outcome, Exception):
        raise outcome
