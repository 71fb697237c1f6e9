"""Requests that wait for the decoder: whom it answers first, with whom, whom it drops, and when there are too many."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from asking import WAIT_IN_S, WAYS, Asking, Request, asking_a_server, check_failure
from audioldm2_triton import contract
from audioldm2_triton.server import faults
from audioldm2_triton.server.faults import RAISE, STALL
from audioldm2_triton.server.stage_thread import BATCH_ROWS
from metrics_page import read_metrics, wait_for_metrics
from plain_requests import infer_inputs
from supervised_server import wait_until


@pytest.fixture(scope="module")
def asking(tiny_checkpoint: Path, fault_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    with asking_a_server(tiny_checkpoint, fault_directory, tmp_path_factory.mktemp("queue") / "log") as asking:
        yield asking


def decoder_inputs(deadline_ns: int = 0, priority: str = contract.INTERACTIVE) -> list[grpc.InferInput]:
    """Latents of 0.16 s, as another stage would send them."""
    values: dict[str, tuple[str, np.ndarray]] = {
        "latents": ("FP32", np.zeros((1, 1, 8, 4, 16), np.float32)),
        "num_samples": ("INT32", np.array([[2560]], np.int32)),
        "return_scores": ("BOOL", np.array([[False]])),
        "text_embeds": ("FP32", np.zeros((1, 40), np.float32)),
        "deadline_ns": ("INT64", np.array([[deadline_ns]])),
        "priority": ("BYTES", np.array([[priority.encode()]], np.object_)),
    }
    inputs = [grpc.InferInput(name, array.shape, kind) for name, (kind, array) in values.items()]
    for tensor, (_, array) in zip(inputs, values.values(), strict=True):
        tensor.set_data_from_numpy(array)
    return inputs


def is_open(client: grpc.InferenceServerClient) -> bool:
    """Returns whether the first stage takes a request."""
    try:
        client.infer("text_conditioning", infer_inputs(grpc, Request("grpc").rows))
    except InferenceServerException as error:
        if "decoder is full" in error.message():
            return False
        raise
    return True


def test_a_decoder_that_falls_behind_closes_the_entrance(asking: Asking, fault_directory: Path) -> None:
    file = faults.arm(fault_directory, "decoder.VAE", STALL)
    answers: SimpleQueue[tuple[object, InferenceServerException | None]] = SimpleQueue()

    def answer(result: object, error: InferenceServerException | None) -> None:
        answers.put((result, error))

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        try:
            for _ in range(140):  # more than may be inside
                client.async_infer("decoder", decoder_inputs(), answer)
            wait_until(lambda: not is_open(client), "the decoder to count as full")
            for way in WAYS:
                codes = {"grpc": "StatusCode.UNAVAILABLE", "http": "503"}
                check_failure(asking.audio(Request(way)), Request(way), codes, "decoder is full; try again later")
        finally:
            file.unlink()
        failures = [error for _, error in (answers.get(timeout=WAIT_IN_S) for _ in range(140)) if error is not None]
        wait_until(lambda: is_open(client), "the entrance to open")
    assert failures == []
    request = Request("grpc")
    asking.check_right(request, asking.audio(request))
    asking.check_idle()


def wait_until_inside(asking: Asking, model: str, requests: int) -> None:
    gauge = f'audioldm2_stage_requests{{model="{model}"}}'
    wait_for_metrics(asking.server, lambda page: page[gauge] == requests, f"{requests} requests in {model}")


def test_interactive_requests_are_decoded_before_those_of_low_priority(asking: Asking, fault_directory: Path) -> None:
    file = faults.arm(fault_directory, "decoder.VAE", STALL)
    answers: SimpleQueue[str] = SimpleQueue()

    def send(priority: str) -> None:
        def answer(result: object, error: InferenceServerException | None) -> None:
            answers.put(priority if result else str(error))

        client.async_infer("decoder", decoder_inputs(priority=priority), answer)

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        try:
            for _ in range(25):
                send(contract.BATCH)
            wait_until_inside(asking, "decoder", 25)
            send(contract.INTERACTIVE)
            wait_until_inside(asking, "decoder", 26)
        finally:
            file.unlink()
        order = [answers.get(timeout=WAIT_IN_S) for _ in range(26)]
    assert sorted(order) == [contract.BATCH] * 25 + [contract.INTERACTIVE]
    # It came last, when a group was being decoded, and perhaps the next one had begun.
    assert order.index(contract.INTERACTIVE) <= 2 * BATCH_ROWS
    asking.check_idle()


def test_requests_that_wait_for_the_decoder_share_a_batch(asking: Asking, fault_directory: Path) -> None:
    stall = faults.arm(fault_directory, "decoder.VAE", STALL)
    answers: SimpleQueue[InferenceServerException | None] = SimpleQueue()

    def answer(result: object, error: InferenceServerException | None) -> None:
        assert (result is None) != (error is None)
        answers.put(error)

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        try:
            client.async_infer("decoder", decoder_inputs(), answer)
            wait_until(lambda: faults.has_struck(stall), "the first to be decoded")
            for _ in range(8):
                client.async_infer("decoder", decoder_inputs(), answer)
            wait_until_inside(asking, "decoder", 9)
            faults.arm(fault_directory, "decoder.vocoder", RAISE, times=2)  # strikes the first, and then the others
        finally:
            stall.unlink()
        errors = [answers.get(timeout=WAIT_IN_S) for _ in range(9)]
    assert len([error for error in errors if error is not None]) == 1
    said = r"a batch of (\d+) requests failed \(fault at decoder\.vocoder\)"
    # The last of them may have missed it.
    assert int(re.findall(said, asking.server.log.read_text())[-1]) >= 7
    asking.check_idle()


def test_what_nobody_waits_for_is_not_decoded(asking: Asking, fault_directory: Path) -> None:
    cancelled = 'audioldm2_stage_failures_total{model="decoder",reason="cancelled"}'
    answers: SimpleQueue[InferenceServerException | None] = SimpleQueue()

    def answer(result: object, error: InferenceServerException | None) -> None:
        assert (result is None) != (error is None)
        answers.put(error)

    def is_dropped() -> bool:
        """Cancels a request that waits, and returns whether the server knew of it when its turn came."""
        before = read_metrics(asking.server).get(cancelled, 0)
        file = faults.arm(fault_directory, "decoder.VAE", STALL)
        try:
            client.async_infer("decoder", decoder_inputs(), answer)
            wait_until(lambda: faults.has_struck(file), "the first to be decoded")
            call = client.async_infer("decoder", decoder_inputs(), answer)
            wait_until_inside(asking, "decoder", 2)
            call.cancel()
            assert "cancelled" in str(answers.get(timeout=WAIT_IN_S)).lower()
            client.is_server_live()
        finally:
            file.unlink()
        assert answers.get(timeout=WAIT_IN_S) is None
        asking.check_idle()
        return read_metrics(asking.server).get(cancelled, 0) == before + 1

    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        wait_until(is_dropped, "a cancelled request to be dropped")


def test_what_is_late_is_not_decoded(asking: Asking, fault_directory: Path) -> None:
    file = faults.arm(fault_directory, "decoder.VAE", RAISE)
    with grpc.InferenceServerClient(f"localhost:{asking.server.grpc_port}") as client:
        with pytest.raises(InferenceServerException, match="deadline exceeded"):
            client.infer("decoder", decoder_inputs(deadline_ns=time.monotonic_ns()))
        # Had it been decoded, before or after its answer, the fault would be spent.
        with pytest.raises(InferenceServerException, match=r"fault at decoder\.VAE"):
            client.infer("decoder", decoder_inputs())
        assert faults.has_struck(file)
        client.infer("decoder", decoder_inputs())
