"""Loads a checkpoint's engines, without Triton."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.residency import stage_residency
from audioldm2_triton.server.settings import Settings, resolve_compile, resolve_device, resolve_dtype, uses_compiler
from audioldm2_triton.server.text_lengths import resolve_max_new_tokens
from engine.engine import Engine
from engine.limits import EngineLimits, Observer
from engine.pool import EnginePool
from stepping.denoising_unet import load_unet
from stepping.forward_plan import Bucket
from stepping.schedule_table import ScheduleTables

CPU_MAX_ACTIVE_ROWS: Final = 32
CPU_MAX_WAITING: Final = 64
GPU_MAX_ACTIVE_ROWS: Final = 62
COMPILED_ITEMS: Final = (2, 4, 8, 12, 16, 24, 32, 48, 62)  # UNet batch items; half of a forward is waste at worst
_SPACINGS: Final[Mapping[str, dict[str, object]]] = {
    "": {},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "lu_lambdas": {"use_lu_lambdas": True},
}
GPU_BYTES_PER_ROW: Final = 32 * 2**20
"""Memory of one row of the native length, for each byte of the dtype: on an H200 it was 22 MiB at the base shape."""


def load_schedule_tables(checkpoint: Path, timestep_spacing: str = "") -> ScheduleTables:
    """Makes the schedules of a checkpoint.

    Args:
        timestep_spacing: replaces the checkpoint's; a scheduler that does not support it keeps its own.
    """
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    return ScheduleTables(config | _SPACINGS[timestep_spacing])


def load_engines(
    settings: Settings, geometry: AudioGeometry, observe: Callable[[torch.device], Observer]
) -> EnginePool:
    """Makes one engine per visible GPU, or one on the CPU; compiled, measured, and so warmed up.

    Args:
        observe: makes the observer of the engine on a device.
    """
    checkpoint = Path(settings.checkpoint)
    tables = load_schedule_tables(checkpoint, settings.timestep_spacing)
    devices = denoising_devices(settings)
    dtype = resolve_dtype(settings, devices[0])
    limits = [engine_limits(settings, geometry, device) for device in devices]
    buckets = [
        compile_buckets(settings, geometry, device, limit) for device, limit in zip(devices, limits, strict=True)
    ]
    engines: list[Engine] = []
    try:
        for device, limit, shapes in zip(devices, limits, buckets, strict=True):
            residency = stage_residency(settings, device)
            with residency:
                unet = load_unet(
                    *(checkpoint, geometry.latent_width, device, dtype, shapes),
                    use_compiler=uses_compiler(settings),
                    generated_states=resolve_max_new_tokens(checkpoint, settings.max_new_tokens),
                )
                residency.adopt(unet.module)
            observer, interval = observe(device), settings.guided_steps
            engine = Engine(unet, tables, limit, unet.warm_up, device, dtype, observer, interval, residency)
            engines.append(engine)
            # One after the other, so that no engine is timed while another one compiles.
            engine.wait_until_warm()
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    if buckets[0]:
        # From now on nothing is compiled in this process: what PyTorch would recompile for a request runs eagerly.
        torch.compiler.set_stance("eager_on_recompile")
    return EnginePool(engines, tables)


def compile_buckets(
    settings: Settings, geometry: AudioGeometry, device: torch.device, limits: EngineLimits
) -> tuple[Bucket, ...]:
    """Returns the shapes to compile for, the smallest first; none if nothing is compiled.

    On a GPU a shorter length runs, masked, in the next longer bucket. On a CPU every frame costs, and each shape takes
    minutes to compile: there the buckets are for the exact lengths and one waveform, unless more rows are configured.
    """
    if not resolve_compile(settings, device):
        return ()
    on_gpu = device.type == "cuda"
    largest = settings.compile_max_rows or (limits.max_active_rows if on_gpu else 2)
    sizes = sorted({size for size in COMPILED_ITEMS if size < largest} | {largest})
    lengths = settings.lengths_to_compile(geometry.native_audio_length_in_s)
    return tuple(
        Bucket(items, geometry.latent_frames(length), masked)
        for length in lengths
        for masked in ((False, True) if on_gpu else (False,))
        for items in sizes
    )


def denoising_devices(settings: Settings) -> list[torch.device]:
    """Returns every visible GPU, unless a device is configured."""
    device = resolve_device(settings)
    if device.type == "cuda" and settings.device in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def engine_limits(settings: Settings, geometry: AudioGeometry, device: torch.device) -> EngineLimits:
    """Limits for one engine: the configured values, or defaults derived from the device.

    On a GPU the default is as many items of the native length as fit in half of the free memory.
    """
    rows, waiting = CPU_MAX_ACTIVE_ROWS, CPU_MAX_WAITING
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        bytes_per_row = GPU_BYTES_PER_ROW * resolve_dtype(settings, device).itemsize
        fitting = min(GPU_MAX_ACTIVE_ROWS, free // 2 // bytes_per_row)
        # Only a few numbers, so that the shapes to compile do not depend on what else is loading at the moment.
        rows = max(size for size in COMPILED_ITEMS if size <= max(fitting, COMPILED_ITEMS[0]))
        waiting = 8 * rows
    return EngineLimits(
        *(settings.max_active_rows or rows, settings.max_waiting or waiting, geometry.native_latent_frames),
        settings.scheduling,
    )
