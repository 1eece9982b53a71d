"""CCE over arrays: its k-means of overlapping pieces, its pointers, its limits."""

import numpy as np
import pytest
import torch

from vqrs.torch.trained import cce
from vqrs.torch.trained.cce_robe import CCERobeEmbedding

N, D = 400, 16
IDS = torch.arange(N)


def make(**settings):
    return CCERobeEmbedding(N, D, **({"size": 90, "random_state": 0} | settings))


def windows(module):
    return module.weight[0].reshape(-1).unfold(0, D // module.num_columns, 1)


@pytest.mark.parametrize("columns", [1, 4, 16])
@torch.no_grad()
def test_after_clustering_each_id_has_the_nearest_piece_of_its_former_vector(columns):
    module = make(num_columns=columns)
    before = module(IDS).reshape(N * columns, -1)
    module.cluster()
    assert not module.weight[1].any()
    after = module(IDS).reshape(N * columns, -1)
    assert torch.equal(after, windows(module)[module.pointers_of(IDS).reshape(-1)])
    best = torch.cdist(before, windows(module), compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)
    torch.testing.assert_close((before - after).square().sum(1), best)


@torch.no_grad()
def test_a_float_is_the_mean_of_what_lies_over_it():
    module = make(iterations=200)
    before = module(IDS)
    x, places = before.reshape(-1, 4).double(), None
    module.cluster()  # to convergence: all vectors are in the sample
    places = module.pointers_of(IDS).reshape(-1, 1) + torch.arange(4)
    total = torch.zeros(90, dtype=torch.float64).index_put_((places,), x, accumulate=True)
    count = torch.zeros(90, dtype=torch.float64).index_put_((places,), torch.ones_like(x), accumulate=True)
    covered = count > 0
    assert covered.sum() > 60
    torch.testing.assert_close(
        module.weight[0].reshape(-1)[covered].double(), (total / count)[covered], atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_more_rounds_do_not_raise_the_error():
    errors = []
    for iterations in (1, 2, 4, 8):
        module = make(iterations=iterations)
        before = module(IDS)
        module.cluster()
        errors.append(float((module(IDS) - before).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@torch.no_grad()
def test_blocks_give_the_same_pointers(monkeypatch):
    whole, parts = make(), make()
    whole.cluster()
    monkeypatch.setattr(cce, "_BLOCK", 37)
    parts.cluster()
    assert torch.equal(whole.pointers, parts.pointers)
    assert torch.equal(whole(IDS), parts(IDS))


@torch.no_grad()
def test_before_clustering_pieces_start_at_hashes():
    module = make()
    found = [
        module.weight[table].reshape(-1).unfold(0, 4, 1)[module._hashes(IDS, table)].flatten(1) for table in (0, 1)
    ]
    assert torch.equal(module(IDS), found[0] + found[1])
    assert module._hashes(IDS, 0).max() == 90 - 4


def test_gradients_of_overlapping_pieces_add_up():
    module = CCERobeEmbedding(9, 4, size=5, num_columns=2, random_state=0).double()
    with torch.no_grad():
        module.cluster()
    ids = torch.arange(9)

    def rows(weight):
        return torch.func.functional_call(module, {"weight": weight}, (ids,))

    assert torch.autograd.gradcheck(rows, (module.weight.detach().clone().requires_grad_(),))


@torch.no_grad()
def test_an_array_for_all_ids_is_the_full_table():
    module = make(size=N * D)
    module.weight[1] = 0
    table = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    module.weight[0] = table.reshape(1, -1, 1)
    module.cluster()
    assert torch.equal(module(IDS), table)


@pytest.mark.parametrize("budget", [{"ratio": r} for r in (0.4, 2, 10, 100)] + [{"num_floats": 1001}])
@pytest.mark.parametrize("settings", [{}, {"bits": 8}])
def test_budgets_hold_after_clustering(budget, settings):
    module = make(size=None, **budget, **settings)
    module.cluster()
    if "num_floats" in budget:
        assert module.trained_floats() == 1000
        return
    limit = int(4 * N * D / budget["ratio"])
    assert module.inference_nbytes() <= limit
    if not module._whole:
        assert module.inference_nbytes() >= limit - (8 if module.hot is not None else 8 + N)


@torch.no_grad()
def test_frequent_ids_pull_the_array():
    frequencies = np.zeros(N)
    frequencies[:5] = 1e6
    plain, weighted = make(), make(frequencies=frequencies, weighted=True)
    before = plain(IDS)
    for module in (plain, weighted):
        module.cluster()
    moved = [(module(IDS) - before)[:5].square().sum() for module in (plain, weighted)]
    assert moved[1] < moved[0] / 3


def test_hot_ids_only():
    module = make(hot_ids=100)
    hashes = module._hashes(IDS, 0)
    module.cluster()
    rest = torch.ones(N, dtype=bool).index_fill(0, torch.arange(0, N, 4), False)
    assert torch.equal(module.pointers_of(IDS)[rest], hashes[rest])
    assert module.pointers.shape[0] == 100


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_rows": 3}, TypeError, "size and max_samples instead"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1"),
        ({"size": 3}, ValueError, "size must be at least 4, the length of a piece, got 3"),
        ({"size": None, "nbytes": 40}, ValueError, "cce-robe needs at least 48 bytes here, the budget is 40"),
    ],
)
def test_errors(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)
