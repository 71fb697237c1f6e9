"""Decides what the encoders read of a row: the prompt, the words to say, and how much of the negative prompt."""

from dataclasses import dataclass

from audioldm2_triton.errors import invalid
from audioldm2_triton.server.generation_row import GenerationRow
from embedding_cache import TextKey
from text_encoders import TextEncoders, tokenize_t5
from transcriptions import tokenize_transcription, untruncated_length


@dataclass(frozen=True)
class RowTexts:
    prompt: TextKey
    negative: TextKey | None  # None: no guidance
    cuts: tuple[str, ...] = ()  # descriptions of text that is cut because it is too long, for the log


def row_texts(encoders: TextEncoders, row: GenerationRow, full_negative_prompt: bool) -> RowTexts:
    """Returns the texts of one row.

    Args:
        full_negative_prompt: whether a negative prompt with more T5 tokens than the prompt is read whole. The reference
            cuts it to the prompt's number.

    Raises `InvalidArgumentError` for a transcription with nothing to say, for which the reference fails.
    """
    if encoders.speaks:
        return _spoken(encoders, row)
    tokens = tokenize_t5(encoders, row.prompt)
    prompt = TextKey(row.prompt, tuple(tokens), len(tokens))
    if not row.do_classifier_free_guidance:
        return RowTexts(prompt, None)
    whole = tokenize_t5(encoders, row.negative_prompt)
    if full_negative_prompt or len(whole) <= len(tokens):
        # A shorter one counts as being as long as the prompt, as in the reference.
        return RowTexts(prompt, TextKey(row.negative_prompt, tuple(whole), max(len(whole), len(tokens))))
    cut = tokenize_t5(encoders, row.negative_prompt, len(tokens))
    reason = f"`negative_prompt` from {len(whole)} tokens to its prompt's {len(cut)} (see full_negative_prompt)"
    return RowTexts(prompt, TextKey(row.negative_prompt, tuple(cut), len(cut)), (reason,))


def _spoken(encoders: TextEncoders, row: GenerationRow) -> RowTexts:
    """As in the reference every transcription is padded to the same length, and a negative prompt has none."""
    tokenizer = encoders.second_tokenizer
    length = tokenizer.model_max_length
    tokens = tokenize_transcription(tokenizer, row.transcription)
    if not tokens:
        raise invalid("transcription", row.transcription, "text with characters that the checkpoint can say")
    prompt = TextKey(row.prompt, tuple(tokens), length)
    negative = TextKey(row.negative_prompt, (), length) if row.do_classifier_free_guidance else None
    cuts: tuple[str, ...] = ()
    if len(tokens) == length and (whole := untruncated_length(tokenizer, row.transcription)) > length:
        cuts = (f"`transcription` from {whole} tokens to the checkpoint's {length}",)
    return RowTexts(prompt, negative, cuts)
