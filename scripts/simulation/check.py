"""The simulator beside the real engine: the same requests, at the same times, on this machine."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore

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
from engine.limits import EngineLimits
from simulation.costs import mean_costs
from simulation.report import time_alone
from simulation.workload import Request
from stepping.denoising_unet import load_unet
from stepping.forward_plan import ForwardCosts
from stepping.request import DenoisingRequest, DenoisingRow, TextStates


@dataclass(frozen=True)
class Measured:
    costs: ForwardCosts  # the mean of those before and after: the pace of a shared machine changes
    throughput: float  # requests per second
    p50: float
    p99: float
    goodput: float


class RealEngine:
    """An engine with a checkpoint's UNet, for one run at a time."""

    def __init__(self, checkpoint: Path) -> None:
        settings = Settings(str(checkpoint))
        self._geometry, self._shapes = read_audio_geometry(checkpoint), read_tensor_shapes(settings)
        self._device = resolve_device(settings)
        self._dtype = resolve_dtype(settings, self._device)
        self._tables = load_schedule_tables(checkpoint)
        self._unet = load_unet(checkpoint, self._geometry.latent_width, self._device, self._dtype, ())
        self.costs: ForwardCosts
        self.time_forwards()

    def time_forwards(self) -> None:
        """Sets `costs` to what forwards take now, as an engine's start does."""
        with torch.inference_mode():
            self.costs = self._unet.warm_up()

    def run(self, requests: Sequence[Request], limits: EngineLimits) -> Measured:
        """Sends each request when it arrives; nothing may be refused."""
        self.time_forwards()
        before = self.costs
        latencies = self.latencies(requests, limits)
        self.time_forwards()
        costs = mean_costs(before, self.costs)
        ends = [request.arrived + latency for request, latency in zip(requests, latencies, strict=True)]
        good = [
            latency <= OBJECTIVE * time_alone(request, costs)
            for request, latency in zip(requests, latencies, strict=True)
        ]
        p50, p99 = (float(value) for value in np.percentile(latencies, (50, 99)))
        throughput = len(requests) / (max(ends) - requests[0].arrived)
        return Measured(costs, throughput, p50, p99, sum(good) / len(good))

    def latencies(self, requests: Sequence[Request], limits: EngineLimits) -> list[float]:
        """Returns the seconds from each request's arrival to its latents. Raises `RuntimeError` if there are none."""
        engine = Engine(self._unet, self._tables, limits, lambda: self.costs, self._device, self._dtype)
        engine.wait_until_warm()
        made = [self._request(request, seed) for seed, request in enumerate(requests)]
        latencies = [math.nan] * len(requests)
        done = Semaphore(0)
        start = time.monotonic()

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
        return latencies

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
