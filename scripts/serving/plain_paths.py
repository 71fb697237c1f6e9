"""Plain names for folders whose paths have blanks or non-ASCII letters.

Triton's Python backend embeds an interpreter that starts in the locale C and ignores the environment: whatever
`PYTHONUTF8` and `LC_ALL` say, no model can open a path with a non-ASCII letter. Blanks break the commands with which
torch.compile runs the compiler.
"""

import shlex
from pathlib import Path
from typing import Final

_LINKS: Final = "links"


class PlainPathError(RuntimeError):
    """There is no place for links."""


def check_plain(directory: Path) -> None:
    """Raises `PlainPathError` if Triton and its shell cannot read the path of this temporary folder."""
    if not _is_plain(str(directory)):  # Triton starts each model by a shell, without quotes
        parent = str(directory.parent)
        raise PlainPathError(f"TMPDIR: got {parent!r} but expected a path of ASCII letters, digits and ._-+ only")


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
