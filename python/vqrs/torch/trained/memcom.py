"""Shared rows with a multiplier of the id's own: MEmCom."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import Scalar, Term, as_table, digit, hashed_part, rows_part


class MemcomEmbedding(TrainedEmbedding):
    """Ids share rows by their remainder, and each has a multiplier of its own (and an offset if wished).

    Pansare et al., "Learning compressed embeddings for on-device inference", 2022 (MEmCom):
    ``weight[id % m] * multiplier[id] + offset[id]``, with scalars for each id. With at least as many rows as ids they
    are left out: the full table.

    Parameters
    ----------
    num_rows : int, optional
        Rows that are shared, m; else as many as the budget allows, a tenth of ``num_embeddings`` without one.
    offsets : bool
        Whether each id also has a number that is added to all its values.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than a row and the ids' own numbers.

    Examples
    --------
    >>> import torch
    >>> module = MemcomEmbedding(1000, 16, ratio=10, random_state=0)
    >>> module.weight.shape, module.multipliers.shape, module.inference_nbytes()
    (torch.Size([37, 16]), torch.Size([1000]), 6368)
    """

    name: ClassVar[str] = "memcom"
    about: ClassVar[str] = "shared rows times a number of the id's own (Pansare et al. 2022)"
    per_id_state: ClassVar[bool] = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_rows: int | None = None,
        offsets: bool = False,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        self._numbers = (1 + offsets) * self.num_embeddings
        if num_rows is None:
            num_rows = -(-self.num_embeddings // 10) if self.budget is None else self._affordable_rows()
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.num_rows = min(num_rows, self.num_embeddings)
        self.weight = nn.Parameter(self.uniform(self.num_rows, self.embedding_dim).to(device))
        self.multipliers = self.offsets = None
        if self.num_rows < self.num_embeddings:
            self.multipliers = nn.Parameter(torch.ones(self.num_embeddings, device=device))
            if offsets:
                self.offsets = nn.Parameter(torch.zeros(self.num_embeddings, device=device))

    def _affordable_rows(self) -> int:
        def cost(rows: int) -> Size:
            floats = rows * self.embedding_dim + (self._numbers if rows < self.num_embeddings else 0)
            return Size(floats, FLOAT_BYTES * floats)

        assert self.budget is not None
        if self.budget.allows(cost(self.num_embeddings)):
            return self.num_embeddings
        return self.budget.largest(cost, 1, max(1, self.num_embeddings - 1), self.name)

    def rows(self, ids: Tensor) -> Tensor:
        """Shared rows times the multipliers."""
        if self.multipliers is None:
            return self.weight.index_select(0, ids)
        found = self.weight.index_select(0, ids % self.num_rows) * self.multipliers.index_select(0, ids)[:, None]
        return found if self.offsets is None else found + self.offsets.index_select(0, ids)[:, None]

    def to_table(self) -> vqrs.Table:
        """A table of the shared rows and the ids' own numbers."""
        if self.multipliers is None:
            return as_table(self, rows_part(self.weight))
        own = digit(self.num_embeddings)
        terms = [Term(self.weight, digit(self.num_rows), weight=Scalar(self.multipliers, own))]
        if self.offsets is not None:
            terms.append(Term(torch.ones(self.embedding_dim), digit(1), weight=Scalar(self.offsets, own)))
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))
