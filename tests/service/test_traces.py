"""A server that traces, as OPERATIONS.md says, with a collector; and its log in JSON, which names the trace."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tritonclient import grpc, http

from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.contract import DEFAULT_NUM_INFERENCE_STEPS
from collector import Collector, running_collector
from serving.local_server import LocalServer, local_server
from supervised_server import wait_until

pytestmark = pytest.mark.slow

PARENT = "00f067aa0ba902b7"
PARTS = ("audioldm2.text", "audioldm2.queue", "audioldm2.denoising", "audioldm2.decoding")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(
    tiny_checkpoint: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    options = (
        "mode=opentelemetry",
        "rate=1",
        "level=TIMESTAMPS",
        f"opentelemetry,url={collector.url}",
        "opentelemetry,resource=service.name=audioldm2",
        "opentelemetry,bsp_schedule_delay=500",
    )
    words = [word for option in options for word in ("--trace-config", option)]
    log = tmp_path_factory.mktemp("traced") / "log"
    with (
        mock.patch.dict(
            os.environ, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "500"}
        ),
        local_server(tiny_checkpoint, log, "--log-format=json", "--", *words) as server,
    ):
        yield server


def line(server: LocalServer, request_id: str) -> dict[str, Any]:
    """The object of a request in the log, whose other lines are Triton's own."""

    def found() -> list[dict[str, Any]]:
        said = server.log.read_text(errors="replace").splitlines()
        return [event for text in said if f'"request_id": "{request_id}"' in text and (event := json.loads(text))]

    (only,) = wait_until(found, "the line")
    return dict(only)


def complete(collector: Collector, trace: str, *names: str) -> dict[str, list[dict[str, Any]]]:
    wait_until(lambda: {*names} <= {*collector.of_trace(trace)}, f"the spans {names}")
    return collector.of_trace(trace)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_request_is_one_trace(protocol: str, traced: LocalServer, collector: Collector) -> None:
    trace = f"{ord(protocol[0]):032x}"
    module, port = (grpc, traced.grpc_port) if protocol == "grpc" else (http, traced.http_port)
    client = module.InferenceServerClient(f"localhost:{port}")
    prompt = module.InferInput("prompt", [1, 1], "BYTES")
    prompt.set_data_from_numpy(np.array([["rain"]], object))
    client.infer("audioldm2", [prompt], request_id=protocol, headers={"traceparent": f"00-{trace}-{PARENT}-01"})
    spans = complete(
        collector,
        trace,
        "InferRequest",
        "audioldm2",
        "text_conditioning",
        "denoiser",
        "decoder",
        "audioldm2.step",
        *PARTS,
    )
    (request,), (ensemble,), (decoder,) = (spans[name] for name in ("InferRequest", "audioldm2", "decoder"))
    assert request["parentSpanId"] == PARENT
    assert ensemble["parentSpanId"] == request["spanId"]
    assert decoder["parentSpanId"] == ensemble["spanId"]
    own = [spans[part][0] for part in PARTS]
    assert {span["parentSpanId"] for span in own} == {decoder["spanId"]}
    steps = sorted(spans["audioldm2.step"], key=lambda span: int(span["startTimeUnixNano"]))
    assert len(steps) == DEFAULT_NUM_INFERENCE_STEPS
    assert {span["parentSpanId"] for span in steps} == {spans["denoiser"][0]["spanId"]}
    (denoising,) = spans["audioldm2.denoising"]
    assert int(steps[-1]["endTimeUnixNano"]) <= int(denoising["endTimeUnixNano"])
    # One after the other, without a gap. Each is counted from the same clock.
    assert [span["endTimeUnixNano"] for span in own[:-1]] == [span["startTimeUnixNano"] for span in own[1:]]
    said = line(traced, protocol)
    assert said["traceparent"] == f"00-{trace}-{decoder['spanId']}-01"
    assert said["message"].startswith(f"request '{protocol}' is done; ")
    assert (said["level"], said["model"], said["outcome"]) == ("INFO", "decoder", "success")
    assert collector.services == {"audioldm2"}


def test_a_stream_begins_a_trace(traced: LocalServer, collector: Collector) -> None:
    """Without a traceparent, which the log line then tells."""
    with AudioLDM2Client(traced.grpc_url) as client:
        client.generate("rain", request_id="own")
    trace = line(traced, "own")["traceparent"].split("-")[1]
    spans = complete(collector, trace, "InferRequest", "audioldm2_stream", "audioldm2.step", *PARTS)
    assert {span["parentSpanId"] for part in PARTS for span in spans[part]} == {spans["audioldm2_stream"][0]["spanId"]}
