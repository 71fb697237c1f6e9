"""Where the windows of long audio lie, and their seams."""

from dataclasses import dataclass

from audioldm2_triton.server.geometry import AudioGeometry
from sound_quality.spectral_flux import Stretch


@dataclass(frozen=True)
class Layout:
    """Windows at equal distances, in seconds."""

    window: float
    overlap: float
    count: int

    @property
    def step(self) -> float:
        return self.window - self.overlap

    @property
    def length(self) -> float:
        return self.window + (self.count - 1) * self.step

    @property
    def seams(self) -> list[Stretch]:
        """The middle halves of the overlaps, where both windows count."""
        return [self._around(index * self.step + self.overlap / 2) for index in range(1, self.count)]

    @property
    def between(self) -> list[Stretch]:
        """Equally long stretches in the middle of the windows."""
        return [self._around(index * self.step + self.window / 2) for index in range(self.count)]

    def _around(self, second: float) -> Stretch:
        return second - self.overlap / 4, second + self.overlap / 4


def make_layout(geometry: AudioGeometry, window_length_in_s: float | None, count: int) -> Layout:
    """The windows that the server makes of clips of the layout's length; all overlaps are equal then."""
    frames, overlap = geometry.window_frames(window_length_in_s or geometry.native_audio_length_in_s)
    seconds = geometry.vae_scale_factor * geometry.frame_length_in_s
    return Layout(round(frames * seconds, 6), round(overlap * seconds, 6), count)
