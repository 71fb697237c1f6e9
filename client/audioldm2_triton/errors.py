"""The errors of a request, as the server reports them and as the client raises them."""

import re
from collections.abc import Mapping
from typing import Any, Final


class AudioLDM2Error(Exception):
    """Base class. `code` is the name of the Triton error code that carries it, `reason` its label in the metrics."""

    code = "INTERNAL"
    reason = "internal"


class InvalidArgumentError(AudioLDM2Error):
    """The request is wrong; sending it again changes nothing."""

    code = "INVALID_ARG"
    reason = "invalid_argument"


class UnavailableError(AudioLDM2Error):
    """The server is full, out of memory or unreachable; the same request may succeed later."""

    code = "UNAVAILABLE"
    reason = "unavailable"


class PermissionDeniedError(AudioLDM2Error):
    """The server has an API key, and the request had another or none. Only a client raises it."""


class RequestCancelledError(AudioLDM2Error):
    """The client cancelled the request."""

    code = "CANCELLED"
    reason = "cancelled"


class DeadlineExceededError(RequestCancelledError):
    """The request's `timeout` ran out. Triton has no code of its own for this, so it travels as CANCELLED."""

    reason = "deadline_exceeded"


class InternalError(AudioLDM2Error):
    """The server failed; the message names the stage."""


class NonFiniteError(InternalError):
    """A network of the server gave NaN or infinity. Travels as INTERNAL."""

    reason = "non_finite"


OUT_OF_MEMORY: Final = "out_of_memory"
"""The reason of an `UnavailableError` that follows from a lack of memory."""

REASONS: Final = (
    *(
        kind.reason
        for kind in (
            InvalidArgumentError,
            UnavailableError,
            RequestCancelledError,
            DeadlineExceededError,
            NonFiniteError,
            InternalError,
        )
    ),
    OUT_OF_MEMORY,
)
"""All labels `reason` in the metrics."""

DEADLINE_EXCEEDED = "deadline exceeded"
"""The message of a `DeadlineExceededError` begins like this, which distinguishes it from a cancellation on the wire."""


_BY_CODE: Final[Mapping[str, type[AudioLDM2Error]]] = {
    kind.code: kind for kind in (InvalidArgumentError, UnavailableError, RequestCancelledError, InternalError)
}


def error_of(code: str, message: str) -> AudioLDM2Error:
    """Makes the error with this code and message."""
    if code == DeadlineExceededError.code and message.startswith(DEADLINE_EXCEEDED):
        return DeadlineExceededError(message)
    return _BY_CODE.get(code, InternalError)(message)


def stream_message(error: AudioLDM2Error) -> str:
    """Returns an error's message with its code, which Triton drops in a stream: `UNAVAILABLE: denoiser is full`."""
    return f"{error.code}: {error}"


def read_stream_message(message: str) -> AudioLDM2Error | None:
    """Returns the error of a `stream_message`; None for any other message, which is Triton's own."""
    code, colon, rest = message.partition(": ")
    return error_of(code, rest) if colon and code in _BY_CODE else None


# Triton's own words for a model that is not loaded (yet), and for one whose process has died or is stopped.
_MODEL_AWAY: Final = re.compile(
    r"Request for unknown model: |.*\bModel '?\w+'? is not ready|.*Stub process '[^']*' is not healthy"
)


def is_model_away(message: str) -> bool:
    """Whether Triton says that a model cannot be reached at the moment, whatever code it gives to that."""
    return bool(_MODEL_AWAY.match(message))


def read_message(message: str) -> AudioLDM2Error:
    """Returns the error of a message without a status, from a stage or Triton's own."""
    own = read_stream_message(message)
    if own is not None:
        return own
    return UnavailableError(message) if is_model_away(message) else InternalError(message)


def invalid(argument: str, got: Any, expected: str) -> InvalidArgumentError:
    """Makes the error of a refused argument, in one wording: the argument, what was given, what is accepted."""
    given = repr(got)
    if len(given) > 80:
        given = f"{given[:77]}..."
    return InvalidArgumentError(f"`{argument}`: got {given} but expected {expected}")


def as_exception(error: BaseException) -> Exception:
    """Returns an error as an `Exception`, which ends one request only. Panics of Rust libraries are no `Exception`."""
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
