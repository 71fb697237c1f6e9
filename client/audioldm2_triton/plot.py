"""Pictures of a waveform and its log-mel spectrogram. Needs the extra `plot` (matplotlib)."""

import textwrap
import warnings
from os import PathLike
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton.files import check_path

T = TypeVar("T", np.float64, NDArray[np.float64])

NUM_MELS: Final = 64  # as in AudioLDM 2's own spectrograms
WINDOW: Final = 1024  # samples, 64 ms at 16 kHz
MIN_HOP: Final = 160  # samples, 10 ms at 16 kHz
MAX_FRAMES: Final = 2000  # more than the picture has columns
FLOOR: Final = 1e-5  # magnitudes below are silence
TICKS_IN_HZ: Final = (0, 250, 500, 1000, 2000, 4000, 8000, 16000)
SIZE_IN_INCHES: Final = (10.0, 5.0)
DPI: Final = 120
MAX_TITLE: Final = 160  # characters


def require_matplotlib() -> None:
    """Raises `ImportError`, which names the extra, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None


def save_plot(path: str | PathLike[str], samples: NDArray[np.float32], sampling_rate: int, title: str = "") -> Path:
    """Draws `samples`, float32 [S] at `sampling_rate` Hz, to a .png file: waveform above, log-mel spectrogram below.

    Raises `ImportError` without matplotlib, and `InvalidArgumentError` for anything but a .png file in an existing
    directory.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_path(path, (".png",))
    duration = len(samples) / sampling_rate
    # Not through pyplot, whose figures and backend belong to the caller.
    figure = Figure(figsize=SIZE_IN_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(np.arange(len(samples)) / sampling_rate, samples, linewidth=0.5)
    upper.set(ylim=(-1.05, 1.05), ylabel="amplitude", xlim=(0, duration))
    shortened = textwrap.shorten(title, MAX_TITLE, placeholder=" ...")
    upper.set_title("\n".join(textwrap.wrap(shortened, 90)), fontsize=9, parse_math=False)
    image = lower.imshow(
        log_mel_spectrogram(samples, sampling_rate),
        origin="lower",
        aspect="auto",
        extent=(0, duration, 0, NUM_MELS),
        interpolation="nearest",
    )
    hertz = np.array([each for each in TICKS_IN_HZ if each <= sampling_rate / 2], np.float64)
    heights = NUM_MELS * _hertz_to_mel(hertz) / _hertz_to_mel(np.float64(sampling_rate / 2))
    lower.set(xlabel="time in s", ylabel="frequency in Hz", yticks=heights, yticklabels=[f"{each:g}" for each in hertz])
    figure.colorbar(image, ax=lower, label="dB", pad=0.01)
    with warnings.catch_warnings():
        # A title in a script that the font lacks is drawn as boxes, which needs no warning.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, format="png")
    return path


def log_mel_spectrogram(samples: NDArray[np.float32], sampling_rate: int) -> NDArray[np.float64]:
    """float64 [NUM_MELS, frames] in dB: a Hann window of `WINDOW` samples, frames centred and evenly spaced."""
    hop = max(MIN_HOP, -(-len(samples) // MAX_FRAMES))
    padded = np.pad(np.asarray(samples, np.float64), WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::hop]
    window = np.hanning(WINDOW + 1)[:-1]
    magnitudes = np.abs(np.fft.rfft(frames * window))
    return 20 * np.log10(np.maximum(mel_filters(sampling_rate) @ magnitudes.T, FLOOR))


def mel_filters(sampling_rate: int) -> NDArray[np.float64]:
    """float64 [NUM_MELS, WINDOW // 2 + 1]: triangles of height 1, evenly spaced in mel from 0 Hz to Nyquist."""
    nyquist = sampling_rate / 2
    corners = _mel_to_hertz(np.linspace(0, _hertz_to_mel(np.float64(nyquist)), NUM_MELS + 2))[:, None]
    bins = np.linspace(0, nyquist, WINDOW // 2 + 1)
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    filters: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    return filters


def _hertz_to_mel(hertz: T) -> T:
    mel: T = 2595 * np.log10(1 + hertz / 700)
    return mel


def _mel_to_hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return 700 * (10 ** (mel / 2595) - 1)
