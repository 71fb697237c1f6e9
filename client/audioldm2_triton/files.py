"""Checks where the client may write a file, before anything is generated."""

from os import PathLike
from pathlib import Path
from typing import Any, Final

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


def import_soundfile() -> Any:
    """Returns the module. Raises `ImportError`, which says what is missing: not every machine has libsndfile.

    Imported only where a file is written, so that the rest of the client works without it.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise ImportError(f"audio files need the package soundfile, and libsndfile: {error}") from error
    return soundfile


def check_writable(path: Path) -> None:
    """Raises `OSError`, which names the path, if a file there cannot be written; leaves nothing behind."""
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()
