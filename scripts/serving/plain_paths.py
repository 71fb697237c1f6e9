"""Plain names for folders whose paths have blanks or non-ASCII letters.

Triton's Python backend embeds an interpreter that starts in the locale C and ignores the environment: whatever
`PYTHONUTF8` and `LC_ALL` say, no model can open a path with a non-ASCII letter. Blanks break the commands with which
torch.compile runs the compiler.
"""

import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_LINKS: Final = "links"
_FOLDER_VARIABLES: Final = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class PlainPathError(RuntimeError):
    """There is no place for links."""


def plain_temporary_folder() -> Path:
    """Returns the folder for temporary files, or another one whose path Triton and its shell can read.

    Raises `PlainPathError` if there is none.
    """
    folders = (tempfile.gettempdir(), "/tmp", "/var/tmp")
    for folder in folders:
        # Triton starts each model by a shell, without quotes.
        if _is_plain(folder) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise PlainPathError(f"TMPDIR: got {folders[0]!r} but expected a path of ASCII letters, digits and ._-+ only")


def with_plain_folders(environment: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Returns an environment whose folders for temporary files and compiled code have plain paths."""
    plain = dict(environment)
    for name in _FOLDER_VARIABLES:
        if plain.get(name):
            plain[name] = str(plain_path(Path(plain[name]), directory))
    return plain


def plain_path(path: Path, directory: Path) -> Path:
    """Returns a plain path of the same folder: `path` itself, or a link in `directory`."""
    if _is_plain(str(path)):
        return path
    links = directory / _LINKS
    links.mkdir(exist_ok=True)
    for link in links.iterdir():
        if link.readlink() == path:
            return link
    link = links / str(len(list(links.iterdir())))
    link.symlink_to(path, target_is_directory=True)
    return link


def _is_plain(path: str) -> bool:
    return shlex.quote(path) == path
