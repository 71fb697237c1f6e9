"""What closes the models that requests reach first: a server that is to stop, and a later stage that is full.

So no text is encoded for an answer that is refused later; requests inside go on. Each model is a process, told by files
in the folder of the run, which `scripts/serve` makes. Without it, the denoiser alone refuses.
"""

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.server.stage_tensors import DECODER, DENOISER

FOLDER_VARIABLE: Final = "AUDIOLDM2_RUN_FOLDER"
"""The environment variable with the path of the folder of the run."""

_DRAINING: Final = "draining"
_FULL: Final = "-full"


@dataclass(frozen=True)
class Entrance:
    """The entrance of one set of models of a server.

    Args:
        folder: of the run; None: it is always open.
        models: what the names of the models begin with, if the server has several sets.
    """

    folder: Path | None
    models: str = ""

    @property
    def draining(self) -> Path | None:
        return self.folder and self.folder / _DRAINING

    def full(self, stage: str) -> Path | None:
        """The file that is there while a stage of this set is full: the denoiser, or the decoder."""
        return self.folder and self.folder / f"{self.models}{stage}{_FULL}"

    def close(self) -> None:
        """Closes the entrances of all models, for good: the server is to stop."""
        if self.draining:
            self.draining.touch()

    def check_open(self) -> None:
        """Raises `UnavailableError` if no new request is taken."""
        if self.draining and self.draining.exists():
            raise UnavailableError("the server is shutting down; try again")
        for stage in (DENOISER, DECODER):
            full = self.full(stage)
            if full and full.exists():
                raise UnavailableError(f"{stage} is full; try again later")


def entrance_of(model: str, own_name: str) -> Entrance:
    """Returns the entrance of the set that a model belongs to.

    Args:
        model: its name in this server, which ends with `own_name`.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    return Entrance(Path(folder) if folder else None, model.removesuffix(own_name))


class FullSign:
    """Closes an entrance while all engines of its denoiser that work are full."""

    def __init__(self, entrance: Entrance) -> None:
        self._file = entrance.full(DENOISER)
        self._full: dict[int, bool] = {}
        self._lock = threading.Lock()
        self._show(False)  # whatever a predecessor that died has left

    def add_engine(self) -> Callable[[bool | None], None]:
        """Returns what an engine calls with whether it is full, or once with None when it broke, from any thread."""
        with self._lock:
            index = len(self._full)
            self._full[index] = False

        def show(is_full: bool | None) -> None:
            with self._lock:
                before = self._all_full
                if is_full is None:
                    self._full.pop(index, None)
                elif index in self._full:
                    self._full[index] = is_full
                if self._all_full != before:
                    self._show(not before)

        return show

    @property
    def _all_full(self) -> bool:
        return bool(self._full) and all(self._full.values())

    def _show(self, is_full: bool) -> None:
        if self._file and is_full:
            self._file.touch()
        elif self._file:
            self._file.unlink(missing_ok=True)


def show_full_decoders(folder: Path, models: Collection[str]) -> None:
    """Closes the entrances of the sets whose decoders, given by their names, are full, and opens all others."""
    wanted = {folder / f"{model}{_FULL}" for model in models}
    for file in set(folder.glob(f"*{DECODER}{_FULL}")) - wanted:
        file.unlink(missing_ok=True)
    for file in wanted:
        file.touch()
