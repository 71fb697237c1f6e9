"""Scores how well waveforms match their prompt: cosine similarity in CLAP space, on the decoder's device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ClapFeatureExtractor, ClapModel

from audioldm2_triton.server.linear import replace_linear_layers
from clap_features import ClapFrontEnd, audio_windows, clap_front_end, log_mel
from resampling import resample

MAX_WINDOWS_PER_CALL: Final = 32
"""Windows that CLAP hears together on a GPU; bounds the memory for any number and length of requests."""

MAX_WINDOWS_PER_TRANSFORM: Final = 8
"""Windows whose spectra are held together, 10 MiB each."""


@dataclass(frozen=True)
class ClapScorer:
    """CLAP's audio half, in evaluation mode on one device."""

    clap: Any  # ClapModel without its text tower
    front_end: ClapFrontEnd
    device: torch.device
    dtype: torch.dtype
    before_forward: Callable[[], None] = lambda: None

    @property
    def text_dim(self) -> int:
        """D of the text embeddings [D]."""
        return int(self.clap.config.projection_dim)


def load_clap_scorer(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> ClapScorer:
    """Raises ValueError for a feature extractor with options that `clap_front_end` does not follow."""
    clap: Any = ClapModel.from_pretrained(str(checkpoint / "text_encoder"), dtype=dtype, local_files_only=True)
    del clap.text_model, clap.text_projection  # the text stage's
    replace_linear_layers(clap)
    extractor = ClapFeatureExtractor.from_pretrained(str(checkpoint / "feature_extractor"), local_files_only=True)
    return ClapScorer(clap.to(device).eval(), clap_front_end(extractor, device), device, dtype)


@torch.inference_mode()
def score_waveforms(
    scorer: ClapScorer, waveforms: Sequence[np.ndarray], text_embeds: Sequence[Tensor], sampling_rate: int
) -> list[float]:
    """Scores each of M waveforms against its own text.

    Audio longer than CLAP hears at once (10 s) is scored by the mean of the normalised embeddings of consecutive
    windows, the last of which ends with the audio. The reference crops at a random place instead.

    Args:
        waveforms: M float32 arrays [samples] at `sampling_rate` Hz, of any lengths.
        text_embeds: M CLAP text embeddings [D].
    """
    features = clap_features(scorer, waveforms, sampling_rate)
    # On a CPU one window per call is no slower, needs 38 MiB at the official widths instead of 32 times that, and makes
    # its score independent of the batch.
    size = 1 if scorer.device.type == "cpu" else MAX_WINDOWS_PER_CALL
    embeds = torch.cat([_embed(scorer, part) for part in torch.cat(features).split(size)])
    means = torch.stack([part.mean(dim=0) for part in embeds.split([len(windows) for windows in features])])
    return functional.cosine_similarity(means, torch.stack(list(text_embeds)).to(means)).tolist()


@torch.inference_mode()
def clap_features(scorer: ClapScorer, waveforms: Sequence[np.ndarray], sampling_rate: int) -> list[Tensor]:
    """Computes CLAP's input for each of M waveforms: float32 [K, 1, frames, bands], for its K windows.

    Equal lengths share a call on a GPU.
    """
    features: list[Tensor] = [torch.empty(0)] * len(waveforms)
    by_length: dict[int, list[int]] = {}
    for index, waveform in enumerate(waveforms):
        by_length.setdefault(len(waveform), []).append(index)
    window_samples = scorer.front_end.window_samples * sampling_rate / scorer.front_end.sampling_rate
    for length, indices in by_length.items():
        # On a CPU the last bits of a transform depend on the batch, which shows at the floor of -100 dB. One waveform
        # per call costs the same there, and makes its features independent of the batch.
        on_cpu = scorer.device.type == "cpu"
        size = 1 if on_cpu else max(1, int(MAX_WINDOWS_PER_CALL * window_samples / max(length, window_samples)))
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            scorer.before_forward()
            batch = torch.from_numpy(np.stack([waveforms[index] for index in part])).to(scorer.device)
            windows = audio_windows(resample(batch, sampling_rate, scorer.front_end.sampling_rate), scorer.front_end)
            parts = windows.flatten(0, 1).split(MAX_WINDOWS_PER_TRANSFORM)
            mels = torch.cat([log_mel(each, scorer.front_end) for each in parts])
            for index, mel in zip(part, mels.unflatten(0, windows.shape[:2]), strict=True):
                features[index] = mel
    return features


def _embed(scorer: ClapScorer, features: Tensor) -> Tensor:
    """Computes normalised embeddings [M, D], float32 on the host."""
    scorer.before_forward()
    output = scorer.clap.get_audio_features(features.to(scorer.dtype))
    embeds: Tensor = output.pooler_output.float().cpu()
    return embeds
