"""The deadline of a request that has just arrived."""

import time
from typing import Final

LATEST_DEADLINE_NS: Final = 2**63 - 1


def deadline_ns(timeout_us: int, default_timeout_in_s: float) -> int:
    """Returns the deadline of a request that has just arrived, on the monotonic clock in ns; 0: none."""
    timeout_ns = timeout_us * 1000 if timeout_us > 0 else int(default_timeout_in_s * 1e9)
    return min(time.monotonic_ns() + timeout_ns, LATEST_DEADLINE_NS) if timeout_ns > 0 else 0
