"""Several short rows of one table side by side: unified embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import Term, as_table, digit, hashed, hashed_part
from vqrs.torch.trained.hashing import derived_seeds, hash_ids

_SEED_BYTES = 8


class UnifiedEmbedding(TrainedEmbedding):
    """All fields look their ids up in one table, several short rows each, which stand side by side.

    Coleman et al., "Unified embedding: battle-tested feature representations for web-scale ML systems", 2023. Ids count
    through the fields, so that each field has hashes of its own. Unlike :class:`CompositionalEmbedding` the columns
    share one table too; unlike :class:`RobeEmbedding` rows do not overlap. A table that holds all values is the full
    table.

    Parameters
    ----------
    lookups : int, optional
        Short rows of an id, a divisor of ``embedding_dim``; by default its largest one up to 4.
    num_rows : int, optional
        Short rows that are kept; else as many as the budget allows, of a tenth of the full table without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        ``lookups`` is no divisor of ``embedding_dim``, or the budget is less than a short row.

    Examples
    --------
    >>> import torch
    >>> module = UnifiedEmbedding(1000, 8, ratio=50, random_state=0)
    >>> module.weight.shape, module.inference_nbytes()
    (torch.Size([79, 2]), 640)
    """

    name: ClassVar[str] = "unified"
    about: ClassVar[str] = "several short rows of one table, side by side (Coleman et al. 2023)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        lookups: int | None = None,
        num_rows: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if lookups is None:
            lookups = next(count for count in (4, 3, 2, 1) if self.embedding_dim % count == 0)
        if lookups < 1 or self.embedding_dim % lookups:
            raise ValueError(f"lookups must divide embedding_dim, {self.embedding_dim}, got {lookups}")
        self.lookups, self._most = lookups, self.num_embeddings * lookups
        if num_rows is None:
            num_rows = -(-self._most // 10) if self.budget is None else self._affordable_rows()
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        width = self.embedding_dim // lookups
        self.weight = nn.Parameter(self.uniform(min(num_rows, self._most), width).to(device))
        self.register_buffer("seed", self.seeds().to(device))

    def _affordable_rows(self) -> int:
        def cost(rows: int) -> Size:
            floats = rows * (self.embedding_dim // self.lookups)
            return Size(floats, FLOAT_BYTES * floats + _SEED_BYTES)

        assert self.budget is not None
        return self.budget.largest(cost, 1, self._most, self.name)

    def rows(self, ids: Tensor) -> Tensor:
        """The short rows of each id side by side."""
        if len(self.weight) == self._most:
            return self.weight.view(self.num_embeddings, self.embedding_dim).index_select(0, ids)
        places = hash_ids(ids[:, None], derived_seeds(self.seed, self.lookups), len(self.weight))
        return self.weight.index_select(0, places.reshape(-1)).view(len(ids), self.embedding_dim)

    def to_table(self) -> vqrs.Table:
        """A table of the short rows and the lookups' seeds."""
        rows, width = self.weight.shape
        full = rows == self._most
        terms = [
            Term(
                self.weight,
                digit(self.num_embeddings) if full else hashed(seed, rows),
                start=lookup * width,
                stride=self.embedding_dim if full else width,
                offset=lookup * width if full else 0,
            )
            for lookup, seed in enumerate(derived_seeds(self.seed, self.lookups))
        ]
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))
