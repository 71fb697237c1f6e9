"""The stage without Triton: a checkpoint's engines, and the resolved tensors of a request as they take them."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.errors import invalid
from audioldm2_triton.geometry import AudioGeometry
from audioldm2_triton.settings import Settings, resolve_device, resolve_dtype
from denoising_request import DenoisingRequest, DenoisingRow, TextStates
from denoising_unet import load_unet
from engine import Engine
from engine_load import EngineLimits, Observer
from engine_pool import EnginePool
from schedule_table import ScheduleTables

logger = logging.getLogger(__name__)

CPU_MAX_ACTIVE_ROWS: Final = 32
CPU_MAX_WAITING: Final = 64
GPU_MAX_ACTIVE_ROWS: Final = 62  # from 64 on, the UNet's upsampler gives up the channels-last layout
GPU_BYTES_PER_ROW: Final = 256 * 2**20  # an estimate of the activations of one row of 10 s, not measured yet


def load_schedule_tables(checkpoint: Path) -> ScheduleTables:
    return ScheduleTables(json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text()))


def load_engines(
    settings: Settings, geometry: AudioGeometry, observe: Callable[[torch.device], Observer]
) -> EnginePool:
    """One engine per visible GPU, or one on the CPU; measured, and so warmed up.

    Args:
        observe: makes the observer of the engine on a device.
    """
    checkpoint = Path(settings.checkpoint)
    tables = load_schedule_tables(checkpoint)
    engines = []
    for device in denoising_devices(settings):
        unet = load_unet(checkpoint, geometry.latent_width, device, resolve_dtype(settings, device))
        costs = unet.measure_costs()
        logger.info("%s: a forward takes %s", device, costs)
        limits = engine_limits(settings, device)
        engines.append(Engine(unet, tables, limits, costs, device, unet.dtype, observe(device)))
    return EnginePool(engines, tables)


def denoising_devices(settings: Settings) -> list[torch.device]:
    """Every visible GPU, unless a device is set."""
    device = resolve_device(settings)
    if device.type == "cuda" and settings.device in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def engine_limits(settings: Settings, device: torch.device) -> EngineLimits:
    """Of one engine: what is set, else what the device suggests.

    On a GPU, rows of the native length in half of the free memory.
    """
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
