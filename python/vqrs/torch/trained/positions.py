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
