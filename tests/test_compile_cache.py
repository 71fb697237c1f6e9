"""Compiled code that outlives its process: found again, or ignored where it is damaged."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from audioldm2_triton.server.compilation import compile_cache
from audioldm2_triton.server.settings import Settings

CPU = torch.device("cpu")
COMPILING = """
import sys
import torch
from audioldm2_triton.server.compilation import compile_cache
from audioldm2_triton.server.settings import Settings
settings = Settings("checkpoint", compile_cache=sys.argv[1])
cache = compile_cache(settings, "stage", torch.device("cpu"), torch.float32, ())
restored = cache.restore()
values = torch.linspace(0, 1, 99)
assert torch.allclose(torch.compile(lambda x: torch.tanh(x) * 3 + x.flip(0).softmax(0))(values),
                      torch.tanh(values) * 3 + values.flip(0).softmax(0))
cache.save()
print(restored)
"""
COUNTING_COMPILER = """#!/usr/bin/env bash
case "$*" in *" -shared "*) echo "$@" >> {calls};; esac
exec {compiler} "$@"
"""


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("damage", ["none", "cut", "garbage", "missing"])
def test_compiled_code_outlives_the_process(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings("checkpoint", compile_cache=str(tmp_path))
    cache = compile_cache(settings, "stage", CPU, torch.float32, ("shape",))
    assert cache.path is not None
    assert cache.path != compile_cache(settings, "stage", CPU, torch.float32, ("other",)).path
    assert cache.path != compile_cache(settings, "stage", CPU, torch.bfloat16, ("shape",)).path
    compiled = torch.compile(lambda values: torch.sin(values) * 3 + values.flip(0))
    compiled(torch.ones(7))
    cache.save()
    if damage == "cut":
        cache.path.write_bytes(cache.path.read_bytes()[:-10])
    elif damage == "garbage":
        cache.path.write_bytes(b"garbage" * 100)
    elif damage == "missing":
        cache.path.unlink()
    with caplog.at_level("INFO"):
        assert cache.restore() == (damage == "none")
    said = {"none": "restored from", "cut": "not whole", "garbage": "not whole", "missing": "nothing yet"}[damage]
    assert said in caplog.text


@pytest.mark.slow
def test_libraries_of_a_cpu_are_not_compiled_again(tmp_path: Path) -> None:
    """PyTorch's own directory is another each time, as in a container that has started anew."""
    compiler = shutil.which("g++")
    assert compiler is not None
    (tmp_path / "bin").mkdir()
    compiled, restored = [], []
    for start in range(2):
        calls = tmp_path / f"calls-{start}"
        calls.touch()
        (tmp_path / "bin" / "g++").write_text(COUNTING_COMPILER.format(calls=calls, compiler=compiler))
        (tmp_path / "bin" / "g++").chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"directory-{start}"),
        }
        command = [sys.executable, "-c", COMPILING, tmp_path / "cache"]
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        restored.append(run.stdout.strip())
        compiled.append(len(calls.read_text().splitlines()))
    assert restored == ["False", "True"]
    # PyTorch finds out anew what the processor can do, in libraries that it does not load.
    assert compiled[1] < compiled[0], compiled


def test_without_a_directory_there_is_no_cache() -> None:
    cache = compile_cache(Settings("checkpoint"), "stage", CPU, torch.float32, ())
    assert not cache.restore()
    cache.save()
