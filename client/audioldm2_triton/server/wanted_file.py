"""The audio file that a request wants: what the text stage tells the decoder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from audioldm2_triton import contract
from audioldm2_triton.errors import invalid
from audioldm2_triton.server.generation_row import GenerationRow

NOTHING: Final = b"{}"


@dataclass(frozen=True)
class WantedFile:
    """What a row of a request wants instead of samples."""

    audio_format: str
    as_base64: bool
    arguments: Mapping[str, Any]  # of the request, for what the file says about its origin


def split_format(given: str) -> tuple[str, bool]:
    """Splits `wav;base64`. Raises `InvalidArgumentError`."""
    name = given.removesuffix(contract.AS_BASE64)
    if name not in contract.AUDIO_FORMATS:
        accepted = ", ".join(contract.AUDIO_FORMATS)
        raise invalid("audio_format", given, f"one of {accepted}, for JSON with {contract.AS_BASE64}")
    return name, name != given


def pack_wanted(rows: Sequence[GenerationRow]) -> np.ndarray:
    """Returns UINT8 [B, L]: JSON, filled up with blanks; an empty object for a row that wants samples."""
    # Numbers, not BYTES: their length cannot be a lie.
    texts = [_pack(row) for row in rows]
    longest = max(map(len, texts))
    return np.stack([np.frombuffer(text.ljust(longest), np.uint8) for text in texts])


def _pack(row: GenerationRow) -> bytes:
    if not row.audio_format:
        return NOTHING
    arguments = {name: value for name, value in asdict(row).items() if name != "audio_format"}
    if not row.transcription:
        del arguments["transcription"]  # which checkpoints that do not speak refuse
    name, as_base64 = split_format(row.audio_format)
    return json.dumps(asdict(WantedFile(name, as_base64, arguments))).encode()


def unpack_wanted(packed: np.ndarray | None) -> list[WantedFile]:
    """Reads what `pack_wanted` has written; none if the request wants samples.

    Raises `InvalidArgumentError` for anything else, which only a direct call to the decoder can send.
    """
    texts = [] if packed is None else [row.tobytes() for row in packed]
    if all(text.rstrip() == NOTHING for text in texts):
        return []
    try:
        wanted = [WantedFile(**json.loads(text)) for text in texts]
        for each in wanted:
            split_format(each.audio_format)
            str(each.arguments["prompt"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise invalid("audio_file", texts[0], "what the text stage sends, for all rows or for none") from None
    return wanted
