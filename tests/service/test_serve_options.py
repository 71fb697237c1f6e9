"""Options of the server that requests feel: the deadline of those that set none; negative prompts as a whole."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from tritonclient import grpc

from audioldm2_pipeline import Reference, difference, generate
from audioldm2_triton import AudioLDM2Client, DeadlineExceededError, contract
from audioldm2_triton.server.stage_tensors import DENOISED
from long_negative_prompt import CALL, NEGATIVE, PROMPT, embedded
from metrics_page import is_idle, wait_for_metrics
from plain_requests import infer_inputs
from serving.local_server import LocalServer, local_server

# Takes longer than the deadline at any pace of the machine.
LONG = {"num_inference_steps": 200, "audio_length_in_s": 5.0, "scheduler": "HeunDiscreteScheduler", "seed": 1}
SHORT = {"num_inference_steps": 1, "audio_length_in_s": 0.1, "seed": 1}


@pytest.fixture(scope="module")
def impatient_server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("impatient") / "log"
    with local_server(tiny_checkpoint, log, "--default-timeout-in-s=0.5", "--full-negative-prompt=on") as running:
        yield running


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("prompt", ["rain", ["rain"]], ids=["stream", "ensemble"])
def test_a_request_without_a_timeout_has_the_servers(
    protocol: str, prompt: str | list[str], impatient_server: LocalServer
) -> None:
    url = impatient_server.grpc_url if protocol == "grpc" else impatient_server.http_url
    with AudioLDM2Client(url) as client:
        with pytest.raises(DeadlineExceededError, match="deadline exceeded"):
            client.generate(prompt, **LONG)
        # Its own timeout is the one that counts.
        assert client.generate(prompt, **SHORT, timeout=60.0)
    wait_for_metrics(impatient_server, is_idle, "an idle server")


def test_a_direct_request_to_the_denoiser_has_it_too(impatient_server: LocalServer) -> None:
    rows = {
        "prompt": [b"rain"],
        **{name: [value.encode() if isinstance(value, str) else value] for name, value in LONG.items()},
    }
    with grpc.InferenceServerClient(f"localhost:{impatient_server.grpc_port}") as client:
        answer = client.infer("text_conditioning", infer_inputs(grpc, rows), timeout=60_000_000)
        inputs = []
        for output in answer.get_response().outputs:
            if output.name not in DENOISED or output.name == "deadline_ns":
                continue  # which the denoiser has no use for, or is to do without
            array = answer.as_numpy(output.name)
            inputs.append(grpc.InferInput(output.name, array.shape, output.datatype))
            inputs[-1].set_data_from_numpy(array)
        with pytest.raises(grpc.InferenceServerException, match="deadline exceeded") as caught:
            client.infer("denoiser", inputs, outputs=[grpc.InferRequestedOutput("latents")])
    assert caught.value.status() == "StatusCode.CANCELLED"
    assert contract.ENSEMBLE not in caught.value.message()
    wait_for_metrics(impatient_server, is_idle, "an idle server")


def test_a_long_negative_prompt_is_heard(
    impatient_server: LocalServer, server: LocalServer, reference: Reference
) -> None:
    pipeline = reference.pipeline
    pipeline.scheduler = getattr(diffusers, CALL.scheduler).from_config(reference.scheduler_config)
    expected = pipeline(
        **embedded(reference, NEGATIVE),
        audio_length_in_s=CALL.audio_length_in_s,
        num_inference_steps=CALL.num_inference_steps,
        guidance_scale=CALL.guidance_scale,
        generator=torch.Generator().manual_seed(CALL.seed),
    ).audios
    short = replace(CALL, negative_prompt="noise,")
    with AudioLDM2Client(impatient_server.grpc_url) as client:
        # Both in one request, so that they share their forwards.
        options = {"audio_length_in_s": CALL.audio_length_in_s, "num_inference_steps": CALL.num_inference_steps}
        long_result, short_result = client.generate(
            [PROMPT] * 2, negative_prompt=[NEGATIVE, short.negative_prompt], seed=CALL.seed, timeout=60.0, **options
        )
        streamed = client.generate(
            PROMPT,
            negative_prompt=NEGATIVE,
            guidance_scale=CALL.guidance_scale,
            seed=CALL.seed,
            timeout=60.0,
            **options,
        ).audio
    # What rounding comes to does not depend on the negative prompt.
    assert max(difference(audio, expected) for audio in (streamed, long_result.audio)) <= reference.tolerance(CALL)
    assert difference(short_result.audio, reference.generate(short)) <= reference.tolerance(short)
    assert "cut" not in impatient_server.log.read_text()
    with AudioLDM2Client(server.grpc_url) as client:
        cut = generate(client, CALL).audio
    assert difference(cut, reference.generate(CALL)) <= reference.tolerance(CALL)
    assert difference(cut, expected) > 1e-2
