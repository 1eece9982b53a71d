"""Rows put together from rows of smaller tables: columns with a hash each, and quotient and remainder."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import Term, as_table, digit, hashed, hashed_part, rows_part
from vqrs.torch.trained.hashing import derived_seeds, hash_ids

_SEED_BYTES = 8


class CompositionalEmbedding(TrainedEmbedding):
    """Each group of columns has a table and a hash of its own; a row is their entries side by side ("CE concat").

    Shi et al., "Compositional embeddings using complementary partitions", 2020, with hashes as in Tsang and Ahle, 2023:
    two ids share a whole row only if they collide in all columns. With as many rows as ids, ids are places themselves:
    the full table.

    Parameters
    ----------
    columns : int, optional
        Groups of columns, a divisor of ``embedding_dim``; by default its largest one up to 4, as in Tsang and Ahle.
        More are better for a table of the same size, and slower.
    num_rows : int, optional
        Rows of each column's table; else as many as the budget allows, a tenth of ``num_embeddings`` without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        ``columns`` is no divisor of ``embedding_dim``, or the budget is less than a row.

    Examples
    --------
    >>> import torch
    >>> module = CompositionalEmbedding(1000, 8, ratio=50, random_state=0)
    >>> module.weight.shape, module.inference_nbytes()
    (torch.Size([4, 19, 2]), 616)
    """

    name: ClassVar[str] = "compositional"
    about: ClassVar[str] = "columns with a table and a hash each, side by side (Shi et al. 2020)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        columns: int | None = None,
        num_rows: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if columns is None:
            columns = next(c for c in (4, 3, 2, 1) if self.embedding_dim % c == 0)
        if columns < 1 or self.embedding_dim % columns:
            raise ValueError(f"columns must divide embedding_dim, {self.embedding_dim}, got {columns}")
        if num_rows is None:
            num_rows = -(-self.num_embeddings // 10) if self.budget is None else self._affordable_rows()
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        shape = columns, min(num_rows, self.num_embeddings), self.embedding_dim // columns
        self.weight = nn.Parameter(self.uniform(*shape).to(device))
        self.register_buffer("seed", self.seeds().to(device))

    def _affordable_rows(self) -> int:
        def cost(rows: int) -> Size:
            floats = rows * self.embedding_dim
            return Size(floats, FLOAT_BYTES * floats + _SEED_BYTES)

        assert self.budget is not None
        return self.budget.largest(cost, 1, self.num_embeddings, self.name)

    def places(self, ids: Tensor) -> Tensor:
        """Rows of the columns' tables that each id takes: int64 of shape (n, columns)."""
        columns, rows, _ = self.weight.shape
        if rows == self.num_embeddings:
            return ids[:, None].expand(-1, columns)
        return hash_ids(ids[:, None], derived_seeds(self.seed, columns), rows)

    def rows(self, ids: Tensor) -> Tensor:
        """Entries of all columns side by side."""
        columns, rows, _ = self.weight.shape
        places = self.places(ids) + torch.arange(columns, device=ids.device) * rows
        # Its gradient costs a tenth of that of an embedding where rows are short.
        return self.weight.flatten(0, 1).index_select(0, places.reshape(-1)).view(-1, self.embedding_dim)

    def to_table(self) -> vqrs.Table:
        """A table of the columns' tables and the hashes' seeds."""
        columns, rows, width = self.weight.shape
        full = rows == self.num_embeddings
        terms = [
            Term(
                self.weight,
                digit(rows) if full else hashed(seed, rows),
                start=column * width,
                offset=column * rows * width,
            )
            for column, seed in enumerate(derived_seeds(self.seed, columns))
        ]
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))


class QuotientRemainderEmbedding(TrainedEmbedding):
    """Two rows an id, that of ``id // m`` and that of ``id % m``, multiplied, added or side by side.

    Shi et al., "Compositional embeddings using complementary partitions", 2020: no two ids have the same pair. With m
    of at least ``num_embeddings`` the remainders' table is the full table, and stands alone.

    Parameters
    ----------
    operation : {"multiply", "add", "concatenate"}
        How the two rows become one; the paper's own choice is to multiply.
    num_remainders : int, optional
        m; else the largest that the budget allows, a tenth of ``num_embeddings`` without one. The two tables together
        have at least 2√num_embeddings rows.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        An unknown operation, or a budget below the smallest two tables.

    Examples
    --------
    >>> import torch
    >>> module = QuotientRemainderEmbedding(1000, 8, ratio=10, random_state=0)
    >>> module.remainders.shape, module.quotients.shape, module.inference_nbytes()
    (torch.Size([88, 8]), torch.Size([12, 8]), 3200)
    """

    name: ClassVar[str] = "quotient-remainder"
    about: ClassVar[str] = "a row of the quotient and one of the remainder of the id (Shi et al. 2020)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        operation: str = "multiply",
        num_remainders: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if operation not in ("multiply", "add", "concatenate"):
            raise ValueError(f"operation must be multiply, add or concatenate, got {operation!r}")
        if operation == "concatenate" and self.embedding_dim == 1:
            raise ValueError("operation='concatenate' needs an embedding_dim of at least 2")
        self.operation = operation
        if num_remainders is None:
            num_remainders = -(-self.num_embeddings // 10) if self.budget is None else self._affordable_remainders()
        if num_remainders < 1:
            raise ValueError(f"num_remainders must be at least 1, got {num_remainders}")
        self.num_remainders = min(num_remainders, self.num_embeddings)
        if self.num_remainders == self.num_embeddings:
            self.remainders = nn.Parameter(self.uniform(self.num_embeddings, self.embedding_dim).to(device))
            return
        # Variance of the result: that of a row of the full table.
        variance = 1 / (3 * self.embedding_dim)
        bound = math.sqrt(
            3 * {"multiply": math.sqrt(variance), "add": variance / 2, "concatenate": variance}[operation]
        )
        width, rest = self._widths()
        self.remainders = nn.Parameter(self.uniform(self.num_remainders, width, bound=bound).to(device))
        self.quotients = nn.Parameter(self.uniform(self._num_quotients(), rest, bound=bound).to(device))

    def _widths(self) -> tuple[int, int]:
        d = self.embedding_dim
        return (d - d // 2, d // 2) if self.operation == "concatenate" else (d, d)

    def _num_quotients(self, remainders: int | None = None) -> int:
        return -(-self.num_embeddings // (self.num_remainders if remainders is None else remainders))

    def _affordable_remainders(self) -> int:
        def cost(remainders: int) -> Size:
            width, rest = self._widths()
            floats = remainders * width + self._num_quotients(remainders) * rest
            return Size(floats, FLOAT_BYTES * floats)

        assert self.budget is not None
        full = self.num_embeddings * self.embedding_dim
        if self.budget.allows(Size(full, FLOAT_BYTES * full)):
            return self.num_embeddings
        # From the root on, a remainder more never saves more than one quotient.
        least = math.isqrt(self.num_embeddings - 1) + 1
        return self.budget.largest(cost, least, max(least, self.num_embeddings - 1), self.name)

    def rows(self, ids: Tensor) -> Tensor:
        """The two rows of each id as one."""
        if self.num_remainders == self.num_embeddings:
            return self.remainders.index_select(0, ids)
        remainder = self.remainders.index_select(0, ids % self.num_remainders)
        quotient = self.quotients.index_select(0, ids // self.num_remainders)
        if self.operation == "concatenate":
            return torch.cat([remainder, quotient], 1)
        return remainder * quotient if self.operation == "multiply" else remainder + quotient

    def to_table(self) -> vqrs.Table:
        """A table of the two tables, or of the full one."""
        if self.num_remainders == self.num_embeddings:
            return as_table(self, rows_part(self.remainders))
        start = self.remainders.shape[1] if self.operation == "concatenate" else 0
        quotient = digit(len(self.quotients), self.num_remainders)
        terms = [
            Term(self.remainders, digit(self.num_remainders)),
            Term(self.quotients, quotient, start=start, multiply=self.operation == "multiply"),
        ]
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))
