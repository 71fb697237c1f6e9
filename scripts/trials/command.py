"""What the commands of the trials share: their options, their checkpoint, and how they end."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import build_if_missing
from project import CACHE


def add_common_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--seed", type=int, default=0, help="the requests follow from it (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=CACHE / "trials" / f"{name}.log", help="of the server")


def add_load_arguments(parser: argparse.ArgumentParser, requests: int) -> None:
    parser.add_argument("--requests", type=int, default=requests, help="how many to send (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="how many send at a time (default: %(default)s)")


def tiny_checkpoint(arguments: argparse.Namespace) -> Path:
    """Returns the checkpoint, built if missing, and makes the folder of the log."""
    checkpoint = CACHE / "checkpoints" / "tiny"
    build_if_missing(checkpoint)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    return checkpoint


def end(name: str, failures: Sequence[str], log: Path) -> None:
    """Prints what has failed. Raises `SystemExit` if anything has."""
    for failure in failures:
        print(f"FAILED: {failure}")
    if failures:
        sys.exit(f"scripts/{name}: got the failures above but expected none; the server's log is {log}")
