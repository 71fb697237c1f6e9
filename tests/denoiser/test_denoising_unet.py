"""The UNet as the engine calls it: what runs compiled equals what runs eager, and nothing compiles on the way."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audioldm2_triton.errors import UnavailableError
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.settings import Settings
from denoiser_stage import compile_buckets, load_schedule_tables, rows_that_fit
from denoising_inputs import draw_noise
from engine.engine import Engine
from engine.limits import EngineLimits
from engine_workload import CPU, Outcomes
from stepping import denoising_unet
from stepping.denoising_unet import DenoisingUNet, load_unet
from stepping.forward_plan import Bucket, ForwardCosts, LinearCost
from stepping.request import DenoisingRequest, DenoisingRow, TextStates

PLAIN, MASKED = Bucket(4, 16, False), Bucket(4, 16, True)
SLOW = LinearCost(1000.0, 0.0)
SOLVERS = ("DPMSolverMultistepScheduler", "DDIMScheduler", "HeunDiscreteScheduler")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracing and the shapes are the compiler's; only its kernels are left out, which take minutes to build."""
    original = torch.compile

    @wraps(original)
    def compile_without_kernels(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile_without_kernels)


def load(checkpoint: Path, buckets: Sequence[Bucket] = ()) -> DenoisingUNet:
    geometry = read_audio_geometry(checkpoint)
    return load_unet(checkpoint, geometry.latent_width, CPU, torch.float32, buckets)


def request(tag: int, frames: int, guidance_scale: float, unet: DenoisingUNet, t5_length: int = 5) -> DenoisingRequest:
    generator = torch.Generator().manual_seed(tag)
    generated_dim, prompt_dim = [dim for dim in unet.config.cross_attention_dim[0] if dim is not None]

    def text() -> TextStates:
        return TextStates(
            torch.randn(t5_length, prompt_dim, generator=generator),
            torch.ones(t5_length),
            torch.randn(8, generated_dim, generator=generator),
        )

    negative = text() if guidance_scale > 1 else None
    noise = draw_noise(tag, (1, unet.config.in_channels, frames, 16))
    return DenoisingRequest((DenoisingRow(text(), negative, guidance_scale, 4, SOLVERS[tag % 3], noise),))


def run(
    checkpoint: Path, unet: DenoisingUNet, costs: Callable[[], ForwardCosts], requests: Sequence[DenoisingRequest]
) -> dict[int, Tensor]:
    outcomes = Outcomes()
    engine = Engine(unet, load_schedule_tables(checkpoint), EngineLimits(4, 100), costs, CPU, torch.float32)
    engine.wait_until_warm()
    for tag, one in enumerate(requests):
        engine.submit(one, outcomes.callback(tag))
    collected = outcomes.collect(len(requests))
    engine.close()
    assert all(isinstance(outcome, Tensor) for outcome in collected.values()), collected
    return {tag: outcome for tag, outcome in collected.items() if isinstance(outcome, Tensor)}


def eager_costs() -> ForwardCosts:
    return ForwardCosts(LinearCost(0.0, 1.0), LinearCost(0.0, 1.0))


def check_compiled_is_eager(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fill the buckets in every way: the same latents as eager, from compiled code alone."""
    buckets = (PLAIN, MASKED)
    unet = load(checkpoint, buckets)
    lengths_and_guidance = [(16, 3.5), (16, 1.0), (9, 2.0), (3, 1.0), (16, 5.0), (1, 3.0)]
    requests = [request(tag, frames, scale, unet) for tag, (frames, scale) in enumerate(lengths_and_guidance)]
    expected = run(checkpoint, load(checkpoint), eager_costs, requests)

    def costs() -> ForwardCosts:
        measured = unet.warm_up()
        assert set(measured.compiled) == set(buckets)
        # Nothing may be compiled from here on, and nothing may run eager.
        torch.compiler.set_stance("fail_on_recompile")
        monkeypatch.setattr(unet, "_eager", None)
        return ForwardCosts(SLOW, SLOW, measured.compiled)

    for tag, latents in run(checkpoint, unet, costs, requests).items():
        error = (latents - expected[tag]).abs().max() / expected[tag].abs().max()
        assert error < 1e-4, f"request {tag} is off by {error}"


@pytest.mark.usefixtures("eager_backend")
def test_buckets_hold_any_mixture_exactly(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiled_is_eager(tiny_checkpoint, monkeypatch)


@pytest.mark.slow
def test_compiled_kernels_are_exact(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiled_is_eager(tiny_checkpoint, monkeypatch)


@pytest.mark.usefixtures("eager_backend")
def test_what_fits_no_bucket_runs_eager(tiny_checkpoint: Path) -> None:
    unet = load(tiny_checkpoint, (PLAIN,))
    # Too long, too long a text, shorter than the only bucket, which has no masks.
    requests = [request(0, 17, 3.5, unet), request(1, 16, 3.5, unet, t5_length=65), request(2, 8, 1.0, unet)]
    expected = run(tiny_checkpoint, load(tiny_checkpoint), eager_costs, requests)

    def costs() -> ForwardCosts:
        compiled = unet.warm_up().compiled
        torch.compiler.set_stance("fail_on_recompile")
        return ForwardCosts(SLOW, SLOW, compiled)  # the bucket is taken wherever it can be

    for tag, latents in run(tiny_checkpoint, unet, costs, requests).items():
        assert (latents - expected[tag]).abs().max() / expected[tag].abs().max() < 1e-4


@pytest.mark.usefixtures("eager_backend")
def test_more_buckets_than_pytorch_allows_by_itself(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    buckets = tuple(Bucket(items, 2, False) for items in range(1, 12))
    # The UNet is not what is tested, and eleven traces of it take a minute.
    monkeypatch.setattr(denoising_unet, "denoise", lambda _, inputs: inputs.history * 2)
    unet = load(tiny_checkpoint, buckets)
    engine = Engine(unet, load_schedule_tables(tiny_checkpoint), EngineLimits(4, 1), unet.warm_up, CPU, torch.float32)
    engine.wait_until_warm()
    engine.close()
    assert engine.costs is not None
    assert set(engine.costs.compiled) == set(buckets), caplog.text


def test_a_bucket_that_fails_to_compile_is_left_out(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unet = load(tiny_checkpoint, (PLAIN,))

    def fail(inputs: Any) -> Tensor:  # noqa: ARG001 - as the step
        raise RuntimeError("no compiler")

    monkeypatch.setattr(unet, "_compiled", fail)
    assert unet.warm_up().compiled == {}
    assert "no compiler" in caplog.text
    requests = [request(0, 16, 3.5, unet)]
    assert run(tiny_checkpoint, unet, unet.warm_up, requests)[0].isfinite().all()


def test_the_cheaper_way_is_taken() -> None:
    costs = ForwardCosts(LinearCost(1.0, 0.1), LinearCost(2.0, 0.1), {PLAIN: 3.0, MASKED: 4.0, Bucket(8, 16, False): 5})
    assert costs.cheapest(4, 16, False) == (3.0, PLAIN)
    assert costs.cheapest(5, 16, False) == (5, Bucket(8, 16, False))
    assert costs.cheapest(4, 16, True) == (4.0, MASKED)
    assert costs.cheapest(4, 9, False) == (4.0, MASKED), "a shorter length is masked"
    assert costs.cheapest(1, 2, False) == (1.2, None), "a small forward costs less than a padded one"
    assert costs.cheapest(2, 17, False) == (1.0 + 0.1 * 34, None)


def test_schedules_that_are_kept_are_bounded(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoising_unet, "KEPT_SCHEDULES", 2)
    unet, tables = load(tiny_checkpoint), load_schedule_tables(tiny_checkpoint)
    with torch.inference_mode():
        first = unet.time_biases(tables.get(SOLVERS[0], 3))
        for steps in (4, 5, 6):
            assert len(unet.time_biases(tables.get(SOLVERS[0], steps))) == steps
        assert len(unet._time_biases) == 2
        assert torch.equal(unet.time_biases(tables.get(SOLVERS[0], 3)), first)


def test_a_failed_warm_up_is_told(tiny_checkpoint: Path) -> None:
    asked = threading.Event()

    def fail() -> ForwardCosts:
        asked.wait(30)
        raise RuntimeError("out of memory")

    unet, outcomes = load(tiny_checkpoint), Outcomes()
    engine = Engine(unet, load_schedule_tables(tiny_checkpoint), EngineLimits(4, 1), fail, CPU, torch.float32)
    engine.submit(request(0, 4, 1.0, unet), outcomes.callback(0))
    asked.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.wait_until_warm()
    assert isinstance(outcomes.collect(1)[0], UnavailableError)
    engine.close()


def test_buckets_by_device(tiny_checkpoint: Path) -> None:
    geometry = read_audio_geometry(tiny_checkpoint)

    def buckets(device: torch.device, **settings: Any) -> tuple[Bucket, ...]:
        limits = EngineLimits(24, 100)
        return compile_buckets(Settings(str(tiny_checkpoint), **settings), geometry, device, limits)

    assert buckets(CPU) == ()
    assert buckets(CPU, compile="on") == (Bucket(2, 256, False),)
    short = buckets(CPU, compile="on", compile_lengths_in_s="0.64,2.56", compile_max_rows=6)
    assert short == tuple(Bucket(items, frames, False) for frames in (16, 64) for items in (2, 4, 6))

    on_gpu = buckets(torch.device("cuda"), compile="auto")
    assert [bucket.items for bucket in on_gpu if bucket.masked] == [2, 4, 8, 12, 16, 24]
    assert [bucket.items for bucket in on_gpu if not bucket.masked] == [2, 4, 8, 12, 16, 24]


@pytest.mark.parametrize(
    ("row_mib", "free_gib", "rows"),
    [(44, 139, 62), (44, 6.0, 62), (44, 5.0, 48), (44, 0.5, 4), (44, 0.05, 2), (400, 24, 24)],
    ids=str,
)
def test_rows_follow_from_a_gpus_free_memory(
    row_mib: int, free_gib: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Measured:
        device = torch.device("cuda")

        def measure_row_bytes(self, frames: int) -> int:
            assert frames == 256
            return row_mib * 2**20

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free_gib * 2**30), 0))
    assert rows_that_fit(Measured(), 256) == rows  # type: ignore[arg-type]
