"""The files of the client: where it may write, checked before anything is generated, and prompts to read."""

import sys
from os import PathLike
from pathlib import Path
from typing import Final

from audioldm2_triton.audio.encoding import FORMATS, check_encodable
from audioldm2_triton.audio.origin import Origin, read_origin
from audioldm2_triton.errors import InvalidArgumentError, invalid

STANDARD_INPUT: Final = Path("-")
STANDARD_OUTPUT: Final = Path("-")


def check_audio_path(
    path: str | PathLike[str], audio_format: str | None = None, name: str = "path"
) -> tuple[Path, str]:
    """Returns the path of an audio file that can be written, and the name of its format: by default by its suffix.

    Raises `InvalidArgumentError` about `name`, and `ImportError` if the format needs libsndfile and there is none.
    """
    if audio_format is not None:
        check_encodable(audio_format)
        return check_path(path, (FORMATS[audio_format].suffix,), name), audio_format
    # Of several formats with a suffix the first.
    by_suffix: dict[str, str] = {}
    for key, each in FORMATS.items():
        by_suffix.setdefault(each.suffix, key)
    checked = check_path(path, tuple(by_suffix), name)
    audio_format = by_suffix[checked.suffix.lower()]
    check_encodable(audio_format)
    return checked, audio_format


def check_path(path: str | PathLike[str], suffixes: tuple[str, ...], name: str = "path") -> Path:
    """Returns a path with one of the suffixes, in an existing directory. Raises `InvalidArgumentError` about `name`."""
    checked = Path(path)
    if checked.suffix.lower() not in suffixes:
        raise invalid(name, str(path), f"a file name ending in {_either(suffixes)}")
    if not checked.parent.is_dir():
        raise invalid(name, str(path), "a file in an existing directory")
    return checked


def _either(words: tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


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


def read_file_origin(path: Path) -> Origin:
    """Returns what a file says about its origin. Raises `InvalidArgumentError`, which names the file, or `OSError`."""
    try:
        return read_origin(path.read_bytes())
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from error


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """Returns the prompts of a file, or of standard input for `-`, with their line numbers, from 1.

    Raises `InvalidArgumentError` or `OSError`.
    """
    content = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
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
