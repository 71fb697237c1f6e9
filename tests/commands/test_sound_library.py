"""The library of sounds and captions that the demonstration checkpoint is made of, and its training loop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from demo_checkpoint import corpus, diffusion_training, library, parts, sound_training, text_training, training
from demo_checkpoint.signals import SAMPLING_RATE
from demo_checkpoint.sounds import ATTRIBUTES, KINDS, synthesise


@pytest.mark.parametrize("kind", KINDS)
def test_sound_depends_on_seed_and_attributes_alone(kind: str) -> None:
    attributes = tuple(axis[0] for axis in ATTRIBUTES[kind])
    first, again = (synthesise(kind, attributes, 1.28, np.random.default_rng(1)) for _ in range(2))
    other = synthesise(kind, attributes, 1.28, np.random.default_rng(2))
    assert first.shape == (round(1.28 * SAMPLING_RATE),)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 0.4 < np.abs(first).max() < 0.8


def test_unknown_names_are_refused() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="thunder"):
        synthesise("thunder", (), 1.0, generator)
    with pytest.raises(ValueError, match="rising"):
        synthesise("rain", ("rising",), 1.0, generator)


def test_held_out_captions_are_new_but_their_words_are_not() -> None:
    generator = np.random.default_rng(0)
    trained = {_plain(library.draw_caption(generator).caption) for _ in range(6000)}
    held_out = {_plain(library.draw_caption(generator, held_out=True).caption) for _ in range(1000)}
    assert len(trained) > 3000
    assert not trained & held_out
    words = {word for caption in trained for word in caption.split()}
    assert {word for caption in held_out for word in caption.split()} <= words


def _plain(caption: str) -> str:
    return caption.lower().replace(",", "").removesuffix(".")


def test_captions_name_their_kinds_and_only_drawn_attributes() -> None:
    for sound in library.stream(0, 40, length_in_s=0.3):
        assert 1 <= len(sound.kinds) <= 2
        assert len(set(sound.kinds)) == len(sound.kinds)
        assert all(any(value in axis for axis in ATTRIBUTES[sound.kinds[0]]) for value in sound.attributes)


def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)
    plan = training.Plan(steps=8, learning_rate=0.1, warmup=2)

    def run(folder: Path, stop_at: int | None) -> nn.Module:
        torch.manual_seed(0)
        steps = iter(range(100))

        def loss(model: nn.Module, draw: training.Draw) -> Tensor:
            if next(steps) == stop_at:
                raise KeyboardInterrupt
            return model(torch.randn(4, 3, generator=draw.torch)).square().mean()

        return training.train("toy", nn.Linear(3, 2), loss, lambda _: 0.0, plan, folder)

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 5)
    resumed = run(tmp_path / "stopped", None)
    assert torch.equal(whole.weight, resumed.weight)  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_part_trains(tmp_path: Path) -> None:
    """Two steps of each, on a small corpus: losses are finite, and the UNet's inputs are those of the pipeline."""
    from demo_checkpoint import assembly

    sounds = corpus.make(tmp_path / "corpus", size=160, held_out=110)
    plan = training.Plan(steps=2, learning_rate=1e-3)
    vae = sound_training.train_vae(sounds, tmp_path, plan)
    vocoder = sound_training.train_vocoder(parts.vocoder(), sounds, tmp_path, plan)
    t5 = text_training.train_t5(tmp_path, plan)
    clap = text_training.train_clap(sounds, tmp_path, plan)
    reader = text_training.train_language_model(sounds, clap, t5, tmp_path, plan)
    pipe = assembly.pipeline(text_training.tokenizers(tmp_path), clap, t5, reader, vae=vae, vocoder=vocoder)
    latents, factor = diffusion_training.cache_latents(sounds, vae, tmp_path)
    assert float(latents.astype(np.float32).std()) * factor == pytest.approx(1, abs=0.1)
    conditioning = diffusion_training.cache_conditioning(pipe, sounds.captions, tmp_path / "conditioning.npz")
    assert float(sounds.shares.sum()) == pytest.approx(1)
    unet = diffusion_training.train_unet(parts.unet(), latents, factor, conditioning, sounds.shares, tmp_path, plan)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in unet.parameters())
    assert assembly.save(pipe, factor, len(pipe.tokenizer_2), tmp_path / "checkpoint") < assembly.MAX_SIZE_IN_BYTES
