"""A local checkpoint needs no network: a real server starts and generates where there is none but the loopback."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import offline_generation
from audioldm2_pipeline import Reference, difference
from namespaces import in_namespace
from project import ROOT


def test_a_server_starts_and_generates_without_a_network(
    tiny_checkpoint: Path, tmp_path: Path, reference: Reference
) -> None:
    # No cache of the hub either, in which something could be found that a first start has not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AUDIOLDM2_"))}
    environment |= {
        "HF_HOME": str(tmp_path / "nothing"),
        "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT / 'tests' / 'support'}",
    }
    command = [*in_namespace("--net"), sys.executable, offline_generation.__file__, str(tiny_checkpoint), str(tmp_path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    audio = np.load(tmp_path / "audio.npy")
    call = offline_generation.CALL
    assert difference(audio, reference.generate(call)) <= reference.tolerance(call)
    assert "huggingface.co" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "nothing").exists()
