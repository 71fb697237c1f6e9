"""The histograms of requests: each is counted once, where it ends, under the model that the client called."""

from collections.abc import Callable

import pytest

from audioldm2_triton import AudioLDM2Client, InvalidArgumentError
from metrics_page import is_idle, read_metrics, wait_for_metrics
from serving.local_server import LocalServer

SHORT = {"audio_length_in_s": 0.64, "num_inference_steps": 3}


def gained(server: LocalServer, act: Callable[[AudioLDM2Client], object], awaited: str) -> dict[str, float]:
    """What the request histograms have gained by a request, once `awaited` has."""
    before = read_metrics(server)
    with AudioLDM2Client(server.grpc_url) as client:
        act(client)
    after = wait_for_metrics(
        server, lambda page: is_idle(page) and page.get(awaited, 0) > before.get(awaited, 0), f"one more {awaited}"
    )
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


@pytest.mark.parametrize(("model", "prompt"), [("audioldm2", ["rain"]), ("audioldm2_stream", "rain")])
def test_a_request_is_measured_once(model: str, prompt: str | list[str], server: LocalServer) -> None:
    # The last observation that the model makes.
    last = f'audioldm2_request_steps_count{{model="{model}"}}'
    found = gained(server, lambda client: client.generate(prompt, **SHORT), last)
    outcome = f'{{model="{model}",outcome="success"}}'
    assert found[f"audioldm2_request_duration_seconds_count{outcome}"] == 1
    duration = found[f"audioldm2_request_duration_seconds_sum{outcome}"]
    assert found[f'audioldm2_request_real_time_factor_count{{model="{model}"}}'] == 1
    factor = found[f'audioldm2_request_real_time_factor_sum{{model="{model}"}}']
    assert factor == pytest.approx(duration / 0.64)
    assert found[last] == 1
    assert found[f'audioldm2_request_steps_sum{{model="{model}"}}'] == 3
    others = {name for name in found if "_request_duration_seconds_count{" in name}
    assert others == {f"audioldm2_request_duration_seconds_count{outcome}"}
    first = 'audioldm2_time_to_first_audio_seconds_{}{{model="audioldm2_stream"}}'
    assert found.get(first.format("count"), 0) == (1 if model == "audioldm2_stream" else 0)
    assert found.get(first.format("sum"), 0) <= duration
    for stage in ("text_conditioning", "denoiser"):
        assert found[f'audioldm2_stage_duration_seconds_count{{model="{stage}"}}'] == 1
        assert found[f'audioldm2_stage_duration_seconds_sum{{model="{stage}"}}'] <= duration


@pytest.mark.parametrize(("model", "prompt"), [("audioldm2", ["rain"]), ("audioldm2_stream", "rain")])
def test_a_request_that_is_refused_has_its_reason(model: str, prompt: str | list[str], server: LocalServer) -> None:
    def refused(client: AudioLDM2Client) -> None:
        with pytest.raises(InvalidArgumentError):
            client.generate(prompt, **SHORT, scheduler="Euler")

    name = f'audioldm2_request_duration_seconds_count{{model="{model}",outcome="invalid_argument"}}'
    found = gained(server, refused, name)
    assert found[name] == 1
    assert not any("_request_steps" in each or 'outcome="success"' in each for each in found)
