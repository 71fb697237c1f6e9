"""A TCP proxy between a client and a server that makes the network bad, in Toxiproxy's words."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Toxics:
    """What the proxy does to its connections, in both directions; may be changed at any time."""

    latency_in_s: float = 0.0  # before each piece
    slicer_bytes: int = 65536  # the largest piece
    timeout: bool = False  # swallows everything, and closes nothing
    limit_bytes: int | None = None  # after which a connection is closed


class Proxy:
    """Listens on a port of its own. `reset` cuts all connections as the kernel does for a process that was killed."""

    def __init__(self, target: int) -> None:
        self.toxics = Toxics()
        self.port = 0
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait()

    def reset(self) -> None:
        """Cuts all connections, with what is on its way."""
        asyncio.run_coroutine_threadsafe(self._reset(), self._loop).result()

    def close(self) -> None:
        self.reset()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connect, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))

    async def _reset(self) -> None:
        for writer in list(self._writers):
            # Closing with this option sends RST instead of FIN.
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the server is being restarted
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        try:
            await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))
        finally:
            self._writers -= {writer, back}

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while piece := await reader.read(self.toxics.slicer_bytes):
                if self.toxics.latency_in_s:
                    await asyncio.sleep(self.toxics.latency_in_s)
                if self.toxics.timeout:
                    continue
                limit = self.toxics.limit_bytes
                writer.write(piece if limit is None else piece[: max(0, limit - passed)])
                await writer.drain()
                passed += len(piece)
                if limit is not None and passed >= limit:
                    break
        if not self.toxics.timeout:
            writer.close()


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    """Makes a proxy to a port of this machine."""
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()
