"""The requests of the long trials, whose right audio is known, and the ways in which they are sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import numpy as np

from audioldm2_triton import AudioLDM2Client, Finished, InternalError
from serving.local_server import LocalServer

TOLERANCE: Final = 1e-4
"""Of audio in [-1, 1] in float32, whatever shares a forward with it, on however many threads."""

# They differ in all that a forward can mix, and take between some 10 ms and a second alone.
_REQUESTS: Final[tuple[Mapping[str, Any], ...]] = (
    {"prompt": "rain", "audio_length_in_s": 0.3, "num_inference_steps": 4},
    {"prompt": "a dog barks", "audio_length_in_s": 0.64, "num_inference_steps": 10, "scheduler": "DDIMScheduler"},
    {"prompt": "birds", "audio_length_in_s": 1.0, "num_inference_steps": 6, "negative_prompt": "low quality"},
    {"prompt": "a bell", "audio_length_in_s": 0.5, "num_inference_steps": 5, "num_waveforms_per_prompt": 2},
    {"prompt": "wind", "audio_length_in_s": 0.2, "num_inference_steps": 20, "guidance_scale": 1.0},
    {"prompt": "a choir", "audio_length_in_s": 2.0, "num_inference_steps": 8, "scheduler": "HeunDiscreteScheduler"},
    {"prompt": "surf", "audio_length_in_s": 1.5, "num_inference_steps": 4, "window_length_in_s": 0.64},
)


@dataclass(frozen=True)
class Known:
    """A request, and its audio [N, S]."""

    arguments: Mapping[str, Any]
    audio: np.ndarray

    def is_right(self, audio: np.ndarray) -> bool:
        return audio.shape == self.audio.shape and float(np.abs(audio - self.audio).max()) <= TOLERANCE


def known_requests(server: LocalServer) -> tuple[Known, ...]:
    """Generates each request alone."""
    with AudioLDM2Client(server.grpc_url) as client:
        return tuple(
            Known({**arguments, "seed": seed}, client.generate(**arguments, seed=seed).audio)
            for seed, arguments in enumerate(_REQUESTS)
        )


def generate(client: AudioLDM2Client, known: Known, random: Random, timeout: float | None = None) -> np.ndarray:
    """Returns a request's audio [N, S] by one of the client's ways: one answer, or a stream."""
    if random.random() < 0.5:
        audio: np.ndarray = client.generate(**known.arguments, timeout=timeout).audio
        return audio
    *_, last = client.stream(**known.arguments, timeout=timeout)
    if not isinstance(last, Finished):
        raise InternalError("the stream ended without its last event")
    return last.result.audio
