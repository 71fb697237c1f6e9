"""Translates the exceptions of `tritonclient`, gRPC and HTTP into the errors of the contract."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc
from tritonclient.utils import InferenceServerException

from audioldm2_triton.errors import (
    DEADLINE_EXCEEDED,
    AudioLDM2Error,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    RequestCancelledError,
    UnavailableError,
    is_model_away,
    read_message,
)
from audioldm2_triton.transport.endpoint import Endpoint

CANCELLED: Final = "cancelled"
"""A cancellation's message begins like this: over HTTP it has the same status, 400, as an invalid argument."""

# Statuses that Triton does not send come from proxies in front of it. Not found: the model is not loaded (yet).
_KINDS: Final[dict[str, type[AudioLDM2Error]]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidArgumentError,
    "StatusCode.UNAVAILABLE": UnavailableError,
    "StatusCode.RESOURCE_EXHAUSTED": UnavailableError,
    "StatusCode.NOT_FOUND": UnavailableError,
    "StatusCode.CANCELLED": RequestCancelledError,
    "StatusCode.DEADLINE_EXCEEDED": DeadlineExceededError,
    "StatusCode.PERMISSION_DENIED": PermissionDeniedError,
    "StatusCode.UNAUTHENTICATED": PermissionDeniedError,
    "400": InvalidArgumentError,
    "401": PermissionDeniedError,
    "403": PermissionDeniedError,
    "404": UnavailableError,
    "408": DeadlineExceededError,
    "413": InvalidArgumentError,
    "429": UnavailableError,
    "499": RequestCancelledError,
    "502": UnavailableError,
    "503": UnavailableError,
    "504": DeadlineExceededError,
}

# Triton's words, over gRPC with the status UNAVAILABLE.
_RESTRICTED: Final = re.compile(r"This (protocol|API) is restricted")

_WRAPPING: Final = re.compile(r"(?:in ensemble '[^']*', |\[request id: [^\]]*\] )+")
_RAISED_IN_STAGE: Final = re.compile(
    r"Failed to process the request\(s\) for model(?: instance)? '(?P<stage>[^']*)', message: (?P<message>.*)",
    re.DOTALL,
)
_NO_CONNECTION: Final = re.compile(r"connect|DNS|socket|proxy|handshake", re.IGNORECASE)
"""gRPC's own words, in messages that are not Triton's."""
_CUT: Final = re.compile(r"\bReceived RST_STREAM with error code 2\b")
"""gRPC's words, with the status INTERNAL, for an answer that a proxy had begun to pass on when the server died."""
_NOT_HTTP: Final = "Expected HTTP/"
"""The words of llhttp, which both HTTP libraries have, before the bytes that they got."""
OTHER_PROTOCOL: Final = "the answer is not HTTP; gRPC has a port of its own (by default HTTP is 8000, gRPC 8001)"
_HTTP_LIBRARIES: Final = ("_parser", "aiohttp", "geventhttpclient", "http")  # the first: geventhttpclient's, in C
_STACK: Final = re.compile(r"\n\s*\nAt:\n.*", re.DOTALL)


@contextmanager
def known_failures(endpoint: Endpoint, timeout: float | None) -> Iterator[None]:
    """Raises whatever fails inside as an error of the contract; `timeout` is the caller's, in seconds."""
    try:
        yield
    except Exception as error:
        known = _known(error, endpoint, timeout)
        if known is None:
            raise
        raise known from error


def _known(error: Exception, endpoint: Endpoint, timeout: float | None) -> AudioLDM2Error | None:
    if isinstance(error, InferenceServerException):
        return _from_triton(error, endpoint, timeout)
    if isinstance(error, grpc.RpcError):
        # From a stream, whose exceptions `tritonclient` does not convert.
        return _from_triton(InferenceServerException(error.details(), str(error.code())), endpoint, timeout)
    # If we set no timeout, or there is a number, the operating system gave up. Python 3.10 has two kinds.
    is_late = isinstance(error, (TimeoutError, asyncio.TimeoutError)) and not getattr(error, "errno", None)
    if is_late and timeout is not None:
        return DeadlineExceededError(_no_answer(endpoint, timeout))
    # The HTTP libraries are imported only where they are used.
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES:
        said = _one_line(str(error)) or "the connection broke"
        return UnavailableError(f"{endpoint.url}: {OTHER_PROTOCOL if _NOT_HTTP in said else said}")
    return None


def _from_triton(error: InferenceServerException, endpoint: Endpoint, timeout: float | None) -> AudioLDM2Error:
    status = error.status() or ""
    if status.isdigit() and error.debug_details() is not None:
        # The body was not the JSON that Triton sends; it may be a page of HTML.
        message = f"{endpoint.url}: got HTTP status {status} without a message from Triton"
    else:
        message = clean_message(error.message() or "")
    if not status:
        # In a stream. Over HTTP it has none; over gRPC Triton sends one if the client's metadata have
        # `triton_grpc_error`, but 24.10 dies of that (SIGSEGV) within a few hundred failing or cancelled streams. The
        # stages' errors carry their code in the message.
        return _located(read_message(message), endpoint)
    kind = _KINDS.get(status, InternalError)
    if kind is InternalError and (is_model_away(message) or _CUT.search(message)):
        kind = UnavailableError
    if _RESTRICTED.match(message):
        return PermissionDeniedError(f"{endpoint.url}: {message}")
    if kind in (InvalidArgumentError, RequestCancelledError):
        if message.startswith(DEADLINE_EXCEEDED):
            kind = DeadlineExceededError
        elif message.startswith(CANCELLED):
            kind = RequestCancelledError
    elif kind is DeadlineExceededError:
        # The words of gRPC or of a gateway; the server's own deadline travels as a cancellation.
        message = _no_answer(endpoint, timeout)
    return _located(kind(message), endpoint)


def _located(error: AudioLDM2Error, endpoint: Endpoint) -> AudioLDM2Error:
    """Returns the error for a server that cannot be reached; its message names the address."""
    if not isinstance(error, UnavailableError):
        return error
    message = str(error) if str(error).startswith(endpoint.url) else f"{endpoint.url}: {error}"
    if endpoint.proxy and _NO_CONNECTION.search(message):
        # Not its value, which may hold a password.
        message += f" ({endpoint.proxy} is set, and gRPC uses that proxy unless no_proxy excepts the host)"
    return UnavailableError(message)


def clean_message(message: str) -> str:
    """Reduces a message to the stage's own words in one line, without what Triton adds."""
    message = _WRAPPING.sub("", message, count=1) if _WRAPPING.match(message) else message
    raised = _RAISED_IN_STAGE.match(message)
    if raised:
        # An exception out of `execute()`: its stack trace, with the server's paths, is not for clients.
        message = f"{raised['stage']} failed: {_STACK.sub('', raised['message'])}"
    return _one_line(message)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _no_answer(endpoint: Endpoint, timeout: float | None) -> str:
    within = "" if timeout is None else f" within {timeout:g} s"
    return f"{DEADLINE_EXCEEDED}: no answer from {endpoint.url}{within}"
