"""DeepLight: Deng et al., "DeepLight: deep lightweight feature interactions for accelerating CTR predictions in ad
serving", 2021.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from vqrs.torch.trained.base import Training
from vqrs.torch.trained.pruned import PrunedEmbedding, above, find_cut

_EVERY = 10
_NEAR = 1e-3


def sparsity_at(step: float, sparsity: float) -> float:
    """Sparsity after so many steps of pruning: ``sparsity · (1 - 0.99^(step / 100))``.

    Examples
    --------
    >>> [round(sparsity_at(step, 0.9), 3) for step in (0, 100, 10_000)]
    [0.0, 0.009, 0.571]
    """
    return sparsity * (1 - 0.99 ** (step / 100))


class DeepLightEmbedding(PrunedEmbedding):
    """The smallest values become zero, more of them every ten steps; what grows again may live.

    After a warm-up the sparsity rises as ``S (1 - 0.99^(t/100))`` until it is within 0.001 of S. The paper's schedule
    takes about 69,000 steps; here t runs faster where ``prune_epochs`` have fewer. Then exactly the budget's number of
    values is kept, and those are trained alone, which the paper does not need as it trains on for much longer.

    Parameters
    ----------
    warmup_epochs : float
        Epochs before pruning begins, at most a quarter of the stage.
    prune_epochs : float
        Epochs in which the sparsity rises.
    sparsity : float, optional
        S; else as small as the budget allows, 0.9 without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than one value, or ``sparsity`` is not from 0 to 1 or needs more than the budget.

    References
    ----------
    Deng et al., "DeepLight: deep lightweight feature interactions for accelerating CTR predictions in ad serving",
    2021.

    Examples
    --------
    >>> import torch
    >>> module = DeepLightEmbedding(1000, 16, ratio=10, random_state=0).eval()
    >>> int((module(torch.arange(1000)) != 0).sum()) == module.kept, module.kept
    (True, 2462)
    """

    name: ClassVar[str] = "deeplight"
    about: ClassVar[str] = "the smallest values become zero step by step (Deng et al. 2021)"
    stages: ClassVar[tuple[str, ...]] = ("prune", "tune")
    searches: ClassVar[frozenset[str]] = frozenset({"prune"})

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        warmup_epochs: float = 1,
        prune_epochs: float = 2,
        **settings: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **settings)
        self.warmup_epochs, self.prune_epochs = warmup_epochs, prune_epochs

    def on_step(self, training: Training) -> None:
        """Every ten steps of the first stage: zero the smallest values."""
        if self.pruned or self.finished:
            return
        steps = self._search_steps(training, self.warmup_epochs + self.prune_epochs)
        warmup = min(round(self.warmup_epochs * training.steps_per_epoch), steps // 4)
        step, last = training.step - warmup, steps - warmup
        if step <= 0 or (step % _EVERY and step < last):
            return
        sparsity = 1 - self.kept / self._size
        needed = 100 * math.log(min(_NEAR / max(sparsity, _NEAR), 1)) / math.log(0.99)
        reached = sparsity_at(step * max(1.0, needed / last), sparsity)
        with torch.no_grad():
            kept = max(self._size - int(reached * self._size), 1)
            if kept < self._size:
                scores = self.weight.abs()
                positions = torch.arange(self._size, device=scores.device).reshape(scores.shape)
                self.weight.mul_(above(scores, positions, find_cut(scores, kept)))
        self.finished = step >= last or reached >= sparsity - _NEAR
