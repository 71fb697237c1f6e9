"""`scripts/loadtest` against a server that it did not start; no time is judged."""

import argparse
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from audioldm2_triton.contract import BATCH, Limits
from audioldm2_triton.server_info import ServerInfo
from benchmarks.commands import loadtest
from benchmarks.measurement import read_records
from benchmarks.perf_analyzer import find_perf_analyzer
from benchmarks.server_metrics import Change, change
from project import CACHE

if TYPE_CHECKING:
    from serving.local_server import LocalServer

INFO: Final = ServerInfo(Limits(), 10.24, 16_000, ("DDIMScheduler",), None, 8, True)
SHORT: Final = ("--audio-length-in-s=0.32", "--num-inference-steps=2", "--requests=4")


@pytest.fixture(scope="module")
def _perf_analyzer() -> None:
    try:
        find_perf_analyzer(CACHE / "perf_analyzer")
    except subprocess.CalledProcessError:
        pytest.skip("no perf_analyzer here, and no package index to install it from")


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    loadtest.add_arguments(parser)
    loadtest.measure(parser.parse_args(words))


@pytest.mark.usefixtures("_perf_analyzer")
def test_a_server_that_runs_under_load(
    server: "LocalServer", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\na dog barks\n")
    csv = tmp_path / "new" / "load.csv"
    metrics = f"--metrics=localhost:{server.metrics_port}"
    files = (f"--prompts={prompts}", f"--csv={csv}")
    run(server.grpc_url, server.http_url, metrics, *files, *SHORT, "--concurrency", "2", "--rates")
    records = read_records(csv)
    assert [(record.path, record.concurrency, record.samples) for record in records] == [("grpc", 2, 4), ("http", 2, 4)]
    for record in records:
        assert (record.device, record.dtype, record.length_s, record.steps) == ("cpu", "float32", 0.32, 2)
        assert record.note.startswith("server: 4 success")
        assert record.rows >= 2  # with guidance
    assert "| grpc |" in capsys.readouterr().out
    assert csv.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("_perf_analyzer")
def test_poisson_arrivals_and_what_fails_is_noted(server: "LocalServer", tmp_path: Path) -> None:
    csv = tmp_path / "load.csv"
    run(server.http_url, f"--csv={csv}", *SHORT, "--concurrency", "--rates", "5", "0.5")
    assert [(record.rate_per_s, record.samples) for record in read_records(csv)] == [(5, 5), (0.5, 4)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x" * 100_000)  # is refused
    with pytest.raises(SystemExit, match="perf_analyzer"):
        run(server.http_url, f"--prompts={prompts}", f"--csv={csv}", *SHORT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("grpc://localhost:9",), "localhost:9"),
        (("https://example.org",), "without TLS"),
        (("grpc://a:1", "grpc://b:1"), "one address for each protocol"),
    ],
)
def test_what_cannot_be_tested_is_refused_in_words(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        run(*words)


def test_a_checkpoint_that_speaks_says_the_prompts() -> None:
    plain, spoken = (
        loadtest.make_requests(["a", "b"], 3, ServerInfo(**{**vars(INFO), "transcription": needed}), length, 5, BATCH)
        for needed, length in ((None, None), ("required", 2.0))
    )
    assert plain[2] == {"prompt": "a", "seed": 2, "num_inference_steps": 5, "priority": "batch"}
    assert spoken[1] == {
        "prompt": "b",
        "transcription": "b",
        "seed": 1,
        "num_inference_steps": 5,
        "priority": "batch",
        "audio_length_in_s": 2.0,
    }


def test_the_harness_waits_longer_than_the_last_answer_can_take() -> None:
    one_by_one = 32 * 4.0
    assert loadtest.patience(32, 4.0, 0) > one_by_one
    assert loadtest.patience(32, 4.0, 0.01) > 32 / 0.01 + one_by_one


def test_what_a_server_did_between_two_looks() -> None:
    before = {
        'audioldm2_requests_total{engine="0",outcome="success"}': 3.0,
        "audioldm2_step_duration_seconds_sum": 0.5,
    }
    after = {
        'audioldm2_requests_total{engine="0",outcome="success"}': 7.0,
        'audioldm2_requests_total{engine="1",outcome="success"}': 1.0,
        'audioldm2_requests_total{engine="0",outcome="refused"}': 0.0,
        "audioldm2_step_duration_seconds_sum": 0.56,
        "audioldm2_step_duration_seconds_count": 3.0,
        "audioldm2_request_queue_seconds_sum": 0.01,
        "audioldm2_request_queue_seconds_count": 5.0,
    }
    found = change(before, after)
    assert found == Change(rows_per_forward=None, step_ms=pytest.approx(20.0), waited_ms=2.0, ended={"success": 5})
    assert str(found) == "server: 5 success, waited 2 ms, 20 ms a forward"
    assert str(change({}, {})) == ""
