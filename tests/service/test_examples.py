"""The examples of EXAMPLES.md, run as they stand, on the test server's ports."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import soundfile

from audioldm2_pipeline import Call, Reference, difference
from audioldm2_triton.audio.origin import read_origin
from environments import environment, python
from plain_requests import on_test_ports
from project import ROOT
from serving.local_server import LocalServer

PAGE: Final = (ROOT / "model_repository" / "EXAMPLES.md").read_text()
EXAMPLES: Final = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
NAMES: Final = ("curl", "best", "command", "plain", "asyncio", "diffusers", "node", "events", "binary")
FILES: Final = {
    "curl": ["curl.mp3"],
    "best": ["best.wav"],
    "command": [
        *("rain-seed1.opus", "rain-seed2.opus", "rain-seed3.opus", "rain-seed4.opus"),
        *("again.wav", "sounds/0001.wav", "sounds/0002.wav"),
    ],
    "plain": ["plain.flac"],
    "asyncio": ["asyncio-0.ogg", "asyncio-1.ogg", "asyncio-2.ogg"],
    "diffusers": ["best.flac"],
    "node": ["node.flac"],
    "events": ["node.opus"],
    "binary": ["binary.flac"],
}


def run(name: str, server: LocalServer, folder: Path) -> str:
    """Runs one as a user would, in the environment of the light client; returns what it prints."""
    language, code = dict(zip(NAMES, EXAMPLES, strict=True))[name]
    program = {"bash": ["bash", "-euo", "pipefail"], "python": [python("client")], "javascript": ["node"]}[language]
    tools = ["curl", "jq"] if language == "bash" else program[:1]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    script = folder / {"bash": "example.sh", "python": "example.py", "javascript": "example.mjs"}[language]
    script.write_text(on_test_ports(code, server))
    path = os.pathsep.join([str(environment("client") / "bin"), os.environ["PATH"]])
    variables = {**os.environ, "PATH": path}
    ended = subprocess.run([*program, script], cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", NAMES)
def test_an_example_makes_its_files(name: str, server: LocalServer, tmp_path: Path) -> None:
    printed = run(name, server, tmp_path)
    for file in FILES[name]:
        assert soundfile.info(tmp_path / file).duration == 5, file
        assert 0.001 < np.abs(soundfile.read(tmp_path / file)[0]).max() <= 1.1, file
        assert read_origin((tmp_path / file).read_bytes()).arguments["audio_length_in_s"] == 5, file
    if name == "events":
        assert printed.splitlines() == [f"{step} of 20" for step in range(1, 21)]
    if name == "best":
        assert re.fullmatch(r'\{"seed_used":\d+,"score":\[[-\d.e]+,[-\d.e]+,[-\d.e]+\]\}', printed.strip()), printed
    if name == "command":
        assert sorted(printed.splitlines()[-2:]) == ["sounds/0001.wav", "sounds/0002.wav"]
        seeds = [read_origin((tmp_path / file).read_bytes()).arguments["seed"] for file in FILES[name][:5]]
        assert seeds == [1, 2, 3, 4, 3]


def test_the_diffusers_script_has_the_same_sound(server: LocalServer, reference: Reference, tmp_path: Path) -> None:
    run("diffusers", server, tmp_path)
    call = Call(
        "Rain on a tin roof", "low quality", 5.0, 10, 3.5, num_waveforms_per_prompt=3, seed=0, scheduler="DDIMScheduler"
    )
    audio = reference.generate(call)
    expected = audio[np.argmax(reference.score(call.prompt, audio))]
    rounded = 2.0**-15 / np.abs(expected).max()  # by the file, which has 16 bits
    found = soundfile.read(tmp_path / "best.flac", dtype="float32")[0]
    assert difference(found, expected) <= reference.tolerance(call) + rounded
