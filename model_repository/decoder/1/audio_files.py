"""The audio of a request as files, where it wants them instead of samples."""

import base64
from collections.abc import Mapping, Sequence

import numpy as np

from audioldm2_triton.audio.encoding import encode_audio
from audioldm2_triton.audio.origin import Origin, tags_of
from audioldm2_triton.server.wanted_file import WantedFile
from decoding import in_order


def with_files(
    wanted: Sequence[WantedFile], inputs: Mapping[str, np.ndarray], outputs: dict[str, np.ndarray], checkpoint: str
) -> dict[str, np.ndarray]:
    """Returns a request's outputs with `encoded_audio`, BYTES [B, N], best first; empty where no file is wanted.

    With files, `audio` is [B, N, 0]. The outputs of a part that ranks nothing stay as they are.
    """
    if "order" not in outputs:
        return outputs
    files = np.full(outputs["order"].shape, b"", np.object_)
    if not wanted:
        return {**outputs, "encoded_audio": files}
    audio = outputs["audio"] if "audio" in outputs else in_order(inputs["audio"], outputs["order"])
    rate = int(outputs["sampling_rate"][0, 0])
    for row, file in enumerate(wanted):
        for rank, samples in enumerate(audio[row]):
            files[row, rank] = _encode(file, samples, rate, Origin(file.arguments, checkpoint, rank))
    return {**outputs, "audio": audio[:, :, :0], "encoded_audio": files}


def _encode(file: WantedFile, samples: np.ndarray, sampling_rate: int, origin: Origin) -> bytes:
    content = encode_audio(samples, sampling_rate, file.audio_format, tags_of(origin))
    return base64.b64encode(content) if file.as_base64 else content
