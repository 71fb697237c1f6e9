"""The threads of the streams under way: one for each, because each of them mostly waits."""

import threading
import time
from collections.abc import Callable

from audioldm2_triton.server import faults

CLOSE_TIMEOUT_IN_S = 10.0


class RunningStreams:
    """Starts streams in threads of their own, and waits for them at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether streams are to end before their time."""
        return self._closing

    def start(self, serve: Callable[[], None]) -> None:
        """Runs `serve`, which must not raise. Raises `RuntimeError` where there is no thread for it."""

        def run() -> None:
            try:
                serve()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="stream", daemon=True)
        faults.at("audioldm2_stream.start")
        with self._lock:
            thread.start()  # may fail, where the machine has no more
            self._threads.add(thread)

    def close(self) -> None:
        """Asks all streams to end, and waits until they have, for a while."""
        self._closing = True
        with self._lock:
            threads = list(self._threads)
        deadline = time.monotonic() + CLOSE_TIMEOUT_IN_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
