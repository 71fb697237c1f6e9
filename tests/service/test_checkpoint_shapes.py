"""Parity on the topologies of the other official checkpoints, with reduced widths, by the stages in one process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from audioldm2_pipeline import Call, Reference, as_row, difference, in_any_order
from audioldm2_triton.server.settings import Settings
from checkpoints.building import build
from checkpoints.shapes import component_config
from in_process.stages import Stages, running_stages

CALLS = [
    Call("Techno music with a strong, upbeat tempo", "low quality, and noise and hum", 0.64, 4, 3.5, seed=1),
    Call("Soft piano", audio_length_in_s=0.64, num_inference_steps=3, guidance_scale=1.0, seed=2),
    Call("rain", "a voice", 0.37, 3, 2.5, num_waveforms_per_prompt=2, seed=3, scheduler="DDIMScheduler"),
    Call("An orchestra plays a slow melody", "", 0.5, 2, 3.5, seed=4, scheduler="HeunDiscreteScheduler"),
]
TOPOLOGY = ("layers_per_block", "transformer_layers_per_block", "down_block_types", "up_block_types")


@dataclass(frozen=True)
class Shape:
    """One checkpoint as the server's stages and as the reference run it."""

    name: str  # of the official one
    checkpoint: Path
    stages: Stages
    reference: Reference


@pytest.fixture(scope="module", params=["music", "large"])
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shape]:
    checkpoint = tmp_path_factory.mktemp("checkpoints") / request.param
    build(f"tiny-{request.param}", checkpoint)
    with running_stages(Settings(str(checkpoint), device="cpu")) as stages:
        yield Shape(request.param, checkpoint, stages, Reference(checkpoint))


def test_only_the_widths_are_reduced(shape: Shape) -> None:
    built = json.loads((shape.checkpoint / "unet" / "config.json").read_text())
    official = component_config(shape.name, "unet")
    assert {key: built[key] for key in TOPOLOGY} == {key: official[key] for key in TOPOLOGY}
    for ours, theirs in zip(built["cross_attention_dim"], official["cross_attention_dim"], strict=True):
        assert [width is None for width in ours] == [width is None for width in theirs]


def test_audio_equals_the_reference(shape: Shape) -> None:
    """All requests in flight together, with and without guidance, of different lengths, steps and schedulers."""
    resolved = shape.stages.condition([as_row(call) for call in CALLS])
    latents = shape.stages.denoise(resolved)
    for call, tensors, latent in zip(CALLS, resolved, latents, strict=True):
        (audio,) = shape.stages.decode([{**tensors, "latents": latent.numpy()}])
        expected = shape.reference.generate(call)
        assert in_any_order(audio[0], expected) <= shape.reference.tolerance(call), call


def test_texts_and_negative_prompt_are_heard(shape: Shape) -> None:
    def generate(prompt: str, negative_prompt: str) -> np.ndarray:
        return shape.stages.generate(as_row(Call(prompt, negative_prompt, 0.2, 8, seed=5)))

    audio = generate("rain falls", "")
    assert difference(generate("birds sing", ""), audio) > 1e-2
    assert difference(generate("rain falls", "low quality"), audio) > 1e-2
