"""The second text encoder of checkpoints that speak: VITS's, which reads the words to say instead of the prompt."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import VitsModel, VitsTokenizer
from transformers.models.vits.modeling_vits import VitsTextEncoder
from transformers.utils.import_utils import is_phonemizer_available

from audioldm2_triton.server.settings import SettingsError
from audioldm2_triton.server.speech import END_TOKEN
from audioldm2_triton.server.text_lengths import MAX_TOKENIZER_LENGTH


def load_transcription_encoder(
    checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> tuple[VitsTextEncoder, VitsTokenizer]:
    """Loads the encoder in evaluation mode, and its tokenizer, which pads transcriptions to its `model_max_length`.

    Raises `SettingsError`, which says what is missing, if the checkpoint's transcriptions cannot be tokenized.
    """
    tokenizer = VitsTokenizer.from_pretrained(checkpoint / "tokenizer_2", local_files_only=True)
    if tokenizer.phonemize and not is_phonemizer_available():
        raise SettingsError(
            f"checkpoint: {checkpoint} reads phonemes, but phonemizer is not installed: "
            "install the Python package phonemizer, and espeak-ng"
        )
    projection = json.loads((checkpoint / "projection_model" / "config.json").read_text(encoding="utf-8"))
    positions = projection.get("max_seq_length")
    is_learned = projection.get("use_learned_position_embedding") is not None
    if tokenizer.model_max_length > MAX_TOKENIZER_LENGTH and is_learned and positions:
        tokenizer.model_max_length = positions
    if not 0 < tokenizer.model_max_length <= MAX_TOKENIZER_LENGTH:
        given = tokenizer.model_max_length
        raise SettingsError(f"checkpoint: model_max_length of tokenizer_2: got {given} but expected a length")
    try:
        tokenize_transcription(tokenizer, "speech")
    except Exception as error:  # whatever is wrong with espeak
        raise SettingsError(f"checkpoint: the tokenizer of {checkpoint} cannot be used here: {error}") from error
    if is_learned and positions != tokenizer.model_max_length:
        raise SettingsError(
            f"checkpoint: max_seq_length of projection_model: got {positions} but expected "
            f"{tokenizer.model_max_length}, the model_max_length of tokenizer_2"
        )
    model: Any = VitsModel.from_pretrained(str(checkpoint / "text_encoder_2"), local_files_only=True, dtype=dtype)
    encoder: VitsTextEncoder = model.text_encoder.to(device).eval()
    if encoder.config.vocab_size <= END_TOKEN:
        given = encoder.config.vocab_size
        raise SettingsError(f"checkpoint: vocab_size of text_encoder_2: got {given} but expected more than {END_TOKEN}")
    return encoder, tokenizer


def tokenize_transcription(tokenizer: VitsTokenizer, text: str) -> list[int]:
    """Returns the tokens of one transcription as in the reference, without the padding.

    They are truncated at the tokenizer's limit, and then lack an end token: that replaces the first token 0, which is
    the first of the padding, unless the vocabulary has blanks between the letters.
    """
    limit = tokenizer.model_max_length
    padded = tokenizer(text, padding="max_length", max_length=limit, truncation=True)
    ids: list[int] = padded.input_ids
    length = sum(padded.attention_mask)
    if 0 in ids:
        end = ids.index(0)
        ids[end] = END_TOKEN
        length = max(length, end + 1)
    return ids[:length]


def untruncated_length(tokenizer: VitsTokenizer, text: str) -> int:
    """Returns how many tokens a transcription has, without an end token."""
    return len(tokenizer(text).input_ids)
