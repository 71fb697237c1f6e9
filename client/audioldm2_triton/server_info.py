"""What a server publishes about itself, mostly in the configuration of the model `audioldm2`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from audioldm2_triton import contract
from audioldm2_triton.contract import Limits
from audioldm2_triton.errors import InternalError

T = TypeVar("T")


@dataclass(frozen=True)
class ServerInfo:
    """The limits and the checkpoint of one server.

    A Triton started by hand on the static repository publishes nothing. The limits are then the contract's defaults,
    and whatever depends on the checkpoint is None.
    """

    limits: Limits
    native_audio_length_in_s: float | None  # the length of a request that specifies none
    sampling_rate: int | None  # Hz
    schedulers: tuple[str, ...]  # accepted names, the default first
    checkpoint: str | None  # the last two parts of its path: the id of one from the hub
    max_batch_size: int  # rows of one request
    serves_stream: bool  # whether it has `audioldm2_stream`: progress, and requests that can be cancelled
    transcription: str | None = None  # in requests: "required" by checkpoints that speak, "refused" by all others
    models: tuple[str, ...] = ()  # those of all its checkpoints, for the clients' `model`


def read_server_info(config: Mapping[str, Any], serves_stream: bool) -> ServerInfo:
    """Reads the model configuration of `audioldm2` as JSON. Raises `InternalError` for values that make no sense."""
    published = {key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()}
    defaults = Limits()
    return ServerInfo(
        limits=Limits(
            _read(published, "max_audio_length_in_s", float, defaults.max_audio_length_in_s),
            _read(published, "max_num_inference_steps", int, defaults.max_num_inference_steps),
            _read(published, "max_num_waveforms_per_prompt", int, defaults.max_num_waveforms_per_prompt),
        ),
        native_audio_length_in_s=_read(published, "native_audio_length_in_s", float, None),
        sampling_rate=_read(published, "sampling_rate", int, None),
        schedulers=_read(published, "schedulers", _names, contract.SCHEDULERS),
        checkpoint=published.get("checkpoint") or None,
        max_batch_size=int(config.get("max_batch_size") or contract.MAX_BATCH_SIZE),
        serves_stream=serves_stream,
        transcription=published.get("transcription") or None,
        models=_names(published.get("models", "")),
    )


def _read(published: Mapping[str, str], key: str, parse: Callable[[str], Any], default: T) -> T:
    given = published.get(key)
    if not given:
        return default
    try:
        value: T = parse(given)
    except ValueError:
        raise InternalError(f"the server's `{key}`: got {given!r} but expected a number") from None
    return value


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())
