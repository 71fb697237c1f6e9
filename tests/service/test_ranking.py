"""Candidates are ranked within their own prompt, by scores that the reference's CLAP path confirms."""

import numpy as np
import pytest

from audioldm2_pipeline import Call, Reference, difference
from audioldm2_triton import AudioLDM2Client
from serving.local_server import LocalServer

PROMPTS = ["A dog barks", "Rain falls on a tin roof in the forest", "A piano plays a slow melody"]
SCORE_TOLERANCE = 0.01


def test_scores_and_order_are_the_references(server: LocalServer, reference: Reference) -> None:
    with AudioLDM2Client(server.grpc_url) as client:
        results = client.generate(
            PROMPTS, num_waveforms_per_prompt=4, seed=[1, 2, 3], audio_length_in_s=2.5, num_inference_steps=6
        )
    spread = []
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = reference.score(prompt, result.audio)
        assert result.scores is not None
        np.testing.assert_allclose(result.scores, expected, atol=SCORE_TOLERANCE)
        assert all(np.diff(result.scores) <= 0)
        assert all(np.diff(expected) <= SCORE_TOLERANCE)
        spread.append(expected.max() - expected.min())
    assert max(spread) > SCORE_TOLERANCE, "the candidates score alike: the order would mean nothing"


def test_ranking_never_crosses_prompts(server: LocalServer, reference: Reference) -> None:
    with AudioLDM2Client(server.grpc_url) as client:
        results = client.generate(PROMPTS, num_waveforms_per_prompt=3, seed=[4, 5, 6], audio_length_in_s=1.0)
    for prompt, seed, result in zip(PROMPTS, [4, 5, 6], results, strict=True):
        call = Call(prompt, audio_length_in_s=1.0, num_inference_steps=20, num_waveforms_per_prompt=3, seed=seed)
        own, tolerance = reference.generate(call), reference.tolerance(call)
        matches = [min(range(3), key=lambda index: difference(waveform, own[index])) for waveform in result.audio]
        assert sorted(matches) == [0, 1, 2]
        assert all(
            difference(waveform, own[match]) <= tolerance for waveform, match in zip(result.audio, matches, strict=True)
        )


def test_long_audio_is_scored_in_windows_that_end_with_it(server: LocalServer, reference: Reference) -> None:
    with AudioLDM2Client(server.grpc_url) as client:
        results = [
            client.generate("A dog barks", audio_length_in_s=12.5, num_inference_steps=1, seed=3, return_scores=True)
            for _ in range(2)
        ]
    (result, again), rate = results, 16000
    windows = [result.audio[0, : 10 * rate], result.audio[0, -10 * rate :]]
    # The mean of the windows' normalised embeddings, through each window's score and their mutual similarity.
    scores = [reference.score("A dog barks", window[None])[0] for window in windows]
    embeds = [reference.embed_audio(window[None])[0] for window in windows]
    expected = sum(scores) / np.linalg.norm(embeds[0] + embeds[1])
    assert result.scores is not None
    assert again.scores is not None
    assert result.scores[0] == pytest.approx(expected, abs=SCORE_TOLERANCE)
    assert result.scores[0] == again.scores[0]


def test_one_waveform_is_scored_only_when_asked(server: LocalServer) -> None:
    with AudioLDM2Client(server.grpc_url) as client:
        unscored = client.generate("A dog barks", audio_length_in_s=0.5, num_inference_steps=2, seed=1)
        scored = client.generate(
            "A dog barks", audio_length_in_s=0.5, num_inference_steps=2, seed=1, return_scores=True
        )
    assert unscored.scores is None
    assert scored.scores is not None
    assert scored.scores.shape == (1,)
    np.testing.assert_array_equal(unscored.audio, scored.audio)
