"""`scripts/benchmark ledger`: what each change to the UNet's step gains, by undoing it, and what it changes.

All ways are timed in turn in one run. `distance` is the largest difference to the UNet of diffusers on the same
input, relative to its peak.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

import audioldm2_triton.server.linear
from audioldm2_triton.server.linear import linear
from benchmarks.measurement import Record, print_table, with_times
from benchmarks.run import Run, add_common_arguments, read_run
from benchmarks.timing import time_once
from unet import layers
from unet.lean_unet import LeanUNet

T5_TOKENS: Final = 20
WIDTH: Final = 16
Forward = Callable[[], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "ledger")
    parser.add_argument("--rows", type=int, default=2, help="UNet batch items (default: %(default)s)")
    parser.add_argument("--latent-frames", type=int, default=64, help="25 a second (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-compiled", action="store_true", help="compiling takes minutes on a CPU")


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "ledger")
    ways = make_ways(run, arguments.rows, arguments.latent_frames, not arguments.skip_compiled)
    exact = ways["diffusers"]().float()
    distances = {name: float((way().float() - exact).abs().max() / exact.abs().max()) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            seconds[name].append(time_once(way, run.device))
    base = statistics.median(seconds["diffusers"])
    records = [run.keep(_record(run, arguments, name, seconds[name], base, distances[name])) for name in ways]
    print_table(records, sys.stdout)


def make_ways(run: Run, rows: int, frames: int, compiled: bool) -> dict[str, Forward]:
    """Returns the variants of one forward by name; a name says what is undone or added."""
    loaded: Any = AudioLDM2UNet2DConditionModel.from_pretrained(
        str(run.checkpoint / "unet"), torch_dtype=run.dtype, local_files_only=True
    )
    unet = loaded.to(run.device).eval()
    lean = LeanUNet(copy.deepcopy(unet)).eval()
    generator = torch.Generator().manual_seed(0)
    dims = [dim for dim in unet.config.cross_attention_dim[0] if dim is not None]

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(run.device, run.dtype)

    sample, generated, prompt = (
        noise(unet.config.in_channels, frames, WIDTH),
        noise(8, dims[0]),
        noise(T5_TOKENS, dims[1]),
    )
    mask = torch.ones(rows, T5_TOKENS, device=run.device, dtype=run.dtype)
    timesteps = torch.linspace(981, 1, rows).round().to(run.device)
    biases, text = lean.time_biases(timesteps), lean.text_keys(generated, prompt, mask)

    def diffusers(unet: Any = unet) -> Tensor:
        output: Tensor = unet(
            sample,
            timesteps,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=prompt,
            encoder_attention_mask_1=mask,
            return_dict=False,
        )[0]
        return output

    contiguous = copy.deepcopy(lean).to(memory_format=torch.contiguous_format)
    contiguous.layout = torch.contiguous_format

    ways: dict[str, Forward] = {
        "diffusers": diffusers,
        "lean": lambda: lean(sample, biases, text, None),
        "keys and values of the text at every step": lambda: lean(
            sample, biases, lean.text_keys(generated, prompt, mask), None
        ),
        "time projections at every step": lambda: lean(sample, lean.time_biases(timesteps), text, None),
        "queries, keys and values apart": lambda: _patched(
            layers.SelfAttention, "forward", _apart, lambda: lean(sample, biases, text, None)
        ),
        "1x1 convolutions of the shortcuts as convolutions": lambda: _patched(
            layers.Pointwise, "forward", _as_convolution, lambda: lean(sample, biases, text, None)
        ),
        "linear layers by PyTorch": lambda: _patched(
            audioldm2_triton.server.linear, "PRODUCT", None, lambda: lean(sample, biases, text, None)
        ),
        "contiguous instead of channels-last": lambda: contiguous(sample, biases, text, None),
    }
    if run.dtype == torch.float32 and run.device.type == "cpu":
        half = copy.deepcopy(lean).to(torch.bfloat16)
        half_inputs = (
            sample.bfloat16(),
            biases.bfloat16(),
            half.text_keys(generated.bfloat16(), prompt.bfloat16(), mask),
        )
        ways["bfloat16"] = lambda: half(*half_inputs, None)
    if compiled:
        step: Any = torch.compile(lean, fullgraph=True, dynamic=False)
        ways["compiled"] = lambda: step(sample, biases, text, None)
        whole: Any = torch.compile(unet, dynamic=False)
        ways["diffusers, compiled"] = lambda: diffusers(whole)
    return ways


def _patched(owner: Any, name: str, value: Any, run: Forward) -> Tensor:
    with patch.object(owner, name, value):
        return run()


def _apart(self: Any, hidden: Tensor, step: Any, level: int) -> Tensor:
    masks = step.level(level)
    query, key, value = (linear(hidden, weight) for weight in self.to_qkv.chunk(3))
    return layers.attend(self, query, key, value, None if masks is None else masks.keys)


def _as_convolution(self: Any, hidden: Tensor) -> Tensor:
    if hidden.dim() != 4:
        return linear(hidden, self.weight, self.bias)
    weight = self.weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return functional.conv2d(hidden.permute(0, 3, 1, 2), weight, self.bias).permute(0, 2, 3, 1)


def _record(
    run: Run, arguments: argparse.Namespace, name: str, seconds: list[float], base: float, distance: float
) -> Record:
    record = replace(
        run.record,
        path=name,
        length_s=arguments.latent_frames / 25,
        rows=arguments.rows,
        note=f"{statistics.median(seconds) / base:.2f} of diffusers, distance {distance:.1e}",
    )
    return with_times(record, seconds)
