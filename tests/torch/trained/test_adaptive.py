"""Rows of their own for frequent ids: the two maps, limits and budgets."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from vqrs.torch.trained.adaptive import AdaptiveEmbedding
from vqrs.torch.trained.hash import HashEmbedding
from vqrs.torch.trained.hashing import hash_ids


def make(n=2000, d=4, seed=3, **settings):
    frequencies = np.random.default_rng(seed).permutation(n)
    return frequencies, AdaptiveEmbedding(n, d, frequencies=frequencies, random_state=0, **settings)


@pytest.mark.parametrize(("n", "rows"), [(2000, 40), (2000, 400), (50, 10), (64, 33), (100_000, 60_000), (129, 128)])
def test_hot_ids_have_rows_of_their_own_and_others_share(n, rows):
    frequencies, module = make(n, num_rows=rows)
    hot = np.flatnonzero(frequencies >= n - module.num_hot)
    assert module.num_hot == rows // 2
    np.testing.assert_array_equal(module.hot_ids(), hot)
    ids = torch.arange(n)
    out = module(ids).detach()
    assert torch.equal(out[hot], module.weight.detach()[: module.num_hot])
    cold = np.setdiff1d(ids, hot)
    shared = module.num_hot + hash_ids(torch.from_numpy(cold), module.seed, rows - module.num_hot)
    assert torch.equal(out[cold], module.weight.detach()[shared])


def test_the_smaller_map_is_kept():
    n = 64 * 512 * 3 + 5
    few, many = make(n, num_rows=2000)[1], make(n, num_rows=n // 2)[1]
    assert few.hot_list.dtype == torch.int32
    assert not hasattr(few, "hot_bits")
    assert few.inference_nbytes() == 4 * 2000 * 4 + 8 + 4 * 1000
    words = -(-n // 64)
    assert not hasattr(many, "hot_list")
    assert many.inference_nbytes() == 4 * (n // 2) * 4 + 8 + 10 * words + 8 * 4
    assert 10 * words + 8 * 4 < 1.26 * n / 8
    # Ranks go on through blocks of words.
    hot = many.hot_ids()
    assert torch.equal(many._find(hot)[1], torch.arange(many.num_hot))
    assert many._find(hot)[0].all()
    assert int(many._find(torch.arange(n))[0].sum()) == many.num_hot


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_all_rows_are_the_full_table(share):
    _, module = make(hot_share=share, num_rows=2000)
    assert torch.equal(module(torch.arange(2000)), module.weight)
    assert module.inference_nbytes() == module.full_nbytes
    assert make(hot_share=share, ratio=1)[1].inference_nbytes() == module.full_nbytes


def test_no_hot_ids_are_the_hashing_trick():
    module = AdaptiveEmbedding(2000, 4, hot_share=0, num_rows=30, random_state=0)
    twin = HashEmbedding(2000, 4, num_rows=30, random_state=0)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(module(torch.arange(2000)), twin(torch.arange(2000)))
    assert module.inference_nbytes() == twin.inference_nbytes()


def test_one_row_is_left_to_share():
    _, module = make(hot_share=1, num_rows=100)
    assert module.num_hot == 99
    assert len(torch.unique(module(torch.arange(2000)), dim=0)) == 100


@pytest.mark.parametrize("n", [2000, 100_000])
@pytest.mark.parametrize("ratio", [2, 10, 60])
def test_budgets_count_the_map_and_are_used_to_the_row(n, ratio):
    _, module = make(n, 16, ratio=ratio)
    limit = module.full_nbytes // ratio
    assert limit - 2 * (64 + 4) < module.inference_nbytes() <= limit
    held = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    assert module.inference_nbytes() == sum(t.numel() * t.element_size() for t in held)


def test_gradients_of_hot_and_shared_rows():
    _, module = make(50, num_rows=6)
    module = module.double()
    ids = torch.cat([module.hot_ids()[:2], torch.tensor([0, 1, 1, 49])])
    assert gradcheck(lambda w: torch.func.functional_call(module, {"weight": w}, (ids,)), module.weight)


def test_equally_frequent_ids():
    module = AdaptiveEmbedding(100, 2, num_rows=10, frequencies=np.ones(100), random_state=0)
    assert module.hot_ids().tolist() == [0, 1, 2, 3, 4]


def test_errors():
    with pytest.raises(ValueError, match="adaptive needs frequencies"):
        AdaptiveEmbedding(100, 4, ratio=5)
    with pytest.raises(ValueError, match="hot_share must be from 0 to 1"):
        AdaptiveEmbedding(100, 4, hot_share=1.5)
    with pytest.raises(ValueError, match="adaptive needs at least 24 bytes here, the budget is 20"):
        AdaptiveEmbedding(100, 4, nbytes=20)
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        AdaptiveEmbedding(100, 4, num_rows=0)
