"""bfloat16 is as near to float32 as the reference pipeline's own bfloat16 is."""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from audioldm2_pipeline import Call, Reference, as_row
from audioldm2_triton.server.settings import Settings
from denoising_inputs import draw_noise
from in_process.stages import Stages, running_stages

CALLS = [
    Call(prompt, negative, 0.64, steps, guidance, seed=seed)
    for seed, (prompt, negative, steps, guidance) in enumerate(
        [
            ("rain on a tin roof", "", 1, 1.0),
            ("a dog barks", "low quality, noise", 2, 3.5),
            ("techno music with a strong, upbeat tempo", "", 4, 2.0),
            ("a clock ticks while birds sing outside", "hum", 3, 1.0),
            ("waves", "", 2, 1.5),
            ("a hammer hits a wooden surface", "voices", 4, 3.5),
        ]
    )
]


@pytest.fixture(scope="module")
def half_reference(tiny_checkpoint: Path) -> Reference:
    reference = Reference(tiny_checkpoint)
    reference.pipeline = diffusers.AudioLDM2Pipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.bfloat16)
    reference.pipeline.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def half_stages(tiny_checkpoint: Path) -> Iterator[Stages]:
    with running_stages(Settings(str(tiny_checkpoint), device="cpu", dtype="bfloat16")) as stages:
        yield stages


def generate_half(reference: Reference, call: Call) -> np.ndarray:
    """The pipeline in its dtype from the very noise of float32: it would draw other noise in bfloat16."""
    pipeline = reference.pipeline
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(reference.scheduler_config)
    audio: np.ndarray = pipeline(
        call.prompt,
        negative_prompt=call.negative_prompt,
        audio_length_in_s=call.audio_length_in_s,
        num_inference_steps=call.num_inference_steps,
        guidance_scale=call.guidance_scale,
        latents=draw_noise(call.seed, (1, 8, 16, 16)).to(torch.bfloat16),
    ).audios
    return audio


def distance(audio: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(audio.ravel() - exact.ravel()) / np.linalg.norm(exact))


def test_audio_is_as_near_as_the_references(
    reference: Reference, half_reference: Reference, half_stages: Stages
) -> None:
    theirs, ours = [], []
    for call in CALLS:
        exact = reference.generate(call)
        theirs.append(distance(generate_half(half_reference, call), exact))
        ours.append(distance(half_stages.generate(as_row(call)), exact))
        print(f"{call.num_inference_steps} steps: the reference {theirs[-1]:.3f}, the stages {ours[-1]:.3f}")
    assert statistics.mean(theirs) > 1e-3, "the reference's bfloat16 is no different from float32"
    assert statistics.mean(ours) < 1.25 * statistics.mean(theirs)


def test_latents_are_float32_between_the_stages(half_stages: Stages) -> None:
    (resolved,) = half_stages.condition([replace(as_row(CALLS[0]), num_inference_steps=1)])
    floats = [array.dtype for array in resolved.values() if array.dtype.kind == "f"]
    assert floats
    assert set(floats) == {np.dtype(np.float32)}
    (latents,) = half_stages.denoise([resolved])
    assert latents.dtype == torch.float32
