"""The table as a tensor train of three cores: TT-Rec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding

_GATHERED = 1 << 22
"""Most floats of a core that are copied out, a matrix an id, for one product."""
_NEAREST_TO_ZERO = 2.0


class TensorTrainEmbedding(TrainedEmbedding):
    """The table as a product of three cores, by three digits of the id.

    Yin et al., "TT-Rec: tensor train compression for deep learning recommendation models", 2021. With the digits ``i1,
    i2, i3`` of the id in the mixed radix ``row_factors`` (the last one fastest) and ``column_factors`` whose product is
    ``embedding_dim``, a row is ``G1[i1] @ G2[i2] @ G3[i3]``: (d1, r1) by (r1, d2 r2) by (r2, d3). Cores begin as normal
    numbers beyond two deviations, as in the paper, so that few products are near zero, with a variance that gives the
    rows that of the full table's (the paper's is 1 / (3 num_embeddings)).

    Parameters
    ----------
    rank : int or pair of int, optional
        r1 and r2, at most those of an exact train; else what the budget allows, 16 without one. Each grows by one
        in turn.
    row_factors : three ints, optional
        Radices, of a product of at least ``num_embeddings``; by default each about its third root.
    column_factors : three ints, optional
        By default as equal as can be, the smallest in the middle, whose core grows with the square of the rank.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The factors do not multiply to the table's shape, or the budget is less than a train of rank 1.

    Examples
    --------
    >>> import torch
    >>> module = TensorTrainEmbedding(100_000, 16, ratio=100, random_state=0)
    >>> module.row_factors, module.column_factors, module.ranks, module.inference_nbytes()
    ((47, 46, 47), (2, 2, 4), (12, 11), 61360)
    """

    name: ClassVar[str] = "tt-rec"
    about: ClassVar[str] = "a tensor train of three cores (Yin et al. 2021)"
    has_table: ClassVar[bool] = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: int | tuple[int, int] | None = None,
        row_factors: Sequence[int] | None = None,
        column_factors: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        self.row_factors = self._as_factors(row_factors, "row_factors", _radices(self.num_embeddings))
        self.column_factors = self._as_factors(column_factors, "column_factors", _divisors(self.embedding_dim))
        if math.prod(self.row_factors) < self.num_embeddings:
            raise ValueError(f"row_factors {self.row_factors} have a product below {self.num_embeddings}")
        if math.prod(self.column_factors) != self.embedding_dim:
            raise ValueError(f"column_factors {self.column_factors} have another product than {self.embedding_dim}")
        if rank is None:
            ranks = (16, 16) if self.budget is None else self._affordable_ranks()
        else:
            ranks = (rank, rank) if isinstance(rank, int) else (rank[0], rank[1])
        if min(ranks) < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.ranks = self._capped(*ranks)
        self.cores = nn.ParameterList(nn.Parameter(core.to(device)) for core in self._initial_cores())

    @staticmethod
    def _as_factors(given: Sequence[int] | None, what: str, default: tuple[int, int, int]) -> tuple[int, int, int]:
        if given is None:
            return default
        if len(given) != 3 or min(given) < 1:
            raise ValueError(f"{what} must be three positive numbers, got {given}")
        return int(given[0]), int(given[1]), int(given[2])

    def _capped(self, first: int, second: int) -> tuple[int, int]:
        """Ranks, at most those that hold any table."""
        one, two, three = (n * d for n, d in zip(self.row_factors, self.column_factors, strict=True))
        return min(first, one, two * three), min(second, three, one * two)

    def _shapes(self, ranks: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
        (n1, n2, n3), (d1, d2, d3), (r1, r2) = self.row_factors, self.column_factors, ranks
        return (n1, d1, r1), (n2, r1, d2 * r2), (n3, r2, d3)

    def _affordable_ranks(self) -> tuple[int, int]:
        def ranks(total: int) -> tuple[int, int]:
            return self._capped(total - total // 2, total // 2)

        def cost(total: int) -> Size:
            floats = sum(math.prod(shape) for shape in self._shapes(ranks(total)))
            return Size(floats, FLOAT_BYTES * floats)

        assert self.budget is not None
        return ranks(self.budget.largest(cost, 2, max(2, 2 * max(self._capped(2**62, 2**62))), self.name))

    def _initial_cores(self) -> list[Tensor]:
        variance = 1 / (3 * self.embedding_dim * self.ranks[0] * self.ranks[1])
        return [self._far_from_zero(*shape) * variance ** (1 / 6) for shape in self._shapes(self.ranks)]

    def _far_from_zero(self, *shape: int) -> Tensor:
        """Normal numbers on condition that their size is at least 2, scaled to a variance of 1."""
        bound = torch.tensor(_NEAREST_TO_ZERO, dtype=torch.float64)
        tail = torch.special.ndtr(-bound)
        variance = 1 + bound * torch.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi) / tail
        drawn = 1 - torch.rand(*shape, generator=self._generator, dtype=torch.float64)
        sign = torch.randint(2, shape, generator=self._generator) * 2 - 1
        return (torch.special.ndtri(drawn * tail) * sign / variance.sqrt()).float()

    def digits(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three digits of ids, the slowest first."""
        _, second, third = self.row_factors
        return ids // (second * third), ids // third % second, ids % third

    def rows(self, ids: Tensor) -> Tensor:
        """Products of the cores' matrices."""
        # Each id is computed once.
        ids, back = ids.unique(return_inverse=True)
        first, second, third = self.digits(ids)
        left = self.cores[0].index_select(0, first)
        d1, d2, _ = self.column_factors
        left = _products(left, self.cores[1], second).reshape(len(ids), d1 * d2, self.ranks[1])
        return _products(left, self.cores[2], third).reshape(len(ids), self.embedding_dim).index_select(0, back)


def _products(left: Tensor, core: Tensor, digit: Tensor) -> Tensor:
    """``left[i] @ core[digit[i]]`` for all i: shape (n, p, q) from (n, p, r) and (m, r, q)."""
    if len(digit) * core[0].numel() <= _GATHERED:
        return left.bmm(core.index_select(0, digit))
    # Matrices of a high rank are too large to be copied for every id: one product for all ids of a digit.
    order = digit.argsort()
    counts = torch.bincount(digit, minlength=len(core)).tolist()
    parts = zip(left.index_select(0, order).split(counts), core.unbind(0), strict=True)
    sorted_products = torch.cat([part @ matrix for part, matrix in parts if len(part)])
    return sorted_products.index_select(0, order.argsort())


def _radices(size: int) -> tuple[int, int, int]:
    """Three numbers near the third root of a product of at least ``size``, the middle one not above the others."""
    middle = round(size ** (1 / 3))
    middle -= middle**3 > size
    first = math.isqrt(-(-size // middle) - 1) + 1
    return first, middle, -(-size // (first * middle))


def _divisors(size: int) -> tuple[int, int, int]:
    """The three divisors of the least sum whose product is ``size``, the smallest in the middle."""
    pairs = ((a, b) for a in range(1, size + 1) if size % a == 0 for b in range(a, size + 1) if size % (a * b) == 0)
    triples = (sorted((a, b, size // (a * b))) for a, b in pairs)
    low, middle, high = min(triples, key=sum)
    return middle, low, high
