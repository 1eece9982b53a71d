"""Low rank, few bits, rows for frequent ids: what it holds, how it rounds, how it spends a budget."""

import numpy as np
import pytest
import torch

from vqrs.torch.trained.hashing import hash_ids
from vqrs.torch.trained.low_rank_int import _STEPS, LowRankIntEmbedding

N, D = 2000, 16
IDS = torch.arange(N)
ZIPF = 1e6 / np.arange(1, N + 1)


def make(**settings):
    return LowRankIntEmbedding(N, D, **({"random_state": 0} | settings))


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1188), (3, 0.0374), (4, 0.01154)])
@torch.no_grad()
def test_normal_values_are_rounded_as_well_as_uniform_levels_can(bits, error):
    module = make(rank=16, bits=bits)
    values = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    module.weight[:] = values * 0.3 + torch.arange(16)
    module._refresh()
    found = (module(IDS) - module.weight).square().mean() / 0.09
    assert float(found) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("bits", sorted(_STEPS))
@torch.no_grad()
def test_rows_are_levels_times_the_matrix(bits):
    module = make(rank=5, bits=bits)
    values = module._book()[torch.arange(5), module._numbers(module.weight).long()]
    torch.testing.assert_close(module(IDS), values @ module.projection, rtol=0, atol=1e-6)
    half = (module.levels[1] / 2)[None]
    inside = module._numbers(module.weight) % (2**bits - 1) != 0
    assert ((values - module.weight).abs() <= half * 1.0001)[inside].all()


def test_bytes():
    module = make(rank=5, bits=3)
    assert module.inference_nbytes() == N * 2 + 4 * 5 * D + 8 * 5 + 8  # 15 bits of a row
    assert module.trained_floats() == 5 * N + 5 * D
    frequent = make(rank=4, bits=2, num_rows=100, frequencies=ZIPF)
    assert frequent.inference_nbytes() == 100 + 4 * 4 * D + 8 * 4 + 8 + 4 * 90


def test_frequent_ids_have_rows_and_the_others_share():
    frequencies = np.random.default_rng(0).permutation(ZIPF)
    module = make(rank=4, bits=4, num_rows=100, frequencies=frequencies)
    places = module._places(IDS)
    own = np.argsort(-frequencies)[:90]
    assert set(places[own].tolist()) == set(range(90))
    rest = np.setdiff1d(np.arange(N), own)
    assert torch.equal(places[rest], 90 + hash_ids(IDS[rest], module.seed, 10))
    unknown = make(rank=4, num_rows=100)
    assert (unknown._places(IDS) < 90).nonzero()[:, 0].diff().unique().tolist() == [22, 23]


def test_gradients_pass_the_rounding():
    rounded, floats = make(rank=6, bits=2), make(rank=6, bits=32)
    weights = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    for module in (rounded, floats):
        (module(IDS) * weights).sum().backward()
    assert torch.equal(rounded.weight.grad, floats.weight.grad)
    assert not torch.equal(rounded.projection.grad, floats.projection.grad)


def test_levels_follow_the_weights_in_steps_and_epochs():
    module, training = make(bits=2), type("Training", (), {"step": 1})()
    before = module.levels.clone()
    with torch.no_grad():
        module.weight *= 3
    module.on_step(training)
    assert torch.equal(module.levels, before)
    training.step = 8
    module.on_step(training)
    torch.testing.assert_close(module.levels[1], 3 * before[1])
    with torch.no_grad():
        module.weight += 1
    module.on_epoch(training)
    torch.testing.assert_close(module.levels[0], 3 * before[0] + 1)


def test_all_floats_are_the_full_table():
    module = make(ratio=0.99)
    assert (module.rank, module.bits) == (D, 32)
    assert torch.equal(module(IDS), module.weight)
    assert module.inference_nbytes() == 4 * N * D + 8


@pytest.mark.parametrize("frequencies", [None, ZIPF, np.ones(N)], ids=["unknown", "zipf", "flat"])
@pytest.mark.parametrize("ratio", [1.5, 4, 10, 30, 50, 100, 200])
def test_budgets_hold_and_are_used(ratio, frequencies):
    module = make(ratio=ratio, frequencies=frequencies)
    limit = int(4 * N * D / ratio)
    assert 0.7 * limit < module.inference_nbytes() <= limit or (module.rank, module.bits) == (D, 8)


def test_what_a_budget_buys():
    shapes = [(m.rank, m.bits, len(m.weight)) for m in (make(ratio=r) for r in (2, 8, 20, 40, 400))]
    assert shapes[0] == (D, 8, N)  # no more than bytes, unless floats fit
    values = [rank * bits * rows for rank, bits, rows in shapes]
    assert values == sorted(values, reverse=True)
    assert shapes[-1][2] < N
    skewed = make(ratio=40, frequencies=1.0 / np.arange(1, N + 1) ** 2)
    # Where few ids are most of the lookups, they get finer rows.
    assert skewed.rank * skewed.bits > shapes[3][0] * shapes[3][1]
    assert len(skewed.weight) < N


def test_trained_floats_buy_values_and_bits_are_free():
    module = make(num_floats=4 * N + 4 * D)
    assert module.trained_floats() <= 4 * N + 4 * D
    assert module.bits == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 17}, "rank must be from 1 to embedding_dim=16, got 17"),
        ({"bits": 9}, "bits must be from 1 to 8, or 32, got 9"),
        ({"num_rows": 0}, "num_rows must be at least 1"),
        ({"nbytes": 80}, "low-rank-int needs at least 81 bytes here, the budget is 80"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_gradients_are_exact_without_rounding():
    module = LowRankIntEmbedding(9, 4, rank=2, bits=32, num_rows=5, random_state=0).double()
    ids = torch.arange(9)

    def rows(weight, projection):
        return torch.func.functional_call(module, {"weight": weight, "projection": projection}, (ids,))

    inputs = [p.detach().clone().requires_grad_() for p in (module.weight, module.projection)]
    assert torch.autograd.gradcheck(rows, inputs)
