"""CAFE: what its sketch holds, and how ids get rows and lose them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vqrs.torch.trained.cafe import CafeEmbedding

N, D = 10_000, 8
STEP = SimpleNamespace(optimizer=SimpleNamespace(state={}))


def make(**settings):
    return CafeEmbedding(N, D, **({"num_hashed": 100, "num_hot": 200, "threshold": 50.0, "random_state": 0} | settings))


def held(module):
    return set(module.keys[module.keys >= 0].tolist())


def zipf(n, seed=0, exponent=1.2):
    generator = np.random.default_rng(seed)
    names = generator.permutation(N)
    shares = 1.0 / np.arange(1, N + 1) ** exponent
    return torch.from_numpy(names[generator.choice(N, n, p=shares / shares.sum())]), torch.from_numpy(names)


def test_the_most_frequent_ids_of_a_zipf_stream_are_held():
    module = make()
    stream, names = zipf(100_000)
    for ids in stream.split(2048):
        module.insert(ids, torch.ones(len(ids)))
    found = held(module)
    assert len(found & set(names[:100].tolist())) >= 98
    # SpaceSaving: mass is neither lost nor made, and no score is below what its id has brought.
    assert float(module.scores.sum()) == pytest.approx(100_000)
    counts = torch.bincount(stream, minlength=N)
    in_use = module.keys >= 0
    assert (module.scores[in_use] >= counts[module.keys[in_use].long()] - 0.5)[: in_use.sum()].float().mean() > 0.99


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_an_id_with_a_share_of_all_scores_is_held_as_often_as_the_theorem_says(share):
    buckets, others, kept = 50, 3000, 0
    for seed in range(60):
        module = make(num_hot=buckets, random_state=seed)
        generator = torch.Generator().manual_seed(seed)
        many = torch.randint(1, N, (others,), generator=generator)
        stream = torch.cat([torch.zeros(int(others * share / (1 - share)), dtype=torch.int64), many])
        for ids in stream[torch.randperm(len(stream), generator=generator)].split(100):
            module.insert(ids, torch.ones(len(ids)))
        kept += 0 in held(module)
    assert kept / 60 >= 1 - (1 - share) / ((4 - 1) * share * buckets) - 2 * (0.25 / 60) ** 0.5


def test_hits_add_and_a_new_id_inherits_the_smallest_score():
    module = make(num_hot=1)
    module.insert(torch.tensor([5, 6, 7, 8]), torch.tensor([1.0, 2, 3, 4]))
    module.insert(torch.tensor([6, 6]), torch.tensor([1.0, 1]))
    assert dict(zip(module.keys[0].tolist(), module.scores[0].tolist(), strict=True)) == {5: 1, 6: 4, 7: 3, 8: 4}
    module.insert(torch.tensor([9]), torch.tensor([0.5]))
    assert dict(zip(module.keys[0].tolist(), module.scores[0].tolist(), strict=True)) == {9: 1.5, 6: 4, 7: 3, 8: 4}
    module.insert(torch.arange(20, 26), torch.tensor([1.0, 2, 3, 4, 5, 6]))
    # 20 and 21 left their 3 behind in the slot of 9; then 22 (3) took it, 23 (4) the 3 of 7, and so on.
    assert float(module.scores.sum()) == 12.5 + 21
    assert held(module) == {22, 23, 24, 25}


def test_ids_with_a_row_are_not_replaced():
    module = make(num_hot=1, threshold=1e9)
    module.insert(torch.tensor([5, 6, 7, 8]), torch.tensor([1.0, 2, 3, 4]))
    module.places[module.keys == 5] = 0
    module.insert(torch.tensor([9]), torch.tensor([0.5]))
    assert held(module) == {5, 9, 7, 8}
    module.places[:] = torch.tensor([[0, 1, 2, 3]])
    module.insert(torch.tensor([10, 11]), torch.tensor([100.0, 1]))
    assert held(module) == {5, 9, 7, 8}


def train_on(module, ids, labels=None, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(module.parameters(), lr=0.01)
    optimizer.zero_grad()
    (module(ids).sum(1) * (1.0 if labels is None else labels)).sum().backward()
    optimizer.step()
    module.on_step(SimpleNamespace(optimizer=optimizer))
    return optimizer


def test_a_promoted_row_is_the_hashed_one_and_rows_have_one_id():
    module = make(num_hot=5, threshold=3.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    ids = torch.cat([torch.arange(20).repeat_interleave(4), torch.arange(100, 150)])
    optimizer = train_on(module, ids, optimizer=optimizer)
    own = module.hot_places(torch.arange(N))
    assert 1 <= (own >= 0).sum() <= 5
    promoted = (own >= 0).nonzero()[:, 0]
    assert len(own[promoted].unique()) == len(promoted)
    assert torch.equal(module(promoted), module.hashed[module._hashes(promoted)])
    for _ in range(20):
        train_on(module, ids, optimizer=optimizer)
    own = module.hot_places(torch.arange(N))
    assert len(own[own >= 0].unique()) == (own >= 0).sum()
    # Now they have gone their own way.
    assert not torch.equal(module(promoted), module.hashed[module._hashes(promoted)])


def test_scores_are_gradient_norms_of_mean_one():
    module = make(num_hot=50, threshold=1e9)
    ids = torch.tensor([3, 3, 4, 5])
    train_on(module, ids, labels=torch.tensor([1.0, 1.0, 2.0, 4.0]))
    scores = {
        int(k): float(s) for k, s in zip(module.keys[module.keys >= 0], module.scores[module.keys >= 0], strict=True)
    }
    assert scores == pytest.approx({3: 1.0, 4: 1.0, 5: 2.0})


def test_all_passes_before_a_step_count():
    ids, labels = torch.tensor([3, 3, 4, 5]), torch.tensor([1.0, 1.0, 2.0, 4.0])
    sketches = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        module = make(num_hot=50, threshold=1e9)
        found = [(module(ids[part]).sum(1) * labels[part]).sum() for part in parts]
        for loss in found:
            loss.backward()
        module.on_step(STEP)
        sketches.append(module.scores)
    torch.testing.assert_close(sketches[0], sketches[1])
    assert float(sketches[0].sum()) == pytest.approx(4)


def test_evaluation_leaves_the_sketch_alone():
    module = make(num_hot=50).eval()
    train_on(module, torch.arange(10))
    assert (module.keys == -1).all()


def test_decay_takes_rows_back():
    module = make(num_hot=4, threshold=2.0, decay=0.5)
    module.keys[0] = torch.tensor([1, 2, 3, 4])
    module.scores[0] = torch.tensor([100.0, 3, 5, 1])
    module.places[0] = torch.tensor([0, 1, 2, -1])
    module._decay()
    assert module.scores[0].tolist() == [50, 1.5, 2.5, 0.5]
    assert module.places[0].tolist() == [0, -1, 2, -1]
    module.scores[0] = torch.tensor([40.0, 2.0, 3.0, 1.0])
    module._decay()
    assert module.places[0].tolist() == [0, -1, 2, -1]  # 46 is no more than 10 · 4 · 2


def test_a_row_that_changes_hands_comes_without_the_optimizers_memory():
    module = make(num_hot=1, threshold=1.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    train_on(module, torch.tensor([3]), optimizer=optimizer)
    train_on(module, torch.tensor([3]), optimizer=optimizer)
    assert optimizer.state[module.hot]["exp_avg"].any()
    module.places[:] = -1
    module.scores[:] = 0
    train_on(module, torch.tensor([7]), optimizer=optimizer)
    assert int(module.hot_places(torch.tensor([7]))) == 0
    assert not optimizer.state[module.hot]["exp_avg"].any()


@pytest.mark.parametrize("budget", [{"ratio": r} for r in (1.2, 2, 10, 100, 1000)] + [{"num_floats": 5000}])
def test_budgets_charge_the_sketch(budget):
    module = CafeEmbedding(N, D, random_state=0, **budget)
    if "num_floats" in budget:
        assert 5000 - D < module.trained_floats() <= 5000
        return
    limit = int(4 * N * D / budget["ratio"])
    assert limit - 4 * D - 48 < module.inference_nbytes() <= limit
    assert module.inference_nbytes() == 4 * D * (len(module.hot) + len(module.hashed)) + 48 * len(module.keys) + 8
    share = {1.2: 0.7, 2: 0.7, 10: 0.5, 100: 0.3, 1000: 0.2}[budget["ratio"]]
    assert 4 * D * len(module.hashed) == pytest.approx(share * limit, abs=4 * D + 8)


def test_limits():
    full = CafeEmbedding(N, D, ratio=0.99, random_state=0)
    assert len(full.hot) == 0
    assert torch.equal(full(torch.arange(N)), full.hashed)
    least = CafeEmbedding(N, D, nbytes=40, random_state=0)
    assert (len(least.hashed), len(least.hot)) == (1, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hashed": 0}, "num_hashed must be at least 1"),
        ({"num_hot": -1}, "num_hot must be at least 0"),
        ({"hash_share": 1.5}, "hash_share must be from 0 to 1"),
        ({"threshold": 0}, "threshold must be positive"),
        ({"decay": 1}, "decay must be between 0 and 1"),
        ({"num_hashed": None, "num_hot": None, "nbytes": 39}, "cafe needs at least 40 bytes here, the budget is 39"),
        ({"nbytes": 1000}, "cafe of that size needs at least"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_ids_of_more_than_32_bits_are_refused():
    with pytest.raises(ValueError, match=f"cafe keeps ids in 32 bits, for at most {2**31} rows, got {2**31 + 1}"):
        CafeEmbedding(2**31 + 1, D, nbytes=10_000)
