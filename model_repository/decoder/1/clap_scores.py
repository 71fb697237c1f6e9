"""How well waveforms match their prompt: cosine similarity in CLAP space."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ClapFeatureExtractor, ClapModel


@dataclass(frozen=True)
class ClapScorer:
    """CLAP's audio half, in evaluation mode on one device."""

    clap: Any  # ClapModel without its text tower
    feature_extractor: ClapFeatureExtractor
    device: torch.device
    dtype: torch.dtype


def load_clap_scorer(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> ClapScorer:
    clap: Any = ClapModel.from_pretrained(str(checkpoint / "text_encoder"), dtype=dtype, local_files_only=True)
    del clap.text_model, clap.text_projection  # the text stage's
    extractor = ClapFeatureExtractor.from_pretrained(str(checkpoint / "feature_extractor"), local_files_only=True)
    return ClapScorer(clap.to(device).eval(), extractor, device, dtype)


def score_waveforms(
    scorer: ClapScorer, waveforms: Sequence[np.ndarray], text_embeds: Sequence[Tensor], sampling_rate: int
) -> list[float]:
    """The score of each of M waveforms against its own text.

    Audio longer than CLAP hears at once (10 s) is scored by the mean of the normalised embeddings of consecutive
    windows, the last of which ends with the audio. The reference crops at a random place instead.

    Args:
        waveforms: M float32 arrays [samples] at `sampling_rate` Hz, of any lengths.
        text_embeds: M CLAP text embeddings [D].
    """
    windows = [audio_windows(_resample(scorer, waveform, sampling_rate), scorer) for waveform in waveforms]
    embeds = _embed(scorer, [window for parts in windows for window in parts])
    means = [part.mean(dim=0) for part in embeds.split([len(parts) for parts in windows])]
    texts = torch.stack(list(text_embeds)).to(means[0])
    return functional.cosine_similarity(torch.stack(means), texts).tolist()


def _resample(scorer: ClapScorer, waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """To CLAP's rate, as `librosa.resample` does with its defaults."""
    target = scorer.feature_extractor.sampling_rate
    resampled = soxr.resample(waveform, sampling_rate, target, quality="HQ")
    length = ceil(len(waveform) * target / sampling_rate)
    return np.pad(resampled[:length], (0, max(0, length - len(resampled))))


def audio_windows(waveform: np.ndarray, scorer: ClapScorer) -> list[np.ndarray]:
    """Consecutive windows of at most what CLAP hears at once; the last is aligned to the end."""
    size = scorer.feature_extractor.nb_max_samples
    if len(waveform) <= size:
        return [waveform]
    starts = [*range(0, len(waveform) - size, size), len(waveform) - size]
    return [waveform[start : start + size] for start in starts]


@torch.inference_mode()
def _embed(scorer: ClapScorer, windows: Sequence[np.ndarray]) -> Tensor:
    """Normalised embeddings [M, D], float32 on the host."""
    features = scorer.feature_extractor(
        list(windows), sampling_rate=scorer.feature_extractor.sampling_rate, return_tensors="pt"
    ).input_features
    output = scorer.clap.get_audio_features(features.to(scorer.device, scorer.dtype))
    embeds: Tensor = output.pooler_output.float().cpu()
    return embeds
