"""AutoSrh: Kong et al., "AutoSrh: an embedding dimensionality search framework for tabular data prediction", 2022."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.torch.trained.base import Training
from vqrs.torch.trained.pruned import PrunedEmbedding


@torch.no_grad()
def normalised_step(parameter: Tensor, gradient: Tensor, rate: float) -> None:
    """A step of gradient descent whose largest entry is ``rate``, whatever the size of the gradient.

    Examples
    --------
    >>> weight = torch.tensor([1.0, 1.0])
    >>> normalised_step(weight, torch.tensor([-4.0, 2.0]), rate=0.1)
    >>> weight
    tensor([1.1000, 0.9500])
    """
    largest = gradient.abs().max()
    # One that has all but underflowed says nothing, and its reciprocal is infinite.
    if largest > torch.finfo(gradient.dtype).tiny:
        parameter.sub_(gradient * (rate / largest))


class AutoSrhEmbedding(PrunedEmbedding):
    """Ids of like frequency share a weight between 0 and 1 for each column; what is smallest after weighting is zero.

    In the first stage a row is ``weight[i] * alpha[group of i]``. After each step of the optimizer α descends the loss
    of a validation batch, plus an L1 term: by its gradient divided by its largest entry, times ``alpha_rate`` (or more,
    so that the length of the stage suffices to bring an entry from 1 to 0). Then the largest ``|alpha * weight|`` are
    kept and trained further, with α multiplied into them for good.

    Parameters
    ----------
    num_groups : int
        Groups of as many ids each, by frequency; without ``frequencies`` all ids are one group.
    alpha_rate : float
    l1 : float
        Weight of the sum of α in its loss.
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
    Kong et al., "AutoSrh: an embedding dimensionality search framework for tabular data prediction", 2022.

    Examples
    --------
    >>> import torch
    >>> module = AutoSrhEmbedding(1000, 16, ratio=10, frequencies=range(1000), random_state=0)
    >>> module.alpha.shape, module.group[[0, 999]].tolist()
    (torch.Size([6, 16]), [5, 0])
    >>> module.enter_stage("retrain")
    >>> module.trained_floats(), module.inference_nbytes()
    (2462, 6400)
    """

    name: ClassVar[str] = "autosrh"
    about: ClassVar[str] = "columns weighted by frequency group decide what is pruned (Kong et al. 2022)"
    stages: ClassVar[tuple[str, ...]] = ("search", "retrain")
    searches: ClassVar[frozenset[str]] = frozenset({"search"})
    group: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_groups: int = 6,
        alpha_rate: float = 1e-3,
        l1: float = 1e-5,
        search_epochs: float = 2,
        **settings: Any,
    ) -> None:
        if not 1 <= num_groups <= 256:
            raise ValueError(f"num_groups must be from 1 to 256, got {num_groups}")
        super().__init__(num_embeddings, embedding_dim, **settings)
        self.alpha_rate, self.l1, self.search_epochs = alpha_rate, l1, search_epochs
        group = np.zeros(num_embeddings, np.uint8)
        if self._frequencies is None:
            num_groups = 1
        else:
            order = np.argsort(-self._frequencies, kind="stable")
            group[order] = np.arange(num_embeddings) * num_groups // num_embeddings
        self._selecting = False
        device = self.weight.device
        self.register_buffer("group", torch.from_numpy(group).to(device))
        self.alpha = nn.Parameter(torch.ones(num_groups, embedding_dim, device=device))

    def _values(self, ids: Tensor | None = None) -> Tensor:
        group = self.group if ids is None else self.group[ids]
        # α learns from validation batches alone.
        alpha = self.alpha if self._selecting else self.alpha.detach()
        return super()._values(ids) * F.embedding(group.long(), alpha)

    def _forget(self) -> None:
        self.alpha = nn.Parameter(self.alpha.new_empty(0), requires_grad=False)
        self.group = self.group[:0]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weight; α moves in :meth:`on_step` alone."""
        return [{"params": [self.weight]}]

    def on_step(self, training: Training) -> None:
        """A step of α on a validation batch."""
        if self.pruned or self.finished:
            return
        steps = self._search_steps(training, self.search_epochs)
        self._selecting = True
        try:
            loss = training.validation_loss() + self.l1 * self.alpha.sum()
        finally:
            self._selecting = False
        (gradient,) = torch.autograd.grad(loss, self.alpha)
        normalised_step(self.alpha, gradient, max(self.alpha_rate, 1 / steps))
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
        self.finished = training.step >= steps
