"""The names of our own metrics on Triton's `/metrics`; `OPERATIONS.md` explains each."""

from typing import Final

PREFIX: Final = "audioldm2_"

STAGE_REQUESTS: Final = PREFIX + "stage_requests"
"""`scripts/serve` waits for zero before it stops the server."""
STAGE_FAILURES: Final = PREFIX + "stage_failures"
STAGE_INFO: Final = PREFIX + "stage_info"
PEAK_MEMORY_BYTES: Final = PREFIX + "peak_memory_bytes"

ROWS_IN_FLIGHT: Final = PREFIX + "rows_in_flight"
ROWS_WAITING: Final = PREFIX + "rows_waiting"
REQUESTS_IN_FLIGHT: Final = PREFIX + "requests_in_flight"
REQUESTS_WAITING: Final = PREFIX + "requests_waiting"
ENGINE_BROKEN: Final = PREFIX + "engine_broken"
ROWS_PER_FORWARD: Final = PREFIX + "rows_per_forward"
STEP_COUNT: Final = PREFIX + "step_count"
STEP_DURATION_MS: Final = PREFIX + "step_duration_ms"
QUEUE_DURATION_US: Final = PREFIX + "queue_duration_us"
REQUEST_COUNT: Final = PREFIX + "request_count"
AUDIO_DURATION_S: Final = PREFIX + "audio_duration_s"
