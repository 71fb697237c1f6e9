"""`scripts/sound-quality sheet`: spectrograms of one generated clip per kind, each beside one of the library."""

import argparse
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.plot import log_mel_spectrogram
from demo_checkpoint import library
from demo_checkpoint.signals import SAMPLING_RATE
from demo_checkpoint.sounds import KINDS
from project import DEMO_CHECKPOINT
from serving.local_server import local_server
from sound_quality import experiments

_LIBRARY_SEED: Final = 104
_PAIRS_PER_ROW: Final = 3
_DYNAMIC_RANGE: Final = 60.0  # dB below the loudest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--out", type=Path, default=DEMO_CHECKPOINT.parent / "contact_sheet.png")


def measure(arguments: argparse.Namespace) -> None:
    requests = experiments.make_requests(len(KINDS))
    with tempfile.TemporaryDirectory() as folder, local_server(arguments.checkpoint, Path(folder) / "log") as server:
        clips = experiments.generate(server.grpc_url, requests)
    pairs = []
    for number, (request, clip) in enumerate(zip(requests, clips, strict=True)):
        generator = np.random.default_rng((_LIBRARY_SEED, number))
        pairs.append((request.prompt, clip[0], library.draw(generator, kind=request.kind, mixture=False).waveform))
    _save(arguments.out, pairs)
    print(arguments.out)


def _save(path: Path, pairs: list[tuple[str, NDArray[np.float32], NDArray[np.float32]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(pairs) // _PAIRS_PER_ROW)
    figure = Figure(figsize=(6 * _PAIRS_PER_ROW, 1.7 * rows), dpi=60, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2 * _PAIRS_PER_ROW, squeeze=False)
    for number, (prompt, *waveforms) in enumerate(pairs):
        row, column = divmod(number, _PAIRS_PER_ROW)
        for place, (waveform, what) in enumerate(zip(waveforms, ("generated", "library"), strict=True)):
            cell = axes[row, 2 * column + place]
            levels = log_mel_spectrogram(waveform / np.abs(waveform).max(), SAMPLING_RATE)
            cell.imshow(
                levels, origin="lower", aspect="auto", vmin=levels.max() - _DYNAMIC_RANGE, interpolation="nearest"
            )
            cell.set(xticks=[], yticks=[])
            cell.set_title(f"{KINDS[number]}: {prompt}" if place == 0 else what, fontsize=7, parse_math=False)
    figure.savefig(path, format="png")
