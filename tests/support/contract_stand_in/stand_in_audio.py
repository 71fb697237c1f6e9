"""What the stand-in answers: audio that depends on every argument, so that a tensor lost on its way shows."""

import zlib
from collections.abc import Mapping

import numpy as np

SAMPLING_RATE = 16000  # Hz
NATIVE_AUDIO_LENGTH_IN_S = 0.64


def stand_in_audio(arguments: Mapping[str, object], num_waveforms: int, audio_length_in_s: float) -> np.ndarray:
    """float32 [N, S] in [-1, 1]; `arguments` are the row's other inputs by name."""
    generator = np.random.default_rng(zlib.crc32(repr(sorted(arguments.items())).encode()))
    num_samples = int(audio_length_in_s * SAMPLING_RATE)
    return generator.uniform(-1, 1, (num_waveforms, num_samples)).astype(np.float32)


def stand_in_scores(num_waveforms: int) -> np.ndarray:
    """float32 [N], best first."""
    return np.linspace(0.9, 0.1, num_waveforms, dtype=np.float32)
