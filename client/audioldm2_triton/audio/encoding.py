"""Encodes a sound as the bytes of an audio file, and reads a file's texts."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from audioldm2_triton import contract
from audioldm2_triton.audio.wav import read_wav_tags, write_wav
from audioldm2_triton.errors import invalid

BLOCK: Final = 2**15  # samples; a long sound in one call overflows the stack in libvorbis


@dataclass(frozen=True)
class AudioFormat:
    """What a name in `contract.AUDIO_FORMATS` stands for."""

    suffix: str  # of a file's name
    container: str  # by libsndfile's names
    subtype: str


FORMATS: Final[Mapping[str, AudioFormat]] = dict(
    zip(
        contract.AUDIO_FORMATS,
        (
            AudioFormat(".wav", "WAV", "PCM_16"),
            AudioFormat(".wav", "WAV", "PCM_24"),
            AudioFormat(".wav", "WAV", "FLOAT"),
            AudioFormat(".flac", "FLAC", "PCM_16"),
            AudioFormat(".flac", "FLAC", "PCM_24"),
            AudioFormat(".ogg", "OGG", "VORBIS"),
            AudioFormat(".opus", "OGG", "OPUS"),
            AudioFormat(".mp3", "MP3", "MPEG_LAYER_III"),
        ),
        strict=True,
    )
)


def check_encodable(name: str, sampling_rate: int | None = None) -> None:
    """Checks that this machine can write a format; the sampling rate too, if it is known.

    Raises `InvalidArgumentError` for a name that is none, or what the format cannot hold, and `ImportError` without
    libsndfile, which all but WAV needs.
    """
    if name not in FORMATS:
        raise invalid("audio_format", name, f"one of {', '.join(FORMATS)}")
    if FORMATS[name].container != "WAV":
        soundfile = import_soundfile()
        if not soundfile.check_format(FORMATS[name].container, FORMATS[name].subtype):
            raise invalid("audio_format", name, f"a format that libsndfile {soundfile.__libsndfile_version__} writes")
        if sampling_rate is not None:
            encode_audio(np.zeros(1, np.float32), sampling_rate, name, {})


def encode_audio(samples: NDArray[np.float32], sampling_rate: int, name: str, tags: Mapping[str, str]) -> bytes:
    """Returns a sound, float32 [S], as the bytes of a file; samples beyond 1 are clipped, except in `wavfloat`.

    Args:
        name: one of `FORMATS`.
        tags: any of title, artist, software and comment.

    Raises `InvalidArgumentError` for a sampling rate that the format does not know, and `ImportError` like
    `check_encodable`.
    """
    chosen = FORMATS[name]
    if chosen.subtype != "FLOAT":
        samples = np.clip(samples, -1.0, 1.0)
    if chosen.container == "WAV":
        return write_wav(samples, sampling_rate, chosen.subtype, tags)
    soundfile = import_soundfile()
    content = io.BytesIO()
    try:
        with soundfile.SoundFile(content, "w", sampling_rate, 1, chosen.subtype, format=chosen.container) as file:
            for tag, text in tags.items():
                # libsndfile has LAME read UTF-8 as Latin-1.
                if chosen.container != "MP3" or text.isascii():
                    setattr(file, tag, text)
            for start in range(0, len(samples), BLOCK):
                file.write(samples[start : start + BLOCK])
    except soundfile.LibsndfileError as error:
        raise invalid("audio_format", name, f"one that can hold {sampling_rate} Hz: {error}") from error
    return content.getvalue()


def read_tags(content: bytes) -> dict[str, str]:
    """Returns the texts of an audio file. Raises `InvalidArgumentError` for anything else, and `ImportError`."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return read_wav_tags(content)
    soundfile = import_soundfile()
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            return dict(file.copy_metadata())
    except soundfile.LibsndfileError as error:
        raise invalid("file", content[:8], f"an audio file: {error}") from error


def import_soundfile() -> Any:
    """Returns the module. Raises `ImportError`, which says what is missing: not every machine has libsndfile.

    Imported only where it is needed, so that everything else works without it.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        message = "audio files other than WAV need the package soundfile, and libsndfile"
        raise ImportError(f"{message}: {error}") from error
    return soundfile
