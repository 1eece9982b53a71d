"""Mixed dimensions: Ginart et al., "Mixed dimension embeddings with application to memory-efficient recommendation
systems", 2019.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import as_table, linear_part, rows_part, switch_part

if TYPE_CHECKING:
    import vqrs

_BISECTIONS = 60


def rows_by_field(ids: Tensor, field_sizes: Sequence[int], block: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Rows of a table whose fields have blocks of their own.

    Parameters
    ----------
    ids : int64 tensor of shape (n,)
        Global ids: fields stand one after the other.
    field_sizes : sequence of int
        Rows of each field.
    block : callable
        ``block(field, local_ids)`` gives the rows of ids within a field; not called for a field without ids, but for
        the first one where there are none at all.

    Returns
    -------
    Tensor of shape (n, values of a row)

    Examples
    --------
    >>> import torch
    >>> rows_by_field(torch.tensor([2, 0, 1]), [2, 1], lambda field, local: 10.0 * field + local[:, None])
    tensor([[10.],
            [ 0.],
            [ 1.]])
    """
    if len(field_sizes) == 1 or not len(ids):
        return block(0, ids)
    ends = torch.tensor(field_sizes, device=ids.device).cumsum(0)
    fields = torch.bucketize(ids, ends, right=True)
    order = fields.argsort(stable=True)
    parts, start = [], 0
    sorted_ids = ids[order]
    counts = torch.bincount(fields, minlength=len(field_sizes)).tolist()
    for field, count in enumerate(counts):
        if count:
            parts.append(block(field, sorted_ids[start : start + count] - (ends[field] - field_sizes[field])))
        start += count
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy(0, order, found)


def block_floats(rows: int, dim: int, full_dim: int) -> int:
    """Floats of a field's block of ``dim`` columns and its projection, the latter only where it is needed.

    Examples
    --------
    >>> block_floats(100, 4, 16), block_floats(100, 16, 16)
    (464, 1600)
    """
    return rows * dim + (dim * full_dim if dim < full_dim else 0)


def popular_dims(field_sizes: Sequence[int], full_dim: int, temperature: float, scale: float = 1.0) -> list[int]:
    """Dimensions by the popularity rule of the paper: powers of two nearest to ``λ · n_f^-temperature``.

    ``λ = scale · full_dim · min(n)^temperature``, so that at scale 1 the smallest field is whole. A field stays whole
    too where a narrower block with its projection would need as many floats.

    Parameters
    ----------
    field_sizes : sequence of int
    full_dim : int
    temperature : float
        0 gives all fields the same dimension, 1 all the same number of floats.
    scale : float
        At most 1.

    Returns
    -------
    list of int

    Examples
    --------
    >>> popular_dims([10, 1000, 100_000], 16, 0.25)
    [16, 4, 2]
    """
    sizes = np.asarray(field_sizes, dtype=np.float64)
    wished = scale * full_dim * (sizes / sizes.min()) ** -temperature
    rounded = np.minimum(2.0 ** np.maximum(np.rint(np.log2(wished)), 0), full_dim)
    dims = np.where(wished >= full_dim, full_dim, rounded).astype(int)
    return [_worth(size, int(dim), full_dim) for size, dim in zip(field_sizes, dims, strict=True)]


def _worth(rows: int, dim: int, full_dim: int) -> int:
    """The dimension, or the full one where it needs no more floats."""
    return dim if block_floats(rows, dim, full_dim) < rows * full_dim else full_dim


class Block(NamedTuple):
    """How the rows of a field are made: ``table[i] @ projection + bias``."""

    table: Tensor
    projection: Tensor | None = None
    bias: Tensor | None = None

    def rows(self, local: Tensor) -> Tensor:
        """Rows of ids within the field."""
        found = F.embedding(local, self.table)
        if self.projection is not None:
            found = found @ self.projection
        return found if self.bias is None else found + self.bias


class FieldBlocks(TrainedEmbedding):
    """A table whose fields have blocks of their own dimensions."""

    per_id_state: ClassVar[bool] = True

    def _make_blocks(self, dims: Sequence[int], device: Any, *, bias: bool = False) -> None:
        """Parameters of the blocks: a projection, and a bias, where a field is narrower than the rows."""
        for field, (rows, dim) in enumerate(zip(self.field_sizes, dims, strict=True)):
            made = {"weight": self.uniform(rows, dim, bound=dim**-0.5)}
            if dim < self.embedding_dim:
                made["projection"] = self.normal(dim, self.embedding_dim)
                if bias:
                    made["bias"] = torch.zeros(self.embedding_dim)
            for name, tensor in made.items():
                self.register_parameter(f"{name}_{field}", nn.Parameter(tensor.to(device)))

    def block(self, field: int) -> Block:
        """The present block of a field."""
        found = [getattr(self, f"{name}_{field}", None) for name in ("weight", "projection", "bias")]
        return Block(*found)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the fields' blocks, projected."""
        return rows_by_field(ids, self.field_sizes, lambda field, local: self.block(field).rows(local))

    def to_table(self) -> vqrs.Table:
        """The same rows: each field is a range of ids with its block and projection."""
        cases, first = [], 0
        for field, rows in enumerate(self.field_sizes):
            table, projection, bias = self.block(field)
            part = rows_part(table.detach())
            if projection is not None:
                part = linear_part(part, projection.detach(), None if bias is None else bias.detach())
            cases.append((range(first, first + rows), part))
            first += rows
        return as_table(self, cases[0][1] if len(cases) == 1 else switch_part(first, cases))


class MixedDimensionEmbedding(FieldBlocks):
    """Fields with many rows have narrow ones, each field with its own projection to the common dimension.

    A row is ``weight_f[i] @ projection_f``. The dimension of a field with ``n_f`` rows is the power of two nearest to
    ``λ n_f^-α``. A budget decides α between 0 and 1, and λ where α = 1 is not enough (fields of equal sizes); what is
    then left is spent on single columns, first for the field that rounding has cut most. With one field it is one
    narrow table with a projection, "low-dimensional".

    Parameters
    ----------
    temperature : float, optional
        α; else what the budget asks for, 0.3 without a budget.
    dims : sequence of int, optional
        A dimension for each field, instead of the rule.
    **settings
        Those of :class:`TrainedEmbedding`; the method reads the sizes of fields, not their frequencies.

    Raises
    ------
    ValueError
        The budget is less than one column for each field, or ``dims`` or ``temperature`` make no sense.

    References
    ----------
    Ginart et al., "Mixed dimension embeddings with application to memory-efficient recommendation systems", 2019.

    Examples
    --------
    >>> import torch
    >>> module = MixedDimensionEmbedding(10_100, 16, field_sizes=[100, 10_000], ratio=5, random_state=0)
    >>> module.dims, module.inference_nbytes() * 5 <= 4 * 10_100 * 16
    ((16, 3), True)
    """

    name: ClassVar[str] = "mixed-dimension"
    about: ClassVar[str] = "large fields have narrow rows and a projection (Ginart et al. 2019)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        temperature: float | None = None,
        dims: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if temperature is not None and not 0 <= temperature <= 1:
            raise ValueError(f"temperature must be from 0 to 1, got {temperature}")
        if dims is None and (self.budget is None or temperature is not None):
            dims = popular_dims(self.field_sizes, self.embedding_dim, 0.3 if temperature is None else temperature)
        self.dims = self._affordable_dims() if dims is None else tuple(int(dim) for dim in dims)
        if len(self.dims) != len(self.field_sizes) or not all(1 <= dim <= self.embedding_dim for dim in self.dims):
            raise ValueError(
                f"dims must be {len(self.field_sizes)} numbers from 1 to {self.embedding_dim}, got {self.dims}"
            )
        if self.budget is not None and not self.budget.allows(self._size(self.dims)):
            raise self.budget.unreachable(self._size(self.dims), f"mixed-dimension with the dimensions {self.dims}")
        self._make_blocks(self.dims, device)

    def _size(self, dims: Sequence[int]) -> Size:
        pairs = zip(self.field_sizes, dims, strict=True)
        floats = sum(block_floats(rows, dim, self.embedding_dim) for rows, dim in pairs)
        return Size(floats, FLOAT_BYTES * floats)

    def _affordable_dims(self) -> tuple[int, ...]:
        assert self.budget is not None

        def dims(at: float) -> list[int]:
            # One path through both: α from 0 to 1, then λ down to where all dimensions are 1.
            scale = float(self.embedding_dim) ** -max(at - 1, 0)
            return popular_dims(self.field_sizes, self.embedding_dim, min(at, 1), scale)

        if self.budget.allows(self._size(dims(0))):
            return tuple(dims(0))
        if not self.budget.allows(self._size(dims(2))):
            raise self.budget.unreachable(self._size(dims(2)), "mixed-dimension")
        too_large, allowed = 0.0, 2.0
        for _ in range(_BISECTIONS):
            middle = (too_large + allowed) / 2
            if self.budget.allows(self._size(dims(middle))):
                allowed = middle
            else:
                too_large = middle
        return self._spend_rest(dims(allowed), allowed)

    def _spend_rest(self, found: list[int], at: float) -> tuple[int, ...]:
        """Single columns for what rounding has left of the budget."""
        assert self.budget is not None
        sizes = np.asarray(self.field_sizes, dtype=np.float64)
        wished = (sizes / sizes.min()) ** -min(at, 1.0)
        queue = [(dim / wished[field], field) for field, dim in enumerate(found) if dim < self.embedding_dim]
        heapq.heapify(queue)
        while queue:
            _, field = heapq.heappop(queue)
            more = _worth(self.field_sizes[field], found[field] + 1, self.embedding_dim)
            # A field whose next column is too much leaves the queue: later there is less.
            if self.budget.allows(self._size([*found[:field], more, *found[field + 1 :]])):
                found[field] = more
                if more < self.embedding_dim:
                    heapq.heappush(queue, (more / wished[field], field))
        return tuple(found)
