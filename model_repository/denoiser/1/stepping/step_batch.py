"""One denoising step of a whole batch: one UNet forward, and one update for any mix of schedules and guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from stepping.forward_plan import Bucket
from stepping.schedule_table import ScheduleTable
from stepping.waveform import WaveformState
from unet.layers import TextKeys
from unet.length_masks import LengthMasks

T = TypeVar("T")


class UNet(Protocol):
    """The parts of a UNet that a step uses, on its device."""

    def masks(self, valid_frames: Sequence[int], frames: int) -> LengthMasks:
        """Masks for batch items of these latent frames, padded to `frames`."""

    def text_keys(
        self, encoder_hidden_states: Tensor, encoder_hidden_states_1: Tensor, encoder_attention_mask_1: Tensor
    ) -> TextKeys:
        """Computes what the UNet needs of the texts of a batch."""

    def time_biases(self, table: ScheduleTable) -> Tensor:
        """Computes what the UNet needs of the timesteps of a schedule [E, K]."""

    def denoise(self, inputs: "StepInputs", bucket: Bucket | None) -> Tensor:
        """The history after one step: `denoise` of this module, compiled where there is a bucket."""


T5_BUCKET: Final = 16
"""T5 states are padded to a multiple of this, so that few shapes occur."""
COMPILED_T5_LENGTH: Final = 64
"""To this in compiled code; a batch with a longer text runs uncompiled."""


@dataclass(frozen=True)
class StepInputs:
    """The input of one step of R waveforms in `U` UNet batch items, all on one device.

    Items 0 to R - 1 are the waveforms with their prompts; behind them come those with guidance once more, with their
    negative prompts.
    """

    history: Tensor  # [R, HISTORY, 2, C, H, W] float32
    input_scale: Tensor  # [R] float32
    coefficients: Tensor  # [R, HISTORY, 2] of `update_dtype`
    time_biases: Tensor  # [U, K] in the UNet's dtype
    guidance_scale: Tensor  # [R] float32
    row_of_item: Tensor  # [U] int64
    negative_item: Tensor  # [R] int64; its own item where a row has no guidance
    text: TextKeys  # of the items
    masks: LengthMasks | None  # of the items, where the lengths differ


@dataclass(frozen=True)
class StepBatch:
    """R waveforms stacked for stepping together, all on one device; `E` evaluations at most.

    With a bucket, rows and items are padded to the bucket's size; the padding entries belong to no waveform.
    """

    items: int  # UNet batch items that stand for a waveform
    bucket: Bucket | None
    history: Tensor  # [R, HISTORY, 2, C, H, W] float32
    evaluation: Tensor  # [R] int64
    input_scales: Tensor  # [R, E] float32
    coefficients: Tensor  # [R, E, HISTORY, 2] of `update_dtype`
    time_biases: Tensor  # [evaluations of all distinct schedules, K] in the UNet's dtype
    first_bias: Tensor  # [R] int64, where each row's schedule begins in `time_biases`
    guidance_scale: Tensor  # [R] float32
    row_of_item: Tensor  # [U] int64
    negative_item: Tensor  # [R] int64
    text: TextKeys
    masks: LengthMasks | None


def update_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of the schedules' update.

    A coefficient rounded to float32 is off by the same amount at every step, in all latents, which adds up to twice the
    reference's own rounding. On a CPU float64 costs little compared with the UNet. A GPU, which computes the UNet in
    half precision, does not need it.
    """
    return torch.float64 if device.type == "cpu" else torch.float32


def stack_waveforms(
    unet: UNet,
    waveforms: Sequence[WaveformState],
    device: torch.device,
    dtype: torch.dtype,
    bucket: Bucket | None = None,
) -> StepBatch:
    """Stacks waveforms, padded to the longest or to the bucket; those of equal length need no masks."""
    guided = [row for row, waveform in enumerate(waveforms) if waveform.guidance is not None]
    texts = [waveform.positive for waveform in waveforms]
    texts += [waveform.guidance for waveform in waveforms if waveform.guidance is not None]
    items = len(texts)
    t5_length = max(len(text.prompt_embeds) for text in texts)
    t5_length += -t5_length % T5_BUCKET
    if t5_length > COMPILED_T5_LENGTH:
        bucket = None
    # Compiled code has as many rows as items: one shape for any mixture of guidance.
    rows, padded_items = (bucket.items, bucket.items) if bucket else (len(waveforms), items)
    t5_length = COMPILED_T5_LENGTH if bucket else t5_length
    row_of_item = [*range(len(waveforms)), *guided]
    negative_item = list(range(rows))
    for item, row in enumerate(guided, start=len(waveforms)):
        negative_item[row] = item
    valid_frames = [waveforms[row].frames for row in row_of_item]
    frames = bucket.frames if bucket else max(valid_frames)
    masks = None
    if min(valid_frames) < frames:
        masks = unet.masks(_filled(valid_frames, padded_items, frames), frames)
    tables = [waveform.table for waveform in waveforms]
    evaluations = max(table.num_evaluations for table in tables)
    first_bias, time_biases = _stack_time_biases(unet, tables)

    def on_device(parts: Sequence[Tensor], count: int, to: torch.dtype) -> Tensor:
        return _pad(torch.stack(list(parts)), count).to(device, to, non_blocking=True)

    def numbers(values: Sequence[float], count: int, filling: float = 0) -> Tensor:
        return torch.tensor(_filled(values, count, filling), device=device)

    return StepBatch(
        items=items,
        bucket=bucket,
        history=_pad(torch.stack([_fit_frames(waveform, frames) for waveform in waveforms]), rows),
        evaluation=numbers([waveform.evaluation for waveform in waveforms], rows),
        input_scales=on_device([_pad(table.input_scales, evaluations) for table in tables], rows, torch.float32),
        coefficients=on_device([_pad(table.coefficients, evaluations) for table in tables], rows, update_dtype(device)),
        time_biases=time_biases,
        first_bias=numbers(first_bias, rows),
        guidance_scale=numbers([waveform.guidance_scale for waveform in waveforms], rows, 1.0),
        row_of_item=numbers(row_of_item, padded_items),
        negative_item=numbers(negative_item, rows),
        text=unet.text_keys(
            on_device([text.generated_prompt_embeds for text in texts], padded_items, dtype),
            on_device([_pad(text.prompt_embeds, t5_length) for text in texts], padded_items, dtype),
            on_device([_pad(text.attention_mask, t5_length) for text in texts], padded_items, dtype),
        ),
        masks=masks,
    )


def _stack_time_biases(unet: UNet, tables: Sequence[ScheduleTable]) -> tuple[list[int], Tensor]:
    """Returns where each table begins in the distinct tables' biases, and these biases."""
    first: dict[int, int] = {}
    distinct: list[Tensor] = []
    length = 0
    for table in tables:
        if id(table) not in first:
            first[id(table)] = length
            distinct.append(unet.time_biases(table))
            length += len(distinct[-1])
    return [first[id(table)] for table in tables], torch.cat(distinct)


def _fit_frames(waveform: WaveformState, frames: int) -> Tensor:
    own = waveform.history[..., : waveform.frames, :]
    return functional.pad(own, (0, 0, 0, frames - waveform.frames))


def _pad(tensor: Tensor, length: int) -> Tensor:
    """Zeros behind the first axis, up to `length`."""
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, length - len(tensor)])


def _filled(values: Sequence[T], length: int, filling: T) -> list[T]:
    return [*values, *[filling] * (length - len(values))]


def unstack_waveforms(batch: StepBatch, waveforms: Sequence[WaveformState]) -> None:
    """Gives each waveform its history back, so that it can be stacked with others."""
    for waveform, history in zip(waveforms, batch.history.unbind(), strict=False):
        waveform.history = history


def step(unet: UNet, batch: StepBatch) -> StepBatch:
    """Returns the batch after one step of every row, without synchronising with the host or per-row work in Python."""
    now = batch.evaluation
    row = torch.arange(len(now), device=now.device)
    inputs = StepInputs(
        history=batch.history,
        input_scale=batch.input_scales[row, now],
        coefficients=batch.coefficients[row, now],
        time_biases=batch.time_biases[(batch.first_bias + now)[batch.row_of_item]],
        guidance_scale=batch.guidance_scale,
        row_of_item=batch.row_of_item,
        negative_item=batch.negative_item,
        text=batch.text,
        masks=batch.masks,
    )
    return replace(batch, history=unet.denoise(inputs, batch.bucket), evaluation=now + 1)


Forward = Callable[[Tensor, Tensor, TextKeys, LengthMasks | None], Tensor]
"""The UNet's forward: latents, time biases, text, masks."""


def denoise(forward: Forward, inputs: StepInputs) -> Tensor:
    """Guidance, the UNet and the schedules' update: the history [R, HISTORY, 2, C, H, W] after one step."""
    history = inputs.history
    rows = len(history)
    sample = history[:, 0, 0]
    model_input = (sample * _per_row(inputs.input_scale))[inputs.row_of_item]
    output = forward(model_input.to(inputs.time_biases.dtype), inputs.time_biases, inputs.text, inputs.masks).float()
    negative = output[inputs.negative_item]
    guided = negative + _per_row(inputs.guidance_scale) * (output[:rows] - negative)
    window = torch.cat([torch.stack([sample, guided], dim=1)[:, None], history[:, 1:]], dim=1)
    pairs = window.flatten(3).flatten(1, 2)
    following = _weighted_sums(inputs.coefficients.flatten(1)[:, None], pairs).float().view_as(sample)
    return torch.cat([torch.stack([following, torch.zeros_like(following)], dim=1)[:, None], window[:, :-1]], dim=1)


def _weighted_sums(weights: Tensor, values: Tensor) -> Tensor:
    """Returns `weights [R, 1, K] @ values [R, K, N]` in the dtype of the weights."""
    if weights.dtype == values.dtype or torch.compiler.is_compiling():
        return torch.bmm(weights, values.to(weights.dtype))
    # A row at a time: the wider values of all rows would not stay in a CPU's caches, and take longer than the sums.
    rows = zip(weights.split(1), values.split(1), strict=True)
    return torch.cat([torch.bmm(weight, value.to(weight.dtype)) for weight, value in rows])


def _per_row(values: Tensor) -> Tensor:
    return values[:, None, None, None]
