"""The few shapes that the decoder is compiled for, and the padding of batches to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buckets:
    """Numbers of rows and of frames, both ascending; a batch is padded to the next of each."""

    rows: tuple[int, ...]
    frames: tuple[int, ...]
    max_frames_per_call: int  # rows times frames, which bounds the memory; one row is always a bucket

    def __post_init__(self) -> None:
        for name, sizes in (("rows", self.rows), ("frames", self.frames)):
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name}: got {sizes} but expected ascending numbers from 1")
        if self.rows[0] != 1:
            raise ValueError(f"rows: got {self.rows} but expected the first to be 1")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All (rows, frames), the shortest first."""
        return [(rows, frames) for frames, rows in product(self.frames, self.rows) if rows in self.rows_of(frames)]

    def rows_of(self, frames: int) -> tuple[int, ...]:
        """The row buckets of one of `frames`."""
        return tuple(rows for rows in self.rows if rows == 1 or rows * frames <= self.max_frames_per_call)

    def fits(self, frames: int) -> bool:
        return frames <= self.frames[-1]


def map_in_buckets(
    function: Callable[[Tensor, Tensor], Tensor],
    items: Sequence[Tensor],
    buckets: Buckets,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Maps items [..., frames, width] with `function`, called only with batches in `buckets.shapes`.

    Args:
        function: takes `[rows, ..., frames, width]`, with zeros after an item's own frames, and the valid frames, int64
            `[rows]`.
        items: of any number of frames up to the largest bucket, and otherwise of one shape.

    Returns:
        Each item's row of the result, including whatever the function makes of the padding.
    """
    results: list[Tensor] = [torch.empty(0)] * len(items)
    by_frames: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        by_frames.setdefault(_next(buckets.frames, item.shape[-2]), []).append(index)
    for frames, indices in by_frames.items():
        sizes = buckets.rows_of(frames)
        for first in range(0, len(indices), sizes[-1]):
            part = indices[first : first + sizes[-1]]
            rows = _next(sizes, len(part))
            shape = items[part[0]].shape
            batch = torch.zeros(rows, *shape[:-2], frames, shape[-1], device=device, dtype=dtype)
            for row, index in enumerate(part):
                batch[row, ..., : items[index].shape[-2], :] = items[index]
            # Rows without an item are one frame of silence.
            valid = [items[index].shape[-2] for index in part] + [1] * (rows - len(part))
            outputs = function(batch, torch.tensor(valid, device=device))
            for row, index in enumerate(part):
                results[index] = outputs[row]
    return results


def _next(sizes: Sequence[int], size: int) -> int:
    return min(bucket for bucket in sizes if bucket >= size)
