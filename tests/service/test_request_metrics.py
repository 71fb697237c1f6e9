"""The histograms of requests: each is counted once, where it ends, under the model that the client called."""

import time
from collections.abc import Callable

import pytest

from audioldm2_triton import AudioLDM2Client, InvalidArgumentError
from metrics_page import is_idle, read_metrics, wait_for_metrics
from serving.local_server import LocalServer

SHORT = {"audio_length_in_s": 0.64, "num_inference_steps": 3}


def at_rest(server: LocalServer) -> dict[str, float]:
    """The page once nothing is in progress, and nothing of earlier requests is still to come."""
    page = wait_for_metrics(server, is_idle, "an idle server")
    while True:
        time.sleep(0.5)
        before, page = page, read_metrics(server)
        if all(page[name] == before.get(name) for name in page if name.startswith("audioldm2_")):
            return page


def gained(server: LocalServer, act: Callable[[AudioLDM2Client], object], *awaited: str) -> dict[str, float]:
    """What the page has gained by a request, once all that is awaited has."""
    before = at_rest(server)
    with AudioLDM2Client(server.grpc_url) as client:
        act(client)
    after = wait_for_metrics(
        server,
        lambda page: is_idle(page) and all(page.get(name, 0) > before.get(name, 0) for name in awaited),
        f"more of {awaited}",
    )
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


@pytest.mark.parametrize(("model", "prompt"), [("audioldm2", ["rain"]), ("audioldm2_stream", "rain")])
def test_a_request_is_measured_once(model: str, prompt: str | list[str], server: LocalServer) -> None:
    # The last observation that the model makes.
    last = f'audioldm2_request_steps_count{{model="{model}"}}'
    stages = [
        f'audioldm2_stage_duration_seconds_{{}}{{{{model="{stage}"}}}}' for stage in ("text_conditioning", "denoiser")
    ]
    awaited = [last, *(stage.format("count") for stage in stages)]
    found = gained(server, lambda client: client.generate(prompt, **SHORT), *awaited)
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
    for stage in stages:
        assert found[stage.format("count")] == 1
        assert found[stage.format("sum")] <= duration


@pytest.mark.parametrize(("model", "prompt"), [("audioldm2", ["rain"]), ("audioldm2_stream", "rain")])
def test_a_request_that_is_refused_has_its_reason(model: str, prompt: str | list[str], server: LocalServer) -> None:
    def refused(client: AudioLDM2Client) -> None:
        with pytest.raises(InvalidArgumentError):
            client.generate(prompt, **SHORT, scheduler="Euler")

    name = f'audioldm2_request_duration_seconds_count{{model="{model}",outcome="invalid_argument"}}'
    found = gained(server, refused, name)
    assert found[name] == 1
    assert not any("_request_steps" in each or 'outcome="success"' in each for each in found)
