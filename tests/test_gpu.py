"""What differs on a GPU: the device, the dtype, and the engine's asynchronous steps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from audioldm2_triton.contract import SCHEDULERS
from audioldm2_triton.geometry import read_audio_geometry
from audioldm2_triton.settings import Settings
from denoiser import load_engines
from denoising_request import DenoisingRequest, DenoisingRow, TextStates
from engine_workload import Outcomes
from resolved_tensors import draw_noise

pytestmark = pytest.mark.gpu


def denoise(checkpoint: Path, device: str, dtype: str, compiled: bool = False) -> dict[int, Tensor]:
    """The latents of nine requests, one per scheduler, with lengths of their own, in flight together."""
    geometry = read_audio_geometry(checkpoint)
    settings = Settings(
        *(str(checkpoint), device, dtype),
        compile="on" if compiled else "off",
        compile_lengths_in_s="1.28,3.2",
        compile_max_rows=8,
    )
    pool = load_engines(settings, geometry, lambda _: None)
    dims = [dim for dim in pool.engines[0]._unet.config.cross_attention_dim[0] if dim is not None]
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
    return latents


def worst(latents: dict[int, Tensor], expected: dict[int, Tensor]) -> float:
    return max(float((latents[tag] - expected[tag]).abs().max() / expected[tag].abs().max()) for tag in expected)


def test_float32_on_cuda_is_float32_on_cpu(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_cpu = denoise(tiny_checkpoint, "cpu", "float32")
    assert worst(denoise(tiny_checkpoint, "cuda", "float32"), on_cpu) < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_float16_on_cuda_is_close(compiled: bool, tiny_checkpoint: Path) -> None:
    on_cpu = denoise(tiny_checkpoint, "cpu", "float32")
    assert worst(denoise(tiny_checkpoint, "cuda", "float16", compiled), on_cpu) < 0.1


def test_replayed_graphs_are_exact(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    eager = denoise(tiny_checkpoint, "cuda", "float32")
    assert worst(denoise(tiny_checkpoint, "cuda", "float32", compiled=True), eager) < 1e-3
