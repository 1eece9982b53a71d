"""CCE over two arrays: pointers of all columns start anywhere in one array (Tsang and Ahle 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqrs import _core
from vqrs.torch.trained.cce import CCEEmbedding
from vqrs.torch.trained.export import Scalar, Term, digit
from vqrs.torch.trained.packing import pack_rows


class CCERobeEmbedding(CCEEmbedding):
    """CCE whose tables are two arrays: a column is a piece of one array from a learned place on, plus a hashed one.

    Pieces start anywhere and overlap, in one space of pointers for all columns. :meth:`cluster` is a k-means whose
    centroids are all pieces of the array: each vector goes to the nearest piece, and each float of the array becomes
    the mean of the values that lie over it.

    Parameters
    ----------
    num_columns : int, optional
        Must divide ``embedding_dim``; 4, or the largest divisor below.
    size : int, optional
        Floats of each array; else as many as the budget allows, a 20th of the table without one.
    iterations : int
        Of k-means. Each compares all sampled vectors with all pieces.
    max_samples : int
        Vectors that k-means learns from: ids times columns.
    hot_ids, pointer_share, bits, weighted, cluster_epochs, **settings
        Those of :class:`~vqrs.torch.trained.cce.CCEEmbedding`; integers have a scale for each array.

    Raises
    ------
    ValueError
        A setting out of range, or a budget below two pieces.

    References
    ----------
    H. Tsang, T. Ahle, "Clustering the sketch: dynamic compression for embedding tables", 2023. A. Desai et al.,
    "Random offset block embedding (ROBE)", 2022.

    Examples
    --------
    >>> import torch
    >>> module = CCERobeEmbedding(1000, 16, size=100, random_state=0)
    >>> module.cluster()
    >>> module(torch.tensor([3, 1])).shape, module.pointers.shape, module.inference_nbytes()
    (torch.Size([2, 16]), torch.Size([1000, 4]), 4816)
    """

    name: ClassVar[str] = "cce-robe"
    about: ClassVar[str] = "CCE with pieces of two arrays for tables (Tsang and Ahle 2023)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        size: int | None = None,
        iterations: int = 10,
        max_samples: int = 1 << 15,
        **settings: Any,
    ) -> None:
        if "num_rows" in settings or "samples_per_cluster" in settings:
            raise TypeError("cce-robe has size and max_samples instead of num_rows and samples_per_cluster")
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        self.max_samples = max_samples
        super().__init__(num_embeddings, embedding_dim, num_rows=size, iterations=iterations, **settings)
        if self.size < self._piece:
            raise ValueError(f"size must be at least {self._piece}, the length of a piece, got {self.size}")

    # -- the shape of the tables ------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Floats of each array."""
        return self.num_rows

    @property
    def _piece(self) -> int:
        return self._inner_dim // self.num_columns

    @property
    def _row_floats(self) -> int:
        return 1

    @property
    def _num_scales(self) -> int:
        return 1

    @property
    def _least_rows(self) -> int:
        return self._piece

    @property
    def _most_rows(self) -> int:
        return self.num_embeddings * self._inner_dim

    def _num_places(self, num_rows: int) -> int:
        return num_rows - self._piece + 1  # no piece goes over the end

    def _as_tables(self, values: Tensor) -> Tensor:
        return values.reshape(2, 1, -1, 1)

    def _own_places(self, ids: Tensor) -> Tensor:
        return ids[:, None] * self._inner_dim + torch.arange(0, self._inner_dim, self._piece, device=ids.device)

    def _pieces(self, weight: Tensor, table: int, places: Tensor) -> Tensor:
        values = places.reshape(-1, 1) + torch.arange(self._piece, device=places.device)
        return weight[table].reshape(-1).index_select(0, values.reshape(-1)).reshape(values.shape)

    def _term(self, table: int, column: int, array: Tensor, place: dict[str, Any], scale: Scalar | None) -> Term:
        start, piece = column * self._piece, self._piece
        if table == 0 and self._whole:
            rows = digit(self.num_embeddings)
            return Term(array, rows, start, piece, stride=self._inner_dim, offset=start, weight=scale)
        return Term(array, place, start, piece, stride=1, weight=scale)

    # -- clustering -------------------------------------------------------------------------------------------------

    def _centers(self) -> NDArray[np.float32]:
        """k-means whose centroids overlap: the new ``weight[0]``."""
        ids, weights = self._sample(max(1, self.max_samples // self.num_columns))
        x = self._columns(ids).reshape(-1, self._piece)
        mass = np.ones(len(x)) if weights is None else np.tile(weights, self.num_columns)
        if self.hot is None:
            # Vectors of the ids themselves, one behind the other.
            order = torch.randint(len(x), (-(-self.size // self._piece),), generator=self._generator).numpy()
            if len(order) <= len(x):
                order = torch.randperm(len(x), generator=self._generator)[: len(order)].numpy()
            array = x[order].reshape(-1)[: self.size].astype(np.float64)
        else:
            # Hashed ids keep their places: clusters start from the values that stand there.
            array = self.stored_weight()[0].double().reshape(-1).cpu().numpy().copy()
        before = None
        for _ in range(self.iterations):
            labels = self._labels(x, array.astype(np.float32))
            if before is not None and np.array_equal(labels, before):
                break
            before = labels
            places = (labels[:, None] + np.arange(self._piece)).reshape(-1)
            total = np.bincount(places, (x * mass[:, None]).reshape(-1), minlength=self.size)
            count = np.bincount(places, np.repeat(mass, self._piece), minlength=self.size)
            # Floats over which nothing lies stay as they are.
            np.divide(total, count, out=array, where=count > 0)
        return array.astype(np.float32).reshape(1, -1, 1)

    def _labels(self, x: NDArray[np.float32], array: NDArray[np.float32]) -> NDArray[np.int32]:
        """The place where the nearest piece starts, for each vector."""
        windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(array, self._piece))
        return _core.kmeans_predict(x, windows, "euclidean")[0]

    def _nearest(self, ids: Tensor, centers: NDArray[np.float32]) -> Tensor:
        labels = self._labels(self._columns(ids).reshape(-1, self._piece), centers.reshape(-1))
        return pack_rows(torch.from_numpy(labels).long().reshape(self.num_columns, -1).T, self._bits_of_pointers)
