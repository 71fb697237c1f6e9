"""The threads of the running streams: one for each, because each of them mostly waits."""

import threading
import time
from collections.abc import Callable

from audioldm2_triton.server import faults

CLOSE_TIMEOUT_IN_S = 10.0


class RunningStreams:
    """Starts each stream in its own thread, and waits for all of them at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._closing = False

    @property
    def closing(self) -> bool:
        """Returns whether streams should end early."""
        return self._closing

    def start(self, serve: Callable[[], None]) -> None:
        """Runs `serve`, which must not raise, in a thread. Raises `RuntimeError` if none can be started."""

        def run() -> None:
            try:
                serve()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="stream", daemon=True)
        faults.at("audioldm2_stream.start")
        with self._lock:
            thread.start()  # fails if the machine has no more threads
            self._threads.add(thread)

    def close(self) -> None:
        """Asks all streams to end, and waits for them, up to `CLOSE_TIMEOUT_IN_S`."""
        self._closing = True
        with self._lock:
            threads = list(self._threads)
        deadline = time.monotonic() + CLOSE_TIMEOUT_IN_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
