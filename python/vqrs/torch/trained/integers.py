"""Embeddings whose rows are integers in training too: what lookups, updates and rounding have in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vqrs.torch.trained.base import TrainedEmbedding, Training

_BLOCK = 1 << 16
"""Rows that are made at once: the table is never held in floats."""


class IntegerEmbedding(TrainedEmbedding):
    """Rows that are held as integers, and become floats only while they are looked up.

    In training, the rows of a batch are leaves of the graph; ``on_step`` moves them by their gradients and stores them
    rounded. No parameter of theirs is in the loop's optimizer, whose first group gives the learning rate: rows have
    Adam's step by a second moment that is one float a row, as in row-wise Adagrad (Duchi et al. 2011; Mudigere et al.,
    "Software-hardware co-design for fast and scalable training of deep learning recommendation models", 2022). It
    decays in steps where a row is absent, as dense Adam's does; there is no first moment. Weight decay does not reach
    the rows.
    """

    per_id_state: ClassVar[bool] = True
    second_moment_decay: float = 0.999
    epsilon: float = 1e-8

    def _prepare(self, device: torch.device | str | None) -> None:
        """Make what updates need: a float and a step number for each row."""
        self.register_buffer("second_moment", torch.zeros(self.num_embeddings, device=device))
        self.register_buffer("last_step", torch.zeros(self.num_embeddings, dtype=torch.int32, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self._gradients: list[tuple[Tensor, Tensor]] = []

    # -- what a method writes -----------------------------------------------------------------------------------------

    def _load(self, ids: Tensor) -> Tensor:
        """Rows as floats, (n, embedding_dim)."""
        raise NotImplementedError

    def _move(self, ids: Tensor, change: Tensor, training: Training) -> None:
        """Add a change to rows of distinct ids, and store them."""
        raise NotImplementedError

    # -- what they share ----------------------------------------------------------------------------------------------

    def rows(self, ids: Tensor) -> Tensor:
        """Levels times steps; with gradients, the rows of the batch are remembered until ``on_step``."""
        if not (self.training and torch.is_grad_enabled()):
            return self._load(ids)
        found, inverse = ids.unique(return_inverse=True)
        leaf = self._load(found).requires_grad_()
        leaf.register_hook(lambda gradient: self._gradients.append((found, gradient)))
        return leaf.index_select(0, inverse)

    def enter_stage(self, stage: str) -> None:
        """Go to a stage: what the updates have gathered is forgotten, as the loop's optimizer is made anew."""
        super().enter_stage(stage)
        for state in (self.second_moment, self.last_step, self.steps):
            state.zero_()

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        """Move the rows of the batch."""
        self.steps += 1
        ids, gradient = self._gathered()
        if len(ids):
            rate = training.optimizer.param_groups[0]["lr"]
            self._move(ids, -rate * self._direction(ids, gradient), training)
            self.last_step[ids] = self.steps.int()

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Distinct ids and their gradients, summed over all backward passes since the last step."""
        gathered, self._gradients = self._gradients, []
        if not gathered:
            return self.last_step.new_empty(0), self.second_moment.new_empty(0)
        if len(gathered) == 1:
            return gathered[0]
        ids, inverse = torch.cat([ids for ids, _ in gathered]).unique(return_inverse=True)
        gradients = torch.cat([gradient for _, gradient in gathered])
        return ids, torch.zeros_like(gradients[: len(ids)]).index_add_(0, inverse, gradients)

    def _direction(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Adam's step of rows for a learning rate of 1."""
        moment = self._updated_moment(self.second_moment, ids, gradient.square().mean(1))
        return gradient / (moment.sqrt() + self.epsilon)[:, None]

    def _updated_moment(self, held: Tensor, ids: Tensor, square: Tensor) -> Tensor:
        """Take a square into the second moments of rows; returns them corrected for their start at 0."""
        decay = self.second_moment_decay
        moment = held[ids] * decay ** (self.steps - self.last_step[ids]) + (1 - decay) * square
        held[ids] = moment
        return moment / (1 - decay**self.steps)

    def _noise(self, like: Tensor) -> Tensor:
        """Uniform numbers from 0 to 1 of a tensor's shape."""
        return torch.rand(like.shape, generator=self._generator).to(like)

    def trained_floats(self) -> int:
        """Numbers that training moves: none of them is held as a float."""
        return self.num_embeddings * self.embedding_dim

    def training_nbytes(self, optimizer_slots: int = 2) -> int:
        """Bytes that training holds: integers and the state of updates, whatever the loop's optimizer is.

        Gradients, which exist for the rows of a batch alone, are not counted.
        """
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self.parameters(), *self.buffers()])


def stochastic_round(x: Tensor, noise: Tensor) -> Tensor:
    """Round up with the probability of the fraction, so that the expected value is ``x``: ``floor(x + noise)``.

    Parameters
    ----------
    x : float tensor
    noise : float tensor of its shape
        Uniform from 0 to 1.

    Returns
    -------
    float tensor

    Examples
    --------
    >>> stochastic_round(torch.tensor([0.25, 0.25, -1.5]), torch.tensor([0.7, 0.8, 0.4]))
    tensor([ 0.,  1., -2.])
    """
    return (x + noise).floor()
