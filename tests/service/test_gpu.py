"""What differs on a GPU: the device, the dtype, the graphs, and the engine's asynchronous steps.

These run with what a bare machine with PyTorch, transformers and diffusers has: no server, no client.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audioldm2_triton.contract import SCHEDULERS
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.settings import Settings
from benchmarks.workload import make_rows
from denoiser_stage import load_engines
from denoising_inputs import draw_noise
from engine_workload import Outcomes
from in_process.stages import running_stages
from stepping.denoising_unet import load_unet
from stepping.forward_plan import LinearCost
from stepping.request import DenoisingRequest, DenoisingRow, TextStates

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float32 means float32; and each test compiles for itself: an engine forbids it to the process when it is warm."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def denoise(checkpoint: Path, device: str, dtype: str, compile: str = "off") -> dict[int, Tensor]:
    """The latents of nine requests, one per scheduler, with lengths of their own, in flight together.

    Where anything is prepared, all forwards must run in it: a bucket that is missing would make the test compare eager
    with eager.
    """
    geometry = read_audio_geometry(checkpoint)
    settings = Settings(
        *(str(checkpoint), device, dtype), compile=compile, compile_lengths_in_s="3.2", compile_max_rows=36
    )
    pool = load_engines(settings, geometry, lambda _: None)
    engine = pool.engines[0]
    unet = engine._unet
    if compile != "off":
        assert engine.costs is not None
        assert set(engine.costs.compiled) == set(unet.buckets), "a bucket could not be prepared"
        slow = LinearCost(1000.0, 1000.0)
        engine._groups.costs = replace(engine.costs, plain=slow, masked=slow)
    unet.forwards.clear()
    dims = [dim for dim in unet.config.cross_attention_dim[0] if dim is not None]
    generator = torch.Generator().manual_seed(0)
    outcomes = Outcomes()
    for tag, scheduler in enumerate(SCHEDULERS):
        text = TextStates(
            torch.randn(3 + tag, dims[1], generator=generator),
            torch.ones(3 + tag),
            torch.randn(8, dims[0], generator=generator),
        )
        shape = (2, geometry.latent_channels, 10 + 7 * tag, geometry.latent_width)
        row = DenoisingRow(text, text, 3.5, 5 + tag, scheduler, draw_noise(tag, shape))
        pool.submit(DenoisingRequest((row,)), outcomes.callback(tag))
    collected = outcomes.collect(len(SCHEDULERS))
    pool.close()
    latents = {tag: outcome for tag, outcome in collected.items() if isinstance(outcome, Tensor)}
    assert len(latents) == len(SCHEDULERS), collected
    if compile != "off":
        assert unet.forwards.total() > 5
        assert unet.forwards[None] == 0, unet.forwards
    return latents


def worst(latents: dict[int, Tensor], expected: dict[int, Tensor]) -> float:
    return max(float((latents[tag] - expected[tag]).abs().max() / expected[tag].abs().max()) for tag in expected)


def test_float32_on_cuda_is_float32_on_cpu(tiny_checkpoint: Path) -> None:
    on_cpu = denoise(tiny_checkpoint, "cpu", "float32")
    assert worst(denoise(tiny_checkpoint, "cuda", "float32"), on_cpu) < 1e-3


def test_graphs_are_exact(tiny_checkpoint: Path) -> None:
    eager = denoise(tiny_checkpoint, "cuda", "float32")
    assert worst(denoise(tiny_checkpoint, "cuda", "float32", "graphs"), eager) < 1e-3


@pytest.mark.parametrize("compile", ["off", "graphs"])
def test_float16_on_cuda_is_close(compile: str, tiny_checkpoint: Path) -> None:
    on_cpu = denoise(tiny_checkpoint, "cpu", "float32")
    assert worst(denoise(tiny_checkpoint, "cuda", "float16", compile), on_cpu) < 0.1


def test_audio_through_all_graphs_is_the_cpus(tiny_checkpoint: Path) -> None:
    """Text, denoising and decoding, each replayed more than once with other inputs."""
    rows = [replace(row, return_scores=True) for row in make_rows(4, 0.64, 4)]
    settings = Settings(str(tiny_checkpoint), dtype="float32", compile_lengths_in_s="0.64", compile_max_rows=8)

    def generate(device: str, compile: str) -> list[np.ndarray]:
        with running_stages(replace(settings, device=device, compile=compile)) as stages:
            if compile == "graphs":
                assert stages.is_prepared
            return [stages.generate(row) for row in rows]

    for audio, expected in zip(generate("cuda", "graphs"), generate("cpu", "off"), strict=True):
        assert np.abs(audio - expected).max() / np.abs(expected).max() < 2e-3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_graphs_are_exact(tiny_checkpoint: Path) -> None:
    eager = denoise(tiny_checkpoint, "cuda", "float32")
    assert worst(denoise(tiny_checkpoint, "cuda", "float32", "on"), eager) < 1e-3


def test_a_rows_memory_foretells_a_large_forwards(tiny_checkpoint: Path) -> None:
    geometry, device = read_audio_geometry(tiny_checkpoint), torch.device("cuda")
    unet = load_unet(tiny_checkpoint, geometry.latent_width, device, torch.float16)
    frames = geometry.native_latent_frames
    foretold = 48 * unet.measure_row_bytes(frames)
    inputs = unet.random_inputs(48, frames, masked=True)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        unet.denoise(inputs, None)
    taken = torch.cuda.max_memory_allocated(device) - before
    assert 0.5 * foretold < taken < 1.1 * foretold
