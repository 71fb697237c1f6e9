"""Requests by plain tritonclient, whole and streamed, as anyone might write them."""

from collections.abc import Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import numpy as np
from tritonclient import grpc

from audioldm2_triton import contract
from serving.local_server import LocalServer

WAIT_IN_S = 60
ADMIN_KEY = "key"
NUMPY_TYPES = {"BYTES": np.object_, "FP32": np.float32, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


def infer_inputs(module, rows: dict) -> list:
    inputs = []
    for name, values in rows.items():
        kind = contract.INPUTS[name]
        array = np.array(values, NUMPY_TYPES[kind]).reshape(-1, 1)
        tensor = module.InferInput(name, array.shape, kind)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


Response = dict[str, np.ndarray]


class Stream:
    """One gRPC stream, for requests of any number; the responses in the order in which they came."""

    def __init__(self, server: LocalServer, wait_in_s: float = WAIT_IN_S) -> None:
        self._wait_in_s = wait_in_s
        self._client = grpc.InferenceServerClient(f"localhost:{server.grpc_port}")
        self._arrived: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        self._client.start_stream(lambda result, error: self._arrived.put((result, error)))

    def send(self, rows: dict, **options: object) -> None:
        self._client.async_stream_infer(
            contract.STREAM, infer_inputs(grpc, rows), enable_empty_final_response=True, **options
        )

    def next(self) -> tuple[str, Response, bool]:
        """The next response: its request's id, its tensors, and whether it is that request's last."""
        result, error = self._arrived.get(timeout=self._wait_in_s)
        if error is not None:
            raise error
        response = result.get_response()
        tensors = {output.name: result.as_numpy(output.name) for output in response.outputs}
        return response.id, tensors, response.parameters["triton_final_response"].bool_param

    def responses(self) -> Iterator[Response]:
        """Those of the one request under way."""
        last = False
        while not last:
            _, tensors, last = self.next()
            yield tensors

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self._client.close()


def streamed(server: LocalServer, rows: dict, wait_in_s: float = WAIT_IN_S) -> list[Response]:
    with closing(Stream(server, wait_in_s)) as stream:
        stream.send(rows)
        return list(stream.responses())


def whole(server: LocalServer, rows: dict) -> Response:
    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        result = client.infer(contract.ENSEMBLE, infer_inputs(grpc, rows))
    return {name: result.as_numpy(name) for name in contract.OUTPUTS}


def check_responses(responses: list[Response], num_steps: int, num_chunks: int) -> Response:
    """Checks which responses there are and in which order; returns the last, with the joined `audio`."""
    *others, last = responses
    steps, chunks = others[:num_steps], others[num_steps:]
    assert [set(response) for response in steps] == [{"step", "num_steps"}] * num_steps
    assert [response["step"].tolist() for response in steps] == [[[step]] for step in range(1, num_steps + 1)]
    assert all(response["num_steps"].tolist() == [[num_steps]] for response in steps)
    assert [set(response) for response in chunks] == [{"audio", "chunk", "num_chunks", "sampling_rate"}] * num_chunks
    assert [response["chunk"].tolist() for response in chunks] == [[[chunk]] for chunk in range(num_chunks)]
    assert all(response["num_chunks"].tolist() == [[num_chunks]] for response in chunks)
    assert set(last) == {"score", "order", "seed_used", "sampling_rate"}
    assert last["order"].dtype == np.int32
    return {**last, "audio": np.concatenate([response["audio"] for response in chunks], axis=2)}


def on_test_ports(code: str, server: LocalServer) -> str:
    return code.replace("localhost:8001", f"localhost:{server.grpc_port}").replace(
        "localhost:8000", f"localhost:{server.http_port}"
    )
