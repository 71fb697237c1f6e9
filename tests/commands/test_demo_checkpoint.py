"""The demonstration checkpoint: its size, its parity with the reference, and whether the right sound comes out.

The judge knows only the library's sounds; `scripts/sound-quality judge` is the long version of what is here.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from demo_checkpoint.assembly import MAX_SIZE_IN_BYTES
from demo_checkpoint.sounds import KINDS
from project import DEMO_CHECKPOINT
from serving.local_server import LocalServer, local_server
from sound_quality import experiments
from sound_quality.judge import Judge, attributes_right, own_accuracy, train_judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return train_judge(per_kind=40)


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "log") as running:
        yield running


def test_checkpoint_is_small() -> None:
    sizes = [path.stat().st_size for path in DEMO_CHECKPOINT.rglob("*") if path.is_file()]
    assert 1_000_000 < sum(sizes) <= MAX_SIZE_IN_BYTES


@pytest.mark.slow
def test_judge_names_sounds_it_does_not_know(judge: Judge) -> None:
    accuracy = own_accuracy(judge, per_kind=5)
    assert accuracy.kinds >= 0.95
    assert accuracy.attributes >= 0.95
    assert accuracy.textures >= 0.85


@pytest.mark.slow
def test_judge_is_not_fooled_by_noise(judge: Judge) -> None:
    """Every kind has the same share of noise's votes, at most: no answer comes by default."""
    noise = np.random.default_rng(0).standard_normal((20, 40_960)).astype(np.float32)
    names = judge.name_kinds(experiments.first_features([clip[None] for clip in noise]))
    assert set(names) <= {"hiss", "rain", "waves", "wind"}


@pytest.mark.slow
def test_served_sounds_are_the_right_ones(judge: Judge, demo_server: LocalServer) -> None:
    requests = experiments.make_requests(2 * len(KINDS))
    sounds = experiments.first_features(experiments.generate(demo_server.grpc_url, requests))
    right = experiments.kinds_right(judge, requests, sounds)
    named = attributes_right(judge, [(request.kind, request.attributes) for request in requests], list(sounds))
    wrong = [request.prompt for request, is_right in zip(requests, right, strict=True) if not is_right]
    # Of 360 clips 97 % and 99 % were right.
    assert np.mean(right) >= 0.85, wrong
    assert np.mean(named) >= 0.9


@pytest.mark.slow
def test_a_negative_prompt_lowers_the_share_of_the_sound_that_it_names(judge: Judge, demo_server: LocalServer) -> None:
    comparison = experiments.compare_negative(judge, demo_server.grpc_url, len(KINDS))
    assert comparison.difference.value < -0.1, comparison


@pytest.mark.slow
def test_guidance_makes_the_right_sound_likelier(judge: Judge, demo_server: LocalServer) -> None:
    guided = experiments.make_requests(len(KINDS))
    kinds = [request.kind for request in guided]

    def likelihood(requests: list[experiments.Request]) -> float:
        sounds = experiments.first_features(experiments.generate(demo_server.grpc_url, requests))
        return float(judge.kind_probability(sounds, kinds).mean())

    assert likelihood(guided) > likelihood([replace(request, guidance_scale=1.0) for request in guided]) + 0.03


def test_served_sound_is_the_reference_pipelines(demo_server: LocalServer) -> None:
    call = Call("A high-pitched beep", negative_prompt="wind", audio_length_in_s=2.56, num_inference_steps=10, seed=3)
    with AudioLDM2Client(demo_server.grpc_url) as client:
        served = generate(client, call)
    reference = Reference(Path(DEMO_CHECKPOINT))
    assert difference(served.audio, reference.generate(call)) <= reference.tolerance(call)
