"""Compositional, quotient-remainder, hash and Bloom embeddings: their identities and limits."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from vqrs.torch.trained import methods
from vqrs.torch.trained.compositional import CompositionalEmbedding, QuotientRemainderEmbedding
from vqrs.torch.trained.hash import HashEmbedding
from vqrs.torch.trained.hash_embedding import BloomEmbedding, WeightedHashEmbedding
from vqrs.torch.trained.hashing import derived_seeds, hash_bits, hash_ids

N, D = 1000, 8
IDS = torch.arange(N)


def hash_twin(module, num_rows: int = 50) -> HashEmbedding:
    """The hashing trick with the first of the module's hashes."""
    twin = HashEmbedding(N, D, num_rows=num_rows)
    twin.seed.copy_(derived_seeds(module.seed, 1)[0])
    return twin


def test_derived_seeds_are_hashes_of_their_numbers():
    seed = torch.tensor(-5)
    assert torch.equal(derived_seeds(seed, 3), torch.stack([hash_bits(torch.tensor(j), seed) for j in range(3)]))
    assert len(derived_seeds(seed, 1000).unique()) == 1000


@pytest.mark.parametrize(
    "kind",
    [HashEmbedding, CompositionalEmbedding, QuotientRemainderEmbedding, BloomEmbedding, WeightedHashEmbedding],
)
@pytest.mark.parametrize("budget", [{"ratio": 4}, {"nbytes": 3000}, {"num_floats": 700}, {"num_floats": 799}, {}])
def test_a_budget_is_used_to_within_what_a_row_more_needs(kind, budget):
    module = kind(N, D, random_state=0, **budget)
    assert module.inference_nbytes() == sum(
        t.numel() * t.element_size() for t in module.state_dict().values() if isinstance(t, torch.Tensor)
    )
    if not budget:
        return
    used, limit = {
        "ratio": lambda: (module.inference_nbytes(), 4 * N * D // 4),
        "nbytes": lambda: (module.inference_nbytes(), 3000),
        "num_floats": lambda: (module.trained_floats(), budget.get("num_floats")),
    }[next(iter(budget))]()
    row = (D + 20) * (1 if "num_floats" in budget else 4)
    assert limit - row <= used <= limit


@pytest.mark.parametrize("kind", [HashEmbedding, CompositionalEmbedding, BloomEmbedding, WeightedHashEmbedding])
@pytest.mark.parametrize("size", [{"num_rows": N}, {"ratio": 0.9}])
def test_enough_rows_are_the_full_table(kind, size):
    module = kind(N, D, random_state=0, **size)
    assert module.trained_floats() == N * D
    assert len(torch.unique(module(IDS), dim=0)) == N
    module(IDS).sum().backward()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())


def test_the_hashing_trick():
    module = HashEmbedding(N, D, num_rows=50, random_state=0)
    assert torch.equal(module(IDS), module.weight[hash_ids(IDS, module.seed, 50)])
    assert module.inference_nbytes() == 4 * 50 * D + 8
    full = HashEmbedding(N, D, num_rows=N, random_state=0)
    assert torch.equal(full(IDS), full.weight)


def test_full_quotient_remainder_is_the_full_table():
    module = QuotientRemainderEmbedding(N, D, ratio=1, random_state=0)
    assert module.inference_nbytes() == module.full_nbytes
    assert torch.equal(module(IDS), module.remainders)


def test_one_column_is_the_hashing_trick():
    module = CompositionalEmbedding(N, D, columns=1, num_rows=50, random_state=0)
    twin = hash_twin(module)
    with torch.no_grad():
        twin.weight.copy_(module.weight[0])
    assert torch.equal(module(IDS), twin(IDS))


def test_columns_are_hashed_apart():
    module = CompositionalEmbedding(N, D, columns=4, num_rows=50, random_state=0)
    out = module(IDS).view(N, 4, 2)
    for column, seed in enumerate(derived_seeds(module.seed, 4)):
        assert torch.equal(out[:, column], module.weight[column][hash_ids(IDS, seed, 50)])
    places = module.places(IDS)
    same = (places[:, 0] == places[:, 1]).float().mean()
    assert same < 0.05  # 1/50 if independent
    assert len(torch.unique(places, dim=0)) == N


@pytest.mark.parametrize(("d", "columns"), [(16, 4), (9, 3), (10, 2), (7, 1), (1, 1)])
def test_columns_by_default_divide_the_row(d, columns):
    module = CompositionalEmbedding(100, d, num_rows=5)
    assert module.weight.shape == (columns, 5, d // columns)
    assert module(torch.arange(100)).shape == (100, d)


def test_columns_that_do_not_divide_the_row_are_refused():
    with pytest.raises(ValueError, match="columns must divide embedding_dim, 8, got 3"):
        CompositionalEmbedding(N, D, columns=3)


@pytest.mark.parametrize("operation", ["multiply", "add", "concatenate"])
def test_quotient_and_remainder(operation):
    module = QuotientRemainderEmbedding(N, 7, operation=operation, num_remainders=64, random_state=0)
    q, r = module.quotients[IDS // 64], module.remainders[IDS % 64]
    expected = {"multiply": lambda: q * r, "add": lambda: q + r, "concatenate": lambda: torch.cat([r, q], 1)}
    assert torch.equal(module(IDS), expected[operation]())
    assert len(module.quotients) == math.ceil(N / 64)
    pairs = torch.stack([IDS // 64, IDS % 64], 1)
    assert len(torch.unique(pairs, dim=0)) == N
    assert len(torch.unique(module(IDS), dim=0)) == N


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_quotient_remainder_reaches_two_roots_of_rows(n):
    root = math.isqrt(n - 1) + 1
    fewest = min(min(n, root + math.ceil(n / root)), n)
    module = QuotientRemainderEmbedding(n, 1, num_floats=fewest)
    assert module.trained_floats() <= fewest
    assert len(torch.unique(module(torch.arange(n)))) == n
    if fewest > 1:
        with pytest.raises(ValueError, match=r"quotient-remainder needs at least \d+ trained floats here"):
            QuotientRemainderEmbedding(n, 1, num_floats=max(1, fewest - 1))


def test_quotient_remainder_takes_known_operations_only():
    with pytest.raises(ValueError, match="operation must be multiply, add or concatenate, got 'mul'"):
        QuotientRemainderEmbedding(N, D, operation="mul")
    with pytest.raises(ValueError, match="at least 2"):
        QuotientRemainderEmbedding(N, 1, operation="concatenate")


def test_one_hash_of_importance_one_is_the_hashing_trick():
    module = WeightedHashEmbedding(N, D, num_hashes=1, num_rows=50, random_state=0)
    twin = hash_twin(module)
    with torch.no_grad():
        module.importances.fill_(1)
        twin.weight.copy_(module.weight)
    assert torch.equal(module(IDS), twin(IDS))


def test_importances_of_one_are_a_bloom_embedding():
    module = WeightedHashEmbedding(N, D, num_hashes=3, num_rows=50, random_state=0)
    bloom = BloomEmbedding(N, D, num_hashes=3, num_rows=50)
    with torch.no_grad():
        module.importances.fill_(1)
        bloom.weight.copy_(module.weight)
        bloom.seed.copy_(module.seed)
    torch.testing.assert_close(module(IDS), 3 * bloom(IDS))


def test_importances_are_of_the_id_and_a_hash_apart():
    module = WeightedHashEmbedding(N, D, num_rows=20, random_state=0)
    assert module.importances.shape == (200, 2)
    seeds = derived_seeds(module.seed, 3)
    expected = sum(
        module.importances[hash_ids(IDS, seeds[2], 200), j, None] * module.weight[hash_ids(IDS, seeds[j], 20)]
        for j in range(2)
    )
    torch.testing.assert_close(module(IDS), expected)
    own = WeightedHashEmbedding(N, D, num_rows=20, num_importances=N, random_state=0)
    assert len(own.importances) == N
    own(torch.tensor([5])).sum().backward()
    assert own.importances.grad.nonzero()[:, 0].unique().tolist() == [5]


def test_signs_of_bloom_embeddings():
    plain = BloomEmbedding(N, D, num_rows=50, num_hashes=1, random_state=0)
    signed = BloomEmbedding(N, D, num_rows=50, num_hashes=1, signs=True, random_state=0)
    ratio = (signed(IDS) / plain(IDS)).detach().round()
    assert set(ratio.unique().tolist()) == {-1.0, 1.0}
    assert (ratio == ratio[:, :1]).all()
    assert abs(float(ratio[:, 0].mean())) < 0.15


@pytest.mark.parametrize("name", ["compositional", "quotient-remainder", "bloom", "hash-embedding"])
def test_gradients(name):
    module = methods()[name](30, 4, num_floats=60, random_state=0).double()
    ids = torch.tensor([0, 3, 3, 29])
    names, values = zip(*module.named_parameters(), strict=True)
    assert gradcheck(lambda *p: torch.func.functional_call(module, dict(zip(names, p, strict=True)), (ids,)), values)


@pytest.mark.parametrize("name", ["compositional", "quotient-remainder", "bloom", "hash-embedding"])
def test_initial_rows_have_the_variance_of_the_full_table(name):
    module = methods()[name](100_000, 16, num_floats=32_000, random_state=0)
    assert float(module(torch.arange(100_000)).detach().var()) == pytest.approx(1 / (3 * 16), rel=0.15)


@pytest.mark.parametrize("name", ["hash", "compositional", "bloom", "hash-embedding"])
def test_one_row_is_the_least(name):
    with pytest.raises(ValueError, match=f"{name} needs at least .* bytes here, the budget is 10"):
        methods()[name](N, D, nbytes=10)
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        methods()[name](N, D, num_rows=0)
