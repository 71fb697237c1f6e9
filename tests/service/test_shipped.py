"""Everything that is offered works with what ships: on servers in the product's environment, with no tool of ours."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.contract import MIN_AUDIO_LENGTH_IN_S, SCHEDULERS
from environments import environment, python
from every_schedule import STEPS
from project import ROOT
from serving.local_server import LocalServer, local_server

DEADLINE_IN_S = 300  # a request that is never answered fails rather than hangs


def descendants(process: int) -> set[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {process} | {each for child in children for each in descendants(int(child))}


def libraries(process: int) -> set[Path]:
    """The files in a `site-packages` that a process has loaded."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if "/site-packages/" in line}


def test_the_tests_servers_run_in_what_ships(server: LocalServer) -> None:
    loaded = [libraries(process) for process in descendants(server.process.pid)]
    stages = [files for files in loaded if any(file.name == "libtorch_cpu.so" for file in files)]
    assert len(stages) >= 3
    for files in loaded:
        assert all(file.is_relative_to(environment("product").resolve()) for file in files)


def test_every_scheduler_is_served(server: LocalServer) -> None:
    cases = list(product(SCHEDULERS, STEPS))
    with AudioLDM2Client(server.grpc_url) as client, ThreadPoolExecutor(len(cases)) as pool:

        def generate(case: tuple[str, int]) -> np.ndarray:
            scheduler, steps = case
            result = client.generate(
                "rain",
                audio_length_in_s=MIN_AUDIO_LENGTH_IN_S,
                num_inference_steps=steps,
                scheduler=scheduler,
                seed=0,
                timeout=DEADLINE_IN_S,
            )
            return result.audio

        generated = dict(zip(cases, pool.map(generate, cases), strict=True))
    for case, audio in generated.items():
        assert audio.shape == (1, 1600), case
        assert 0 < np.abs(audio).max() <= 1, case


@pytest.mark.parametrize(
    ("name", "command"), [("product", "serving"), ("product", "checkpoints"), ("plot", "serving.quickstart")]
)
def test_a_command_has_what_it_imports(name: str, command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    run = subprocess.run([python(name), "-m", command, "--help"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["product", pytest.param("image", marks=pytest.mark.slow)])
def test_every_schedule_in_a_process_of_its_own(name: str, tiny_checkpoint: Path) -> None:
    """The image has other versions of what nobody pins: numpy 2 above all."""
    paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "tests" / "support")])
    run = subprocess.run(
        [python(name), ROOT / "tests" / "support" / "every_schedule.py", tiny_checkpoint],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["audio"] == len(SCHEDULERS) * len(STEPS)
    assert report["numpy"].startswith("2." if name == "image" else "1.26.")


@pytest.mark.slow
def test_every_kind_of_checkpoint_is_served(tiny_checkpoint: Path, tmp_path: Path) -> None:
    kinds = ("music", "large", "speech")
    for kind in kinds:
        command = [ROOT / "scripts" / "checkpoint", "build", f"tiny-{kind}", "--out", tmp_path / kind]
        subprocess.run(command, check=True, capture_output=True)
    also = [f"--also={kind}={tmp_path / kind}" for kind in kinds]
    with local_server(tiny_checkpoint, tmp_path / "log", *also) as server:
        for model in ("audioldm2", *(f"{kind}_audioldm2" for kind in kinds)):
            transcription = {"transcription": "Good morning"} if model.startswith("speech") else {}
            with AudioLDM2Client(server.grpc_url, model=model) as client:
                result = client.generate(
                    "rain", audio_length_in_s=0.3, num_inference_steps=2, timeout=DEADLINE_IN_S, **transcription
                )
            assert result.audio.shape == (1, 4800), model
            assert 0 < np.abs(result.audio).max() <= 1, model
