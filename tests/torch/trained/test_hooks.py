"""Trained embeddings in a loop of one's own."""

import pytest
import torch

import vqrs.torch
from vqrs.torch import TrainedEmbedding, TrainingHooks


class Told(TrainedEmbedding):
    """Keeps what it is told."""

    about = "for tests"

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.weight = torch.nn.Parameter(self.uniform(self.num_embeddings, self.embedding_dim))
        self.told = []

    def rows(self, ids):
        return self.weight[ids]

    def penalty(self):
        return self.weight.sum() * 0 + 2.0

    def on_step(self, training):
        self.told.append(("step", training.step, training.epoch))

    def on_epoch(self, training):
        self.told.append(("epoch", training.epoch, training.epochs, training.steps_per_epoch))
        if training.epoch == 2:
            training.validation_loss()


def model_of():
    Told.name = "told"
    return torch.nn.ModuleDict({"a": Told(5, 3), "b": torch.nn.Sequential(Told(7, 3)), "c": torch.nn.Linear(3, 1)})


def test_all_embeddings_are_told():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = TrainingHooks(model, optimizer, epochs=2, steps_per_epoch=2, validation_loss=lambda: torch.zeros(()))
    for _ in range(2):
        for _ in range(2):
            assert float(hooks.penalty().detach()) == 4.0
            hooks.after_step()
        hooks.after_epoch()
    expected = [("step", 1, 1), ("step", 2, 1), ("epoch", 1, 2, 2), ("step", 3, 2), ("step", 4, 2), ("epoch", 2, 2, 2)]
    assert model["a"].told == model["b"][0].told == expected


def test_what_is_missing_is_named():
    model = model_of()
    hooks = TrainingHooks(model, torch.optim.SGD(model.parameters()), epochs=2, steps_per_epoch=1)
    hooks.after_epoch()
    with pytest.raises(TypeError, match=r"\(told\) need validation_loss"):
        hooks.after_epoch()
    with pytest.raises(ValueError, match="no trained embedding"):
        TrainingHooks(model["c"], None, epochs=1, steps_per_epoch=1)


def test_cce_clusters_in_a_loop_of_ones_own():
    embedding = vqrs.torch.methods()["cce"](300, 8, ratio=4, random_state=0)
    optimizer = torch.optim.AdamW(embedding.parameters())
    hooks = TrainingHooks(embedding, optimizer, epochs=10, steps_per_epoch=3)
    before = embedding.inference_nbytes()
    for _ in range(2):
        for ids in torch.arange(300).split(100):
            loss = embedding(ids).square().mean() + hooks.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hooks.after_step()
        hooks.after_epoch()
    # Learned pointers are there now, and they are counted.
    assert embedding.inference_nbytes() > before
