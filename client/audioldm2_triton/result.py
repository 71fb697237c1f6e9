"""The result of a request."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.errors import invalid
from audioldm2_triton.files import AUDIO_FORMATS, check_audio_path, import_soundfile
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

    @property
    def num_waveforms(self) -> int:
        return int(self.audio.shape[0])

    @property
    def num_samples(self) -> int:
        return int(self.audio.shape[1])

    @property
    def duration_in_s(self) -> float:
        return self.num_samples / self.sampling_rate

    def save(self, path: str | PathLike[str], index: int = 0) -> Path:
        """Writes one waveform (0 is the best) as 16-bit PCM to a .wav or .flac file; samples beyond 1 are clipped.

        Returns the path. Raises `InvalidArgumentError` for another suffix, a missing directory or an index out of
        range, `OSError` if the file cannot be written, and `ImportError` without libsndfile.
        """
        soundfile = import_soundfile()
        path = check_audio_path(path)
        samples = np.clip(self._waveform(index), -1.0, 1.0)
        # Opened here, because libsndfile only says "System error" for a file that it cannot open.
        with path.open("wb") as file:
            soundfile.write(
                file, samples, self.sampling_rate, format=AUDIO_FORMATS[path.suffix.lower()], subtype="PCM_16"
            )
        return path

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
