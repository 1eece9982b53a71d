"""Unified embeddings: one table for all lookups of all fields."""

import pytest
import torch
from torch.autograd import gradcheck

from vqrs.torch.trained.hash import HashEmbedding
from vqrs.torch.trained.hashing import derived_seeds, hash_ids
from vqrs.torch.trained.unified import UnifiedEmbedding

N, D = 500, 8
IDS = torch.arange(N)


def test_lookups_share_one_table():
    module = UnifiedEmbedding(N, D, lookups=4, num_rows=30, random_state=0)
    rows = module(IDS).view(N, 4, 2)
    for lookup, seed in enumerate(derived_seeds(module.seed, 4)):
        assert torch.equal(rows[:, lookup], module.weight[hash_ids(IDS, seed, 30)])
    module(IDS[:1]).sum().backward()
    assert float(module.weight.grad.sum()) == D  # places that coincide add up


@pytest.mark.parametrize("size", [{"num_rows": 4 * N}, {"num_rows": 10**9}, {"ratio": 0.9}])
def test_a_table_of_all_values_is_the_full_table(size):
    module = UnifiedEmbedding(N, D, random_state=0, **size)
    assert module.trained_floats() == N * D
    assert torch.equal(module(IDS), module.weight.view(N, D))


def test_one_lookup_is_the_hashing_trick():
    module = UnifiedEmbedding(N, D, lookups=1, num_rows=30, random_state=0)
    twin = HashEmbedding(N, D, num_rows=30, random_state=0)
    with torch.no_grad():
        twin.weight.copy_(module.weight)
        twin.seed.copy_(derived_seeds(module.seed, 1)[0])
    assert torch.equal(module(IDS), twin(IDS))


def test_budgets_are_used_to_a_short_row():
    assert UnifiedEmbedding(N, D, num_floats=101).trained_floats() == 100
    assert UnifiedEmbedding(N, D, nbytes=415).inference_nbytes() == 408
    with pytest.raises(ValueError, match="unified needs at least 16 bytes here, the budget is 15"):
        UnifiedEmbedding(N, D, nbytes=15)
    with pytest.raises(ValueError, match="lookups must divide embedding_dim, 8, got 3"):
        UnifiedEmbedding(N, D, lookups=3)
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        UnifiedEmbedding(N, D, num_rows=0)


def test_gradients():
    module = UnifiedEmbedding(30, 4, num_rows=5, random_state=0).double()
    ids = torch.tensor([0, 3, 3, 29])
    assert gradcheck(lambda w: torch.func.functional_call(module, {"weight": w}, (ids,)), module.weight)
