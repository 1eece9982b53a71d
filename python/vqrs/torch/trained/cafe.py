"""CAFE: rows of their own for ids that matter, found during training by a sketch (Zhang et al. 2024)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding, Training
from vqrs.torch.trained.export import Term, as_table, digit, hashed, hashed_part, rows_part, switch_part
from vqrs.torch.trained.hashing import derived_seeds, hash_ids

if TYPE_CHECKING:
    import vqrs

_SEED_BYTES = 8
_SLOTS = 4
_MOST_IDS = 2**31
_BUCKET_BYTES = _SLOTS * (4 + 4 + 4)
"""A slot has a key, a score and a place."""
_SHARES = ((2, 0.7), (10, 0.5), (100, 0.3), (1000, 0.2), (10_000, 0.1))
"""Ratio, and the share of memory for hashed rows."""
_THRESHOLDS = ((2, 10.0), (10_000, 500.0))
_FULL_AT = 10
"""Scores decay when their sum is more than this times the threshold times the buckets."""


class CafeEmbedding(TrainedEmbedding):
    """Ids share hashed rows until they prove important; then they get a row of their own.

    How important an id is says the norm of the gradient at its lookups (their mean in a batch is 1), added up in a
    sketch: buckets of four slots, where a new id takes over the smallest score of its bucket, with its place, unless
    that id has a row (SpaceSaving). An id whose score reaches the threshold gets a free row, which begins as a copy of
    its hashed one. When scores are many they decay, and ids that fall below the threshold give their rows back.

    A budget counts the whole sketch: 48 bytes a bucket. One of full size is the full table, without a sketch.

    Parameters
    ----------
    num_hashed : int, optional
        Rows that ids share. By default ``hash_share`` of the budget, or of a tenth of the table without one.
    num_hot : int, optional
        Rows for one id each, and buckets of the sketch; by default what the rest of the budget pays.
    hash_share : float, optional
        Share of the budget for hashed rows; the paper's own from 0.7 at a ratio of 2 to 0.1 at 10,000.
    threshold : float, optional
        Score of an id that gets a row; the paper's own from 10 at a ratio of 2 to 500 at 10,000.
    decay : float
        What scores are multiplied with when they are many.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        A setting out of range, or a budget below one row.

    References
    ----------
    H. Zhang et al., "CAFE: towards compact, adaptive, and fast embedding for large-scale recommendation models", 2024.
    A. Metwally et al., "Efficient computation of frequent and top-k elements in data streams", 2005 (SpaceSaving).

    Examples
    --------
    >>> import torch
    >>> module = CafeEmbedding(1000, 16, ratio=20, random_state=0)
    >>> module.hashed.shape, module.hot.shape, module.keys.shape, module.inference_nbytes()
    (torch.Size([21, 16]), torch.Size([16, 16]), torch.Size([16, 4]), 3144)
    """

    name: ClassVar[str] = "cafe"
    about: ClassVar[str] = "own rows for ids with large gradients, hashed ones for the rest (Zhang et al. 2024)"

    keys: Tensor
    """Ids in the sketch, int32 of shape (buckets, 4); -1 is none."""
    scores: Tensor
    places: Tensor
    """Rows of the ids in the sketch, -1 is none."""
    seed: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_hashed: int | None = None,
        num_hot: int | None = None,
        hash_share: float | None = None,
        threshold: float | None = None,
        decay: float = 0.98,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if self.num_embeddings > _MOST_IDS:
            raise ValueError(f"cafe keeps ids in 32 bits, for at most {_MOST_IDS} rows, got {self.num_embeddings}")
        for what, value, least in (("num_hashed", num_hashed, 1), ("num_hot", num_hot, 0)):
            if value is not None and value < least:
                raise ValueError(f"{what} must be at least {least}, got {value}")
        if hash_share is not None and not 0 <= hash_share <= 1:
            raise ValueError(f"hash_share must be from 0 to 1, got {hash_share}")
        if threshold is not None and not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        if not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        ratio = self._ratio()
        self.threshold = _between(_THRESHOLDS, ratio) if threshold is None else threshold
        self.decay = decay
        share = _between(_SHARES, ratio) if hash_share is None else hash_share
        num_hashed, num_hot = self._sizes(num_hashed, num_hot, share)
        self.hashed = nn.Parameter(self.uniform(num_hashed, self.embedding_dim).to(device))
        self.hot = nn.Parameter(torch.zeros(num_hot, self.embedding_dim, device=device))
        self.register_buffer("seed", self.seeds().to(device))
        self.register_buffer("keys", torch.full((num_hot, _SLOTS), -1, dtype=torch.int32, device=device))
        self.register_buffer("scores", torch.zeros(num_hot, _SLOTS, device=device))
        self.register_buffer("places", torch.full((num_hot, _SLOTS), -1, dtype=torch.int32, device=device))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def _ratio(self) -> float:
        if self.budget is None:
            return 10.0
        full = {"nbytes": self.full_nbytes, "floats": self.full_nbytes // FLOAT_BYTES}[self.budget.unit]
        return full / max(self.budget.limit, 1)

    def _cost(self, num_hashed: int, num_hot: int) -> Size:
        floats = (num_hashed + num_hot) * self.embedding_dim
        return Size(floats, FLOAT_BYTES * floats + _BUCKET_BYTES * num_hot + _SEED_BYTES)

    def _sizes(self, num_hashed: int | None, num_hot: int | None, share: float) -> tuple[int, int]:
        """Rows that ids share, and rows for one id each."""
        n, budget = self.num_embeddings, self.budget
        if budget is None:
            rows = -(-n // 10)
            hashed = max(1, round(share * rows)) if num_hashed is None else min(num_hashed, n)
            return hashed, max(rows - hashed, 0) if num_hot is None else min(num_hot, n)
        if num_hashed is None and num_hot is None and budget.allows(self._cost(n, 0)):
            return n, 0
        if num_hashed is None:
            hot = min(num_hot or 0, n)
            part = budget if num_hot is not None else budget._replace(limit=int(share * budget.limit))
            if num_hot is None and not part.allows(self._cost(1, 0)):
                part, most = budget, 1
            else:
                most = n
            num_hashed = part.largest(lambda rows: self._cost(rows, hot), 1, most, self.name)
        hashed = min(num_hashed, n)
        if num_hot is None:
            return hashed, budget.largest(lambda rows: self._cost(hashed, rows), 0, n, self.name)
        if not budget.allows(self._cost(hashed, min(num_hot, n))):
            raise budget.unreachable(self._cost(hashed, min(num_hot, n)), f"{self.name} of that size")
        return hashed, min(num_hot, n)

    # -- rows -------------------------------------------------------------------------------------------------------

    def _hashes(self, ids: Tensor) -> Tensor:
        if len(self.hashed) == self.num_embeddings:
            return ids
        return hash_ids(ids, derived_seeds(self.seed, 2)[0], len(self.hashed))

    def _buckets(self, ids: Tensor) -> Tensor:
        return hash_ids(ids, derived_seeds(self.seed, 2)[1], len(self.keys))

    def hot_places(self, ids: Tensor) -> Tensor:
        """The row that each id has of its own, -1 if none: int64 of the shape of ``ids``, (n,)."""
        buckets = self._buckets(ids)
        # A key stands once in its bucket: the others of the four count nothing.
        return ((self.places[buckets] + 1) * (self.keys[buckets] == ids[:, None])).sum(1) - 1

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of their own, or hashed ones."""
        found = self.hashed.index_select(0, self._hashes(ids))
        if len(self.hot):
            places = self.hot_places(ids)
            found = torch.where(places[:, None] >= 0, self.hot.index_select(0, places.clamp(min=0)), found)
            if self.training and found.requires_grad:
                found.register_hook(lambda gradient: self._see(ids, gradient))
        return found

    def _see(self, ids: Tensor, gradient: Tensor) -> None:
        # Rows may not move in the middle of a backward pass: the sketch waits for the end of the step.
        self._seen.append((ids, gradient.detach().norm(dim=1)))

    # -- the sketch -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        """Add the gradients of the step to the sketch; give rows to ids, and take them back."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        ids, norms = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
        mean = norms.mean()
        if mean > 0:
            self.insert(ids, norms / mean)
            self._promote(training.optimizer)
            self._decay()

    @torch.no_grad()
    def insert(self, ids: Tensor, scores: Tensor) -> None:
        """Add scores to the sketch.

        Of the ids of a call that are new in a bucket, those with the four largest scores enter, the smallest first, as
        if each had come alone; the scores of the others stay behind in the smallest slot, as SpaceSaving leaves them.

        Parameters
        ----------
        ids : int64 tensor of shape (n,)
        scores : float32 tensor of shape (n,)
            Positive.
        """
        ids, inverse = torch.unique(ids, return_inverse=True)
        scores = torch.zeros(len(ids), device=ids.device).index_add_(0, inverse, scores.float())
        buckets = self._buckets(ids)
        match = self.keys[buckets] == ids[:, None]
        held = match.any(1)
        self.scores[buckets[held], match[held].int().argmax(1)] += scores[held]
        ids, scores, buckets = ids[~held], scores[~held], buckets[~held]
        order = scores.argsort(descending=True, stable=True)
        order = order[buckets[order].argsort(stable=True)]
        ids, scores, buckets = ids[order], scores[order], buckets[order]
        first = torch.searchsorted(buckets, buckets)
        rank = torch.arange(len(ids), device=ids.device) - first
        small = torch.zeros(len(self.keys), device=ids.device)
        small.index_add_(0, buckets[rank >= _SLOTS], scores[rank >= _SLOTS])
        slots, free = self._smallest(torch.arange(len(self.keys), device=ids.device))
        self.scores[torch.arange(len(slots), device=ids.device), slots] += small * free
        for turn in reversed(range(_SLOTS)):
            now = rank == turn
            slots, free = self._smallest(buckets[now])
            at = buckets[now][free], slots[free]
            self.keys[at] = ids[now][free].int()
            self.scores[at] += scores[now][free]

    def _smallest(self, buckets: Tensor) -> tuple[Tensor, Tensor]:
        """Slots with the smallest scores among those without a row, and whether there are any."""
        least, slots = self.scores[buckets].masked_fill(self.places[buckets] >= 0, math.inf).min(1)
        return slots, torch.isfinite(least)

    def _promote(self, optimizer: torch.optim.Optimizer) -> None:
        ready = ((self.places < 0) & (self.keys >= 0) & (self.scores >= self.threshold)).nonzero()
        if not len(ready):
            return
        taken = torch.zeros(len(self.hot), dtype=torch.bool, device=self.hot.device)
        taken[self.places[self.places >= 0].long()] = True
        free = (~taken).nonzero()[:, 0]
        order = self.scores[ready[:, 0], ready[:, 1]].argsort(descending=True, stable=True)
        ready, free = ready[order][: len(free)], free[: len(ready)]
        at = ready[:, 0], ready[:, 1]
        self.hot[free] = self.hashed[self._hashes(self.keys[at].long())]
        self.places[at] = free.int()
        # What the optimizer has gathered for a row is of the id that had it before.
        for value in optimizer.state.get(self.hot, {}).values():
            if isinstance(value, Tensor) and value.shape == self.hot.shape:
                value[free] = 0

    def _decay(self) -> None:
        if self.scores.sum() > _FULL_AT * len(self.scores) * self.threshold:
            self.scores *= self.decay
            self.places[self.scores < self.threshold] = -1

    def to_table(self) -> vqrs.Table:
        """A table of the hashed rows, and of those of single ids with the list of their ids."""
        n, shared = self.num_embeddings, len(self.hashed)
        place = digit(n) if shared == n else hashed(derived_seeds(self.seed, 2)[0], shared)
        others = hashed_part(self.embedding_dim, [Term(self.hashed, place)], rows=n)
        own = self.places >= 0
        if not own.any():
            return as_table(self, others)
        ids, order = self.keys[own].long().sort()
        rows = self.hot.detach()[self.places[own].long()[order]]
        return as_table(self, switch_part(n, [(ids.cpu().numpy(), rows_part(rows))], others))


def _between(known: tuple[tuple[float, float], ...], ratio: float) -> float:
    """What is known at some ratios, at another."""
    ratios, values = zip(*known, strict=True)
    return float(np.interp(math.log(max(ratio, 1e-9)), np.log(ratios), values))
