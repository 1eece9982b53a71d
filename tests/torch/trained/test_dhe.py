"""Deep hash embeddings: encodings, sizes, and what batch normalization must not do."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from vqrs.torch.trained.dhe import DeepHashEmbedding

SMALL = {"num_hashes": 12, "width": 7, "random_state": 0}


def test_encodings_are_uniform_and_independent():
    module = DeepHashEmbedding(10**8, 8, num_hashes=64, width=4, random_state=0)
    x = module.encode(torch.arange(20_000)).double()
    assert x.shape == (20_000, 64)
    assert float(x.abs().max()) <= 1
    assert abs(float(x.mean())) < 0.003
    assert float(x.var()) == pytest.approx(1 / 3, rel=0.01)
    assert float(x.mean(0).abs().max()) < 0.02
    # Neither hashes nor neighbouring ids are correlated: 4.5 deviations of a sample of that size.
    between = torch.corrcoef(x.T) - torch.eye(64)
    assert float(between.abs().max()) < 4.5 / 20_000**0.5
    neighbours = (x[1:] * x[:-1]).mean() * 3
    assert abs(float(neighbours)) < 4.5 / (20_000 * 64) ** 0.5
    counts = torch.histc(x, 20, -1, 1)
    expected = x.numel() / 20
    assert float((counts - expected).square().sum() / expected) < 50  # chi-square of 19 degrees
    assert len(torch.unique(x, dim=0)) == 20_000


def test_encodings_keep_ids_apart_that_share_half_of_their_bits():
    module = DeepHashEmbedding(10**8, 8, num_hashes=2, width=4, random_state=0)
    x = module.encode(torch.arange(300_000))
    assert len(torch.unique(x, dim=0)) >= 299_990


def test_encodings_do_not_depend_on_the_batch_or_the_process():
    module = DeepHashEmbedding(1000, 8, **SMALL)
    ids = torch.tensor([5, 999, 5, 0])
    assert torch.equal(module.encode(ids)[1], module.encode(torch.tensor([999]))[0])
    again = DeepHashEmbedding(1000, 8, **SMALL)
    assert torch.equal(again.encode(ids), module.encode(ids))
    assert not torch.equal(DeepHashEmbedding(1000, 8, **SMALL | {"random_state": 1}).encode(ids), module.encode(ids))


@pytest.mark.parametrize(("k", "w", "d"), [(12, 7, 8), (1024, 300, 16), (5, 1, 1)])
def test_parameters_of_the_papers_network(k, w, d):
    module = DeepHashEmbedding(10**6, d, architecture="deep", num_hashes=k, width=w)
    assert module.trained_floats() == (k + 1) * w + 4 * w * (w + 1) + (w + 1) * d + 10 * w
    assert module.inference_nbytes() == 4 * module.trained_floats() + 4 * 10 * w + 5 * 8 + 8
    assert sum(isinstance(part, nn.BatchNorm1d) for part in module.modules()) == 5


def test_the_papers_size_without_a_budget():
    module = DeepHashEmbedding(10**6, 16)
    assert (module.architecture, module.num_hashes) == ("deep", 1024)
    assert [layer.out_features for layer in module.layers] == [1024] * 5 + [16]


@pytest.mark.parametrize("limit", [2 * 10**3, 10**5, 5 * 10**6, 10**7])
@pytest.mark.parametrize("unit", ["nbytes", "num_floats"])
def test_budgets_are_used_to_the_unit(limit, unit):
    module = DeepHashEmbedding(10**9, 32, **{unit: limit})
    used = module.inference_nbytes() if unit == "nbytes" else module.trained_floats()
    width = module.layers[0].out_features
    deep = module.architecture == "deep"
    settings = {"architecture": module.architecture, "width": width + 1}
    wider = DeepHashEmbedding(10**9, 32, **settings)
    assert used <= limit < (wider.inference_nbytes() if unit == "nbytes" else wider.trained_floats())
    assert deep == (width >= 256 and limit > 10**5)
    assert module.num_hashes == (1024 if deep else width)
    assert len(module.layers) == (6 if deep else 3)


@pytest.mark.parametrize("budget", [{"nbytes": "1TiB"}, {"num_floats": 10**12}, {"ratio": 1e-6}])
def test_no_network_is_larger_than_the_table_or_the_papers_own(budget):
    assert DeepHashEmbedding(100, 8, **budget).layers[0].out_features == 1024
    assert DeepHashEmbedding(100, 8, num_hashes=8, width=1024).trained_floats() > 100 * 8
    shallow = DeepHashEmbedding(100_000, 64, architecture="shallow", **budget)
    assert 0.99 * 6_400_000 < shallow.trained_floats() <= 6_400_000


def test_unreachable_and_wrong_settings():
    with pytest.raises(ValueError, match="dhe needs at least 6 trained floats here"):
        DeepHashEmbedding(100, 1, num_floats=5)
    with pytest.raises(ValueError, match="architecture must be deep or shallow, got 'wide'"):
        DeepHashEmbedding(100, 4, architecture="wide")
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        DeepHashEmbedding(100, 4, width=0)


@pytest.mark.parametrize("architecture", ["deep", "shallow"])
def test_rows_are_the_network_s_outputs(architecture):
    module = DeepHashEmbedding(1000, 8, architecture=architecture, **SMALL).eval()
    deep = architecture == "deep"
    steps = []
    for number, layer in enumerate(module.layers[:-1]):
        steps += [layer, module.norms[number], nn.Mish()] if deep else [layer, nn.ReLU()]
    network = nn.Sequential(*steps, module.layers[-1]).eval()
    ids = torch.tensor([3, 3, 999, 0])
    torch.testing.assert_close(module(ids), network(module.encode(ids)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(module.to_dense())[ids], module(ids).detach(), rtol=1e-5, atol=1e-6)


def test_statistics_of_batches_are_of_training_alone():
    module = DeepHashEmbedding(1000, 8, architecture="deep", **SMALL)
    ids = torch.arange(100)
    before = {name: value.clone() for name, value in module.norms.state_dict().items()}
    module.eval()
    first = module(ids).detach()
    torch.testing.assert_close(module(ids[:3]).detach(), first[:3], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in module.norms.state_dict().items())
    module.train()
    for _ in range(50):
        module(ids)
    assert not torch.equal(module.norms[0].running_mean, before["0.running_mean"])
    module.eval()
    assert not torch.allclose(module(ids), first)


def test_batches_of_none_and_one_while_training():
    module = DeepHashEmbedding(1000, 8, architecture="deep", **SMALL).train()
    before = module.norms[0].running_mean.clone()
    assert module(torch.tensor([], dtype=torch.int64)).shape == (0, 8)
    assert module(torch.tensor([4])).shape == (1, 8)
    assert torch.equal(module.norms[0].running_mean, before)
    assert module(torch.tensor([4, 5])).isfinite().all()


@pytest.mark.parametrize("architecture", ["deep", "shallow"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(architecture, training):
    module = DeepHashEmbedding(50, 3, architecture=architecture, num_hashes=4, width=3, random_state=0).double()
    module.train(training)
    for parameter in module.parameters():  # without biases of 0 no unit stands at the corner of ReLU
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([0, 3, 3, 49, 20])
    names, values = zip(*module.named_parameters(), strict=True)

    def rows(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (ids,))

    assert gradcheck(rows, values)


@pytest.mark.parametrize("architecture", ["deep", "shallow"])
def test_initial_rows_have_about_the_variance_of_the_full_table(architecture):
    module = DeepHashEmbedding(5000, 16, architecture=architecture, num_hashes=256, width=256, random_state=0)
    rows = module(torch.arange(5000)).detach().numpy()
    assert 0.3 / 48 < np.var(rows) < 1.5 / 48


def test_no_table():
    module = DeepHashEmbedding(1000, 8, **SMALL)
    assert not module.has_table
    with pytest.raises(TypeError, match="dhe has no table form"):
        module.to_table()
