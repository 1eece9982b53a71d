"""The training loop: what it promises methods, and what it keeps."""

import math

import numpy as np
import pytest
import torch

import vqrs.torch
from vqrs.bench import training
from vqrs.bench.datasets import Dataset, Rows
from vqrs.bench.models import models
from vqrs.bench.synthetic import synthetic
from vqrs.bench.training import Settings, predict, score, train
from vqrs.torch.trained.base import TrainedEmbedding
from vqrs.torch.trained.fields import FieldEmbeddings


@pytest.fixture(scope="module")
def dataset():
    return synthetic(200, 100, 10_000, random_state=0)


def model_of(dataset, method=None, **settings):
    method = vqrs.torch.methods()["full"] if method is None else method
    embedding = FieldEmbeddings(method, dataset.field_sizes, 8, random_state=0, **settings)
    return models()["gmf"](embedding, dataset.field_sizes, 8, 0, random_state=0)


class Recorder(TrainedEmbedding):
    """Three stages: one that ends itself, a search, and one that only at its second epoch is within the budget."""

    about = "for tests"
    stages = ("first", "search", "last")
    restarts = frozenset(["last"])
    searches = frozenset(["search"])
    name = "recorder"

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.weight = torch.nn.Parameter(self.uniform(self.num_embeddings, self.embedding_dim))
        self.seen = []

    def rows(self, ids):
        return self.weight[ids]

    def enter_stage(self, stage):
        super().enter_stage(stage)
        self.seen.append(stage)

    def on_step(self, training):
        self.seen.append(("step", training.step, training.epoch))
        losses = training.batch_loss(), training.validation_loss()
        assert all(math.isfinite(float(loss.detach())) and loss.requires_grad for loss in losses)
        self.finished = self.stage == "first" and training.step == 3

    def on_epoch(self, training):
        self.seen.append(("epoch", training.epoch, training.epochs, training.steps_per_epoch))

    def within_budget(self):
        return self.stage == "last" and self.seen[-1][1] >= 2


def test_a_model_learns_and_its_best_epoch_is_kept(dataset):
    model = model_of(dataset)
    before = score(model, dataset, "test")[0]
    told = []
    outcome = train(model, dataset, Settings(epochs=30, batch_size=400, learning_rate=0.05), progress=told.append)
    assert outcome.auc > before + 0.1
    scores = [entry["validation_auc"] for entry in outcome.history]
    assert told == outcome.history
    assert outcome.validation_auc == max(scores)
    assert outcome.best_epoch == 1 + int(np.argmax(scores))
    # Two epochs of patience, then it stops; the weights are those of the best epoch.
    assert outcome.epochs == len(scores) == min(30, outcome.best_epoch + 2)
    assert score(model, dataset, "validation")[0] == outcome.validation_auc
    assert score(model, dataset, "test") == (outcome.auc, outcome.log_loss)
    assert outcome.steps == outcome.epochs * 20
    assert outcome.trained_floats == 300 * 8
    assert outcome.training_nbytes == 300 * 8 * 16


def test_same_random_state_same_model(dataset):
    def rows(random_state):
        model = model_of(dataset)
        train(model, dataset, Settings(epochs=2, batch_size=400), random_state=random_state)
        return model.embedding.parts[0].weight.detach().numpy()

    np.testing.assert_array_equal(rows(1), rows(1))
    assert not np.array_equal(rows(1), rows(2))


def test_stages_hooks_and_budgets(dataset):
    model = model_of(dataset, Recorder)
    outcome = train(model, dataset, Settings(epochs=3, batch_size=2000, patience=1))
    (part,) = model.embedding.parts
    stages = [entry for entry in part.seen if isinstance(entry, str)]
    assert stages == ["first", "search", "last"]
    first, search, _ = (
        part.seen[part.seen.index(a) + 1 : part.seen.index(b) if b else None]
        for a, b in [("first", "search"), ("search", "last"), ("last", None)]
    )
    # Ended by the method in its first epoch, after three steps of four.
    assert first == [("step", 1, 1), ("step", 2, 1), ("step", 3, 1), ("epoch", 1, 3, 4)]
    # A search runs to its end, whatever the validation says.
    assert [entry[1] for entry in search if entry[0] == "epoch"] == [1, 2, 3]
    assert [entry["within_budget"] for entry in outcome.history if entry["stage"] == "last"][:2] == [False, True]
    assert outcome.best_epoch >= 2


def test_the_rest_of_the_model_restarts_where_the_embedding_says_so(dataset, monkeypatch):
    model = model_of(dataset, Recorder)
    (part,) = model.embedding.parts
    stages = []
    reset = model.reset_parameters
    monkeypatch.setattr(model, "reset_parameters", lambda: stages.append(part.stage) or reset())
    train(model, dataset, Settings(epochs=2, batch_size=4000))
    assert stages == ["last"]


class Growing(TrainedEmbedding):
    """Trains more floats, and holds more bytes, in its first stage than in its last."""

    about = "for tests"
    stages = ("wide", "narrow")
    name = "growing"

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.weight = torch.nn.Parameter(self.uniform(self.num_embeddings, self.embedding_dim))
        self.scores = torch.nn.Parameter(torch.ones(self.num_embeddings, 1))

    def rows(self, ids):
        return self.weight[ids] * self.scores[ids]

    def enter_stage(self, stage):
        super().enter_stage(stage)
        self.scores.requires_grad_(stage == "wide")


def test_floats_and_bytes_are_the_most_of_any_stage(dataset):
    model = model_of(dataset, Growing)
    outcome = train(model, dataset, Settings(epochs=1, batch_size=4000))
    assert outcome.trained_floats == 300 * 9
    assert outcome.training_nbytes == 16 * 300 * 9
    assert model.embedding.trained_floats() == 300 * 8


def test_the_best_epoch_of_an_early_stage_goes_on(dataset, monkeypatch):
    """The second epoch of the first stage is worse: the next stage starts from the weights of the first."""
    model = model_of(dataset, Growing)
    (part,) = model.embedding.parts
    kept = {}
    enter = part.enter_stage

    def noted(stage):
        if stage == "narrow":
            kept["start"] = part.weight.detach().clone()
        enter(stage)

    def worse_and_worse(model, dataset, split):
        if split == "validation" and part.stage == "wide":
            kept.setdefault("first", part.weight.detach().clone())
        scores["next"] -= 0.01
        return scores["next"], 1.0

    scores = {"next": 0.9}
    monkeypatch.setattr(part, "enter_stage", noted)
    monkeypatch.setattr(training, "score", worse_and_worse)
    outcome = train(model, dataset, Settings(epochs=3, batch_size=4000, patience=2))
    assert [entry["epoch"] for entry in outcome.history if entry["stage"] == "wide"] == [1, 2, 3]
    assert torch.equal(kept["start"], kept["first"])


def test_never_within_the_budget(dataset):
    model = model_of(dataset, Recorder)
    with pytest.raises(ValueError, match="no epoch ended within the budget"):
        train(model, dataset, Settings(epochs=1, batch_size=2000))


def test_the_test_part_is_not_looked_at(dataset):
    """Other test labels change no weight: nothing but the last score reads them."""
    rows = {split: dataset.rows(split) for split in ("train", "validation", "test")}
    turned = rows | {"test": rows["test"]._replace(labels=1 - rows["test"].labels)}
    other = Dataset("turned", dataset.field_names, dataset.field_sizes, turned)
    first, second = model_of(dataset), model_of(dataset)
    settings = Settings(epochs=3, batch_size=400, learning_rate=0.02)
    a, b = train(first, dataset, settings), train(second, other, settings)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert a.auc == pytest.approx(1 - b.auc)


def test_divergence_is_told(dataset):
    model = model_of(dataset)
    with torch.no_grad():
        model.embedding.parts[0].weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(model, dataset, Settings(epochs=1))
    with pytest.raises(FloatingPointError, match="NaN"):
        score(model, dataset, "test")


def test_scores_are_known_ones():
    ids = np.zeros((4, 2), np.int64)
    rows = Rows(ids, np.zeros((4, 0), np.float32), np.array([0, 1, 1, 0]))
    data = Dataset("four", ["user", "item"], [1, 1], dict.fromkeys(["train", "validation", "test"], rows))
    model = model_of(data)
    probabilities, labels = predict(model, data, "test")
    assert probabilities.shape == labels.shape == (4,)
    # Equal scores rank nothing.
    assert score(model, data, "test")[0] == 0.5


@pytest.mark.parametrize("labels", [[1, 1], []])
def test_no_auc_of_one_label(labels):
    rows = Rows(np.zeros((len(labels), 2), int), np.zeros((len(labels), 0), np.float32), np.array(labels))
    both = Rows(np.zeros((2, 2), int), np.zeros((2, 0), np.float32), np.array([0, 1]))
    data = Dataset("ones", ["user", "item"], [1, 1], {"train": both, "validation": rows, "test": both})
    with pytest.raises(ValueError, match="an AUC needs rows of both labels, the validation part has not"):
        train(model_of(data), data, Settings(epochs=1))
