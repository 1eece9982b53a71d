"""Hashes of ids, the same on every platform and in the core."""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_bits(ids: Tensor, seeds: Tensor) -> Tensor:
    """64 random bits for each id and seed: one step of SplitMix64 (Steele, Lea and Flood, 2014) from ``id XOR seed``.

    Parameters
    ----------
    ids, seeds : int64 tensors
        Broadcast against each other.

    Returns
    -------
    int64 tensor

    Examples
    --------
    >>> import torch
    >>> hash_bits(torch.tensor([0, 1]), torch.tensor(42))
    tensor([-4767286540954276203, -5014216602933006456])
    """
    z = (ids ^ seeds) + _GAMMA
    z = (z ^ _shifted(z, 30)) * _MIX[0]
    z = (z ^ _shifted(z, 27)) * _MIX[1]
    return z ^ _shifted(z, 31)


def hash_ids(ids: Tensor, seeds: Tensor, size: int | Tensor) -> Tensor:
    """Places below ``size`` (at most 2^31): the high 64 bits of the product of :func:`hash_bits` and ``size``.

    Parameters
    ----------
    ids, seeds : int64 tensors
        Broadcast against each other.
    size : int or int64 tensor

    Returns
    -------
    int64 tensor

    Examples
    --------
    >>> import torch
    >>> hash_ids(torch.arange(4)[:, None], torch.tensor([7, 8]), 100)
    tensor([[38, 61],
            [73, 68],
            [38,  3],
            [43, 31]])
    """
    bits = hash_bits(ids, seeds)
    high, low = _shifted(bits, 32), bits & 0xFFFFFFFF
    return _shifted(high * size + _shifted(low * size, 32), 32)


def hash_signs(ids: Tensor, seeds: Tensor) -> Tensor:
    """A random sign for each id and seed, float32: the lowest bit of :func:`hash_bits`."""
    return 1.0 - 2.0 * (hash_bits(ids, seeds) & 1).float()


def derived_seeds(seed: Tensor, count: int) -> Tensor:
    """Seeds of ``count`` independent hashes from the one that is stored: :func:`hash_bits` of 0, 1, 2 and so on.

    Parameters
    ----------
    seed : int64 tensor without axes
    count : int

    Returns
    -------
    int64 tensor of shape (count,)

    Examples
    --------
    >>> import torch
    >>> derived_seeds(torch.tensor(42), 2)
    tensor([-4767286540954276203, -5014216602933006456])
    """
    return hash_bits(torch.arange(count, device=seed.device), seed)
