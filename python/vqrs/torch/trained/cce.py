"""Clustered compositional embeddings: Tsang and Ahle, "Clustering the sketch", 2023."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vqrs import _core
from vqrs.torch.forms import unpack_bits
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding, Training, reset_optimizer_state
from vqrs.torch.trained.export import (
    Part,
    Scalar,
    Term,
    as_table,
    digit,
    hashed,
    hashed_part,
    join_part,
    stored,
    switch_part,
)
from vqrs.torch.trained.hashing import derived_seeds, hash_ids
from vqrs.torch.trained.hot_ids import HotIds, most_frequent
from vqrs.torch.trained.packing import pack_rows

if TYPE_CHECKING:
    import vqrs

_SEED_BYTES = 8
_BLOCK = 1 << 16
"""Ids that are clustered at a time, so that memory does not grow with the table."""
_UNSEEN = 0.01
_SEEDED_WORK = 1 << 22
_ONE_THREAD_WORK = 1 << 26


class CCEEmbedding(TrainedEmbedding):
    """Clustered compositional embeddings: pointers into shared columns, learned by clustering during training.

    A row is made of columns. In each, an id has the sum of two short vectors: one from ``weight[0]``, where a pointer
    says which, and one from ``weight[1]``, where a hash does. Pointers are hashes at first. :meth:`cluster` runs
    k-means on the sums of all ids, points each id to its cluster, and lets the hashed part start anew from zero.

    Parameters
    ----------
    num_columns : int, optional
        Must divide ``embedding_dim``; 4 as in the paper, or the largest divisor below. More columns are better for
        the same trained floats, and take more bytes of pointers.
    num_rows : int, optional
        Vectors (clusters) of each column and table; else as many as the budget allows, a 20th of ``num_embeddings``
        without one, which is as many floats as a hash of a tenth.
    hot_ids : int, optional
        Ids that get learned pointers, the most frequent ones (without frequencies, ids at even distances); the others
        stay hashed. By default all, and with a budget of bytes as many as ``pointer_share`` of it pays.
    pointer_share : float
        Most of a budget of bytes that goes to pointers.
    bits : {32, 16, 8}
        Bits of a stored value; 16 is float16, 8 an integer with a scale for each column and table. Training goes on
        in float32 and sees the rounded values.
    weighted : bool
        k-means weighs ids by their frequencies.
    cluster_epochs : sequence of float, optional
        Epochs, or parts of them, after which to cluster; by default after each of the first two thirds, and in
        trainings of one epoch after 1/4 and 1/2 of it.
    iterations, samples_per_cluster : int
        Of k-means: rounds, and ids that it learns from for each cluster; all ids are then assigned.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        A setting out of range, or a budget below two vectors a column.

    Notes
    -----
    The published code hashes anew inside the loop over batches of ids, divides by the sizes of empty clusters, and
    keeps 64 bits a pointer. Here all pointers are found with the old tables before anything changes, and packed.

    References
    ----------
    H. Tsang, T. Ahle, "Clustering the sketch: dynamic compression for embedding tables", 2023.

    Examples
    --------
    >>> import torch
    >>> module = CCEEmbedding(1000, 16, num_rows=32, random_state=0)
    >>> module.inference_nbytes()
    4112
    >>> module.cluster()
    >>> module(torch.tensor([3, 1])).shape, module.pointers.shape, module.inference_nbytes()
    (torch.Size([2, 16]), torch.Size([1000, 3]), 7112)
    """

    name: ClassVar[str] = "cce"
    about: ClassVar[str] = "columns of shared vectors, pointers learned by clustering (Tsang and Ahle 2023)"
    per_id_state: ClassVar[bool] = True

    pointers: Tensor
    """Learned pointers, packed: uint8 of shape (ids that have some, bytes); empty before the first clustering."""
    table_seeds: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_columns: int | None = None,
        num_rows: int | None = None,
        hot_ids: int | None = None,
        pointer_share: float = 0.5,
        bits: int = 32,
        weighted: bool = False,
        cluster_epochs: Sequence[float] | None = None,
        iterations: int = 50,
        samples_per_cluster: int = 256,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if num_columns is None:
            num_columns = max(c for c in range(1, 5) if self.embedding_dim % c == 0)
        if num_columns < 1 or self.embedding_dim % num_columns:
            raise ValueError(f"num_columns must divide embedding_dim={self.embedding_dim}, got {num_columns}")
        if bits not in (32, 16, 8):
            raise ValueError(f"bits must be 32, 16 or 8, got {bits}")
        if weighted and self._frequencies is None:
            raise ValueError("weighted=True needs frequencies")
        if not 0 <= pointer_share <= 1:
            raise ValueError(f"pointer_share must be from 0 to 1, got {pointer_share}")
        counts = {
            "num_rows": (num_rows, 1),
            "hot_ids": (hot_ids, 0),
            "iterations": (iterations, 1),
            "samples_per_cluster": (samples_per_cluster, 1),
        }
        for what, (value, least) in counts.items():
            if value is not None and value < least:
                raise ValueError(f"{what} must be at least {least}, got {value}")
        self.iterations, self.samples_per_cluster = iterations, samples_per_cluster
        self.num_columns, self.bits, self.cluster_epochs = int(num_columns), bits, cluster_epochs
        self.num_rows, hot = self._sizes(num_rows, hot_ids, pointer_share)
        self.weighted = weighted
        values = self.uniform(2, self.num_rows * self._row_floats, bound=(2 * self.embedding_dim) ** -0.5)
        self.weight = nn.Parameter(self._as_tables(values).to(device))
        self.register_buffer("table_seeds", self.seeds(2).to(device))
        self.register_buffer("pointers", torch.empty(0, dtype=torch.uint8, device=device))
        self.hot = None if hot == self.num_embeddings else HotIds(self._hottest(hot), self.num_embeddings).to(device)

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _cost(self, num_rows: int, hot: int) -> Size:
        """Of that many rows a table, with pointers for that many ids."""
        n = self.num_embeddings
        floats = 2 * num_rows * self._row_floats
        nbytes = floats * self.bits // 8 + 2 * _SEED_BYTES
        if self.bits == 8:
            nbytes += 2 * self._num_scales * FLOAT_BYTES
        if num_rows < self._most_rows:
            nbytes += hot * self._pointer_nbytes(num_rows)
        return Size(floats, nbytes + (HotIds.nbytes(hot, n) if hot < n else 0))

    def _pointer_nbytes(self, num_rows: int) -> int:
        return -(-self.num_columns * _width(self._num_places(num_rows)) // 8)

    def _sizes(self, num_rows: int | None, hot: int | None, share: float) -> tuple[int, int]:
        """Rows of a table, and ids with pointers."""
        n, budget, least, most = self.num_embeddings, self.budget, self._least_rows, self._most_rows
        hot = None if hot is None else min(hot, n)
        num_rows = None if num_rows is None else min(num_rows, most)
        if budget is None:
            return num_rows or max(-(-most // 20), least), n if hot is None else hot
        if num_rows is not None:
            if not budget.allows(self._cost(num_rows, hot or 0)):
                raise budget.unreachable(self._cost(num_rows, hot or 0), f"{self.name} of that size")
            if hot is None:
                hot = n if budget.allows(self._cost(num_rows, n)) else self._affordable_hot(num_rows)
            return num_rows, hot
        if hot is None and budget.allows(self._cost(most, n)):
            return most, n
        if hot is not None or budget.unit == "floats":
            ids = n if hot is None else hot
            return budget.largest(lambda rows: self._cost(rows, ids), least, most, self.name), ids
        for_tables = budget._replace(limit=budget.limit - int(share * budget.limit))
        if for_tables.allows(self._cost(least, 0)):
            num_rows = for_tables.largest(lambda rows: self._cost(rows, 0), least, most, self.name)
        else:
            num_rows = budget.largest(lambda rows: self._cost(rows, 0), least, least, self.name)
        if budget.allows(self._cost(num_rows, n)):
            return budget.largest(lambda rows: self._cost(rows, n), num_rows, most - 1, self.name), n
        return num_rows, self._affordable_hot(num_rows)

    def _affordable_hot(self, num_rows: int) -> int:
        assert self.budget is not None
        return self.budget.largest(lambda hot: self._cost(num_rows, hot), 0, self.num_embeddings - 1, self.name)

    def _hottest(self, hot: int) -> Tensor:
        return most_frequent(self._frequencies, self.num_embeddings, hot)

    # -- what another shape of the tables changes ---------------------------------------------------------------------

    @property
    def _inner_dim(self) -> int:
        """Values of the columns together."""
        return self.embedding_dim

    @property
    def _row_floats(self) -> int:
        """Floats that one more row takes in a table."""
        return self._inner_dim

    @property
    def _num_scales(self) -> int:
        """Scales of a table, where values are integers."""
        return self.num_columns

    @property
    def _least_rows(self) -> int:
        return 1

    @property
    def _most_rows(self) -> int:
        """Where each id has vectors of its own."""
        return self.num_embeddings

    def _num_places(self, num_rows: int) -> int:
        """Values of a pointer."""
        return num_rows

    def _as_tables(self, values: Tensor) -> Tensor:
        """The weight out of the values of the two tables, of shape (2, values)."""
        return values.reshape(2, self.num_columns, self.num_rows, -1)

    def _own_places(self, ids: Tensor) -> Tensor:
        """Pointers where each id has vectors of its own."""
        return ids[:, None].expand(-1, self.num_columns)

    def _pieces(self, weight: Tensor, table: int, places: Tensor) -> Tensor:
        """Vectors at places of shape (n, num_columns): (n * num_columns, width)."""
        starts = (torch.arange(self.num_columns, device=places.device) + table * self.num_columns) * self.num_rows
        # index_select: its gradient is many times faster than that of an embedding with short rows.
        return weight.flatten(0, 2).index_select(0, (places + starts).reshape(-1))

    def _term(self, table: int, column: int, array: Tensor, place: dict[str, Any], scale: Scalar | None) -> Term:
        width = self._inner_dim // self.num_columns
        return Term(array, place, column * width, width, offset=column * self.num_rows * width, weight=scale)

    # -- rows -------------------------------------------------------------------------------------------------------

    @property
    def _whole(self) -> bool:
        """A vector for each id: ids are pointers themselves."""
        return self.num_rows == self._most_rows

    @property
    def _bits_of_pointers(self) -> int:
        return _width(self._num_places(self.num_rows))

    def _hashes(self, ids: Tensor, table: int) -> Tensor:
        seeds = derived_seeds(self.table_seeds[table], self.num_columns)
        return hash_ids(ids[:, None], seeds, self._num_places(self.num_rows))

    def pointers_of(self, ids: Tensor) -> Tensor:
        """The vector of ``weight[0]`` that each id points to in each column.

        Parameters
        ----------
        ids : int64 tensor of shape (n,)

        Returns
        -------
        int64 tensor of shape (n, num_columns)
        """
        if self._whole:
            return self._own_places(ids)
        if not len(self.pointers):
            return self._hashes(ids, 0)
        if self.hot is None:
            return unpack_bits(self.pointers[ids], self._bits_of_pointers, self.num_columns)
        found, places = self.hot.find(ids)
        learned = unpack_bits(self.pointers[places], self._bits_of_pointers, self.num_columns)
        return learned.where(found[:, None], self._hashes(ids, 0))

    def _scales(self) -> Tensor:
        top = self.weight.detach().abs().amax((2, 3), keepdim=True)
        return top.clamp(min=torch.finfo(torch.float32).tiny) / 127

    def _levels(self) -> Tensor:
        return (self.weight.detach() / self._scales()).round()

    def stored_weight(self) -> Tensor:
        """The weight as its stored bits give it, of shape (2, num_columns, num_rows, embedding_dim / num_columns)."""
        if self.bits == 32:
            return self.weight
        values = self.weight.detach()
        rounded = values.half().to(values) if self.bits == 16 else self._levels() * self._scales()
        return rounded + (self.weight - values)  # gradients pass the rounding

    def _parts(self, ids: Tensor) -> Tensor:
        """Vectors of the columns: (n, num_columns, width)."""
        weight = self.stored_weight()
        parts = self._pieces(weight, 0, self.pointers_of(ids)) + self._pieces(weight, 1, self._hashes(ids, 1))
        return parts.reshape(len(ids), self.num_columns, self._inner_dim // self.num_columns)

    def rows(self, ids: Tensor) -> Tensor:
        """Columns of the ids, one after another."""
        return self._parts(ids).flatten(1)

    def inference_tensors(self) -> Iterable[Tensor]:
        """The weight in its stored bits, seeds, and pointers with the ids that have them."""
        if self.bits == 32:
            yield self.weight
        elif self.bits == 16:
            yield self.weight.detach().half()
        else:
            yield self._scales().float()
            yield self._levels().to(torch.int8)
        yield from self.buffers()

    def to_table(self) -> vqrs.Table:
        """A table of both weights in their stored bits, the seeds, and the packed pointers with the ids they are of."""
        return as_table(self, self._as_part())

    def _as_part(self) -> Part:
        n, columns, places = self.num_embeddings, self.num_columns, self._num_places(self.num_rows)
        hashes = [[hashed(seed, places) for seed in derived_seeds(own, columns)] for own in self.table_seeds]
        second = self._terms(1, hashes[1])
        if self._whole or not len(self.pointers):
            first = self._terms(0, [digit(n)] * columns if self._whole else hashes[0])
            return hashed_part(self._inner_dim, [*first, *second], rows=n)
        learned = self._terms(0, [stored(column, places) for column in range(columns)])
        part = hashed_part(self._inner_dim, learned, codes=self.pointers.cpu().numpy(), bits=self._bits_of_pointers)
        if self.hot is not None:
            others = hashed_part(self._inner_dim, self._terms(0, hashes[0]), rows=n)
            once = {f"otherwise.{name}": f"cases.0.decoder.{name}" for name in part.tensors}
            part = switch_part(n, [(self._learned_ids().cpu().numpy(), part)], others, once)
        return join_part([part, hashed_part(self._inner_dim, second, rows=n)])

    def _terms(self, table: int, places: Sequence[dict[str, Any]]) -> list[Term]:
        """The columns of a table, each at its place."""
        array, scales = self.weight.detach()[table], self._scales()[table].float().flatten()
        if self.bits < 32:
            array = array.half() if self.bits == 16 else self._levels()[table].to(torch.int8)
        terms = []
        for column, place in enumerate(places):
            # The scale of all rows, at the place of the piece: a part may not read codes and numbers of rows.
            scale = Scalar(scales, place, 0, column % len(scales)) if self.bits == 8 else None
            terms.append(self._term(table, column, array, place, scale))
        return terms

    # -- clustering -------------------------------------------------------------------------------------------------

    def on_step(self, training: Training) -> None:
        """Cluster where the schedule says so: in the step after an epoch, so that the epoch is judged by its own."""
        done = training.step - 1
        if done and done in {round(epoch * training.steps_per_epoch) for epoch in self._schedule(training.epochs)}:
            self.cluster(training.optimizer)

    def _schedule(self, epochs: int) -> Sequence[float]:
        if self.cluster_epochs is not None:
            return self.cluster_epochs
        return range(1, 2 * epochs // 3 + 1) if epochs > 1 else (1 / 4, 1 / 2)

    @torch.no_grad()
    def cluster(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Point each id to the cluster of its present vector, in every column; start the hashed part anew.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer, optional
            Forgets what it has gathered for the weight.

        Warns
        -----
        UserWarning
            Pointers have collapsed: see :meth:`health`.
        """
        if self._whole or (self.hot is not None and not self._num_learned):
            return
        centers = self._centers()
        pointers = torch.cat([self._nearest(block, centers) for block in self._learned_ids().split(_BLOCK)])
        # All pointers are found: only now may tables and hashes change.
        self.pointers = pointers.to(self.pointers.device)
        self.weight[0] = torch.from_numpy(centers).to(self.weight)
        self.weight[1] = 0
        self.table_seeds[1] = self.seeds().to(self.table_seeds)
        if optimizer is not None:
            reset_optimizer_state(optimizer, [self.weight])
        if collapse := self._collapse():
            warnings.warn(f"the pointers of {self.name} have collapsed: {collapse}", UserWarning, stacklevel=2)

    @property
    def _num_learned(self) -> int:
        return self.num_embeddings if self.hot is None else self.hot.count

    def _learned_ids(self) -> Tensor:
        """Ids that get learned pointers, in the order of their places."""
        if self.hot is None:
            return torch.arange(self.num_embeddings, device=self.weight.device)
        return self.hot.all()

    def _centers(self) -> NDArray[np.float32]:
        """k-means of each column: the new ``weight[0]``."""
        ids, weights = self._sample(self.samples_per_cluster * self.num_rows)
        columns = self._columns(ids)
        starts: list[Any] = [None] * self.num_columns
        if self.hot is not None:
            # Hashed ids keep their places: clusters start from the vectors that stand there.
            first, second = self.stored_weight().float().cpu().numpy()
            starts = list(first + second.mean(1, keepdims=True))
        seeds = torch.randint(2**62, (self.num_columns,), generator=self._generator).tolist()
        groups = zip(columns, starts, seeds, strict=True)
        return np.stack([self._kmeans(column, start, weights, seed) for column, start, seed in groups])

    def _kmeans(
        self, x: NDArray[np.float32], start: Any, weights: NDArray[np.float64] | None, seed: int
    ) -> NDArray[np.float32]:
        work, rows = len(x) * self.num_rows, self.num_rows
        if start is None and len(x) < 4 * rows:
            distinct = np.unique(x, axis=0)
            if len(distinct) <= rows:
                return distinct[np.arange(rows) % len(distinct)]
        if start is None:
            # Seeding far apart takes a pass an own cluster: much longer than all rounds, where there are thousands.
            start = "k-means++" if work <= _SEEDED_WORK else "random"
        found = _core.kmeans_fit(
            x, rows, init=start, sample_weight=weights, max_iter=self.iterations, seed=seed, n_jobs=self._jobs(len(x))
        )
        return found[0]

    def _jobs(self, n: int) -> int | None:
        """Threads of a k-means: in small ones they cost more than they bring."""
        return 1 if n * self.num_rows <= _ONE_THREAD_WORK else None

    def _sample(self, size: int) -> tuple[Tensor, NDArray[np.float64] | None]:
        """Ids that k-means learns from, and their weights."""
        # Of fewer hot ids than clusters nothing can be learned: then all ids are asked.
        pool = self._learned_ids() if self._num_learned >= self.num_rows else None
        count = self.num_embeddings if pool is None else len(pool)
        size = min(count, size)
        if count < 8 * size:
            sample = torch.randperm(count, generator=self._generator)[:size]
        else:
            sample = torch.randint(count, (size,), generator=self._generator)
        ids = sample.to(self.weight.device) if pool is None else pool[sample.to(pool.device)]
        # Ids that were never seen count little, not nothing: k-means wants a weight somewhere.
        seen = self._frequencies if self.weighted else None
        return ids, None if seen is None else seen[ids.cpu().numpy()] + _UNSEEN

    def _columns(self, ids: Tensor) -> NDArray[np.float32]:
        """Present vectors: (num_columns, n, width)."""
        return self._parts(ids).float().transpose(0, 1).contiguous().cpu().numpy()

    def _nearest(self, ids: Tensor, centers: NDArray[np.float32]) -> Tensor:
        """Packed numbers of the nearest centres."""
        pairs = zip(self._columns(ids), centers, strict=True)
        labels = np.stack(
            [_core.kmeans_predict(column, of, "euclidean", self._jobs(len(ids)))[0] for column, of in pairs], axis=1
        )
        return pack_rows(torch.from_numpy(labels).long(), self._bits_of_pointers)

    def health(self) -> dict[str, float]:
        """Whether pointers tell ids apart.

        Returns
        -------
        dict
            ``column_entropy``: least entropy of a column's pointers, in bits, at most log2(num_rows);
            ``pair_entropy``: least entropy of two neighbouring columns' pointers together. Where it is no more than
            ``column_entropy``, both columns say the same. Both are of at most 65,536 ids.

        Examples
        --------
        >>> health = CCEEmbedding(1000, 16, num_rows=16, random_state=0).health()
        >>> round(health["column_entropy"], 1), round(health["pair_entropy"], 1)
        (4.0, 7.8)
        """
        columns, pairs, _ = self._entropies()
        return {"column_entropy": min(columns), "pair_entropy": min(pairs) if pairs else min(columns)}

    def _entropies(self) -> tuple[list[float], list[float], int]:
        ids = torch.arange(0, self.num_embeddings, -(-self.num_embeddings // _BLOCK), device=self.weight.device)
        pointers = self.pointers_of(ids).cpu()
        columns = [_entropy(column) for column in pointers.T]
        pairs = [
            _entropy(pointers[:, j - 1] * self._num_places(self.num_rows) + pointers[:, j])
            for j in range(1, self.num_columns)
        ]
        return columns, pairs, len(ids)

    def _collapse(self) -> str:
        """What is wrong with the pointers, if anything is."""
        columns, pairs, n = self._entropies()
        possible = math.log2(min(n, self._num_places(self.num_rows)))
        if min(columns) < possible / 4:
            return f"those of a column have an entropy of {min(columns):.2f} bits, {possible:.2f} are possible"
        for j, pair in enumerate(pairs):
            most = max(columns[j], columns[j + 1])
            possible = min(math.log2(n), columns[j] + columns[j + 1])
            if possible > most + 1 and pair - most < (possible - most) / 10:
                return f"columns {j} and {j + 1} say the same: {pair:.2f} bits together, {most:.2f} the one alone"
        return ""


def _width(num_rows: int) -> int:
    """Bits of a pointer."""
    return max(1, (num_rows - 1).bit_length())


def _entropy(values: Tensor) -> float:
    counts = torch.unique(values, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float((shares * -shares.log2()).sum())
