"""How long texts are: the tokens that encoders read, and the hidden states that GPT-2 generates."""

import json
from pathlib import Path
from typing import Final

from audioldm2_triton.server.speech import speaks

MAX_TOKENIZER_LENGTH: Final = 100_000
"""More is no length: a tokenizer that was saved without one has 10 ** 30."""
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
