"""A checkpoint's UNet as the engine calls it: eager for any shape, compiled for the buckets."""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor

from audioldm2_triton.server.compilation import for_fixed_shapes
from audioldm2_triton.server.text_lengths import DEFAULT_MAX_NEW_TOKENS
from audioldm2_triton.server.threads import set_measured_threads
from stepping.forward_plan import Bucket, ForwardCosts, LaunchBoundCost, LinearCost, fit_cost, fit_launch_bound
from stepping.schedule_table import HISTORY, ScheduleTable
from stepping.step_batch import COMPILED_T5_LENGTH, T5_BUCKET, StepInputs, denoise, update_dtype
from unet.layers import TextKeys
from unet.lean_unet import LeanUNet
from unet.length_masks import LengthMasks

logger = logging.getLogger(__name__)

CPU_PROBES: Final = ((2, 16), (2, 64))
"""(items, latent frames) of the two forwards that a cost is fitted through: 0.64 and 2.56 s of audio with guidance. A
forward of one item takes less than the line through those of several says."""
GPU_PROBES: Final = ((2, 64), (48, 256))
"""The same for `LaunchBoundCost`: on an H200 launching a forward takes as long as computing 26 items of 10.24 s."""
PROBE_REPEATS: Final = 3
MEMORY_PROBE: Final = 8
"""UNet batch items of the masked forward whose peak memory tells what one takes."""
THREADS_PROBE: Final = (2, 64)
"""(items, latent frames) of the step whose time decides the number of threads: 2.56 s of audio with guidance."""
KEPT_SCHEDULES: Final = 64
"""Schedules whose time biases stay on the device: 13 MB each at 400 evaluations of the base shape in float32."""


class DenoisingUNet:
    """One UNet on one device. `denoise` and `warm_up` belong to one thread, as CUDA graphs do.

    Args:
        width: of the latents, W.
        buckets: the shapes to compile for.
        use_compiler: whether `torch.compile` makes the buckets' kernels.
        generated_states: hidden states of GPT-2 in each text.
    """

    def __init__(
        self,
        unet: LeanUNet,
        width: int,
        buckets: Sequence[Bucket] = (),
        use_compiler: bool = True,
        generated_states: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> None:
        self.config: Any = unet.config
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self.buckets = tuple(buckets)
        self._unet = unet
        self._width = width
        self._generated_states = generated_states
        self._eager = partial(denoise, unet)
        self.forwards: Counter[Bucket | None] = Counter()
        """How often each bucket has run since the start; None counts the eager forwards."""
        self._compiled: Callable[[StepInputs], Tensor] = self._eager
        if buckets:
            self._compiled = for_fixed_shapes(self._eager, self.device, len(buckets), use_compiler)
        self._time_biases: OrderedDict[int, tuple[ScheduleTable, Tensor]] = OrderedDict()

    @property
    def module(self) -> LeanUNet:
        """The module that holds the weights."""
        return self._unet

    def masks(self, valid_frames: Sequence[int], frames: int) -> LengthMasks:
        return self._unet.masks(valid_frames, frames, self._width)

    def text_keys(
        self, encoder_hidden_states: Tensor, encoder_hidden_states_1: Tensor, encoder_attention_mask_1: Tensor
    ) -> TextKeys:
        return self._unet.text_keys(encoder_hidden_states, encoder_hidden_states_1, encoder_attention_mask_1)

    def time_biases(self, table: ScheduleTable) -> Tensor:
        # By identity: the schedules are kept as objects, and one that is kept here cannot give its id to another.
        if id(table) not in self._time_biases:
            self._time_biases[id(table)] = table, self._unet.time_biases(table.timesteps)
            if len(self._time_biases) > KEPT_SCHEDULES:
                self._time_biases.popitem(last=False)
        self._time_biases.move_to_end(id(table))
        return self._time_biases[id(table)][1]

    def denoise(self, inputs: StepInputs, bucket: Bucket | None) -> Tensor:
        self.forwards[bucket] += 1
        return (self._eager if bucket is None else self._compiled)(inputs)

    @torch.inference_mode()
    def warm_up(self) -> ForwardCosts:
        """Compiles the buckets and times a few steps; on a CPU it first chooses the number of threads."""
        if self.device.type == "cpu":
            step = self.random_inputs(*THREADS_PROBE, masked=False, t5_length=T5_BUCKET)
            set_measured_threads(partial(self.denoise, step, None))
        compiled: dict[Bucket, float] = {}
        for number, bucket in enumerate(self.buckets, 1):
            start = time.perf_counter()
            try:
                inputs = self.random_inputs(bucket.items, bucket.frames, bucket.masked, COMPILED_T5_LENGTH)
                self._compiled(inputs)
                seconds = time.perf_counter() - start
                compiled[bucket] = self._time(partial(self.denoise, inputs, bucket))
            except Exception as error:
                # A bucket without a cost is never chosen.
                logger.error("%s: going on without %s, which failed to compile: %r", self.device, bucket, error)
                continue
            logger.info(
                "%s: %d of %d, %s compiled in %.1f s, a step takes %.1f ms",
                *(self.device, number, len(self.buckets), bucket, seconds, 1000 * compiled[bucket]),
            )
        costs = ForwardCosts(plain=self._measure_eager(False), masked=self._measure_eager(True), compiled=compiled)
        logger.info("%s: a forward takes %s; masked, %s", self.device, costs.plain, costs.masked)
        return costs

    @torch.inference_mode()
    def measure_row_bytes(self, frames: int) -> int:
        """Measures the GPU memory that a UNet batch item of so many latent frames takes in an eager forward, at its
        peak, its inputs included."""
        for _ in range(2):  # the first also takes the libraries' workspaces, which stay
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._eager(self.random_inputs(MEMORY_PROBE, frames, masked=True))
            taken = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return max(1, taken // MEMORY_PROBE)

    def _measure_eager(self, masked: bool) -> LinearCost | LaunchBoundCost:
        if self.device.type == "cuda":
            return fit_launch_bound(*(self._probe(items, frames, masked) for items, frames in GPU_PROBES))
        return fit_cost(*(self._probe(items, frames, masked) for items, frames in CPU_PROBES))

    def _probe(self, items: int, frames: int, masked: bool) -> tuple[int, int, float]:
        inputs = self.random_inputs(items, frames, masked, T5_BUCKET)
        return items, frames, self._time(partial(self.denoise, inputs, None))

    def _time(self, step: Callable[[], Tensor]) -> float:
        # On a CPU this thread's own time: while a server starts, its stages compete for the cores. The thread does its
        # share of what several threads do.
        clock = time.perf_counter if self.device.type == "cuda" else time.thread_time
        seconds = []
        for _ in range(1 + PROBE_REPEATS):
            start = clock()
            step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(clock() - start)
        # The first is the warm-up. The minimum, because other load on the machine can only add time.
        return min(seconds[1:])

    def random_inputs(self, items: int, frames: int, masked: bool, t5_length: int = COMPILED_T5_LENGTH) -> StepInputs:
        """Makes the inputs of one step of so many waveforms without guidance, with random values."""
        generated_dim, prompt_dim = [dim for dim in self.config.cross_attention_dim[0] if dim is not None]

        def random(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=dtype)

        numbers = torch.arange(items, device=self.device)
        latents = (self.config.in_channels, frames, self._width)
        biases = self._unet.time_biases(torch.full((1,), 500.0))
        return StepInputs(
            history=random(items, HISTORY, 2, *latents, dtype=torch.float32),
            input_scale=torch.ones(items, device=self.device),
            coefficients=random(items, HISTORY, 2, dtype=update_dtype(self.device)),
            time_biases=biases[torch.zeros_like(numbers)],
            guidance_scale=torch.ones(items, device=self.device),
            row_of_item=numbers,
            negative_item=numbers.clone(),
            text=self.text_keys(
                random(items, self._generated_states, generated_dim),
                random(items, t5_length, prompt_dim),
                torch.ones(items, t5_length, device=self.device, dtype=self.dtype),
            ),
            masks=self.masks([frames - 1] * items, frames) if masked else None,
        )


def load_lean_unet(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> LeanUNet:
    """Loads the UNet in evaluation mode; its attention is PyTorch's SDPA."""
    unet = AudioLDM2UNet2DConditionModel.from_pretrained(
        str(checkpoint / "unet"), torch_dtype=dtype, local_files_only=True
    )
    return LeanUNet(unet).to(device).eval()


def load_unet(
    checkpoint: Path,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    buckets: Sequence[Bucket] = (),
    use_compiler: bool = True,
) -> DenoisingUNet:
    """Loads the UNet as the engine calls it.

    Args:
        width: of the latents, W.
        buckets: the shapes to compile for.
        use_compiler: whether `torch.compile` makes the buckets' kernels.
    """
    return DenoisingUNet(load_lean_unet(checkpoint, device, dtype), width, buckets, use_compiler)
