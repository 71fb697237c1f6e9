"""What the command line prints: any text, whatever the encoding of the terminal, and what a server accepts."""

import io
import sys
from collections.abc import Mapping
from typing import Any

from audioldm2_triton.server_info import ServerInfo


def escape_unprintable() -> None:
    """Lets the standard streams escape what their encoding lacks, as `\\\\u6a21`, instead of raising an error.

    A name of a file is no reason to lose the work that was done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report_text(line: Mapping[str, Any]) -> str:
    """Returns what people read about a file."""
    score = "-" if line["score"] is None else f"{line['score']:.4f}"
    length, seed, latency = line["length_in_s"], line["seed"], line["latency_in_s"]
    return f"{line['path']}  {length:.2f} s  seed {seed}  score {score}  latency {latency:.2f} s"


def print_info(info: ServerInfo) -> None:
    """Prints what a server accepts, a line each."""
    unknown = "not published"
    native, rate = info.native_audio_length_in_s, info.sampling_rate
    lines = {
        "checkpoint": info.checkpoint or unknown,
        "native audio length": unknown if native is None else f"{native:g} s",
        "sampling rate": unknown if rate is None else f"{rate} Hz",
        "max audio length": f"{info.limits.max_audio_length_in_s:g} s",
        "max inference steps": str(info.limits.max_num_inference_steps),
        "max waveforms per prompt": str(info.limits.max_num_waveforms_per_prompt),
        "max prompts per request": str(info.max_batch_size),
        "transcription": info.transcription or unknown,
        "models": ", ".join(info.models) or unknown,
        "schedulers": "\n".join(
            f"{'' if index == 0 else ' ' * 26}{name}" for index, name in enumerate(info.schedulers)
        ),
    }
    for name, value in lines.items():
        print(f"{name + ':':26}{value}")
