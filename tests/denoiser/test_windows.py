"""Long latents in overlapping windows: the weights, the engine against MultiDiffusion by hand, bounds and turns."""

import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from audioldm2_triton.errors import RequestCancelledError
from audioldm2_triton.server.geometry import read_audio_geometry
from denoiser_stage import load_schedule_tables
from denoising_inputs import draw_noise
from engine.engine import Engine
from engine.limits import EngineLimits
from engine_workload import (
    CPU,
    SCHEDULER_CONFIG,
    TABLES,
    Outcomes,
    WatchedUNet,
    make_engine,
    make_request,
    reference_latents,
    wait_until,
)
from multi_diffusion import multi_diffusion
from stepping.denoising_unet import DenoisingUNet, load_unet
from stepping.forward_plan import ALWAYS_MIX, NEVER_MIX, Bucket, ForwardCosts, LinearCost
from stepping.request import DenoisingRequest, DenoisingRow, TextStates
from stepping.step_batch import StepInputs
from stepping.windows import Windowing, blend_windows, cut_windows, plan_windows

WINDOW, OVERLAP = 16, 4
TWO, THREE = 28, 37  # latent frames that take as many windows; of three, the last two overlap by more


@given(st.data())
def test_the_weights_of_every_frame_add_up_to_one(data: st.DataObject) -> None:
    frames = data.draw(st.integers(2, 40))
    windowing = Windowing(frames, data.draw(st.integers(0, frames // 2)))
    total = data.draw(st.integers(frames + 1, 200))
    windows = plan_windows(windowing, total, CPU)
    assert windows.starts[0] == 0
    assert windows.starts[-1] == total - frames
    steps = [after - before for before, after in pairwise(windows.starts)]
    assert all(0 < step <= frames - windowing.overlap for step in steps)
    torch.testing.assert_close(windows.weights.sum(0), torch.ones(total))
    covered = torch.bincount(windows.positions, minlength=total)
    assert (windows.weights[0][covered == 1] == 1).all()
    assert (windows.weights >= 0).all()
    whole = torch.randn(3, total, 4)
    torch.testing.assert_close(blend_windows(cut_windows(whole, windows), windows), whole)


def test_a_window_fades_in_and_out() -> None:
    windows = plan_windows(Windowing(WINDOW, OVERLAP), TWO, CPU)
    parts = torch.stack([torch.zeros(WINDOW, 1), torch.ones(WINDOW, 1)])
    blended = blend_windows(parts, windows)[:, 0]
    expected = torch.sin((torch.arange(4) + 0.5) / 4 * torch.pi / 2) ** 2
    torch.testing.assert_close(blended, torch.cat([torch.zeros(12), expected, torch.ones(12)]))


class CountingUNet:
    """A UNet that keeps count of the UNet batch items of every forward."""

    def __init__(self, unet: DenoisingUNet) -> None:
        self._unet = unet
        self.items: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def denoise(self, inputs: StepInputs, bucket: Bucket | None) -> Tensor:
        self.items.append(len(inputs.row_of_item))
        return self._unet.denoise(inputs, bucket)


@pytest.fixture(scope="module")
def denoising_unet(tiny_checkpoint: Path) -> DenoisingUNet:
    return load_unet(tiny_checkpoint, read_audio_geometry(tiny_checkpoint).latent_width, CPU, torch.float32)


@pytest.fixture(scope="module")
def reference_unet(tiny_checkpoint: Path) -> AudioLDM2UNet2DConditionModel:
    return AudioLDM2UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet").eval()


def request(
    unet: DenoisingUNet,
    tag: int,
    frames: int,
    scheduler: str = "DPMSolverMultistepScheduler",
    guidance_scale: float = 3.5,
    waveforms: int = 1,
    windowing: Windowing | None = None,
) -> DenoisingRequest:
    generator = torch.Generator().manual_seed(tag)
    generated_dim, prompt_dim = [dim for dim in unet.config.cross_attention_dim[0] if dim is not None]

    def text() -> TextStates:
        embeds = torch.randn(5, prompt_dim, generator=generator)
        return TextStates(embeds, torch.ones(5), torch.randn(8, generated_dim, generator=generator))

    negative = text() if guidance_scale > 1 else None
    noise = draw_noise(tag, (waveforms, unet.config.in_channels, frames, 16))
    return DenoisingRequest((DenoisingRow(text(), negative, guidance_scale, 4, scheduler, noise, windowing),))


def run(
    checkpoint: Path,
    unet: Any,
    requests: list[DenoisingRequest],
    max_active_rows: int = 32,
    costs: ForwardCosts = ALWAYS_MIX,
) -> list[Tensor]:
    outcomes = Outcomes()
    engine = make_engine(unet, load_schedule_tables(checkpoint), max_active_rows, costs=costs)
    for tag, one in enumerate(requests):
        engine.submit(one, outcomes.callback(tag))
    collected = outcomes.collect(len(requests))
    engine.close()
    latents = [collected[tag] for tag in range(len(requests))]
    assert all(isinstance(one, Tensor) for one in latents), latents
    return latents  # type: ignore[return-value]


def off_by(latents: Tensor, expected: Tensor) -> float:
    assert latents.shape == expected.shape
    return float((latents - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("frames", [WINDOW, 9])
def test_what_one_window_holds_is_the_whole(frames: int, tiny_checkpoint: Path, denoising_unet: DenoisingUNet) -> None:
    plain = request(denoising_unet, 1, frames)
    windowed = request(denoising_unet, 1, frames, windowing=Windowing(WINDOW, OVERLAP))
    (expected,), (latents,) = (run(tiny_checkpoint, denoising_unet, [one]) for one in (plain, windowed))
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("max_active_rows", [32, 4], ids=["one forward", "in turns"])
@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("frames", [TWO, THREE])
def test_equals_multi_diffusion_by_hand(
    frames: int,
    scheduler: str,
    max_active_rows: int,
    tiny_checkpoint: Path,
    denoising_unet: DenoisingUNet,
    reference_unet: AudioLDM2UNet2DConditionModel,
) -> None:
    one = request(denoising_unet, 3, frames, scheduler, windowing=Windowing(WINDOW, OVERLAP))
    counting = CountingUNet(denoising_unet)
    (latents,) = run(tiny_checkpoint, counting, [one], max_active_rows)
    solver = getattr(diffusers, scheduler).from_config(SCHEDULER_CONFIG)
    expected = multi_diffusion(reference_unet, solver, one.rows[0], WINDOW, OVERLAP)[None]
    assert off_by(latents, expected) < 1e-4
    whole = request(denoising_unet, 3, frames, scheduler)
    assert off_by(run(tiny_checkpoint, denoising_unet, [whole])[0], expected) > 1e-2, "windows made no difference"
    num_windows, evaluations = (2 if frames == TWO else 3), (4 if scheduler.startswith("DPM") else 7)
    per_forward = 2 if max_active_rows == 4 else 2 * num_windows
    assert counting.items == [per_forward] * (2 * num_windows * evaluations // per_forward)


@pytest.mark.parametrize("costs", [ALWAYS_MIX, NEVER_MIX], ids=["mixed", "grouped"])
@pytest.mark.parametrize("max_active_rows", [40, 12])
def test_windows_and_whole_waveforms_do_not_change_each_other(
    max_active_rows: int, costs: ForwardCosts, tiny_checkpoint: Path, denoising_unet: DenoisingUNet
) -> None:
    requests = [
        request(denoising_unet, 1, THREE, windowing=Windowing(WINDOW, OVERLAP)),
        request(denoising_unet, 2, 20),
        request(denoising_unet, 3, 60, waveforms=2, windowing=Windowing(WINDOW, 8)),
        request(denoising_unet, 4, 11, "HeunDiscreteScheduler", guidance_scale=1.0),
        request(denoising_unet, 5, TWO, "DDIMScheduler", guidance_scale=1.0, windowing=Windowing(24, 8)),
    ]
    alone = [run(tiny_checkpoint, denoising_unet, [one])[0] for one in requests]
    counting = CountingUNet(denoising_unet)
    together = run(tiny_checkpoint, counting, requests, max_active_rows, costs)
    assert max(counting.items) <= max_active_rows
    for latents, expected in zip(together, alone, strict=True):
        assert off_by(latents, expected) < 1e-4


def windowed(tag: int, frames: int, **options: Any) -> DenoisingRequest:
    """For the watched UNet, in windows of 4 frames."""
    whole = make_request(tag, frames=frames, **options)
    return replace(whole, rows=tuple(replace(row, windowing=Windowing(4, 1)) for row in whole.rows))


def test_any_length_fits_and_others_find_room_beside_it() -> None:
    unet, outcomes, told = WatchedUNet(), Outcomes(), []
    engine = make_engine(unet, TABLES, max_active_rows=8)
    unet.gate = threading.Semaphore(0)
    long = windowed(1, frames=100, steps=5, waveforms=2)  # 66 windows with guidance, in forwards of 4 items
    job = engine.submit(long, outcomes.callback(1))
    unet.gate.release(20)
    wait_until(lambda: len(unet.forwards) == 20, "20 forwards")
    assert engine.load.active_rows == 4
    engine.listen(job, 0, lambda step, total: told.append((step, total)))
    short = make_request(2, steps=3)
    engine.submit(short, outcomes.callback(2))
    unet.gate.release(100_000)
    tag, outcome = outcomes.next()
    assert tag == 2, "the short request had to wait for the long one"
    assert isinstance(outcome, Tensor)
    assert off_by(outcome, reference_latents(short, SCHEDULER_CONFIG)) < 1e-4
    tag, outcome = outcomes.next()
    engine.close()
    assert max(map(len, unet.forwards)) == 4
    # The watched UNet sees one position at a time: for it, windows make no difference.
    assert isinstance(outcome, Tensor)
    assert off_by(outcome, reference_latents(long, SCHEDULER_CONFIG)) < 1e-4
    of_long = [tags for tags in unet.forwards if 1 in tags]
    assert sum(map(len, of_long)) == 5 * 2 * 66, "a window took a step twice, or not at all"
    assert told == [(1, 5)], "progress counts whole steps"
    # Between two forwards of the short request there is one of the long one, not a whole step of it.
    places = [index for index, tags in enumerate(unet.forwards) if 2 in tags]
    assert max(after - before for before, after in pairwise(places)) == 2


def test_a_cancelled_long_request_stops_within_a_forward() -> None:
    unet, outcomes = WatchedUNet(), Outcomes()
    unet.gate = threading.Semaphore(7)
    engine = make_engine(unet, TABLES, max_active_rows=8)
    job = engine.submit(windowed(1, frames=100, steps=50), outcomes.callback(1))
    wait_until(lambda: len(unet.forwards) == 7, "seven forwards")
    other = windowed(2, frames=10, steps=5)
    engine.submit(other, outcomes.callback(2))
    engine.cancel(job)
    unet.gate.release(100_000)
    collected = outcomes.collect(2)
    engine.close()
    assert isinstance(collected[1], RequestCancelledError)
    assert "after 0 of 50 steps" in str(collected[1])
    assert sum(1 in tags for tags in unet.forwards) <= 8
    latents = collected[2]
    assert isinstance(latents, Tensor)
    assert off_by(latents, reference_latents(other, SCHEDULER_CONFIG)) < 1e-4


def test_windows_in_turns_have_guidance_in_their_part_of_the_steps() -> None:
    unet, outcomes = WatchedUNet(), Outcomes()
    limits = EngineLimits(8, 100)
    engine = Engine(unet, TABLES, limits, lambda: ALWAYS_MIX, CPU, torch.float32, None, (0.25, 0.75))
    long = windowed(1, frames=16, steps=4)  # five windows: two at a time with guidance, four without
    engine.submit(long, outcomes.callback(1))
    latents = outcomes.collect(1)[1]
    engine.close()
    assert list(map(len, unet.forwards)) == [4, 1, 4, 4, 2, 4, 4, 2, 4, 1]
    expected = reference_latents(long, SCHEDULER_CONFIG, lambda step: 1 <= step < 3)
    assert isinstance(latents, Tensor)
    assert off_by(latents, expected) < 1e-4


def test_more_waveforms_than_fit_run_in_portions() -> None:
    engine, outcomes = make_engine(WatchedUNet(), TABLES, max_active_rows=8), Outcomes()
    request = windowed(1, frames=100, waveforms=5, steps=3)
    engine.submit(request, outcomes.callback(1))
    latents = outcomes.collect(1)[1]
    engine.close()
    assert isinstance(latents, Tensor)
    assert off_by(latents, reference_latents(request, SCHEDULER_CONFIG)) < 1e-4


@pytest.mark.parametrize("max_active_rows", [32, 8])
def test_windows_take_the_buckets_of_their_length(
    max_active_rows: int, tiny_checkpoint: Path, denoising_unet: DenoisingUNet
) -> None:
    """Rows of a forward are as many as the bucket has items; what stands for no waveform changes nothing."""
    buckets = {Bucket(items, WINDOW, False): 1.0 for items in (4, 8)}
    costs = ForwardCosts(LinearCost(1000.0, 0.0), LinearCost(1000.0, 0.0), buckets)
    one = request(denoising_unet, 3, THREE, windowing=Windowing(WINDOW, OVERLAP))
    (expected,) = run(tiny_checkpoint, denoising_unet, [one])
    counting = CountingUNet(denoising_unet)
    (latents,) = run(tiny_checkpoint, counting, [one], max_active_rows, costs)
    assert set(counting.items) <= {4, 8}, "a forward was in no bucket"
    assert off_by(latents, expected) < 1e-4
