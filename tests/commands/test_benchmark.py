"""`scripts/benchmark`: its arithmetic, its files and its plan; nothing here judges a time."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from audioldm2_triton.contract import ENSEMBLE
from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.settings import Settings
from benchmarks.commands import gpu
from benchmarks.commands.goodput import Way, judge, mean, send
from benchmarks.commands.latency import scale_up
from benchmarks.commands.load import Options, aim, with_answers
from benchmarks.flops import unet_gflop
from benchmarks.measurement import (
    Record,
    append_record,
    is_measured,
    print_table,
    read_records,
    with_latencies,
)
from benchmarks.perf_analyzer import goodput, read_profile_export, throughput
from benchmarks.run import Run
from benchmarks.whole_requests import MODEL, write_whole_request_repository
from checkpoints.shapes import component_config
from in_process.batcher import Batcher
from project import ROOT
from serving.local_server import LocalServer
from simulation.workload import Request

RECORD = Record("load", "engine, grpc", "CPU", "float32", "2.0", "tiny", length_s=0.64, steps=4, guidance=3.5)


def test_rows_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    records = [RECORD, replace(RECORD, concurrency=8, clips_per_s=1.25, note='a, "b"\nc'), replace(RECORD, rows=7.5)]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
    assert path.read_text().splitlines()[0] == ",".join(field.name for field in fields(Record))


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("device,time\ncpu,1\n")
    with pytest.raises(ValueError, match="got the columns device, time but expected what, path"):
        append_record(path, RECORD)
    with pytest.raises(ValueError, match="got the columns"):
        read_records(path)


def test_latencies_and_the_real_time_factor() -> None:
    record = with_latencies(replace(RECORD, length_s=2.0), [0.5, 1.0, 4.0])
    assert (record.median_ms, record.p50_ms, record.samples) == (1000, 1000, 3)
    assert record.rtf == 0.5  # latency / seconds of audio
    assert record.times_real_time == 2


def test_the_table_shows_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([replace(RECORD, concurrency=count, median_ms=1.0 * count) for count in (1, 2)], sys.stdout)
    first, _, header, _, *lines = capsys.readouterr().out.splitlines()
    assert "checkpoint tiny" in first
    assert header == "| path | concurrency | median_ms |"
    assert lines == ["| engine, grpc | 1 | 1 |", "| engine, grpc | 2 | 2 |"]


def write_export(path: Path, requests: list[tuple[int, list[int]]]) -> Path:
    """As perf_analyzer does, in nanoseconds."""
    content = [{"timestamp": sent, "response_timestamps": answers} for sent, answers in requests]
    path.write_text(json.dumps({"experiments": [{"experiment": {"mode": "request_rate"}, "requests": content}]}))
    return path


def test_goodput_of_a_profile_export(tmp_path: Path) -> None:
    second = 10**9
    export = write_export(
        tmp_path / "export.json",
        [
            (12 * second, [14 * second]),
            (10 * second, [10 * second + second // 2]),
            (11 * second, []),
            (13 * second, [15 * second]),
        ],
    )
    answered = read_profile_export(export)
    assert [request.latency for request in answered] == [0.5, 2.0, 2.0]  # in order of sending; one got no answer
    assert throughput(answered) == pytest.approx(3 / 5)
    assert goodput(answered, objective_s=1.0) == pytest.approx(1 / 5)
    assert goodput(answered, objective_s=2.0) == pytest.approx(3 / 5)  # the objective itself is within it
    record = with_answers(RECORD, answered, objective_ms=1000, rows=3.5)
    assert (record.goodput_per_s, record.clips_per_s, record.p50_ms, record.rows) == pytest.approx(
        (0.2, 0.6, 2000, 3.5)
    )


def test_goodput_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least one answer"):
        goodput([], 1.0)


def test_rates_and_objective_come_from_the_first_way_alone() -> None:
    options = Options(0.64, 4, (1,), (), 8, None)
    aimed = aim(options, [2.0, 1.0, 100.0])
    assert aimed.objective_ms == 6000
    assert aimed.rates_per_s == (0.25, 0.45, 0.75, 1.25)
    assert aim(aimed, [50.0]) == aimed  # the same for the ways that follow
    given = Options(0.64, 4, (1,), (3.0,), 8, 500)
    assert aim(given, [1.0]) == given


def test_a_mixture_is_judged_by_each_requests_own_time_alone() -> None:
    requests = [Request(1.0, 16, 4), Request(2.0, 16, 8), Request(3.0, 16, 4, is_batch=True), Request(4.0, 16, 4)]
    alone = {(16, 4, 1): 1.0, (16, 8, 1): 2.0}
    found = judge("laxity", 1.3, requests, [3.0, 6.5, 2.0, inf], alone)  # the last failed
    assert (found.way, found.load, found.p50, found.good) == ("laxity", 1.3, 3.0, 0.5)
    assert (found.throughput, found.goodput) == (3 / 7.5, 2 / 7.5)
    assert found.interactive_good == 1 / 3
    assert found.interactive_p99 == pytest.approx(6.465)
    other = replace(found, p50=5.0, good=1.0)
    assert mean([found, other, replace(found, load=2.0, p50=99.0)], "laxity", 1.3) == replace(found, p50=4.0, good=0.75)


def test_a_mixture_is_sent_and_what_fails_takes_for_ever(server: LocalServer) -> None:
    way = Way("laxity", ENSEMBLE, f"localhost:{server.grpc_port}", takes_priority=True)
    requests = [Request(0.0, 8, 2), Request(0.1, 8, 2, waveforms=2, is_batch=True), Request(0.2, 8, 0)]
    latencies = send(way, requests)
    assert all(0 < latency < inf for latency in latencies[:2])
    assert latencies[2] == inf


def test_scaling_up_leaves_the_fixed_cost_alone() -> None:
    assert scale_up(2, 5.0, 4, 7.0, 200) == 203.0  # 3 s and 1 s a step


def test_the_unet_of_base_has_the_known_amount_of_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(component_config("base", "unet")))
    assert unet_gflop(tmp_path, rows=2, latent_frames=256, latent_width=16) == pytest.approx(341.5, rel=0.01)


def test_whole_requests_are_batched_only_where_asked_for(tmp_path: Path) -> None:
    for name, max_batch in (("dynamic", 8), ("one_by_one", 1)):
        write_whole_request_repository(tmp_path / name, Path("/weights"), torch.device("cpu"), "float32", max_batch)
        config = (tmp_path / name / MODEL / "config.pbtxt").read_text()
        assert ("dynamic_batching" in config) == (max_batch > 1)
        assert f"max_batch_size: {max_batch}" in config
        assert (tmp_path / name / MODEL / "1" / "model.py").exists()


def test_what_waits_is_computed_together() -> None:
    batches: list[list[int]] = []

    def double(items: Any) -> list[int]:
        batches.append(list(items))
        if 0 in items:
            raise ValueError("zero")
        return [2 * item for item in items]

    batcher: Batcher[int, int] = Batcher(double, max_items=3)
    futures = [batcher.submit(item) for item in range(1, 8)]
    assert [future.result(10) for future in futures] == [2, 4, 6, 8, 10, 12, 14]
    assert max(len(batch) for batch in batches) <= 3
    with pytest.raises(ValueError, match="zero"):
        batcher.submit(0).result(10)
    assert batcher.submit(4).result(10) == 8  # a failure is not the end
    batcher.close()


GEOMETRY = AudioGeometry(16000, 160, 4, 256, 8, 16, 8)


def test_gpu_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(RECORD, what="gpu")
    run = Run(Settings("/weights/tiny"), torch.device("cpu"), torch.float32, tmp_path / "gpu.csv", record)
    ran: list[str] = []

    def work(name: str) -> Any:
        def run(_: gpu.Loaded, record: Record) -> Record:
            ran.append(name)
            if name == "failing" and ran.count(name) == 1:
                raise RuntimeError("out of memory")
            return replace(record, median_ms=1.0)

        return run

    names = ("first", "failing", "last")
    measurements = [gpu.Measurement(replace(run.record, path=name), work(name)) for name in names]
    monkeypatch.setattr(gpu, "list_measurements", lambda *_: measurements)
    plan = gpu.make_plan(Namespace(size="tiny", audio_length_in_s=None), GEOMETRY)
    assert gpu.measure_all(run, GEOMETRY, plan, only=["first"]) == 0
    assert gpu.measure_all(run, GEOMETRY, plan) == 1
    assert read_records(run.csv)[1].note == "failed: RuntimeError: out of memory"
    assert gpu.measure_all(run, GEOMETRY, plan) == 0, "what failed is tried again"
    assert ran == ["first", "failing", "last", "failing"]


def test_gpu_tells_its_measurements_apart() -> None:
    plan = gpu.make_plan(Namespace(size="base", audio_length_in_s=None), GEOMETRY)
    for device in ("cpu", "cuda"):
        run = SimpleNamespace(
            record=replace(RECORD, what="gpu"), device=torch.device(device), settings=Settings("/weights/tiny")
        )
        records = [measurement.record for measurement in gpu.list_measurements(run, plan)]  # type: ignore[arg-type]
        for index, record in enumerate(records):
            assert not is_measured(records[:index], record), record
        assert {record.concurrency for record in records} >= {1, 31}


def test_the_budget_ends_whatever_runs() -> None:
    code = (
        "import threading; from argparse import Namespace; from pathlib import Path; "
        "from benchmarks.commands import gpu; gpu.end_after(0.1, Namespace(csv=Path('none'))); "
        "threading.Lock().acquire(); threading.Event().wait()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "the time of this call is used up" in run.stdout


@pytest.mark.slow
def test_gpu_command_end_to_end(tmp_path: Path) -> None:
    """On a CPU; a compiled UNet takes minutes here, so all but that."""
    csv = tmp_path / "gpu.csv"
    command = [ROOT / "scripts" / "benchmark", "gpu", "--device=cpu", "--size=tiny", "--compile=off", f"--csv={csv}"]
    run = subprocess.run([*command, "--budget-s=250"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "all measured" in run.stdout, run.stdout
    records = read_records(csv)
    assert not [record.note for record in records if record.note.startswith("failed")]
    assert len({record.path for record in records}) == 10
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert len(read_records(csv)) == len(records)  # nothing is done twice
