"""The options of the command line: what may be written, and what does not go together."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

import shtab

from audioldm2_triton import contract
from audioldm2_triton.audio.origin import Origin
from audioldm2_triton.files import STANDARD_OUTPUT, read_file_origin
from audioldm2_triton.players import PLAYERS
from audioldm2_triton.transport.endpoint import DEFAULT_URL
from audioldm2_triton.transport.resending import DEFAULT_MAX_RETRIES

BATCH_MAX_RETRIES: Final = 100  # nobody waits, and a full server has room again
MAX_SEEDS: Final = 10_000

EPILOG: Final = """\
With several waveforms per prompt, the best goes to out.wav and the others, in order of falling score, to out-1.wav,
out-2.wav and so on. With several seeds, each has a file, as out-seed7.wav. With several prompts or --batch, each file
is named after the number of its prompt, or the line, as 0001.wav. Existing files are overwritten. Each file is reported
on standard output (on standard error with -o -): path, length, seed, score, latency of its request.
Files say that they were generated, and how; --like makes their sound again.
Ctrl-C also cancels running requests on the server (over HTTP not with several requests).
`audioldm2 web` opens a page to listen on; `audioldm2 web --help` has its options.
Exit code: 0 for success; 1 if anything failed; 2 for a wrong command line; 130 after Ctrl-C.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="audioldm2",
        description="Generates audio from text with an AudioLDM 2 server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to do")
    what.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to hear; with several, -o is a directory")
    batch = what.add_argument(
        "--batch",
        metavar="FILE",
        type=Path,
        help="a file with one prompt per line, or - for standard input; blank lines are skipped",
    )
    like = what.add_argument(
        "--like",
        metavar="FILE",
        type=Path,
        help="make the sound of this file again; other options replace what the file says",
    )
    what.add_argument("--info", action="store_true", help="print what the server accepts")
    what.add_argument("--version", action="version", version=f"%(prog)s {version('audioldm2-triton')}")
    shtab.add_argument_to(
        what, "--print-completion", help="print what completes this command in a shell, and exit: bash, zsh or tcsh"
    )
    output = parser.add_argument_group("output")
    to = output.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        type=Path,
        help="a .wav, .flac, .ogg, .opus or .mp3 file, by default out.wav; - for a pipe, which gets the best waveform; "
        "with several prompts or --batch a directory, created if missing",
    )
    output.add_argument(
        "--audio-format",
        choices=contract.AUDIO_FORMATS,
        help="default: by the suffix, or wav; wav and flac have 16 bits, wavfloat does not clip",
    )
    plot = output.add_argument(
        "--plot", metavar="PATH", type=Path, help="also draw the best waveform to this .png file"
    )
    output.add_argument(
        "--play", action="store_true", help=f"also play the best waveform, with {', '.join(PLAYERS)}: the first on PATH"
    )
    output.add_argument("--json", action="store_true", help="report each file, or --info, as one line of JSON")
    for names_a_file in (batch, like, to, plot):
        names_a_file.complete = shtab.FILE  # type: ignore[attr-defined]
    _add_request(parser.add_argument_group("request"))
    server = parser.add_argument_group("server")
    server.add_argument("--url", default=DEFAULT_URL, help="default: %(default)s; also grpcs://, http://, https://")
    server.add_argument(
        "--model",
        default=contract.ENSEMBLE,
        help="default: %(default)s; another name if the server has several checkpoints",
    )
    server.add_argument(
        "--concurrency", metavar="N", type=int, default=8, help="requests at a time; default: %(default)s"
    )
    server.add_argument(
        "--max-retries",
        metavar="N",
        type=int,
        help="how often to try again where the server is full or cannot be reached; "
        f"default: {DEFAULT_MAX_RETRIES}, with several requests {BATCH_MAX_RETRIES}",
    )
    return parser


def _add_request(request: "argparse._ArgumentGroup") -> None:
    request.add_argument("--negative-prompt", metavar="TEXT", help="what not to hear")
    request.add_argument("--audio-length-in-s", metavar="SECONDS", type=float, help="default: the checkpoint's own")
    request.add_argument(
        "--num-inference-steps",
        metavar="STEPS",
        type=int,
        default=contract.DEFAULT_NUM_INFERENCE_STEPS,
        help="default: %(default)s",
    )
    request.add_argument(
        "--guidance-scale",
        metavar="SCALE",
        type=float,
        default=contract.DEFAULT_GUIDANCE_SCALE,
        help="default: %(default)s; up to 1 means no guidance",
    )
    request.add_argument(
        "--num-waveforms-per-prompt",
        metavar="N",
        type=int,
        default=contract.DEFAULT_NUM_WAVEFORMS_PER_PROMPT,
        help="candidates, ranked by their similarity to the prompt; default: %(default)s",
    )
    request.add_argument(
        "--seed",
        type=_seeds,
        default=(None,),
        metavar="SEED",
        help="a number, or several as 1..4: a variation for each; default: random; applies to every prompt",
    )
    request.add_argument("--scheduler", metavar="NAME", help="one of the names that --info prints")
    request.add_argument("--transcription", metavar="TEXT", help="the words to say, for checkpoints that speak")
    request.add_argument(
        "--window-length-in-s",
        metavar="SECONDS",
        type=float,
        default=contract.DEFAULT_WINDOW_LENGTH_IN_S,
        help="generate longer audio in overlapping windows of this length (best: the checkpoint's own); default: off",
    )
    request.add_argument(
        "--timeout", metavar="SECONDS", type=float, help="when to give up a request; default: when the server does"
    )
    request.add_argument(
        "--priority",
        choices=contract.PRIORITIES,
        help=f"what goes first on a busy server; default: {contract.DEFAULT_PRIORITY}; with several requests "
        f"{contract.BATCH}",
    )


def _seeds(given: str) -> Sequence[int]:
    first, dots, last = given.partition("..")
    try:
        seeds = range(int(first), int(last if dots else first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {given} but expected a number, or two as 1..4") from None
    if not 1 <= len(seeds) <= MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"got {given} but expected 1 to {MAX_SEEDS} seeds")
    return seeds


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Origin | None]:
    """Parses a command line; also returns the origin of its file to be like.

    Ends the program with 2 for a wrong command line. Raises `AudioLDM2Error` or `OSError` for a file to be like that
    cannot be read.
    """
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    origin = None
    if arguments.like is not None:
        origin = read_file_origin(arguments.like)
        said = {name: value for name, value in origin.arguments.items() if name in contract.INPUTS}
        prompt, seed = said.pop("prompt"), said.pop("seed")
        parser.set_defaults(**said, seed=(seed,))
        arguments = parser.parse_intermixed_args(argv)
        if not arguments.prompt and arguments.batch is None:
            arguments.prompt = [prompt]
    _check(parser, arguments)
    return arguments, origin


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if sum((bool(arguments.prompt), arguments.batch is not None, arguments.info)) != 1:
        parser.error("expected one of PROMPT, --batch FILE, --like FILE and --info")
    many = arguments.batch is not None or len(arguments.prompt) > 1
    if many and (arguments.output is None or arguments.plot is not None):
        parser.error("several prompts and --batch need -o DIRECTORY and cannot be combined with --plot")
    if len(arguments.seed) > 1 and arguments.plot is not None:
        parser.error("several seeds cannot be combined with --plot")
    several = many or len(arguments.seed) > 1
    if arguments.output == STANDARD_OUTPUT:
        if several:
            parser.error("-o - is for one prompt with one seed")
        if sys.stdout.isatty():
            parser.error("-o -: got a terminal but expected a pipe or a file")
    if arguments.priority is None:
        arguments.priority = contract.BATCH if several else contract.DEFAULT_PRIORITY
    if arguments.max_retries is None:
        arguments.max_retries = BATCH_MAX_RETRIES if several else DEFAULT_MAX_RETRIES
    if arguments.max_retries < 0:
        parser.error(f"argument --max-retries: got {arguments.max_retries} but expected at least 0")
    if arguments.concurrency < 1:
        parser.error(f"argument --concurrency: got {arguments.concurrency} but expected at least 1")
