"""Checks whether this Python can run the server: its version, and the parts that distributions package separately.

Also runs as a script, before any environment exists, so it imports only the standard library.
"""

import ctypes
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Final

# Current diffusers and transformers need 3.11; numpy 1.26, which the Triton from pip needs, ends at 3.12.
OLDEST: Final = (3, 11)
NEWEST: Final = (3, 12)


class InterpreterError(RuntimeError):
    """This Python cannot run the server."""


def check_version() -> None:
    """Raises `InterpreterError` for a Python that the project's pinned packages have no wheels for."""
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        raise InterpreterError(f"got Python {_dotted(version)} but expected {_dotted(OLDEST)} to {_dotted(NEWEST)}")


def check_venv() -> None:
    """Raises `InterpreterError`, which names Debian's package, if virtual environments cannot be made."""
    version = _dotted(sys.version_info[:2])
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        raise InterpreterError(f"got no venv module: on Debian and Ubuntu, apt-get install python{version}-venv")


def library_directory() -> Path:
    """Returns the folder of the shared library libpython, in which Triton's Python backend runs the models.

    Raises `InterpreterError`, which names Debian's package, if there is none.
    """
    version = _dotted(sys.version_info[:2])
    name = f"libpython{version}.so.1.0"
    configured = Path(sysconfig.get_config_var("LIBDIR"))
    for directory in (configured, configured / (sysconfig.get_config_var("MULTIARCH") or "")):
        if (directory / name).exists():
            return directory
    try:
        ctypes.CDLL(name)  # in the system's other folders
    except OSError:
        raise InterpreterError(
            f"got no {name}, which Triton's Python backend loads: on Debian and Ubuntu, apt-get install "
            f"libpython{version}; a Python of your own has to be configured with --enable-shared"
        ) from None
    return configured


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    try:
        check_version()
        check_venv()
        library_directory()
    except InterpreterError as error:
        sys.exit(str(error))
