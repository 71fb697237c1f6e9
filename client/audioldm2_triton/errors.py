"""What can go wrong with a request, as the server reports it and as the client raises it."""

from collections.abc import Mapping
from typing import Any, Final


class AudioLDM2Error(Exception):
    """Base class. `code` is the name of the Triton error code that carries it."""

    code = "INTERNAL"


class InvalidArgumentError(AudioLDM2Error):
    """The request is wrong; sending it again changes nothing."""

    code = "INVALID_ARG"


class UnavailableError(AudioLDM2Error):
    """The server is full, out of memory or unreachable; the same request may succeed later."""

    code = "UNAVAILABLE"


class RequestCancelledError(AudioLDM2Error):
    """The client cancelled the request."""

    code = "CANCELLED"


class DeadlineExceededError(RequestCancelledError):
    """The request's `timeout` ran out. Triton has no code of its own for this, so it travels as CANCELLED."""


class InternalError(AudioLDM2Error):
    """The server failed; the message names the stage."""


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
