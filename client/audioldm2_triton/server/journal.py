"""What the stages tell each other about a request, so that whoever answers it can say how it went.

It travels as the tensor `journal`, INT64 [B, 8], with the same numbers in every row; 0: not known.
"""

import time
from dataclasses import astuple, dataclass, fields
from typing import Final

import numpy as np

TENSOR: Final = "journal"
PARTS: Final = ("text", "queue", "denoising", "decoding")


@dataclass(frozen=True)
class Journal:
    """The moments of a request, in ns on the monotonic clock that all processes of a machine share, and its size."""

    arrived_ns: int
    conditioned_ns: int = 0  # when its texts were encoded
    admitted_ns: int = 0  # before its first step
    denoised_ns: int = 0
    prompts: int = 0
    waveforms: int = 0  # of all prompts together
    steps: int = 0  # the most that a prompt asks for
    audio_ms: int = 0  # the length of one waveform

    def tensor(self, rows: int) -> np.ndarray:
        return np.tile(np.array(astuple(self), np.int64), (rows, 1))

    def parts(self, ended_ns: int) -> dict[str, tuple[int, int]]:
        """Returns from when to when each part took, of which the last was under way at the end.

        Nothing for a request whose texts were not encoded here: which part it was in is not known.
        """
        found: dict[str, tuple[int, int]] = {}
        begin = self.arrived_ns
        for part, end in zip(PARTS, (self.conditioned_ns, self.admitted_ns, self.denoised_ns, ended_ns), strict=True):
            if self.conditioned_ns:
                found[part] = (begin, max(begin, end or ended_ns))
            if not end:
                break
            begin = end
        return found


WIDTH: Final = len(fields(Journal))


def read_journal(tensor: np.ndarray | None, arrived_ns: int) -> Journal:
    """Reads what an earlier stage has written.

    A direct caller may send anything: a time that has not come yet is none.

    Args:
        arrived_ns: when the request has reached this stage, which counts if none was before it.
    """
    if tensor is None or tensor.ndim != 2 or tensor.shape[1] != WIDTH or not len(tensor):
        return Journal(arrived_ns)
    arrived, conditioned, admitted, denoised, *size = (int(number) for number in tensor[0])
    now = time.monotonic_ns()
    moments = [moment if 0 < moment <= now else 0 for moment in (conditioned, admitted, denoised)]
    return Journal(arrived if 0 < arrived <= now else arrived_ns, *moments, *(max(0, number) for number in size))
