"""The files of the client: where it may write, checked before anything is generated, and prompts to read."""

import sys
from os import PathLike
from pathlib import Path
from typing import Any, Final

from audioldm2_triton.errors import invalid

STANDARD_INPUT: Final = "-"
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
    if not is_new and not path.is_file() and not path.is_dir():
        return  # a device or a pipe, whose reader would take this for the end
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()


def waveform_files(path: Path, count: int) -> list[Path]:
    """Returns the files of so many waveforms, the best first."""
    return [path, *(path.with_stem(f"{path.stem}-{index}") for index in range(1, count))]


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """Returns the prompts of a file, or of standard input for `-`, with their line numbers, from 1.

    Raises `InvalidArgumentError` or `OSError`.
    """
    content = sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise invalid("--batch", str(path), "text in UTF-8") from None
    if "\0" in text:
        raise invalid("--batch", str(path), "text in UTF-8, not UTF-16 or UTF-32: it contains NUL characters")
    lines = text.split("\n")
    prompts = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise invalid("--batch", str(path), "at least one line with a prompt")
    return prompts
