"""Tensor trains: digits, products, exact trains, initial cores and budgets."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from vqrs.torch.trained import tt_rec
from vqrs.torch.trained.tt_rec import TensorTrainEmbedding


def materialised(module):
    """The whole table by einsum over all digits at once."""
    (n1, n2, n3), (d1, d2, d3), (r1, r2) = module.row_factors, module.column_factors, module.ranks
    first, second, third = (core.detach().double() for core in module.cores)
    second = second.view(n2, r1, d2, r2)
    whole = torch.einsum("aur,brvs,csw->abcuvw", first, second, third)
    return whole.reshape(n1 * n2 * n3, d1 * d2 * d3)[: module.num_embeddings]


@pytest.mark.parametrize(("n", "d", "rank"), [(100, 12, 3), (64, 16, (2, 5)), (7, 5, 4), (1, 1, 1), (1001, 8, 6)])
def test_rows_are_those_of_the_materialised_table(n, d, rank):
    module = TensorTrainEmbedding(n, d, rank=rank, random_state=0)
    expected = materialised(module)
    torch.testing.assert_close(module(torch.arange(n)).detach().double(), expected, rtol=1e-5, atol=1e-6)
    ids = torch.randint(n, (3, 5))
    torch.testing.assert_close(module(ids).detach().double(), expected[ids], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(module.to_dense(), expected, rtol=1e-5, atol=1e-6)


def test_digits_are_those_of_a_mixed_radix():
    module = TensorTrainEmbedding(100, 8, row_factors=(4, 5, 6), rank=2)
    digits = module.digits(torch.arange(100))
    for number, found in enumerate(np.unravel_index(np.arange(100), (4, 5, 6))):
        np.testing.assert_array_equal(digits[number], found)


def test_products_of_large_matrices_are_those_of_small_ones(monkeypatch):
    module = TensorTrainEmbedding(500, 12, rank=5, random_state=0)
    ids = torch.randint(250, (40,), generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(40, 12)

    def run():
        module.zero_grad()
        rows = module(ids)
        rows.backward(upstream)
        return [rows.detach(), *[core.grad.clone() for core in module.cores]]

    gathered = run()
    monkeypatch.setattr(tt_rec, "_GATHERED", 0)
    for one, other in zip(gathered, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert module(ids[:0]).shape == (0, 12)


def test_a_train_of_full_rank_holds_any_table():
    """TT-SVD: Oseledets, "Tensor-train decomposition", 2011."""
    (n1, n2, n3), (d1, d2, d3) = shape = (4, 3, 5), (2, 3, 2)
    n, d = 60, 12
    module = TensorTrainEmbedding(n, d, rank=10**6, row_factors=shape[0], column_factors=shape[1])
    r1, r2 = module.ranks
    assert (r1, r2) == (min(n1 * d1, n2 * d2 * n3 * d3), min(n3 * d3, n1 * d1 * n2 * d2))
    table = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensor = table.view(n1, n2, n3, d1, d2, d3).permute(0, 3, 1, 4, 2, 5).reshape(n1 * d1, -1)
    u, s, v = torch.linalg.svd(tensor, full_matrices=False)
    first = u.view(n1, d1, r1)
    u, s, v = torch.linalg.svd((s[:, None] * v).reshape(r1 * n2 * d2, n3 * d3), full_matrices=False)
    second = u.view(r1, n2, d2, r2).permute(1, 0, 2, 3).reshape(n2, r1, d2 * r2)
    third = (s[:, None] * v).view(r2, n3, d3).permute(1, 0, 2)
    module.double()
    with torch.no_grad():
        for core, values in zip(module.cores, (first, second, third), strict=True):
            core.copy_(values)
    torch.testing.assert_close(module(torch.arange(n)).detach(), table, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gathered", [0, 1 << 22])
def test_gradients_of_each_core(gathered, monkeypatch):
    monkeypatch.setattr(tt_rec, "_GATHERED", gathered)
    module = TensorTrainEmbedding(30, 8, rank=(2, 3), random_state=0).double()
    ids = torch.tensor([0, 7, 7, 29])
    names, values = zip(*module.named_parameters(), strict=True)
    assert len(names) == 3
    assert gradcheck(lambda *p: torch.func.functional_call(module, dict(zip(names, p, strict=True)), (ids,)), values)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 9, 63, 1000, 1001, 999_983, 10**8])
def test_radices_are_near_the_third_root(n):
    factors = TensorTrainEmbedding(n, 4, rank=1).row_factors
    assert math.prod(factors) >= n
    assert max(factors) <= n ** (1 / 3) + 3
    assert factors[1] == min(factors)


@pytest.mark.parametrize(
    ("d", "factors"),
    [(16, (2, 2, 4)), (32, (4, 2, 4)), (64, (4, 4, 4)), (100, (5, 4, 5)), (7, (1, 1, 7)), (1, (1, 1, 1))],
)
def test_columns_are_split_evenly(d, factors):
    assert TensorTrainEmbedding(50, d, rank=1).column_factors == factors


def test_memory():
    module = TensorTrainEmbedding(1000, 16, rank=8, row_factors=(10, 10, 10), column_factors=(2, 2, 4))
    assert module.trained_floats() == 8 * (10 * 2 + 10 * 2 * 8 + 10 * 4)
    assert module.inference_nbytes() == 4 * module.trained_floats()


@pytest.mark.parametrize("ratio", [2, 10, 100, 500])
def test_budgets_are_used_to_a_rank(ratio):
    module = TensorTrainEmbedding(10**5, 16, ratio=ratio)
    r1, r2 = module.ranks
    assert r1 - r2 in (0, 1)
    assert module.inference_nbytes() <= module.full_nbytes // ratio
    larger = TensorTrainEmbedding(10**5, 16, rank=(r2 + 1, r1))
    assert larger.inference_nbytes() > module.full_nbytes // ratio


def test_initial_cores_stay_away_from_zero():
    """Products are less peaked than those of plain normal numbers, and rows have the full table's variance."""
    module = TensorTrainEmbedding(8000, 16, rank=8, random_state=0)
    scale = [core.detach().abs().min() / core.detach().std() for core in module.cores]
    assert min(scale) > 0.8  # 2 / sqrt(5.75) but for the sample's deviation
    assert all(abs(float(core.detach().mean() / core.detach().std())) < 0.1 for core in module.cores)
    rows = module(torch.arange(8000)).detach()
    assert float(rows.var()) == pytest.approx(1 / (3 * 16), rel=0.2)
    products = torch.stack([core.detach().flatten()[:320] for core in module.cores]).prod(0)
    plain = torch.randn(3, 320, generator=torch.Generator().manual_seed(0)).prod(0)
    assert kurtosis(products) < 3 < kurtosis(plain)


def kurtosis(x):
    return float(x.pow(4).mean() / x.square().mean() ** 2)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"tt-rec needs at least 24 trained floats"):
        TensorTrainEmbedding(64, 8, num_floats=20)
    with pytest.raises(ValueError, match=r"row_factors \(2, 2, 2\) have a product below 64"):
        TensorTrainEmbedding(64, 8, row_factors=(2, 2, 2))
    with pytest.raises(ValueError, match=r"column_factors \(2, 2, 4\) have another product than 8"):
        TensorTrainEmbedding(64, 8, column_factors=(2, 2, 4))
    with pytest.raises(ValueError, match="row_factors must be three positive numbers"):
        TensorTrainEmbedding(64, 8, row_factors=(8, 8))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        TensorTrainEmbedding(64, 8, rank=0)
    with pytest.raises(IndexError, match="id 64 is out of range"):
        TensorTrainEmbedding(64, 8)(torch.tensor([64]))
