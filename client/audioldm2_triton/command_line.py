"""The arguments of the command line."""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Final

from audioldm2_triton import contract
from audioldm2_triton.transport.endpoint import DEFAULT_URL
from audioldm2_triton.transport.resending import DEFAULT_MAX_RETRIES

BATCH_MAX_RETRIES: Final = 100  # nobody waits, and a full server has room again

EPILOG: Final = """\
With several waveforms per prompt, the best goes to out.wav and the others, in order of falling score, to out-1.wav,
out-2.wav and so on. With --batch, each file is named after the line of its prompt, as 0001.wav. Existing files are
overwritten. Each file is reported on standard output: path, length, seed, score, latency of its request.
Ctrl-C also cancels running requests on the server (over HTTP not with --batch).
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
    what.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to hear")
    what.add_argument(
        "--batch",
        metavar="FILE",
        type=Path,
        help="a file with one prompt per line, or - for standard input; blank lines are skipped",
    )
    what.add_argument("--info", action="store_true", help="print what the server accepts")
    what.add_argument("--version", action="version", version=f"%(prog)s {version('audioldm2-triton')}")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        type=Path,
        help="a .wav (16-bit) or .flac file, by default out.wav; with --batch a directory, created if missing",
    )
    output.add_argument("--plot", metavar="PATH", type=Path, help="also draw the best waveform to this .png file")
    request = parser.add_argument_group("request")
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
    request.add_argument("--seed", type=int, help="default: random; with --batch a single seed applies to every prompt")
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
        help=f"what goes first on a busy server; default: {contract.DEFAULT_PRIORITY}, with --batch {contract.BATCH}",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", default=DEFAULT_URL, help="default: %(default)s; also grpcs://, http://, https://")
    server.add_argument(
        "--model",
        default=contract.ENSEMBLE,
        help="default: %(default)s; another name if the server has several checkpoints",
    )
    server.add_argument(
        "--concurrency", metavar="N", type=int, default=8, help="requests of a --batch at a time; default: %(default)s"
    )
    server.add_argument(
        "--max-retries",
        metavar="N",
        type=int,
        help="how often to try again where the server is full or cannot be reached; "
        f"default: {DEFAULT_MAX_RETRIES}, with --batch {BATCH_MAX_RETRIES}",
    )
    return parser
