"""Results as files."""

import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from audioldm2_triton import GenerationResult, InvalidArgumentError
from audioldm2_triton.plot import MIN_HOP, NUM_MELS, WINDOW, log_mel_spectrogram, mel_filters
from environments import python

SAMPLING_RATE = 16000
STEP = 2.0**-15  # of 16-bit PCM


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE).astype(np.float32)


def result(audio: np.ndarray, prompt: str = "a tone") -> GenerationResult:
    return GenerationResult(audio, np.linspace(1, 0, len(audio), dtype=np.float32), 7, SAMPLING_RATE, prompt)


@pytest.mark.parametrize(("suffix", "kind"), [(".wav", "WAV"), (".WAV", "WAV"), (".flac", "FLAC")])
def test_files_hold_the_chosen_waveform_in_16_bits(tmp_path: Path, suffix: str, kind: str) -> None:
    audio = 0.5 * np.stack([tone(440), tone(1000)])
    for index in (0, 1):
        path = result(audio).save(tmp_path / f"out{suffix}", index)
        info = soundfile.info(path)
        assert (info.format, info.subtype, info.samplerate, info.channels) == (kind, "PCM_16", SAMPLING_RATE, 1)
        read, _ = soundfile.read(path)
        np.testing.assert_allclose(read, audio[index], atol=1.5 * STEP)


def test_what_is_louder_than_full_scale_is_clipped_and_does_not_wrap_around(tmp_path: Path) -> None:
    audio = 3 * tone(440)[None]
    read, _ = soundfile.read(result(audio).save(tmp_path / "loud.wav"))
    np.testing.assert_allclose(read, np.clip(audio[0], -1, 1), atol=1.5 * STEP)


def test_sizes() -> None:
    made = result(np.zeros((3, 8000), np.float32))
    assert (made.num_waveforms, made.num_samples, made.duration_in_s) == (3, 8000, 0.5)


@pytest.mark.parametrize(
    ("name", "expected"), [("out.mp3", r"\.wav or \.flac"), ("out", r"\.wav or \.flac"), ("no/out.wav", "existing")]
)
def test_other_paths_are_refused_with_what_is_accepted(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"`path`: got .* but expected .*{expected}"):
        result(np.zeros((1, 10), np.float32)).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_that_is_not_there_is_refused(tmp_path: Path, index: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"`index`: got {index} but expected an integer from 0 to 1"):
        result(np.zeros((2, 10), np.float32)).save(tmp_path / "out.wav", index)


@pytest.mark.parametrize("prompt", ["a $broken math", "雨の音 🌧", "", "word " * 400])
@pytest.mark.filterwarnings("error")
def test_a_plot_is_a_picture_whatever_the_prompt(tmp_path: Path, prompt: str) -> None:
    path = result(tone(440)[None], prompt).plot(tmp_path / "out.png")
    height, width, _ = imread(path).shape
    assert width > height > 300


def test_a_plot_shows_the_chosen_waveform(tmp_path: Path) -> None:
    made = result(np.stack([tone(440), tone(2000)]))
    first, second = (imread(made.plot(tmp_path / f"{index}.png", index)) for index in (0, 1))
    assert np.abs(first - second).max() > 0.1


def test_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from audioldm2_triton import GenerationResult;"
        "assert 'matplotlib' not in sys.modules;"
        f"GenerationResult(np.zeros((1, 4000), np.float32), None, 1, 16000, 'x').plot({str(tmp_path / 'out.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([python("plot"), "-c", code], check=True)
    assert (tmp_path / "out.png").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"audioldm2-triton\[plot\]"):
        result(np.zeros((1, 10), np.float32)).plot(tmp_path / "out.png")


def test_mel_filters_are_librosas() -> None:
    expected = librosa.filters.mel(sr=SAMPLING_RATE, n_fft=WINDOW, n_mels=NUM_MELS, htk=True, norm=None)
    np.testing.assert_allclose(mel_filters(SAMPLING_RATE), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:n_fft=1024 is too large")
@pytest.mark.parametrize("num_samples", [1, 100, 8000])
def test_spectrograms_are_librosas(num_samples: int) -> None:
    samples = tone(440)[:num_samples]
    expected = librosa.feature.melspectrogram(
        y=samples, sr=SAMPLING_RATE, n_fft=WINDOW, hop_length=MIN_HOP, n_mels=NUM_MELS, power=1, htk=True, norm=None
    )
    np.testing.assert_allclose(10 ** (log_mel_spectrogram(samples, SAMPLING_RATE) / 20), expected, rtol=1e-3, atol=1e-4)


def test_a_long_clip_has_no_more_frames_than_the_picture_shows() -> None:
    assert log_mel_spectrogram(np.zeros(300 * SAMPLING_RATE, np.float32), SAMPLING_RATE).shape[1] <= 2001
