"""A narrow table and one projection: the low-dimensional baseline."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import as_table, linear_part, rows_part


class LowRankEmbedding(TrainedEmbedding):
    """A row of ``rank`` values an id, and one matrix that projects it: ``weight[id] @ projection``.

    The baseline that Tsang and Ahle, 2023, call low-dimensional; with a width for each field it is the mixed dimensions
    of Ginart et al., 2019. With a rank of ``embedding_dim`` the projection is left out: the full table.

    Parameters
    ----------
    rank : int, optional
        Values that are kept for an id; else as many as the budget allows, a quarter of ``embedding_dim`` without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than a value for each id, or ``rank`` is below 1.

    Examples
    --------
    >>> import torch
    >>> module = LowRankEmbedding(1000, 16, ratio=5, random_state=0)
    >>> module.weight.shape, module.projection.shape, module.inference_nbytes()
    (torch.Size([1000, 3]), torch.Size([3, 16]), 12192)
    """

    name: ClassVar[str] = "low-rank"
    about: ClassVar[str] = "a narrow table and one projection (Ginart et al. 2019)"
    per_id_state: ClassVar[bool] = True

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rank: int | None = None, **settings: Any) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if rank is None:
            rank = max(1, self.embedding_dim // 4) if self.budget is None else self._affordable_rank()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank = min(rank, self.embedding_dim)
        self.weight = nn.Parameter(self.uniform(self.num_embeddings, self.rank, bound=self.rank**-0.5).to(device))
        if self.rank < self.embedding_dim:
            bound = math.sqrt(3 / self.embedding_dim)
            self.projection = nn.Parameter(self.uniform(self.rank, self.embedding_dim, bound=bound).to(device))

    def _affordable_rank(self) -> int:
        def cost(rank: int) -> Size:
            projection = rank * self.embedding_dim if rank < self.embedding_dim else 0
            floats = rank * self.num_embeddings + projection
            return Size(floats, FLOAT_BYTES * floats)

        assert self.budget is not None
        if self.budget.allows(cost(self.embedding_dim)):
            return self.embedding_dim
        return self.budget.largest(cost, 1, max(1, self.embedding_dim - 1), self.name)

    def rows(self, ids: Tensor) -> Tensor:
        """Projected rows of the weight."""
        found = self.weight.index_select(0, ids)
        return found @ self.projection if self.rank < self.embedding_dim else found

    def to_table(self) -> vqrs.Table:
        """A table of the narrow rows, projected when they are read."""
        part = rows_part(self.weight)
        return as_table(self, linear_part(part, self.projection) if self.rank < self.embedding_dim else part)
