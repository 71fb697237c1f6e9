"""A UNet that can be watched and stopped, and requests for it."""

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import diffusers
import torch
from torch import Tensor

from audioldm2_triton.contract import DEFAULT_PRIORITY, DEFAULT_SCHEDULER
from engine.engine import Engine
from engine.limits import EngineLimits
from project import ROOT
from stepping.forward_plan import ALWAYS_MIX, Bucket, ForwardCosts
from stepping.request import DenoisingRequest, DenoisingRow, TextStates
from stepping.schedule_table import ScheduleTable, ScheduleTables
from stepping.step_batch import StepInputs, denoise
from unet.layers import TextKeys

SCHEDULER_CONFIG: dict[str, Any] = json.loads(
    (ROOT / "scripts/checkpoints/reference_configs/audioldm2/scheduler/scheduler_config.json").read_text()
)
TABLES = ScheduleTables(SCHEDULER_CONFIG)

CPU = torch.device("cpu")
CHANNELS, WIDTH = 2, 4


class WatchedUNet:
    """Every item's output depends on its own sample, timestep and text only, so rows can be checked alone.

    `forwards` has the tags of the items of every forward. While `gate` is set to a semaphore, every forward takes one
    permit first.
    """

    def __init__(self) -> None:
        self.forwards: list[tuple[int, ...]] = []
        self.gate: threading.Semaphore | None = None
        self.fail: Callable[[tuple[int, ...]], None] = lambda _: None

    def masks(self, valid_frames: Sequence[int], frames: int) -> Any:
        return torch.tensor([[frame < valid for frame in range(frames)] for valid in valid_frames])

    def text_keys(self, generated: Tensor, prompt_embeds: Tensor, mask: Tensor) -> TextKeys:
        return TextKeys(generated, prompt_embeds, mask)

    def time_biases(self, table: ScheduleTable) -> Tensor:
        return table.timesteps[:, None]

    def denoise(self, inputs: StepInputs, bucket: Bucket | None) -> Tensor:
        assert bucket is None
        return denoise(self.forward, inputs)

    def forward(self, sample: Tensor, time_biases: Tensor, text: TextKeys, masks: Any) -> Tensor:
        tags = tuple(int(tag) for tag in text.states[:, 0, 0].tolist())
        prompt_embeds, mask, timestep = text.states_1, text.bias_1, time_biases[:, 0]
        if self.gate is not None:
            self.gate.acquire()
        self.forwards.append(tags)
        self.fail(tags)
        mean = (prompt_embeds.mean(2) * mask).sum(1) / mask.sum(1)
        output = torch.tanh(sample + mean[:, None, None, None]) * (1 + timestep / 1000)[:, None, None, None]
        return output if masks is None else output * masks[:, None, :, None]


def make_engine(
    unet: Any,
    tables: ScheduleTables,
    max_active_rows: int = 16,
    max_waiting: int = 1000,
    costs: ForwardCosts = ALWAYS_MIX,
    row_frames: int = 256,
) -> Engine:
    limits = EngineLimits(max_active_rows, max_waiting, row_frames)
    return Engine(unet, tables, limits, lambda: costs, CPU, torch.float32)


def make_request(
    tag: int,
    steps: int = 4,
    guidance_scale: float = 3.5,
    waveforms: int = 1,
    frames: int = 5,
    scheduler: str = DEFAULT_SCHEDULER,
    deadline_ns: int = 0,
    priority: str = DEFAULT_PRIORITY,
) -> DenoisingRequest:
    """A request whose UNet items carry `tag`, so that forwards can be counted by request."""
    generator = torch.Generator().manual_seed(tag)

    def text(length: int) -> TextStates:
        embeds = torch.randn(length, 3, generator=generator)
        return TextStates(embeds, torch.ones(length), torch.full((8, 3), float(tag)))

    negative = text(1 + tag % 4) if guidance_scale > 1 else None
    noise = torch.randn(waveforms, CHANNELS, frames, WIDTH, generator=generator)
    row = DenoisingRow(text(1 + tag % 7), negative, guidance_scale, steps, scheduler, noise)
    return DenoisingRequest((row,), deadline_ns, priority)


def random_request(tag: int, generator: random.Random, schedulers: Sequence[str], max_steps: int) -> DenoisingRequest:
    return make_request(
        tag,
        steps=generator.randint(1, max_steps),
        guidance_scale=generator.choice([1.0, 2.5, 7.0]),
        waveforms=generator.randint(1, 3),
        frames=generator.randint(1, 9),
        scheduler=generator.choice(list(schedulers)),
    )


def reference_latents(
    request: DenoisingRequest, scheduler_config: dict[str, Any], is_guided: Callable[[int], bool] = lambda _: True
) -> Tensor:
    """The plain loop of the reference pipeline, with the diffusers scheduler itself and a UNet of its own."""
    (row,) = request.rows
    unet = WatchedUNet()
    solver = getattr(diffusers, row.scheduler).from_config(scheduler_config)
    solver.set_timesteps(row.num_inference_steps)
    sample = row.noise * solver.init_noise_sigma
    for step, timestep in enumerate(solver.timesteps):
        scaled = solver.scale_model_input(sample, timestep)

        def output(text: TextStates, scaled: Tensor = scaled, timestep: Tensor = timestep) -> Tensor:
            items = len(scaled)
            return unet.forward(
                scaled,
                timestep.float().expand(items)[:, None],
                TextKeys(
                    text.generated_prompt_embeds.expand(items, -1, -1),
                    text.prompt_embeds.expand(items, -1, -1),
                    text.attention_mask.expand(items, -1),
                ),
                None,
            )

        positive = output(row.positive)
        if row.negative is not None and is_guided(step):
            negative = output(row.negative)
            positive = negative + row.guidance_scale * (positive - negative)
        sample = solver.step(positive, timestep, sample).prev_sample
    return sample[None]


class Outcomes:
    """Collects the outcomes of requests by tag."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[int, Tensor | Exception]] = SimpleQueue()

    def callback(self, tag: int) -> Callable[[Tensor | Exception], None]:
        return lambda outcome: self._queue.put((tag, outcome))

    def next(self, timeout: float = 60) -> tuple[int, Tensor | Exception]:
        return self._queue.get(timeout=timeout)

    def collect(self, count: int) -> dict[int, Tensor | Exception]:
        """The outcomes of `count` requests; each request answers once."""
        collected: dict[int, Tensor | Exception] = {}
        for _ in range(count):
            tag, outcome = self.next()
            assert tag not in collected, f"request {tag} was answered twice"
            collected[tag] = outcome
        assert self._queue.empty()
        return collected


def latents(outcome: Tensor | Exception) -> Tensor:
    assert isinstance(outcome, Tensor), f"got {outcome!r} but expected latents"
    return outcome


def assert_is_reference(outcome: Tensor | Exception, request: Any) -> None:
    expected = reference_latents(request, SCHEDULER_CONFIG)
    error = (latents(outcome) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"off by {error}"


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.001)
