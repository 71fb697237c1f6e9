"""The priority of a request on its way through the stages."""

from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from audioldm2_triton import AudioLDM2Client, contract
from audioldm2_triton.server.stage_tensors import DENOISED
from plain_requests import infer_inputs
from serving.local_server import LocalServer


def call(server: LocalServer, model: str, tensors: dict[str, np.ndarray], outputs: tuple[str, ...]) -> Any:
    inputs = []
    for name, array in tensors.items():
        inputs.append(grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        answer = client.infer(model, inputs, outputs=[grpc.InferRequestedOutput(name) for name in outputs])
    return {name: answer.as_numpy(name) for name in outputs}


def conditioning(server: LocalServer, **rows: list[Any]) -> dict[str, np.ndarray]:
    inputs = infer_inputs(grpc, {"prompt": [b"rain"] * 2, "num_inference_steps": [2, 2], **rows})
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        answer = client.infer("text_conditioning", inputs)
    return {name: answer.as_numpy(name) for name in DENOISED}


def test_the_text_stage_passes_it_on(server: LocalServer) -> None:
    assert conditioning(server)["priority"].tolist() == [[b"interactive"]] * 2
    assert conditioning(server, priority=[b"batch"] * 2)["priority"].tolist() == [[b"batch"]] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([b"urgent"] * 2, "`priority`: got 'urgent' but expected one of interactive, batch"),
        ([b"batch", b"interactive"], "`priority`: got .* but expected the same value in all rows"),
    ],
)
def test_the_denoiser_reads_it(server: LocalServer, given: list[bytes], message: str) -> None:
    tensors = conditioning(server)
    latents = call(server, "denoiser", {n: t for n, t in tensors.items() if n != "priority"}, ("latents",))["latents"]
    assert latents.shape[0] == 2
    with pytest.raises(InferenceServerException, match=message):
        call(server, "denoiser", {**tensors, "priority": np.array(given, np.object_)[:, None]}, ("latents",))


def test_it_changes_no_audio(server: LocalServer) -> None:
    with AudioLDM2Client(server.grpc_url) as client:
        for on_progress in (None, lambda _: None):
            made = [
                client.generate("rain", seed=1, num_inference_steps=3, priority=priority, on_progress=on_progress).audio
                for priority in contract.PRIORITIES
            ]
            np.testing.assert_array_equal(*made)
