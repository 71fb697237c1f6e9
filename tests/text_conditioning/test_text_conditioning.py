"""The text stage, without Triton: every text as if it were alone, whatever shares its batch."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import text_encoders
from audioldm2_pipeline import Reference
from audioldm2_triton.server.generation_row import GenerationRow
from audioldm2_triton.server.geometry import read_audio_geometry
from conditioning import condition
from embedding_cache import EmbeddingCache
from text_buckets import TextBuckets
from text_compilation import compile_text_encoders
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


FIELDS = ("text_embeds", "prompt_embeds", "attention_mask", "generated_prompt_embeds")


def row(prompt: str, negative_prompt: str = "", guidance_scale: float = 3.5) -> GenerationRow:
    return GenerationRow(
        prompt=prompt,
        negative_prompt=negative_prompt,
        audio_length_in_s=0.64,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        num_waveforms_per_prompt=1,
        seed=0,
        scheduler="DDIMScheduler",
        return_scores=False,
    )


def assert_same_tensors(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        if values.dtype == np.float32:
            np.testing.assert_allclose(ours[name], values, atol=1e-5, rtol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_the_cache_changes_nothing(
    encoders: TextEncoders, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One negative prompt behind prompts of different lengths, texts as prompt and as negative, repeats."""
    geometry = read_audio_geometry(tiny_checkpoint)
    calls: list[list[str]] = []

    def recording(used: TextEncoders, texts: list[str], *arguments: list) -> EncodedTexts:
        calls.append(texts)
        return encode_texts(used, texts, *arguments)

    monkeypatch.setattr("conditioning.encode_texts", recording)
    requests = [
        [row(SHORT, MIDDLE), row(MIDDLE, MIDDLE)],
        [row(LONG, MIDDLE), row(MIDDLE, SHORT)],
        [row(SHORT, MIDDLE)],
        [row(SHORT, "", guidance_scale=1.0)],
        [row(SHORT), row(MIDDLE)],
    ]
    expected = []
    for request in requests:
        (alone,) = condition(encoders, EmbeddingCache(0), geometry, [request])
        expected.append(alone)
    calls.clear()
    cache: EmbeddingCache[EncodedTexts] = EmbeddingCache(100)
    for ours, alone in zip(condition(encoders, cache, geometry, requests), expected, strict=True):
        assert_same_tensors(ours, alone)
    # MIDDLE as a negative prompt is cut or padded to its prompt: it is the prompt's own encoding only once.
    assert sorted(calls[0]) == sorted([SHORT, MIDDLE, MIDDLE, LONG, MIDDLE, SHORT, "", ""])
    for request, alone in zip(requests, expected, strict=True):
        (ours,) = condition(encoders, cache, geometry, [request])
        assert_same_tensors(ours, alone)
    assert len(calls) == 1, "a text was encoded again"


def assert_compiled_equals_eager(
    encoders: TextEncoders, compiled: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.compiled is not None
    texts_of_calls = [[SHORT], [SHORT, MIDDLE], [MIDDLE, "", SHORT], [MIDDLE, SHORT, "", MIDDLE]]
    for stance in ("fail_on_recompile", "eager_on_recompile"):
        monkeypatch.setattr(text_encoders, "STANCE_OF_REQUESTS", stance)
        for texts in texts_of_calls:
            ours, expected = encode(compiled, *texts), encode(encoders, *texts)
            for field in FIELDS:
                torch.testing.assert_close(getattr(ours, field), getattr(expected, field), atol=1e-5, rtol=1e-5)
        # What fits no bucket runs uncompiled: too long, too many.
        texts_of_calls = [[LONG], [SHORT, LONG], [SHORT] * 5]


def test_compiled_equals_eager_and_no_request_compiles(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the compiler's front end alone, which is what pads, chooses and recompiles; real code takes minutes."""
    with caplog.at_level(logging.INFO):
        compiled = compile_text_encoders(encoders, TextBuckets((4,), (8, 32)), "eager")
    assert sum("compiled" in line for line in caplog.messages) == 2
    assert_compiled_equals_eager(encoders, compiled, monkeypatch)


@pytest.mark.slow
def test_compiled_code_equals_eager(encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_text_encoders(encoders, TextBuckets((4,), (32,)))
    assert_compiled_equals_eager(encoders, compiled, monkeypatch)


def test_a_compiler_that_fails_leaves_the_encoders_as_they_were(
    encoders: TextEncoders, caplog: pytest.LogCaptureFixture
) -> None:
    def failing_backend(*_: object) -> None:
        raise RuntimeError("no compiler here")

    assert compile_text_encoders(encoders, TextBuckets((2,), (8,)), failing_backend) is encoders
    assert "no compiler here" in caplog.text


def test_the_bucket_is_the_smallest_that_holds_the_texts() -> None:
    buckets = TextBuckets((2, 4), (8, 16))
    assert [buckets.bucket(*shape) for shape in ((1, 1), (2, 9), (3, 8), (4, 16))] == [(2, 8), (2, 16), (4, 8), (4, 16)]
    assert buckets.bucket(5, 1) is buckets.bucket(1, 17) is None
    with pytest.raises(ValueError, match=r"rows: got \(4, 2\)"):
        TextBuckets((4, 2), (8,))
