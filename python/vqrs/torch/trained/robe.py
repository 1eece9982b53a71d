"""Rows cut out of one array: ROBE-Z, HashedNet and weighted ROBE."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vqrs
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.export import Scalar, Term, as_table, digit, hashed, hashed_part
from vqrs.torch.trained.hashing import derived_seeds, hash_ids, hash_signs

_SEED_BYTES = 8
_MOST_PLACES = 2**31


class _OneArray(TrainedEmbedding):
    """What both have: an array of ``size`` floats out of the budget, and pieces of it at hashed places."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, size: int | None, piece: int, **settings: Any
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        self.piece, full = piece, self.num_embeddings * self.embedding_dim
        if size is None:
            size = max(piece, -(-full // 10)) if self.budget is None else self._affordable_size()
        if size < min(piece, full):
            raise ValueError(f"size must be at least {piece}, the length of a piece, got {size}")
        self.size = min(size, full)
        if not self.full and self.num_places > _MOST_PLACES:
            raise ValueError(f"hashes reach {_MOST_PLACES} places, an array of {self.size} floats has more")
        self.weight = nn.Parameter(self.uniform(self.size).to(device))
        self.register_buffer("seed", self.seeds().to(device))

    def _affordable_size(self) -> int:
        def cost(size: int) -> Size:
            return Size(size, FLOAT_BYTES * size + _SEED_BYTES)

        assert self.budget is not None
        full = self.num_embeddings * self.embedding_dim
        return self.budget.largest(cost, min(self.piece, full), full, self.name)

    @property
    def full(self) -> bool:
        """Whether the array holds all rows, one behind the other."""
        return self.size == self.num_embeddings * self.embedding_dim

    @property
    def num_places(self) -> int:
        """Places where a piece may start: none goes over the end."""
        return self.size - self.piece + 1

    def _pieces(self, starts: Tensor, length: int) -> Tensor:
        """What stands in the array from each start on: shape (*starts.shape, length)."""
        places = starts[..., None] + torch.arange(length, device=starts.device)
        # A gather of single floats: gradients of pieces that overlap add up.
        return self.weight.index_select(0, places.reshape(-1)).view(places.shape)

    def _full_rows(self, ids: Tensor) -> Tensor:
        return self.weight.view(self.num_embeddings, self.embedding_dim).index_select(0, ids)


class RobeEmbedding(_OneArray):
    """Each chunk of a row is a piece of one array that all rows share, from a hashed place on.

    Desai, Chou and Shrivastava, "Random offset block embedding (ROBE) for compressed embedding tables in deep learning
    recommendation systems", 2022 (ROBE-Z); with chunks of one value HashedNet (Chen et al., "Compressing neural
    networks with the hashing trick", 2015). Pieces start anywhere in the array and may overlap, but do not wrap around
    its end. Where the paper takes a universal hash of id and chunk, each chunk has a hash of its own: two ids that
    share one chunk share the others by chance only. An array that holds all values is the full table.

    Parameters
    ----------
    chunk_size : int, optional
        Values of a chunk, Z. The default, 8, needs an eighth of the hashes of HashedNet; smaller chunks collide more
        independently. A last chunk may be shorter.
    signs : bool
        Whether each chunk gets a random sign.
    size : int, optional
        Floats of the array; else as many as the budget allows, a tenth of the table without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The array is shorter than a chunk.

    Examples
    --------
    >>> import torch
    >>> module = RobeEmbedding(1000, 16, ratio=50, random_state=0)
    >>> module.weight.shape, module.inference_nbytes()
    (torch.Size([318]), 1280)
    """

    name: ClassVar[str] = "robe"
    about: ClassVar[str] = "chunks of rows are pieces of one array (Desai et al. 2022)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        chunk_size: int | None = None,
        signs: bool = False,
        size: int | None = None,
        **settings: Any,
    ) -> None:
        if chunk_size is None:
            chunk_size = max(1, min(8, embedding_dim))
        if chunk_size < 1 or chunk_size > max(1, embedding_dim):
            raise ValueError(f"chunk_size must be from 1 to embedding_dim, {embedding_dim}, got {chunk_size}")
        self.signs = signs
        super().__init__(num_embeddings, embedding_dim, size=size, piece=chunk_size, **settings)
        self.chunks = -(-self.embedding_dim // chunk_size)

    def rows(self, ids: Tensor) -> Tensor:
        """Chunks side by side."""
        if self.full:
            return self._full_rows(ids)
        seeds = derived_seeds(self.seed, self.chunks)
        found = self._pieces(hash_ids(ids[:, None], seeds, self.num_places), self.piece)
        if self.signs:
            found = found * hash_signs(ids[:, None], seeds)[..., None].to(found.dtype)
        return found.flatten(1)[:, : self.embedding_dim]

    def to_table(self) -> vqrs.Table:
        """A table of the array and the chunks' seeds."""
        terms = []
        for chunk, seed in enumerate(derived_seeds(self.seed, self.chunks)):
            start = chunk * self.piece
            width = min(self.piece, self.embedding_dim - start)
            if self.full:
                rows = digit(self.num_embeddings)
                terms.append(Term(self.weight, rows, start, width, stride=self.embedding_dim, offset=start))
            else:
                sign = seed if self.signs else None
                terms.append(Term(self.weight, hashed(seed, self.num_places), start, width, stride=1, sign=sign))
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))


class WeightedRobeEmbedding(_OneArray):
    """A sum of pieces of one array, each of a row's length and times an importance that is a float of the same array.

    "Weighted ROBE" of the code beside Tsang and Ahle, "Clustering the sketch: dynamic compression for embedding
    tables", 2023: ``sqrt(d / num_hashes) * sum_j a[g_j(id)] * a[h_j(id) : h_j(id) + d]``, hash embeddings whose rows
    and importances share all their memory. Pieces do not wrap around the end. An array that holds all values is the
    full table.

    Parameters
    ----------
    num_hashes : int
        Pieces that are added for each id.
    size : int, optional
        Floats of the array; else as many as the budget allows, a tenth of the table without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The array is shorter than a row.

    Examples
    --------
    >>> import torch
    >>> module = WeightedRobeEmbedding(1000, 16, ratio=50, random_state=0)
    >>> module.weight.shape, module.inference_nbytes()
    (torch.Size([318]), 1280)
    """

    name: ClassVar[str] = "weighted-robe"
    about: ClassVar[str] = "weighted pieces of one array, added (Tsang and Ahle 2023)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_hashes: int = 4,
        size: int | None = None,
        **settings: Any,
    ) -> None:
        if num_hashes < 1:
            raise ValueError(f"num_hashes must be at least 1, got {num_hashes}")
        self.num_hashes = num_hashes
        super().__init__(num_embeddings, embedding_dim, size=size, piece=embedding_dim, **settings)

    @property
    def _scale(self) -> float:
        # Importances are as small as values, 1/√d.
        return math.sqrt(self.embedding_dim / self.num_hashes)

    def rows(self, ids: Tensor) -> Tensor:
        """Weighted sums of the pieces."""
        if self.full:
            return self._full_rows(ids)
        seeds = derived_seeds(self.seed, 2 * self.num_hashes)
        pieces, importances = seeds.split(self.num_hashes)
        found = self._pieces(hash_ids(ids[:, None], pieces, self.num_places), self.embedding_dim)
        importance = self._pieces(hash_ids(ids[:, None], importances, self.size), 1)
        return (found * importance).sum(1) * self._scale

    def to_table(self) -> vqrs.Table:
        """A table of the array and the seeds."""
        if self.full:
            terms = [Term(self.weight, digit(self.num_embeddings), width=self.embedding_dim)]
        else:
            seeds = derived_seeds(self.seed, 2 * self.num_hashes)
            terms = [
                Term(
                    self.weight,
                    hashed(piece, self.num_places),
                    width=self.embedding_dim,
                    stride=1,
                    weight=Scalar(self.weight, hashed(importance, self.size)),
                )
                for piece, importance in zip(*seeds.split(self.num_hashes), strict=True)
            ]
            scale = Scalar(torch.tensor([self._scale]), digit(1))
            terms.append(Term(torch.ones(self.embedding_dim), digit(1), weight=scale, multiply=True))
        return as_table(self, hashed_part(self.embedding_dim, terms, rows=self.num_embeddings))
