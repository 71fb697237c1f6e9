"""Explicit model control on a supervised server: models are loaded and unloaded on request, and still watched."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from audioldm2_triton import AudioLDM2Client, UnavailableError
from environments import environment
from plain_requests import ADMIN_KEY, Stream, check_responses, streamed, whole
from project import ROOT
from server_faults import faults_found_in, held_steps, wait_for_requests
from serving.local_server import LocalServer, local_server
from serving.model_control import models_may_change, was_unloaded
from supervised_server import health, stage, stages, wait_until

MODELS = ("audioldm2", "audioldm2_stream", "decoder", "denoiser", "text_conditioning")
KEY = {"triton-grpc-protocol-admin-key": ADMIN_KEY}
ROWS = {"prompt": [b"a dog"], "num_inference_steps": [100], "audio_length_in_s": [1.0], "seed": [1]}


@pytest.fixture(scope="module")
def controlled(
    tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A server from a tree of its own, as after a clone: without bytecode, which other tests' imports make here."""
    folder = tmp_path_factory.mktemp("controlled")
    for name in ("scripts", "model_repository"):
        ignored = shutil.ignore_patterns("__pycache__", "demo_checkpoint")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUDIOLDM2_ENVIRONMENT", str(environment("product")))
        patch.setattr("serving.local_server.SERVE", folder / "scripts" / "serve")
        options = (f"--admin-key={ADMIN_KEY}", "--", "--model-control-mode=explicit", "--load-model=*")
        with faults_found_in(fault_directory), local_server(tiny_checkpoint, folder / "log", *options) as server:
            yield server


@pytest.fixture
def control(controlled: LocalServer) -> Iterator[grpc.InferenceServerClient]:
    with grpc.InferenceServerClient(f"localhost:{controlled.grpc_port}") as client:
        yield client


def states(control: grpc.InferenceServerClient) -> dict[str, str]:
    return {model.name: model.state for model in control.get_model_repository_index(headers=KEY).models}


def test_loading_what_has_not_changed_restarts_nothing(
    controlled: LocalServer, control: grpc.InferenceServerClient
) -> None:
    before = stages(controlled)
    assert len(before) == 4
    whole(controlled, ROWS)  # by now all that a stage imports has been imported
    for model in MODELS:
        control.load_model(model, headers=KEY)
    assert states(control) == dict.fromkeys(MODELS, "READY")
    assert stages(controlled) == before


def test_unloading_answers_what_is_inside_and_loading_serves_again(
    controlled: LocalServer, control: grpc.InferenceServerClient, fault_directory: Path
) -> None:
    right = whole(controlled, ROWS)["audio"]
    with ThreadPoolExecutor(1) as pool, closing(Stream(controlled)) as stream:
        with held_steps(fault_directory):
            call = pool.submit(whole, controlled, ROWS)
            stream.send(ROWS)
            wait_for_requests(controlled, 2)
            control.unload_model("denoiser", headers=KEY)
        np.testing.assert_allclose(call.result()["audio"], right, atol=1e-5)
        np.testing.assert_allclose(check_responses(list(stream.responses()), 100, 1)["audio"], right, atol=1e-5)
    # The ensemble goes with its step; the stream asks for its stages when it is called.
    expected = {name: "UNAVAILABLE" if name in ("audioldm2", "denoiser") else "READY" for name in MODELS}
    wait_until(lambda: states(control) == expected, "the denoiser to be unloaded")
    wait_until(lambda: "denoiser" not in stages(controlled).values(), "its process to end")
    with AudioLDM2Client(controlled.grpc_url, max_retries=0) as client, pytest.raises(UnavailableError, match="audio"):
        client.generate("a dog")
    with pytest.raises(InferenceServerException, match=r"denoiser.* is not ready"):
        streamed(controlled, ROWS)
    assert health(controlled, "/live")[1]["restarts"] == 0
    for model in ("denoiser", "audioldm2"):
        control.load_model(model, headers=KEY)
    np.testing.assert_allclose(whole(controlled, ROWS)["audio"], right, atol=1e-5)
    np.testing.assert_allclose(check_responses(streamed(controlled, ROWS), 100, 1)["audio"], right, atol=1e-5)
    wait_until(lambda: health(controlled)[0] == 200, "readiness")
    assert health(controlled)[1]["restarts"] == 0


@pytest.mark.slow
def test_a_model_that_was_loaded_later_is_watched_too(
    controlled: LocalServer, control: grpc.InferenceServerClient
) -> None:
    control.unload_model("text_conditioning", headers=KEY)
    wait_until(lambda: "text_conditioning" not in stages(controlled).values(), "its process to end")
    for model in ("text_conditioning", "audioldm2"):
        control.load_model(model, headers=KEY)
    wait_until(lambda: health(controlled)[0] == 200, "readiness")
    log = controlled.log.read_text()
    assert log.count("text_conditioning was unloaded") == 1
    stage(controlled, "text_conditioning").kill()
    wait_until(lambda: health(controlled)[1]["restarts"] == 1, "the failure to be noticed")
    assert "text_conditioning" in health(controlled, "/live")[1]["reason"]
    wait_until(lambda: health(controlled)[0] == 200, "readiness")
    whole(controlled, ROWS)


@pytest.mark.parametrize(
    ("states", "living", "unloaded"),
    [
        ({"decoder": "READY"}, {}, False),  # Triton does not notice a death
        ({"decoder": "UNLOADING"}, {}, True),
        ({"decoder": "UNAVAILABLE"}, {}, True),
        ({}, {}, True),  # its folder was removed, under `poll`
        ({"decoder": "READY"}, {"decoder": 6.0}, True),  # reloaded
        ({"decoder": "READY"}, {"decoder": 4.0}, False),  # another instance
    ],
)
def test_who_has_died_and_who_was_unloaded(states: dict[str, str], living: dict[str, float], unloaded: bool) -> None:
    assert was_unloaded("decoder", 5.0, states, living) is unloaded


def test_the_last_mode_given_counts() -> None:
    assert not models_may_change(["--log-verbose=1"])
    assert models_may_change(["--model-control-mode=poll"])
    assert not models_may_change(["--model-control-mode=explicit", "--model-control-mode=none"])
