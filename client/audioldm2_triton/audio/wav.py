"""WAV files, which need no library. libsndfile loses texts of more than 2 KiB when it reads them."""

import struct
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

PCM: Final = 1
FLOAT: Final = 3
INFO: Final[Mapping[str, bytes]] = {"title": b"INAM", "artist": b"IART", "software": b"ISFT", "comment": b"ICMT"}


def write_wav(samples: NDArray[np.float32], sampling_rate: int, subtype: str, tags: Mapping[str, str]) -> bytes:
    """Returns the bytes of a file with one channel.

    Args:
        samples: float32 [S]; for the two subtypes with whole numbers in [-1, 1].
        subtype: PCM_16, PCM_24 or FLOAT.
        tags: texts by the names in `INFO`.
    """
    kind, data = _encoded(samples, subtype)
    width = len(data) // len(samples) if len(samples) else 1
    layout = struct.pack("<HHIIHH", kind, 1, sampling_rate, sampling_rate * width, width, 8 * width)
    chunks = [_chunk(b"fmt ", layout)]
    if kind == FLOAT:
        chunks.append(_chunk(b"fact", struct.pack("<I", len(samples))))
    texts = b"".join(_chunk(INFO[name], text.encode() + b"\0") for name, text in tags.items())
    # The texts come last, for readers that expect the samples after 44 bytes.
    chunks += [_chunk(b"data", data), _chunk(b"LIST", b"INFO" + texts)]
    return _chunk(b"RIFF", b"WAVE" + b"".join(chunks))


def read_wav_tags(content: bytes) -> dict[str, str]:
    """Returns the texts of a file by the names in `INFO`; those of one that is damaged as far as they can be read."""
    names = {key: name for name, key in INFO.items()}
    lists = [body[4:] for key, body in _chunks(content[12:]) if key == b"LIST" and body[:4] == b"INFO"]
    found = [item for texts in lists for item in _chunks(texts)]
    return {names[key]: body.rstrip(b"\0").decode(errors="replace") for key, body in found if key in names}


def _encoded(samples: NDArray[np.float32], subtype: str) -> tuple[int, bytes]:
    if subtype == "FLOAT":
        return FLOAT, samples.astype("<f4").tobytes()
    # As libsndfile does, so that WAV and FLAC have the same samples: 32 bits, of which the upper ones are kept.
    whole = np.minimum(np.rint(samples.astype(np.float64) * 2**31), 2**31 - 1).astype("<i4")
    width = {"PCM_16": 2, "PCM_24": 3}[subtype]
    return PCM, whole.view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()


def _chunk(key: bytes, body: bytes) -> bytes:
    return key + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 0
    while start + 8 <= len(content):
        key, size = struct.unpack_from("<4sI", content, start)
        yield key, content[start + 8 : start + 8 + size]
        start += 8 + size + size % 2
