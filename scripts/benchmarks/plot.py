"""`scripts/benchmark plot`: the rows of CSV files as pictures.

`concurrency.png`: throughput and latency over the requests in flight. `goodput.png`: answers within the objective over
the rate of Poisson arrivals.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row, read_rows
from benchmarks.setting import CACHE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("csv", type=Path, nargs="*", default=[CACHE / "benchmarks" / "load.csv"])
    parser.add_argument("--out", type=Path, default=CACHE / "benchmarks", help="a folder (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    rows = [row for path in arguments.csv for row in read_rows(path)]
    for written in draw(rows, arguments.out):
        print(written)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The pictures that there are rows for. Raises `ValueError` where there are none for any."""
    over_concurrency = [row for row in rows if row.concurrency is not None and row.clips_per_s is not None]
    over_rate = [row for row in rows if row.rate_per_s is not None and row.goodput_per_s is not None]
    if not over_concurrency and not over_rate:
        raise ValueError("plot: got no rows with throughput or goodput but expected some, as `load` and `gpu` write")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if over_concurrency:
        written.append(_draw_concurrency(over_concurrency, folder / "concurrency.png"))
    if over_rate:
        written.append(_draw_goodput(over_rate, folder / "goodput.png"))
    return written


def _draw_concurrency(rows: Sequence[Row], path: Path) -> Path:
    figure, (left, right) = _axes(2)
    _lines(left, rows, lambda row: row.concurrency, lambda row: row.clips_per_s)
    _lines(right, rows, lambda row: row.concurrency, lambda row: row.median_ms)
    for axis in (left, right):
        axis.set_xlabel("requests in flight")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    left.set_ylabel("clips per second")
    right.set_ylabel("median latency, ms")
    return _save(figure, left, rows, path)


def _draw_goodput(rows: Sequence[Row], path: Path) -> Path:
    figure, (axis,) = _axes(1)
    _lines(axis, rows, lambda row: row.rate_per_s, lambda row: row.goodput_per_s)
    axis.set_xlabel("requests per second, Poisson arrivals")
    objectives = ", ".join(f"{objective:.0f}" for objective in sorted({row.objective_ms or 0 for row in rows}))
    axis.set_ylabel(f"answers within {objectives} ms per second")
    limit = max(row.rate_per_s or 0 for row in rows)
    axis.plot([0, limit], [0, limit], color="lightgrey", zorder=0)  # all that is asked for
    return _save(figure, axis, rows, path)


def _axes(count: int) -> tuple[Any, list[Any]]:
    # Neither a screen nor pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * count, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def _lines(axis: Any, rows: Sequence[Row], x: Callable[[Row], Any], y: Callable[[Row], Any]) -> None:
    for path in dict.fromkeys(row.path for row in rows):
        # A later row of the same load replaces an earlier one.
        points = {x(row): y(row) for row in rows if row.path == path}
        axis.plot(sorted(points), [points[key] for key in sorted(points)], marker="o", label=path)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _save(figure: Any, labelled: Any, rows: Sequence[Row], path: Path) -> Path:
    labelled.legend(fontsize="small")
    row = rows[-1]
    figure.suptitle(
        f"{row.device}, {row.dtype}, {row.checkpoint}, {row.length_s:g} s, {row.steps} steps", fontsize="medium"
    )
    figure.savefig(path, dpi=120)
    return path
