"""The groups in which the waveforms in flight step."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from audioldm2_triton.server import faults
from audioldm2_triton.server.memory import release_memory
from engine.policy import Group, InFlight, next_group, plan_groups
from engine.step_group import StepGroup
from stepping.forward_plan import Bucket, ForwardCosts
from stepping.step_batch import StepBatch, UNet, stack_waveforms
from stepping.waveform import WaveformState

logger = logging.getLogger(__name__)


class StepGroups:
    """Keeps the groups of one device, and picks whose turn it is. For the engine's thread alone, except `stale`."""

    def __init__(self, unet: UNet, device: torch.device, dtype: torch.dtype) -> None:
        self.costs: ForwardCosts | None = None  # until the UNet is warm
        self.stale = False  # the groups no longer hold exactly the waveforms in flight
        self.room: int | None = None  # latent frames of the items of a forward, if larger ones did not fit
        self._unet = unet
        self._device = device
        self._dtype = dtype
        self._groups: list[StepGroup] = []
        self._current: tuple[StepGroup, int | None] | None = None  # whose turn it is, and its steps before

    def next(self) -> StepGroup | None:
        """Returns the group whose turn it is: lengths that cannot share a forward take turns."""
        if not self._groups:
            return None
        group = self._groups[next_group([group.last_step for group in self._groups])]
        self._current = group, group.steps_taken
        return group

    def regroup(self, request_of: Mapping[WaveformState, int]) -> None:
        """Regroups after a waveform entered or left.

        Args:
            request_of: each waveform in flight with a number of its request.
        """
        self._current = None
        for group in self._groups:
            group.unstack()
        kept = [group for group in self._groups if group.amid_step and group.waveforms[0] in request_of]
        amid_step = {waveform for group in kept for waveform in group.waveforms}
        for waveform in self.waveforms - amid_step - request_of.keys():
            if not waveform.finished:
                waveform.history = waveform.history.clone()  # paused: it must not keep its whole batch
        self._groups = []
        # Unstack all groups first: until it is stacked again, a waveform's history is a part of its old batch.
        for waveform in request_of:
            waveform.history = faults.at("denoiser.regroup", waveform.history.to(self._device, non_blocking=True))
        waveforms = [waveform for waveform in request_of if waveform not in amid_step]
        plain = [InFlight(request_of[w], w.step_items, w.row_frames, w.in_turns) for w in waveforms]
        assert self.costs is not None
        planned = plan_groups(plain, self.costs, self.room)
        self._groups = kept + [self._group([waveforms[index] for index in group.indices], group) for group in planned]
        self.stale = False

    def halve(self, waveforms: Sequence[WaveformState], error: BaseException) -> bool:
        """Has the next forwards be at most half as large as that of these waveforms, for which memory lacked.

        Returns whether they can be smaller, and all waveforms still are as they were before it.

        Args:
            error: that the forward raised; what it keeps is released.
        """
        release_memory(error)
        if self._current is not None:
            group, before = self._current
            if before is None or group.steps_taken != before:
                return False
        sizes = [waveform.step_items * waveform.row_frames for waveform in waveforms]
        if len(sizes) < 2 or (self.room is not None and self.room <= min(sizes)):
            return False
        half = sum(sizes) // 2
        self.room = half if self.room is None else min(half, self.room // 2)
        self.stale = True
        logger.warning("denoiser: a forward was out of memory (%s); trying smaller ones", error)
        return True

    @property
    def waveforms(self) -> set[WaveformState]:
        """Those that were in flight when it was regrouped last."""
        return {waveform for group in self._groups for waveform in group.waveforms}

    @property
    def amid_step(self) -> set[WaveformState]:
        return {waveform for group in self._groups if group.amid_step for waveform in group.waveforms}

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
