"""What all commands are told, and what they note down about where they run."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch

from audioldm2_triton.server.settings import COMPILE, DTYPES, Settings, resolve_compile, resolve_device, resolve_dtype
from benchmarks.measurement import Record, append_record
from project import CACHE, ROOT

PARTS_THAT_COUNT: Final = ("model_repository", "client", "scripts")  # for the figures


@dataclass(frozen=True)
class Run:
    """The settings, the device and the dtype of a measurement, and the file for its records."""

    settings: Settings
    device: torch.device
    dtype: torch.dtype
    csv: Path
    record: Record  # with everything that the measurements of this run share

    @property
    def checkpoint(self) -> Path:
        return Path(self.settings.checkpoint)

    @property
    def compiles(self) -> bool:
        return resolve_compile(self.settings, self.device)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def serve_arguments(self) -> tuple[str, ...]:
        """The options for `scripts/serve` that make it serve in the same way."""
        given = asdict(replace(self.settings, device=str(self.device), dtype=self.dtype_name))
        return tuple(
            f"--{name.replace('_', '-')}={value}"
            for name, value in given.items()
            if value != "" and name != "checkpoint"
        )

    def in_dtype(self, name: str) -> "Run":
        """The same in another dtype, one of `DTYPES`."""
        settings = replace(self.settings, dtype=name)
        return replace(self, settings=settings, dtype=resolve_dtype(settings, self.device))

    def keep(self, record: Record) -> Record:
        """Writes a measurement down at once: what is interrupted later does not lose it."""
        append_record(self.csv, record)
        return record


def add_common_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    checkpoint = CACHE / "checkpoints" / "tiny"
    default_csv = CACHE / "benchmarks" / f"{command}.csv"
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help="default: a tiny one, built if missing")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:INDEX (default: auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: float16 on a GPU, else float32")
    parser.add_argument("--csv", type=Path, default=default_csv, help="rows are added to it (default: %(default)s)")
    parser.add_argument("--compile", choices=COMPILE, default="auto", help="torch.compile (default: auto: on a GPU)")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU (default: PyTorch's)")


def read_run(arguments: argparse.Namespace, command: str, script: str = "scripts/benchmark") -> Run:
    # The same for every way, in this process and in those that are started.
    threads = arguments.threads or int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    checkpoint: Path = arguments.checkpoint.expanduser()
    build_if_missing(checkpoint)
    settings = Settings(
        str(checkpoint.resolve()),
        device=arguments.device,
        dtype=arguments.dtype,
        compile=arguments.compile,
    )
    device = resolve_device(settings)
    dtype = resolve_dtype(settings, device)
    record = Record(
        what=command,
        path="",
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        checkpoint=checkpoint.name,
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([script, *sys.argv[1:]]),
    )
    return Run(settings, device, dtype, arguments.csv, record)


def build_if_missing(checkpoint: Path, size: str = "") -> None:
    """Builds one of random weights, whose cost is that of trained ones; its size is its name, if not given.

    Raises `FileNotFoundError` for a missing one of another name.
    """
    if checkpoint.exists():
        return
    from checkpoints.building import build
    from checkpoints.shapes import SIZES

    if (size or checkpoint.name) not in SIZES:
        raise FileNotFoundError(
            f"checkpoint: got {checkpoint} but expected a directory that exists, or one of {', '.join(SIZES)} to build"
        )
    build(size or checkpoint.name, checkpoint, report=lambda component: print(f"building {component}", file=sys.stderr))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.machine()}"


def commit() -> str:
    """The commit, with a plus where the code has changed since; empty outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", *PARTS_THAT_COUNT) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.strip()
