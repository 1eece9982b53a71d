import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vqrs.torch.trained.autodim import AutoDimEmbedding, choose, soft_choice, temperature_at
from vqrs.torch.trained.autosrh import normalised_step

FIELDS = [4, 60, 300]
ROWS = sum(FIELDS)


class Loop:
    """What the hooks of a module see: a regression of rows of which some fields need few columns."""

    def __init__(self, module, epochs=2, steps=20, target=None, rate=0.02):
        self.module, self.epochs, self.steps_per_epoch, self.rate = module, epochs, steps, rate
        self.generator = torch.Generator().manual_seed(5)
        n, dim = module.num_embeddings, module.embedding_dim
        self.target = torch.randn(n, dim, generator=self.generator) / 3 if target is None else target

    def validation_loss(self):
        ids = torch.randint(self.module.num_embeddings, (256,), generator=self.generator)
        return (self.module(ids) - self.target[ids]).square().mean()

    def run(self, stage):
        self.module.train()
        self.module.enter_stage(stage)
        self.step = 0
        self.optimizer = torch.optim.AdamW(self.module.parameter_groups(), lr=self.rate)
        while self.step < self.epochs * self.steps_per_epoch and not self.module.finished:
            self.optimizer.zero_grad()
            self.validation_loss().backward()
            self.optimizer.step()
            self.step += 1
            self.module.on_step(self)
        return self


def test_a_cold_choice_is_one_hot():
    generator = torch.Generator().manual_seed(0)
    alpha, noise = (torch.randn(5, 4, generator=generator) for _ in range(2))
    weights = soft_choice(alpha, noise, 1e-6)
    assert torch.equal(weights, F.one_hot((alpha + noise).argmax(1), 4).float())
    torch.testing.assert_close(soft_choice(alpha, noise, 1.0), (alpha + noise).softmax(1))


def test_temperature_of_the_paper():
    assert temperature_at(0, 2000, 10**6) == 1
    assert temperature_at(4000, 2000, 10**6) == pytest.approx(0.8)
    assert temperature_at(4000, 1000, 10**6) == pytest.approx(0.9)
    assert temperature_at(10**5, 2000, 10**6) == 0.01
    assert temperature_at(30, 2000, 30) == 0.01


def test_only_alpha_moves_in_its_step():
    module = AutoDimEmbedding(ROWS, 8, field_sizes=FIELDS, random_state=0).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "_extra_state"}
    loop = Loop(module)
    loop.step = 1
    module.on_step(loop)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, module.state_dict()[name])}
    assert changed == {"alpha"}
    assert all(p.grad is None for p in module.parameters())
    assert not any(p is module.alpha for group in module.parameter_groups() for p in group["params"])


def test_training_batches_do_not_reach_alpha():
    module = AutoDimEmbedding(ROWS, 8, field_sizes=FIELDS, random_state=0).train()
    Loop(module).validation_loss().backward()
    assert module.alpha.grad is None
    assert module.weight.grad is not None


def test_rows_of_the_search_are_normalised_and_mixed():
    module = AutoDimEmbedding(ROWS, 4, field_sizes=FIELDS, random_state=0).train()
    module.temperature = 1e-6
    with torch.no_grad():
        module.alpha[:, 1] = 50.0
    ids = torch.arange(4, 64).repeat(3)
    found = module(ids).detach()
    outputs = module.weight[4:64, 1:3] @ module.linear[1, 1:3]
    expected = (outputs - outputs.mean(0)) / (outputs.var(0, correction=0) + 1e-5).sqrt() / 2
    torch.testing.assert_close(found[:60], expected)
    # One row alone has no variance: the running statistics stand in.
    assert torch.isfinite(module(torch.tensor([5]))).all()


def test_the_mixture_is_that_of_batch_normalised_outputs():
    module = AutoDimEmbedding(30, 4, field_sizes=[10, 20], random_state=0).double().train()
    module._generator.manual_seed(3)
    weights = soft_choice(module.alpha, module._noise(), 1.0)
    module._generator.manual_seed(3)
    ids = torch.randint(30, (50,), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(50, 4, dtype=torch.float64)
    for field in (0, 1):
        chosen = (ids >= 10) == bool(field)
        for candidate, columns in enumerate([slice(0, 1), slice(1, 3), slice(3, 7)]):
            outputs = module.weight[ids[chosen]][:, columns] @ module.linear[field, columns]
            expected[chosen] += weights[field, candidate] * F.batch_norm(outputs, None, None, training=True) / 2
    module._selecting = True
    found = module(ids)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        *(
            torch.autograd.grad(rows.pow(3).sum(), [module.weight, module.linear, module.alpha])
            for rows in (found, expected)
        ),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_evaluation_gives_the_likeliest_candidates_with_running_statistics():
    module = AutoDimEmbedding(ROWS, 4, field_sizes=FIELDS, random_state=0)
    Loop(module).run("search")
    assert module.finished
    module.eval()
    for field, (start, size) in enumerate([(0, 4), (4, 60), (64, 300)]):
        candidate = int(module.alpha[field].argmax())
        columns = slice([0, 1, 3][candidate], [1, 3, 7][candidate])
        outputs = module.weight[start : start + size, columns] @ module.linear[field, columns]
        mean, variance = module.mean[field, candidate], module.variance[field, candidate]
        outputs = (outputs - mean) / (variance + 1e-5).sqrt() / 2
        torch.testing.assert_close(module(torch.arange(start, start + size)), outputs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.block(field).rows(torch.arange(size)), outputs, rtol=1e-5, atol=1e-6)


def test_a_field_of_one_direction_gets_a_small_dimension():
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(600, 8, generator=generator) / 3
    target[:300] = torch.randn(300, 1, generator=generator) * torch.randn(8, generator=generator) / 3
    module = AutoDimEmbedding(600, 8, field_sizes=[300, 300], candidates=[1, 8], random_state=0)
    Loop(module, 2, 300, target).run("search")
    advantage = (module.alpha[:, 1] - module.alpha[:, 0]).detach()
    assert advantage[1] > advantage[0]
    assert advantage[1] > 0


@pytest.mark.parametrize("ratio", [1, 2, 6])
def test_budgets_are_kept_at_any_time(ratio):
    module = AutoDimEmbedding(ROWS, 8, field_sizes=FIELDS, ratio=ratio, random_state=0)
    limit = module.full_nbytes / ratio
    assert module.inference_nbytes() <= limit
    Loop(module, 1, 5).run("search")
    assert module.inference_nbytes() <= limit
    module.enter_stage("retrain")
    used = sum(p.numel() for p in module.parameters())
    assert module.inference_nbytes() == 4 * used <= limit
    assert used == sum(
        size * dim + (0 if dim == 8 else dim * 8 + 8) for size, dim in zip(FIELDS, module.dims, strict=True)
    )
    assert module.dims == (8, 8, 8) or ratio > 1


def test_a_search_trains_twice_the_table():
    module = AutoDimEmbedding(5000, 16, random_state=0)
    assert 1.9 < module.trained_floats() / (5000 * 16) < 2.1


def test_retraining_starts_from_new_weights_with_a_bias():
    module = AutoDimEmbedding(ROWS, 8, field_sizes=FIELDS, candidates=[2, 8], ratio=2, random_state=0)
    Loop(module).run("search")
    module.enter_stage("retrain")
    assert module.dims[2] == 2
    Loop(module).run("retrain")
    ids = torch.arange(64, ROWS)
    torch.testing.assert_close(module(ids), module.weight_2 @ module.projection_2 + module.bias_2)
    assert module.bias_2.any()


def test_the_limit_decides_between_candidates():
    scores = np.log([[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    costs = np.array([[10, 20, 40], [1, 2, 4]])
    assert choose(scores, costs, 100, fill=False).tolist() == [2, 1]
    assert choose(scores, costs, 100).tolist() == [2, 2]
    assert choose(scores, costs, 41).tolist() == [2, 0]
    assert choose(scores, costs, 24).tolist() == [1, 2]
    assert choose(scores, costs, 11).tolist() == [0, 0]


def test_saved_and_loaded_in_each_stage():
    module = AutoDimEmbedding(ROWS, 8, field_sizes=FIELDS, ratio=3, random_state=0)
    for stage in module.stages:
        Loop(module, 1, 5).run(stage)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        for start in AutoDimEmbedding.stages:
            other = AutoDimEmbedding(ROWS, 8, field_sizes=FIELDS, ratio=3, random_state=1)
            other.enter_stage(start)
            file.seek(0)
            other.load_state_dict(torch.load(file))
            assert (other.stage, other.dims, other.temperature) == (stage, module.dims, module.temperature)
            np.testing.assert_array_equal(other.to_dense(), module.to_dense())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": [0, 2]}, r"candidates must be from 1 to 8, got \(0, 2\)"),
        ({"candidates": [16]}, "candidates must be from 1 to 8"),
        ({"candidates": []}, "candidates must be from 1 to 8"),
        ({"ratio": 10}, "autodim from 1 on needs at least 464 bytes here, the budget is 320"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoDimEmbedding(100, 8, **settings)


@pytest.mark.parametrize("largest", [0.0, 1e-42, 1e-38])
def test_a_step_along_a_gradient_that_underflowed_stays_finite(largest):
    """A cold softmax leaves subnormal gradients, whose reciprocal is infinite."""
    alpha = torch.zeros(1, 3)
    normalised_step(alpha, torch.tensor([[largest, 0.0, -largest]]), rate=1.0)
    assert torch.equal(alpha, torch.zeros(1, 3))
