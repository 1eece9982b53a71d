"""Sets of frequent ids: which they are, and how to find the place of one in few bytes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_ID_BYTES = 4
_MOST_IDS = 2**31
_WORD = 64


class HotIds(nn.Module):
    """A set of ids that knows the place of each: a sorted list or a bitmap with counts, whichever is smaller.

    Parameters
    ----------
    ids : int64 tensor of shape (n,)
        Rising.
    num_embeddings : int
        Ids are below it.

    Raises
    ------
    ValueError
        Ids are beyond 32 bits.

    Examples
    --------
    >>> HotIds(torch.tensor([2, 5, 70]), 100).find(torch.tensor([70, 3, 5]))
    (tensor([ True, False,  True]), tensor([2, 0, 1]))
    """

    def __init__(self, ids: Tensor, num_embeddings: int) -> None:
        super().__init__()
        if num_embeddings > _MOST_IDS:
            raise ValueError(f"ids are kept in 32 bits, for at most {_MOST_IDS} rows, got {num_embeddings}")
        self.num_embeddings = num_embeddings
        self.listed = self._list_nbytes(len(ids)) <= self._bitmap_nbytes(num_embeddings)
        if self.listed:
            self.register_buffer("ids", ids.to(torch.int32))
            return
        words = torch.zeros(-(-num_embeddings // _WORD), dtype=torch.int64)
        words.index_add_(0, ids // _WORD, torch.ones_like(ids) << (ids % _WORD))  # each bit once: adding sets it
        self.register_buffer("words", words)
        counts = torch.bincount(ids // _WORD, minlength=len(words))
        self.register_buffer("counts", (counts.cumsum(0) - counts).to(torch.int32))

    @staticmethod
    def _list_nbytes(n: int) -> int:
        return _ID_BYTES * n

    @staticmethod
    def _bitmap_nbytes(num_embeddings: int) -> int:
        return (8 + 4) * -(-num_embeddings // _WORD)

    @property
    def count(self) -> int:
        """Number of ids."""
        return len(self.ids) if self.listed else int(ones(self.words).sum())

    def all(self) -> Tensor:
        """The ids, rising: int64 of shape (n,)."""
        if self.listed:
            return self.ids.long()
        bits = (self.words[:, None] >> torch.arange(_WORD, device=self.words.device)) & 1
        return bits.reshape(-1).nonzero()[:, 0]

    @classmethod
    def nbytes(cls, n: int, num_embeddings: int) -> int:
        """Bytes of a set of ``n`` of the ids."""
        return min(cls._list_nbytes(n), cls._bitmap_nbytes(num_embeddings))

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids are in the set, and their places in it (0 for the others)."""
        if self.listed:
            places = torch.searchsorted(self.ids, ids.to(torch.int32)).clamp(max=len(self.ids) - 1)
            found = self.ids[places] == ids
        else:
            words, bits = self.words[ids // _WORD], ids % _WORD
            found = (words >> bits) & 1 == 1
            places = self.counts[ids // _WORD].long() + ones(words & ((1 << bits) - 1))
        return found, places.where(found, 0)


def ones(words: Tensor) -> Tensor:
    """Bits that are set in each int64.

    Examples
    --------
    >>> ones(torch.tensor([0, 5, -1]))
    tensor([ 0,  2, 64])
    """
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56) & 0x7F


def most_frequent(frequencies: NDArray[np.float64] | None, num_embeddings: int, count: int) -> Tensor:
    """The ids with the highest frequencies, the lower ones where some are equal; at even distances without any.

    Parameters
    ----------
    frequencies : float64 array of shape (num_embeddings,), or None
    num_embeddings : int
    count : int

    Returns
    -------
    int64 tensor of shape (count,), rising

    Examples
    --------
    >>> most_frequent(np.array([1.0, 5.0, 2.0, 2.0]), 4, 2)
    tensor([1, 2])
    """
    if frequencies is None or count == 0:
        return torch.arange(count) * num_embeddings // max(count, 1)
    # No sort: of a hundred million ids it would take gigabytes.
    least = np.partition(frequencies, num_embeddings - count)[num_embeddings - count]
    above = np.flatnonzero(frequencies > least)
    equal = np.flatnonzero(frequencies == least)[: count - len(above)]
    return torch.from_numpy(np.sort(np.concatenate([above, equal])))
