"""The names of our own metrics: on Triton's `/metrics`, and the supervisor's; `OPERATIONS.md` explains each."""

from typing import Final

PREFIX: Final = "audioldm2_"

STAGE_REQUESTS: Final = PREFIX + "stage_requests"
"""`scripts/serve` waits for zero before it stops the server."""
STAGE_REQUESTS_TAKEN_TOTAL: Final = PREFIX + "stage_requests_taken_total"
STAGE_PROGRESS_TOTAL: Final = PREFIX + "stage_progress_total"
STAGE_FAILURES_TOTAL: Final = PREFIX + "stage_failures_total"
STAGE_INFO: Final = PREFIX + "stage_info"
STAGE_DURATION_SECONDS: Final = PREFIX + "stage_duration_seconds"
TEXT_CACHE_HITS_TOTAL: Final = PREFIX + "text_cache_hits_total"
TEXT_CACHE_MISSES_TOTAL: Final = PREFIX + "text_cache_misses_total"
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
STEPS_TOTAL: Final = PREFIX + "steps_total"
STEP_DURATION_SECONDS: Final = PREFIX + "step_duration_seconds"
REQUESTS_TOTAL: Final = PREFIX + "requests_total"
AUDIO_SECONDS_TOTAL: Final = PREFIX + "audio_seconds_total"

# The supervisor's, on the health address.
SERVER_READY: Final = PREFIX + "server_ready"
SERVER_STATE: Final = PREFIX + "server_state"
SERVER_RESTARTS_TOTAL: Final = PREFIX + "server_restarts_total"
MEMORY_USED_BYTES: Final = PREFIX + "memory_used_bytes"
MEMORY_LIMIT_BYTES: Final = PREFIX + "memory_limit_bytes"
