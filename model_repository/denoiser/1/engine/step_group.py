"""Waveforms that step together: in one forward, or in several if their windows do not fit in one."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from stepping.step_batch import StepBatch, UNet, step, unstack_waveforms
from stepping.waveform import WaveformState
from stepping.windows import blend_windows, cut_windows

Stack = Callable[[Sequence[WaveformState]], StepBatch]
"""The rows of one forward, and their batch."""


class StepGroup:
    """Runs the steps of its waveforms together. Their histories are current only after `unstack`.

    Args:
        waveforms: with their histories on the device; those with windows take one row for each.
        stack: makes the batch of a forward.
    """

    def __init__(self, waveforms: Sequence[WaveformState], stack: Stack) -> None:
        self.waveforms = list(waveforms)
        self._stack = stack
        self._room = sum(waveform.unet_items for waveform in waveforms)
        self._rows = _cut_rows(waveforms)
        self._forwards = _split(self._rows, self._room)
        self._next = 0
        self._steps = 0
        # The batches of several forwards would grow with the length, so each is made when it is due.
        self._batch = stack(self._rows) if len(self._forwards) == 1 else None

    @property
    def amid_step(self) -> bool:
        """Returns whether only some of its windows have made the current step: then it must not be regrouped."""
        return self._next > 0

    @property
    def last_step(self) -> float:
        """The time at which the waveform that has waited longest took its last step, or entered."""
        return min(waveform.last_step for waveform in self.waveforms)

    @property
    def steps_taken(self) -> int | None:
        """The number of steps since it was grouped; None with several forwards a step."""
        return None if self._batch is None else self._steps

    def advance(self, unet: UNet) -> int:
        """Runs one forward. Returns the number of its UNet batch items."""
        if self._batch is not None:
            self._batch = step(unet, self._batch)
            self._steps += 1
            self._blend_batch(self._batch)
            return self._batch.items
        if self._next == 0:
            self._rows = _cut_rows(self.waveforms)
            self._forwards = _split(self._rows, self._room)
        rows = self._forwards[self._next]
        batch = step(unet, self._stack(rows))
        unstack_waveforms(batch, rows)
        self._next = (self._next + 1) % len(self._forwards)
        if self._next == 0:
            self._join_rows()
        return batch.items

    def unstack(self) -> None:
        """Gives each waveform its history back, so that it can join other groups. Does nothing amid a step."""
        if self._batch is not None:
            unstack_waveforms(self._batch, self._rows)
            self._join_rows()

    def _blend_batch(self, batch: StepBatch) -> None:
        first = 0
        for waveform in self.waveforms:
            if waveform.windows is None:
                first += 1
                continue
            stop = first + len(waveform.windows.starts)
            parts = batch.history[first:stop, ..., : waveform.windows.frames, :]
            parts.copy_(cut_windows(blend_windows(parts, waveform.windows), waveform.windows))
            first = stop

    def _join_rows(self) -> None:
        rows = iter(self._rows)
        for waveform in self.waveforms:
            if waveform.windows is None:
                next(rows)  # the waveform itself
                continue
            length = waveform.windows.frames
            parts = torch.stack([next(rows).history[..., :length, :] for _ in waveform.windows.starts])
            waveform.history = blend_windows(parts, waveform.windows)


def _cut_rows(waveforms: Sequence[WaveformState]) -> list[WaveformState]:
    """Returns a row for each window, in order, or one for a waveform without windows."""
    rows = []
    for waveform in waveforms:
        if waveform.windows is None:
            rows.append(waveform)
            continue
        for history in cut_windows(waveform.history, waveform.windows):
            row = replace(waveform, history=history, frames=waveform.windows.frames, windows=None, held_windows=1)
            rows.append(row)
    return rows


def _split(rows: Sequence[WaveformState], room: int) -> list[list[WaveformState]]:
    """Splits rows into forwards of at most `room` UNet batch items."""
    forwards: list[list[WaveformState]] = []
    left = 0
    for row in rows:
        left -= row.step_items
        if left < 0 or not forwards:
            forwards.append([])
            left = room - row.step_items
        forwards[-1].append(row)
    return forwards
