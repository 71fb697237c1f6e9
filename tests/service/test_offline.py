"""Where a server may have to live: without a network, and in folders whose names have letters outside ASCII and blanks.

A local checkpoint needs no network. And wherever a server takes a folder from its user, the folder may have any name.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import offline_generation
from audioldm2_pipeline import Reference, difference
from namespaces import in_namespace
from project import ROOT


@pytest.mark.parametrize("option", ["--offload=on", pytest.param("--compile=on", marks=pytest.mark.slow)])
def test_a_server_starts_and_generates_without_a_network_in_folders_with_letters(
    option: str, tiny_checkpoint: Path, tmp_path: Path, reference: Reference
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "modèle 模型")
    # No cache of the hub either, in which something could be found that a first start has not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AUDIOLDM2_"))}
    for variable in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment[variable] = str(tmp_path / f"für {variable}")
        Path(environment[variable]).mkdir()
    environment |= {
        "HF_HOME": str(tmp_path / "nothing"),
        "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT / 'tests' / 'support'}",
    }
    script = [sys.executable, offline_generation.__file__, checkpoint, tmp_path, option, "--compile-lengths-in-s=0.2"]
    command = [*in_namespace("--net"), *map(str, script)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == f"{checkpoint.parent.name}/modèle 模型", "the checkpoint as clients are told"
    audio = np.load(tmp_path / "audio.npy")
    call = offline_generation.CALL
    assert difference(audio, reference.generate(call)) <= reference.tolerance(call)
    assert "huggingface.co" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "nothing").exists()
