"""When a request that failed is sent again: the decision, without the sending."""

import random
import re
import time
from typing import Final

from audioldm2_triton.errors import UnavailableError, invalid

DEFAULT_MAX_RETRIES: Final = 2
FIRST_DELAY_IN_S: Final = 0.5
LONGEST_DELAY_IN_S: Final = 4.0  # a server that failed is back after 10 s
_RETRY_AFTER: Final = re.compile(r"retry after (\d+(?:\.\d+)?) s\b")


class Resending:
    """The attempts of one call: how many are left, and how much time.

    A request may be sent again because its seed is in it: the same request gives the same audio.
    """

    def __init__(self, max_retries: int, timeout: float | None) -> None:
        self._left = max_retries
        self._attempts = 0
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._timeout = timeout

    def timeout(self) -> float | None:
        """Returns what is left of the call's timeout, in seconds; the whole for the first attempt."""
        if self._deadline is None or self._attempts == 0:
            return self._timeout
        return max(self._deadline - time.monotonic(), 1e-3)

    def delay(self, error: UnavailableError) -> float:
        """Returns the seconds to wait before the next attempt: twice as many each time, less up to a half by chance.

        A server that names a time (`retry after 3 s`) is waited for that long. Raises `error` if there is no attempt
        left, or no time.
        """
        if self._left == 0:
            raise error
        delay = min(FIRST_DELAY_IN_S * 2**self._attempts, LONGEST_DELAY_IN_S) * random.uniform(0.5, 1)
        asked = _RETRY_AFTER.search(str(error))
        if asked:
            delay = max(delay, float(asked[1]))
        if self._deadline is not None and time.monotonic() + delay >= self._deadline:
            raise error
        self._left -= 1
        self._attempts += 1
        return delay


def check_max_retries(value: int) -> int:
    """Returns `value`. Raises `InvalidArgumentError` unless it is a whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise invalid("max_retries", value, "a whole number from 0")
    return value
