"""Converts arguments to tensors, and tensors to results, for both clients."""

import math
import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import serialize_byte_tensor

from audioldm2_triton import contract
from audioldm2_triton.errors import InternalError, InvalidArgumentError, invalid
from audioldm2_triton.result import GenerationResult
from audioldm2_triton.server_info import ServerInfo

T = TypeVar("T")
PerRow: TypeAlias = T | Sequence[T]  # one value for all prompts of a request, or one for each

DTYPES: Final[Mapping[str, Any]] = {
    "BYTES": np.object_,
    "FP32": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}

CLIENT_TIMEOUT_MARGIN_IN_S: Final = 2.0
"""How much longer than the server's deadline a client waits: the server answers at its next denoising step."""


class GenerateOptions(TypedDict, total=False):
    """The arguments of `generate` besides the prompt."""

    negative_prompt: PerRow[str | None]
    audio_length_in_s: float | None
    num_inference_steps: PerRow[int]
    guidance_scale: PerRow[float]
    num_waveforms_per_prompt: int
    seed: PerRow[int | None]
    scheduler: PerRow[str | None]
    return_scores: PerRow[bool | None]
    transcription: PerRow[str | None]
    window_length_in_s: PerRow[float]
    priority: str
    timeout: float | None
    request_id: str


@dataclass(frozen=True)
class InferRequest:
    """One request as it travels, with what is needed to read its answer."""

    tensors: Mapping[str, NDArray[Any]]  # [B, 1] each, by the names of the contract
    prompts: tuple[str, ...]  # one per row
    scored: tuple[bool, ...]  # per row: whether scores were asked for
    single: bool  # whether the prompt was one string: then there is one result, not a list
    timeout: float | None  # seconds
    request_id: str
    checkpoint: str | None = None  # of the server, as far as it is published

    @property
    def timeout_us(self) -> int | None:
        """The server's deadline, as Triton's request parameter `timeout`."""
        return None if self.timeout is None else max(1, round(self.timeout * 1e6))

    def arguments(self, row: int) -> dict[str, Any]:
        """Returns a row's values by the names of the contract, as plain Python values."""
        return {name: _plain(tensor[row, 0]) for name, tensor in self.tensors.items()}


def build_request(
    info: ServerInfo,
    prompt: str | Sequence[str],
    *,
    negative_prompt: PerRow[str | None] = None,
    audio_length_in_s: float | None = None,
    num_inference_steps: PerRow[int] = contract.DEFAULT_NUM_INFERENCE_STEPS,
    guidance_scale: PerRow[float] = contract.DEFAULT_GUIDANCE_SCALE,
    num_waveforms_per_prompt: int = contract.DEFAULT_NUM_WAVEFORMS_PER_PROMPT,
    seed: PerRow[int | None] = None,
    scheduler: PerRow[str | None] = None,
    return_scores: PerRow[bool | None] = None,
    transcription: PerRow[str | None] = None,
    window_length_in_s: PerRow[float] = contract.DEFAULT_WINDOW_LENGTH_IN_S,
    priority: str = contract.DEFAULT_PRIORITY,
    timeout: float | None = None,
    request_id: str = "",
) -> InferRequest:
    """The tensors of one request; arguments as in `AudioLDM2Client.generate`.

    All inputs of the contract are filled in, because Triton does not batch requests that differ in which optional
    inputs they have. Left out are a length that neither the caller nor the server has specified, and a transcription
    that is not given, because checkpoints that do not speak refuse one. `audio_format` is for those who have no client.

    Raises `InvalidArgumentError` for values that fit no tensor. All other checks are left to the server.
    """
    single = isinstance(prompt, str)
    prompts = [prompt] if single else _items(prompt)
    if prompts is None or not 1 <= len(prompts) <= info.max_batch_size:
        given = prompt if prompts is None else f"{len(prompts)} prompts"
        raise invalid("prompt", given, f"a string or a sequence of 1 to {info.max_batch_size} strings")
    length = info.native_audio_length_in_s if audio_length_in_s is None else audio_length_in_s
    num_waveforms = _integer("num_waveforms_per_prompt", num_waveforms_per_prompt, 32)

    def per_row(name: str, given: Any, convert: Callable[[str, Any], T], default: Any = None) -> list[T]:
        items = _items(given)
        if items is None:
            items = [given] * len(prompts)
        if len(items) != len(prompts):
            raise invalid(name, f"{len(items)} values", f"one value, or one for each of the {len(prompts)} prompts")
        return [convert(name, default if item is None else item) for item in items]

    texts = per_row("prompt", prompts, _text)
    columns: dict[str, Sequence[Any]] = {
        "prompt": [text.encode() for text in texts],
        "negative_prompt": _encoded(
            per_row("negative_prompt", negative_prompt, _text, contract.DEFAULT_NEGATIVE_PROMPT)
        ),
        "num_inference_steps": per_row("num_inference_steps", num_inference_steps, _int32),
        "guidance_scale": per_row("guidance_scale", guidance_scale, _number),
        "num_waveforms_per_prompt": [num_waveforms] * len(prompts),
        "seed": [_draw_seed() if item is None else item for item in per_row("seed", seed, _seed)],
        "scheduler": _encoded(per_row("scheduler", scheduler, _text, info.schedulers[0])),
        "return_scores": per_row("return_scores", return_scores, _boolean, num_waveforms > 1),
        "window_length_in_s": per_row("window_length_in_s", window_length_in_s, _number),
        "priority": [_text("priority", priority).encode()] * len(prompts),
    }
    if transcription is not None:
        columns["transcription"] = _encoded(per_row("transcription", transcription, _text, ""))
    if length is not None:
        columns["audio_length_in_s"] = [_number("audio_length_in_s", length)] * len(prompts)
    return InferRequest(
        tensors={name: _column(columns[name], dtype) for name, dtype in contract.INPUTS.items() if name in columns},
        prompts=tuple(texts),
        # Ranking needs the scores, so with several waveforms the server always sends them.
        scored=tuple(bool(asked) or num_waveforms > 1 for asked in columns["return_scores"]),
        single=single,
        timeout=check_timeout(timeout),
        request_id=request_id,
        checkpoint=info.checkpoint,
    )


def check_single(request: InferRequest) -> None:
    """Raises `InvalidArgumentError` for a request that a stream cannot carry."""
    if not request.single:
        raise invalid("prompt", f"{len(request.prompts)} prompts", "one string for a stream or with `on_progress`")


def check_timeout(timeout: float | None) -> float | None:
    """Raises `InvalidArgumentError` for a timeout that is not a positive, finite number of seconds."""
    if timeout is None:
        return None
    if not 0 < _number("timeout", timeout) < math.inf:
        raise invalid("timeout", timeout, "a positive number of seconds")
    return float(timeout)


def client_timeout(timeout: float | None) -> float | None:
    """Returns how many seconds the client itself waits for an answer; None: without limit."""
    return None if timeout is None else timeout + CLIENT_TIMEOUT_MARGIN_IN_S


def infer_inputs(request: InferRequest, input_class: Any) -> list[Any]:
    """The request's tensors as `InferInput`s, a class that `tritonclient.grpc` and `tritonclient.http` each have."""
    inputs = []
    for name, tensor in request.tensors.items():
        inputs.append(input_class(name, list(tensor.shape), contract.INPUTS[name]))
        inputs[-1].set_data_from_numpy(tensor)
    return inputs


def stream_message(request: InferRequest, model: str) -> Any:
    """Makes the gRPC `ModelInferRequest` to the streaming model beside the ensemble `model`."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=contract.stream_of(model), id=request.request_id)
    if request.timeout_us is not None:
        message.parameters["timeout"].int64_param = request.timeout_us
    for name, tensor in request.tensors.items():
        message.inputs.add(name=name, datatype=contract.INPUTS[name], shape=tensor.shape)
        data = serialize_byte_tensor(tensor).item() if tensor.dtype == np.object_ else tensor.tobytes()
        message.raw_input_contents.append(data)
    return message


def grpc_tensors(answer: Any) -> dict[str, NDArray[Any]]:
    """Returns all tensors in a gRPC `InferResult` by name."""
    return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}


def read_results(request: InferRequest, answer: Any) -> GenerationResult | list[GenerationResult]:
    """The results in an `InferResult`: one, or a list with one per row. Raises `InternalError` if it is incomplete."""
    outputs = {name: answer.as_numpy(name) for name in contract.OUTPUTS if name != "encoded_audio"}
    rows = len(request.prompts)
    for name, tensor in outputs.items():
        if tensor is None or len(tensor) != rows:
            given = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
            raise InternalError(f"the server's output `{name}`: got {given} but expected {rows} rows")
    results = [
        GenerationResult(
            # Copies: the tensors are read-only, and each keeps the memory of the whole answer.
            audio=outputs["audio"][row].copy(),
            scores=outputs["score"][row].copy() if request.scored[row] else None,
            seed=int(outputs["seed_used"][row, 0]),
            sampling_rate=int(outputs["sampling_rate"][row, 0]),
            prompt=request.prompts[row],
            arguments=request.arguments(row),
            checkpoint=request.checkpoint,
        )
        for row in range(rows)
    ]
    return results[0] if request.single else results


def _items(given: Any) -> list[Any] | None:
    """Returns the items of a sequence other than a string; None for anything else."""
    if isinstance(given, np.ndarray):
        return list(given) if given.ndim else None
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else None


def _column(values: Sequence[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # too large for FP32 becomes infinite, which the server refuses by name
        return np.array(values, DTYPES[dtype])[:, None]


def _plain(value: Any) -> Any:
    if isinstance(value, np.float32):
        return float(str(value))  # its shortest decimal, as the caller may have written it
    return value.decode() if isinstance(value, bytes) else value.item()


def _encoded(texts: Sequence[str]) -> list[bytes]:
    return [text.encode() for text in texts]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(name, value, "a string that can be encoded as UTF-8") from None
    return str(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise invalid(name, value, "a number")
    return float(value)


def _integer(name: str, value: Any, bits: int) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise invalid(name, value, "an integer") from None
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise invalid(name, value, f"an integer of {bits} bits")
    return number


def _int32(name: str, value: Any) -> int:
    return _integer(name, value, 32)


def _seed(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        return _integer(name, value, 64)
    except InvalidArgumentError:
        raise invalid(name, value, f"an integer from 0 to {contract.MAX_SEED}") from None


def _draw_seed() -> int:
    return secrets.randbelow(contract.NUM_DRAWN_SEEDS)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise invalid(name, value, "True or False")
    return bool(value)
