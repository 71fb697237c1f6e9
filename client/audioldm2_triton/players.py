"""Players: programs of this machine that play a sound."""

import asyncio
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Final

from audioldm2_triton.result import GenerationResult

PLAYERS: Final[Mapping[str, Sequence[str]]] = {
    "ffplay": ("-nodisp", "-autoexit", "-loglevel", "error"),
    "aplay": ("--quiet",),
    "paplay": (),
    "afplay": (),
}
"""The options of each, so that it plays a file, ends with it, and says nothing but errors."""


def find_player() -> Sequence[str]:
    """Returns the command of the first player on PATH, to which a file is added. Raises `OSError` if there is none."""
    for name, options in PLAYERS.items():
        if program := shutil.which(name):
            return (program, *options)
    raise OSError(f"--play: got no player on PATH but expected one of {', '.join(PLAYERS)}")


async def play(player: Sequence[str], result: GenerationResult) -> None:
    """Plays the best waveform to its end. Cancelling the task stops the player. Raises `OSError` if it fails."""
    # Always as WAV, which every player knows, whatever the format of the output.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "best.wav"
        file.write_bytes(result.encode("wav"))
        process = await asyncio.create_subprocess_exec(
            *player,
            file,
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
        )
        try:
            _, complaint = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode:
        raise OSError(f"{player[0]}: exit code {process.returncode}: {complaint.decode(errors='replace')}")
