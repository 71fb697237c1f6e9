"""AudioLDM 2 on Triton: the contract, the settings and the client."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audioldm2_triton.aio import AsyncAudioLDM2Client
    from audioldm2_triton.client import AudioLDM2Client
    from audioldm2_triton.contract import Limits
    from audioldm2_triton.errors import (
        AudioLDM2Error,
        DeadlineExceededError,
        InternalError,
        InvalidArgumentError,
        PermissionDeniedError,
        RequestCancelledError,
        UnavailableError,
    )
    from audioldm2_triton.events import AudioChunk, Finished, Progress
    from audioldm2_triton.result import GenerationResult
    from audioldm2_triton.server_info import ServerInfo

__all__ = [
    "AsyncAudioLDM2Client",
    "AudioChunk",
    "AudioLDM2Client",
    "AudioLDM2Error",
    "DeadlineExceededError",
    "Finished",
    "GenerationResult",
    "InternalError",
    "InvalidArgumentError",
    "Limits",
    "PermissionDeniedError",
    "Progress",
    "RequestCancelledError",
    "ServerInfo",
    "UnavailableError",
]

_MODULES = {
    "AsyncAudioLDM2Client": "aio",
    "AudioChunk": "events",
    "AudioLDM2Client": "client",
    "Finished": "events",
    "GenerationResult": "result",
    "Limits": "contract",
    "Progress": "events",
    "ServerInfo": "server_info",
}


def __getattr__(name: str) -> Any:
    # On demand, because the server's stages import this package too and do not need the client's libraries.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
