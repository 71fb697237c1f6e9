"""The light client on each Python that pyproject.toml promises, as pip installs it; servers need 3.11 or 3.12."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile

from contract_stand_in.stand_in_server import stand_in_server
from project import ROOT

PACKAGE = ("pyproject.toml", "README.md", "LICENSE", "client")


def installed_by(python: str, folder: Path) -> Path:
    """The scripts' folder of an environment that this Python makes, with the client."""
    package = folder / "package"
    package.mkdir()
    for name in PACKAGE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, package / name)
    subprocess.run([python, "-m", "venv", folder / "environment"], check=True)
    scripts = folder / "environment" / "bin"
    subprocess.run([scripts / "pip", "install", "--quiet", package], check=True)
    return scripts


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_command_makes_files(version: str, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no python{version} in PATH")
    command = installed_by(python, tmp_path) / "audioldm2"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with stand_in_server(tmp_path / "server") as server:
        for url in (f"grpc://{server.grpc}", f"http://{server.http}"):
            subprocess.run([command, "rain", "--url", url, "-o", "out.flac"], cwd=tmp_path, env=environment, check=True)
            assert soundfile.info(tmp_path / "out.flac").samplerate == 16000
            (tmp_path / "out.flac").unlink()
