"""Whose weights are on a device: the stage processes of one device take turns by a lock on a file.

A lock of `flock` goes with its process: whoever crashes has given it back.
"""

import fcntl
import os
from pathlib import Path
from typing import Final

LEASES: Final = Path("/dev/shm")
"""Where the files lie: seen by all processes of the machine or the container, and empty when it starts."""


class DeviceLease:
    """The right to have weights on one device, which one of its holders has at a time.

    First come, first served: who waits for the lease also holds the queue, so that a holder who gives way is not the
    first to come back. Used by one thread at a time.

    Args:
        device: a name that all processes have for the device, such as `cpu`.
    """

    def __init__(self, device: str, directory: Path = LEASES) -> None:
        # One user's processes: another's files could not be opened.
        stem = f"audioldm2-{os.getuid()}-{device}"
        self._queue, self._lease = (_open(directory / f"{stem}.{kind}") for kind in ("queue", "lease"))

    def acquire(self) -> None:
        """Waits until the lease is free."""
        fcntl.flock(self._queue, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lease, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._queue, fcntl.LOCK_UN)

    def release(self) -> None:
        fcntl.flock(self._lease, fcntl.LOCK_UN)

    def is_wanted(self) -> bool:
        """Whether somebody waits for the lease; asked by its holder."""
        try:
            fcntl.flock(self._queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._queue, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Gives back what is held."""
        for file in (self._queue, self._lease):
            os.close(file)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
