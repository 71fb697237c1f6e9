"""Long latents in overlapping windows whose noise predictions are blended at every step (MultiDiffusion).

A window is a row of a forward like any other: it has its own slice of the waveform's history and takes the same step.
After the step the windows are blended into the whole, and cut from it anew. A schedule's update is linear in the
samples and the model outputs, and the weights of a frame add up to 1. So blending the updated windows is the same as
updating the whole with the blended noise prediction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windowing:
    """The lengths of a waveform's windows, in latent frames."""

    frames: int  # of a window
    overlap: int  # of two neighbours; the last two overlap by more where the length asks for it

    def starts(self, total_frames: int) -> tuple[int, ...]:
        """The first frame of each window; the last window ends with the waveform."""
        last = total_frames - self.frames
        if last <= 0:
            return (0,)
        return (*range(0, last, self.frames - self.overlap), last)


@dataclass(frozen=True)
class Windows:
    """The `P` windows of `L` frames that cover the `H` frames of a waveform, with at most `K` over one frame."""

    starts: tuple[int, ...]  # P
    frames: int  # L
    positions: Tensor  # [P * L] int64, the waveform's frame at each frame of each window
    sources: Tensor  # [K, H] int64, where each frame is found among the P * L frames of the windows
    weights: Tensor  # [K, H] float32, what each of these counts; 0 where fewer windows cover a frame


def plan_windows(windowing: Windowing, total_frames: int, device: torch.device) -> Windows:
    """Plans the windows of a waveform that is longer than one of them.

    The weight of a window rises over the overlap as half a period of a squared sine, and falls likewise at its end. At
    every frame the weights are divided by their sum, so that a frame in only one window has exactly the weight 1.
    """
    starts, length = windowing.starts(total_frames), windowing.frames
    rising = torch.ones(length, dtype=torch.float64)
    if windowing.overlap:
        steps = (torch.arange(windowing.overlap, dtype=torch.float64) + 0.5) / windowing.overlap
        rising[: windowing.overlap] = torch.sin(steps * torch.pi / 2) ** 2
    weight = torch.minimum(rising, rising.flip(0))
    positions = torch.cat([torch.arange(start, start + length) for start in starts])
    covering: list[list[int]] = [[] for _ in range(total_frames)]
    for source, position in enumerate(positions.tolist()):
        covering[position].append(source)
    most = max(map(len, covering))
    # If fewer windows cover a frame, the first one stands in for the missing ones, with the weight 0.
    sources = torch.tensor([[*found, *found[:1] * (most - len(found))] for found in covering]).T
    counts = torch.tensor([len(found) for found in covering])
    weights = weight.repeat(len(starts))[sources] * (torch.arange(most)[:, None] < counts)
    weights /= weights.sum(dim=0)
    return Windows(starts, length, positions.to(device), sources.to(device), weights.to(device, torch.float32))


def cut_windows(whole: Tensor, windows: Windows) -> Tensor:
    """Cuts a waveform's tensor [..., H, W] into its windows [P, ..., L, W]."""
    cut = whole[..., windows.positions, :].unflatten(-2, (len(windows.starts), windows.frames))
    return cut.movedim(-3, 0)


def blend_windows(parts: Tensor, windows: Windows) -> Tensor:
    """Blends windows [P, ..., L, W] into the whole [..., H, W]; each frame is a weighted sum of the windows over it."""
    flat = parts.movedim(0, -3).flatten(-3, -2)
    # Window by window instead of an unordered sum, so that the same windows give the same bits.
    terms = [
        flat[..., source, :] * weight[:, None] for source, weight in zip(windows.sources, windows.weights, strict=True)
    ]
    return sum(terms[1:], terms[0])
