"""The table itself: what all methods are measured against."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import as_table, rows_part


class FullEmbedding(TrainedEmbedding):
    """The float32 table, a row an id.

    Parameters are those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than the table.

    Examples
    --------
    >>> import torch
    >>> module = FullEmbedding(100, 8, random_state=0)
    >>> module(torch.tensor([3, 1])).shape, module.inference_nbytes()
    (torch.Size([2, 8]), 3200)
    """

    name: ClassVar[str] = "full"
    about: ClassVar[str] = "a float32 row an id"
    per_id_state: ClassVar[bool] = True

    def __init__(self, num_embeddings: int, embedding_dim: int, **settings: Any) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        floats = self.num_embeddings * self.embedding_dim
        size = Size(floats, FLOAT_BYTES * floats)
        if self.budget is not None and not self.budget.allows(size):
            raise self.budget.unreachable(size, "the full table")
        self.weight = nn.Parameter(self.uniform(self.num_embeddings, self.embedding_dim).to(device))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight."""
        # Its gradient costs a third of that of F.embedding.
        return self.weight.index_select(0, ids)

    def to_table(self) -> vqrs.Table:
        """A table of the rows as they are."""
        return as_table(self, rows_part(self.weight))
