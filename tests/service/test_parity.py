"""The served audio is what `diffusers.AudioLDM2Pipeline` gives: fp32 on a CPU, tiny checkpoint, real server."""

import random
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from audioldm2_pipeline import Call, Reference, difference
from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.contract import SCHEDULERS
from serving.local_server import LocalServer

LONG = "low quality, distorted, clipped, muffled, with hum and hiss, and voices of people talking in the back"

FACTORS = {
    "scheduler": SCHEDULERS,
    "num_inference_steps": [20, 7, 2, 1, 25],
    "guidance_scale": [3.5, 1.0, 0.0, 12.0],
    "audio_length_in_s": [1.93, 0.1, 0.915, 2.563, 0.37],  # the native 10.24 s has a test of its own
    "negative_prompt": ["", "noise", LONG],
    "num_waveforms_per_prompt": [1, 2, 4, 3],
    "rows": [1, 3],
}
SECOND_ORDER = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")  # two UNet evaluations a step
MAX_COST = 200  # of one case, in items of the UNet times seconds


def cost(case: dict[str, Any]) -> float:
    """As measured for the references: a call of the UNet costs 2 whatever it holds, decoding a second of audio 6."""
    evaluations = case["num_inference_steps"] * (2 if case["scheduler"] in SECOND_ORDER else 1)
    audio_in_s = case["num_waveforms_per_prompt"] * case["audio_length_in_s"]
    items_in_s = audio_in_s * (2 if case["guidance_scale"] > 1 else 1)
    return float(case["rows"] * (evaluations * (2 + items_in_s) + 6 * audio_in_s))


@dataclass(frozen=True)
class Case:
    call: Call
    rows: int


def pairs(case: dict[str, Any]) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(FACTORS, 2)}


@cache
def cases() -> tuple[Case, ...]:
    """A pairwise cover, greedily: every two values of two factors occur together in some case.

    Of many random affordable cases the one with the most pairs still missing is taken, again and again.
    """
    generator = random.Random(0)
    missing = {
        (a, x, b, y) for a, b in combinations(FACTORS, 2) for x in FACTORS[a] for y in FACTORS[b]
    }  # fmt: skip
    drawn: list[Case] = []
    while missing:
        a, x, b, y = min(missing, key=str)
        tried = [
            {**{name: generator.choice(values) for name, values in FACTORS.items()}, a: x, b: y} for _ in range(1000)
        ]
        affordable = [case for case in tried if cost(case) <= MAX_COST]
        best = max(affordable, key=lambda case: (len(pairs(case) & missing), -cost(case)))
        missing -= pairs(best)
        rows = best.pop("rows")
        drawn.append(Case(Call(prompt="A hammer hits a wooden surface", seed=1000 + len(drawn), **best), rows))
    return tuple(drawn)


def rows_of(case: Case) -> list[Call]:
    """The rows of one request: what may differ between them does."""
    second = {"prompt": "rain", "guidance_scale": 2.5, "num_inference_steps": 3, "scheduler": "DDIMScheduler"}
    third = {"prompt": "A choir sings in a very large cathedral while the bells ring", "negative_prompt": "silence"}
    changes = [{}, second, third][: case.rows]
    return [replace(case.call, seed=case.call.seed + 7 * row, **change) for row, change in enumerate(changes)]


def generate(client: AudioLDM2Client, rows: list[Call]) -> list[np.ndarray]:
    """The audio of each row of one request, in generation order as far as scores can tell it: see `matched`."""
    results = client.generate(
        [row.prompt for row in rows],
        negative_prompt=[row.negative_prompt for row in rows],
        audio_length_in_s=rows[0].audio_length_in_s,
        num_inference_steps=[row.num_inference_steps for row in rows],
        guidance_scale=[row.guidance_scale for row in rows],
        num_waveforms_per_prompt=rows[0].num_waveforms_per_prompt,
        seed=[row.seed for row in rows],
        scheduler=[row.scheduler for row in rows],
    )
    return [result.audio for result in results]


def matched(audio: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`audio` in the order of `expected`: the server ranks, the reference was asked not to.

    Each waveform is used once, so that one waveform that came back twice does not match.
    """
    assert audio.shape == expected.shape
    left = list(range(len(audio)))
    order = []
    for waveform in expected:
        nearest = min(left, key=lambda index: float(np.abs(audio[index] - waveform).max()))
        left.remove(nearest)
        order.append(nearest)
    return audio[order]


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.call.scheduler[:-9]}-{case.call.seed}")
def test_audio_equals_the_reference(case: Case, server: LocalServer, reference: Reference) -> None:
    rows = rows_of(case)
    with AudioLDM2Client(server.grpc_url) as client:
        served = generate(client, rows)
    for call, audio in zip(rows, served, strict=True):
        expected = reference.generate(call)
        made = expected.shape[1]
        assert audio.shape[1] == int(call.audio_length_in_s * 16000)
        apart = difference(matched(audio[:, :made], expected), expected)
        assert apart <= reference.tolerance(call)
        # Off the 10 ms grid the reference itself can be a few samples short.
        assert audio.shape[1] - made < 160
        assert not audio[:, made:].any()


def test_the_default_request_equals_the_reference(server: LocalServer, reference: Reference) -> None:
    with AudioLDM2Client(server.http_url) as client:
        result = client.generate("A dog barks", seed=11)
    call = Call("A dog barks", audio_length_in_s=10.24, num_inference_steps=20, seed=11)
    assert difference(result.audio, reference.generate(call)) <= reference.tolerance(call)


@pytest.mark.parametrize(
    "change",
    [{"prompt": "Rain on a tin roof"}, {"seed": 6}, {"guidance_scale": 1.0}, {"negative_prompt": LONG}],
    ids=lambda change: next(iter(change)),
)
def test_what_should_change_the_audio_does(change: dict, server: LocalServer) -> None:
    call = Call("A hammer hits a wooden surface", num_inference_steps=20, seed=5)
    with AudioLDM2Client(server.grpc_url) as client:
        audio, other = generate(client, [call]), generate(client, [replace(call, **change)])
    assert difference(other[0], audio[0]) > 1e-2
