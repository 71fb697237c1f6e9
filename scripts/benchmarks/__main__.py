"""`scripts/benchmark`: measurements, each one command."""

import argparse
import sys
from pathlib import Path
from typing import Final

from benchmarks import masks
from benchmarks.load import LoadOptions, measure_load

ROOT: Final = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    load_command = commands.add_parser("load", help="perf_analyzer over concurrency, against the pipeline one by one")
    load_command.add_argument("--checkpoint", type=Path, required=True)
    load_command.add_argument("--audio-length-in-s", type=float, default=0.64)
    load_command.add_argument("--num-inference-steps", type=int, default=20)
    load_command.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    load_command.add_argument("--requests", type=int, default=32, help="per concurrency (default: %(default)s)")
    load_command.add_argument("--csv", type=Path, help="where to write the table")
    load_command.set_defaults(measure=_load)
    masks_command = commands.add_parser("masks", help="mixed lengths in one forward, against groups of equal length")
    masks.add_arguments(masks_command)
    masks_command.set_defaults(measure=masks.measure_masks)
    arguments = parser.parse_args()
    arguments.measure(arguments)
    return 0


def _load(arguments: argparse.Namespace) -> None:
    options = LoadOptions(
        checkpoint=arguments.checkpoint,
        audio_length_in_s=arguments.audio_length_in_s,
        num_inference_steps=arguments.num_inference_steps,
        concurrencies=tuple(arguments.concurrency),
        request_count=arguments.requests,
        csv_file=arguments.csv,
        cache=ROOT / ".cache",
    )
    measure_load(options, sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
