"""Rows that are sums of several hashed rows: hash embeddings and Bloom embeddings."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import Scalar, Term, as_table, digit, hashed, hashed_part, rows_part
from vqrs.torch.trained.hashing import derived_seeds, hash_ids, hash_signs

_SEED_BYTES = 8


class _SeveralHashes(TrainedEmbedding):
    """What both have: a table, ``num_hashes`` rows of it for each id, and a size out of the budget."""

    weight: nn.Parameter

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, num_hashes: int, num_rows: int | None, **settings: Any
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **settings)
        if num_hashes < 1:
            raise ValueError(f"num_hashes must be at least 1, got {num_hashes}")
        self.num_hashes = num_hashes
        if num_rows is None:
            num_rows = -(-self.num_embeddings // 10) if self.budget is None else self._affordable_rows()
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.num_rows = min(num_rows, self.num_embeddings)

    def _cost(self, rows: int) -> Size:
        floats = rows * self.embedding_dim
        return Size(floats, FLOAT_BYTES * floats + _SEED_BYTES)

    def _affordable_rows(self) -> int:
        assert self.budget is not None
        n = self.num_embeddings
        return n if self.budget.allows(self._cost(n)) else self.budget.largest(self._cost, 1, max(1, n - 1), self.name)

    def _hashed(self, ids: Tensor, seeds: Tensor) -> Tensor:
        """Rows of the weight at the hashes of each id: shape (n, num_hashes, embedding_dim)."""
        places = hash_ids(ids[:, None], seeds, self.num_rows)
        return self.weight.index_select(0, places.reshape(-1)).view(len(ids), self.num_hashes, self.embedding_dim)


class BloomEmbedding(_SeveralHashes):
    """The mean of ``num_hashes`` hashed rows of one table, with random signs if wished.

    Serrà and Karatzoglou, "Getting deep recommenders fit: Bloom embeddings for sparse binary input/output networks",
    2017. With at least as many rows as ids, ids are places themselves: the full table.

    Parameters
    ----------
    num_hashes : int
        Rows that are added for each id.
    signs : bool
        Whether a random sign is multiplied to each of them.
    num_rows : int, optional
        Rows that are kept; else as many as the budget allows, a tenth of ``num_embeddings`` without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than a row.

    Examples
    --------
    >>> import torch
    >>> module = BloomEmbedding(1000, 8, ratio=50, random_state=0)
    >>> module.weight.shape, module.inference_nbytes()
    (torch.Size([19, 8]), 616)
    """

    name: ClassVar[str] = "bloom"
    about: ClassVar[str] = "the mean of several hashed rows (Serrà and Karatzoglou 2017)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_hashes: int = 2,
        signs: bool = False,
        num_rows: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, num_hashes=num_hashes, num_rows=num_rows, **settings)
        self.signs = signs
        parts = 1 if self.num_rows == self.num_embeddings else num_hashes
        bound = math.sqrt(parts / self.embedding_dim)
        self.weight = nn.Parameter(self.uniform(self.num_rows, self.embedding_dim, bound=bound).to(device))
        self.register_buffer("seed", self.seeds().to(device))

    def rows(self, ids: Tensor) -> Tensor:
        """Means of the hashed rows."""
        if self.num_rows == self.num_embeddings:
            return self.weight.index_select(0, ids)
        seeds = derived_seeds(self.seed, self.num_hashes)
        found = self._hashed(ids, seeds)
        if self.signs:
            found = found * hash_signs(ids[:, None], seeds)[..., None].to(found.dtype)
        return found.mean(1)

    def to_table(self) -> vqrs.Table:
        """A table of the rows and the hashes' seeds."""
        if self.num_rows == self.num_embeddings:
            return as_table(self, rows_part(self.weight))
        share = Scalar(torch.tensor([1 / self.num_hashes]), digit(1))
        terms = [
            Term(self.weight, hashed(seed, self.num_rows), weight=share, sign=seed if self.signs else None)
            for seed in derived_seeds(self.seed, self.num_hashes)
        ]
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))


class WeightedHashEmbedding(_SeveralHashes):
    """A sum of ``num_hashes`` hashed rows, each times a trained importance that the id has, by a hash of its own.

    Svenstrup, Hansen and Winther, "Hash embeddings for efficient word representations", 2017:
    ``sum_j p[g(id), j] * weight[h_j(id)]``. With at least as many rows as ids, ids are places themselves and
    importances are left out: the full table.

    Parameters
    ----------
    num_hashes : int
        Rows that are added for each id; 2 in the paper.
    num_rows : int, optional
        Rows that are kept; else as many as the budget allows, a tenth of ``num_embeddings`` without one.
    num_importances : int, optional
        Rows of the table of importances; by default ten for each row, as the paper advises. With at least
        ``num_embeddings`` every id has its own.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than a row and its importances.

    Examples
    --------
    >>> import torch
    >>> module = WeightedHashEmbedding(1000, 8, ratio=50, random_state=0)
    >>> module.weight.shape, module.importances.shape, module.inference_nbytes()
    (torch.Size([5, 8]), torch.Size([50, 2]), 568)
    """

    name: ClassVar[str] = "hash-embedding"
    about: ClassVar[str] = "hashed rows times hashed importances (Svenstrup et al. 2017)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_hashes: int = 2,
        num_rows: int | None = None,
        num_importances: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        if num_importances is not None and num_importances < 1:
            raise ValueError(f"num_importances must be at least 1, got {num_importances}")
        self._asked_importances = num_importances
        super().__init__(num_embeddings, embedding_dim, num_hashes=num_hashes, num_rows=num_rows, **settings)
        self.register_buffer("seed", self.seeds().to(device))
        if self.num_rows == self.num_embeddings:
            self.weight = nn.Parameter(self.uniform(self.num_rows, self.embedding_dim).to(device))
            return
        # Importances are uniform in ±1, of variance 1/3.
        bound = math.sqrt(3 / (num_hashes * self.embedding_dim))
        self.weight = nn.Parameter(self.uniform(self.num_rows, self.embedding_dim, bound=bound).to(device))
        count = self._num_importances(self.num_rows)
        self.importances = nn.Parameter(self.uniform(count, num_hashes, bound=1.0).to(device))

    def _num_importances(self, rows: int) -> int:
        return min(self._asked_importances or 10 * rows, self.num_embeddings)

    def _cost(self, rows: int) -> Size:
        importances = 0 if rows == self.num_embeddings else self._num_importances(rows) * self.num_hashes
        floats = rows * self.embedding_dim + importances
        return Size(floats, FLOAT_BYTES * floats + _SEED_BYTES)

    def rows(self, ids: Tensor) -> Tensor:
        """Sums of the hashed rows times the importances."""
        if self.num_rows == self.num_embeddings:
            return self.weight.index_select(0, ids)
        seeds = derived_seeds(self.seed, self.num_hashes + 1)
        count = len(self.importances)
        places = ids if count == self.num_embeddings else hash_ids(ids, seeds[-1], count)
        importances = self.importances.index_select(0, places)
        return (importances[..., None] * self._hashed(ids, seeds[:-1])).sum(1)

    def to_table(self) -> vqrs.Table:
        """A table of the rows, the importances and the hashes' seeds."""
        if self.num_rows == self.num_embeddings:
            return as_table(self, rows_part(self.weight))
        *seeds, last = derived_seeds(self.seed, self.num_hashes + 1)
        count = len(self.importances)
        owner = digit(count) if count == self.num_embeddings else hashed(last, count)
        terms = [
            Term(
                self.weight,
                hashed(seed, self.num_rows),
                weight=Scalar(self.importances, owner, stride=self.num_hashes, offset=j),
            )
            for j, seed in enumerate(seeds)
        ]
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))
