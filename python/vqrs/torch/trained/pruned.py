"""What methods that prune single values share: a stage that finds which are kept, and one that trains those."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.reference import pack_bits
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding, Training
from vqrs.torch.trained.export import (
    Part,
    Term,
    as_table,
    digit,
    hashed_part,
    rows_part,
    segments_part,
    switch_part,
)
from vqrs.torch.trained.positions import find_positions, pack_positions, positions_nbytes

if TYPE_CHECKING:
    import vqrs

_HALF_BYTES = 2


class Cut(NamedTuple):
    """What is kept: scores above the threshold, and those equal to it up to a position."""

    threshold: Tensor
    last: int


def find_cut(scores: Tensor, kept: int) -> Cut:
    """The cut that keeps exactly ``kept`` of the largest scores; of equal ones those that stand first.

    Parameters
    ----------
    scores : float tensor
    kept : int
        From 1 to the number of scores.

    Returns
    -------
    Cut

    Examples
    --------
    >>> import torch
    >>> scores = torch.tensor([3.0, 1.0, 2.0, 2.0])
    >>> above(scores, torch.arange(4), find_cut(scores, 2))
    tensor([ True, False,  True, False])
    """
    flat = scores.reshape(-1)
    threshold = flat.kthvalue(len(flat) - kept + 1).values
    ties = kept - int((flat > threshold).sum())
    return Cut(threshold, int((flat == threshold).nonzero()[ties - 1]))


def sparse_part(columns: Tensor, values: Tensor, dim: int) -> Part:
    """Rows that keep equally many values.

    Parameters
    ----------
    columns : int64 tensor of shape (rows, kept)
        Rising in each row.
    values : float16 or float32 tensor of shape (rows, kept)
    dim : int
        Values of a whole row.

    Returns
    -------
    Part

    Examples
    --------
    >>> import torch
    >>> sparse_part(torch.tensor([[1, 2]]), torch.tensor([[1.0, 2.0]]).half(), 4).codes
    array([[  6,   0,  60,   0,  64]], dtype=uint8)
    """
    kept = columns.shape[1]
    bits = max((dim - 1).bit_length(), 1)
    bitmap = -(-dim // 8) <= -(-kept * bits // 8)
    if bitmap:
        places = np.packbits(torch.zeros(len(columns), dim).scatter(1, columns, 1).numpy() > 0, 1, bitorder="little")
    else:
        places = pack_bits(columns.numpy(), bits)
    description = {
        "form": "sparse",
        "dim": dim,
        "kept": kept,
        "dtype": str(values.dtype).removeprefix("torch."),
        "places": "bitmap" if bitmap else "columns",
        "scale_factor": 1.0,
    }
    own = np.ascontiguousarray(values.detach().numpy()).view(np.uint8).reshape(len(columns), -1)
    return Part(description, {}, np.concatenate([places, own], 1))


def above(scores: Tensor, positions: Tensor, cut: Cut) -> Tensor:
    """Whether the scores at positions are kept: bool, of their shape."""
    return (scores > cut.threshold) | ((scores == cut.threshold) & (positions <= cut.last))


class PackedRows(nn.Module):
    """What inference holds of a pruned table, and nothing else: float16 or float32 values and packed positions.

    Parameters
    ----------
    values : tensor of shape (kept,)
    positions : list of Tensor
        As :func:`pack_positions` gives them.
    shape : tuple of int
        Of the table.

    Examples
    --------
    >>> import torch
    >>> packed = PackedRows(torch.tensor([1.0, 2.0]), pack_positions(torch.tensor([1, 4]), 6), (2, 3))
    >>> packed(torch.tensor([1, 0]))
    tensor([[0., 2., 0.],
            [0., 1., 0.]])
    """

    values: Tensor

    def __init__(self, values: Tensor, positions: list[Tensor], shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("values", values)
        self._names = [f"positions_{at}" for at in range(len(positions))]
        for name, tensor in zip(self._names, positions, strict=True):
            self.register_buffer(name, tensor.to(values.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of int64 ids of shape (n,), within the table: float32 of shape (n, embedding_dim)."""
        rows, dim = self.shape
        out = torch.zeros(len(ids) * dim, device=ids.device)
        if len(ids):
            packed = [getattr(self, name) for name in self._names]
            windows, places, numbers = find_positions(packed, len(self.values), rows * dim, ids * dim, dim)
            out[windows * dim + places] = self.values[numbers].float()
        return out.reshape(len(ids), dim)


class PrunedEmbedding(TrainedEmbedding):
    """A table of which only some values are kept, the same number whatever happens in training.

    The first stage trains all values. Its rows in evaluation mode are those that inference would hold if it ended now:
    the values with the largest scores, the others 0. The last stage trains those values alone, and holds only them with
    their columns. Inference holds float16 values and their positions in as few bits as :func:`pack_positions` needs;
    a budget that allows the whole table gets it, in float32 or float16.

    Parameters
    ----------
    sparsity : float, optional
        Share of the values that are 0 in the end; else as small as the budget allows, 0.9 without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than one value, or ``sparsity`` is not from 0 to 1 or needs more than the budget.
    """

    per_id_state: ClassVar[bool] = True

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, sparsity: float | None = None, **settings: Any
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
        self._size = self.num_embeddings * self.embedding_dim
        self._value_type = torch.float16
        self.kept = self._affordable() if sparsity is None else max(round((1 - sparsity) * self._size), 1)
        """Number of values that are kept."""
        if self.kept == self._size and (
            self.budget is None or self.budget.allows(Size(self._size, FLOAT_BYTES * self._size))
        ):
            self._value_type = torch.float32
        elif self.budget is not None and not self.budget.allows(self._cost(self.kept)):
            raise self.budget.unreachable(self._cost(self.kept), f"{self.name} with the sparsity {sparsity}")
        self.weight = nn.Parameter(self._initial_weight().to(device))
        self.register_buffer("starts", torch.zeros(0, dtype=self._start_type(), device=device))
        self.register_buffer("columns", torch.zeros(0, dtype=self._column_type(), device=device))
        self._found: tuple[Any, Cut] | None = None

    def _initial_weight(self) -> Tensor:
        return self.uniform(self.num_embeddings, self.embedding_dim)

    def _start_type(self) -> torch.dtype:
        return torch.int32 if self.kept < 2**31 else torch.int64

    def _column_type(self) -> torch.dtype:
        return torch.uint8 if self.embedding_dim <= 256 else torch.int32

    def _cost(self, kept: int) -> Size:
        return Size(kept, _HALF_BYTES * kept + positions_nbytes(kept, self._size))

    def _affordable(self) -> int:
        if self.budget is None:
            return max(self._size // 10, 1)
        if self.budget.allows(self._cost(self._size)):
            return self._size
        return self.budget.largest(self._cost, 1, max(self._size - 1, 1), self.name)

    @property
    def pruned(self) -> bool:
        """Whether only the kept values are there."""
        return bool(len(self.starts))

    # -- what a method writes -----------------------------------------------------------------------------------------

    def _values(self, ids: Tensor | None = None) -> Tensor:
        """Rows as the first stage trains them, of all ids or some."""
        return self.weight if ids is None else F.embedding(ids, self.weight)

    def _scores(self, ids: Tensor | None = None) -> Tensor:
        """What decides which values are kept, of the same shape."""
        return self._values(ids).abs()

    def _values_to_train(self) -> Tensor:
        """Rows that the last stage begins with."""
        return self._values()

    def _forget(self) -> None:
        """Let go of what the first stage alone needs."""

    # -- pruning ------------------------------------------------------------------------------------------------------

    def _search_steps(self, training: Training, epochs: float) -> int:
        """Steps of the first stage, which lasts some epochs at most."""
        return max(round(min(epochs, training.epochs) * training.steps_per_epoch), 1)

    @torch.no_grad()
    def _cut(self) -> Cut:
        """The present cut; found anew when a parameter has changed."""
        state = [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._found is None or self._found[0] != state:
            self._found = (state, find_cut(self._scores(), self.kept))
        return self._found[1]

    @torch.no_grad()
    def _kept_positions(self) -> Tensor:
        """Positions of the values that are kept in the flat table, rising."""
        if self.pruned:
            counts = self.starts.diff().long()
            rows = torch.arange(self.num_embeddings, device=counts.device).repeat_interleave(counts)
            return rows * self.embedding_dim + self.columns
        if self.kept == self._size:
            return torch.arange(self._size, device=self.weight.device)
        scores = self._scores().reshape(-1)
        return above(scores, torch.arange(self._size, device=scores.device), self._cut()).nonzero()[:, 0]

    def enter_stage(self, stage: str) -> None:
        """Go to a stage; the last one keeps the chosen values alone."""
        super().enter_stage(stage)
        if stage == self.stages[-1] and not self.pruned:
            self._prune()

    @torch.no_grad()
    def _prune(self) -> None:
        positions = self._kept_positions()
        self.weight = nn.Parameter(self._values_to_train().reshape(-1)[positions])
        self.columns = (positions % self.embedding_dim).to(self._column_type())
        counts = torch.bincount(positions // self.embedding_dim, minlength=self.num_embeddings)
        self.starts = F.pad(counts.cumsum(0), (1, 0)).to(self._start_type())
        self._forget()
        self._found = None

    def rows(self, ids: Tensor) -> Tensor:
        """All values in the first stage of training, else those that are kept."""
        if self.pruned:
            rows = self._pruned_rows(ids)
        elif self.training or self.kept == self._size:
            rows = self._values(ids)
        else:
            positions = ids[:, None] * self.embedding_dim + torch.arange(self.embedding_dim, device=ids.device)
            rows = self._values(ids) * above(self._scores(ids), positions, self._cut())
        return rows if self.training else rows.to(self._value_type).to(self.weight.dtype)

    def _pruned_rows(self, ids: Tensor) -> Tensor:
        starts = self.starts[ids].long()
        counts = self.starts[ids + 1] - starts
        ends = counts.cumsum(0)
        total = int(ends[-1]) if len(ids) else 0
        places = torch.arange(len(ids), device=ids.device).repeat_interleave(counts, output_size=total)
        found = torch.arange(total, device=ids.device) + (starts - ends + counts)[places]
        out = self.weight.new_zeros(len(ids) * self.embedding_dim)
        at = places * self.embedding_dim + self.columns[found]
        return out.scatter(0, at, self.weight.index_select(0, found)).reshape(len(ids), self.embedding_dim)

    @torch.no_grad()
    def inference_tensors(self) -> Iterable[Tensor]:
        """The values that are kept, and their packed positions."""
        positions = self._kept_positions()
        values = self.weight if self.pruned else self._values().reshape(-1)[positions]
        yield values.detach().to(self._value_type)
        yield from pack_positions(positions, self._size)

    def packed(self) -> PackedRows:
        """A module for inference, of :meth:`inference_nbytes` bytes; its rows are those of evaluation mode."""
        values, *positions = self.inference_tensors()
        return PackedRows(values, positions, (self.num_embeddings, self.embedding_dim))

    def to_table(self) -> vqrs.Table:
        """The same rows, in groups that keep as many values each.

        A file stores the group and the columns of each row by themselves, so that it is larger than
        :meth:`inference_nbytes`: :meth:`packed` is the smallest form.
        """
        if self.kept == self._size and not self.pruned:
            return as_table(self, rows_part(self._values().detach().to(self._value_type)))
        positions, values = self._kept_positions().cpu(), next(iter(self.inference_tensors())).cpu()
        if self.kept == self._size:
            return as_table(self, rows_part(values.reshape(self.num_embeddings, self.embedding_dim)))
        rows = positions // self.embedding_dim
        counts = torch.bincount(rows, minlength=self.num_embeddings)
        sizes, group_of = counts.unique(return_inverse=True)
        parts = []
        for group, count in enumerate(sizes.tolist()):
            if not count:
                zeros = Term(torch.zeros(self.embedding_dim), digit(1))
                parts.append(hashed_part(self.embedding_dim, [zeros], rows=int((group_of == group).sum())))
                continue
            chosen = counts[rows] == count
            columns = (positions[chosen] % self.embedding_dim).reshape(-1, count)
            parts.append(sparse_part(columns, values[chosen].reshape(-1, count), self.embedding_dim))
        # The group of every row, or the numbers of the rows that are not zeros: whichever takes fewer bits.
        listed = int((counts > 0).sum()) * (self.num_embeddings - 1).bit_length()
        if len(parts) <= 256 and self.num_embeddings * (len(parts) - 1).bit_length() <= listed:
            return as_table(self, segments_part(group_of.numpy(), parts))
        cases = [
            ((group_of == group).nonzero()[:, 0].numpy(), part) for group, part in enumerate(parts) if sizes[group]
        ]
        return as_table(self, switch_part(self.num_embeddings, cases))

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, without the cut: a copy has parameters of its own."""
        return {**super().__getstate__(), "_found": None}
