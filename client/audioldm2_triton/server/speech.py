"""Which checkpoints speak: those whose second text encoder is VITS, which reads the words to say."""

import json
from pathlib import Path
from typing import Final

SPEECH_ENCODER: Final = "VitsModel"
END_TOKEN: Final = 182
"""What the reference ends a transcription with, in place of the first token 0; AudioLDM 2 counts phonemes so."""


def speaks(checkpoint: Path) -> bool:
    """Whether requests to a checkpoint need a `transcription`. Raises `OSError` and `KeyError` for one that is not
    whole."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    return bool(index["text_encoder_2"][1] == SPEECH_ENCODER)
