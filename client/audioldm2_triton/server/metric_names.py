"""The names of our own metrics: on Triton's `/metrics`, and the supervisor's; `OPERATIONS.md` explains each."""

from typing import Final

PREFIX: Final = "audioldm2_"

STAGE_REQUESTS: Final = PREFIX + "stage_requests"
"""`scripts/serve` waits for zero before it stops the server."""
STAGE_REQUESTS_TAKEN_TOTAL: Final = PREFIX + "stage_requests_taken_total"
STAGE_FAILURES: Final = PREFIX + "stage_failures"
STAGE_INFO: Final = PREFIX + "stage_info"
STAGE_DURATION_SECONDS: Final = PREFIX + "stage_duration_seconds"
PEAK_MEMORY_BYTES: Final = PREFIX + "peak_memory_bytes"

REQUEST_DURATION_SECONDS: Final = PREFIX + "request_duration_seconds"
REQUEST_QUEUE_SECONDS: Final = PREFIX + "request_queue_seconds"
REQUEST_REAL_TIME_FACTOR: Final = PREFIX + "request_real_time_factor"
REQUEST_STEPS: Final = PREFIX + "request_steps"
TIME_TO_FIRST_AUDIO_SECONDS: Final = PREFIX + "time_to_first_audio_seconds"

ROWS_IN_FLIGHT: Final = PREFIX + "rows_in_flight"
ROWS_WAITING: Final = PREFIX + "rows_waiting"
REQUESTS_IN_FLIGHT: Final = PREFIX + "requests_in_flight"
REQUESTS_WAITING: Final = PREFIX + "requests_waiting"
ROWS_IN_FLIGHT_LIMIT: Final = PREFIX + "rows_in_flight_limit"
REQUESTS_WAITING_LIMIT: Final = PREFIX + "requests_waiting_limit"
ENGINE_BROKEN: Final = PREFIX + "engine_broken"
ROWS_PER_FORWARD: Final = PREFIX + "rows_per_forward"
STEP_COUNT: Final = PREFIX + "step_count"
STEP_DURATION_MS: Final = PREFIX + "step_duration_ms"
QUEUE_DURATION_US: Final = PREFIX + "queue_duration_us"
"""Old: the sum of `REQUEST_QUEUE_SECONDS`; it goes with the release after 0.1.0."""
REQUEST_COUNT: Final = PREFIX + "request_count"
AUDIO_DURATION_S: Final = PREFIX + "audio_duration_s"

# The supervisor's, on the health address.
SERVER_READY: Final = PREFIX + "server_ready"
SERVER_STATE: Final = PREFIX + "server_state"
SERVER_RESTARTS_TOTAL: Final = PREFIX + "server_restarts_total"
MEMORY_USED_BYTES: Final = PREFIX + "memory_used_bytes"
MEMORY_LIMIT_BYTES: Final = PREFIX + "memory_limit_bytes"
