"""CLAP's features and scores in PyTorch are those of librosa's resampling and of transformers' feature extractor."""

from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor, ClapModel

from clap_features import clap_front_end
from clap_scores import ClapScorer, clap_features, load_clap_scorer, score_waveforms
from resampling import resample

CPU = torch.device("cpu")
RATE = 16000
SCORE_TOLERANCE = 0.01
LENGTHS_IN_S = (0.1, 0.64, 1.0, 2.56, 4.999, 9.99, 10.0, 10.24, 12.0, 21.0)


def sound(shape: str, length: int, rate: int = RATE) -> np.ndarray:
    """A float32 waveform in [-1, 1]."""
    generator = np.random.default_rng([length, len(shape)])
    time = np.arange(length) / rate
    if shape == "noise":
        waveform = generator.uniform(-1, 1, length)
    elif shape == "hum":
        waveform = 0.01 * generator.standard_normal(length).cumsum() / length**0.5
    elif shape == "sine":
        waveform = np.sin(2 * np.pi * 440 * time)
    elif shape == "sines":  # up into the filter's slope, and loud
        waveform = sum(np.sin(2 * np.pi * pitch * time + pitch) for pitch in (55, 1234.5, 7400, 7700, 7950)) / 5
    elif shape == "clicks":
        waveform = np.zeros(length)
        waveform[generator.integers(0, length, 1 + length // 3000)] = generator.choice([-1, 1], 1 + length // 3000)
    elif shape == "burst":  # with silence around it
        waveform = generator.uniform(-1, 1, length) * np.exp(-(((time / time[-1] - 0.5) * 20) ** 2))
    else:
        waveform = np.zeros(length)
    return waveform.astype(np.float32)


SHAPES = ("noise", "hum", "sine", "sines", "clicks", "burst", "silence")


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint: Path) -> ClapScorer:
    return load_clap_scorer(tiny_checkpoint, CPU, torch.float32)


@pytest.fixture(scope="module")
def extractor(tiny_checkpoint: Path) -> ClapFeatureExtractor:
    return ClapFeatureExtractor.from_pretrained(tiny_checkpoint / "feature_extractor")


@pytest.fixture(scope="module")
def clap(tiny_checkpoint: Path) -> Any:
    return ClapModel.from_pretrained(tiny_checkpoint / "text_encoder").eval()


def extracted(extractor: ClapFeatureExtractor, waveform: np.ndarray) -> torch.Tensor:
    """The reference's features [K, 1, frames, bands], of the windows that the module's docstring promises."""
    resampled = librosa.resample(waveform, orig_sr=RATE, target_sr=extractor.sampling_rate)
    size = extractor.nb_max_samples
    starts = [0]
    if len(resampled) > size:
        starts = [*range(0, len(resampled) - size, size), len(resampled) - size]
    windows = [resampled[start : start + size] for start in starts]
    return extractor(windows, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features


@pytest.mark.parametrize("length_in_s", LENGTHS_IN_S)
def test_features_and_scores_are_the_extractors(
    length_in_s: float, scorer: ClapScorer, extractor: ClapFeatureExtractor, clap: Any
) -> None:
    waveforms = [sound(shape, int(length_in_s * RATE)) for shape in SHAPES]
    texts = torch.randn(len(SHAPES), clap.config.projection_dim, generator=torch.Generator().manual_seed(1))
    expected = [extracted(extractor, waveform) for waveform in waveforms]
    for shape, features, reference in zip(SHAPES, clap_features(scorer, waveforms, RATE), expected, strict=True):
        difference = (features - reference).abs()
        # Under a loud tone, the bands above 8 kHz hold rounding errors around the floor of -100 dB, here and there.
        assert difference.max() < 0.5, shape
        assert difference.mean() < 0.02, shape
        assert (difference * (reference > -80)).max() < 0.05, shape
    with torch.inference_mode():
        embeds = torch.stack([clap.get_audio_features(reference).pooler_output.mean(dim=0) for reference in expected])
    scores = score_waveforms(scorer, waveforms, list(texts), RATE)
    reference_scores = torch.nn.functional.cosine_similarity(embeds, texts)
    np.testing.assert_allclose(scores, reference_scores.numpy(), atol=SCORE_TOLERANCE)


def test_scores_tell_sounds_apart(scorer: ClapScorer) -> None:
    """Or else a tolerance would mean nothing."""
    text = torch.randn(scorer.clap.config.projection_dim, generator=torch.Generator().manual_seed(1))
    scores = score_waveforms(scorer, [sound(shape, RATE) for shape in SHAPES], [text] * len(SHAPES), RATE)
    assert np.diff(sorted(scores)).max() > 2 * SCORE_TOLERANCE


def test_lengths_mixed_in_one_call_keep_their_order(scorer: ClapScorer) -> None:
    waveforms = [sound(shape, int(RATE * length)) for length in (0.3, 10.5, 0.3, 2.0) for shape in ("noise", "clicks")]
    dim = scorer.clap.config.projection_dim
    texts = list(torch.randn(len(waveforms), dim, generator=torch.Generator().manual_seed(1)))
    together = score_waveforms(scorer, waveforms, texts, RATE)
    alone = [score_waveforms(scorer, [one], [text], RATE)[0] for one, text in zip(waveforms, texts, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_resampling_for_clap_is_librosas(shape: str) -> None:
    for length in (1, 100, 12345):
        waveform = sound(shape, length) if length > 1 else np.ones(1, np.float32)
        expected = librosa.resample(waveform, orig_sr=RATE, target_sr=48000)
        result = resample(torch.from_numpy(waveform)[None], RATE, 48000)[0].numpy()
        assert result.dtype == np.float32
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("rate", "new_rate"), [(48000, 16000), (22050, 48000), (44100, 32000), (8000, 8000)])
def test_resampling_at_other_rates_keeps_what_both_can_hold(rate: int, new_rate: int) -> None:
    """Tones below 0.9 of the lower Nyquist frequency pass as they are, those above it are gone."""
    lower = min(rate, new_rate)
    time = torch.arange(rate, dtype=torch.float64) / rate
    new_time = torch.arange(new_rate, dtype=torch.float64) / new_rate
    pitches = torch.tensor([0.01, 0.2, 0.45])[:, None] * lower
    result = resample(torch.sin(2 * torch.pi * pitches * time).float(), rate, new_rate)
    expected = torch.sin(2 * torch.pi * pitches * new_time).float()
    inner = slice(new_rate // 10, -new_rate // 10)  # a tone that begins is not one tone
    torch.testing.assert_close(result[:, inner], expected[:, inner], rtol=0, atol=1e-5)
    if new_rate < rate:
        gone = resample(torch.sin(2 * torch.pi * 0.51 * lower * time).float()[None], rate, new_rate)
        assert gone[:, inner].abs().max() < 1e-5


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("length", [4800, 100_000, 480_000])
def test_every_padding_of_the_extractor(padding: str, length: int, scorer: ClapScorer) -> None:
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding=padding)
    of_padding = ClapScorer(scorer.clap, clap_front_end(extractor, CPU), CPU, torch.float32)
    waveform = sound("noise", length, 48000)
    [features] = clap_features(of_padding, [waveform], 48000)
    expected = extractor(waveform, sampling_rate=48000, return_tensors="pt").input_features
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("option", "value"), [("truncation", "fusion"), ("padding", "mirror")])
def test_an_extractor_that_is_not_followed_is_refused(option: str, value: str) -> None:
    extractor = ClapFeatureExtractor(**{"truncation": "rand_trunc", option: value})
    with pytest.raises(ValueError, match=f"{option} of the feature extractor: got '{value}' but expected"):
        clap_front_end(extractor, CPU)
