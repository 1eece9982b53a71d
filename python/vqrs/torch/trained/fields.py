"""Embeddings of several fields: small fields stay whole, the others share or split a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from vqrs.torch.trained.base import FLOAT_BYTES, Budget, Size, TrainedEmbedding, Training
from vqrs.torch.trained.full import FullEmbedding

SMALL_SHARE = 0.25
"""Share of the budget that whole small fields may take together."""


class FieldEmbeddings(nn.Module):
    """One trained embedding, or one a field, behind the ids of several fields, with the same protocol.

    A field that is small beside the budget gains nothing from compression and loses accuracy, so the smallest fields
    stay whole while together they take no more than a quarter of the budget.

    Parameters
    ----------
    method : type
        A class of :func:`vqrs.torch.methods`.
    field_sizes : sequence of int
        Rows of each field; ids count through all fields.
    embedding_dim : int
    nbytes, ratio, num_floats : optional
        The budget of all fields together, as of :class:`TrainedEmbedding`.
    separate : bool
        A module for each field, with a share of the budget as large as its share of the rows, instead of one for all;
        then no field is kept whole.
    frequencies : array of shape (sum of field_sizes,), optional
    random_state : int, optional
    **settings
        Further parameters of the method.

    Raises
    ------
    ValueError
        As the method raises, or a field's share of the budget is nothing.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> method = vqrs.torch.methods()["hash"]
    >>> embedding = FieldEmbeddings(method, [5, 1000], 8, ratio=10, random_state=0)
    >>> embedding(torch.tensor([[4, 5], [0, 1004]])).shape
    torch.Size([2, 2, 8])
    >>> [type(part).__name__ for part in embedding.parts]
    ['FullEmbedding', 'HashEmbedding']
    """

    def __init__(
        self,
        method: type[TrainedEmbedding],
        field_sizes: Sequence[int],
        embedding_dim: int,
        *,
        nbytes: int | str | None = None,
        ratio: float | None = None,
        num_floats: int | None = None,
        separate: bool = False,
        frequencies: ArrayLike | None = None,
        random_state: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.field_sizes, self.embedding_dim = tuple(int(size) for size in field_sizes), embedding_dim
        # A table in name only: it checks the arguments and turns them into a budget.
        whole = TrainedEmbedding(
            sum(self.field_sizes),
            embedding_dim,
            nbytes=nbytes,
            ratio=ratio,
            num_floats=num_floats,
            field_sizes=self.field_sizes,
            frequencies=frequencies,
        )
        self.num_embeddings, self.full_nbytes, self.budget = whole.num_embeddings, whole.full_nbytes, whole.budget
        counts = None if frequencies is None else np.split(np.asarray(frequencies), np.cumsum(self.field_sizes)[:-1])
        parts: list[TrainedEmbedding] = []
        columns: list[list[int]] = []
        for fields, budget, kept in self._groups(separate or method is FullEmbedding, separate):
            share = {} if budget is None else {"nbytes" if budget.unit == "nbytes" else "num_floats": budget.limit}
            parts.append(
                (FullEmbedding if kept else method)(
                    sum(self.field_sizes[f] for f in fields),
                    embedding_dim,
                    field_sizes=[self.field_sizes[f] for f in fields],
                    frequencies=None if counts is None else np.concatenate([counts[f] for f in fields]),
                    random_state=None if random_state is None else random_state + 7919 * len(parts),
                    **({} if kept else share | settings),
                )
            )
            columns.append(fields)
        self.parts = nn.ModuleList(parts)
        self._main: list[TrainedEmbedding] = [part for part in parts if type(part) is method]
        self._columns = columns
        self._shifts = [self._shift(fields) for fields in columns]
        order = torch.tensor([field for fields in columns for field in fields])
        self._places = None if order.equal(torch.arange(len(order))) else order.argsort()
        self.stages = self._main[0].stages
        self.restarts, self.searches = self._main[0].restarts, self._main[0].searches
        self.name = self._main[0].name

    def _groups(self, whole: bool, separate: bool) -> list[tuple[list[int], Budget | None, bool]]:
        """Fields that share a module, its budget, and whether they are kept whole."""
        fields = range(len(self.field_sizes))
        if separate:
            return [([f], self.budget and self._share(f, self.budget), False) for f in fields]
        if whole or self.budget is None:
            return [(list(fields), self.budget, False)]
        small: list[int] = []
        used = 0
        for f in sorted(fields, key=lambda f: self.field_sizes[f])[:-1]:
            floats = self.field_sizes[f] * self.embedding_dim
            cost = getattr(Size(floats, FLOAT_BYTES * floats), self.budget.unit)
            if used + cost > SMALL_SHARE * self.budget.limit:
                break
            small.append(f)
            used += cost
        rest = [f for f in fields if f not in small]
        main = (rest, self.budget._replace(limit=self.budget.limit - used), False)
        return [(sorted(small), None, True), main] if small else [main]

    def _share(self, field: int, budget: Budget) -> Budget:
        """The part of a budget that a field gets by its rows."""
        rows = self.field_sizes[field]
        limit = int(budget.limit * (rows / self.num_embeddings))
        if limit < 1:
            raise ValueError(
                f"field {field}, of {rows} rows, gets no part of the budget: give more, or share one table"
            )
        return budget._replace(limit=limit)

    def _shift(self, fields: list[int]) -> Tensor:
        """What to take from the global ids of fields to get those of their module."""
        starts = np.r_[0, np.cumsum(self.field_sizes)]
        own = np.r_[0, np.cumsum([self.field_sizes[f] for f in fields])[:-1]]
        return torch.from_numpy(starts[fields] - own)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ids that count through all fields, int of shape (..., fields): float32 (..., fields, embedding_dim).

        Raises
        ------
        IndexError
            An id is outside of the table.
        """
        if ids.shape[-1:] != (len(self.field_sizes),):
            raise ValueError(f"ids must have {len(self.field_sizes)} columns, a field each, got {tuple(ids.shape)}")
        found = [
            part(ids[..., columns] - shift.to(ids.device))
            for part, columns, shift in zip(self.parts, self._columns, self._shifts, strict=True)
        ]
        rows = found[0] if len(found) == 1 else torch.cat(found, -2)
        return rows if self._places is None else rows[..., self._places.to(rows.device), :]

    # -- the protocol of a trained embedding --------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether each module has reached the goal of its stage."""
        return all(part.finished for part in self._main)

    def enter_stage(self, stage: str) -> None:
        """Go to a stage of training."""
        for part in self._main:
            part.enter_stage(stage)

    def penalty(self) -> Tensor | None:
        """The sum of the modules' terms of the loss."""
        terms = [term for part in self._main if (term := part.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def on_step(self, training: Training) -> None:
        """Called after each step of the optimizer."""
        for part in self._main:
            part.on_step(training)

    def on_epoch(self, training: Training) -> None:
        """Called after each epoch."""
        for part in self._main:
            part.on_epoch(training)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for the loop's optimizer."""
        return [group for part in self._parts() for group in part.parameter_groups()]

    def _parts(self) -> list[TrainedEmbedding]:
        return list(self.parts)  # type: ignore[arg-type]

    def trained_floats(self) -> int:
        """Number of floats that the optimizer moves now."""
        return sum(part.trained_floats() for part in self._parts())

    def inference_nbytes(self) -> int:
        """Bytes that inference holds."""
        return sum(part.inference_nbytes() for part in self._parts())

    def training_nbytes(self, optimizer_slots: int = 2) -> int:
        """Bytes that training holds."""
        return sum(part.training_nbytes(optimizer_slots) for part in self._parts())

    def within_budget(self) -> bool:
        """Whether each module is within its part of the budget."""
        return all(part.within_budget() for part in self._parts())
