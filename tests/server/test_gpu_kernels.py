"""Kernels in Triton's language against float64, by Triton's interpreter: a CPU runs what a GPU would."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

ROUNDING = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(128, 9, 16, 2), (384, 5, 4, 3), (640, 1, 1, 1), (896, 7, 4, 2), (64, 70, 8, 2), (128, 9, 64, 2)]
# Each shape and each dtype with the activation and without.
CASES = [
    (shape, dtype, (row + column) % 2 == 1) for row, shape in enumerate(SHAPES) for column, dtype in enumerate(ROUNDING)
]


def test_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-m", "", __file__, "-k", "exact"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout, run.stdout[-3000:]


needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
    reason="run by test_in_the_interpreter, or on a GPU",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@needs_interpreter
@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype", "activate"), CASES, ids=str)
def test_group_norm_is_exact(activate: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from audioldm2_triton.server import gpu_kernels

    channels, frames, width, rows = shape
    generator = torch.Generator().manual_seed(frames)
    hidden = torch.randn(rows, channels, frames, width, generator=generator) * 3 + 20  # a mean that cancels digits
    hidden = hidden.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(channels, generator=generator).to(DEVICE, dtype) for _ in range(2))

    def expected(part: torch.Tensor) -> torch.Tensor:
        normed = functional.group_norm(part.double(), 32, weight.double(), bias.double(), 1e-5)
        return functional.silu(normed) if activate else normed

    def apart(own: torch.Tensor, exact: torch.Tensor) -> float:
        return float((own.double() - exact).abs().max() / exact.abs().max())

    arguments = (hidden, 32, weight, bias, 1e-5, activate)
    output = gpu_kernels.group_norm(*arguments)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert apart(output, expected(hidden)) < ROUNDING[dtype]

    valid = [1 + row * (frames - 1) // rows for row in range(rows)]
    hidden[0, :, valid[0] :] = float("nan")  # padding may be anything at all
    numbers = torch.int64 if activate else torch.float32  # the VAE's, the UNet's
    positions = torch.tensor([own * width for own in valid], device=DEVICE, dtype=numbers)
    masked = gpu_kernels.group_norm(*arguments, positions)
    for row, own in enumerate(valid):
        assert apart(masked[row : row + 1, :, :own], expected(hidden[row : row + 1, :, :own])) < ROUNDING[dtype]
        assert not masked[row, :, own:].any()


@needs_interpreter
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("columns", [96, 512, 1280])
def test_gated_gelu_is_exact(columns: int, dtype: torch.dtype) -> None:
    from audioldm2_triton.server import gpu_kernels

    hidden = torch.randn(2, 5, 2 * columns, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    value, gate = hidden.double().chunk(2, dim=-1)
    exact = value * functional.gelu(gate)
    assert (gpu_kernels.gated_gelu(hidden).double() - exact).abs().max() < ROUNDING[dtype] * exact.abs().max()
