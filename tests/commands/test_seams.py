"""The measure of seams finds those that are there, and none that are not."""

from dataclasses import replace

import numpy as np
import pytest

from audioldm2_triton.server.geometry import AudioGeometry
from audioldm2_triton.server.settings import Settings
from benchmarks.workload import make_rows
from in_process.stages import running_stages
from project import DEMO_CHECKPOINT
from sound_quality.seams import SCALES_IN_S
from sound_quality.spectral_flux import SeamFlux, flux_difference, seam_flux, spectral_flux
from sound_quality.window_layout import make_layout
from stepping.windows import Windowing

RATE = 16000
GEOMETRY = AudioGeometry(RATE, 160, 4, 64, 8, 16, 8)
LAYOUT = make_layout(GEOMETRY, None, 4)


def noise(seed: int, seconds: float, colour: float = 0.0) -> np.ndarray:
    """Noise whose level falls with the frequency by `colour` dB an octave."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(round(seconds * RATE)))
    octaves = np.log2(np.arange(1, len(spectrum) + 1))
    return np.fft.irfft(spectrum * 10 ** (-colour * octaves / 20), round(seconds * RATE))


def joined(seed: int, faded: bool) -> np.ndarray:
    """Noise of another colour in each window, cut in the middle of the overlap or faded over its middle half."""
    audio = np.zeros(round(LAYOUT.length * RATE))
    overlap = round(LAYOUT.overlap * RATE / 2) if faded else 2
    for index in range(LAYOUT.count):
        part = noise(seed + index, LAYOUT.window, 6.0 * ((seed + index) % 2))
        ramp = np.clip((np.arange(len(part)) - (LAYOUT.overlap * RATE - overlap) / 2 + 0.5) / overlap, 0, 1)
        if index:
            part *= ramp
        if index < LAYOUT.count - 1:
            part *= ramp[::-1]
        start = round(index * LAYOUT.step * RATE)
        audio[start : start + len(part)] += part / np.abs(part).max()
    return audio


def measured(clips: list[np.ndarray], scale: float) -> SeamFlux:
    return seam_flux(clips, RATE, scale, LAYOUT.seams, LAYOUT.between)


def test_the_layout_is_that_of_the_windows() -> None:
    assert (LAYOUT.window, LAYOUT.overlap) == (2.56, 1.28)
    frames, overlap = GEOMETRY.window_frames(2.56)
    starts = Windowing(frames, overlap).starts(GEOMETRY.latent_frames(LAYOUT.length))
    assert [start * 0.04 + 1.28 / 2 for start in starts[1:]] == pytest.approx(np.mean(LAYOUT.seams, axis=1))
    assert [start * 0.04 + 2.56 / 2 for start in starts] == pytest.approx(np.mean(LAYOUT.between, axis=1))
    assert LAYOUT.seams[0] == pytest.approx((1.6, 2.24))


@pytest.mark.parametrize(("faded", "scale"), [(False, 0.02), (False, 0.3), (True, 0.3)])
def test_seams_are_found(faded: bool, scale: float) -> None:
    flux = measured([joined(10 * seed, faded) for seed in range(4)], scale)
    assert flux.pairs == 4 * 3 * 2
    assert flux.ratio > 1.3
    assert flux.share > 0.95


def test_seams_show_against_the_same_clips_without_them() -> None:
    without, other = (
        measured([noise(seed, LAYOUT.length) for seed in range(start, start + 8)], 0.3) for start in (0, 8)
    )
    cut = measured([joined(10 * seed, False) for seed in range(8)], 0.3)
    assert len(without.by_clip) == 8
    assert np.mean(without.by_clip) == pytest.approx(without.at_seams)
    more, low, high = flux_difference(cut, without)
    assert 0 < low < more < high
    more, low, high = flux_difference(other, without)
    assert low < 0 < high
    assert low < more < high


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_where_there_is_no_seam_none_is_found(scale: float) -> None:
    clips = [noise(seed, LAYOUT.length, 6.0 * (seed % 2)) for seed in range(8)]
    flux = measured(clips, scale)
    assert 0.9 < flux.ratio < 1.1
    assert 0.3 < flux.share < 0.7


def test_a_steady_tone_has_no_flux_and_a_new_one_has() -> None:
    time = np.arange(RATE) / RATE
    audio = np.concatenate([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 2000 * time)])
    flux = spectral_flux(audio, RATE, 0.05)
    assert np.nanargmax(flux) == pytest.approx(100, abs=3)
    assert flux[50] < 0.05 * flux[100]
    assert np.isnan(flux[0])


def test_stretches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 stretches but expected 2"):
        seam_flux([noise(0, 4.0)], RATE, 0.02, [(2.0, 2.1)], [(1.0, 1.1)])
    with pytest.raises(ValueError, match="expected a stretch of the clip"):
        seam_flux([noise(0, 4.0)], RATE, 0.02, [(2.0, 2.1)], [(1.0, 1.1), (5.0, 5.1)])


@pytest.mark.slow
def test_no_seam_is_found_in_windows_of_the_demonstration_checkpoint() -> None:
    """More in the overlaps than in the middle of the windows, that is; `scripts/sound-quality seams` has more clips."""
    prompts = ("a steady hiss", "rain comes down", "a clock ticks", "a low engine hums", "birds sing", "ocean waves")
    with running_stages(Settings(str(DEMO_CHECKPOINT), device="cpu")) as stages:
        layout = make_layout(stages.geometry, None, 4)
        rows = [
            replace(row, prompt=prompt, window_length_in_s=layout.window)
            for row, prompt in zip(make_rows(len(prompts), layout.length, 20), prompts, strict=True)
        ]
        clips = [stages.generate(row)[0, 0] for row in rows]
    for scale in SCALES_IN_S:
        assert seam_flux(clips, RATE, scale, layout.seams, layout.between).ratio < 1.15
