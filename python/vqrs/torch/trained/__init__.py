"""Embedding tables that are trained in their compressed form: one file a method, one contract for all."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

from vqrs.torch.trained.base import Budget, Size, TrainedEmbedding, Training, reset_optimizer_state
from vqrs.torch.trained.hooks import TrainingHooks

__all__ = ["Budget", "Size", "TrainedEmbedding", "Training", "TrainingHooks", "methods", "reset_optimizer_state"]

_FOUND: dict[str, type[TrainedEmbedding]] = {}


def methods() -> dict[str, type[TrainedEmbedding]]:
    """The methods that train compressed tables, by name.

    Returns
    -------
    dict of str to class
        Each class takes ``(num_embeddings, embedding_dim, *, nbytes=None, ratio=None, num_floats=None, ...)``.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> module = vqrs.torch.methods()["hash"](1000, 16, ratio=10, random_state=0)
    >>> module(torch.tensor([[1, 2, 3]])).shape, module.inference_nbytes()
    (torch.Size([1, 3, 16]), 6344)
    """
    if not _FOUND:
        classes: dict[str, type[TrainedEmbedding]] = {}
        for module in pkgutil.iter_modules(__path__):
            for value in vars(import_module(f"{__name__}.{module.name}")).values():
                if inspect.isclass(value) and issubclass(value, TrainedEmbedding) and "name" in vars(value):
                    classes[value.name] = value
        _FOUND.update(sorted(classes.items()))
    return dict(_FOUND)
