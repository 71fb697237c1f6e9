"""The public contract of `audioldm2` and `audioldm2_stream`: tensors, defaults and limits.

Shared by the client and by the stages, so that neither can drift from the other. `B` is the number of rows of a
request, `N` the number of waveforms per prompt, `S` the number of samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

ENSEMBLE: Final = "audioldm2"
STREAM: Final = "audioldm2_stream"
"""The models of a server's first checkpoint; those of further ones have a prefix, as in `music_audioldm2`."""

SCHEDULERS: Final = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)

INTERACTIVE: Final = "interactive"
BATCH: Final = "batch"
PRIORITIES: Final = (INTERACTIVE, BATCH)
"""What goes first comes first. Words, as `scheduler`: a number would leave open whether 1 is more urgent than 2."""

AUDIO_FORMATS: Final = ("wav", "wav24", "wavfloat", "flac", "flac24", "ogg", "opus", "mp3")
"""The kinds of audio file. `wav` and `flac` have 16 bits per sample, `ogg` is Vorbis."""
AS_BASE64: Final = ";base64"
"""Behind one of them in the input `audio_format`: the file as text, because JSON cannot hold bytes."""

MAX_BATCH_SIZE: Final = 8  # rows of one request
MAX_PROMPT_CHARACTERS: Final = 2000
MIN_AUDIO_LENGTH_IN_S: Final = 0.1
MIN_WINDOW_LENGTH_IN_S: Final = 0.64
MAX_GUIDANCE_SCALE: Final = 50.0
MAX_SEED: Final = 2**63 - 1
NUM_DRAWN_SEEDS: Final = 2**32
"""A seed that nobody gives is drawn below this.

PyTorch's generator on a CPU, which draws the noise, uses the low 32 bits of a seed only: larger ones add nothing.
And JSON numbers in JavaScript keep 53 bits: a drawn seed that is sent back has to be the same.
"""

DEFAULT_NEGATIVE_PROMPT: Final = ""
DEFAULT_NUM_INFERENCE_STEPS: Final = 20
DEFAULT_GUIDANCE_SCALE: Final = 3.5
DEFAULT_NUM_WAVEFORMS_PER_PROMPT: Final = 1
DEFAULT_SCHEDULER: Final = SCHEDULERS[0]
DEFAULT_WINDOW_LENGTH_IN_S: Final = 0.0  # no windows
DEFAULT_PRIORITY: Final = INTERACTIVE

INPUTS: Final[Mapping[str, str]] = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "audio_length_in_s": "FP32",
    "num_inference_steps": "INT32",
    "guidance_scale": "FP32",
    "num_waveforms_per_prompt": "INT32",
    "seed": "INT64",
    "scheduler": "BYTES",
    "return_scores": "BOOL",
    "transcription": "BYTES",
    "window_length_in_s": "FP32",
    "priority": "BYTES",
    "audio_format": "BYTES",
}
"""Input tensors, each [B, 1], and their Triton types. All except `prompt` are optional.

Checkpoints that speak also require `transcription`; all others refuse it.
"""

OUTPUTS: Final[Mapping[str, str]] = {
    "audio": "FP32",
    "score": "FP32",
    "sampling_rate": "INT32",
    "seed_used": "INT64",
    "encoded_audio": "BYTES",
}
"""Output tensors: `audio` [B, N, S], `score` and `encoded_audio` [B, N], `sampling_rate` and `seed_used` [B, 1].

With `audio_format`, `encoded_audio` has the bytes of files and `audio` is empty; without, it is the other way round.

Not `seed`: an ensemble with an output named like an input feeds it back to its first step, for ever.
"""


@dataclass(frozen=True)
class Limits:
    """The configurable limits of one server."""

    max_audio_length_in_s: float = 300.0
    max_num_inference_steps: int = 200
    max_num_waveforms_per_prompt: int = 8


def stream_of(model: str) -> str:
    """Returns the streaming model beside an ensemble: `music_audioldm2_stream` for `music_audioldm2`."""
    return model + STREAM.removeprefix(ENSEMBLE)
