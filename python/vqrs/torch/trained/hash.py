"""The hashing trick: Weinberger et al., "Feature hashing for large scale multitask learning", 2009."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import Term, as_table, hashed, hashed_part, rows_part
from vqrs.torch.trained.hashing import hash_ids

_SEED_BYTES = 8


class HashEmbedding(TrainedEmbedding):
    """Ids share rows: the row of an id is ``weight[hash(id)]``.

    With at least as many rows as ids, ids are places themselves: the full table.

    Parameters
    ----------
    num_rows : int, optional
        Rows that are kept; else as many as the budget allows, a tenth of ``num_embeddings`` without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than a row, or ``num_rows`` is below 1.

    References
    ----------
    Weinberger et al., "Feature hashing for large scale multitask learning", 2009.

    Examples
    --------
    >>> import torch
    >>> module = HashEmbedding(1000, 8, ratio=50, random_state=0)
    >>> module.weight.shape, module.inference_nbytes()
    (torch.Size([19, 8]), 616)
    """

    name: ClassVar[str] = "hash"
    about: ClassVar[str] = "ids share rows by a hash (Weinberger et al. 2009)"

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, num_rows: int | None = None, **settings: Any
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if num_rows is None:
            num_rows = -(-self.num_embeddings // 10) if self.budget is None else self._affordable_rows()
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.weight = nn.Parameter(self.uniform(min(num_rows, self.num_embeddings), self.embedding_dim).to(device))
        self.register_buffer("seed", self.seeds().to(device))

    def _affordable_rows(self) -> int:
        def cost(rows: int) -> Size:
            floats = rows * self.embedding_dim
            return Size(floats, FLOAT_BYTES * floats + _SEED_BYTES)

        assert self.budget is not None
        return self.budget.largest(cost, 1, self.num_embeddings, "hash")

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight at the hashes of ids."""
        places = ids if len(self.weight) >= self.num_embeddings else hash_ids(ids, self.seed, len(self.weight))
        return self.weight.index_select(0, places)

    def to_table(self) -> vqrs.Table:
        """A table of the rows and the hash's seed."""
        rows = len(self.weight)
        if rows >= self.num_embeddings:
            return as_table(self, rows_part(self.weight))
        term = Term(self.weight, hashed(self.seed, rows))
        return as_table(self, hashed_part(self.embedding_dim, [term], rows=self.num_embeddings))
