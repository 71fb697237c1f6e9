"""What a command line orders: each sound with its arguments and the file it goes to."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audioldm2_triton import contract
from audioldm2_triton.audio.encoding import FORMATS, check_encodable
from audioldm2_triton.audio.origin import Origin
from audioldm2_triton.files import STANDARD_OUTPUT, check_audio_path, read_prompts, waveform_files
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.transport.wire import GenerateOptions


@dataclass(frozen=True)
class Order:
    """One request, and where its waveforms go."""

    prompt: str
    options: GenerateOptions
    path: Path  # of the first file; `STANDARD_OUTPUT` takes the best waveform alone
    audio_format: str
    label: str  # by which an error names it; empty if there is no other
    only: int | None = None  # the rank of the one waveform to write; None: all

    def files(self, num_waveforms: int) -> list[tuple[int, Path]]:
        """Returns the rank of each waveform to write, with its file."""
        if self.path == STANDARD_OUTPUT:
            return [(self.only or 0, self.path)]
        if self.only is not None:
            return [(self.only, self.path)]
        return list(enumerate(waveform_files(self.path, num_waveforms)))


def read_orders(arguments: argparse.Namespace, origin: Origin | None) -> list[Order]:
    """Reads prompts and makes missing directories.

    Raises `InvalidArgumentError`, `OSError`, and `ImportError` if the format needs libsndfile and there is none.
    """
    prompts = list(enumerate(arguments.prompt, start=1)) if arguments.batch is None else read_prompts(arguments.batch)
    if arguments.batch is None and len(prompts) == 1:
        path, audio_format = _file(arguments)
    else:
        audio_format = arguments.audio_format or "wav"
        check_encodable(audio_format)
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = None
    orders = []
    for number, prompt in prompts:
        for seed in arguments.seed:
            target = path or arguments.output / f"{number:04}{FORMATS[audio_format].suffix}"
            label = "" if path else f"line {number}" if arguments.batch is not None else f"prompt {number}"
            if len(arguments.seed) > 1:
                target = target.with_stem(f"{target.stem}-seed{seed}")
                label = f"{label}, seed {seed}" if label else f"seed {seed}"
            options = _options(arguments, seed)
            only = origin.waveform if origin is not None and _is_like(origin, prompt, options) else None
            orders.append(Order(prompt, options, target, audio_format, label, only))
    return orders


def _file(arguments: argparse.Namespace) -> tuple[Path, str]:
    if arguments.output == STANDARD_OUTPUT:
        audio_format = arguments.audio_format or "wav"
        check_encodable(audio_format)
        return STANDARD_OUTPUT, audio_format
    default = f"out{FORMATS[arguments.audio_format or 'wav'].suffix}"
    return check_audio_path(arguments.output or default, arguments.audio_format, "--output")


def _options(arguments: argparse.Namespace, seed: int | None) -> GenerateOptions:
    return {
        "negative_prompt": arguments.negative_prompt,
        "audio_length_in_s": arguments.audio_length_in_s,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "num_waveforms_per_prompt": arguments.num_waveforms_per_prompt,
        "seed": seed,
        "scheduler": arguments.scheduler,
        "transcription": arguments.transcription,
        "window_length_in_s": arguments.window_length_in_s,
        "priority": arguments.priority,
        "timeout": arguments.timeout,
    }


def _is_like(origin: Origin, prompt: str, options: GenerateOptions) -> bool:
    """Whether a request is the one that made a file."""
    wanted: Mapping[str, Any] = {**options, "prompt": prompt}
    return all(wanted.get(name, value) == value for name, value in origin.arguments.items() if name in contract.INPUTS)


def report(order: Order, result: GenerationResult, rank: int, path: Path, latency_in_s: float) -> dict[str, Any]:
    """Returns what is said about a file, by name."""
    return {
        "path": str(path),
        "prompt": order.prompt,
        "length_in_s": result.duration_in_s,
        "seed": result.seed,
        "waveform": rank,
        "score": None if result.scores is None else round(float(result.scores[rank]), 6),
        "latency_in_s": round(latency_in_s, 3),
    }


def most_files(orders: Sequence[Order], num_waveforms: int) -> list[Path]:
    """Returns all files that orders may write."""
    return [path for order in orders for _, path in order.files(num_waveforms) if path != STANDARD_OUTPUT]
