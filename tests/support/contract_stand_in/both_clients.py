"""The two clients behind one face, so that one test is a test of both."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client, ServerInfo
from audioldm2_triton.contract import ENSEMBLE
from audioldm2_triton.events import StreamEvent


class Client(Protocol):
    def generate(self, prompt: Any, **options: Any) -> Any: ...
    def stream(self, prompt: Any, **options: Any) -> list[StreamEvent]: ...
    def server_info(self) -> ServerInfo: ...


class Ordinary:
    """The ordinary client, with a stream's events in a list."""

    def __init__(self, client: AudioLDM2Client) -> None:
        self._client = client
        self.generate, self.server_info = client.generate, client.server_info

    def stream(self, prompt: Any, **options: Any) -> list[StreamEvent]:
        return list(self._client.stream(prompt, **options))


class Awaited:
    """The asyncio client as if it were the other one."""

    def __init__(self, client: AsyncAudioLDM2Client, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop

    def generate(self, prompt: Any, **options: Any) -> Any:
        return self._loop.run_until_complete(self._client.generate(prompt, **options))

    def stream(self, prompt: Any, **options: Any) -> list[StreamEvent]:
        async def events() -> list[StreamEvent]:
            return [event async for event in self._client.stream(prompt, **options)]

        return self._loop.run_until_complete(events())

    def server_info(self) -> ServerInfo:
        return self._loop.run_until_complete(self._client.server_info())

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())


@contextlib.contextmanager
def open_client(
    kind: str, url: str, root_certificates: Path | None = None, model: str = ENSEMBLE, max_retries: int = 0
) -> Iterator[Client]:
    if kind == "sync":
        with AudioLDM2Client(url, model=model, root_certificates=root_certificates, max_retries=max_retries) as client:
            yield Ordinary(client)
        return
    loop = asyncio.new_event_loop()
    asynchronous = AsyncAudioLDM2Client(url, model=model, root_certificates=root_certificates, max_retries=max_retries)
    with contextlib.closing(loop), contextlib.closing(Awaited(asynchronous, loop)) as awaited:
        yield awaited
