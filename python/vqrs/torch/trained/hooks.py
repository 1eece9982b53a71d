"""Trained embeddings in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqrs.torch.trained.base import TrainedEmbedding

Loss = Callable[[], Tensor]


class TrainingHooks:
    """Drives the trained embeddings of a model from any training loop: three calls do.

    Embeddings that cluster, prune or round while they train need to be told of steps and epochs. Methods with several
    stages (a search, then a training) begin in the first one; ``enter_stage`` goes on, and the loop then makes a new
    optimizer and new hooks.

    Parameters
    ----------
    model : Module
        Its trained embeddings are found at any depth.
    optimizer : Optimizer
        Made of the model's parameters; where a method has settings of its own for some, of
        ``embedding.parameter_groups()``.
    epochs : int
        Epochs that the training will last at most: schedules depend on it.
    steps_per_epoch : int
    batch_loss : callable, optional
        Gives the loss of the present batch once more. ALPT needs it.
    validation_loss : callable, optional
        Gives the loss of a batch of validation data. AutoDim and AutoSrh need it.
    validation_score : callable, optional
        Gives the score on the validation data, higher is better. OptEmbed needs it.

    Raises
    ------
    ValueError
        The model has no trained embedding.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> embedding = vqrs.torch.methods()["hash"](1000, 8, ratio=10, random_state=0)
    >>> model = torch.nn.Sequential(embedding, torch.nn.Linear(8, 1))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> hooks = TrainingHooks(model, optimizer, epochs=2, steps_per_epoch=5)
    >>> for epoch in range(2):
    ...     for ids in torch.arange(1000).split(200):
    ...         loss = model(ids).square().mean() + hooks.penalty()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    ...         hooks.after_step()
    ...     hooks.after_epoch()
    >>> hooks.step, hooks.epoch
    (10, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        steps_per_epoch: int,
        batch_loss: Loss | None = None,
        validation_loss: Loss | None = None,
        validation_score: Callable[[], float] | None = None,
    ) -> None:
        self.embeddings = [module for module in model.modules() if isinstance(module, TrainedEmbedding)]
        if not self.embeddings:
            raise ValueError("the model has no trained embedding: see vqrs.torch.methods()")
        self.optimizer, self.epochs, self.steps_per_epoch = optimizer, epochs, steps_per_epoch
        self.step = 0
        self.epoch = 1
        """The epoch that is being trained, from 1; after ``after_epoch`` of the last one it stays there."""
        self.batch_loss = batch_loss or self._missing("batch_loss")
        self.validation_loss = validation_loss or self._missing("validation_loss")
        self.validation_score = validation_score or self._missing("validation_score")

    def _missing(self, name: str) -> Callable[[], Tensor]:
        names = ", ".join(sorted({embedding.name for embedding in self.embeddings}))

        def refuse() -> Tensor:
            raise TypeError(f"the model's embeddings ({names}) need {name}: give it to TrainingHooks({name}=...)")

        return refuse

    def penalty(self) -> Tensor | float:
        """What the loss of a training batch gets on top; 0 for most methods."""
        return sum((term for e in self.embeddings if (term := e.penalty()) is not None), start=0.0)

    def after_step(self) -> None:
        """Call after each step of the optimizer."""
        self.step += 1
        for embedding in self.embeddings:
            embedding.on_step(self)

    def after_epoch(self) -> None:
        """Call after each epoch, before its validation."""
        for embedding in self.embeddings:
            embedding.on_epoch(self)
        self.epoch = min(self.epoch + 1, self.epochs)
