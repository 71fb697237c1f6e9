"""What surrounds a CUDA graph, with a stand-in for the graph: its inputs, its shapes, its results. See test_gpu.py."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import text_compilation
from audioldm2_triton.server import compilation
from audioldm2_triton.server.compilation import for_fixed_shapes
from audioldm2_triton.server.cuda_graphs import WARM_UP_CALLS, GraphedFunction
from audioldm2_triton.server.geometry import read_audio_geometry
from audioldm2_triton.server.settings import Settings, SettingsError, resolve_compile
from decoder_buckets import Buckets
from decoder_compilation import compile_decoder
from stepping.denoising_unet import load_unet
from text_buckets import TextBuckets
from text_encoders import encode_texts, load_text_encoders, tokenize_t5
from vocoder_chunks import CHUNK_FRAMES
from waveform_decoder import decode_waveforms, load_waveform_decoder

CPU = torch.device("cpu")


class StandIn:
    """Records as a GPU does: what is run again reads and writes the memory of the recording."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        for _ in range(WARM_UP_CALLS):
            function()
        output = torch.full_like(function(), float("nan"))  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            output.copy_(function())

        return replay, output


@dataclass(frozen=True)
class Inputs:
    value: Tensor
    parts: tuple[Tensor, ...]
    mask: Tensor | None


def combine(inputs: Inputs, power: int) -> Tensor:
    total = inputs.value**power + sum(inputs.parts)
    return total if inputs.mask is None else total.masked_fill(inputs.mask, 0)


def make(seed: int, rows: int = 3, masked: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    value, first, second = (torch.randn(rows, 4, generator=generator) for _ in range(3))
    return Inputs(value, (first, second), torch.rand(rows, 4, generator=generator) > 0.5 if masked else None)


def test_one_recording_for_each_shape() -> None:
    record = StandIn()
    graphed = GraphedFunction(combine, record)
    for seed in range(3):
        for rows in (3, 5):
            for masked in (False, True):
                for power in (2, 300):
                    inputs = make(seed, rows, masked)
                    assert torch.equal(graphed(inputs, power), combine(inputs, power))
    assert record.recordings == 8
    assert record.replays == 24


def test_a_result_is_the_callers() -> None:
    graphed = GraphedFunction(combine, StandIn())
    first = graphed(make(0), 2)
    kept = first.clone()
    graphed(make(1), 2)
    assert torch.equal(first, kept)


def test_what_stays_is_not_copied_again() -> None:
    record = StandIn()
    graphed = GraphedFunction(combine, record)
    inputs = make(0)
    expected = graphed(inputs, 2)
    inputs.parts[0].zero_()  # which callers must not do, and which shows here what was read
    assert torch.equal(graphed(inputs, 2), expected)
    other = Inputs(inputs.value, (make(7).value, inputs.parts[1]), None)
    assert torch.equal(graphed(other, 2), combine(other, 2))


def test_a_recording_holds_no_second_copy() -> None:
    graphed = GraphedFunction(combine, StandIn())
    for seed in range(2):
        inputs = make(seed)
        last = weakref.ref(inputs.value)
        graphed(inputs, 2)
        del inputs
        gc.collect()
        assert last() is None


def test_strides_are_kept() -> None:
    seen: list[tuple[int, ...]] = []

    def watch(value: Tensor) -> Tensor:
        seen.append(value.stride())
        return value * 2

    aligned = torch.randn(2, 16)[:, :9]
    result = GraphedFunction(watch, StandIn())(aligned)
    assert torch.equal(result, aligned * 2)
    assert set(seen) == {(16, 1)}


def test_a_recording_that_fails_is_told_and_tried_again() -> None:
    failures = [RuntimeError("operation not permitted when stream is capturing")]

    def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if failures:
            raise failures.pop()
        return StandIn()(function)

    graphed = GraphedFunction(combine, record)
    with pytest.raises(RuntimeError, match="capturing"):
        graphed(make(0), 2)
    assert torch.equal(graphed(make(0), 2), combine(make(0), 2))


@pytest.mark.parametrize("masked", [False, True])
def test_the_unets_step_can_be_recorded(masked: bool, tiny_checkpoint: Path) -> None:
    geometry = read_audio_geometry(tiny_checkpoint)
    unet = load_unet(tiny_checkpoint, geometry.latent_width, CPU, torch.float32)
    record = StandIn()
    graphed = GraphedFunction(unet._eager, record)
    with torch.inference_mode():
        for frames in (9, 5):
            step: Any = unet.random_inputs(3, frames, masked)
            for _ in range(2):
                assert torch.equal(graphed(step), unet._eager(step))
    assert record.recordings == 2


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert for_fixed_shapes(combine, CPU, 1, use_compiler=False) is combine
    with pytest.raises(SettingsError, match="graphs need a GPU"):
        resolve_compile(Settings("checkpoint", compile="graphs"), CPU)
    assert resolve_compile(Settings("checkpoint", compile="graphs"), torch.device("cuda"))


def test_text_and_decoding_can_be_recorded(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compilation, text_compilation):
        monkeypatch.setattr(module, "graphed", lambda function, _: GraphedFunction(function, StandIn()))
    geometry = read_audio_geometry(tiny_checkpoint)
    encoders = load_text_encoders(tiny_checkpoint, CPU, torch.float32)
    recorded = text_compilation.compile_text_encoders(encoders, TextBuckets((2,), (32,)), use_compiler=False)
    assert recorded.compiled is not None
    for texts in (["rain", "a dog barks"], ["birds sing over a quiet lake", ""], ["thunder"]):
        tokens = [tokenize_t5(encoders, text) for text in texts]
        arguments = texts, tokens, [len(own) for own in tokens]
        own, eager = encode_texts(recorded, *arguments), encode_texts(encoders, *arguments)
        for name in ("text_embeds", "prompt_embeds", "generated_prompt_embeds"):
            assert torch.allclose(getattr(own, name), getattr(eager, name), rtol=1e-4, atol=1e-5), name

    decoder = load_waveform_decoder(tiny_checkpoint, CPU, torch.float32)
    windows = Buckets((1,), (CHUNK_FRAMES + 2 * decoder.reach.overlap_frames,), 8192)
    prepared = compile_decoder(decoder, geometry, Buckets((1, 2), (16,), 64), windows, use_compiler=False)
    assert prepared.compiled is not None
    for frames in (16, 9):
        latents = [torch.randn(geometry.latent_channels, frames, geometry.latent_width) for _ in range(2)]
        for own, eager in zip(decode_waveforms(prepared, latents), decode_waveforms(decoder, latents), strict=True):
            assert (own - eager).abs().max() < 1e-4 * eager.abs().max()


def test_older_compilers_know_no_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before PyTorch 2.13, `torch.compile` takes no `recompile_limit`."""
    given: dict[str, Any] = {}

    def older(model: Any, *, fullgraph: bool, dynamic: bool, backend: str) -> Any:
        given.update(fullgraph=fullgraph, dynamic=dynamic, backend=backend)
        return model

    config: Any = torch._dynamo.config
    monkeypatch.setattr(torch, "compile", older)
    with config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        assert compilation.compiled(combine, 18) is combine
        assert given == {"fullgraph": True, "dynamic": False, "backend": "inductor"}
        assert config.recompile_limit == 18
