"""The simulator beside the real engine: the same requests, at the same times, on this machine."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioldm2_triton.contract import BATCH, DEFAULT_SCHEDULER, INTERACTIVE
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.settings import Settings, resolve_device, resolve_dtype
from denoiser_stage import load_schedule_tables
from denoising_inputs import draw_noise, read_tensor_shapes
from engine.engine import Engine
from engine.laxity import OBJECTIVE
from engine.limits import EngineLimits, EngineLoad
from simulation.pace import Step
from simulation.report import time_alone
from simulation.workload import Request
from stepping.denoising_unet import DenoisingUNet, load_unet
from stepping.forward_plan import Bucket, ForwardCosts
from stepping.request import DenoisingRequest, DenoisingRow, TextStates
from stepping.step_batch import StepInputs


@dataclass(frozen=True)
class Figures:
    """What came of the requests of a run, on the engine or simulated."""

    throughput: float  # requests per second
    p50: float  # seconds, as `p99`
    p99: float
    goodput: float


def figures(requests: Sequence[Request], latencies: Sequence[float], costs: ForwardCosts) -> Figures:
    """Returns the figures of requests that were all answered. `costs` decide which latencies count as good."""
    ends = [request.arrived + latency for request, latency in zip(requests, latencies, strict=True)]
    good = [
        latency <= OBJECTIVE * time_alone(request, costs) for request, latency in zip(requests, latencies, strict=True)
    ]
    p50, p99 = (float(value) for value in np.percentile(latencies, (50, 99)))
    return Figures(len(requests) / (max(ends) - requests[0].arrived), p50, p99, sum(good) / len(good))


class Watch:
    """Learns what an engine's steps take, and what their forwards took when they were timed.

    It is the engine's UNet, which knows what each forward should cost, and its observer, which is told what each step
    took, with all that is done between two forwards.
    """

    def __init__(self, unet: DenoisingUNet, costs: ForwardCosts) -> None:
        self._unet, self._costs = unet, costs
        self._expected = 0.0
        self.began = time.monotonic()
        self.steps: list[Step] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def denoise(self, inputs: StepInputs, bucket: Bucket | None) -> Tensor:
        items, frames = len(inputs.row_of_item), inputs.history.shape[4]
        self._expected = self._costs.cheapest(items, frames, inputs.masks is not None)[0]
        return self._unet.denoise(inputs, bucket)

    def stepped(self, rows: int, seconds: float) -> None:  # noqa: ARG002
        self.steps.append(Step(time.monotonic() - self.began, self._expected, seconds))

    def admitted(self, waited_s: float) -> None: ...

    def finished(self, request: DenoisingRequest, outcome: Tensor | Exception) -> None: ...

    def changed(self, load: EngineLoad) -> None: ...

    def broke(self, error: Exception, /) -> None: ...


class RealEngine:
    """An engine with a checkpoint's UNet, for one run at a time."""

    def __init__(self, checkpoint: Path) -> None:
        settings = Settings(str(checkpoint))
        self._geometry, self._shapes = read_audio_geometry(checkpoint), read_tensor_shapes(settings)
        self._device = resolve_device(settings)
        self._dtype = resolve_dtype(settings, self._device)
        self._tables = load_schedule_tables(checkpoint)
        self._unet = load_unet(checkpoint, self._geometry.latent_width, self._device, self._dtype, ())
        with torch.inference_mode():
            self.costs: ForwardCosts = self._unet.warm_up()

    def run(self, requests: Sequence[Request], limits: EngineLimits) -> tuple[list[float], list[Step]]:
        """Sends each request when it arrives; nothing may be refused.

        Returns the seconds from each arrival to the latents, and the steps. Raises `RuntimeError` if one got none.
        """
        watch = Watch(self._unet, self.costs)
        engine = Engine(watch, self._tables, limits, lambda: self.costs, self._device, self._dtype, watch)
        engine.wait_until_warm()
        made = [self._request(request, seed) for seed, request in enumerate(requests)]
        latencies = [math.nan] * len(requests)
        done = Semaphore(0)
        start = watch.began = time.monotonic()

        def answer(index: int, outcome: Tensor | Exception) -> None:
            if isinstance(outcome, Tensor):
                latencies[index] = time.monotonic() - start - requests[index].arrived
            done.release()

        for index, (request, real) in enumerate(zip(requests, made, strict=True)):
            time.sleep(max(0.0, start + request.arrived - time.monotonic()))
            engine.submit(real, lambda outcome, index=index: answer(index, outcome))
        for _ in requests:
            done.acquire()
        engine.close()
        if any(map(math.isnan, latencies)):
            raise RuntimeError("got an error from the engine but expected latents")
        return latencies, watch.steps

    def _request(self, request: Request, seed: int) -> DenoisingRequest:
        shapes = self._shapes
        states = TextStates(
            torch.zeros(8, shapes.prompt_dim), torch.ones(8), torch.zeros(shapes.generated_tokens, shapes.generated_dim)
        )
        shape = (request.waveforms, self._geometry.latent_channels, request.frames, self._geometry.latent_width)
        guided = request.items == 2
        row = DenoisingRow(
            *(states, states if guided else None, 3.5 if guided else 1.0, request.steps, DEFAULT_SCHEDULER),
            noise=draw_noise(seed, shape),
        )
        return DenoisingRequest((row,), priority=BATCH if request.is_batch else INTERACTIVE)
