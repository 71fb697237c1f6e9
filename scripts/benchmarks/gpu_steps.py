"""One step of the UNet on a device: exactness, time, kernels."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.flops import peak_gflop_per_s, unet_gflop
from benchmarks.gpu_load import Loaded
from benchmarks.measurement import Record, with_times
from benchmarks.timing import peak_memory_mib, synchronise, time_repeatedly
from stepping.denoising_unet import DenoisingUNet
from stepping.forward_plan import Bucket

BACKENDS: Final = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def peak(loaded: Loaded, record: Record) -> Record:
    peak = peak_gflop_per_s(loaded.run.device, loaded.run.dtype)
    return replace(record, roofline_share=1.0, note=f"{peak:.1f} GFLOP/s")


@torch.inference_mode()
def parity(loaded: Loaded, record: Record) -> Record:
    """One forward of the served UNet, and of the reference in the same dtype, against the reference in float32."""
    run, frames = loaded.run, loaded.geometry.latent_frames(loaded.plan.length_s)
    config = json.loads((run.checkpoint / "unet" / "config.json").read_text())
    generated_dim, prompt_dim = [dim for dim in config["cross_attention_dim"][0] if dim is not None]
    generator = torch.Generator().manual_seed(0)

    def random_numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(run.device)

    sample = random_numbers(2, config["in_channels"], frames, loaded.geometry.latent_width)
    timesteps = torch.tensor([941.0, 300.0], device=run.device)
    texts = random_numbers(2, 8, generated_dim), random_numbers(2, 16, prompt_dim)
    mask = torch.ones(2, 16, device=run.device)

    def reference(dtype: torch.dtype) -> torch.Tensor:
        unet = AudioLDM2UNet2DConditionModel.from_pretrained(run.checkpoint / "unet", torch_dtype=dtype)
        unet = unet.to(run.device).eval()
        output = unet(
            *(sample.to(dtype), timesteps, texts[0].to(dtype)),
            encoder_hidden_states_1=texts[1].to(dtype),
            encoder_attention_mask_1=mask.to(dtype),
        )
        return output.sample.float()

    exact = reference(torch.float32)
    same = reference(run.dtype)
    lean = loaded.unet((), False).module
    own = lean(
        sample.to(run.dtype),
        lean.time_biases(timesteps),
        lean.text_keys(texts[0].to(run.dtype), texts[1].to(run.dtype), mask),
        None,
    ).float()

    def apart(output: torch.Tensor) -> float:
        return float((output - exact).norm() / exact.norm())

    if not apart(own) <= 2 * apart(same) + 1e-5:
        raise RuntimeError(f"got {apart(own):.2g} from float32 but expected about the reference's {apart(same):.2g}")
    return replace(record, note=f"{apart(own):.2g} from float32; the reference in this dtype {apart(same):.2g}")


def eager_step(loaded: Loaded, record: Record) -> Record:
    return _timed_step(loaded, record, loaded.unet((), False), None)


def fixed_step(loaded: Loaded, record: Record, use_compiler: bool) -> Record:
    frames = loaded.geometry.latent_frames(loaded.plan.length_s)
    bucket = Bucket(int(record.rows or 0), frames, masked=False)
    loaded.drop()  # a bucket's peak is to be its own
    start = time.perf_counter()
    unet = loaded.unet((bucket,), use_compiler)
    inputs = unet.random_inputs(bucket.items, bucket.frames, masked=False)
    with torch.inference_mode():
        unet.denoise(inputs, bucket)
        synchronise(loaded.run.device)
        ready_s = time.perf_counter() - start
        fixed, eager = unet.denoise(inputs, bucket), unet.denoise(inputs, None)
    apart = float((fixed - eager).norm() / eager.norm())
    if not apart < 0.01:
        raise RuntimeError(f"got {apart:.2g} from the eager step but expected the same")
    timed = _timed_step(loaded, record, unet, bucket)
    return replace(timed, note=f"ready in {ready_s:.1f} s, {apart:.1g} from eager")


@torch.inference_mode()
def _timed_step(loaded: Loaded, record: Record, unet: DenoisingUNet, bucket: Bucket | None) -> Record:
    run, rows = loaded.run, int(record.rows or 0)
    frames = loaded.geometry.latent_frames(loaded.plan.length_s)
    inputs = unet.random_inputs(rows, frames, masked=False)
    steps = loaded.plan.steps

    def take_steps() -> None:
        # As the engine: each step reads what the last has made.
        step = inputs
        for _ in range(steps):
            step = replace(step, history=unet.denoise(step, bucket))

    take_steps()
    synchronise(run.device)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = statistics.median(time_repeatedly(take_steps, loaded.plan.repeats, run.device)) / steps
    gflop = unet_gflop(run.checkpoint, rows, frames, loaded.geometry.latent_width)
    return replace(
        with_times(record, [seconds]),
        samples=loaded.plan.repeats * steps,
        gflop=gflop,
        roofline_share=gflop / seconds / peak_gflop_per_s(run.device, run.dtype),
        peak_memory_mib=peak_memory_mib(run.device),
    )


@torch.inference_mode()
def kernels(loaded: Loaded, record: Record) -> Record:
    """Profiles a step."""
    unet = loaded.unet((), False)
    inputs = unet.random_inputs(
        int(record.rows or 0), loaded.geometry.latent_frames(loaded.plan.length_s), masked=False
    )
    unet.denoise(inputs, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        unet.denoise(inputs, None)
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.self_device_time_total]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    shares = [f"{event.self_device_time_total / total:.0%} {event.count} x {event.key[:60]}" for event in kernels[:16]]
    launched = sum(event.count for event in kernels)
    return replace(with_times(record, [total / 1e6]), note=f"{launched} kernels: " + "; ".join(shares))


def attention(loaded: Loaded, record: Record) -> Record:
    """Measures the self-attention of every level with every kernel, in microseconds."""
    run = loaded.run
    config = json.loads((run.checkpoint / "unet" / "config.json").read_text())
    heads = config["num_attention_heads"] or config["attention_head_dim"]
    notes = []
    for level, channels in enumerate(config["block_out_channels"]):
        own_heads = heads[level] if isinstance(heads, list) else heads
        frames = loaded.geometry.latent_frames(loaded.plan.length_s)
        positions = (frames >> level) * max(1, loaded.geometry.latent_width >> level)
        shape = (int(record.rows or 0), own_heads, positions, channels // own_heads)
        query, key, value = (torch.randn(shape, device=run.device, dtype=run.dtype) for _ in range(3))
        times = []
        for backend in BACKENDS:
            try:
                with sdpa_kernel(backend):
                    attend = partial(scaled_dot_product_attention, query, key, value)
                    times.append(f"{backend.name.split('_')[0].lower()} {1e6 * _kernel_seconds(attend):.0f}")
            except RuntimeError:
                times.append(f"{backend.name.split('_')[0].lower()} none")
        notes.append(f"{positions} x {channels // own_heads}: {', '.join(times)}")
    return replace(record, note="; ".join(notes))


def _kernel_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    work()
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000 / repeats
