"""`scripts/benchmark timeline`: what it records of a real engine, and what it makes of that."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from audioldm2_triton.server.settings import Settings
from benchmarks.commands.timeline import PLAN, Sketch, make_plan, recorded_engine
from benchmarks.timeline import ANSWERED, CANCELLED, Timeline
from benchmarks.timeline_pictures import chrome_trace, draw_timeline

SKETCHES: Final = (
    Sketch("DDIMScheduler", 6, 3.5, 1.0, 1, comes_after=0),
    Sketch("HeunDiscreteScheduler", 50, 2.0, 1.0, 1, comes_after=1, cancelled_after=5),
    Sketch("EulerDiscreteScheduler", 4, 1.0, 0.5, 2, comes_after=3),
    # The engine would be idle long before.
    Sketch("DDIMScheduler", 2, 1.0, 1.0, 1, comes_after=1000),
)
EVALUATIONS: Final = (6, None, 4, 2)
ITEMS: Final = (2, 2, 2, 1)


@pytest.fixture(scope="module")
def timelines(tiny_checkpoint: Path) -> Sequence[Timeline]:
    """Two runs of one plan."""
    settings = Settings(str(tiny_checkpoint), device="cpu")
    with recorded_engine(settings) as (engine, recorder):
        plan = make_plan(settings, 0.64, SKETCHES)
        return [recorder.run(engine, plan) for _ in range(2)]


def test_every_evaluation_is_in_a_forward(timelines: Sequence[Timeline]) -> None:
    for timeline in timelines:
        for number, evaluations in enumerate(EVALUATIONS):
            mine = sum(number in forward.requests for forward in timeline.forwards)
            # A request that is cancelled makes no evaluation after that.
            assert 0 < mine < 5 if evaluations is None else mine == evaluations
        for forward in timeline.forwards:
            assert forward.items == sum(ITEMS[number] for number in forward.requests)


def test_requests_come_and_go_in_time(timelines: Sequence[Timeline]) -> None:
    for timeline in timelines:
        ends = [forward.end for forward in timeline.forwards]
        assert ends == sorted(ends)
        assert [life.outcome for life in timeline.lives] == [ANSWERED, CANCELLED, ANSWERED, ANSWERED]
        for number, (sketch, life) in enumerate(zip(SKETCHES, timeline.lives, strict=True)):
            mine = [index for index, forward in enumerate(timeline.forwards) if number in forward.requests]
            assert min(mine) >= min(sketch.comes_after, len(timeline.forwards) - 2)
            assert life.arrived <= timeline.forwards[mine[0]].end
            assert timeline.forwards[mine[-1]].end <= life.ended
        assert any(len(forward.requests) > 1 for forward in timeline.forwards), "they did not share"


def test_a_trace_has_all_tracks(timelines: Sequence[Timeline]) -> None:
    timeline = timelines[-1]
    events = json.loads(json.dumps(chrome_trace(timeline)))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(names.values()) == ["forwards of the UNet", *(sketch.label(0.64) for sketch in SKETCHES)]
    complete = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] > 0 for event in complete)
    assert sum(event["tid"] == 0 for event in complete) == len(timeline.forwards)
    assert sum(event["tid"] == 1 for event in complete) == EVALUATIONS[0]
    assert [event["tid"] for event in events if event["name"] == CANCELLED] == [2]


def test_a_picture_is_small(timelines: Sequence[Timeline], tmp_path: Path) -> None:
    draw_timeline(timelines[-1], tmp_path / "timeline.png", "four requests")
    content = (tmp_path / "timeline.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 100_000


def test_the_plan_differs_in_everything() -> None:
    for name in ("scheduler", "steps", "guidance", "length", "candidates"):
        assert len({getattr(sketch, name) for sketch in PLAN}) > 2, name
    assert sum(sketch.cancelled_after is not None for sketch in PLAN) == 1
