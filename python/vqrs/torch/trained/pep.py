"""PEP: Liu et al., "Learnable embedding sizes for recommender systems", 2021."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.torch.trained.base import Training
from vqrs.torch.trained.pruned import PrunedEmbedding

_EVERY = 10
_LAST_THRESHOLD = -0.1


def soft_threshold(values: Tensor, threshold: Tensor) -> Tensor:
    """Values brought nearer to 0: ``sign(w) · relu(|w| - sigmoid(s))``.

    Examples
    --------
    >>> soft_threshold(torch.tensor([2.0, -2.0, 0.3]), torch.tensor(0.0))
    tensor([ 1.5000, -1.5000,  0.0000])
    """
    return values.sign() * F.relu(values.abs() - threshold.sigmoid())


class PEPEmbedding(PrunedEmbedding):
    """Values below thresholds that are learned are zero; those that are left learn once more from where they began.

    In the first stage a value is ``sign(w) · relu(|w| - sigmoid(s))`` and s is learned. The paper gets the push towards
    sparse rows by weight decay on the negative s; here s is multiplied by the same factor each step, such that it comes
    from where it starts to near 0 within ``search_epochs``, whatever their length. The stage ends when the budget is
    reached, and where it is not, the values that are most above their thresholds are taken. The second stage trains
    those from their initial values, and the rest of the model starts anew as well.

    Parameters
    ----------
    granularity : {"feature-dimension", "dimension", "feature", "global"}
        What has a threshold of its own: each value, each column, each row, or the table.
    threshold_init : float
        Where s starts, below -0.1.
    search_epochs : float
        Most epochs of the first stage.
    sparsity : float, optional
        Share of the values that are 0 in the end; else as small as the budget allows, 0.9 without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than one value, or a parameter is out of its range.

    References
    ----------
    Liu et al., "Learnable embedding sizes for recommender systems", 2021.

    Examples
    --------
    >>> import torch
    >>> module = PEPEmbedding(1000, 16, ratio=10, random_state=0)
    >>> begun = module.weight.detach().clone()
    >>> module.enter_stage("retrain")
    >>> rows = module(torch.arange(1000))
    >>> bool((rows[rows != 0] == begun[rows != 0]).all()), module.trained_floats()
    (True, 2462)
    """

    name: ClassVar[str] = "pep"
    about: ClassVar[str] = "learned thresholds prune values, the others train anew (Liu et al. 2021)"
    stages: ClassVar[tuple[str, ...]] = ("search", "retrain")
    restarts: ClassVar[frozenset[str]] = frozenset({"retrain"})
    searches: ClassVar[frozenset[str]] = frozenset({"search"})

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        granularity: Literal["feature-dimension", "dimension", "feature", "global"] = "dimension",
        threshold_init: float = -15.0,
        search_epochs: float = 2,
        **settings: Any,
    ) -> None:
        shapes = {
            "feature-dimension": (num_embeddings, embedding_dim),
            "dimension": (1, embedding_dim),
            "feature": (num_embeddings, 1),
            "global": (1, 1),
        }
        if granularity not in shapes:
            raise ValueError(f"granularity must be one of {', '.join(shapes)}, got {granularity!r}")
        if not threshold_init < _LAST_THRESHOLD:
            raise ValueError(f"threshold_init must be below {_LAST_THRESHOLD}, got {threshold_init}")
        super().__init__(num_embeddings, embedding_dim, **settings)
        self.threshold_init, self.search_epochs = threshold_init, search_epochs
        device = self.weight.device
        self.threshold = nn.Parameter(torch.full(shapes[granularity], threshold_init, device=device))

    def _initial_weight(self) -> Tensor:
        # The initial weights are drawn twice rather than kept.
        self.register_buffer("initial_seed", self.seeds())
        return self._drawn()

    def _drawn(self) -> Tensor:
        generator = torch.Generator().manual_seed(int(self.initial_seed))
        return (torch.rand(self.num_embeddings, self.embedding_dim, generator=generator) * 2 - 1) * (
            self.embedding_dim**-0.5
        )

    def _thresholds(self, ids: Tensor | None) -> Tensor:
        return self.threshold if ids is None or len(self.threshold) == 1 else F.embedding(ids, self.threshold)

    def _values(self, ids: Tensor | None = None) -> Tensor:
        return soft_threshold(super()._values(ids), self._thresholds(ids))

    def _scores(self, ids: Tensor | None = None) -> Tensor:
        return super()._values(ids).abs() - self._thresholds(ids).sigmoid()

    def _values_to_train(self) -> Tensor:
        return self._drawn().to(self.weight)

    def _forget(self) -> None:
        self.threshold = nn.Parameter(self.threshold.new_empty(0), requires_grad=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Thresholds have no weight decay but their own."""
        groups: list[dict[str, Any]] = [{"params": [self.weight]}]
        return groups if self.pruned else [*groups, {"params": [self.threshold], "weight_decay": 0.0}]

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        """Raise the thresholds, and end the search where enough values are below them."""
        if self.pruned or self.finished:
            return
        steps = self._search_steps(training, self.search_epochs)
        self.threshold.mul_(math.exp(math.log(_LAST_THRESHOLD / self.threshold_init) / steps))
        last = training.step >= steps
        reached = training.step % _EVERY == 0 and int((self._scores() > 0).sum()) <= self.kept
        self.finished = last or reached
