"""The text stage, without Triton: every text as if it were alone, whatever shares its batch."""

from pathlib import Path

import pytest
import torch

from audioldm2_pipeline import Reference
from text_encoders import EncodedTexts, TextEncoders, encode_texts, load_text_encoders, tokenize_t5

SHORT, MIDDLE = "rain", "A hammer hits a wooden surface"
LONG = "The choir of an old cathedral sings while bells ring and a storm rages outside over the sea, " * 4


@pytest.fixture(scope="module")
def encoders(tiny_checkpoint: Path) -> TextEncoders:
    return load_text_encoders(tiny_checkpoint, torch.device("cpu"), torch.float32)


def encode(encoders: TextEncoders, *texts: str) -> EncodedTexts:
    tokens = [tokenize_t5(encoders, text) for text in texts]
    return encode_texts(encoders, texts, tokens, [len(row) for row in tokens])


@pytest.mark.parametrize("prompt", [SHORT, MIDDLE, LONG])
@pytest.mark.parametrize("negative", ["", "noise", LONG])
def test_equals_the_references_encode_prompt(
    prompt: str, negative: str, encoders: TextEncoders, reference: Reference
) -> None:
    with torch.no_grad():
        embeds, mask, generated = reference.pipeline.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
    tokens = tokenize_t5(encoders, prompt)
    cut = tokenize_t5(encoders, negative, len(tokens))
    ours = encode_texts(encoders, [negative, prompt], [cut, tokens], [len(tokens)] * 2)
    torch.testing.assert_close(ours.attention_mask, mask)
    torch.testing.assert_close(ours.prompt_embeds * mask[..., None], embeds * mask[..., None], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.generated_prompt_embeds, generated, atol=2e-5, rtol=1e-4)


def test_batching_changes_nothing(encoders: TextEncoders) -> None:
    together = encode(encoders, SHORT, LONG, MIDDLE)
    for row, text in enumerate([SHORT, LONG, MIDDLE]):
        alone = encode(encoders, text)
        length = alone.prompt_embeds.shape[1]
        for field in ("text_embeds", "generated_prompt_embeds"):
            torch.testing.assert_close(getattr(together, field)[row], getattr(alone, field)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.prompt_embeds[row, :length], alone.prompt_embeds[0], atol=1e-5, rtol=1e-5)
        assert together.attention_mask[row].sum() == length


def test_right_padding_would_not_do(encoders: TextEncoders, reference: Reference) -> None:
    """The trap that the left padding is for: the reference's own batch moves the short prompt."""
    with torch.no_grad():
        _, _, together = reference.pipeline.encode_prompt([SHORT, LONG], "cpu", 1, False)
    alone = encode(encoders, SHORT).generated_prompt_embeds
    assert (together[:1] - alone).abs().max() > 1e-3
