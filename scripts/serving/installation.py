"""Finds `tritonserver`: the container's, or else the one in the wheel `nvidia-pytriton`."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from serving.interpreter import InterpreterError, library_directory
from serving.plain_paths import plain_path

CONTAINER_BINARY: Final = Path("/opt/tritonserver/bin/tritonserver")


class InstallationError(RuntimeError):
    """There is no Triton server here."""


@dataclass(frozen=True)
class TritonInstallation:
    binary: Path
    arguments: tuple[str, ...]  # that this installation needs
    environment: dict[str, str]


def find_triton(run_directory: Path) -> TritonInstallation:
    """Finds the server, and makes the links that the wheel's needs in `run_directory`. Raises `InstallationError`."""
    environment = dict(os.environ)
    # The Python backend's stub takes its interpreter from PATH. The link is to the virtual environment's parent: the
    # package, installed by a relative path, lies beside the environment.
    folder = Path(sys.executable).parent.parent
    interpreters = plain_path(folder.parent, run_directory) / folder.name / "bin"
    environment["PATH"] = os.pathsep.join([str(interpreters), environment.get("PATH", "")])
    container = CONTAINER_BINARY if CONTAINER_BINARY.exists() else shutil.which("tritonserver")
    if container:
        return TritonInstallation(Path(container), (), environment)
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise InstallationError("no tritonserver: run this in Triton's container, or install the extra `triton`")
    site_packages = Path(spec.origin).parent.parent
    wheel = site_packages / "pytriton" / "tritonserver"
    backend = run_directory / "backends" / "python"
    backend.mkdir(parents=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for part in (
        wheel / "backends" / "python" / "libtriton_python.so",
        wheel / "backends" / "python" / "triton_python_backend_utils.py",
        wheel / "python_backend_stubs" / version / "triton_python_backend_stub",
    ):
        if not part.exists():
            raise InstallationError(f"nvidia-pytriton has no {part.name} for Python {version}: got no {part}")
        (backend / part.name).symlink_to(part)
    try:
        libraries = [site_packages / "nvidia_pytriton.libs", library_directory()]
    except InterpreterError as error:
        raise InstallationError(str(error)) from None
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        [*map(str, libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    )
    return TritonInstallation(wheel / "bin" / "tritonserver", (f"--backend-directory={backend.parent}",), environment)
