"""The folder of one run of `scripts/serve`: what it holds, whom it belongs to, and how all of it goes away again.

A run's shared memory begins with the folder's name. So whoever finds the folder of a run that was killed knows what
else that run has left: a server, its stages, and their files in `/dev/shm`.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

from serving.plain_paths import plain_temporary_folder
from serving.stage_processes import creation_time, kill_group

PREFIX: Final = "audioldm2-triton-"
SHARED_MEMORY: Final = Path("/dev/shm")
logger = logging.getLogger(__name__)

_OWNER: Final = "owner"
_SERVER: Final = "server"


@contextmanager
def run_directory() -> Iterator[Path]:
    """Makes the folder of this run, and removes it with all that the run has left, even if this process is killed.

    Removes what killed predecessors have left, too. Raises `PlainPathError`.
    """
    parent = plain_temporary_folder()
    remove_dead_runs(parent)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    owner = os.open(directory / _OWNER, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s has no locks (%s): what killed runs leave there stays", parent, error.strerror)
        with _reaper(directory):
            yield directory
    finally:
        remove_run(directory)
        os.close(owner)


@contextmanager
def _reaper(directory: Path) -> Iterator[None]:
    """Starts a process that removes the run when this one ends, however it ends."""
    reaper = subprocess.Popen(
        [sys.executable, "-m", "serving.reaper", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what kills this process and its group must not kill the reaper
    )
    try:
        yield
    finally:
        reaper.terminate()
        reaper.wait()


def note_server(directory: Path, process: int) -> None:
    """Notes the server that a run has started, the leader of a process group of its own."""
    (directory / _SERVER).write_text(f"{process} {creation_time(process)!r}")


def remove_run(directory: Path) -> None:
    """Ends a run's server, if it is still there, and removes its shared memory and its folder."""
    end_server(directory)
    shutil.rmtree(directory, ignore_errors=True)


def end_server(directory: Path) -> None:
    """Kills the server that a run has noted, with its stages, and removes its shared memory."""
    with contextlib.suppress(OSError, ValueError):
        process, created = (directory / _SERVER).read_text().split()
        if _may_be(int(process), float(created)):
            kill_group(int(process))
    for file in SHARED_MEMORY.glob(f"{directory.name}*"):
        file.unlink(missing_ok=True)


def _may_be(process: int, created: float) -> bool:
    """Whether this is the process that was created then, or has gone; stages may outlive it, in its process group."""
    try:
        return creation_time(process) == created
    except psutil.NoSuchProcess:
        return True


def remove_dead_runs(parent: Path) -> None:
    """Removes the runs below `parent` whose owner has been killed: a living one holds a lock on its folder."""
    for directory in parent.glob(f"{PREFIX}*"):
        try:
            owner = os.open(directory / _OWNER, os.O_RDWR)
        except OSError:  # somebody else's, or none of ours
            continue
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_run(directory)
        except OSError:
            continue
        finally:
            os.close(owner)
