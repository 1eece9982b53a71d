"""Integers of a few bits behind one another: how pointers and maps are held."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes of ``count`` integers of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Integers behind one another with no gap, least significant bit first.

    Parameters
    ----------
    values : int64 tensor of any shape
        From 0 to ``2**bits - 1``, in the order of :func:`torch.flatten`.
    bits : int
        From 0 (then nothing is held) to 32.

    Returns
    -------
    uint8 tensor of shape (packed_nbytes(values.numel(), bits),)

    Examples
    --------
    >>> pack(torch.tensor([1, 2, 3]), bits=3)
    tensor([209,   0], dtype=torch.uint8)
    """
    flat = values.flatten().cpu().numpy().astype("<u4").view(np.uint8).reshape(-1, 4)
    out = np.empty(packed_nbytes(len(flat), bits), np.uint8)
    block = 1 << 18  # a multiple of 8: blocks end where bytes do
    for start in range(0, len(flat), block):
        fields = np.unpackbits(flat[start : start + block], axis=1, count=bits, bitorder="little")
        part = np.packbits(fields.reshape(-1), bitorder="little")
        out[start * bits // 8 :][: len(part)] = part
    return torch.from_numpy(out).to(values.device)


def unpack(packed: Tensor, bits: int, places: Tensor) -> Tensor:
    """The integers at some places of what :func:`pack` gives.

    Parameters
    ----------
    packed : uint8 tensor of shape (n_bytes,)
    bits : int
    places : int64 tensor of any shape

    Returns
    -------
    int64 tensor of the shape of ``places``

    Examples
    --------
    >>> unpack(torch.tensor([209, 0], dtype=torch.uint8), bits=3, places=torch.tensor([2, 0]))
    tensor([3, 1])
    """
    if bits == 0:
        return torch.zeros_like(places)
    first = places * bits
    byte, shift = first >> 3, first & 7
    # A field starts at any bit of its first byte, unless the width divides the byte.
    window = packed[byte].long()
    for more in range(1, 1 if 8 % bits == 0 else (bits + 14) // 8):
        window |= packed[(byte + more).clamp(max=len(packed) - 1)].long() << (8 * more)
    return (window >> shift) & ((1 << bits) - 1)


def pack_rows(fields: Tensor, bits: int) -> Tensor:
    """Integers of a row behind one another, least significant bit first, each row padded to whole bytes.

    :func:`vqrs.torch.forms.unpack_bits` reads them; :func:`vqrs.reference.pack_bits` is the same in NumPy.

    Parameters
    ----------
    fields : int64 tensor of shape (n_rows, n_fields)
        From 0 to ``2**bits - 1``.
    bits : int

    Returns
    -------
    uint8 tensor of shape (n_rows, ceil(n_fields * bits / 8))

    Examples
    --------
    >>> pack_rows(torch.tensor([[1, 2, 3]]), bits=4)
    tensor([[33,  3]], dtype=torch.uint8)
    """
    single = ((fields[:, :, None] >> torch.arange(bits, device=fields.device)) & 1).reshape(len(fields), -1)
    single = functional.pad(single.to(torch.uint8), (0, -single.shape[1] % 8))
    places = 1 << torch.arange(8, device=fields.device, dtype=torch.uint8)
    return (single.reshape(len(fields), -1, 8) * places).sum(2, dtype=torch.uint8)
