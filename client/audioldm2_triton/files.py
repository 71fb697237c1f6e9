"""Where the client may write a file, found out before anything is generated."""

from os import PathLike
from pathlib import Path
from typing import Final

from audioldm2_triton.errors import invalid

AUDIO_FORMATS: Final = {".wav": "WAV", ".flac": "FLAC"}


def check_audio_path(path: str | PathLike[str]) -> Path:
    """The path of an audio file that could be written. Raises `InvalidArgumentError`."""
    return check_path(path, tuple(AUDIO_FORMATS))


def check_path(path: str | PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """A path with one of the suffixes in a directory that exists. Raises `InvalidArgumentError`."""
    checked = Path(path)
    if checked.suffix.lower() not in suffixes:
        raise invalid("path", str(path), f"a file name that ends in {' or '.join(suffixes)}")
    if not checked.parent.is_dir():
        raise invalid("path", str(path), "a file in a directory that exists")
    return checked
