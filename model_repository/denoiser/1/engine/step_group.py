"""Waveforms that take their steps together: in one forward, or in several where their windows do not fit in one."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from stepping.step_batch import StepBatch, UNet, step, unstack_waveforms
from stepping.waveform import WaveformState
from stepping.windows import blend_windows, cut_windows

Stack = Callable[[Sequence[WaveformState]], StepBatch]
"""The batch of one forward of these rows."""


class StepGroup:
    """Takes the steps of its waveforms together. What their histories hold is current only after `unstack`.

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
        # The batch of several forwards would grow with the length, so theirs are made when they are due.
        self._batch = stack(self._rows) if len(self._forwards) == 1 else None

    @property
    def amid_step(self) -> bool:
        """Whether some of its windows have made the step under way and others not: then it must stay as it is."""
        return self._next > 0

    @property
    def last_step(self) -> float:
        """When the waveform that has waited longest took its last step."""
        return min(waveform.last_step for waveform in self.waveforms)

    def advance(self, unet: UNet) -> int:
        """One forward. Returns its UNet batch items."""
        if self._batch is not None:
            self._batch = step(unet, self._batch)
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
        """Gives each waveform its history back, unless it is amid a step, so that it can be grouped with others."""
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
    """A row for each window, in order, and the waveform itself where it has none."""
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
    """The rows of as many forwards as it takes with at most `room` UNet batch items in each."""
    forwards: list[list[WaveformState]] = []
    left = 0
    for row in rows:
        left -= row.step_items
        if left < 0 or not forwards:
            forwards.append([])
            left = room - row.step_items
        forwards[-1].append(row)
    return forwards
