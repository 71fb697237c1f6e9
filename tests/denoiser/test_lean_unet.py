"""Rows of different lengths in one forward of the UNet: each as if it were alone."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unet import layers, length_masks
from unet.lean_unet import LeanUNet
from unet.length_masks import LengthMasks, level_sizes, masked_group_norm

TOPOLOGIES = {"base": [None, 24, 32], "large": [None, 24, 32, None]}
DEPTHS = {"base": 1, "large": 2}
GPT2, T5, T5_TOKENS = 24, 32, 9


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def build_unet(topology: str = "base", seed: int = 0, **changes: Any) -> AudioLDM2UNet2DConditionModel:
    torch.manual_seed(seed)
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (16, 32, 48, 64),
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        "cross_attention_dim": [TOPOLOGIES[topology]] * 4,
        "transformer_layers_per_block": DEPTHS[topology],
    }
    return AudioLDM2UNet2DConditionModel(**config | changes).eval()


def lean(unet: AudioLDM2UNet2DConditionModel) -> LeanUNet:
    return LeanUNet(deepcopy(unet)).eval()


UNETS = {topology: build_unet(topology) for topology in TOPOLOGIES}
LEAN = {topology: lean(unet) for topology, unet in UNETS.items()}


@dataclass(frozen=True)
class Rows:
    """What a forward takes, each row with a timestep and a T5 mask of its own; noise on the padded frames."""

    lengths: Sequence[int]
    sample: Tensor
    timestep: Tensor
    gpt2: Tensor
    t5: Tensor
    t5_mask: Tensor

    @property
    def frames(self) -> int:
        return self.sample.shape[2]

    def conditioning(self) -> dict[str, Tensor]:
        return {
            "timestep": self.timestep,
            "encoder_hidden_states": self.gpt2,
            "encoder_hidden_states_1": self.t5,
            "encoder_attention_mask_1": self.t5_mask,
        }

    def to(self, dtype: torch.dtype) -> "Rows":
        return replace(self, sample=self.sample.to(dtype), gpt2=self.gpt2.to(dtype), t5=self.t5.to(dtype))


def random_rows(lengths: Sequence[int], frames: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    tokens = torch.randint(1, T5_TOKENS + 1, (rows, 1), generator=generator)
    return Rows(
        lengths,
        3 * torch.randn(rows, 8, frames, 16, generator=generator),
        torch.randint(0, 1000, (rows,), generator=generator),
        torch.randn(rows, 8, GPT2, generator=generator),
        torch.randn(rows, T5_TOKENS, T5, generator=generator),
        (torch.arange(T5_TOKENS) < tokens).long(),
    )


def run_masked(unet: LeanUNet, rows: Rows, masks: LengthMasks | None = None) -> Tensor:
    return run_lean(unet, rows, masks or unet.masks(rows.lengths, rows.frames))


def run_lean(unet: LeanUNet, rows: Rows, masks: LengthMasks | None) -> Tensor:
    text = unet.text_keys(rows.gpt2, rows.t5, rows.t5_mask)
    return unet(rows.sample, unet.time_biases(rows.timestep), text, masks)


def run_plain(unet: AudioLDM2UNet2DConditionModel, rows: Rows) -> Tensor:
    return unet(rows.sample, **rows.conditioning()).sample


def run_alone(unet: AudioLDM2UNet2DConditionModel, rows: Rows) -> list[Tensor]:
    """The output of each row run by itself, without padding: `[8, length, 16]` each."""
    return [
        unet(
            rows.sample[row : row + 1, :, :length],
            **{name: tensor[row : row + 1] for name, tensor in rows.conditioning().items()},
        ).sample[0]
        for row, length in enumerate(rows.lengths)
    ]


def difference(batch: Tensor, alone: list[Tensor]) -> float:
    """The largest relative difference of a row's valid frames to the row alone."""
    return max(
        ((row[:, : other.shape[1]] - other).abs().max() / other.abs().max()).item()
        for row, other in zip(batch.double(), alone, strict=True)
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("frames", [1, 24, 37])
def test_it_is_the_unet_of_diffusers(topology: str, frames: int) -> None:
    rows = random_rows((frames,) * 3, frames)
    expected = run_plain(UNETS[topology], rows)
    assert difference(run_lean(LEAN[topology], rows, None), list(expected)) < 1e-5


@pytest.mark.parametrize("topology", TOPOLOGIES)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 45)), min_size=1, max_size=4),
    extra=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_each_row_is_what_it_is_alone(topology: str, lengths: list[int], extra: int, seed: int) -> None:
    rows = random_rows(lengths, max(lengths) + extra, seed)
    output = run_masked(LEAN[topology], rows)
    assert difference(output, run_alone(UNETS[topology], rows)) < 1e-5
    for row, length in zip(output, lengths, strict=True):
        assert not row[:, length:].any()


@pytest.mark.parametrize("lengths", [(256, 123, 37), (64, 3, 50, 25)])
def test_longer_rows(lengths: tuple[int, ...]) -> None:
    rows = random_rows(lengths, max(lengths))
    assert difference(run_masked(LEAN["base"], rows), run_alone(UNETS["base"], rows)) < 1e-5


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_plain_padding_is_wrong(topology: str) -> None:
    rows = random_rows((25, 50, 3), 64)
    zeroed = rows.sample.masked_fill(LEAN[topology].masks(rows.lengths, rows.frames).levels[0].padding, 0)
    alone = run_alone(UNETS[topology], rows)
    for row in range(3):
        one = [alone[row]]
        assert difference(run_plain(UNETS[topology], replace(rows, sample=zeroed))[row : row + 1], one) > 1e-2


@pytest.mark.parametrize("measure", ["keys", "convolutions", "statistics"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_each_measure_is_needed(topology: str, measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = LEAN[topology]
    rows = random_rows((25, 50, 3), 64)
    masks = unet.masks(rows.lengths, rows.frames)
    if measure == "keys":
        masks = LengthMasks(tuple(replace(level, keys=torch.zeros_like(level.keys)) for level in masks.levels))
    elif measure == "statistics":
        whole = unet.masks([rows.frames] * 3, rows.frames)
        masks = LengthMasks(
            tuple(
                replace(level, positions=other.positions)
                for level, other in zip(masks.levels, whole.levels, strict=True)
            )
        )
    else:
        monkeypatch.setattr(layers.Conv, "forward", lambda self, hidden, _masks: self.conv(hidden))
    assert difference(run_masked(unet, rows, masks), run_alone(UNETS[topology], rows)) > 1e-3


def test_padding_may_hold_anything() -> None:
    rows = random_rows((25, 50, 3), 64)
    padding = LEAN["base"].masks(rows.lengths, rows.frames).levels[0].padding
    expected = run_masked(LEAN["base"], rows)
    for filling in (float("nan"), float("inf"), 0.0):
        filled = replace(rows, sample=rows.sample.masked_fill(padding, filling))
        assert torch.equal(run_masked(LEAN["base"], filled), expected)


def test_full_rows_are_as_without_masks() -> None:
    rows = random_rows((24, 24), 24)
    plain = run_plain(UNETS["base"], rows)
    assert difference(run_masked(LEAN["base"], rows), list(plain)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_alone(dtype: torch.dtype) -> None:
    rows = random_rows((40, 3, 17, 1), 40)
    exact = run_alone(UNETS["base"], rows)
    unet = build_unet().to(dtype)
    masked = lean(unet)
    output = run_masked(masked, rows.to(dtype))
    assert output.dtype == dtype
    for row, (one, truth) in enumerate(zip(run_alone(unet, rows.to(dtype)), exact, strict=True)):
        error = (output[row, :, : rows.lengths[row]] - truth).abs().mean()
        assert error < 2 * (one - truth).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_statistics_are_as_accurate_as_group_norm(
    dtype: torch.dtype, layout: torch.memory_format, offset: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (64, 33, 2, 1)
    x = (torch.randn(4, 64, 64, 16, generator=generator) + offset).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, 64, generator=generator).to(dtype)
    masks = LEAN["base"].masks(lengths, 64).levels[0]
    output = masked_group_norm(x, 8, weight, bias, 1e-5, masks)
    assert output.dtype == dtype
    for row, length in enumerate(lengths):
        valid = x[row : row + 1, :, :length]
        truth = torch.nn.functional.group_norm(valid.double(), 8, weight.double(), bias.double())
        native = torch.nn.functional.group_norm(valid.contiguous(), 8, weight, bias)
        error = (output[row : row + 1, :, :length] - truth).abs().max()
        assert error <= 2 * (native - truth).abs().max() + 1e-6


@pytest.mark.parametrize("shape", [(2, 64, 48, 16), (4, 64, 256, 16)], ids=["small", "large"])
@pytest.mark.parametrize("mean", [0, 1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_channels_last_is_as_exact_as_that_of_contiguous_tensors(
    dtype: torch.dtype, mean: float, shape: tuple[int, ...]
) -> None:
    """A variance from one pass loses three digits of values that are 30 deviations from zero.

    Even around zero it is several times less exact, since it adds up thousands of squares one by one.
    """
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + mean).to(dtype)
    norm = torch.nn.GroupNorm(8, 64, eps=1e-5, dtype=dtype).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    norm.bias.normal_(generator=generator)
    truth = torch.nn.functional.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps)
    output = layers.GroupNorm(norm)(x.contiguous(memory_format=torch.channels_last), None)
    assert output.is_contiguous(memory_format=torch.channels_last)
    error, native = output - truth, norm(x) - truth
    assert error.abs().max() <= 2 * native.abs().max()
    assert error.square().mean() <= 1.5**2 * native.square().mean()


def test_one_trace_serves_all_lengths() -> None:
    torch._dynamo.reset()
    unet = lean(build_unet(layers_per_block=1))
    compiled: Any = torch.compile(unet, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in enumerate([(9, 30), (29, 1), (30, 30)]):
            rows = random_rows(lengths, 30, seed)
            masks = unet.masks(lengths, 30)
            assert torch.equal(run_lean(compiled, rows, masks), run_lean(unet, rows, masks))


def test_masks_of_each_level() -> None:
    masks = LEAN["base"].masks((5, 13), 13)
    assert level_sizes(13, 4) == (13, 7, 4, 2)
    valid = [(~level.padding).sum((1, 2, 3)).tolist() for level in masks.levels]
    assert valid == [[5, 13], [3, 7], [2, 4], [1, 2]]
    for level, height, width in zip(masks.levels[1:], (7, 4, 2), (8, 4, 2), strict=True):
        assert level.keys.shape == (2, 1, 1, height * width)
        assert level.keys.stride(0) % length_masks.MASK_ALIGNMENT == 0
        assert level.keys.isfinite().all()
        unmasked = (level.keys == 0).sum((1, 2, 3)).tolist()
        assert unmasked == level.positions.flatten().tolist()


@pytest.mark.parametrize("lengths", [(), (0,), (5, 14), (-1, 3)])
def test_impossible_lengths_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="valid_frames"):
        LEAN["base"].masks(lengths, 13)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="resnet_time_scale_shift"):
        LeanUNet(build_unet(resnet_time_scale_shift="scale_shift"))
