"""What is different in checkpoints that speak: their second text encoder is VITS, which reads the words to say."""

import json
from pathlib import Path
from typing import Final

SPEECH_ENCODER: Final = "VitsModel"
END_TOKEN: Final = 182
"""The token with which the reference ends a transcription, in place of the first token 0."""


def speaks(checkpoint: Path) -> bool:
    """Whether requests to a checkpoint need a `transcription`. Raises `OSError` and `KeyError` if it is incomplete."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    return bool(index["text_encoder_2"][1] == SPEECH_ENCODER)


SPEECH_MAX_NEW_TOKENS: Final = 512
"""What diffusers' documentation of the pipeline demands for speech; the checkpoints' own configuration says 8."""
DEFAULT_MAX_NEW_TOKENS: Final = 8


def resolve_max_new_tokens(checkpoint: Path, given: int) -> int:
    """Returns how many hidden states GPT-2 generates: the setting `max_new_tokens`, or what its 0 means."""
    if given:
        return given
    if speaks(checkpoint):
        return SPEECH_MAX_NEW_TOKENS
    config = json.loads((checkpoint / "language_model" / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS)
