"""`full_negative_prompt`: off, T5 reads of a negative prompt as much as the prompt is long, like the reference.

On, it reads all. CLAP reads all in both.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audioldm2_pipeline import Reference, as_row, generate
from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.server.geometry import read_audio_geometry
from conditioning import condition
from embedding_cache import EmbeddingCache
from long_negative_prompt import CALL, HEAD, NEGATIVE, PROMPT, embedded
from serving.local_server import LocalServer
from text_encoders import EncodedTexts, TextEncoders, load_text_encoders, tokenize_t5

OTHER_TAIL = f"{HEAD} slow, sad melody with violins"


@pytest.fixture(scope="module")
def encoders(tiny_checkpoint: Path) -> TextEncoders:
    return load_text_encoders(tiny_checkpoint, torch.device("cpu"), torch.float32)


@pytest.fixture
def conditioned(encoders: TextEncoders, tiny_checkpoint: Path):
    """The text stage's tensors of requests of one row each, all in one call."""
    geometry = read_audio_geometry(tiny_checkpoint)
    cache: EmbeddingCache[EncodedTexts] = EmbeddingCache(100)  # one for both, so that its keys must tell them apart

    def conditioned(*negative_prompts: str, full: bool) -> list[dict[str, np.ndarray]]:
        requests = [[as_row(replace(CALL, negative_prompt=text))] for text in negative_prompts]
        return condition(encoders, cache, geometry, requests, full)

    return conditioned


def test_off_only_clap_reads_the_tail(conditioned) -> None:
    one, other = conditioned(NEGATIVE, OTHER_TAIL, full=False)
    np.testing.assert_array_equal(one["negative_prompt_embeds"], other["negative_prompt_embeds"])
    assert one["negative_attention_mask"].sum() == one["attention_mask"].sum()


def test_on_it_is_encoded_as_a_prompt_is(conditioned, encoders: TextEncoders, reference: Reference) -> None:
    for negative_prompt, tensors in zip(
        (NEGATIVE, OTHER_TAIL), conditioned(NEGATIVE, OTHER_TAIL, full=True), strict=True
    ):
        expected = embedded(reference, negative_prompt)
        assert tensors["negative_attention_mask"].sum() == len(tokenize_t5(encoders, negative_prompt))
        for name, values in expected.items():
            np.testing.assert_allclose(tensors[name], values, atol=2e-5, rtol=1e-4, err_msg=name)


def test_a_negative_prompt_that_is_not_longer_is_the_same_on_and_off(conditioned, encoders: TextEncoders) -> None:
    as_long = "A dog falls away"
    assert len(tokenize_t5(encoders, as_long)) == len(tokenize_t5(encoders, PROMPT))
    # Behind a longer one, whose length is none of theirs.
    off, on = (
        conditioned(NEGATIVE, "", "noise,", as_long, full=False),
        conditioned(NEGATIVE, "", "noise,", as_long, full=True),
    )
    for ours, expected in zip(on[1:], off[1:], strict=True):
        for name, values in expected.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_a_text_as_long_as_t5_reads_is_the_limit(conditioned, encoders: TextEncoders) -> None:
    (tensors,) = conditioned("noise and hum " * 100, full=True)
    assert tensors["negative_attention_mask"].sum() == encoders.second_tokenizer.model_max_length


def test_off_the_log_has_the_cut_once_per_request(server: LocalServer, encoders: TextEncoders) -> None:
    negative_prompt = f"{NEGATIVE} and wind far away in the forest"
    whole, left = len(tokenize_t5(encoders, negative_prompt)), len(tokenize_t5(encoders, PROMPT))
    line = f"cut: `negative_prompt` from {whole} tokens to its prompt's {left}"
    call = replace(CALL, negative_prompt=negative_prompt, num_inference_steps=1, num_waveforms_per_prompt=2)
    before = server.log.read_text().count(line)
    with AudioLDM2Client(server.grpc_url) as client:
        for _ in range(2):
            generate(client, call)
    assert server.log.read_text().count(line) - before == 2
