"""Rising positions in few bits: which values of a table are kept.

As a bitmap, or in the two halves of Elias (1974) and Fano (1971): low bits as they are, high bits in unary. Both carry
the number of ones before each 512 bits, so that a row is found without reading all that is before it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 512


def _bitmap_nbytes(bits: int) -> int:
    return -(-bits // 8) + 4 * -(-bits // _BLOCK)


def _low_bits(count: int, size: int) -> int:
    return max(int(math.log2(size / count)), 0)


def _halves_nbytes(count: int, size: int) -> int:
    low = _low_bits(count, size)
    return -(-count * low // 8) + _bitmap_nbytes(count + ((size - 1) >> low) + 1)


def positions_nbytes(count: int, size: int) -> int:
    """Bytes that :func:`pack_positions` needs; none where all positions are taken.

    Parameters
    ----------
    count : int
        Number of positions.
    size : int
        They are below it.

    Returns
    -------
    int

    Examples
    --------
    >>> positions_nbytes(500, 1000), positions_nbytes(10, 1000), positions_nbytes(1000, 1000)
    (133, 16, 0)
    """
    if count in (0, size):
        return 0
    return min(_bitmap_nbytes(size), _halves_nbytes(count, size))


def pack_positions(positions: Tensor, size: int) -> list[Tensor]:
    """Positions in the shorter of the two ways.

    Parameters
    ----------
    positions : int64 tensor of shape (count,)
        Rising, below ``size``.
    size : int

    Returns
    -------
    list of Tensor
        Of :func:`positions_nbytes` bytes together: bits (uint8) and counts (int32), and low bits (uint8) if in halves.

    Examples
    --------
    >>> import torch
    >>> [list(tensor.shape) for tensor in pack_positions(torch.tensor([3, 700, 701]), 1000)]
    [[1], [1], [3]]
    """
    found = positions.cpu().numpy()
    count = len(found)
    if count in (0, size):
        return []
    if _bitmap_nbytes(size) <= _halves_nbytes(count, size):
        return _bitmap(found, size)
    low = _low_bits(count, size)
    high = _bitmap((found >> low) + np.arange(count), count + ((size - 1) >> low) + 1)
    fields = (found[:, None] >> np.arange(low) & 1).astype(np.uint8)
    return [*high, torch.from_numpy(np.packbits(fields.reshape(-1), bitorder="little"))]


def _bitmap(found: NDArray[np.int64], size: int) -> list[Tensor]:
    bits = np.zeros(-(-size // _BLOCK) * _BLOCK, np.uint8)
    bits[found] = 1
    counts = bits.reshape(-1, _BLOCK).sum(1, dtype=np.int64)
    before = np.cumsum(counts) - counts
    packed = np.packbits(bits[:size], bitorder="little")
    return [torch.from_numpy(packed), torch.from_numpy(before.astype(np.int32))]


def unpack_positions(packed: list[Tensor], count: int, size: int) -> Tensor:
    """The positions again.

    Parameters
    ----------
    packed : list of Tensor
        From :func:`pack_positions`.
    count, size : int
        Number of positions, and what they are below.

    Returns
    -------
    int64 tensor of shape (count,)

    Examples
    --------
    >>> import torch
    >>> unpack_positions(pack_positions(torch.tensor([3, 700, 701]), 1000), 3, 1000)
    tensor([  3, 700, 701])
    """
    if not packed:
        return torch.arange(count)
    ones = np.flatnonzero(np.unpackbits(packed[0].numpy(), bitorder="little"))
    if len(packed) == 2:
        return torch.from_numpy(ones)
    low = _low_bits(count, size)
    fields = np.unpackbits(packed[2].numpy(), count=count * low, bitorder="little").reshape(count, low)
    lows = fields.astype(np.int64) @ (1 << np.arange(low))
    return torch.from_numpy((ones - np.arange(count) << low) + lows)


def _bits_at(bits: Tensor, at: Tensor) -> Tensor:
    """Bits at some places, 0 behind the end."""
    found = bits[(at >> 3).clamp(max=len(bits) - 1)].long() >> (at & 7) & 1
    return torch.where(at < 8 * len(bits), found, 0)


def find_positions(
    packed: list[Tensor], count: int, size: int, starts: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The positions in some windows, read where they are: nothing as large as ``count`` or ``size`` is unpacked.

    Parameters
    ----------
    packed : list of Tensor
        From :func:`pack_positions`.
    count, size : int
        Number of positions, and what they are below.
    starts : int64 tensor of shape (windows,)
        A window is ``range(start, start + width)``, within ``size``.
    width : int

    Returns
    -------
    tuple of three int64 tensors
        For each position found: its window, its place in the window, its number among all positions.

    Examples
    --------
    >>> import torch
    >>> packed = pack_positions(torch.tensor([3, 700, 701]), 1000)
    >>> find_positions(packed, 3, 1000, torch.tensor([700, 0]), 10)
    (tensor([0, 0, 1]), tensor([0, 1, 3]), tensor([1, 2, 0]))
    """
    device = starts.device
    if not packed:
        places = torch.arange(width if count else 0, device=device).repeat(len(starts))
        windows = torch.arange(len(starts), device=device).repeat_interleave(width if count else 0)
        return windows, places, starts[windows] + places
    bits, before = packed[:2]
    if len(packed) == 2:
        block = starts // _BLOCK
        at = _BLOCK * block[:, None] + torch.arange(_BLOCK + width, device=device)
        ones = _bits_at(bits, at)
        numbers = before[block].long()[:, None] + ones.cumsum(1) - 1
        inside = (at >= starts[:, None]) & (at < starts[:, None] + width)
        windows, column = (inside & (ones == 1)).nonzero(as_tuple=True)
        return windows, at[windows, column] - starts[windows], numbers[windows, column]
    low = _low_bits(count, size)
    zeros = _BLOCK * torch.arange(len(before), device=device) - before
    first, last = starts >> low, (starts + width - 1) >> low
    # Positions whose high bits are h stand behind the h-th zero.
    block = (torch.searchsorted(zeros, first) - 1).clamp(min=0)
    length = _BLOCK
    while True:
        at = _BLOCK * block[:, None] + torch.arange(length, device=device)
        ones = _bits_at(bits, at)
        high = zeros[block][:, None] + (1 - ones).cumsum(1)
        if bool((high[:, -1] > last).all()):
            break
        length *= 2
    windows, column = ((ones == 1) & (high >= first[:, None]) & (high <= last[:, None])).nonzero(as_tuple=True)
    high = high[windows, column]
    numbers = at[windows, column] - high
    places = torch.arange(low, device=device)
    lows = (_bits_at(packed[2], numbers[:, None] * low + places) << places).sum(1)
    offsets = (high << low) + lows - starts[windows]
    inside = (offsets >= 0) & (offsets < width)
    return windows[inside], offsets[inside], numbers[inside]
