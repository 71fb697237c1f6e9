"""Fetches checkpoints from the Hugging Face hub: safetensors only, resumable, and never incomplete.

`huggingface_hub.snapshot_download` discards an unfinished file, which can be gigabytes here, when its process ends. And
when the network is down, it takes an incomplete directory for a complete one. So the files are fetched one by one.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NoReturn

from .layout import MODEL_INDEX, REVISION_FILE, WEIGHTS, belongs, is_pickle, is_weights, plain_name, variant_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling
    from tqdm import tqdm

logger = logging.getLogger(__name__)

_UNFINISHED: Final = ".unfinished"
_LOCK: Final = ".lock"
_BLOCK: Final = 1 << 20  # bytes
_TIMEOUT: Final = 30.0  # s without a byte
_ATTEMPTS: Final = 3  # in a row without a byte


class FetchError(Exception):
    """A checkpoint could not be fetched; the message is one line for the user."""


@dataclass(frozen=True)
class Revision:
    """Identifies the files of a directory; written beside them."""

    repo_id: str
    revision: str  # as requested
    sha: str  # the commit it pointed to
    variant: str = ""  # of the weights, such as fp16


@dataclass(frozen=True)
class _File:
    path: str  # here
    source: str  # in the repository
    size: int  # bytes
    sha256: str | None  # for large files
    blob_id: str | None  # git's hash, for all others


def fetch(repo_id: str, revision: str, out: Path, variant: str = "") -> str:
    """Downloads a checkpoint into the new directory `out` and returns the commit.

    The files are written to `out` + ".partial", which is renamed once it is complete and verified. After a failure the
    same call resumes where it stopped. The endpoint and the token come from the environment (HF_ENDPOINT, HF_TOKEN).

    Args:
        variant: of the weights, as in diffusers: with `fp16` the files `*.fp16.safetensors`, stored without the name.

    Raises `FetchError`.
    """
    try:
        return _fetch(repo_id, revision, out, variant)
    except OSError as error:
        raise FetchError(_explain(error, repo_id, revision)) from error
    except ValueError as error:
        raise FetchError(f"{repo_id}: {' '.join(str(error).split())}") from error


def _fetch(repo_id: str, revision: str, out: Path, variant: str) -> str:
    from httpx2 import HTTPError
    from tqdm import tqdm

    try:
        resolved, files = _list(repo_id, revision, variant)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if _read_revision(out) == resolved:
                return resolved.sha
            raise FetchError(f"{out}: got an existing path but expected a new directory")
        partial = out.with_name(out.name + ".partial")
        with _claimed(partial):
            _forget_other_commits(partial, resolved)
            _check_space(partial, files)
            with tqdm(total=sum(file.size for file in files), desc=repo_id, unit="B", unit_scale=True) as progress:
                for file in files:
                    _download(file, resolved, partial, progress)
            _check(partial, repo_id)
            (partial / _LOCK).unlink()
            partial.rename(out)
    except HTTPError as error:
        raise FetchError(_explain(error, repo_id, revision)) from error
    return resolved.sha


def _list(repo_id: str, revision: str, variant: str) -> tuple[Revision, list[_File]]:
    """Returns the commit of a revision, and the checkpoint's files in it.

    Raises `FetchError` for a component without weights, before anything is downloaded.
    """
    from huggingface_hub import HfApi, constants

    info = HfApi(constants.ENDPOINT).model_info(repo_id, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    names = {sibling.rfilename for sibling in siblings}
    if MODEL_INDEX not in names or info.sha is None:
        raise FetchError(f"{repo_id}: got no {MODEL_INDEX} but expected a repository in the layout of a pipeline")
    renamed = {name: plain_name(name, variant) for name in names}
    for component, stem in WEIGHTS.items():
        own = sorted(name for name in names if name.startswith(f"{component}/"))
        if not any(is_weights(renamed[name], stem) for name in own):
            raise FetchError(f"{repo_id}: {_explain_weights(component, own, stem)}")
    wanted: dict[str, _File] = {}
    for sibling in siblings:
        path = renamed[sibling.rfilename]
        # A component that has both gives the variant.
        if belongs(path) and (path not in wanted or path != sibling.rfilename):
            wanted[path] = _file(sibling, path)
    return Revision(repo_id, revision, info.sha, variant), [wanted[path] for path in sorted(wanted)]


def _explain_weights(component: str, names: list[str], stem: str) -> str:
    """Returns what a component has instead of weights that can be fetched, and the way to get some, if there is one."""
    expected = f"but expected {component}/{stem}.safetensors"
    variants = sorted({variant for name in names if (variant := variant_of(name, stem))})
    if variants:
        files = ", ".join(name for name in names if variant_of(name, stem))
        return f"got {files} only {expected}; fetch them by `scripts/checkpoint fetch` with --variant {variants[0]}"
    pickles = [name for name in names if is_pickle(name)]
    if pickles:
        return (
            f"got {', '.join(pickles)} only {expected}: loading a pickle can run code. Where a pull request on the hub "
            "adds safetensors, fetch its revision, such as --revision refs/pr/3 (scripts/serve: REPO_ID@refs/pr/3)"
        )
    return f"got no weights in {component}/ {expected}"


def _file(sibling: "RepoSibling", path: str) -> _File:
    if sibling.size is None:
        raise FetchError(f"{sibling.rfilename}: the hub did not report its size")
    return _File(path, sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Locks `partial` for this process."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(f"{partial}: another fetch is writing to it") from error
        except OSError as error:
            logger.warning("%s: no locks here (%s): see that no other fetch writes to it", partial, error.strerror)
        yield


def _forget_other_commits(partial: Path, resolved: Revision) -> None:
    """Empties `partial` unless it was started for the same commit."""
    begun = _read_revision(partial)
    # The same commit may be known by several names, a branch and a tag.
    if begun is None or replace(begun, revision=resolved.revision) != resolved:
        for entry in partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
    (partial / REVISION_FILE).write_text(json.dumps(asdict(resolved), indent=2) + "\n", encoding="utf-8")


def _read_revision(directory: Path) -> Revision | None:
    try:
        return Revision(**json.loads((directory / REVISION_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _check_space(partial: Path, files: list[_File]) -> None:
    left = sum(file.size - min(file.size, _present(partial / file.path)) for file in files)
    free = shutil.disk_usage(partial).free
    if left > free:
        raise OSError(errno.ENOSPC, f"got {free / 1e9:.2f} GB but expected {left / 1e9:.2f} GB free", str(partial))


def _present(path: Path) -> int:
    """Returns how many bytes of a file are present, finished or not."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    return next((candidate.stat().st_size for candidate in (path, unfinished) if candidate.exists()), 0)


def _download(file: _File, resolved: Revision, partial: Path, progress: "tqdm[NoReturn]") -> None:
    """Fetches the missing part of a file, which gets its name only once it is complete."""
    from httpx2 import NetworkError, RemoteProtocolError, TimeoutException

    path = partial / file.path
    unfinished = path.with_name(path.name + _UNFINISHED)
    progress.update(_present(path))
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    attempts = 0
    with unfinished.open("ab") as stream:
        if stream.tell() > file.size:
            _start_over(stream)  # not the beginning of this file
        while stream.tell() != file.size:
            before = stream.tell()
            try:
                _append(file, resolved, stream, progress)
            except (NetworkError, RemoteProtocolError, TimeoutException):
                attempts = 1 if stream.tell() > before else attempts + 1
                if attempts == _ATTEMPTS:
                    raise
                time.sleep(attempts)
        stream.flush()
        os.fsync(stream.fileno())
    if not _intact(unfinished, file):
        unfinished.unlink()
        raise FetchError(f"{resolved.repo_id}: {file.path} does not match the hub's hash; fetch again")
    unfinished.rename(path)


def _append(file: _File, resolved: Revision, stream: BinaryIO, progress: "tqdm[NoReturn]") -> None:
    """Appends the rest of a file, for as long as the connection lasts."""
    from huggingface_hub import constants, get_session, get_token, hf_hub_url, hf_raise_for_status

    headers = {"Accept-Encoding": "identity", "Range": f"bytes={stream.tell()}-"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    url = hf_hub_url(resolved.repo_id, file.source, revision=resolved.sha, endpoint=constants.ENDPOINT)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # the server does not support ranges
            progress.update(-stream.tell())
            _start_over(stream)
        before = stream.tell()
        for block in response.iter_raw():
            if stream.tell() + len(block) > file.size:
                raise FetchError(f"{resolved.repo_id}: {file.path}: got more than the expected {file.size} bytes")
            stream.write(block)
            progress.update(len(block))
    if stream.tell() == before:
        raise FetchError(f"{resolved.repo_id}: {file.path}: got {before} of {file.size} bytes, then an empty response")


def _start_over(stream: BinaryIO) -> None:
    stream.truncate(0)
    stream.seek(0)  # a file opened for appending keeps its position


def _intact(path: Path, file: _File) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        digest, expected = hashlib.sha256(), file.sha256
    elif file.blob_id is not None:
        digest, expected = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False), file.blob_id
    else:
        return True
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == expected


def _check(partial: Path, repo_id: str) -> None:
    from .verification import verify

    faults = verify(partial)
    if faults:
        raise FetchError(f"{repo_id}: is not a complete checkpoint: {'; '.join(map(str, faults))}")


def _explain(error: Exception, repo_id: str, revision: str) -> str:
    """Describes in one line what went wrong between here and the hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError

    line = " ".join(str(error).split())
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id}: has no revision {revision!r}"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if not str(error.response.url).startswith(constants.ENDPOINT):
            # A signed address, which refuses for reasons of its own; the next attempt gets a new one.
            return f"{repo_id}: the hub's storage at {error.response.url.host} answered {status}; fetch again to resume"
        if isinstance(error, GatedRepoError) or status == 403:
            return f"{repo_id}: access denied ({status}): accept its terms on the hub and set HF_TOKEN"
        if status == 401:
            return f"{repo_id}: access denied (401): it is private or does not exist; set HF_TOKEN if it is private"
        if isinstance(error, RemoteEntryNotFoundError):
            return f"{repo_id}: a file that it lists is missing (404): {error.response.url.path}; fetch again later"
        if status == 404:
            return f"{repo_id}: not found on {constants.ENDPOINT} (404)"
        return f"{repo_id}: the hub answered {status}: {line}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full: {error.filename or repo_id}: {error.strerror}; fetch again to resume"
    # Local I/O errors have an errno but may lack a filename; connection errors have no errno, or are one of these two
    # types.
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return line if error.filename is not None else f"{repo_id}: could not be written: {line}"
    return f"{repo_id}: no connection to {constants.ENDPOINT}: {line or type(error).__name__}; fetch again to resume"
