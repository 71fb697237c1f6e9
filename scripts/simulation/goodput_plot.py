"""A picture of goodput over load: a line for each way, in a panel for each number of devices."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from audioldm2_triton.plot import require_matplotlib

Points = Sequence[tuple[float, float]]
"""Loads, each with the share of the requests that are good."""


def save_goodput_plot(path: Path, title: str, panels: Mapping[str, Mapping[str, Points]]) -> Path:
    """Draws a .png file. Raises `ImportError` without matplotlib.

    Args:
        panels: by their titles; each has points by the names of its lines.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 3.5 * len(panels), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, lines) in zip(row, panels.items(), strict=True):
        for label, points in lines.items():
            axes.plot([load for load, _ in points], [100 * share for _, share in points], marker="o", label=label)
        axes.set_title(name)
        axes.set_xlabel("load, in multiples of the capacity")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    row[0].set_ylabel("good requests, %")
    row[-1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
