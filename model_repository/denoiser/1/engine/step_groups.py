"""The groups in which the waveforms in flight step."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from audioldm2_triton.server import faults
from engine.policy import Group, InFlight, next_group, plan_groups
from engine.step_group import StepGroup
from stepping.forward_plan import Bucket, ForwardCosts
from stepping.step_batch import StepBatch, UNet, stack_waveforms
from stepping.waveform import WaveformState


class StepGroups:
    """Keeps the groups of one device, and picks whose turn it is. For the engine's thread alone, except `stale`."""

    def __init__(self, unet: UNet, device: torch.device, dtype: torch.dtype) -> None:
        self.costs: ForwardCosts | None = None  # until the UNet is warm
        self.stale = False  # the groups no longer hold exactly the waveforms in flight
        self._unet = unet
        self._device = device
        self._dtype = dtype
        self._groups: list[StepGroup] = []

    def next(self) -> StepGroup | None:
        """Returns the group whose turn it is: lengths that cannot share a forward take turns."""
        if not self._groups:
            return None
        return self._groups[next_group([group.last_step for group in self._groups])]

    def regroup(self, request_of: Mapping[WaveformState, int]) -> None:
        """Regroups after a waveform entered or left.

        Args:
            request_of: each waveform in flight with a number of its request.
        """
        for group in self._groups:
            group.unstack()
        kept = [group for group in self._groups if group.amid_step and group.waveforms[0] in request_of]
        amid_step = {waveform for group in kept for waveform in group.waveforms}
        self._groups = []
        # Unstack all groups first: until it is stacked again, a waveform's history is a part of its old batch.
        for waveform in request_of:
            waveform.history = faults.at("denoiser.regroup", waveform.history.to(self._device, non_blocking=True))
        waveforms = [waveform for waveform in request_of if waveform not in amid_step]
        plain = [InFlight(request_of[w], w.step_items, w.row_frames, w.in_turns) for w in waveforms]
        assert self.costs is not None
        planned = plan_groups(plain, self.costs)
        self._groups = kept + [self._group([waveforms[index] for index in group.indices], group) for group in planned]
        self.stale = False

    def clear(self) -> None:
        """Drops the groups without unstacking; the current histories of their waveforms are lost."""
        self._groups = []

    def _group(self, waveforms: Sequence[WaveformState], planned: Group) -> StepGroup:
        stack = self._stack_cheapest if planned.in_turns else partial(self._stack, bucket=planned.bucket)
        return StepGroup(waveforms, stack)

    def _stack(self, rows: Sequence[WaveformState], bucket: Bucket | None) -> StepBatch:
        return stack_waveforms(self._unet, rows, self._device, self._dtype, bucket)

    def _stack_cheapest(self, rows: Sequence[WaveformState]) -> StepBatch:
        """Stacks the rows of one of several forwards a step, in the cheapest bucket."""
        assert self.costs is not None
        lengths = {row.frames for row in rows}
        items = sum(row.step_items for row in rows)
        return self._stack(rows, self.costs.cheapest(items, max(lengths), len(lengths) > 1)[1])
