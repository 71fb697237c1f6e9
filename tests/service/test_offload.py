"""A real server with `offload=on`: the same audio, from both fronts at once, with one stage at a time on the device."""

import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from audioldm2_pipeline import Call, Reference, generate, in_any_order, random_call
from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.server.device_lease import DeviceLease
from metrics_page import is_idle, wait_for_metrics
from serving.local_server import LocalServer, local_server

# Texts of no other test: what a server has in its cache was encoded together with others, and has other last bits.
CALLS = (
    Call("Rain on the roof of a barn", "a low quality recording", 0.64, 3, 3.5, seed=7),
    Call("Two dogs bark", "", 0.4, 2, 1.0, num_waveforms_per_prompt=2, seed=8, scheduler="HeunDiscreteScheduler"),
)


@pytest.fixture(scope="module")
def offloading_server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(tiny_checkpoint, tmp_path_factory.mktemp("offload") / "log", "--offload=on") as running:
        yield running


def test_no_bit_of_the_audio_changes(server: LocalServer, offloading_server: LocalServer) -> None:
    with (
        AudioLDM2Client(server.grpc_url) as resident,
        AudioLDM2Client(offloading_server.grpc_url) as offloaded,
    ):
        for client in (resident, offloaded):
            client.server_info()
        for call in CALLS:
            for ensemble in (True, False):
                expected, audio = (generate(client, call, ensemble).audio for client in (resident, offloaded))
                np.testing.assert_array_equal(audio, expected)
    stages = re.findall(r"(\w+): offload: \d+ MB of weights in a mapped file", offloading_server.log.read_text())
    assert sorted(stages) == ["decoder", "denoiser", "text_conditioning"]


def test_both_fronts_at_once(offloading_server: LocalServer, reference: Reference) -> None:
    generator = random.Random(5)
    lengths = [generator.choice([0.2, 0.37, 0.64]) for _ in range(16)]
    calls = [random_call(generator, audio_length_in_s=length) for length in lengths]
    with AudioLDM2Client(offloading_server.grpc_url) as client, ThreadPoolExecutor(16) as pool:
        client.server_info()
        results = list(pool.map(lambda call, ensemble: generate(client, call, ensemble), calls, [True, False] * 8))
    for call, result in zip(calls, results, strict=True):
        expected = reference.generate(call)
        assert in_any_order(result.audio[:, : expected.shape[1]], expected) <= reference.tolerance(call), call


def test_no_stage_works_while_another_has_the_device(offloading_server: LocalServer) -> None:
    wait_for_metrics(offloading_server, is_idle, "an idle server")
    answered = Event()

    def run() -> None:
        with AudioLDM2Client(offloading_server.grpc_url) as client:
            client.generate("a sound that was not asked for before", audio_length_in_s=0.2, num_inference_steps=2)
        answered.set()

    with closing(DeviceLease("cpu")) as lease:
        lease.acquire()
        thread = Thread(target=run)
        thread.start()
        waited = Event()
        while not lease.is_wanted():
            assert not waited.wait(0.01)
        wait_for_metrics(
            offloading_server,
            lambda page: page['audioldm2_stage_requests{model="text_conditioning"}'] == 1,
            "a request in the text stage",
        )
        assert not answered.is_set()
    thread.join(timeout=120)
    assert answered.is_set()
