"""`diffusers.AudioLDM2Pipeline`, against which everything is measured."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from audioldm2_triton.server.generation_row import GenerationRow


def load_pipeline(checkpoint: Path, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Any:
    """Loads the reference pipeline; compiles it as the guide to AudioLDM 2 advises."""
    pipeline: Any = diffusers.AudioLDM2Pipeline.from_pretrained(checkpoint, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet, mode="reduce-overhead", fullgraph=True)
    return pipeline


def use_dpm_solver(pipeline: Any) -> None:
    """Sets the scheduler that needs 20 steps instead of the 200 of the checkpoint's own."""
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)


def run_pipeline(pipeline: Any, row: GenerationRow, steps: int | None = None) -> Any:
    """Runs one request from text to samples on the host."""
    return pipeline(
        row.prompt,
        negative_prompt=row.negative_prompt,
        audio_length_in_s=row.audio_length_in_s,
        num_inference_steps=steps or row.num_inference_steps,
        guidance_scale=row.guidance_scale,
        num_waveforms_per_prompt=row.num_waveforms_per_prompt,
        generator=torch.Generator("cpu").manual_seed(row.seed),
    ).audios
