"""`scripts/benchmark formats`: the size of an answer, and what it costs, in each way to carry a sound.

A real server makes the same sound again and again, in one denoising step; what differs is how the sound travels.
Times are until the caller has samples, or the bytes of a file. The ways take turns, so that all see the same machine.
Encoding is also timed alone, in this process.
"""

import argparse
import base64
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from audioldm2_triton import contract
from audioldm2_triton.audio.encoding import encode_audio
from benchmarks.measurement import Record, print_table, with_latencies
from benchmarks.run import Run, add_common_arguments, read_run
from serving.local_server import LocalServer, local_server

LENGTHS_IN_S: Final = (10.24, 60.0)
PROMPT: Final = "A dog barks twice in the distance while leaves rustle in the wind"

Fetch = Callable[[], int]
"""Sends a request, reads the sound, and returns the bytes of the answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "formats")
    parser.add_argument("--audio-lengths-in-s", type=float, nargs="+", default=LENGTHS_IN_S, metavar="SECONDS")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--repeats", type=int, default=5)


def measure(arguments: argparse.Namespace) -> None:
    run = read_run(arguments, "formats")
    with (
        tempfile.TemporaryDirectory() as directory,
        local_server(run.checkpoint, Path(directory) / "log", *run.serve_arguments) as server,
    ):
        for length in arguments.audio_lengths_in_s:
            request = {
                "prompt": arguments.prompt,
                "audio_length_in_s": length,
                "num_inference_steps": 1,
                "guidance_scale": 1.0,
                "seed": 0,
            }
            records = _measure_ways(run, _ways(server, request), length, arguments.repeats)
            answer = _grpc_answer(server, request)
            encoders = _encoders(answer.as_numpy("audio")[0, 0], int(answer.as_numpy("sampling_rate")[0, 0]))
            records += _measure_ways(run, encoders, length, arguments.repeats)
            print_table(records, sys.stdout)
            print()


def _ways(server: LocalServer, request: Mapping[str, Any]) -> dict[str, Fetch]:
    files: dict[str, Fetch] = {
        f"{name}, gRPC": partial(_grpc_file, server, {**request, "audio_format": name})
        for name in contract.AUDIO_FORMATS
    }
    return {
        "floats, JSON": partial(_json_floats, server, request),
        "floats, HTTP binary": partial(_binary_floats, server, request),
        "floats, gRPC": partial(_grpc_floats, server, request),
        **files,
        "wav, JSON": partial(_json_file, server, {**request, "audio_format": "wav" + contract.AS_BASE64}),
    }


def _measure_ways(run: Run, ways: Mapping[str, Fetch], length_s: float, repeats: int) -> list[Record]:
    sizes = {way: fetch() for way, fetch in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats):
        print(f"{length_s:g} s: round {repeat + 1} of {repeats}", file=sys.stderr)
        for way, fetch in ways.items():
            start = time.perf_counter()
            fetch()
            seconds[way].append(time.perf_counter() - start)
    common = replace(run.record, length_s=length_s, steps=1, guidance=1.0, concurrency=1)
    return [
        run.keep(with_latencies(replace(common, path=way, answer_kib=sizes[way] / 1024), seconds[way])) for way in ways
    ]


def _encoders(samples: np.ndarray, sampling_rate: int) -> dict[str, Fetch]:
    def encode(name: str) -> int:
        return len(encode_audio(samples, sampling_rate, name, {}))

    return {f"{name}, encoding alone": partial(encode, name) for name in contract.AUDIO_FORMATS}


def _post(server: LocalServer, path: str, body: Mapping[str, Any]) -> bytes:
    url = f"{server.http_url}/v2/models/{contract.ENSEMBLE}/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as answer:
        return bytes(answer.read())


def _json_floats(server: LocalServer, request: Mapping[str, Any]) -> int:
    body = _post(server, "generate", request)
    np.array(json.loads(body)["audio"], np.float32)
    return len(body)


def _json_file(server: LocalServer, request: Mapping[str, Any]) -> int:
    body = _post(server, "generate", request)
    base64.b64decode(json.loads(body)["encoded_audio"])
    return len(body)


def _binary_floats(server: LocalServer, request: Mapping[str, Any]) -> int:
    tensors = [
        {"name": name, "shape": [1, 1], "datatype": contract.INPUTS[name], "data": [value]}
        for name, value in request.items()
    ]
    return len(_post(server, "infer", {"inputs": tensors, "parameters": {"binary_data_output": True}}))


def _grpc_floats(server: LocalServer, request: Mapping[str, Any]) -> int:
    answer = _grpc_answer(server, request)
    answer.as_numpy("audio")
    return int(answer.get_response().ByteSize())


def _grpc_file(server: LocalServer, request: Mapping[str, Any]) -> int:
    answer = _grpc_answer(server, request)
    answer.as_numpy("encoded_audio")
    return int(answer.get_response().ByteSize())


def _grpc_answer(server: LocalServer, request: Mapping[str, Any]) -> Any:
    from tritonclient import grpc
    from tritonclient.utils import triton_to_np_dtype

    with grpc.InferenceServerClient(f"localhost:{server.grpc_port}") as client:
        inputs = []
        for name, value in request.items():
            kind = contract.INPUTS[name]
            content = value.encode() if isinstance(value, str) else value
            inputs.append(grpc.InferInput(name, [1, 1], kind))
            inputs[-1].set_data_from_numpy(np.array([[content]], triton_to_np_dtype(kind)))
        return client.infer(contract.ENSEMBLE, inputs)
