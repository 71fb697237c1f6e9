"""One waveform on its way through its schedule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepping.request import TextStates
from stepping.schedule_table import HISTORY, ScheduleTable
from stepping.windows import Windows


@dataclass(eq=False)
class WaveformState:
    """One waveform between two steps; equal to none but itself."""

    positive: TextStates
    negative: TextStates | None
    guidance_scale: float
    table: ScheduleTable
    history: Tensor  # [HISTORY, 2, C, H or more, W] float32: (sample, model output) of this evaluation, the last, ...
    frames: int  # H, the latent frames that are its own; what a longer neighbour adds behind them is padding
    guided: range  # the evaluations that have guidance, where there is a negative prompt
    evaluation: int = 0  # how many are done
    last_step: float = 0.0  # or its entry, by time.perf_counter(); lengths that cannot share a forward take turns by it
    windows: Windows | None = None  # where its windows are the rows of the forwards, and not the whole
    held_windows: int = 1  # how many of them share a forward at most

    @property
    def latents(self) -> Tensor:
        return self.history[0, 0, :, : self.frames]

    @property
    def finished(self) -> bool:
        return self.evaluation == self.table.num_evaluations

    @property
    def unet_items(self) -> int:
        """UNet batch items that it takes in a forward at most."""
        return self.held_windows * (1 if self.negative is None else 2)

    @property
    def step_items(self) -> int:
        """UNet batch items of its next evaluation, those of all its windows."""
        return (1 if self.windows is None else len(self.windows.starts)) * (1 if self.guidance is None else 2)

    @property
    def row_frames(self) -> int:
        """Latent frames of each of its rows in a forward."""
        return self.frames if self.windows is None else self.windows.frames

    @property
    def in_turns(self) -> bool:
        """Returns whether its windows take several forwards a step."""
        return self.windows is not None and self.held_windows < len(self.windows.starts)

    @property
    def guidance(self) -> TextStates | None:
        """The negative prompt's states, where the next evaluation has guidance."""
        return self.negative if self.evaluation in self.guided else None


def start_waveform(
    positive: TextStates,
    negative: TextStates | None,
    guidance_scale: float,
    table: ScheduleTable,
    noise: Tensor,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    windows: Windows | None = None,
    held_windows: int = 1,
) -> WaveformState:
    """A waveform before its first step, from noise [C, H, W] of unit variance.

    Args:
        guidance_interval: from and to which share of the evaluations there is guidance.
        windows: of the waveform, where it is denoised in windows.
        held_windows: how many of them share a forward at most.
    """
    history = noise.new_zeros(HISTORY, 2, *noise.shape, dtype=torch.float32)
    history[0, 0] = noise * table.init_noise_sigma
    guided = range(*(round(share * table.num_evaluations) for share in guidance_interval))
    frames = noise.shape[1]
    return WaveformState(
        *(positive, negative, guidance_scale, table, history, frames, guided),
        windows=windows,
        held_windows=held_windows,
    )
