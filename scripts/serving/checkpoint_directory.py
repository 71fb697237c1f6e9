"""The directory of the checkpoint that is served: given, or fetched from the hub, and verified before Triton starts.

Verifying imports all libraries and takes longer than half a start. So a checkpoint that was found whole is not verified
again as long as nothing has changed that the verdict depends on.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final

from audioldm2_triton.server.settings import SettingsError
from serving.server_error import ServerError

SCRIPTS: Final = Path(__file__).resolve().parent.parent
VERDICTS: Final = "verified.json"
"""In the cache: for each directory the state in which it was found whole."""
_LIBRARIES: Final = ("diffusers", "safetensors", "torch", "transformers")


def local_checkpoint(checkpoint: str, cache: Path, option: str) -> Path:
    """Returns the directory of a checkpoint; fetches one with a hub id into `cache` unless it is there.

    Args:
        checkpoint: a directory, or a hub id, with a revision or without: cvssp/audioldm2, cvssp/audioldm2@refs/pr/3.
        option: the option that gave it, for errors.

    Raises `SettingsError` for what is neither, `ServerError` if it cannot be fetched.
    """
    if not checkpoint:
        raise SettingsError(f"{option}: got nothing but expected a directory or a hub id")
    path = Path(checkpoint).expanduser()
    repository, _, revision = checkpoint.partition("@")
    if not path.exists() and repository.count("/") == 1 and not repository.startswith((".", "~", "/")):
        path = cache / (f"{repository}@{revision.replace('/', '--')}" if revision else repository)
        if not path.exists():
            asked = ("--revision", revision) if revision else ()
            _run_checkpoint_command(option, "fetch", repository, *asked, "--out", str(path))
    if not path.is_dir():
        raise SettingsError(f"{option}: got {checkpoint!r} but expected a directory or a hub id")
    return path.resolve()


def verify_checkpoint(directory: Path, cache: Path, option: str) -> None:
    """Raises `ServerError` unless the checkpoint is whole, or was found so before and has not changed."""
    verdicts = _read_verdicts(cache / VERDICTS)
    state = _state(directory)
    if verdicts.get(str(directory)) == state:
        return
    _run_checkpoint_command(option, "verify", str(directory))
    kept = {path: seen for path, seen in verdicts.items() if Path(path).is_dir()}
    _write_verdicts(cache / VERDICTS, {**kept, str(directory): state})


def _run_checkpoint_command(option: str, *arguments: str) -> None:
    """Runs it in a separate process, so that the memory of its imports is free again when the server runs."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-m", "checkpoints", *arguments]
    # Standard output belongs to `scripts/serve`; progress bars and faults go to standard error.
    if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
        raise ServerError(f"{option}: {' '.join(arguments[:2])} failed, see above")


def _state(directory: Path) -> str:
    """Returns a digest of all that the verdict depends on: the files, the code that judges and the libraries."""
    digest = hashlib.sha256()
    for library in _LIBRARIES:
        digest.update(f"{library} {version(library)}\n".encode())
    for path in (*_files(SCRIPTS / "checkpoints", "*.py"), *_files(directory, "*")):
        # The time of the last change of the inode: unlike that of the content, no copying tool sets it back.
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_ctime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(directory: Path, pattern: str) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob(pattern)) if path.is_file())


def _read_verdicts(path: Path) -> Mapping[str, str]:
    try:
        verdicts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none yet, or half a one
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write_verdicts(path: Path, verdicts: Mapping[str, str]) -> None:
    """Writes them, or leaves it: a folder that cannot be written costs the next start some seconds, no more."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(verdicts, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
