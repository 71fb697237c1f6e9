"""The result of a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.audio.encoding import check_encodable, encode_audio
from audioldm2_triton.audio.origin import Origin, tags_of
from audioldm2_triton.errors import invalid
from audioldm2_triton.files import check_audio_path
from audioldm2_triton.plot import save_plot


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """The waveforms of one prompt."""

    audio: NDArray[np.float32]  # float32 [N, S] in [-1, 1], best first
    scores: (
        NDArray[np.float32] | None
    )  # float32 [N], similarity of each waveform with the prompt; None when not asked for
    seed: int  # the seed used, drawn or given
    sampling_rate: int  # Hz
    prompt: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # all of the request, defaults too
    checkpoint: str | None = None  # as the server calls it

    @property
    def num_waveforms(self) -> int:
        return int(self.audio.shape[0])

    @property
    def num_samples(self) -> int:
        return int(self.audio.shape[1])

    @property
    def duration_in_s(self) -> float:
        return self.num_samples / self.sampling_rate

    def save(self, path: str | PathLike[str], index: int = 0, *, audio_format: str | None = None) -> Path:
        """Writes one waveform (0 is the best) to a file of the format that its suffix names.

        .wav and .flac have 16 bits, unless `audio_format` says otherwise: one of `wav`, `wav24`, `wavfloat`, `flac`,
        `flac24`, `ogg` (Vorbis), `opus` and `mp3`. Samples beyond 1 are clipped, except in `wavfloat`. The file says
        that it was generated, and how: `audioldm2 --like FILE` makes the sound again.

        Returns the path. Raises `InvalidArgumentError` for another suffix or format, a sampling rate that the format
        does not know, a missing directory or an index out of range, `OSError` if the file cannot be written, and
        `ImportError` without libsndfile, which all but WAV needs.
        """
        checked, chosen = check_audio_path(path, audio_format)
        checked.write_bytes(self.encode(chosen, index))
        return checked

    def encode(self, audio_format: str = "wav", index: int = 0) -> bytes:
        """Returns one waveform (0 is the best) as the bytes of the file that `save` writes."""
        check_encodable(audio_format)
        arguments = {**self.arguments, "prompt": self.prompt, "seed": self.seed}
        tags = tags_of(Origin(arguments, self.checkpoint, index))
        return encode_audio(self._waveform(index), self.sampling_rate, audio_format, tags)

    def plot(self, path: str | PathLike[str], index: int = 0) -> Path:
        """Draws one waveform (0 is the best) to a .png file, with its log-mel spectrogram below.

        Returns the path. Raises `ImportError` without the extra `plot`, and `InvalidArgumentError` for another suffix,
        a missing directory or an index out of range.
        """
        return save_plot(path, self._waveform(index), self.sampling_rate, self.prompt)

    def _waveform(self, index: int) -> NDArray[np.float32]:
        if not 0 <= index < self.num_waveforms:
            raise invalid("index", index, f"an integer from 0 to {self.num_waveforms - 1}")
        waveform: NDArray[np.float32] = self.audio[index]
        return waveform
