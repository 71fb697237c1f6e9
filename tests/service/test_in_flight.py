"""In-flight batching on the real server: mixing, joining, overload, deadlines, metrics."""

import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from audioldm2_pipeline import Call, Reference, difference, generate, in_any_order, random_call
from audioldm2_triton import (
    AudioLDM2Client,
    DeadlineExceededError,
    GenerationResult,
    Progress,
    UnavailableError,
)
from audioldm2_triton.contract import SCHEDULERS
from metrics_page import is_idle, read_metrics, wait_for_metrics
from server_faults import faults_found_in, held_steps
from serving.local_server import LocalServer, local_server
from supervised_server import wait_until


def different_calls() -> list[Call]:
    """32 calls that differ in everything; few have many steps, so that the test ends."""
    generator = random.Random(7)
    steps = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15] + [1, 2, 3, 5] * 5
    calls = []
    for index in range(32):
        calls.append(
            random_call(
                generator,
                num_inference_steps=steps[index],
                scheduler=SCHEDULERS[index % len(SCHEDULERS)],
                audio_length_in_s=generator.choice([0.1, 0.2, 0.28, 0.37, 0.64]),
                num_waveforms_per_prompt=1 if steps[index] > 6 else generator.choice([1, 1, 2, 3]),
                guidance_scale=generator.choice([0.5, 1.0, 2.0, 3.5, 7.5]),
            )
        )
    return calls


def test_32_different_requests_at_once(server: LocalServer, reference: Reference) -> None:
    # The longest first. Each that ends lets the next one in, which joins those in flight on any machine.
    calls = sorted(different_calls(), key=lambda call: call.num_inference_steps, reverse=True)
    with AudioLDM2Client(server.grpc_url) as client:
        before = read_metrics(server)
        alone = [generate(client, call) for call in calls]
        between = wait_for_metrics(server, is_idle, "an idle server")
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda *call: generate(client, *call), calls, [True, False] * 16))
    after = wait_for_metrics(server, is_idle, "an idle server")
    name = "audioldm2_steps_total"
    forwards_alone, forwards_together = between[name] - before[name], after[name] - between[name]
    assert forwards_together < 0.75 * forwards_alone, "they did not share"
    for call, solo, mixed in zip(calls, alone, together, strict=True):
        expected = reference.generate(call)
        assert in_any_order(mixed.audio, solo.audio) <= reference.tolerance(call), call
        assert in_any_order(mixed.audio[:, : expected.shape[1]], expected) <= reference.tolerance(call), call


def test_a_short_request_overtakes_a_long_one(server: LocalServer) -> None:
    options = {"audio_length_in_s": 0.64, "seed": 1}
    cancelled = 'audioldm2_requests_total{engine="cpu",model="denoiser",outcome="cancelled"}'
    with AudioLDM2Client(server.grpc_url) as client:
        client.server_info()
        before = wait_for_metrics(server, is_idle, "an idle server")
        long = client.stream("rain", num_inference_steps=200, scheduler="HeunDiscreteScheduler", **options)
        with closing(long):
            assert isinstance(next(long), Progress)
            client.generate("rain", num_inference_steps=4, scheduler="DDIMScheduler", **options)
    # The long one could not have been cancelled had it been done.
    wait_for_metrics(
        server, lambda page: page[cancelled] == before[cancelled] + 1 and is_idle(page), "its cancellation"
    )


@pytest.fixture(scope="module")
def small_server(
    tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """Room for two guided waveforms, and for three requests that wait."""
    log = tmp_path_factory.mktemp("small") / "log"
    options = ("--max-active-rows=4", "--max-waiting=3", "--max-num-inference-steps=1000")
    with faults_found_in(fault_directory), local_server(tiny_checkpoint, log, *options) as running:
        yield running


def test_overload_is_refused_and_the_rest_is_right(
    small_server: LocalServer, fault_directory: Path, reference: Reference
) -> None:
    call = Call("rain", audio_length_in_s=0.2, num_inference_steps=12, seed=3)
    full = replace(call, num_waveforms_per_prompt=2, num_inference_steps=200)
    with AudioLDM2Client(small_server.grpc_url, max_retries=0) as client:
        expected = generate(client, call)
        before = wait_for_metrics(small_server, is_idle, "an idle server")

        def attempt(_: int) -> GenerationResult | UnavailableError:
            try:
                return generate(client, call)
            except UnavailableError as error:
                return error

        with ThreadPoolExecutor(51) as pool:
            with held_steps(fault_directory):
                filling = pool.submit(generate, client, full)
                wait_for_metrics(small_server, lambda page: page["audioldm2_rows_in_flight"] == 4, "a full engine")
                attempts = [pool.submit(attempt, index) for index in range(50)]
                wait_until(lambda: sum(each.done() for each in attempts) == 47, "all but those that may wait")
            outcomes = [each.result() for each in attempts]
            assert filling.result().num_waveforms == 2
    answered = [outcome for outcome in outcomes if isinstance(outcome, GenerationResult)]
    refused = [str(outcome) for outcome in outcomes if isinstance(outcome, UnavailableError)]
    assert (len(answered), len(refused)) == (3, 47)
    # By the engine, or at the entrance.
    full = r"denoiser is full(: \d+ requests in flight and \d+ waiting)?; (try again later|retry after \d+\.\d s)"
    assert all(re.search(full, message) for message in refused), refused
    for result in answered:
        assert difference(result.audio, expected.audio) <= reference.tolerance(call)
    after = wait_for_metrics(small_server, is_idle, "an idle server")
    # The largest forward was exactly as large as it may be.
    assert (
        after['audioldm2_rows_per_forward_bucket{engine="cpu",model="denoiser",le="4"}']
        == after["audioldm2_rows_per_forward_count"]
    )
    rows = after["audioldm2_rows_per_forward_sum"] - before["audioldm2_rows_per_forward_sum"]
    assert rows >= 0.8 * 4 * (after["audioldm2_steps_total"] - before["audioldm2_steps_total"])


def test_a_full_denoiser_closes_the_entrance(small_server: LocalServer, fault_directory: Path) -> None:
    filling = {"audio_length_in_s": 0.2, "num_inference_steps": 2, "num_waveforms_per_prompt": 2}  # takes all the room
    with AudioLDM2Client(small_server.grpc_url, max_retries=0) as client, ThreadPoolExecutor(4) as pool:
        client.server_info()
        before = wait_for_metrics(small_server, is_idle, "an idle server")
        with held_steps(fault_directory):
            calls = [pool.submit(client.generate, "rain", **filling) for _ in range(4)]
            wait_for_metrics(small_server, lambda page: page["audioldm2_requests_waiting"] == 3, "three that wait")
            for prompt in ("rain", ["rain"]):  # by the stream, by the ensemble
                with pytest.raises(UnavailableError, match="denoiser is full; try again later"):
                    client.generate(prompt, audio_length_in_s=0.2)
        assert [call.result().num_waveforms for call in calls] == [2, 2, 2, 2]
        wait_for_metrics(small_server, is_idle, "an idle server")
        assert client.generate("rain", audio_length_in_s=0.2, num_inference_steps=2).num_waveforms == 1
    after = wait_for_metrics(small_server, is_idle, "an idle server")
    for model in ("audioldm2_stream", "text_conditioning"):
        refused = f'audioldm2_stage_failures_total{{model="{model}",reason="unavailable"}}'
        assert after[refused] == before.get(refused, 0) + 1


def test_more_than_fits_runs_in_portions(small_server: LocalServer, reference: Reference) -> None:
    call = Call("rain", audio_length_in_s=0.2, num_inference_steps=5, num_waveforms_per_prompt=8)
    with AudioLDM2Client(small_server.grpc_url) as client:
        result = generate(client, call)
    assert result.num_waveforms == 8
    assert in_any_order(result.audio, reference.generate(call)) <= reference.tolerance(call)
    page = wait_for_metrics(small_server, is_idle, "an idle server")
    largest = 'audioldm2_rows_per_forward_bucket{engine="cpu",model="denoiser",le="4"}'
    assert page[largest] == page["audioldm2_rows_per_forward_count"]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_deadline_ends_the_request_in_the_denoiser(protocol: str, small_server: LocalServer) -> None:
    before = read_metrics(small_server)
    url = small_server.grpc_url if protocol == "grpc" else small_server.http_url
    with AudioLDM2Client(url) as client:
        client.server_info()
        with pytest.raises(DeadlineExceededError, match="deadline exceeded after"):
            client.generate("rain", num_inference_steps=900, audio_length_in_s=2.0, timeout=3.0)
    after = wait_for_metrics(small_server, is_idle, "an idle server")
    name = 'audioldm2_requests_total{engine="cpu",model="denoiser",outcome="deadline_exceeded"}'
    assert after[name] == before[name] + 1
    assert after["audioldm2_steps_total"] - before["audioldm2_steps_total"] < 900


def test_metrics_count_what_was_done(small_server: LocalServer) -> None:
    before = wait_for_metrics(small_server, is_idle, "an idle server")
    with AudioLDM2Client(small_server.http_url) as client:
        client.generate("rain", num_inference_steps=5, audio_length_in_s=0.64, num_waveforms_per_prompt=2, seed=1)
    after = wait_for_metrics(small_server, is_idle, "an idle server")
    gained = {name: after[name] - before[name] for name in before if after[name] != before[name]}
    assert gained["audioldm2_steps_total"] == 5
    assert gained["audioldm2_rows_per_forward_count"] == 5
    assert gained["audioldm2_rows_per_forward_sum"] == 5 * 4
    assert gained["audioldm2_step_duration_seconds_count"] == 5
    assert gained["audioldm2_step_duration_seconds_sum"] > 0
    assert gained["audioldm2_audio_seconds_total"] == pytest.approx(2 * 0.64)
    assert gained['audioldm2_requests_total{engine="cpu",model="denoiser",outcome="success"}'] == 1
    assert 'audioldm2_engine_broken{engine="cpu",model="denoiser"}' in after
    assert gained["audioldm2_request_queue_seconds_count"] == 1
