"""What can go wrong with a request, as the server reports it and as the client raises it."""

from typing import Any


class AudioLDM2Error(Exception):
    """Base class. `code` is the name of the Triton error code that carries it."""

    code = "INTERNAL"


class InvalidArgumentError(AudioLDM2Error):
    """The request cannot be served as it is; sending it again changes nothing."""

    code = "INVALID_ARG"


class UnavailableError(AudioLDM2Error):
    """The server is full, out of memory or not reachable; the same request may succeed later."""

    code = "UNAVAILABLE"


class RequestCancelledError(AudioLDM2Error):
    """The client cancelled the request."""

    code = "CANCELLED"


class DeadlineExceededError(RequestCancelledError):
    """The request's `timeout` ran out. Triton has no code of its own for this, so it travels as CANCELLED."""


class InternalError(AudioLDM2Error):
    """The server failed; the message names the stage."""


DEADLINE_EXCEEDED = "deadline exceeded"
"""How the message of a `DeadlineExceededError` begins, which tells it from a cancellation on the wire."""


def invalid(argument: str, got: Any, expected: str) -> InvalidArgumentError:
    """The one wording of a refusal: the argument, what was given, what is accepted."""
    given = repr(got)
    if len(given) > 80:
        given = f"{given[:77]}..."
    return InvalidArgumentError(f"`{argument}`: got {given} but expected {expected}")


def as_exception(error: BaseException) -> Exception:
    """An error as one that concerns a request alone: the panics of libraries in Rust, for one, are no `Exception`."""
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
