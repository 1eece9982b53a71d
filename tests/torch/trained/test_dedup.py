"""De-duplication: blocks of a trained table that are nearly equal become one."""

import numpy as np
import pytest
import torch

from vqrs.torch.trained.dedup import DedupEmbedding

N, DIM = 400, 8


def planted(n=N, dim=DIM, distinct=20, noise=0.0):
    """A table of few distinct rows, and which of them each row is."""
    generator = np.random.default_rng(0)
    which = np.concatenate([np.arange(distinct), generator.integers(0, distinct, n - distinct)])
    rows = generator.normal(size=(distinct, dim))[which] + noise * generator.uniform(-1, 1, (n, dim))
    return torch.from_numpy(rows.astype(np.float32)), which


def shared(table, **settings):
    module = DedupEmbedding(*table.shape, random_state=0, **settings)
    with torch.no_grad():
        module.weight.copy_(table)
    module.enter_stage("tune")
    return module


def test_equal_rows_are_found_and_nothing_is_lost():
    table, _ = planted()
    module = shared(table, nbytes=4 * DIM * 40)
    assert len(module.weight) == 20
    np.testing.assert_allclose(module.to_dense(), table.numpy(), rtol=1e-6)


def test_nearly_equal_rows_are_found_by_hashes():
    table, which = planted(noise=1e-4)
    module = shared(table, n_blocks=20)
    numbers = module._rows_of(torch.arange(N)).numpy()
    # Rows of one kind share a block, and no block is of two kinds.
    assert len(np.unique(np.stack([which, numbers]), axis=1).T) == 20
    for kind in range(20):
        mean = table.numpy()[which == kind].mean(0)
        np.testing.assert_allclose(module.to_dense()[which == kind][0], mean, atol=1e-6)


def test_blocks_begin_as_means_weighted_with_lookups():
    table = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [5.0, 5.0], [5.0, 5.0], [-3.0, 1.0]])
    module = shared(table, n_blocks=3, frequencies=[3, 1, 0, 0, 7])
    np.testing.assert_allclose(module.to_dense()[:2, 0], 1e-3 / 4, rtol=1e-3)
    np.testing.assert_allclose(module.to_dense()[2:], table[2:].numpy())


@pytest.mark.parametrize(("n", "rows"), [(400, 4), (401, 4), (403, 5)])
def test_blocks_of_several_rows_and_a_padded_last_one(n, rows):
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(rows * 3, DIM, generator=generator)
    table = pattern.repeat(-(-n // len(pattern)), 1)[:n]
    module = shared(table, rows_per_block=rows, n_blocks=4)  # 3 patterns, and the last block where it is cut
    np.testing.assert_allclose(module.to_dense(), table.numpy(), rtol=1e-6)
    assert len(module.weight) <= 4 * rows


def test_the_gradient_of_a_shared_block_is_the_sum_of_its_users():
    table, _ = planted()
    module = shared(table, n_blocks=40)
    assert module.weight.requires_grad
    ids = torch.randint(N, (64,), generator=torch.Generator().manual_seed(1))
    wanted = torch.randn(64, DIM, generator=torch.Generator().manual_seed(2))
    (module(ids) * wanted).sum().backward()
    numbers = module._rows_of(ids)
    expected = torch.stack([wanted[numbers == number].sum(0) for number in range(len(module.weight))])
    torch.testing.assert_close(module.weight.grad, expected)
    # The map is frozen.
    before = module.pointers.clone()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(module.pointers, before)


def test_blocks_are_shared_once():
    module = shared(planted(noise=0.1)[0], n_blocks=50)
    before = module.to_dense()
    module.enter_stage("tune")
    np.testing.assert_array_equal(module.to_dense(), before)


def test_less_is_lost_where_more_is_allowed():
    table = torch.randn(2000, DIM, generator=torch.Generator().manual_seed(0))
    errors = [np.square(shared(table, ratio=ratio).to_dense() - table.numpy()).mean() for ratio in (20, 8, 3, 1.5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(("n", "ratio"), [(5000, 2), (5000, 10), (5000, 100), (5000, 1000), (777, 7)])
def test_budgets_are_kept_and_used(n, ratio):
    module = shared(torch.randn(n, 16, generator=torch.Generator().manual_seed(0)), ratio=ratio)
    limit = 4 * n * 16 / ratio
    # All but a block or, where widths leave larger gaps between counts of blocks, a few percent.
    assert 0.9 * limit - 64 * module.rows_per_block < module.inference_nbytes() <= limit


def test_a_budget_of_the_whole_table_changes_nothing():
    table = torch.randn(N, DIM)
    module = shared(table, ratio=1)
    assert module.inference_nbytes() == 4 * N * DIM
    np.testing.assert_array_equal(module.to_dense(), table.numpy())


def test_budgets_out_of_reach_and_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="dedup needs at least 32 bytes here, the budget is 31"):
        DedupEmbedding(N, DIM, nbytes=31)
    with pytest.raises(ValueError, match="dedup needs at least 3200 trained floats here, the budget is 3199"):
        DedupEmbedding(N, DIM, num_floats=3199)
    with pytest.raises(ValueError, match="n_blocks must be at least 1, got 0"):
        DedupEmbedding(N, DIM, n_blocks=0)
    with pytest.raises(ValueError, match="rows_per_block must be at least 1, got 0"):
        DedupEmbedding(N, DIM, rows_per_block=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_tables(n):
    module = DedupEmbedding(n, 4, random_state=0)
    module.enter_stage("tune")
    assert module.to_dense().shape == (n, 4)
    assert np.isfinite(module.to_dense()).all()


def test_constant_tables():
    module = shared(torch.zeros(50, 4), n_blocks=5)
    assert len(module.weight) == 1
    assert not module.to_dense().any()


@pytest.mark.parametrize(("n", "rows", "blocks"), [(400, 1, 20), (401, 4, 30), (400, 2, 1), (400, 1, 400)])
def test_tables_have_the_rows_of_evaluation(n, rows, blocks):
    module = shared(planted(n, noise=0.5)[0], rows_per_block=rows, n_blocks=blocks)
    np.testing.assert_array_equal(module.to_table()[:], module.to_dense())
