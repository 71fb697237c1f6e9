"""A timeline as a trace for Perfetto or Chrome, and as a picture."""

from pathlib import Path
from typing import Any, Final

from benchmarks.timeline import CANCELLED, Timeline

FORWARDS: Final = 0  # the trace's first track; those of the requests follow
SIZE_IN_INCHES: Final = (11.0, 4.6)
DPI: Final = 110


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Returns trace events for ui.perfetto.dev or chrome://tracing: a track of forwards, and one for each request."""
    events: list[dict[str, Any]] = [_name(FORWARDS, "forwards of the UNet")]
    for number, life in enumerate(timeline.lives):
        track = number + 1
        events.append(_name(track, life.label))
        events.append({"ph": "i", "s": "t", "name": "arrived", **_at(track, life.arrived)})
        events.append({"ph": "i", "s": "t", "name": life.outcome, **_at(track, life.ended)})
    for index, forward in enumerate(timeline.forwards):
        labels = [timeline.lives[number].label for number in forward.requests]
        length = {"dur": 1e6 * (forward.end - forward.start)}
        said = {"args": {"items": forward.items, "requests": labels}}
        name = f"forward {index + 1}"
        for track in (FORWARDS, *(number + 1 for number in forward.requests)):
            events.append({"ph": "X", "name": name, **_at(track, forward.start), **length, **said})
        events.append({"ph": "C", "name": "items", **_at(FORWARDS, forward.start), "args": {"items": forward.items}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _at(track: int, seconds: float) -> dict[str, Any]:
    return {"pid": 1, "tid": track, "ts": 1e6 * seconds}


def _name(track: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": 1, "tid": track, "args": {"name": text}}


def draw_timeline(timeline: Timeline, path: Path, title: str) -> None:
    """Draws a .png file: a column for each forward, filled in the lines of the requests that it served."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_IN_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, len(timeline.lives) / 2))
    upper.set_title(title, fontsize=9)
    starts = [1000 * forward.start for forward in timeline.forwards]
    widths = [1000 * (forward.end - forward.start) for forward in timeline.forwards]
    items = [forward.items for forward in timeline.forwards]
    upper.bar(starts, items, widths, align="edge", color="#94a3b8", edgecolor="white", linewidth=0.4)
    upper.set_ylabel("items of\nthe forward", fontsize=8)
    for number, life in enumerate(timeline.lives):
        mine = [index for index, forward in enumerate(timeline.forwards) if number in forward.requests]
        lower.broken_barh(
            [(starts[index], widths[index]) for index in mine],
            (number - 0.4, 0.8),
            facecolor=f"C{number}",
            edgecolor="white",
            linewidth=0.4,
        )
        lower.plot(1000 * life.arrived, number, "k|", markersize=14)
        lower.plot(1000 * life.ended, number, "rx" if life.outcome == CANCELLED else "k.", markersize=8)
    lower.set(xlabel="ms since the first request came", ylim=(len(timeline.lives) - 0.5, -0.5))
    lower.set_yticks(range(len(timeline.lives)), [life.label for life in timeline.lives], fontsize=8)
    lower.set_xlim(left=0)
    figure.text(0.01, 0.01, "|  came    •  answered    ×  cancelled", fontsize=8)
    figure.savefig(path, format="png")
