"""Loads a checkpoint's engines, without Triton."""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.own_kernels import launch_on
from audioldm2_triton.server.residency import stage_residency
from audioldm2_triton.server.settings import Settings, resolve_compile, resolve_device, resolve_dtype, uses_compiler
from audioldm2_triton.server.text_lengths import resolve_max_new_tokens
from engine.engine import Engine
from engine.limits import EngineLimits, Observer
from engine.pool import EnginePool
from stepping.denoising_unet import DenoisingUNet, load_lean_unet
from stepping.forward_plan import Bucket
from stepping.schedule_table import ScheduleTables

logger = logging.getLogger(__name__)

CPU_MAX_ACTIVE_ROWS: Final = 32
CPU_MAX_WAITING: Final = 64
GPU_MAX_ACTIVE_ROWS: Final = 62
SWITCH_INTERVAL_S: Final = 1e-4
"""Each kernel of a forward gives Python's lock away, and while another thread takes in requests, gets it back after
this time. By Python's default, 5 ms, a burst of requests stalls the steps."""
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
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    checkpoint = Path(settings.checkpoint)
    tables = load_schedule_tables(checkpoint, settings.timestep_spacing)
    devices = denoising_devices(settings)
    dtype = resolve_dtype(settings, devices[0])
    as_it_serves = partial(
        DenoisingUNet,
        width=geometry.latent_width,
        use_compiler=uses_compiler(settings),
        generated_states=resolve_max_new_tokens(checkpoint, settings.max_new_tokens),
    )
    engines: list[Engine] = []
    try:
        for device in devices:
            launch_on(device)
            residency = stage_residency(settings, device)
            with residency:
                weights = load_lean_unet(checkpoint, device, dtype)
                residency.adopt(weights)
                fitting = rows_that_fit(as_it_serves(weights), geometry.native_latent_frames)
                limits = engine_limits(settings, geometry, fitting)
                unet = as_it_serves(weights, buckets=compile_buckets(settings, geometry, device, limits))
            observer, interval = observe(device), settings.guided_steps
            engine = Engine(unet, tables, limits, unet.warm_up, device, dtype, observer, interval, residency)
            engines.append(engine)
            # One after the other, so that no engine is timed while another one compiles.
            engine.wait_until_warm()
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    if resolve_compile(settings, devices[0]):
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


def engine_limits(settings: Settings, geometry: AudioGeometry, fitting: int | None) -> EngineLimits:
    """Returns the limits of one engine: the configured values, or defaults derived from the device.

    Args:
        fitting: UNet batch items of the native length that a GPU has memory for; None on a CPU.
    """
    rows, waiting = (CPU_MAX_ACTIVE_ROWS, CPU_MAX_WAITING) if fitting is None else (fitting, 8 * fitting)
    return EngineLimits(
        *(settings.max_active_rows or rows, settings.max_waiting or waiting, geometry.native_latent_frames),
        settings.scheduling,
    )


def rows_that_fit(unet: DenoisingUNet, native_frames: int) -> int | None:
    """Returns how many UNet batch items of the native length half of a GPU's free memory holds; None on a CPU.

    What an item takes is measured. One of a few numbers, so that the shapes to compile do not depend on what else is
    loading at the moment.
    """
    if unet.device.type != "cuda":
        return None
    row_bytes = unet.measure_row_bytes(native_frames)
    free_bytes, _ = torch.cuda.mem_get_info(unet.device)
    fitting = min(GPU_MAX_ACTIVE_ROWS, free_bytes // 2 // row_bytes)
    logger.info("%s: %d MiB a row, %d MiB free", unet.device, row_bytes // 2**20, free_bytes // 2**20)
    return max(size for size in COMPILED_ITEMS if size <= max(fitting, COMPILED_ITEMS[0]))
