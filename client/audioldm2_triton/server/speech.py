"""Recognises checkpoints that speak: their second text encoder is VITS, which reads the words to say."""

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
