"""Checks where the client may write a file, before anything is generated."""

from os import PathLike
from pathlib import Path
from typing import Final

from audioldm2_triton.errors import invalid

AUDIO_FORMATS: Final = {".wav": "WAV", ".flac": "FLAC"}


def check_audio_path(path: str | PathLike[str]) -> Path:
    """Returns the path of an audio file that can be written. Raises `InvalidArgumentError`."""
    return check_path(path, tuple(AUDIO_FORMATS))


def check_path(path: str | PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """Returns a path with one of the suffixes, in an existing directory. Raises `InvalidArgumentError`."""
    checked = Path(path)
    if checked.suffix.lower() not in suffixes:
        raise invalid("path", str(path), f"a file name ending in {' or '.join(suffixes)}")
    if not checked.parent.is_dir():
        raise invalid("path", str(path), "a file in an existing directory")
    return checked
