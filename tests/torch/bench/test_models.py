"""Click models: their papers' formulas against naive loops, their sizes, their gradients."""

import itertools

import pytest
import torch
from torch import nn

import vqrs.torch
from vqrs.bench.models import DLRM, GMF, DCNv2, DeepFM, WideAndDeep, models

SIZES = {"gmf": [20, 30]}
DIM = 6


def made(name, n_numeric=3, seed=0, **settings):
    sizes = SIZES.get(name, [20, 30, 5])
    embedding = vqrs.torch.methods()["full"](sum(sizes), DIM, field_sizes=sizes, random_state=1)
    return models()[name](embedding, sizes, DIM, n_numeric, random_state=seed, **settings), sizes


def examples(sizes, n_numeric, b=40):
    generator = torch.Generator().manual_seed(5)
    starts = torch.tensor([0, *itertools.accumulate(sizes)][:-1])
    ids = (torch.rand(b, len(sizes), generator=generator) * torch.tensor(sizes)).long() + starts
    return ids, torch.rand(b, n_numeric, generator=generator)


def moved(model):
    """The model with no weight at zero, so that a formula's every term counts."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 3
    return model


def perceptron(layers, x):
    for layer in layers:
        x = torch.relu(x) if isinstance(layer, nn.ReLU) else layer.weight @ x + layer.bias
    return x


every = pytest.mark.parametrize("name", sorted(models()))
with_and_without = pytest.mark.parametrize("n_numeric", [0, 3])


@every
@with_and_without
def test_shape_and_gradients(name, n_numeric):
    model, sizes = made(name, n_numeric)
    ids, numeric = examples(sizes, n_numeric)
    logits = model(ids, numeric if n_numeric else None)
    assert logits.shape == (40,)
    moved(model)(ids, numeric).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name


@every
def test_numeric_features_count(name):
    model, sizes = made(name)
    ids, numeric = examples(sizes, 3)
    moved(model)
    for feature in range(3):
        other = numeric.clone()
        other[:, feature] += 1
        assert (model(ids, other) != model(ids, numeric)).all()


@every
def test_initial_weights_are_the_seeds(name):
    state = torch.random.get_rng_state()
    first, second, other = (made(name, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    initial = [parameter.clone() for parameter in first.dense_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(initial, second.dense_parameters(), strict=True))
    if any(parameter.ndim == 2 for parameter in initial):
        assert any(not torch.equal(a, b) for a, b in zip(initial, other.dense_parameters(), strict=True))
    table = moved(first).embedding.weight.clone()
    first.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(initial, first.dense_parameters(), strict=True))
    assert torch.equal(first.embedding.weight, table)


@every
def test_a_seed_is_drawn_without_one(name):
    model, _ = made(name, seed=None)
    before = [parameter.clone() for parameter in model.dense_parameters()]
    moved(model).reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, model.dense_parameters(), strict=True))


@every
def test_all_that_belongs_to_ids_is_in_the_embedding(name):
    sizes = [200, 300] if name == "gmf" else [200, 300, 50]
    large = models()[name](nn.Embedding(sum(sizes), DIM), sizes, DIM, 3, random_state=0)
    small, _ = made(name)
    assert [p.shape for p in large.dense_parameters()] == [p.shape for p in small.dense_parameters()]


@with_and_without
def test_dlrm(n_numeric):
    model, sizes = made("dlrm", n_numeric, bottom=(7,), top=(9, 4))
    ids, numeric = examples(sizes, n_numeric)
    moved(model)
    found = model(ids, numeric)
    for row in range(5):
        z = perceptron(model.bottom, numeric[row]) if n_numeric else model.constant
        vectors = [z, *model.embedding(ids[row])]
        products = [vectors[i] @ vectors[j] for i in range(4) for j in range(i)]
        expected = perceptron(model.top, torch.cat([z, torch.stack(products)]))
        torch.testing.assert_close(found[row], expected[0])
    bottom = (n_numeric * 7 + 7) + (7 * DIM + DIM) if n_numeric else DIM
    top = ((DIM + 6) * 9 + 9) + (9 * 4 + 4) + (4 + 1)
    assert sum(p.numel() for p in model.dense_parameters()) == bottom + top


def test_wide_and_deep():
    model, sizes = made("wide-and-deep", deep=(9, 4))
    ids, numeric = examples(sizes, 3)
    moved(model)
    found = model(ids, numeric)
    for row in range(5):
        rows = model.embedding(ids[row])
        wide = model.bias + sum(rows[field, 0] for field in range(3))
        wide = wide + sum(model.wide[feature] * numeric[row, feature] for feature in range(3))
        deep = perceptron(model.deep, torch.cat([*(vector[1:] for vector in rows), numeric[row]]))
        torch.testing.assert_close(found[row], wide + deep[0])
    width = 3 * (DIM - 1) + 3
    assert sum(p.numel() for p in model.dense_parameters()) == (3 + 1) + (width * 9 + 9) + (9 * 4 + 4) + (4 + 1)


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
def test_dcn_v2(structure):
    model, sizes = made("dcn-v2", deep=(9, 4), n_crosses=2, structure=structure)
    ids, numeric = examples(sizes, 3)
    moved(model)
    found = model(ids, numeric)
    width = 3 * DIM + 3
    for row in range(5):
        x0 = torch.cat([*model.embedding(ids[row]), numeric[row]])
        x = x0
        for layer in model.crosses:
            x = torch.stack(
                [x0[i] * (sum(layer.weight[i, j] * x[j] for j in range(width)) + layer.bias[i]) + x[i]
                 for i in range(width)]
            )  # fmt: skip
        seen = perceptron(model.deep, x) if structure == "stacked" else torch.cat([x, perceptron(model.deep, x0)])
        torch.testing.assert_close(found[row], (model.last.weight @ seen + model.last.bias)[0], rtol=1e-4, atol=1e-5)
    last = 4 + 1 if structure == "stacked" else 4 + width + 1
    expected = 2 * (width * width + width) + (width * 9 + 9) + (9 * 4 + 4) + last
    assert sum(p.numel() for p in model.dense_parameters()) == expected


def test_deepfm():
    model, sizes = made("deepfm", deep=(9, 4))
    ids, numeric = examples(sizes, 3)
    moved(model)
    found = model(ids, numeric)
    for row in range(5):
        rows = model.embedding(ids[row])
        weights = [*rows[:, 0], *(model.weights * numeric[row])]
        vectors = [*rows[:, 1:], *(model.factors[j] * numeric[row, j] for j in range(3))]
        machine = sum(weights) + sum(a @ b for a, b in itertools.combinations(vectors, 2))
        expected = model.bias + machine + perceptron(model.deep, torch.cat(vectors))[0]
        torch.testing.assert_close(found[row], expected)
    width = 6 * (DIM - 1)
    assert sum(p.numel() for p in model.dense_parameters()) == 3 * DIM + 1 + (width * 9 + 9) + (9 * 4 + 4) + (4 + 1)


@pytest.mark.parametrize("weights", [True, False])
def test_gmf(weights):
    model, sizes = made("gmf", weights=weights)
    ids, numeric = examples(sizes, 3)
    users, items = model.embedding(ids).unbind(1)
    torch.testing.assert_close(model(ids, numeric), (users * items).sum(1))  # initially plain factorization
    moved(model)
    users, items = model.embedding(ids).unbind(1)
    expected = (users * items * model.h).sum(1) + model.bias if weights else (users * items).sum(1)
    torch.testing.assert_close(model(ids, numeric), expected + (numeric * model.numeric).sum(1))
    assert sum(p.numel() for p in model.dense_parameters()) == 3 + (DIM + 1) * weights


@every
def test_learns(name):
    model, sizes = made(name)
    ids, numeric = examples(sizes, 3, b=400)
    labels = ((ids[:, 0] + ids[:, 1]) % 2).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids, numeric), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_wrong_use():
    table = nn.Embedding(25, 4)
    with pytest.raises(ValueError, match=r"num_embeddings=25, the model expects 26"):
        DLRM(table, [20, 6], 4, 0)
    with pytest.raises(ValueError, match=r"embedding_dim=4, the model expects 8"):
        DLRM(table, [20, 5], 8, 0)
    with pytest.raises(ValueError, match="field_sizes is empty"):
        DLRM(table, [], 4, 0)
    with pytest.raises(ValueError, match="n_numeric must not be negative, got -1"):
        DLRM(table, [25], 4, -1)
    for model in (WideAndDeep, DeepFM):
        with pytest.raises(ValueError, match=f"at least 2 for {model.name}, got 1"):
            model(nn.Embedding(25, 1), [20, 5], 1, 0)
    with pytest.raises(ValueError, match="two fields, users and items, got 1"):
        GMF(table, [25], 4)
    with pytest.raises(ValueError, match="'stacked' or 'parallel', got 'side'"):
        DCNv2(table, [20, 5], 4, structure="side")
    with pytest.raises(ValueError, match="n_crosses must be at least 1, got 0"):
        DCNv2(table, [20, 5], 4, n_crosses=0)
    model = DLRM(table, [20, 5], 4, 2)
    with pytest.raises(ValueError, match=r"ids must have the shape \(b, 2\), got \(3,\)"):
        model(torch.tensor([1, 2, 3]), torch.rand(3, 2))
    with pytest.raises(ValueError, match=r"numeric must have the shape \(1, 2\), got \(1, 0\)"):
        model(torch.tensor([[1, 20]]))
