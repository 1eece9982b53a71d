"""Rows of their own for frequent ids, shared ones for the rest."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import Term, as_table, hashed, hashed_part, rows_part, switch_part
from vqrs.torch.trained.hashing import hash_ids
from vqrs.torch.trained.hot_ids import most_frequent, ones

_SEED_BYTES = 8
_WORD = 64
_BLOCK = 512
"""Words of a block: ranks within one, at most 511 * 64, fit in int16."""


class AdaptiveEmbedding(TrainedEmbedding):
    """The most frequent ids have a row each, all others share rows by a hash.

    "AdaptEmb", the frequency split of Zhang et al., "Experimental analysis of large-scale learnable vector storage
    compression", 2023. Which ids are hot is kept as their sorted list or, where that is smaller, as a bit for each id
    with ranks (1.25 bits an id). With at least as many rows as ids, ids are places themselves: the full table; with a
    ``hot_share`` of 0 it is the hashing trick.

    Parameters
    ----------
    hot_share : float
        Share of the rows that belong to one id each, from 0 to 1; at least one row is left to be shared.
    num_rows : int, optional
        Rows that are kept; else as many as the budget allows, a tenth of ``num_embeddings`` without one.
    **settings
        Those of :class:`TrainedEmbedding`; ``frequencies``, from the training part of the data alone, are needed where
        an id is to have its own row.

    Raises
    ------
    ValueError
        The budget is less than a row, frequencies are missing, or ``hot_share`` is outside 0 to 1.

    Examples
    --------
    >>> import numpy as np, torch
    >>> module = AdaptiveEmbedding(1000, 8, ratio=10, frequencies=np.arange(1000), random_state=0)
    >>> module.weight.shape, module.num_hot, module.hot_ids()[-2:], module.inference_nbytes()
    (torch.Size([94, 8]), 47, tensor([998, 999]), 3184)
    """

    name: ClassVar[str] = "adaptive"
    about: ClassVar[str] = "own rows for frequent ids, hashed ones for the rest (Zhang et al. 2023)"
    per_id_state: ClassVar[bool] = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        hot_share: float = 0.5,
        num_rows: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if not 0 <= hot_share <= 1:
            raise ValueError(f"hot_share must be from 0 to 1, got {hot_share}")
        self.hot_share = hot_share
        if num_rows is None:
            num_rows = -(-self.num_embeddings // 10) if self.budget is None else self._affordable_rows()
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        num_rows = min(num_rows, self.num_embeddings)
        self.num_hot = self._num_hot(num_rows)
        self.weight = nn.Parameter(self.uniform(num_rows, self.embedding_dim).to(device))
        if num_rows == self.num_embeddings:
            return
        self.register_buffer("seed", self.seeds().to(device))
        if self.num_hot:
            for name, tensor in self._as_map(self._most_frequent()).items():
                self.register_buffer(name, tensor.to(device))

    def _num_hot(self, rows: int) -> int:
        return rows if rows == self.num_embeddings else min(int(self.hot_share * rows), rows - 1)

    def _map_sizes(self, hot: int) -> tuple[int, int]:
        """Bytes of the list of hot ids, and of bits with ranks."""
        words = -(-self.num_embeddings // _WORD)
        return hot * (4 if self.num_embeddings <= 2**31 else 8), words * 10 + -(-words // _BLOCK) * 8

    def _affordable_rows(self) -> int:
        def cost(rows: int) -> Size:
            floats = rows * self.embedding_dim
            if rows == self.num_embeddings:
                return Size(floats, FLOAT_BYTES * floats)
            return Size(floats, FLOAT_BYTES * floats + _SEED_BYTES + min(self._map_sizes(self._num_hot(rows))))

        assert self.budget is not None
        if self.budget.allows(cost(self.num_embeddings)):
            return self.num_embeddings
        return self.budget.largest(cost, 1, max(1, self.num_embeddings - 1), self.name)

    def _most_frequent(self) -> np.ndarray:
        """Hot ids, rising; among equally frequent ones the lower."""
        if self._frequencies is None:
            raise ValueError(
                "adaptive needs frequencies: how often each id is looked up in the training part of the data"
            )
        return most_frequent(self._frequencies, self.num_embeddings, self.num_hot).numpy()

    def _as_map(self, hot: np.ndarray) -> dict[str, Tensor]:
        sizes = self._map_sizes(len(hot))
        if sizes[0] <= sizes[1]:
            return {"hot_list": torch.from_numpy(hot.astype(np.int32 if self.num_embeddings <= 2**31 else np.int64))}
        words = -(-self.num_embeddings // _WORD)
        bits = np.zeros(words * _WORD, bool)
        bits[hot] = True
        before = np.append(0, np.cumsum(bits.reshape(words, _WORD).sum(1)))[:-1]
        bases = before[::_BLOCK]
        found = {
            "hot_bits": np.packbits(bits, bitorder="little").view("<i8").astype(np.int64),
            "hot_ranks": (before - np.repeat(bases, _BLOCK)[:words]).astype(np.int16),
            "hot_bases": bases.astype(np.int64),
        }
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def hot_ids(self) -> Tensor:
        """The ids that have a row of their own, rising: int64 of shape (num_hot,)."""
        if self.num_hot == self.num_embeddings or not self.num_hot:
            return torch.arange(self.num_hot, device=self.weight.device)
        if hasattr(self, "hot_list"):
            return self.hot_list.long()
        bits = np.unpackbits(self.hot_bits.cpu().numpy().astype("<i8").view(np.uint8), bitorder="little")
        return torch.from_numpy(bits.nonzero()[0]).to(self.weight.device)

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each id is hot, and the number of hot ids below it."""
        if hasattr(self, "hot_list"):
            wanted = ids.to(self.hot_list.dtype)
            rank = torch.searchsorted(self.hot_list, wanted)
            return self.hot_list[rank.clamp(max=self.num_hot - 1)] == wanted, rank
        at, bit = ids >> 6, ids & 63
        word = self.hot_bits[at]
        below = word & ((torch.ones_like(bit) << bit) - 1)
        return (word >> bit & 1).bool(), self.hot_bases[at // _BLOCK] + self.hot_ranks[at] + ones(below)

    def rows(self, ids: Tensor) -> Tensor:
        """Own rows of hot ids, shared ones of others."""
        places = ids
        if len(self.weight) < self.num_embeddings:
            places = self.num_hot + hash_ids(ids, self.seed, len(self.weight) - self.num_hot)
            if self.num_hot:
                places = torch.where(*self._find(ids), places)
        return self.weight.index_select(0, places)

    def to_table(self) -> vqrs.Table:
        """A table of own rows, by a list of hot ids, and of shared ones."""
        shared = len(self.weight) - self.num_hot
        if not shared:
            return as_table(self, rows_part(self.weight))
        others = hashed_part(
            self.embedding_dim, [Term(self.weight[self.num_hot :], hashed(self.seed, shared))], rows=self.num_embeddings
        )
        if not self.num_hot:
            return as_table(self, others)
        hot = self.hot_ids().cpu().numpy(), rows_part(self.weight[: self.num_hot])
        return as_table(self, switch_part(self.num_embeddings, [hot], others))
