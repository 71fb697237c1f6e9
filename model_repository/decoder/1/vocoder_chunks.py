"""Plans the vocoder's chunks: which part of a mel spectrogram to give it for which part of its waveform.

The vocoder is a stack of convolutions, so a sample depends only on the frames near it. A mel spectrogram is cut into
windows of equal length that overlap by as much as a sample can depend on. Each window's waveform is then exact except
near its ends, which are dropped. At the ends of the clip nothing is added, because there the vocoder pads by itself, as
it does for the whole.
"""

from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Final

CHUNK_FRAMES: Final = 256
"""The most frames of a window besides its overlap; 2.56 s at 10 ms per frame."""


@dataclass(frozen=True)
class VocoderReach:
    """The number of samples that a vocoder makes of one mel frame, and its receptive field."""

    samples_per_frame: int
    extra_samples: int  # what F frames give beyond F * samples_per_frame
    overlap_frames: int  # how many frames before or after its own a sample can depend on

    @property
    def max_missing_samples(self) -> int:
        """How many samples the whole frames of a length can fall short of it: one frame, and what its ends lack."""
        return self.samples_per_frame + max(0, -self.extra_samples)

    def num_samples(self, num_frames: int) -> int:
        return num_frames * self.samples_per_frame + self.extra_samples


@dataclass(frozen=True)
class VocoderChunk:
    """One window of a mel spectrogram, and which samples of its waveform belong to the clip."""

    first_frame: int
    end_frame: int
    first_sample: int  # counted from the window's first sample
    end_sample: int

    @property
    def num_samples(self) -> int:
        return self.end_sample - self.first_sample


def vocoder_reach(vocoder: Any) -> VocoderReach:
    """Derives the reach from the layers of a `SpeechT5HifiGan`, from the samples of one frame back to its inputs."""
    resblocks = max(_resblock_radius(block) for block in vocoder.resblocks)
    samples_per_frame = prod(layer.stride[0] for layer in vocoder.upsampler)
    first, last = _widened(0, samples_per_frame - 1, vocoder.conv_post)
    for layer in reversed(vocoder.upsampler):
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        # Sample i of a transposed convolution's input reaches its outputs i * stride - padding + (0 to kernel - 1).
        first = ceil((first - resblocks + padding - kernel + 1) / stride)
        last = (last + resblocks + padding) // stride
    first, last = _widened(first, last, vocoder.conv_pre)
    extra = 0
    for layer in vocoder.upsampler:
        extra = extra * layer.stride[0] + layer.kernel_size[0] - layer.stride[0] - 2 * layer.padding[0]
    return VocoderReach(samples_per_frame, extra, max(-first, last))


def plan_chunks(
    reach: VocoderReach, num_frames: int, chunk_frames: int = CHUNK_FRAMES, full_windows: bool = False
) -> tuple[VocoderChunk, ...]:
    """Plans the chunks of a clip, in order; together they have `reach.num_samples(num_frames)` samples.

    All windows of a clip have the same length, at most `chunk_frames` plus the overlap on both sides, so that they can
    share a call. A clip no longer than that is one chunk.

    Args:
        full_windows: whether several windows all have the full length, so that a vocoder compiled for it serves every
            clip; otherwise they are as short as their number allows.
    """
    overlap, per_frame = reach.overlap_frames, reach.samples_per_frame
    count = max(1, ceil((num_frames - 2 * overlap) / chunk_frames))
    if count == 1:
        return (VocoderChunk(0, num_frames, 0, reach.num_samples(num_frames)),)
    advance = chunk_frames if full_windows else ceil((num_frames - 2 * overlap) / count)
    window = advance + 2 * overlap
    chunks = []
    for index in range(count):
        # The last window ends with the clip: it overlaps by more.
        start = min(index * advance, num_frames - window)
        kept_from = index * advance + overlap if index else 0
        kept_to = (index + 1) * advance + overlap
        end_sample = (kept_to - start) * per_frame if index < count - 1 else reach.num_samples(window)
        chunks.append(VocoderChunk(start, start + window, (kept_from - start) * per_frame, end_sample))
    return tuple(chunks)


def _resblock_radius(block: Any) -> int:
    return sum(_radius(layer) for layer in (*block.convs1, *block.convs2))


def _widened(first: int, last: int, layer: Any) -> tuple[int, int]:
    return first - _radius(layer), last + _radius(layer)


def _radius(layer: Any) -> int:
    """Returns how far a convolution that keeps the length looks to either side."""
    return int(layer.dilation[0] * (layer.kernel_size[0] - 1) // 2)
