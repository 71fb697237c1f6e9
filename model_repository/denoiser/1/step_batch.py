"""One denoising step of a whole batch: one UNet forward, and one update for any mix of schedules and guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from denoising_request import TextStates
from schedule_table import WINDOW, ScheduleTable

UNetForward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sample, timestep, encoder_hidden_states, encoder_hidden_states_1, encoder_attention_mask_1) to model output."""

T5_BUCKET: Final = 16
"""T5 states are padded to a multiple of this, so that few shapes occur."""


@dataclass
class WaveformState:
    """One waveform between two steps."""

    positive: TextStates
    negative: TextStates | None
    guidance_scale: float
    table: ScheduleTable
    history: Tensor  # [WINDOW, 2, C, H, W] float32: (sample, model output) of this evaluation, the last, ...
    evaluation: int = 0  # how many are done

    @property
    def latents(self) -> Tensor:
        return self.history[0, 0]

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
    return WaveformState(positive, negative, guidance_scale, table, history)


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


def stack_waveforms(waveforms: Sequence[WaveformState], device: torch.device, dtype: torch.dtype) -> StepBatch:
    """Stacks waveforms of equal latent shape."""
    guided = [row for row, waveform in enumerate(waveforms) if waveform.negative is not None]
    negative_item = list(range(len(waveforms)))
    for item, row in enumerate(guided, start=len(waveforms)):
        negative_item[row] = item
    texts = [waveform.positive for waveform in waveforms]
    texts += [waveform.negative for waveform in waveforms if waveform.negative is not None]
    tables = [waveform.table for waveform in waveforms]
    evaluations = max(table.num_evaluations for table in tables)
    t5_length = max(len(text.prompt_embeds) for text in texts)
    t5_length += -t5_length % T5_BUCKET

    def on_device(rows: Sequence[Tensor], to: torch.dtype) -> Tensor:
        return torch.stack(list(rows)).to(device, to, non_blocking=True)

    return StepBatch(
        history=torch.stack([waveform.history for waveform in waveforms]),
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
    )


def _pad(tensor: Tensor, length: int) -> Tensor:
    """Zeros behind the first axis, up to `length`."""
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, length - len(tensor)])


def unstack_waveforms(batch: StepBatch, waveforms: Sequence[WaveformState]) -> None:
    """Gives each waveform its history back, so that it can be stacked with others."""
    for waveform, history in zip(waveforms, batch.history.unbind(), strict=True):
        waveform.history = history


def advance(unet: UNetForward, batch: StepBatch) -> StepBatch:
    """The batch after one step of every row. No synchronisation with the host, no work per row in Python."""
    rows = len(batch.history)
    now = batch.evaluation
    row = torch.arange(rows, device=now.device)
    sample = batch.history[:, 0, 0]
    model_input = sample * _per_row(batch.input_scales[row, now])
    output = unet(
        model_input[batch.row_of_item].to(batch.encoder_hidden_states.dtype),
        batch.timesteps[row, now][batch.row_of_item],
        batch.encoder_hidden_states,
        batch.encoder_hidden_states_1,
        batch.encoder_attention_mask_1,
    ).float()
    negative = output[batch.negative_item]
    guided = negative + _per_row(batch.guidance_scale) * (output[:rows] - negative)
    window = torch.cat([torch.stack([sample, guided], dim=1)[:, None], batch.history[:, 1:]], dim=1)
    following = torch.einsum("rwk,rwkchv->rchv", batch.coefficients[row, now], window)
    history = torch.cat([torch.stack([following, torch.zeros_like(following)], dim=1)[:, None], window[:, :-1]], dim=1)
    return replace(batch, history=history, evaluation=now + 1)


def _per_row(values: Tensor) -> Tensor:
    return values[:, None, None, None]
