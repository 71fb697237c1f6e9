"""`scripts/benchmark masks`: what rows of different lengths cost in one forward of the UNet, as CSV.

Three ways for the same rows, medians of interleaved runs: one masked forward padded to the longest (`masked_ms`),
unmasked forwards over groups of equal length in turn (`grouped_ms`), and one unmasked forward of the padded shape
(`padded_ms`), whose results are wrong, for the cost of the masks alone. `ratio` is `masked_ms / grouped_ms`: below 1,
mixing pays. The UNets are uncompiled.
"""

import argparse
import csv
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Final

import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor

from checkpoints.shapes import component_config

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "model_repository" / "denoiser" / "1"))

from unet.layers import TextKeys  # noqa: E402
from unet.lean_unet import LeanUNet  # noqa: E402

# Latent frames of each row, 25 a second. Rows of one clip with guidance come in pairs.
MIXTURES: Final[dict[str, tuple[tuple[int, ...], ...]]] = {
    "tiny": (
        (64,) * 4,
        (64, 64, 56, 56),
        (64, 64, 32, 32),
        (64, 64, 8, 8),
        (64, 48, 32, 16),
        (64, 60, 56, 52, 48, 44, 40, 36),
        (64, 56, 48, 40, 32, 24, 16, 8),
        (64, 8, 8, 8, 8, 8, 8, 8),
        (256, 256, 128, 128),
        (256, 256, 64, 64),
        (256, 192, 128, 64),
    ),
    "base": (
        (32,) * 4,
        (32, 32, 28, 28),
        (32, 32, 16, 16),
        (32, 24, 16, 8),
        (32, 8, 8, 8),
        (8, 7, 6, 5, 4, 3, 2, 1),
    ),
}
T5_TOKENS: Final = 20


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    unet: str
    device: str
    dtype: str
    torch: str
    mixture: str  # rows x latent frames of each length
    rows: int
    frames_padded: int
    masked_ms: float
    grouped_ms: float
    padded_ms: float
    ratio: float


def build_unet(name: str, device: str, dtype: torch.dtype) -> LeanUNet:
    """A UNet of random weights; its cost is that of trained ones."""
    torch.manual_seed(0)
    unet = AudioLDM2UNet2DConditionModel.from_config(component_config(name, "unet"))
    return LeanUNet(unet).to(device, dtype).eval()


def random_inputs(unet: LeanUNet, rows: int, frames: int) -> tuple[Tensor, Tensor, TextKeys]:
    _, gpt2, t5 = unet.config["cross_attention_dim"][0]

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, device=unet.device, dtype=unet.dtype)

    text = unet.text_keys(noise(8, gpt2), noise(T5_TOKENS, t5), torch.ones(rows, T5_TOKENS, device=unet.device))
    return noise(unet.config["in_channels"], frames, 16), unet.time_biases(torch.full((rows,), 500.0)), text


def medians(ways: list[Callable[[], None]], repeats: int, device: str) -> list[float]:
    """The median time of each way in ms; the ways alternate, so that a busy machine is unfair to none."""
    times: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for way, measured in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if repeat:  # the first is the warm-up
                measured.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(measured) for measured in times]


def measure_mixture(
    name: str,
    unet: LeanUNet,
    mixture: tuple[int, ...],
    repeats: int,
    device: str,
) -> Row:
    rows, frames = len(mixture), max(mixture)
    padded = random_inputs(unet, rows, frames)
    groups = [random_inputs(unet, count, length) for length, count in Counter(mixture).items()]
    masks = unet.masks(mixture, frames)

    def run_masked() -> None:
        unet(*padded, masks)

    def run_groups() -> None:
        for group in groups:
            unet(*group, None)

    def run_padded() -> None:
        unet(*padded, None)

    masked_ms, grouped_ms, padded_ms = medians([run_masked, run_groups, run_padded], repeats, device)
    return Row(
        name,
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads",
        str(unet.dtype).removeprefix("torch."),
        torch.__version__,
        " + ".join(f"{count}x{length}" for length, count in Counter(mixture).items()),
        rows,
        frames,
        round(masked_ms, 2),
        round(grouped_ms, 2),
        round(padded_ms, 2),
        round(masked_ms / grouped_ms, 3),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--unet", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--repeats", type=int, default=3)


def measure(arguments: argparse.Namespace) -> None:
    """Writes the table to the standard output, a line at a time."""
    torch.set_num_threads(arguments.threads)
    table = csv.writer(sys.stdout)
    table.writerow(field.name for field in fields(Row))
    with torch.inference_mode():
        for name in arguments.unet:
            unet = build_unet(name, arguments.device, getattr(torch, arguments.dtype))
            for mixture in MIXTURES[name]:
                table.writerow(astuple(measure_mixture(name, unet, mixture, arguments.repeats, arguments.device)))
                sys.stdout.flush()
