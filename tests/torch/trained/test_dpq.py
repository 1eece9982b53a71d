"""DPQ and MGQE: codes that are trained, and that inference reads packed."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vqrs.torch.trained.dpq import DPQEmbedding, DPQSXEmbedding
from vqrs.torch.trained.mgqe import MGQEEmbedding

N, DIM = 300, 16
CLASSES = [DPQEmbedding, DPQSXEmbedding, MGQEEmbedding]


def make(kind, n=N, dim=DIM, **settings):
    settings = {"n_subvectors": 4, "n_bits": 4, "random_state": 0, **settings}
    return kind(n, dim, **settings)


def train(module, steps=200, seed=0, target=None, batch=64, ids_of=None):
    """Steps on the squared distance from rows of a target; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    if target is None:
        centres = torch.randn(8, module.embedding_dim, generator=generator)
        target = centres[torch.randint(8, (module.num_embeddings,), generator=generator)]
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=0.02)
    losses = []
    for step in range(steps):
        ids = torch.randint(module.num_embeddings, (batch,), generator=generator)
        optimizer.zero_grad()
        loss = (module(ids) - target[ids]).square().mean()
        loss.backward()
        optimizer.step()
        module.on_step(SimpleNamespace(step=step + 1, optimizer=optimizer))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", CLASSES)
def test_learns_and_evaluates_what_it_exports(kind):
    module = make(kind)
    losses = train(module)
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    module.eval()
    ids = torch.arange(N)
    rows = module(ids)
    # By hand: the packed codes, one after the other, and the codebooks.
    codes = module._stored_codes(ids)
    books = module.codebooks.detach()
    by_hand = torch.cat([books[part][codes[:, part]] for part in range(module.n_subvectors)], 1)
    assert torch.equal(rows, by_hand)
    assert torch.equal(module(ids[50:53]), rows[50:53])
    if module.mode == "vq":
        parts = module.queries.detach().view(N, module.n_subvectors, -1)
        for part in range(module.n_subvectors):
            distances = torch.cdist(parts[:, part], books[part])
            if kind is MGQEEmbedding:
                distances[~module.is_frequent(ids), 1 << (module.n_bits - 2) :] = torch.inf
            chosen = distances.gather(1, codes[:, part, None]).squeeze(1)
            assert torch.allclose(chosen, distances.min(1).values, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_fresh_module_takes_the_state(kind):
    module = make(kind)
    train(module, steps=20)
    state = module.state_dict()
    fresh = make(kind, random_state=1)
    fresh.load_state_dict(state)
    assert np.array_equal(fresh.to_dense(), module.to_dense())
    assert torch.equal(fresh.codes, module.codes)


@pytest.mark.parametrize("kind", CLASSES)
def test_codes_follow_queries_that_change(kind):
    module = make(kind).eval()
    module.to_dense()
    with torch.no_grad():
        module.queries[33] = module.queries[40]
    assert torch.equal(module(torch.tensor(33)), module(torch.tensor(40)))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("copied", [lambda module: module, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_codes_follow_queries_that_are_replaced(kind, copied):
    """Through ``data``, which no version number tells of, and in copies, whose version numbers begin anew."""
    module = make(kind).eval()
    first = module.to_dense()
    module.queries.data = module.queries.data.flip(0)
    module = copied(module)
    expected = make(kind).eval()
    expected.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected.queries += 0  # codes are found anew
    np.testing.assert_array_equal(module.to_dense(), expected.to_dense())
    assert not np.array_equal(module.to_dense(), first)


@pytest.mark.parametrize("kind", [DPQEmbedding, MGQEEmbedding])
def test_gradients_reach_queries_unchanged_and_entries_not_at_all(kind):
    module = make(kind)
    wanted = torch.randn(5, DIM)
    ids = torch.tensor([1, 2, 3, 2, 299])
    (module(ids) * wanted).sum().backward()
    expected = torch.zeros(N, DIM).index_add_(0, ids, wanted)
    assert torch.allclose(module.queries.grad, expected)
    assert [name for name, _ in module.named_parameters()] == ["queries"]


def test_only_chosen_entries_move():
    module = make(DPQEmbedding)
    train(module, steps=30, target=torch.randn(N, DIM), batch=256)
    with torch.no_grad():  # of some entries the next step might be the last
        module.counts.clamp_(min=1.0)
    before, counts = module.codebooks.clone(), module.counts.clone()
    ids = torch.tensor([7])
    module(ids).sum().backward()
    chosen = module._seen[0].codes[0]
    module.on_step(SimpleNamespace())
    moved = (module.codebooks != before).any(-1)
    for part in range(4):
        others = torch.arange(16) != chosen[part]
        assert not moved[part][others].any()
        # N = 0.99 N + 0.01, S = 0.99 N c + 0.01 q
        query = module.queries.detach()[7].view(4, -1)[part]
        past, entry = 0.99 * counts[part, chosen[part]], before[part, chosen[part]]
        expected = (past * entry + 0.01 * query) / (past + 0.01)
        assert torch.allclose(module.codebooks[part, chosen[part]], expected, atol=1e-6)


@pytest.mark.parametrize("kind", [DPQEmbedding, MGQEEmbedding])
def test_all_batches_before_a_step_move_entries(kind):
    ids = torch.randint(N, (40,), generator=torch.Generator().manual_seed(0))
    moved = []
    for batches in ([ids], [ids[:15], ids[15:15], ids[15:]]):
        module = make(kind)
        module.counts.fill_(1.0)  # no entry is dead, so that nothing is drawn
        for batch in batches:
            module(batch).sum().backward()
        module(torch.arange(N))  # a look without a backward pass leaves no trace
        module.on_step(SimpleNamespace())
        moved.append(module.codebooks.clone())
    torch.testing.assert_close(moved[0], moved[1])
    assert not torch.equal(moved[0], make(kind).codebooks)


def test_softmax_gradients_are_those_of_the_soft_choice():
    module = make(DPQSXEmbedding, n=40).double()
    ids, wanted = torch.arange(40), torch.randn(40, DIM, dtype=torch.float64)
    (module(ids) * wanted).sum().backward()
    queries = module.queries.detach().clone().requires_grad_()
    keys, values = (tensor.detach().clone().requires_grad_() for tensor in (module.keys, module.codebooks))
    logits = torch.einsum("npw,pkw->npk", queries.view(40, 4, 4), keys)
    logits = (logits - logits.mean(0)) / (logits.var(0, unbiased=False) + 1e-5).sqrt()
    soft = torch.einsum("npk,pkw->npw", logits.softmax(-1), values.detach()).reshape(40, DIM)
    hard = torch.einsum("npk,pkw->npw", F.one_hot(logits.argmax(-1), 16).double(), values).reshape(40, DIM)
    (soft * wanted).sum().backward()
    (hard * wanted).sum().backward()
    assert torch.allclose(module.queries.grad, queries.grad)
    assert torch.allclose(module.keys.grad, keys.grad)
    assert torch.allclose(module.codebooks.grad, values.grad)
    assert torch.allclose(module(ids), hard)


def test_running_moments_are_batch_norms():
    module, norm = make(DPQSXEmbedding), torch.nn.BatchNorm1d(64, affine=False)
    for ids in (torch.arange(50), torch.arange(30, 90)):
        module(ids)
        norm(torch.einsum("npw,pkw->npk", module.queries[ids].view(-1, 4, 4), module.keys).flatten(1))
    assert torch.allclose(module.running_mean.flatten(), norm.running_mean, atol=1e-6)
    assert torch.allclose(module.running_var.flatten(), norm.running_var, atol=1e-6)
    ids = torch.arange(N)
    expected = norm.eval()(torch.einsum("npw,pkw->npk", module.queries.view(-1, 4, 4), module.keys).flatten(1))
    module.eval()(ids)
    assert torch.equal(module._stored_codes(ids), expected.view(N, 4, 16).argmax(-1))


def test_a_batch_of_one_row_is_no_batch_to_normalise():
    module = make(DPQSXEmbedding)
    module(torch.tensor([4, 4])).sum().backward()
    assert torch.isfinite(module.queries.grad).all()
    assert torch.equal(module.running_var, torch.ones(4, 16))


def test_entries_that_nothing_uses_move_to_rows():
    """All entries far from all rows but one: without revival one code would serve everything."""
    module = make(DPQEmbedding, n=500)
    with torch.no_grad():
        module.codebooks += 100
        module.codebooks[:, 0] = 0
    train(module, steps=30, batch=256)
    module.eval()
    module._encode()
    used = [len(module._stored_codes(torch.arange(500))[:, part].unique()) for part in range(4)]
    assert min(used) >= 12


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_rare_ids_keep_to_the_first_entries(bits):
    frequencies = np.random.default_rng(0).permutation(N)
    module = make(MGQEEmbedding, n_bits=bits, frequencies=frequencies)
    train(module, steps=60)
    module.eval().to_dense()
    codes = module._stored_codes(torch.arange(N))
    head = np.zeros(N, bool)
    head[np.argsort(-frequencies)[:30]] = True
    assert np.array_equal(module.is_frequent(torch.arange(N)).numpy(), head)
    assert codes[~head].max() < 1 << max(1, bits - 2)
    if bits == 5:
        assert codes[head].max() >= 8
    ids = torch.arange(N)
    module.train()
    module(ids).sum().backward()
    assert module._seen[0].codes[~head].max() < 1 << max(1, bits - 2)


@pytest.mark.parametrize("n", [1, 7, 128, 1000, 1031])
def test_frequent_ids_are_numbered_in_their_order(n):
    frequencies = np.random.default_rng(n).integers(0, 50, n)
    module = make(MGQEEmbedding, n=n, head_share=0.4, frequencies=frequencies)
    ids = torch.arange(n)
    frequent = ids[module.is_frequent(ids)]
    assert module._rank(frequent).tolist() == list(range(len(frequent)))
    assert len(frequent) == max(1, round(0.4 * n))


def test_rare_ids_lack_fewer_bits_where_that_leaves_them_more():
    module = MGQEEmbedding(6000, 32, ratio=10)
    assert (module.n_subvectors, module.n_bits, module.fewer_bits) == (16, 6, 1)
    fixed = MGQEEmbedding(6000, 32, ratio=10, fewer_bits=2)
    assert fixed.fewer_bits == 2
    assert fixed.inference_nbytes() < module.inference_nbytes() <= 76_800


def test_without_frequencies_ids_of_each_field_are_in_order():
    module = make(MGQEEmbedding, field_sizes=[100, 200])
    frequent = module.is_frequent(torch.arange(N)).nonzero().flatten()
    assert frequent.tolist() == [*range(10), *range(100, 120)]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("n", "ratio"), [(20_000, 4.5), (20_000, 10), (20_000, 100), (777, 8), (50_000, 200)])
def test_budgets_are_used_and_kept(kind, n, ratio):
    module = kind(n, DIM, ratio=ratio, random_state=0)
    held = sum(tensor.numel() * tensor.element_size() for tensor in module.inference_tensors())
    assert held == module.inference_nbytes() == module._cost(module.n_subvectors, module.n_bits).nbytes
    assert held <= 4 * n * DIM / ratio
    assert module.to_dense().shape == (n, DIM)


@pytest.mark.parametrize("kind", CLASSES)
def test_budgets_out_of_reach_are_named(kind):
    with pytest.raises(ValueError, match=r"needs at least .* bytes here, the budget is 64"):
        kind(1000, DIM, ratio=1000)
    with pytest.raises(ValueError, match=r"needs at least .* trained floats here, the budget is 15999"):
        kind(1000, DIM, num_floats=15_999)
    module = kind(1000, DIM, num_floats=20_000)
    assert module.trained_floats() <= 20_000


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="must divide embedding_dim = 16, got 5"):
        DPQEmbedding(100, 16, n_subvectors=5)
    with pytest.raises(ValueError, match="n_bits must be from 1 to 8, got 9"):
        DPQEmbedding(100, 16, n_bits=9)
    with pytest.raises(ValueError, match='mode must be "vq" or "sx"'):
        DPQEmbedding(100, 16, mode="soft")
    with pytest.raises(ValueError, match="decay must be from 0"):
        DPQEmbedding(100, 16, decay=1.0)
    with pytest.raises(ValueError, match="head_share"):
        MGQEEmbedding(100, 16, head_share=0.0)
    with pytest.raises(ValueError, match="fewer_bits"):
        MGQEEmbedding(100, 16, fewer_bits=8)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (1, 16), (2, 7), (129, 4)])
def test_small_tables_and_no_ids(kind, n, dim):
    module = kind(n, dim, random_state=0)
    train(module, steps=3, batch=4)
    assert module(torch.zeros(0, dtype=torch.int64)).shape == (0, dim)
    module.on_step(SimpleNamespace())
    assert module.eval()(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, dim)
    assert np.isfinite(module.to_dense()).all()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_tables_have_the_rows_of_evaluation(kind, bits):
    module = make(kind, n=131, n_bits=bits)
    train(module, steps=20)
    table = module.to_table()
    np.testing.assert_array_equal(table[:], module.to_dense())
    fewer = make(kind, n=131, n_bits=bits, **({"fewer_bits": 0} if kind is MGQEEmbedding else {}))
    np.testing.assert_array_equal(fewer.to_table()[:], fewer.to_dense())
