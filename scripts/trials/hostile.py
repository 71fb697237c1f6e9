"""Requests that no well-meaning client sends: a valid one with something broken in it, drawn at random."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from audioldm2_triton import contract

MODELS: Final = (*[contract.ENSEMBLE] * 6, *[contract.STREAM] * 3, "text_conditioning", "denoiser", "decoder")
"""Each model as often as it is attacked."""

MOST_BYTES: Final = 2**26  # of a tensor: what it is to break is the server
_FORMATS: Final = {"INT32": "<i", "INT64": "<q", "FP32": "<f", "BOOL": "<?", "INT16": "<h", "UINT8": "<B", "FP64": "<d"}
_DATATYPES: Final = ("BOOL", "UINT8", "INT16", "INT32", "INT64", "FP32", "FP64", "BYTES", "FP16", "BF16", "FP128", "")
_TEXTS: Final = (
    *(b"", b" ", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"a\x00b", b"\n" * 50, b"{}" * 100, b"<script>", b"%s%n"),
    *("\u202e".encode(), "\U0001f600".encode() * 600, b"../../etc/passwd", b"a" * 2000, b"a" * 2001, b"a" * 1_000_000),
)
_NUMBERS: Final = (
    *(0, -0.0, 1, -1, 7, 255, 2**31 - 1, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 1e-45, 1e38, -1e38),
    *(math.nan, math.inf, -math.inf, 0.1, 0.0999, 0.2, 0.6399, 0.64),
)
_SIZES: Final = (0, 1, 2, 8, 9, -1, 4096, 2**31, 2**62, 2**63 - 1, -(2**63))
_OPTIONAL: Final[Mapping[str, tuple[object, ...]]] = {
    "negative_prompt": (b"", b"noise", b"low quality, with hum and hiss"),
    "return_scores": (True, False),
    "window_length_in_s": (0.0, 0.2),
    "priority": (b"interactive", b"batch"),
    "audio_format": (b"wav", b"flac", b"ogg", b"opus", b"mp3;base64"),
}
_PARAMETERS: Final[Mapping[str, tuple[object, ...]]] = {
    "timeout": (-1, 0, 1, 1000, 2**62, "soon", True, 1.5),
    "priority": (0, 1, -1, 2**62, "high"),
    "sequence_id": (1, "a", -1),
    "sequence_start": (True, "yes"),
    "ctl": ("cancel", "progress", "mel", "vocode", "score", "", 5),
    "job": ("0", "../", "a" * 10_000, 3),
    "binary_data_output": (True, False, "maybe"),
    "triton_enable_empty_final_response": (True, 5),
    "x" * 5000: ("y",),
}


@dataclass(frozen=True)
class RawTensor:
    """An input as it travels, whether or not it makes sense."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    values: object = None  # the same for JSON


@dataclass(frozen=True)
class Hostile:
    """A request, and what was done to it."""

    model: str
    tensors: tuple[RawTensor, ...]
    version: str = ""
    request_id: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    done: tuple[str, ...] = ()


def tensor(name: str, datatype: str, *values: object) -> RawTensor:
    """Encodes one value for each row."""
    encode = _bytes if datatype == "BYTES" else lambda value: _number(datatype, value)
    data = b"".join(encode(value) for value in values)
    shown = [value.decode("latin-1") if isinstance(value, bytes) else value for value in values]
    return RawTensor(name, datatype, (len(values), 1), data, shown)


def valid(random: Random, model: str) -> Hostile:
    """Draws a request that is answered with audio by the two fronts, and refused or answered by the stages."""
    tensors = [
        tensor("prompt", "BYTES", random.choice([b"rain", b"a dog", "Küche".encode()])),
        tensor("audio_length_in_s", "FP32", random.choice([0.1, 0.2, 0.3])),
        tensor("num_inference_steps", "INT32", random.randint(1, 3)),
        tensor("seed", "INT64", random.randrange(2**32)),
    ]
    if random.random() < 0.3:
        tensors.append(tensor("scheduler", "BYTES", random.choice(contract.SCHEDULERS).encode()))
    if random.random() < 0.3:
        tensors.append(tensor("guidance_scale", "FP32", random.choice([0.0, 1.0, 3.5, 50.0])))
    if random.random() < 0.3:
        tensors.append(tensor("num_waveforms_per_prompt", "INT32", random.choice([1, 2])))
    for name, values in _OPTIONAL.items():
        if random.random() < 0.1:
            tensors.append(tensor(name, contract.INPUTS[name], random.choice(values)))
    if model in ("denoiser", "decoder"):
        tensors = _stage_tensors(random, model)
    return Hostile(model, tuple(tensors))


def hostile(random: Random) -> Hostile:
    """Breaks a valid request in one to three ways."""
    request = valid(random, random.choice(MODELS))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        change = random.choice(_CHANGES)
        request = replace(change(random, request), done=(*request.done, change.__name__.strip("_")))
    return request


def hostile_body(random: Random) -> bytes:
    """Draws the body of an HTTP request that is no request, or hardly one."""
    sound = json.dumps(
        {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1, 1], "data": ["rain"]}]}
    ).encode()
    broken = bytearray(sound)
    for _ in range(random.randint(1, 8)):
        broken[random.randrange(len(broken))] = random.randrange(256)
    return random.choice(
        [
            *(b"", b"\x00" * 100, b"[]", b"null", b'{"inputs": {}}', b'{"inputs": [[]]}', b'{"inputs": [{}]}'),
            # Deeper than this, Triton 24.10 itself overflows its stack: upstream #8570.
            b'{"inputs":' + b"[" * 50 + b"]" * 50 + b"}",
            sound[: random.randrange(len(sound))],
            bytes(broken),
            random.randbytes(random.randrange(2000)),
            sound.replace(b'"rain"', b'"' + b"a" * 300_000 + b'"'),
            sound.replace(b'["rain"]', random.choice([b"[1]", b"[null]", b"[[[]]]", b'"rain"', b"[NaN]", b"[1e999]"])),
            sound.replace(b"[1, 1]", random.choice([b"[-1]", b"[]", b'["1"]', b"[1.5]", b"[99999999999999999999]"])),
        ]
    )


def _stage_tensors(random: Random, model: str) -> list[RawTensor]:
    """The inputs of a stage; the shapes of the embeddings fit the tiny checkpoint, or not."""

    def floats(name: str, *shape: int) -> RawTensor:
        values = [round(random.gauss(0, 1), 3) for _ in range(math.prod(shape))]
        return RawTensor(name, "FP32", shape, struct.pack(f"<{len(values)}f", *values), values)

    if model == "decoder":
        return [
            floats("latents", 1, 1, 8, 4, 16),
            tensor("num_samples", "INT32", random.choice([1, 2560, 2561])),
            tensor("return_scores", "BOOL", random.random() < 0.5),
            floats("text_embeds", 1, random.choice([32, 40, 64, 512])),
        ]
    length, width = random.choice([(1, 48), (8, 48), (16, 48), (4, 128)])
    return [
        floats("prompt_embeds", 1, length, width),
        RawTensor("attention_mask", "INT32", (1, length), struct.pack("<i", 1) * length, [1] * length),
        floats("generated_prompt_embeds", 1, 8, random.choice([32, 32, 48])),
        tensor("latent_frames", "INT32", random.choice([4, 8])),
        tensor("num_inference_steps", "INT32", 1),
        tensor("guidance_scale", "FP32", 1.0),
        tensor("num_waveforms_per_prompt", "INT32", 1),
        tensor("scheduler", "BYTES", b"DDIMScheduler"),
        tensor("seed", "INT64", 1),
    ]


def _bytes(value: object) -> bytes:
    text = value if isinstance(value, bytes) else str(value).encode()
    return struct.pack("<I", len(text)) + text


def _number(datatype: str, value: Any) -> bytes:
    packing = _FORMATS.get(datatype, "<f")
    try:
        return struct.pack(packing, value)
    except (struct.error, OverflowError, ValueError):
        return struct.pack("<q", int(value) % 2**63 if math.isfinite(value) else 0)[: struct.calcsize(packing)]


def _one(random: Random, request: Hostile, change: Callable[[RawTensor], RawTensor]) -> Hostile:
    """Changes one of the inputs."""
    if not request.tensors:
        return request
    chosen = random.randrange(len(request.tensors))
    tensors = tuple(change(each) if index == chosen else each for index, each in enumerate(request.tensors))
    return replace(request, tensors=tensors)


def _value(random: Random, request: Hostile) -> Hostile:
    def change(old: RawTensor) -> RawTensor:
        values = _TEXTS if old.datatype == "BYTES" else _NUMBERS
        return replace(tensor(old.name, old.datatype, random.choice(values)), shape=old.shape)

    return _one(random, request, change)


def _datatype(random: Random, request: Hostile) -> Hostile:
    return _one(random, request, lambda old: replace(old, datatype=random.choice(_DATATYPES)))


def _datatype_with_its_data(random: Random, request: Hostile) -> Hostile:
    return _one(random, request, lambda old: tensor(old.name, random.choice([*_FORMATS, "BYTES"]), 1))


def _shape(random: Random, request: Hostile) -> Hostile:
    shape = tuple(random.choice(_SIZES) for _ in range(random.randint(0, 5)))
    return _one(random, request, lambda old: replace(old, shape=shape))


def _truncated(random: Random, request: Hostile) -> Hostile:
    return _one(random, request, lambda old: replace(old, data=old.data[: random.randint(0, len(old.data))]))


def _extended(random: Random, request: Hostile) -> Hostile:
    return _one(random, request, lambda old: replace(old, data=old.data + random.randbytes(random.randint(1, 5000))))


def _random_bytes(random: Random, request: Hostile) -> Hostile:
    return _one(random, request, lambda old: replace(old, data=random.randbytes(len(old.data))))


def _name(random: Random, request: Hostile) -> Hostile:
    names = (
        "",
        "prompts",
        "PROMPT",
        "a" * 5000,
        "audio",
        "seed_used",
        "deadline_ns",
        "noise",
        "job",
        "ctl",
        "プロンプト",
    )
    return _one(random, request, lambda old: replace(old, name=random.choice(names)))


def _missing(random: Random, request: Hostile) -> Hostile:
    return replace(request, tensors=tuple(random.sample(request.tensors, random.randrange(len(request.tensors) + 1))))


def _twice(random: Random, request: Hostile) -> Hostile:
    return replace(request, tensors=request.tensors + request.tensors[: random.randint(1, 2)])


def _many(_: Random, request: Hostile) -> Hostile:
    return replace(request, tensors=request.tensors + tuple(tensor(f"x{n}", "FP32", n) for n in range(1000)))


def _rows(random: Random, request: Hostile) -> Hostile:
    """As many rows in every input, or in some of them only."""
    rows, some = random.choice([0, 2, 8, 9, 5000]), random.random() < 0.3

    def repeated(old: RawTensor) -> RawTensor:
        if (some and random.random() < 0.5) or not old.shape or len(old.data) * rows > MOST_BYTES:
            return old
        return replace(old, shape=(rows, *old.shape[1:]), data=old.data * rows)

    return replace(request, tensors=tuple(map(repeated, request.tensors)))


def _parameter(random: Random, request: Hostile) -> Hostile:
    name = random.choice(list(_PARAMETERS))
    return replace(request, parameters={**request.parameters, name: random.choice(_PARAMETERS[name])})


def _identity(random: Random, request: Hostile) -> Hostile:
    return replace(request, request_id=random.choice(["a" * 100_000, "\x00", "'; DROP TABLE", "\u202e", "{}"]))


def _no_such_model(random: Random, request: Hostile) -> Hostile:
    names = ("", "audioldm3", "../audioldm2", "a" * 500, "audioldm2\x00")
    return replace(request, model=random.choice(names))


def _no_such_version(random: Random, request: Hostile) -> Hostile:
    return replace(request, version=random.choice(["2", "-1", "0", "one", "9" * 50]))


def _no_such_output(random: Random, request: Hostile) -> Hostile:
    return replace(request, outputs=random.choice([("sound",), ("audio", "audio"), ("",), ("a" * 5000,)]))


_CHANGES: Final = (
    *(_value, _value, _value, _datatype, _datatype_with_its_data, _shape, _truncated, _extended, _random_bytes),
    *(_name, _missing, _twice, _many, _rows, _parameter, _parameter, _identity),
    *(_no_such_model, _no_such_version, _no_such_output),
)
