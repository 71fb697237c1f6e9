"""The same precision with the kernels of a processor that has AVX2 and nothing wider.

PyTorch and oneDNN choose their kernels by the processor, and other kernels round differently.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2", reason="the other tests have run with AVX2's kernels themselves"
)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        # The two schedulers that amplify rounding most stand for all.
        ("test_precision.py", "stages or alone and (LMSDiscrete or DEISMultistep)"),
        pytest.param("test_precision.py", "test_", marks=pytest.mark.slow),
        pytest.param("test_parity.py", "LMSDiscrete or DEISMultistep", marks=pytest.mark.slow),
    ],
)
def test_precision_and_parity(file: str, chosen: str) -> None:
    # A session of its own, with a server of its own: the kernels are chosen when torch is imported.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | AVX2
    check = "import torch; assert torch.backends.cpu.get_cpu_capability() == 'AVX2'"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    options = ("-n", "0", "-p", "no:cacheprovider", "-k", chosen)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:]
