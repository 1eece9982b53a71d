"""Low rank, few bits a value, and rows of their own for frequent ids, in one table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding, Training
from vqrs.torch.trained.export import (
    Part,
    Term,
    as_table,
    hashed,
    hashed_part,
    linear_part,
    rows_part,
    stored,
    switch_part,
)
from vqrs.torch.trained.hashing import hash_ids
from vqrs.torch.trained.hot_ids import HotIds, most_frequent
from vqrs.torch.trained.packing import pack_rows

if TYPE_CHECKING:
    import vqrs

_SEED_BYTES = 8
_STEPS = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Best step of uniform levels for normal values (Max, "Quantizing for minimum distortion", 1960)."""
_FLOAT_BITS = 32
_SHARED_PART = 0.1
"""Of the rows, for all ids that have none of their own."""
_ROW_BITS = (*range(8, 64, 8), *range(64, 257, 16))
_REFRESH = 8
"""Steps of training after which the levels follow the weights."""
_SAMPLE = 1 << 16


class LowRankIntEmbedding(TrainedEmbedding):
    """A few bits a value, a few values a row, one matrix that projects rows; rare ids share rows where bytes are few.

    Each branch of compression gives what it is good at: low rank and few-bit integers make a row small, so that many
    more ids can have one of their own, and frequencies say which. Values are trained in float32 and rounded on the way
    (gradients pass), to uniform levels about the mean of their column whose step follows its deviation. No paper has
    this combination; its parts are those of Ginart et al. 2019 (low dimensions), Courbariaux et al. 2015 (rounding with
    a straight-through gradient) and Weinberger et al. 2009 (hashing).

    Parameters
    ----------
    rank : int, optional
        Values of a row, at most ``embedding_dim``, where the matrix is left out.
    bits : int, optional
        1 to 8, or 32 for floats. Of ``rank`` and ``bits``, what is not given is chosen for the budget: about 8 values
        for each bit.
    num_rows : int, optional
        Rows of all; else as many as the budget allows. Where they are fewer than ids, a tenth of them is shared by
        hashing, and the most frequent ids (without frequencies, ids at even distances) have the others.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        A setting out of range, or a budget below a row and the matrix.

    Notes
    -----
    Training holds a float for each value of the rows that are kept, and the optimizer's: ``training_nbytes`` says how
    many. It is less than the full table by the rank and by the ids that share rows.

    Examples
    --------
    >>> import torch
    >>> module = LowRankIntEmbedding(1000, 16, ratio=15, random_state=0)
    >>> module.rank, module.bits, module.inference_nbytes()
    (16, 2, 4136)
    """

    name: ClassVar[str] = "low-rank-int"
    about: ClassVar[str] = "few values a row, few bits a value, rare ids share rows (vqrs 2026)"
    per_id_state: ClassVar[bool] = True

    levels: Tensor
    """Mean and step of each column, of shape (2, rank)."""
    seed: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: int | None = None,
        bits: int | None = None,
        num_rows: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if rank is not None and not 1 <= rank <= self.embedding_dim:
            raise ValueError(f"rank must be from 1 to embedding_dim={self.embedding_dim}, got {rank}")
        if bits is not None and bits != _FLOAT_BITS and bits not in _STEPS:
            raise ValueError(f"bits must be from 1 to 8, or 32, got {bits}")
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.rank, self.bits, rows = self._choose(rank, bits, num_rows)
        own = self._own(rows)
        self.weight = nn.Parameter(self.uniform(rows, self.rank, bound=self.rank**-0.5).to(device))
        if self.rank < self.embedding_dim:
            # Rows that are orthogonal keep the norms that weights have.
            columns = torch.linalg.qr(self.normal(self.embedding_dim, self.rank))[0]
            self.projection = nn.Parameter(columns.T.contiguous().to(device))
        self.register_buffer("seed", self.seeds().to(device))
        self.register_buffer("levels", torch.ones(2 if self.bits < _FLOAT_BITS else 0, self.rank, device=device))
        self.hot = None
        if own < min(rows, self.num_embeddings) and own:
            self.hot = HotIds(most_frequent(self._frequencies, self.num_embeddings, own), self.num_embeddings).to(
                device
            )
        self._refresh()

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _own(self, rows: int) -> int:
        """Ids with rows of their own, of so many rows."""
        if rows >= self.num_embeddings:
            return self.num_embeddings
        return rows - max(1, int(_SHARED_PART * rows))

    def _cost(self, rows: int, rank: int, bits: int) -> Size:
        n, d, own = self.num_embeddings, self.embedding_dim, self._own(rows)
        matrix = rank * d if rank < d else 0
        nbytes = rows * -(-rank * bits // 8) + FLOAT_BYTES * matrix + _SEED_BYTES
        if bits < _FLOAT_BITS:
            nbytes += 2 * FLOAT_BYTES * rank
        if 0 < own < n:
            nbytes += HotIds.nbytes(own, n)
        return Size(rows * rank + matrix, nbytes)

    def _choose(self, rank: int | None, bits: int | None, num_rows: int | None) -> tuple[int, int, int]:
        """Rank, bits and rows."""
        n, d, budget = self.num_embeddings, self.embedding_dim, self.budget
        rows = None if num_rows is None else min(num_rows, n)
        if budget is None:
            return rank or min(d, 16), bits or 2, rows or n
        if rank is None and bits is None and budget.allows(self._cost(rows or n, d, _FLOAT_BITS)):
            return d, _FLOAT_BITS, rows or n
        shapes = self._shapes(rank, bits)
        fitting = [
            (self._rows(*shape, rows), *shape) for shape in shapes if budget.allows(self._cost(rows or 1, *shape))
        ]
        if not fitting:
            least = min(
                (self._cost(rows or 1, *shape) for shape in shapes), key=lambda size: getattr(size, budget.unit)
            )
            raise budget.unreachable(least, self.name)
        ranked = self._lookups()
        found, rank, bits = max(fitting, key=lambda option: self._value(option[0], option[1], option[2], ranked))
        return rank, bits, found

    def _shapes(self, rank: int | None, bits: int | None) -> list[tuple[int, int]]:
        """Ranks and bits to choose from."""
        d = self.embedding_dim
        if self.budget is not None and self.budget.unit == "floats":
            return [(r, bits or 8) for r in (range(1, d + 1) if rank is None else [rank])]
        if rank is not None:
            return [(rank, b) for b in (_STEPS if bits is None else [bits])]
        if bits is not None:
            return [(r, bits) for r in range(1, d + 1)]
        shapes = []
        for row_bits in (1, 2, 4, *_ROW_BITS, *range(256, 8 * d, 64), 8 * d):
            wanted = min(8, max(1, round(math.sqrt(row_bits / 8)), -(-row_bits // d)))
            shapes.append((max(1, min(d, row_bits // wanted)), wanted))
        return shapes

    def _rows(self, rank: int, bits: int, rows: int | None) -> int:
        assert self.budget is not None
        if rows is not None:
            return rows
        if self.budget.allows(self._cost(self.num_embeddings, rank, bits)):
            return self.num_embeddings
        return self.budget.largest(lambda m: self._cost(m, rank, bits), 1, self.num_embeddings - 1, self.name)

    def _value(self, rows: int, rank: int, bits: int, ranked: NDArray[np.float64] | None) -> float:
        """How good rows of that shape may be: what their bits tell, times the square of the lookups that they cover.

        Measured on synthetic ratings: 16, 32 and 64 bits give 0.7, 0.9 and nearly all of what the full table gives;
        and ids that share rows spoil the learning of the others, so that all ids at 16 bits are better than nine
        tenths of them at 24.
        """
        own = self._own(rows)
        covered = own / self.num_embeddings if ranked is None else float(ranked[own - 1] / ranked[-1]) if own else 0.0
        told = 1 - 2 ** (-rank * min(bits, 8) / 9)
        return told * covered**2 + 1e-3 * rows / self.num_embeddings  # where nothing is covered, more rows

    def _lookups(self) -> NDArray[np.float64] | None:
        """Lookups of the most frequent ids together; None where nothing is known."""
        if self._frequencies is None or not self._frequencies.any():
            return None
        return np.cumsum(np.sort(self._frequencies)[::-1])

    # -- rows -------------------------------------------------------------------------------------------------------

    def _places(self, ids: Tensor) -> Tensor:
        rows = len(self.weight)
        if rows == self.num_embeddings:
            return ids
        if self.hot is None:
            return hash_ids(ids, self.seed, rows)
        own = self._own(rows)
        found, places = self.hot.find(ids)
        return places.where(found, own + hash_ids(ids, self.seed, rows - own))

    def _numbers(self, values: Tensor) -> Tensor:
        """Numbers of the levels of values, from 0."""
        mean, step = self.levels
        half = 2 ** (self.bits - 1)
        return ((values.detach() - mean) / step).floor().clamp(-half, half - 1) + half

    def _book(self) -> Tensor:
        """Levels of each column: (rank, 2^bits)."""
        mean, step = self.levels
        numbers = torch.arange(2**self.bits, device=mean.device) - (2 ** (self.bits - 1) - 0.5)
        return mean[:, None] + step[:, None] * numbers

    def rows(self, ids: Tensor) -> Tensor:
        """Rounded rows, projected."""
        values = self.weight.index_select(0, self._places(ids))
        if self.bits < _FLOAT_BITS:
            mean, step = self.levels
            rounded = mean + step * (self._numbers(values) - (2 ** (self.bits - 1) - 0.5))
            values = rounded + (values - values.detach())  # gradients pass the rounding
        return values @ self.projection if self.rank < self.embedding_dim else values

    @torch.no_grad()
    def _refresh(self) -> None:
        """Let the levels follow the weights."""
        if self.bits == _FLOAT_BITS:
            return
        seen = self.weight[:: -(-len(self.weight) // _SAMPLE)]
        self.levels[0] = seen.mean(0)
        self.levels[1] = (seen.std(0, correction=0) * _STEPS[self.bits]).clamp(min=1e-6)

    def on_step(self, training: Training) -> None:
        """The levels follow the weights, now and then."""
        if training.step % _REFRESH == 0:
            self._refresh()

    def on_epoch(self, training: Training) -> None:
        """The levels follow the weights."""
        self._refresh()

    def inference_tensors(self) -> Iterable[Tensor]:
        """Packed numbers of levels (or floats), the levels, the matrix, and what places ids."""
        yield self._packed() if self.bits < _FLOAT_BITS else self.weight
        if self.rank < self.embedding_dim:
            yield self.projection
        yield from self.buffers()

    def _packed(self) -> Tensor:
        return pack_rows(self._numbers(self.weight).long(), self.bits)

    def to_table(self) -> vqrs.Table:
        """A table of packed numbers and a matrix that has the levels in it; shared rows hold a byte a value there."""
        if self.bits == _FLOAT_BITS:
            part = self._as_part(self.weight.detach())
            return as_table(
                self, linear_part(part, self.projection.detach()) if self.rank < self.embedding_dim else part
            )
        matrix = self.projection.detach() if self.rank < self.embedding_dim else torch.eye(self.rank).to(self.levels)
        part = self._as_part(self._numbers(self.weight).to(torch.uint8))
        return as_table(self, linear_part(part, self.levels[1][:, None] * matrix, self._book()[:, 0] @ matrix))

    def _as_part(self, values: Tensor) -> Part:
        """Floats, or numbers of levels."""
        n, rows = self.num_embeddings, len(values)
        own = self._own(rows)
        mine = None
        if own:
            mine = rows_part(values[:own]) if self.bits == _FLOAT_BITS else self._packed_part(own)
        if mine is not None and own == n:
            return mine
        others = hashed_part(self.rank, [Term(values[own:].contiguous(), hashed(self.seed, rows - own))], rows=n)
        return (
            others
            if mine is None
            else switch_part(n, [(most_frequent(self._frequencies, n, own).numpy(), mine)], others)
        )

    def _packed_part(self, own: int) -> Part:
        book = torch.arange(2**self.bits, dtype=torch.uint8)
        terms = [Term(book, stored(column, len(book)), column, 1, 1) for column in range(self.rank)]
        return hashed_part(self.rank, terms, codes=self._packed()[:own].cpu().numpy(), bits=self.bits)
