"""ROBE-Z and weighted ROBE: their limits, overlapping pieces, and the hashing trick as a case."""

import pytest
import torch
from torch.autograd import gradcheck

from vqrs.torch.trained.hash import HashEmbedding
from vqrs.torch.trained.hashing import derived_seeds, hash_ids, hash_signs
from vqrs.torch.trained.robe import RobeEmbedding, WeightedRobeEmbedding

N, D = 500, 10
IDS = torch.arange(N)


@pytest.mark.parametrize("kind", [RobeEmbedding, WeightedRobeEmbedding])
@pytest.mark.parametrize("size", [{"size": N * D}, {"size": 10**9}, {"ratio": 0.9}])
def test_an_array_of_all_values_is_the_full_table(kind, size):
    module = kind(N, D, random_state=0, **size)
    assert torch.equal(module(IDS), module.weight.view(N, D))


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 10])
@pytest.mark.parametrize("signs", [False, True])
def test_chunks_are_pieces_at_hashed_places(chunk_size, signs):
    module = RobeEmbedding(N, D, chunk_size=chunk_size, signs=signs, size=97, random_state=0)
    rows = module(IDS).detach()
    assert rows.shape == (N, D)
    seeds = derived_seeds(module.seed, -(-D // chunk_size))
    for chunk, seed in enumerate(seeds):
        start = hash_ids(IDS, seed, 97 - chunk_size + 1)
        sign = hash_signs(IDS, seed) if signs else torch.ones(N)
        for j in range(min(chunk_size, D - chunk * chunk_size)):
            assert torch.equal(rows[:, chunk * chunk_size + j], sign * module.weight.detach()[start + j])


def test_the_last_piece_ends_with_the_array():
    module = RobeEmbedding(10_000, 4, chunk_size=4, size=6, random_state=0)
    starts = hash_ids(torch.arange(10_000), derived_seeds(module.seed, 1)[0], module.num_places)
    assert starts.unique().tolist() == [0, 1, 2]


def test_aligned_pieces_of_a_whole_row_are_the_hashing_trick():
    """Starts at multiples of the row's length, as an aligned hash gives them: the lookups of a table of 7 rows."""
    module = RobeEmbedding(N, D, chunk_size=D, size=7 * D, random_state=0)
    twin = HashEmbedding(N, D, num_rows=7, random_state=0)
    with torch.no_grad():
        twin.weight.copy_(module.weight.view(7, D))
    aligned = hash_ids(IDS, twin.seed, 7)[:, None] * D
    assert torch.equal(module._pieces(aligned, D)[:, 0], twin(IDS))


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_gradients_of_overlapping_pieces_add_up(chunk_size):
    module = RobeEmbedding(N, D, chunk_size=chunk_size, size=23, random_state=0)
    upstream = torch.randn(N, D)
    module(IDS).backward(upstream)
    seeds = derived_seeds(module.seed, -(-D // chunk_size))
    starts = hash_ids(IDS[:, None], seeds, 23 - chunk_size + 1)
    expected = torch.zeros(23, dtype=torch.float64)
    for column in range(D):
        chunk, j = divmod(column, chunk_size)
        expected += torch.bincount(starts[:, chunk] + j, upstream[:, column].double(), minlength=23)
    torch.testing.assert_close(module.weight.grad, expected.float())


def test_chunks_collide_apart():
    """Ids that share a first chunk share the second by chance only, which one universal hash of both would not give."""
    starts = hash_ids(torch.arange(2000)[:, None], derived_seeds(torch.tensor(3), 2), 100)
    same = starts[:, None] == starts[None]
    same.diagonal(dim1=0, dim2=1).fill_(False)
    assert float(same[..., 1][same[..., 0]].float().mean()) == pytest.approx(0.01, abs=0.003)


def test_weighted_pieces():
    module = WeightedRobeEmbedding(N, D, num_hashes=3, size=97, random_state=0)
    array = module.weight.detach()
    seeds = derived_seeds(module.seed, 6)
    expected = torch.zeros(N, D)
    for j in range(3):
        start = hash_ids(IDS, seeds[j], 97 - D + 1)[:, None] + torch.arange(D)
        expected += array[start] * array[hash_ids(IDS, seeds[3 + j], 97)][:, None]
    torch.testing.assert_close(module(IDS).detach(), expected * (D / 3) ** 0.5)


@pytest.mark.parametrize("kind", [RobeEmbedding, WeightedRobeEmbedding])
def test_gradients(kind):
    module = kind(30, 5, size=11, random_state=0).double()
    ids = torch.tensor([0, 3, 3, 29])
    assert gradcheck(lambda w: torch.func.functional_call(module, {"weight": w}, (ids,)), module.weight)


@pytest.mark.parametrize("kind", [RobeEmbedding, WeightedRobeEmbedding])
def test_budgets_are_met_exactly(kind):
    assert kind(N, D, nbytes=1000).inference_nbytes() == 1000
    assert kind(N, D, num_floats=123).trained_floats() == 123
    assert kind(N, D, ratio=50).inference_nbytes() == 400


def test_arrays_below_a_piece_are_refused():
    with pytest.raises(ValueError, match="robe needs at least 40 bytes here, the budget is 39"):
        RobeEmbedding(N, D, nbytes=39)
    with pytest.raises(ValueError, match="weighted-robe needs at least 10 trained floats here, the budget is 9"):
        WeightedRobeEmbedding(N, D, num_floats=9)
    with pytest.raises(ValueError, match="size must be at least 8, the length of a piece, got 7"):
        RobeEmbedding(N, D, size=7)
    with pytest.raises(ValueError, match="chunk_size must be from 1 to embedding_dim, 10, got 11"):
        RobeEmbedding(N, D, chunk_size=11)
    with pytest.raises(ValueError, match="num_hashes must be at least 1"):
        WeightedRobeEmbedding(N, D, num_hashes=0)


@pytest.mark.parametrize("settings", [{"chunk_size": 1}, {}, {"signs": True}])
def test_initial_rows_have_the_variance_of_the_full_table(settings):
    module = RobeEmbedding(100_000, 16, num_floats=32_000, random_state=0, **settings)
    assert float(module(torch.arange(100_000)).detach().var()) == pytest.approx(1 / (3 * 16), rel=0.1)
