"""One training loop for all methods: it knows the protocol of a trained embedding and no method's name."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.bench.datasets import Batch, Dataset

EVALUATION_ROWS = 1 << 16
"""Rows of a batch where nothing is trained."""


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Parameters
    ----------
    epochs : int
        Most epochs of a stage.
    batch_size : int
    learning_rate : float
        Of AdamW.
    weight_decay : float
        Of AdamW, whose own default is 0.01.
    patience : int
        Epochs without a better validation AUC after which a stage ends.
    """

    epochs: int = 10
    batch_size: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 2


@dataclass
class Outcome:
    """What a training came to: the model holds the weights of its best epoch."""

    auc: float
    log_loss: float
    validation_auc: float
    best_epoch: int
    """Of the last stage, counted from 1."""
    epochs: int
    """All that were trained, in all stages."""
    steps: int
    seconds: float
    """Of training, without evaluations."""
    training_nbytes: int
    """The most that the embedding held in any stage."""
    trained_floats: int
    """The most that the optimizer moved of the embedding in any stage."""
    history: list[dict[str, Any]] = field(default_factory=list)


@torch.no_grad()
def predict(model: nn.Module, dataset: Dataset, split: str) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Probabilities and labels of a split, in its order, with the model in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        found = [
            (torch.sigmoid(_logits(model, batch).double()).numpy(), batch.labels)
            for batch in dataset.batches(split, EVALUATION_ROWS)
        ]
    finally:
        model.train(was_training)
    empty = np.zeros(0, np.float32)
    return np.concatenate([empty, *(p for p, _ in found)]), np.concatenate([empty, *(y for _, y in found)])


def score(model: nn.Module, dataset: Dataset, split: str) -> tuple[float, float]:
    """Area under the ROC curve and mean logarithmic loss of a split.

    Raises
    ------
    FloatingPointError
        A probability is not a number: the training diverged.
    ValueError
        The split has rows of one label only, or none.
    """
    from sklearn.metrics import log_loss, roc_auc_score

    probabilities, labels = predict(model, dataset, split)
    if not len(labels) or labels.min() == labels.max():
        raise ValueError(f"{dataset.name}: an AUC needs rows of both labels, the {split} part has not")
    if not np.isfinite(probabilities).all():
        raise FloatingPointError(
            f"{dataset.name}: the model predicts NaN, its training diverged: lower the learning rate"
        )
    return float(roc_auc_score(labels, probabilities)), float(log_loss(labels, probabilities, labels=[0, 1]))


def train(
    model: nn.Module,
    dataset: Dataset,
    settings: Settings,
    *,
    random_state: int = 0,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Train a model through all stages of its embedding, keep its best epoch, and score that on the test part.

    An epoch can be the best one if the embedding is within its budget by then; the validation part alone decides.

    Parameters
    ----------
    model : Module
        ``model(ids, numeric)`` gives logits, ``model.embedding`` follows the protocol of ``TrainedEmbedding``, and
        ``model.reset_parameters()`` brings back the initial weights of all else.
    dataset : Dataset
    settings : Settings
    random_state : int
        Order of the training rows, and whatever torch draws.
    progress : callable, optional
        Called after each epoch with a dict: stage, epoch, loss, validation_auc.

    Raises
    ------
    FloatingPointError
        The loss is not a number.
    ValueError
        No epoch ended within the embedding's budget.
    """
    torch.manual_seed(random_state)
    embedding = model.embedding
    done = Outcome(math.nan, math.nan, -math.inf, 0, 0, 0, 0.0, 0, 0)
    for stage in embedding.stages:
        embedding.enter_stage(stage)
        if stage in embedding.restarts:
            model.reset_parameters()
        best = _Stage(model, dataset, settings, random_state, stage, done, progress).run()
        if best:
            model.load_state_dict(best)
    if not embedding.within_budget():
        raise ValueError(f"no epoch ended within the budget: {embedding.inference_nbytes()} bytes are held")
    done.auc, done.log_loss = score(model, dataset, "test")
    return done


class _Stage:
    """One stage of a training; also what it tells the embedding's hooks (``vqrs.torch.trained.Training``)."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        settings: Settings,
        random_state: int,
        stage: str,
        done: Outcome,
        progress: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.model, self.dataset, self.settings, self.name, self.done = model, dataset, settings, stage, done
        self.random_state, self.progress = random_state, progress
        self.embedding = model.embedding
        self.step = self.epoch = 0
        self.epochs = settings.epochs
        self.steps_per_epoch = -(-dataset.n_rows("train") // settings.batch_size)
        held = {id(p) for p in self.embedding.parameters()}
        rest = [p for p in model.parameters() if id(p) not in held]
        groups = [group for group in [{"params": rest}, *self.embedding.parameter_groups()] if group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._batch: Batch | None = None
        self._validation: Iterator[Batch] | None = None
        done.training_nbytes = max(done.training_nbytes, self.embedding.training_nbytes())
        done.trained_floats = max(done.trained_floats, self.embedding.trained_floats())

    def run(self) -> dict[str, Any]:
        """Train; the model's best state, empty where the stage is a search or no epoch was within the budget."""
        best: dict[str, Any] = {}
        best_score, waited = -math.inf, 0
        # Only at the end of all stages must the embedding be within its budget.
        last, search = self.name == self.embedding.stages[-1], self.name in self.embedding.searches
        while self.epoch < self.epochs and not self.embedding.finished and waited < self.settings.patience:
            self.epoch += 1
            loss = self._train_epoch()
            within = self.embedding.within_budget()
            found = self.validation_score()
            self.done.epochs += 1
            self.done.history.append(
                {
                    "stage": self.name,
                    "epoch": self.epoch,
                    "loss": loss,
                    "validation_auc": found,
                    "within_budget": within,
                }
            )
            if self.progress is not None:
                self.progress(self.done.history[-1])
            if search or (last and not within):
                continue
            if found > best_score:
                best, best_score, waited = copy.deepcopy(self.model.state_dict()), found, 0
                self.done.best_epoch, self.done.validation_auc = self.epoch, found
            else:
                waited += 1
        self.done.training_nbytes = max(self.done.training_nbytes, self.embedding.training_nbytes())
        return best

    def _train_epoch(self) -> float:
        self.model.train()
        total, rows = 0.0, 0
        seed = self.random_state * 1_000_003 + self.done.epochs
        start = time.perf_counter()
        for batch in self.dataset.batches("train", self.settings.batch_size, seed=seed):
            self._batch = batch
            loss = self.batch_loss()
            penalty = self.embedding.penalty()
            total, rows = total + float(loss.detach()) * len(batch.labels), rows + len(batch.labels)
            self.optimizer.zero_grad(set_to_none=True)
            (loss if penalty is None else loss + penalty).backward()
            self.optimizer.step()
            self.step += 1
            self.embedding.on_step(self)
            if self.embedding.finished:
                break
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of epoch {self.epoch} is not a number: lower the learning rate")
        self.embedding.on_epoch(self)
        self.done.seconds += time.perf_counter() - start
        self.done.steps += -(-rows // self.settings.batch_size)
        return total / rows

    def batch_loss(self) -> Tensor:
        """The loss of the present batch with the model as it now is."""
        assert self._batch is not None
        return _loss(self.model, self._batch)

    def validation_loss(self) -> Tensor:
        """The loss of the next batch of the validation part; the part starts anew at its end."""
        batch = next(self._validation, None) if self._validation is not None else None
        if batch is None:
            seed = self.random_state * 1_000_003 + self.step
            self._validation = iter(self.dataset.batches("validation", self.settings.batch_size, seed=seed))
            batch = next(self._validation)
        return _loss(self.model, batch)

    def validation_score(self) -> float:
        """AUC on the validation part."""
        return score(self.model, self.dataset, "validation")[0]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(torch.from_numpy(batch.ids), torch.from_numpy(batch.numeric))
    return logits


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(_logits(model, batch), torch.from_numpy(batch.labels))
