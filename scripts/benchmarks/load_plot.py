"""A picture of a load test: throughput and latency over concurrency and over the rate of arrivals."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from audioldm2_triton.plot import require_matplotlib
from benchmarks.measurement import Record


def save_load_plot(path: Path, records: Sequence[Record]) -> Path:
    """Draws a .png file. Raises `ImportError` without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col")
    measured = [record for record in records if record.samples]
    for column, what in enumerate(("concurrency", "rate_per_s")):
        shown = [record for record in measured if getattr(record, what) is not None]
        for name, group in groupby(shown, key=lambda record: record.path):
            rows = list(group)
            across = [getattr(record, what) for record in rows]
            upper, lower = axes[0][column], axes[1][column]
            (line,) = upper.plot(across, [record.clips_per_s for record in rows], marker="o", label=name)
            for percentile, style in (("p50_ms", "-"), ("p99_ms", "--")):
                heights = [getattr(record, percentile) for record in rows]
                label = f"{name}, {percentile.removesuffix('_ms')}"
                lower.plot(across, heights, style, marker="o", color=line.get_color(), label=label)
        for axis in (axes[0][column], axes[1][column]):
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if shown:
                axis.legend()
    axes[0][0].set_ylabel("answers a second")
    axes[1][0].set_ylabel("latency in ms")
    axes[1][0].set_xlabel("requests at a time")
    axes[1][1].set_xlabel("Poisson arrivals a second")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
