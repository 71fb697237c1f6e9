"""GPU kernels in the Triton language, for what PyTorch does in several passes and in another memory layout.

`group_norm` reads and writes channels-last tensors, as the convolutions around it do. PyTorch's own wants contiguous
ones: two copies, three kernels of its own and the activation, 93 times a step. `gated_gelu` saves two passes over the
widest tensors of the UNet. Statistics and activations are in float32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# A kernel's arguments are Triton's own: pointers and scalars that have no type in Python.

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE: Final = 4096  # elements of a tensor that a program holds at a time
PROGRAMS: Final = 512  # in all, from which on more of them bring nothing
MAX_CHUNKS: Final = 64  # of a row
# Numbers that change with the batch must not be part of what is compiled: a new length would wait for the compiler.
_CHANGING: Final = ["positions", "tiles"]


@triton.jit(do_not_specialize=_CHANGING)
def _group_moments(
    x,
    moments,
    valid,
    positions,
    tiles,
    has_valid: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Number, mean and sum of squared distances of each group in one chunk of a row's positions."""
    row, chunk, chunks = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, padded_width)
    group = tl.arange(0, groups)
    offsets = group[None, :, None] * width + channel[None, None, :]
    base = x + row.to(tl.int64) * positions * groups * width
    last = positions
    if has_valid:
        last = tl.load(valid + row).to(tl.int32)
    count = 0.0
    mean = tl.zeros((groups,), tl.float32)
    squares = tl.zeros((groups,), tl.float32)
    for index in range(tiles):
        first = (chunk * tiles + index) * tile
        position = first + tl.arange(0, tile)
        inside = (position < last)[:, None, None] & (channel < width)[None, None, :]
        values = tl.load(base + position[:, None, None] * (groups * width) + offsets, mask=inside, other=0.0)
        values = values.to(tl.float32)
        number = tl.sum((position < last).to(tl.float32), 0) * width
        own_mean = tl.sum(tl.sum(values, 2), 0) / tl.maximum(number, 1.0)
        distance = tl.where(inside, values - own_mean[None, :, None], 0.0)
        own_squares = tl.sum(tl.sum(distance * distance, 2), 0)
        # Chan, Golub and LeVeque (1979): moments of two parts to those of both, without cancellation.
        total = count + number
        apart = own_mean - mean
        share = number / tl.maximum(total, 1.0)
        mean += apart * share
        squares += own_squares + apart * apart * (count * share)
        count = total
    out = moments + (row * chunks + chunk) * 3 * groups + group
    tl.store(out, tl.zeros((groups,), tl.float32) + count)
    tl.store(out + groups, mean)
    tl.store(out + 2 * groups, squares)


@triton.jit(do_not_specialize=_CHANGING)
def _normalise_groups(
    x,
    y,
    moments,
    weight,
    bias,
    valid,
    positions,
    tiles,
    eps,
    has_valid: tl.constexpr,
    activate: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    max_chunks: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One chunk of a row, by the moments of all chunks; padded positions become zeros."""
    row, chunk, chunks = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, padded_width)
    group = tl.arange(0, groups)
    part = tl.arange(0, max_chunks)
    at = moments + (row * chunks + part[:, None]) * 3 * groups + group[None, :]
    has_part = (part < chunks)[:, None]
    counts = tl.load(at, mask=has_part, other=0.0)
    means = tl.load(at + groups, mask=has_part, other=0.0)
    squares = tl.load(at + 2 * groups, mask=has_part, other=0.0)
    total = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / total
    apart = means - mean[None, :]
    scale = tl.rsqrt((tl.sum(squares, 0) + tl.sum(counts * apart * apart, 0)) / total + eps)
    offsets = group[:, None] * width + channel[None, :]
    in_group = (channel < width)[None, :]
    factor = tl.load(weight + offsets, mask=in_group, other=0.0).to(tl.float32) * scale[:, None]
    shift = tl.load(bias + offsets, mask=in_group, other=0.0).to(tl.float32)
    base = row.to(tl.int64) * positions * groups * width
    own = positions
    if has_valid:
        own = tl.load(valid + row).to(tl.int32)
    for index in range(tiles):
        position = (chunk * tiles + index) * tile + tl.arange(0, tile)
        inside = (position < positions)[:, None, None] & in_group[None]
        places = base + position[:, None, None] * (groups * width) + offsets[None]
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        result = (values - mean[None, :, None]) * factor[None] + shift[None]
        if activate:
            result = result * tl.sigmoid(result)
        if has_valid:
            result = tl.where((position < own)[:, None, None], result, 0.0)
        tl.store(y + places, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate(
    x,
    y,
    columns,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    value = tl.load(x + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * columns + columns + column, mask=inside, other=0.0).to(tl.float32)
    # 1 / sqrt(2): the exact GELU, as `torch.nn.functional.gelu`.
    result = value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)


def group_norm(
    hidden: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activate: bool = False,
    valid_positions: Tensor | None = None,
) -> Tensor:
    """Group normalisation (Wu and He, 2018), and SiLU after it.

    Args:
        hidden: `[rows, channels, frames, width]`; copied where it is not channels-last.
        groups: a power of two.
        weight, bias: `[channels]`.
        activate: whether SiLU follows.
        valid_positions: `[rows]`, how many of a row's positions count, at least one; the others become zeros.

    Returns the same shape and dtype, channels-last.
    """
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    rows, channels, frames, breadth = hidden.shape
    positions, width = frames * breadth, channels // groups
    padded_width = triton.next_power_of_2(width)
    tile = max(1, TILE // (groups * padded_width))
    # As many chunks as fill the device, each of whole tiles.
    wanted = min(triton.cdiv(positions, tile), max(1, PROGRAMS // rows), MAX_CHUNKS)
    tiles = triton.cdiv(triton.cdiv(positions, wanted), tile)
    chunks = triton.cdiv(positions, tiles * tile)
    moments = torch.empty((rows, chunks, 3, groups), device=hidden.device, dtype=torch.float32)
    output = torch.empty_like(hidden)
    has_valid = valid_positions is not None
    valid: Any = valid_positions if has_valid else moments  # not read
    _group_moments[(chunks, rows)](
        *(hidden, moments, valid, positions, tiles, has_valid, groups, width, padded_width, tile), num_warps=4
    )
    _normalise_groups[(chunks, rows)](
        *(hidden, output, moments, weight, bias, valid, positions, tiles, eps, has_valid, activate),
        *(groups, width, padded_width, MAX_CHUNKS, tile),
        num_warps=4,
    )
    return output


def gated_gelu(hidden: Tensor) -> Tensor:
    """The first half of the last axis times the GELU of the second: `[..., 2 * F]` to `[..., F]`."""
    hidden = hidden.contiguous()
    columns = hidden.shape[-1] // 2
    output = hidden.new_empty((*hidden.shape[:-1], columns))
    block = min(1024, triton.next_power_of_2(columns))
    _gate[(output.numel() // columns, triton.cdiv(columns, block))](hidden, output, columns, block)
    return output
