"""CCE: the clustering step by itself, its schedule, its packed pointers, and what keeps it healthy."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vqrs.torch.trained import cce
from vqrs.torch.trained.cce import CCEEmbedding
from vqrs.torch.trained.hashing import derived_seeds, hash_ids
from vqrs.torch.trained.packing import pack_rows

N, D = 1000, 16
IDS = torch.arange(N)


def make(**settings):
    return CCEEmbedding(N, D, **({"num_rows": 20, "random_state": 0} | settings))


def columns_of(module, rows):
    return rows.reshape(len(rows), module.num_columns, -1)


@pytest.mark.parametrize("columns", [1, 2, 16])
@torch.no_grad()
def test_after_clustering_each_id_has_the_nearest_centroid_of_its_former_vector(columns):
    module = make(num_columns=columns)
    before = columns_of(module, module(IDS))
    module.cluster()
    after = columns_of(module, module(IDS))
    assert not module.weight[1].any()
    for j in range(columns):
        centroids = module.weight[0, j]
        torch.testing.assert_close(after[:, j], centroids[module.pointers_of(IDS)[:, j]], rtol=0, atol=0)
        inertia = (before[:, j] - after[:, j]).square().sum(1)
        best = torch.cdist(before[:, j], centroids, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)
        torch.testing.assert_close(inertia, best)


@torch.no_grad()
def test_vectors_stay_where_there_are_no_more_distinct_ones_than_rows():
    module = make(num_rows=30, num_columns=4)
    module.weight[0, :, 5:] = module.weight[0, :, :1]
    module.weight[1, :, 5:] = module.weight[1, :, :1]  # 5 x 5 sums, at most
    before = module(IDS)
    module.cluster()
    torch.testing.assert_close(module(IDS), before, rtol=0, atol=1e-6)


@torch.no_grad()
def test_ids_of_several_blocks_get_the_pointers_of_one(monkeypatch):
    # The published code hashes anew inside the loop over batches of ids.
    whole, parts = make(), make()
    whole.cluster()
    monkeypatch.setattr(cce, "_BLOCK", 77)
    parts.cluster()
    assert torch.equal(whole.pointers, parts.pointers)
    assert torch.equal(whole(IDS), parts(IDS))


@torch.no_grad()
def test_empty_clusters_give_numbers():
    # The published code divides by the sizes of empty clusters.
    module = make(num_rows=40)
    module.weight[:] = 0
    module.weight[0, :, 0] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            module.cluster()
    assert torch.isfinite(module.weight).all()
    assert len(module(IDS).unique()) == 2


def test_before_clustering_it_is_two_hashed_tables_a_column():
    module = make(num_columns=4)
    expected = [
        sum(
            F.embedding(hash_ids(IDS, derived_seeds(module.table_seeds[t], 4)[j], 20), module.weight[t, j])
            for t in range(2)
        )
        for j in range(4)
    ]
    assert torch.equal(module(IDS), torch.cat(expected, 1))
    assert module.inference_nbytes() == 4 * 2 * 20 * D + 16  # pointers cost nothing yet


def test_pointers_are_packed():
    # The published code keeps 64 bits a pointer.
    module = make(num_rows=20, num_columns=8)
    module.cluster()
    assert module.pointers.dtype == torch.uint8
    assert module.pointers.shape == (N, 5)  # 8 pointers of 5 bits
    assert module.inference_nbytes() == 4 * 2 * 20 * D + 16 + 5 * N


def test_a_new_hash_after_clustering():
    module = make()
    first, second = (module._hashes(IDS, table) for table in (0, 1))
    module.cluster()
    assert torch.equal(module._hashes(IDS, 0), first)
    assert (module._hashes(IDS, 1) == second).float().mean() < 0.1  # 1/20 by chance
    assert not torch.equal(module.table_seeds[0], module.table_seeds[1])


def test_the_optimizer_forgets_the_weight_only():
    module, other = make(), torch.nn.Linear(D, 1)
    optimizer = torch.optim.AdamW([*module.parameters(), *other.parameters()])
    other(module(IDS)).sum().backward()
    optimizer.step()
    module.cluster(optimizer)
    assert module.weight not in optimizer.state
    assert other.weight in optimizer.state
    optimizer.step()


@pytest.mark.parametrize(
    ("epochs", "settings", "expected"),
    [
        (10, {}, [11, 21, 31, 41, 51, 61]),
        (3, {}, [11, 21]),
        (1, {}, [3, 6]),
        (10, {"cluster_epochs": range(1, 8)}, [11, 21, 31, 41, 51, 61, 71]),
        (2, {"cluster_epochs": (0.5, 1.2)}, [6, 13]),
        (5, {"cluster_epochs": ()}, []),
    ],
)
def test_the_schedule(epochs, settings, expected, monkeypatch):
    module, steps = make(**settings), []
    monkeypatch.setattr(CCEEmbedding, "cluster", lambda self, optimizer: steps.append(training.step))
    training = SimpleNamespace(epochs=epochs, steps_per_epoch=10, optimizer=None)
    for training.step in range(1, 10 * epochs + 1):
        module.on_step(training)
    assert steps == expected


@pytest.mark.parametrize("hot_ids", [20, 100, 700])
@torch.no_grad()
def test_only_hot_ids_get_learned_pointers(hot_ids):
    frequencies = np.random.default_rng(0).permutation(N)
    module = make(hot_ids=hot_ids, frequencies=frequencies)
    hashes = module._hashes(IDS, 0)
    before = columns_of(module, module(IDS))
    module.cluster()
    hot = torch.from_numpy(np.sort(np.argsort(-frequencies)[:hot_ids]))
    rest = torch.ones(N, dtype=bool).index_fill(0, hot, False)
    assert module.pointers.shape == (hot_ids, 3)  # 4 pointers of 5 bits
    assert torch.equal(module.pointers_of(IDS)[rest], hashes[rest])
    after = columns_of(module, module(IDS))
    for j in range(4):
        best = torch.cdist(before[hot, j], module.weight[0, j]).argmin(1)
        assert (module.pointers_of(hot)[:, j] == best).float().mean() > 0.99  # ties of rounding aside
        assert torch.equal(after[hot, j], module.weight[0, j, module.pointers_of(hot)[:, j]])


def test_ids_without_frequencies_are_spread():
    module = make(hot_ids=100)
    assert torch.equal(module._learned_ids(), torch.arange(0, N, 10))


@torch.no_grad()
def test_weights_pull_centroids():
    frequencies = np.zeros(N)
    frequencies[:20] = 1e6
    plain, weighted = make(num_columns=1), make(num_columns=1, frequencies=frequencies, weighted=True)
    before = plain(IDS)
    for module in (plain, weighted):
        module.cluster()
    moved = [(module(IDS) - before)[:20].square().sum() for module in (plain, weighted)]
    assert moved[1] < moved[0] / 100


@pytest.mark.parametrize("bits", [16, 8])
@torch.no_grad()
def test_stored_bits(bits):
    module = make(bits=bits, num_columns=4)
    full = make(num_columns=4)
    full.load_state_dict(module.state_dict())
    error = (module(IDS) - full(IDS)).square().sum() / full(IDS).square().sum()
    assert 0 < error < {16: 1e-6, 8: 1e-4}[bits]
    assert module.inference_nbytes() == 2 * 20 * D * bits // 8 + 16 + (2 * 4 * 4 if bits == 8 else 0)
    values = module.stored_weight()[0, 0]
    if bits == 16:
        assert torch.equal(values.half().float(), values)
    else:
        levels = values / values.abs().max() * 127
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


def test_gradients_pass_the_rounding():
    rounded, full = make(bits=8), make()
    for module in (rounded, full):
        module(IDS).sum().backward()
    assert torch.equal(rounded.weight.grad, full.weight.grad)


@pytest.mark.parametrize("settings", [{}, {"num_columns": 16}, {"bits": 8}, {"bits": 16, "num_columns": 1}])
@pytest.mark.parametrize("budget", [{"ratio": r} for r in (0.3, 1, 3, 10, 30, 100)] + [{"num_floats": 3000}])
def test_budgets_hold_after_clustering(budget, settings):
    module = make(num_rows=None, **budget, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.cluster()
    if "num_floats" in budget:
        assert 3000 - 2 * D < module.trained_floats() <= 3000
    else:
        limit = int(4 * N * D / budget["ratio"])
        assert module.inference_nbytes() <= limit
        if module.num_rows < N:
            # A row more, or a pointer more, would be too much (with a bit more a pointer at worst).
            assert module.inference_nbytes() >= limit - 8 * D - (
                N * module.num_columns / 8 if module.hot is None else 8
            )


@pytest.mark.parametrize("columns", [1, 4, 16])
def test_the_least_budget_is_two_vectors(columns):
    with pytest.raises(ValueError, match=r"cce needs at least 144 bytes here, the budget is 143"):
        make(num_rows=None, num_columns=columns, nbytes=143)
    assert make(num_rows=None, num_columns=columns, nbytes=144).inference_nbytes() == 144


@torch.no_grad()
def test_a_vector_for_each_id_is_the_full_table():
    module = make(num_rows=N, num_columns=4)
    module.weight[1] = 0
    table = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    module.weight[0] = table.reshape(N, 4, 4).transpose(0, 1)
    module.cluster()
    assert torch.equal(module(IDS), table)
    assert module.inference_nbytes() == 8 * N * D + 16


@torch.no_grad()
def test_health_and_the_warning_of_collapse():
    module = make(num_columns=4, num_rows=16)
    health = module.health()
    assert 3.9 < health["column_entropy"] <= 4
    assert 7.7 < health["pair_entropy"] <= 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.cluster()
    pointers = module.pointers_of(IDS).clone()
    pointers[:, 2] = pointers[:, 1]
    module.pointers = pack_rows(pointers, 4)
    assert module.health()["pair_entropy"] == pytest.approx(module._entropies()[0][1])
    assert "columns 1 and 2 say the same" in module._collapse()
    module.weight[:] = 0
    with pytest.warns(UserWarning, match=r"pointers of cce have collapsed: those of a column have an entropy of 0.00"):
        module.cluster()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_columns": 3}, "must divide embedding_dim=16, got 3"),
        ({"num_columns": 0}, "must divide"),
        ({"bits": 7}, "bits must be 32, 16 or 8, got 7"),
        ({"weighted": True}, "needs frequencies"),
        ({"pointer_share": 2}, "pointer_share must be from 0 to 1, got 2"),
        ({"num_rows": 0}, "num_rows must be at least 1, got 0"),
        ({"hot_ids": -1}, "hot_ids must be at least 0"),
        ({"num_rows": 20, "nbytes": 100}, "cce of that size needs at least 2576 bytes"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_gradients_are_exact():
    module = CCEEmbedding(9, 4, num_rows=3, num_columns=2, random_state=0).double()
    ids = torch.arange(9)

    def rows(weight):
        return torch.func.functional_call(module, {"weight": weight}, (ids,))

    assert torch.autograd.gradcheck(rows, (module.weight.detach().clone().requires_grad_(),))
