"""A stand-in for the Hugging Face hub on this machine: one repository, served from a directory.

It speaks as much of the hub's protocol as a download takes: the description of a commit with its files, `resolve/`
with ETag and X-Repo-Commit, a redirect to signed addresses of another host for the large files, a redirect for a
repository that has a new name, and ranges. It can be told to refuse, to stall and to cut a connection, and it counts
the bytes that it sends.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # served as LFS objects
SIGNATURE = "Expires=1&Policy=a%2Bb&Signature=c~d"  # of an address of the CDN


@dataclass
class Hub:
    """What is served, how, and what has been asked for so far."""

    directory: Path
    repo_id: str = "someone/audioldm2"
    sha: str = "0123456789abcdef0123456789abcdef01234567"
    branch: str = "main"
    token: str | None = None  # whoever has not got it is answered 401
    gated: bool = False
    old_repo_id: str = ""  # requests for it are redirected to `repo_id`
    url: str = ""
    cdn_url: str = ""  # of another host, as far as a client can tell, and on another port
    refused: dict[str, int] = field(default_factory=dict)  # files that the CDN does not send, and what it answers
    gone: set[str] = field(default_factory=set)  # files that are described, but are not there any more
    knows_ranges: bool = True
    stall_once: dict[str, int] = field(default_factory=dict)  # bytes of a file, after which the first connection stalls
    released: threading.Event = field(default_factory=threading.Event)  # ends the stalling
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes of a file, after which it is cut, every time
    cut_each: dict[str, int] = field(default_factory=dict)  # bytes of a file that one connection lasts
    corrupt: set[str] = field(default_factory=set)  # files that are sent with a wrong first byte
    sent: Counter[str] = field(default_factory=Counter)  # bytes of each file
    cdn_tokens: set[str | None] = field(default_factory=set)  # what came with the requests for large files
    ranges: list[tuple[str, int]] = field(default_factory=list)  # the files and the offsets that were asked for

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*.*"))

    def description(self) -> dict[str, Any]:
        """The answer of /api/models/REPO/revision/REV?blobs=true."""
        siblings = []
        for name in self.files():
            content = (self.directory / name).read_bytes()
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _git_hash(content)}
            if name.endswith(LARGE):
                sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append(sibling)
        return {"_id": "1", "id": self.repo_id, "modelId": self.repo_id, "sha": self.sha, "siblings": siblings}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` at `hub.url`, which becomes HF_ENDPOINT, and its large files elsewhere, until the block ends."""
    with ExitStack() as stack:
        ports = [stack.enter_context(_listening(hub, handler)) for handler in (_HubHandler, _CdnHandler)]
        hub.url, hub.cdn_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"
        try:
            yield hub
        finally:
            hub.released.set()


@contextmanager
def _listening(hub: Hub, handler: type["_Handler"]) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def _file(self, name: str, headers: dict[str, str]) -> None:
        content = (self.hub.directory / name).read_bytes()
        if name in self.hub.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        asked = self.headers.get("Range") if self.hub.knows_ranges else None
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if start >= len(content) > 0:
            self._answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        if asked:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if self.command == "GET":
            self.hub.ranges.append((name, start))
        self._answer(206 if asked else 200, headers, content[start:], name, start)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": message}, b"{}")

    def _answer(self, status: int, headers: dict[str, str], body: bytes, name: str = "", start: int = 0) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = min(self.hub.cut_after.get(name, start + len(body)), start + self.hub.cut_each.get(name, len(body)))
        if start + len(body) > cut:
            body = body[: max(cut - start, 0)]
            self.close_connection = True
        stall = self.hub.stall_once.pop(name, None)
        if stall is not None:
            self._send(name, body[:stall])
            self.hub.released.wait()
            body = body[stall:]
        self._send(name, body)

    def _send(self, name: str, body: bytes) -> None:
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client is gone, as some tests have it
        else:
            self.hub.sent[name] += len(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _HubHandler(_Handler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        old, new = f"/{self.hub.old_repo_id}/", f"/{self.hub.repo_id}/"
        if self.hub.old_repo_id and old in path:
            self._answer(307, {"Location": self.path.replace(old, new)}, b"")
            return
        api = f"/api/models/{self.hub.repo_id}/revision/"
        resolve = f"/{self.hub.repo_id}/resolve/"
        if not path.startswith((api, resolve)):
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif self.hub.gated:
            self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        elif self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "", "Invalid username or password.")
        elif path.startswith(api):
            self._describe(path.removeprefix(api))
        else:
            revision, _, name = path.removeprefix(resolve).partition("/")
            self._resolve(revision, name)

    def _describe(self, revision: str) -> None:
        if revision not in (self.hub.branch, self.hub.sha):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        body = json.dumps(self.hub.description()).encode()
        self._answer(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, revision: str, name: str) -> None:
        if revision not in (self.hub.branch, self.hub.sha):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if name not in self.hub.files() or name in self.hub.gone:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = (self.hub.directory / name).read_bytes()
        headers = {"X-Repo-Commit": self.hub.sha, "ETag": f'"{_git_hash(content)}"'}
        if not name.endswith(LARGE):
            self._file(name, headers)
            return
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"', "X-Xet-Hash": digest}
        self._answer(302, headers | linked | {"Location": f"{self.hub.cdn_url}/{name}?{SIGNATURE}"}, b"")


class _CdnHandler(_Handler):
    def do_GET(self) -> None:
        address = urlsplit(self.path)
        name = unquote(address.path).removeprefix("/")
        self.hub.cdn_tokens.add(self.headers.get("Authorization"))
        if name in self.hub.refused:
            status = self.hub.refused[name]
            self._answer(status, {}, b"<Error>no</Error>" if status >= 400 else b"")
        elif address.query != SIGNATURE:
            self._answer(403, {}, b"<Error>MissingKey</Error>")
        else:
            self._file(name, {})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
