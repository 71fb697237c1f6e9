"""`scripts/checkpoint`: builds a checkpoint with random weights, fetches one from the hub, or verifies one."""

import argparse
import sys
from pathlib import Path

from audioldm2_triton.terminal import escape_unprintable

from .shapes import SIZES


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 0 for success."""
    escape_unprintable()
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build a checkpoint with random weights")
    build.add_argument("size", choices=SIZES, help="the shape: an official one, or a tiny one for tests")
    build.add_argument("--out", type=Path, required=True, help="the new directory")
    build.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    build.set_defaults(command=_build)
    fetch = commands.add_parser("fetch", help="download a checkpoint from the Hugging Face hub")
    fetch.add_argument("repository", metavar="REPO_ID", help="for example cvssp/audioldm2")
    fetch.add_argument("--revision", default="main", help="a branch, a tag or a commit (default: %(default)s)")
    fetch.add_argument(
        "--variant", default="", help="of the weights: with fp16 the files *.fp16.safetensors (default: those without)"
    )
    fetch.add_argument("--out", type=Path, required=True, help="the new directory")
    fetch.set_defaults(command=_fetch)
    verify = commands.add_parser("verify", help="check that a checkpoint is complete and its shapes fit its configs")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(command=_verify)
    return parser


def _build(options: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from .building import build

    disable_progress_bar()
    try:
        build(
            options.size, options.out, options.seed, lambda component: print(f"building {component}", file=sys.stderr)
        )
    except OSError as error:
        return _fail(str(error))
    print(f"OK: {options.out}: {options.size} built with seed {options.seed}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from .hub import FetchError, fetch

    try:
        sha = fetch(options.repository, options.revision, options.out, options.variant)
    except FetchError as error:
        return _fail(str(error))
    print(f"OK: {options.out}: {options.repository} at {sha}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .verification import verify

    faults = verify(options.directory)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"OK: {options.directory}")
    return 1 if faults else 0


def _fail(message: str) -> int:
    print(f"checkpoint: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
