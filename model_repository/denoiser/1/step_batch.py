"""One denoising step of a whole batch: one UNet forward, and one update for any mix of schedules and guidance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from denoising_request import TextStates
from length_masks import LengthMasks
from schedule_table import WINDOW, ScheduleTable


class UNet(Protocol):
    """What a step needs of a UNet on its device."""

    def masks(self, valid_frames: Sequence[int], frames: int) -> LengthMasks:
        """Masks for batch items of these latent frames, padded to `frames`."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_1: Tensor,
        encoder_attention_mask_1: Tensor,
        masks: LengthMasks | None,
    ) -> Tensor:
        """The model output of a batch, masked where its items have lengths of their own."""


T5_BUCKET: Final = 16
"""T5 states are padded to a multiple of this, so that few shapes occur."""


@dataclass
class WaveformState:
    """One waveform between two steps."""

    positive: TextStates
    negative: TextStates | None
    guidance_scale: float
    table: ScheduleTable
    history: Tensor  # [WINDOW, 2, C, H or more, W] float32: (sample, model output) of this evaluation, the last, ...
    frames: int  # H, the latent frames that are its own; what a longer neighbour adds behind them is padding
    evaluation: int = 0  # how many are done
    last_step: float = 0.0  # when, by time.perf_counter(); lengths that cannot share a forward take turns by it

    @property
    def latents(self) -> Tensor:
        return self.history[0, 0, :, : self.frames]

    @property
    def finished(self) -> bool:
        return self.evaluation == self.table.num_evaluations

    @property
    def unet_items(self) -> int:
        return 1 if self.negative is None else 2


def start_waveform(
    positive: TextStates, negative: TextStates | None, guidance_scale: float, table: ScheduleTable, noise: Tensor
) -> WaveformState:
    """A waveform before its first step, from noise [C, H, W] of unit variance on the engine's device."""
    history = noise.new_zeros(WINDOW, 2, *noise.shape, dtype=torch.float32)
    history[0, 0] = noise * table.init_noise_sigma
    return WaveformState(positive, negative, guidance_scale, table, history, noise.shape[1])


@dataclass(frozen=True)
class StepBatch:
    """R waveforms stacked for stepping together, all on one device; `U` UNet batch items, `E` evaluations at most.

    Items 0 to R - 1 are the waveforms with their prompts; behind them come those with guidance once more, with their
    negative prompts.
    """

    history: Tensor  # [R, WINDOW, 2, C, H, W] float32
    evaluation: Tensor  # [R] int64
    timesteps: Tensor  # [R, E] float32
    input_scales: Tensor  # [R, E] float32
    coefficients: Tensor  # [R, E, WINDOW, 2] float32
    guidance_scale: Tensor  # [R] float32
    row_of_item: Tensor  # [U] int64
    negative_item: Tensor  # [R] int64; its own item where a row has no guidance
    encoder_hidden_states: Tensor  # [U, T, D0] in the UNet's dtype
    encoder_hidden_states_1: Tensor  # [U, L, D1] in the UNet's dtype
    encoder_attention_mask_1: Tensor  # [U, L] in the UNet's dtype
    masks: LengthMasks | None  # where the lengths differ


def stack_waveforms(
    unet: UNet, waveforms: Sequence[WaveformState], device: torch.device, dtype: torch.dtype
) -> StepBatch:
    """Stacks waveforms, padded to the longest; those of equal length need no masks."""
    guided = [row for row, waveform in enumerate(waveforms) if waveform.negative is not None]
    negative_item = list(range(len(waveforms)))
    for item, row in enumerate(guided, start=len(waveforms)):
        negative_item[row] = item
    texts = [waveform.positive for waveform in waveforms]
    texts += [waveform.negative for waveform in waveforms if waveform.negative is not None]
    tables = [waveform.table for waveform in waveforms]
    frames = [waveform.frames for waveform in waveforms]
    longest = max(frames)
    masks = None
    if min(frames) < longest:
        masks = unet.masks([*frames, *(frames[row] for row in guided)], longest)
    evaluations = max(table.num_evaluations for table in tables)
    t5_length = max(len(text.prompt_embeds) for text in texts)
    t5_length += -t5_length % T5_BUCKET

    def on_device(rows: Sequence[Tensor], to: torch.dtype) -> Tensor:
        return torch.stack(list(rows)).to(device, to, non_blocking=True)

    return StepBatch(
        history=torch.stack([_fit_frames(waveform, longest) for waveform in waveforms]),
        evaluation=torch.tensor([waveform.evaluation for waveform in waveforms], device=device),
        timesteps=on_device([_pad(table.timesteps, evaluations) for table in tables], torch.float32),
        input_scales=on_device([_pad(table.input_scales, evaluations) for table in tables], torch.float32),
        coefficients=on_device([_pad(table.coefficients, evaluations) for table in tables], torch.float32),
        guidance_scale=torch.tensor([waveform.guidance_scale for waveform in waveforms], device=device),
        row_of_item=torch.tensor([*range(len(waveforms)), *guided], device=device),
        negative_item=torch.tensor(negative_item, device=device),
        encoder_hidden_states=on_device([text.generated_prompt_embeds for text in texts], dtype),
        encoder_hidden_states_1=on_device([_pad(text.prompt_embeds, t5_length) for text in texts], dtype),
        encoder_attention_mask_1=on_device([_pad(text.attention_mask, t5_length) for text in texts], dtype),
        masks=masks,
    )


def _fit_frames(waveform: WaveformState, frames: int) -> Tensor:
    own = waveform.history[..., : waveform.frames, :]
    return functional.pad(own, (0, 0, 0, frames - waveform.frames))


def _pad(tensor: Tensor, length: int) -> Tensor:
    """Zeros behind the first axis, up to `length`."""
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, length - len(tensor)])


def unstack_waveforms(batch: StepBatch, waveforms: Sequence[WaveformState]) -> None:
    """Gives each waveform its history back, so that it can be stacked with others."""
    for waveform, history in zip(waveforms, batch.history.unbind(), strict=True):
        waveform.history = history


def advance(unet: UNet, batch: StepBatch) -> StepBatch:
    """The batch after one step of every row. No synchronisation with the host, no work per row in Python."""
    rows = len(batch.history)
    now = batch.evaluation
    row = torch.arange(rows, device=now.device)
    sample = batch.history[:, 0, 0]
    model_input = sample * _per_row(batch.input_scales[row, now])
    output = unet.forward(
        model_input[batch.row_of_item].to(batch.encoder_hidden_states.dtype),
        batch.timesteps[row, now][batch.row_of_item],
        batch.encoder_hidden_states,
        batch.encoder_hidden_states_1,
        batch.encoder_attention_mask_1,
        batch.masks,
    ).float()
    negative = output[batch.negative_item]
    guided = negative + _per_row(batch.guidance_scale) * (output[:rows] - negative)
    window = torch.cat([torch.stack([sample, guided], dim=1)[:, None], batch.history[:, 1:]], dim=1)
    following = torch.einsum("rwk,rwkchv->rchv", batch.coefficients[row, now], window)
    history = torch.cat([torch.stack([following, torch.zeros_like(following)], dim=1)[:, None], window[:, :-1]], dim=1)
    return replace(batch, history=history, evaluation=now + 1)


def _per_row(values: Tensor) -> Tensor:
    return values[:, None, None, None]
