"""OptEmbed: Lyu et al., "OptEmbed: learning optimal embedding table for click-through rate prediction", 2022."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding, Training
from vqrs.torch.trained.export import Term, as_table, digit, hashed_part, switch_part
from vqrs.torch.trained.positions import find_positions, pack_positions, positions_nbytes

if TYPE_CHECKING:
    import vqrs

_PARENTS = 10
_TRIES = 20


class _Step(torch.autograd.Function):
    """1 where a number is positive, else 0; its gradient is that of Liu et al., "Dynamic sparse training", 2020."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        size = x.abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
        return gradients[0] * slope


def evolve(
    score: Callable[[tuple[int, ...]], float],
    begin: Iterable[tuple[int, ...]],
    most: int,
    *,
    generations: int,
    mutations: int = 10,
    crossovers: int = 10,
    rate: float = 0.1,
    generator: np.random.Generator,
) -> tuple[int, ...]:
    """The best vector of small integers that an evolutionary search finds.

    Parameters
    ----------
    score : callable
        Higher is better; called once for each vector.
    begin : iterable of tuple of int
        The first generation.
    most : int
        Integers are from 1 to it.
    generations : int
    mutations, crossovers : int
        Children of a generation: a parent with some entries drawn anew, or a mixture of two parents. Parents are the
        ten best so far.
    rate : float
        Probability that a mutation changes an entry.
    generator : numpy Generator

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> draw = np.random.default_rng(0)
    >>> evolve(lambda dims: -abs(sum(dims) - 20), [(1, 1, 1), (8, 8, 8)], 8, generations=10, generator=draw)
    (5, 7, 8)
    """
    known: dict[tuple[int, ...], float] = {}

    def learn(child: tuple[int, ...]) -> bool:
        if child in known:
            return False
        known[child] = score(child)
        return True

    for first in begin:
        learn(first)
    for _ in range(generations):
        parents = sorted(known, key=lambda dims: -known[dims])[:_PARENTS]

        def mutated(parents: list[tuple[int, ...]] = parents) -> NDArray[np.int64]:
            parent = np.array(parents[generator.integers(len(parents))])
            drawn = generator.integers(1, most + 1, len(parent))
            return np.where(generator.random(len(parent)) < rate, drawn, parent)

        def crossed(parents: list[tuple[int, ...]] = parents) -> NDArray[np.int64]:
            one, other = (np.array(parents[generator.integers(len(parents))]) for _ in range(2))
            return np.where(generator.random(len(one)) < 0.5, one, other)

        for make in [mutated] * mutations + [crossed] * crossovers:
            # Small spaces run out of vectors that are new.
            any(learn(tuple(make().tolist())) for _ in range(_TRIES))
    return max(known, key=lambda dims: known[dims])


class PackedBlocks(nn.Module):
    """What inference holds of kept rows whose fields have dimensions of their own.

    Parameters
    ----------
    values : float32 tensor of shape (sum of the dimensions of kept rows,)
    positions : list of Tensor
        The kept rows, as :func:`pack_positions` gives them.
    kept : sequence of int
        Number of kept rows of each field.
    field_sizes : sequence of int
    dim : int
        Values of a row.
    dims : integer tensor of shape (fields,), optional
        The dimension of each field, where not all are whole.

    Examples
    --------
    >>> import torch
    >>> rows = pack_positions(torch.tensor([1, 2]), 3)
    >>> packed = PackedBlocks(torch.tensor([1.0, 2.0]), rows, [1, 1], [2, 1], 2, torch.tensor([1, 1]))
    >>> packed(torch.tensor([2, 0]))
    tensor([[2., 0.],
            [0., 0.]])
    """

    values: Tensor
    dims: Tensor | None

    def __init__(
        self,
        values: Tensor,
        positions: list[Tensor],
        kept: Sequence[int],
        field_sizes: Sequence[int],
        dim: int,
        dims: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kept, self.field_sizes, self.dim = tuple(kept), tuple(field_sizes), dim
        self.register_buffer("values", values)
        self.register_buffer("dims", dims)
        self._names = [f"positions_{at}" for at in range(len(positions))]
        for name, tensor in zip(self._names, positions, strict=True):
            self.register_buffer(name, tensor.to(values.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of int64 ids of shape (n,), within the table: float32 of shape (n, dim)."""
        sizes, kept = torch.tensor([self.field_sizes, self.kept], device=ids.device)
        dims = torch.full_like(kept, self.dim) if self.dims is None else self.dims.long()
        out = torch.zeros(len(ids), self.dim, device=ids.device)
        packed = [getattr(self, name) for name in self._names]
        if not len(ids):
            return out
        rows, _, numbers = find_positions(packed, sum(self.kept), sum(self.field_sizes), ids, 1)
        fields = torch.bucketize(ids[rows], sizes.cumsum(0), right=True)
        before, values_before = kept.cumsum(0) - kept, (kept * dims).cumsum(0) - kept * dims
        starts = values_before[fields] + (numbers - before[fields]) * dims[fields]
        found, column = (torch.arange(self.dim, device=ids.device) < dims[fields][:, None]).nonzero(as_tuple=True)
        out[rows[found], column] = self.values[starts[found] + column]
        return out


class OptEmbedEmbedding(TrainedEmbedding):
    """Which rows are kept and how many columns each field has is learned; then the kept ones train on.

    First a supernet: a row counts while its L1 norm is above its field's threshold, which is learned with a surrogate
    gradient and a penalty ``alpha · Σ exp(-t)``, and each step a field has a random number of columns. Then an
    evolutionary search for the numbers of columns by the score on the validation part. Then the kept values train on
    from what they are. The paper does not aim at a budget. Here each vector of the search is made to fit: where the
    budget cannot pay all rows above their thresholds at those dimensions, the rows furthest above are kept; where it
    can pay more, narrow fields get more columns. Rows that are not kept are zeros. Inference holds the kept values,
    packed positions of the kept rows, and a dimension for each field.

    Parameters
    ----------
    alpha : float
        Weight of the penalty.
    threshold_rate : float
        Learning rate of thresholds.
    generations : int
        Of the search, each with 10 mutations and 10 crossovers, a validation each. The paper takes 30.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than one value.

    References
    ----------
    Lyu et al., "OptEmbed: learning optimal embedding table for click-through rate prediction", 2022.

    Examples
    --------
    >>> import torch
    >>> module = OptEmbedEmbedding(1000, 8, field_sizes=[100, 900], ratio=10, random_state=0).eval()
    >>> module.keep([4, 2])
    >>> rows = module(torch.arange(1000)) != 0
    >>> rows[:100].any(0).sum(), rows[100:].any(0).sum(), module.inference_nbytes()
    (tensor(4), tensor(2), 3199)
    """

    name: ClassVar[str] = "optembed"
    about: ClassVar[str] = "learned row masks, evolved dimensions of fields (Lyu et al. 2022)"
    stages: ClassVar[tuple[str, ...]] = ("supernet", "search", "retrain")
    searches: ClassVar[frozenset[str]] = frozenset({"search"})
    per_id_state: ClassVar[bool] = True
    dims: Tensor
    kept: Tensor
    offsets: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        alpha: float = 1e-5,
        threshold_rate: float = 1e-4,
        generations: int = 5,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if generations < 0:
            raise ValueError(f"generations must not be negative, got {generations}")
        self.alpha, self.threshold_rate, self.generations = alpha, threshold_rate, generations
        least = self._cost(1, 1, whole=self.embedding_dim == 1)
        if self.budget is not None and not self.budget.allows(least):
            raise self.budget.unreachable(least, "optembed")
        self.weight = nn.Parameter(self.uniform(self.num_embeddings, self.embedding_dim).to(device))
        self.threshold = nn.Parameter(torch.zeros(len(self.field_sizes), device=device))
        dims = torch.full((len(self.field_sizes),), self.embedding_dim, dtype=torch.int32, device=device)
        self.register_buffer("dims", dims)
        # Empty until rows have been chosen; then, when the others are gone, where each begins.
        self.register_buffer("kept", torch.zeros(0, dtype=torch.bool, device=device))
        self.register_buffer("offsets", torch.zeros(0, dtype=torch.int64, device=device))

    def _dims_type(self) -> torch.dtype:
        return torch.uint8 if self.embedding_dim < 256 else torch.int32

    def _cost(self, rows: int, floats: int, whole: bool) -> Size:
        dims = 0 if whole else len(self.field_sizes) * self._dims_type().itemsize
        return Size(floats, FLOAT_BYTES * floats + positions_nbytes(rows, self.num_embeddings) + dims)

    # -- which values are kept ----------------------------------------------------------------------------------------

    def _row_fields(self) -> Tensor:
        sizes = torch.tensor(self.field_sizes, device=self.weight.device)
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    @torch.no_grad()
    def _margins(self) -> Tensor:
        """How far each row is above its threshold."""
        return self.weight.abs().sum(1) - self.threshold[self._row_fields()]

    def keep(self, dims: Iterable[int]) -> None:
        """Keep so many columns of each field, and the rows that the budget then pays.

        Parameters
        ----------
        dims : iterable of int
            One number from 1 to ``embedding_dim`` for each field.
        """
        margins = self._margins()
        self._keep(tuple(dims), margins, margins.argsort(descending=True, stable=True))

    @torch.no_grad()
    def _keep(self, dims: tuple[int, ...], margins: Tensor, order: Tensor) -> None:
        above = max(int((margins > 0).sum()), 1)
        counts = torch.bincount(self._row_fields()[order[:above]], minlength=len(self.field_sizes)).tolist()
        dims = self._widened(dims, counts)
        found = torch.tensor(dims, dtype=self.dims.dtype, device=self.dims.device)
        if self.budget is not None:
            floats = found[self._row_fields()[order[:above]]].long().cumsum(0)
            whole = min(dims) == self.embedding_dim

            def cost(rows: int) -> Size:
                return self._cost(rows, int(floats[rows - 1]), whole)

            if not self.budget.allows(cost(1)):
                # A budget of less than a row of the chosen dimensions.
                return self._keep((1,) * len(dims), margins, order)
            above = self.budget.largest(cost, 1, above, "optembed") if not self.budget.allows(cost(above)) else above
        self.dims = found
        kept = torch.zeros(self.num_embeddings, dtype=torch.bool, device=found.device)
        kept[order[:above]] = True
        self.kept = kept
        return None

    def _widened(self, dims: tuple[int, ...], counts: list[int]) -> tuple[int, ...]:
        """More columns, the narrowest fields first, while the budget pays all rows above their thresholds."""
        if self.budget is None:
            return dims
        wider, rows = list(dims), sum(counts)
        floats = sum(count * dim for count, dim in zip(counts, wider, strict=True))
        open_fields = set(range(len(wider)))
        while open_fields:
            field = min(open_fields, key=lambda field: wider[field])
            more = floats + counts[field]
            whole = sum(wider) + 1 == self.embedding_dim * len(wider)
            if wider[field] < self.embedding_dim and self.budget.allows(self._cost(rows, more, whole)):
                wider[field], floats = wider[field] + 1, more
            else:
                open_fields.remove(field)
        return tuple(wider)

    # -- stages -------------------------------------------------------------------------------------------------------

    def enter_stage(self, stage: str) -> None:
        """Go to a stage; in the last one only the kept values are left."""
        super().enter_stage(stage)
        if stage == "retrain" and not len(self.offsets):
            if not len(self.kept):
                self.keep(self.dims.tolist())
            self._shrink()

    @torch.no_grad()
    def _shrink(self) -> None:
        values, dims = self._kept_values(), self.dims[self._row_fields()].long() * self.kept
        ends = dims.cumsum(0)
        self.offsets = torch.where(self.kept, ends - dims, -1).to(torch.int32 if len(values) < 2**31 else torch.int64)
        self.weight = nn.Parameter(values)
        self.threshold = nn.Parameter(self.threshold.new_empty(0), requires_grad=False)
        self.kept = self.kept[:0]

    @torch.no_grad()
    def _is_kept(self) -> Tensor:
        if len(self.offsets):
            return self.offsets >= 0
        return self.kept if len(self.kept) else self._margins() > 0

    @torch.no_grad()
    def _kept_values(self) -> Tensor:
        if len(self.offsets):
            return self.weight.detach()
        columns = torch.arange(self.embedding_dim, device=self.weight.device)
        kept = self._is_kept()
        return self.weight.detach()[kept][columns < self.dims[self._row_fields()[kept]][:, None]]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows by their masks; only the kept columns of kept rows where those are chosen."""
        fields, columns = self.field_of(ids), torch.arange(self.embedding_dim, device=ids.device)
        if len(self.offsets):
            starts = self.offsets[ids].long()
            there = (columns < self.dims[fields][:, None]) & (starts >= 0)[:, None]
            places = torch.where(there, starts[:, None] + columns, 0).reshape(-1)
            return self.weight.index_select(0, places).reshape(there.shape) * there
        rows = F.embedding(ids, self.weight)
        dims = self.dims
        if self.stage == "supernet" and self.training:
            drawn = torch.randint(1, self.embedding_dim + 1, dims.shape, generator=self._generator)
            dims = drawn.to(dims.device)
        if len(self.kept):
            mask = self.kept[ids].to(rows.dtype)
        else:
            mask = _Step.apply(rows.abs().sum(1) - self.threshold[fields])
        return rows * mask[:, None] * (columns < dims[fields][:, None])

    def penalty(self) -> Tensor | None:
        """What pushes thresholds up, in the supernet."""
        return self.alpha * (-self.threshold).exp().sum() if self.stage == "supernet" else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Thresholds have a rate of their own; in the search nothing moves."""
        if self.stage == "retrain":
            return [{"params": [self.weight]}]
        if self.stage == "search":
            return [{"params": [self.weight], "lr": 0.0}]
        return [
            {"params": [self.weight]},
            {"params": [self.threshold], "lr": self.threshold_rate, "weight_decay": 0.0},
        ]

    def on_step(self, training: Training) -> None:
        """The whole search, after the first step of its stage."""
        if self.stage != "search" or self.finished:
            return
        margins = self._margins()
        order = margins.argsort(descending=True, stable=True)

        def score(dims: tuple[int, ...]) -> float:
            self._keep(dims, margins, order)
            return training.validation_score()

        generator = np.random.default_rng(int(torch.randint(2**62, (), generator=self._generator)))
        n_fields, most = len(self.field_sizes), self.embedding_dim
        same = [(dim,) * n_fields for dim in sorted({1 << power for power in range(most.bit_length())} | {most})]
        drawn = [tuple(row) for row in generator.integers(1, most + 1, (_PARENTS, n_fields)).tolist()]
        best = evolve(score, itertools.chain(same, drawn), most, generations=self.generations, generator=generator)
        self._keep(best, margins, order)
        self.finished = True

    # -- what is held -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def inference_tensors(self) -> Iterable[Tensor]:
        """The kept values, packed positions of the kept rows, and the dimensions of fields unless all are whole."""
        yield self._kept_values()
        yield from pack_positions(self._is_kept().nonzero()[:, 0], self.num_embeddings)
        if bool((self.dims < self.embedding_dim).any()):
            yield self.dims.to(self._dims_type())

    @torch.no_grad()
    def packed(self) -> PackedBlocks:
        """A module for inference, of :meth:`inference_nbytes` bytes; its rows are those of evaluation mode."""
        kept = torch.bincount(self._row_fields()[self._is_kept()], minlength=len(self.field_sizes)).tolist()
        values, *rest = self.inference_tensors()
        dims = rest.pop() if bool((self.dims < self.embedding_dim).any()) else None
        return PackedBlocks(values, rest, kept, self.field_sizes, self.embedding_dim, dims)

    @torch.no_grad()
    def to_table(self) -> vqrs.Table:
        """The same rows: the kept ones of each field with its columns, the others zeros.

        Ids of kept rows are stored as they are, so that the file may be larger than :meth:`inference_nbytes`.
        """
        kept, values, fields = self._is_kept().cpu(), self._kept_values().cpu(), self._row_fields().cpu()
        cases, first = [], 0
        for field, dim in enumerate(self.dims.tolist()):
            ids = (kept & (fields == field)).nonzero()[:, 0]
            if not len(ids):
                continue
            block = values[first : first + len(ids) * dim].reshape(len(ids), dim)
            first += len(ids) * dim
            terms = [Term(block, digit(len(ids)))]
            if dim < self.embedding_dim:
                terms.append(Term(torch.zeros(self.embedding_dim - dim), digit(1), start=dim))
            part = hashed_part(self.embedding_dim, terms, rows=len(ids))
            whole = len(ids) == self.field_sizes[field]
            cases.append((range(int(ids[0]), int(ids[-1]) + 1) if whole else ids.numpy(), part))
        return as_table(self, switch_part(self.num_embeddings, cases))
