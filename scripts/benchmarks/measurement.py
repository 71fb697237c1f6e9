"""What every command writes: one record per measurement, in columns that all commands share."""

import csv
import statistics
import types
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TextIO, get_args

import numpy as np


@dataclass(frozen=True)
class Record:
    """One measurement. An empty field does not apply, or was not measured; times are of the wall clock."""

    what: str  # the command
    path: str  # which way the work went, or which part of it
    device: str
    dtype: str
    torch: str
    checkpoint: str
    length_s: float | None = None
    steps: int | None = None
    guidance: float | None = None
    rows: float | None = None  # UNet batch items in one forward; the mean, where it varies
    concurrency: int | None = None  # requests in flight
    rate_per_s: float | None = None  # of Poisson arrivals
    samples: int | None = None  # how many measurements the record sums up
    median_ms: float | None = None
    p50_ms: float | None = None  # these three where single requests were timed
    p95_ms: float | None = None
    p99_ms: float | None = None
    answer_kib: float | None = None  # as it travels
    rtf: float | None = None  # median latency / seconds of audio: lower is better
    times_real_time: float | None = None
    clips_per_s: float | None = None
    objective_ms: float | None = None
    goodput_per_s: float | None = None  # answers within the objective
    gflop: float | None = None
    roofline_share: float | None = None  # of the floating-point rate of a large matrix product
    peak_memory_mib: float | None = None
    commit: str = ""
    date: str = ""
    command: str = ""
    note: str = ""


COLUMNS: Final = tuple(field.name for field in fields(Record))
_KEY: Final = (
    *("what", "path", "device", "dtype", "torch", "checkpoint", "length_s", "steps", "guidance", "rows", "concurrency"),
    "commit",
)
_HIDDEN: Final = ("what", "commit", "date", "command")  # in the CSV only


def with_latencies(record: Record, seconds: Sequence[float]) -> Record:
    """`record` with the percentiles of the latencies of single requests, and the real-time factor of their median."""
    timed = with_times(record, seconds)
    p50, p95, p99 = (float(1000 * value) for value in np.percentile(seconds, (50, 95, 99)))
    timed = replace(timed, p50_ms=p50, p95_ms=p95, p99_ms=p99)
    if record.length_s is None:
        return timed
    median = statistics.median(seconds)
    return replace(timed, rtf=median / record.length_s, times_real_time=record.length_s / median)


def with_times(record: Record, seconds: Sequence[float]) -> Record:
    """`record` with the median of the times of a part of the work."""
    return replace(record, samples=len(seconds), median_ms=1000 * statistics.median(seconds))


def append_record(path: Path, record: Record) -> None:
    """Adds to a file of such records, which is made where it is missing.

    Raises `ValueError` for a file of other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or not path.stat().st_size
    if not is_new:
        _check_columns(path)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow([_text(value) for value in astuple(record)])


def read_records(path: Path) -> list[Record]:
    """The records of a file; none where there is no file. Raises `ValueError` for a file of other columns."""
    if not path.exists():
        return []
    _check_columns(path)
    with path.open(newline="") as file:
        return [
            Record(**{field.name: _value(field.type, record[field.name]) for field in fields(Record)})
            for record in csv.DictReader(file)
        ]


def is_measured(records: Sequence[Record], record: Record) -> bool:
    """Returns whether `records` contain the same work on the same device."""

    def key(one: Record) -> list[str]:
        return [_text(getattr(one, name)) for name in _KEY]

    return any(key(other) == key(record) for other in records)


def print_table(records: Sequence[Record], out: TextIO) -> None:
    """A Markdown table of the columns that differ, after a line with those that do not."""
    if not records:
        return
    shown = [
        name
        for name in COLUMNS
        if name not in _HIDDEN and any(getattr(record, name) not in (None, "") for record in records)
    ]
    same = [
        name
        for name in shown
        if name != "path" and len({getattr(record, name) for record in records}) == 1 and name != "note"
    ]
    columns = [name for name in shown if name not in same or len(records) == 1]
    if len(records) > 1:
        print(", ".join(f"{name} {_short(getattr(records[0], name))}" for name in same) + "\n", file=out)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), file=out)
    for record in records:
        print("| " + " | ".join(_short(getattr(record, name)) for name in columns) + " |", file=out, flush=True)


def _check_columns(path: Path) -> None:
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(COLUMNS):
        raise ValueError(f"{path}: got the columns {', '.join(header)} but expected {', '.join(COLUMNS)}")


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return _text(value)


def _value(kind: Any, text: str) -> Any:
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if not text and type(None) in options:
        return None
    return options[0](text)
