"""A certificate for this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(directory: Path) -> Path:
    """Makes `certificate.pem`, for localhost, with its key in `key.pem` beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost "
        "-keyout key.pem -out certificate.pem",
        shell=True,
        check=True,
        capture_output=True,
        cwd=directory,
    )
    return directory / "certificate.pem"
