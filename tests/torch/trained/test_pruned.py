"""Methods that prune single values."""

import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vqrs.torch.trained.autosrh import AutoSrhEmbedding
from vqrs.torch.trained.deeplight import DeepLightEmbedding, sparsity_at
from vqrs.torch.trained.export import as_table
from vqrs.torch.trained.pep import PEPEmbedding, soft_threshold
from vqrs.torch.trained.positions import find_positions, pack_positions, positions_nbytes, unpack_positions
from vqrs.torch.trained.pruned import above, find_cut, sparse_part

METHODS = [DeepLightEmbedding, PEPEmbedding, AutoSrhEmbedding]
every_method = pytest.mark.parametrize("method", METHODS)


class Loop:
    """The protocol of a training loop on a regression of random rows."""

    def __init__(self, module, epochs=2, steps=25, rate=0.02):
        self.module, self.epochs, self.steps_per_epoch, self.rate = module, epochs, steps, rate
        self.generator = torch.Generator().manual_seed(5)
        self.target = torch.randn(module.num_embeddings, module.embedding_dim, generator=self.generator) / 3

    def validation_loss(self):
        ids = torch.randint(self.module.num_embeddings, (64,), generator=self.generator)
        return (self.module(ids) - self.target[ids]).square().mean()

    batch_loss = validation_loss

    def validation_score(self):
        return -float(self.validation_loss().detach())

    def run(self, stage, each=lambda loop: None):
        self.module.train()
        self.module.enter_stage(stage)
        self.step = self.epoch = 0
        self.optimizer = torch.optim.AdamW(self.module.parameter_groups(), lr=self.rate, weight_decay=0.1)
        while self.epoch < self.epochs and not self.module.finished:
            self.epoch += 1
            for _ in range(self.steps_per_epoch):
                self.optimizer.zero_grad()
                penalty = self.module.penalty()
                loss = self.batch_loss()
                (loss if penalty is None else loss + penalty).backward()
                self.optimizer.step()
                self.step += 1
                self.module.on_step(self)
                each(self)
                if self.module.finished:
                    break
            self.module.on_epoch(self)
        return self


@pytest.mark.parametrize("count", [1, 2, 40, 700, 2500, 4999, 5000])
def test_positions_are_packed_and_come_back(count):
    generator = torch.Generator().manual_seed(count)
    positions = torch.randperm(5000, generator=generator)[:count].sort().values
    packed = pack_positions(positions, 5000)
    assert torch.equal(unpack_positions(packed, count, 5000), positions)
    assert sum(t.numel() * t.element_size() for t in packed) == positions_nbytes(count, 5000)
    # Positions alone have at least this entropy.
    share = np.array([count / 5000, 1 - count / 5000]).clip(1e-12)
    assert 8 * positions_nbytes(count, 5000) >= -5000 * (share * np.log2(share)).sum() - 16


@pytest.mark.parametrize("count", [0, 1, 5, 40, 700, 2500, 4999, 5000])
@pytest.mark.parametrize("width", [1, 8, 40])
def test_positions_are_found_where_they_are(count, width):
    generator = torch.Generator().manual_seed(count)
    # Many in one place, few in others.
    weights = torch.linspace(1, 30, 5000).pow(3)
    positions = torch.multinomial(weights, count, generator=generator).sort().values if count else torch.arange(0)
    starts = torch.randint(5000 - width + 1, (30,), generator=generator)
    starts[:2] = torch.tensor([0, 5000 - width])
    packed = pack_positions(positions, 5000)
    windows, places, numbers = find_positions(packed, count, 5000, starts, width)
    expected = [
        (window, position - start, number)
        for window, start in enumerate(starts.tolist())
        for number, position in enumerate(positions.tolist())
        if start <= position < start + width
    ]
    assert list(zip(windows.tolist(), places.tolist(), numbers.tolist(), strict=True)) == expected


def test_counts_before_blocks_find_a_bit():
    positions = torch.arange(0, 5000, 2)
    bits, before = pack_positions(positions, 5000)
    assert before.tolist() == [256 * block for block in range(10)]
    assert bits.tolist() == [0b01010101] * 625


def test_more_values_cost_more():
    module = DeepLightEmbedding(50, 8, random_state=0)
    costs = [module._cost(kept).nbytes for kept in range(1, 400)]
    assert all(first <= second for first, second in itertools.pairwise(costs))


def test_a_cut_is_exact_among_equal_scores():
    scores = torch.tensor([0.0, 1, 1, 0, 1, 2, 0, 0])
    for kept in range(1, 9):
        assert int(above(scores, torch.arange(8), find_cut(scores, kept)).sum()) == kept
    assert above(scores, torch.arange(8), find_cut(scores, 3)).nonzero()[:, 0].tolist() == [1, 2, 5]


@pytest.mark.parametrize(("dim", "kept"), [(9, 1), (9, 2), (9, 9), (300, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sparse_rows_in_a_table(dim, kept, dtype):
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(20, dim, generator=generator).argsort(1)[:, :kept].sort(1).values
    values = torch.randn(20, kept, generator=generator).to(dtype)
    module = SimpleNamespace(num_embeddings=20, embedding_dim=dim, field_sizes=(20,), name="sparse")
    table = as_table(module, sparse_part(columns, values, dim))
    expected = torch.zeros(20, dim).scatter(1, columns, values.float())
    np.testing.assert_array_equal(table[:], expected.numpy())


@every_method
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 7), (3, 20)])
def test_final_sparsity_is_exact_however_short_the_training(method, epochs, steps):
    module = method(60, 8, sparsity=0.8, random_state=0)
    for stage in module.stages:
        Loop(module, epochs, steps).run(stage)
    rows = module.eval()(torch.arange(60))
    assert module.kept == module.trained_floats() == 96
    assert int((rows != 0).sum()) == 96


@every_method
def test_pruned_values_never_change(method):
    module = method(60, 8, sparsity=0.8, random_state=0)
    Loop(module).run(module.stages[0])
    module.enter_stage(module.stages[-1])
    ids = torch.arange(60)
    before = module(ids).detach()
    module.starts, columns = module.starts.clone(), module.columns.clone()

    def still_zero(loop):
        assert not module(ids)[before == 0].any()

    Loop(module).run(module.stages[-1], still_zero)
    after = module(ids).detach()
    assert (after[before != 0] != before[before != 0]).all()
    assert torch.equal(module.columns, columns)


@every_method
@pytest.mark.parametrize("ratio", [1.2, 3, 10, 100])
def test_bytes_are_those_of_the_packed_values(method, ratio):
    module = method(700, 12, ratio=ratio, random_state=0)
    for stage in module.stages:
        Loop(module, 1, 3).run(stage)
        values, *packed = module.inference_tensors()
        used = module.inference_nbytes()
        assert used == sum(t.numel() * t.element_size() for t in [values, *packed]) <= module.budget.limit
        assert used + 8 > module.budget.limit or module.kept == module._size
        # What is packed is all that the rows need.
        table = torch.zeros(700 * 12)
        table[unpack_positions(packed, module.kept, 700 * 12)] = values.float()
        np.testing.assert_array_equal(table.reshape(700, 12), module.to_dense())
        frozen = module.packed()
        np.testing.assert_array_equal(frozen(torch.arange(700)), module.to_dense())
        assert sum(b.numel() * b.element_size() for b in frozen.buffers()) == used
        assert frozen(torch.arange(0)).shape == (0, 12)


@every_method
def test_a_whole_table_is_full(method):
    module = method(50, 6, ratio=1, random_state=0)
    assert module.kept == 300
    assert module.inference_nbytes() == 1200
    with torch.no_grad():
        module.enter_stage(module.stages[-1])
        assert torch.equal(module(torch.arange(50)), module.weight.reshape(50, 6))
        assert torch.equal(module.eval()(torch.arange(50)), module.weight.reshape(50, 6))


@every_method
def test_a_budget_of_floats(method):
    module = method(50, 6, num_floats=77, random_state=0)
    module.enter_stage(module.stages[-1])
    assert module.trained_floats() == 77
    assert module.within_budget()


@every_method
def test_saved_and_loaded_after_each_stage(method):
    module = method(60, 8, ratio=5, random_state=0)
    for stage in module.stages:
        Loop(module, 1, 5).run(stage)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = method(60, 8, ratio=5, random_state=1)
        other.load_state_dict(torch.load(file))
        assert other.stage == stage
        assert np.array_equal(module.to_dense(), other.to_dense())
        assert module.inference_nbytes() == other.inference_nbytes()


@every_method
def test_gradients_of_what_is_kept(method):
    module = method(7, 4, sparsity=0.5, random_state=0)
    module.enter_stage(module.stages[-1])
    module = module.double()
    ids = torch.tensor([6, 2, 6, 0])
    weight = module.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(module, {"weight": w}, (ids,)), [weight])


@every_method
def test_evaluation_follows_the_weights(method):
    module = method(40, 4, sparsity=0.5, random_state=0).eval()
    first = module.to_dense()
    with torch.no_grad():
        module.weight.copy_(module.weight.flip(0))
    np.testing.assert_array_equal(module.to_dense() != 0, (first != 0)[::-1])


@every_method
def test_training_holds_the_whole_table_and_then_the_kept_values(method):
    module = method(1000, 16, ratio=10, random_state=0)
    moved = sum(p.numel() for p in module.parameters())
    assert moved >= 16_000
    assert module.training_nbytes() == 4 * 4 * moved + sum(b.numel() * b.element_size() for b in module.buffers())
    module.enter_stage(module.stages[-1])
    assert module.training_nbytes() == 16 * module.kept + 4 * 1001 + module.kept + extra(module)


def extra(module):
    """Bytes of the seed that PEP draws its initial weights with."""
    return 8 if hasattr(module, "initial_seed") else 0


@every_method
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1}, "sparsity must be at least 0 and below 1, got 1"),
        ({"ratio": 1000}, "needs at least 9 bytes here, the budget is 3"),
        ({"ratio": 10, "sparsity": 0.1}, "with the sparsity 0.1 needs at least"),
    ],
)
def test_errors(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(100, 8, **settings)


@every_method
def test_a_finished_search_changes_nothing_more(method):
    module = method(60, 8, sparsity=0.8, random_state=0)
    loop = Loop(module, 2, 10).run(module.stages[0])
    assert module.finished
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.on_step(loop)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


# -- DeepLight ------------------------------------------------------------------------------------------------------


def test_schedule_of_the_paper():
    assert sparsity_at(0, 0.9) == 0
    assert sparsity_at(100, 0.9) == pytest.approx(0.9 * 0.01)
    assert sparsity_at(6900, 1.0) == pytest.approx(0.50016, abs=1e-4)


def test_deeplight_prunes_every_ten_steps_and_lets_values_grow_again():
    module = DeepLightEmbedding(100, 8, sparsity=0.9, warmup_epochs=1, prune_epochs=2, random_state=0)
    zeros, steps = [], []

    def note(loop):
        zeros.append(int((module.weight == 0).sum()))
        steps.append(loop.step)

    Loop(module, epochs=9, steps=40).run("prune", note)
    assert module.finished
    assert steps[-1] == 120  # 30 steps of warm-up (a quarter of 3 epochs), 90 of pruning
    assert not any(zeros[:39])
    needed = 100 * np.log(1e-3 / 0.9) / np.log(0.99)
    for step in range(40, 121, 10):
        assert zeros[step - 1] == int(sparsity_at((step - 30) * needed / 90, 0.9) * 800)
    # Adam moves what has been zeroed, so that between prunings some are back.
    assert zeros[44] < zeros[39]


def test_deeplight_takes_the_papers_pace_where_there_are_steps_enough():
    module = DeepLightEmbedding(100, 8, sparsity=0.5, warmup_epochs=0.01, prune_epochs=3, random_state=0)
    loop = SimpleNamespace(step=2000, epochs=10, steps_per_epoch=100_000)
    module.on_step(loop)
    assert int((module.weight == 0).sum()) == int(sparsity_at(1000, 0.5) * 800)
    assert not module.finished


# -- PEP ------------------------------------------------------------------------------------------------------------


def test_soft_threshold():
    values = torch.tensor([[0.5, -0.3, 0.1]])
    found = soft_threshold(values, torch.tensor([[-1.0, -1.0, -1.0]]))
    cut = 1 / (1 + np.e)
    np.testing.assert_allclose(found, [[0.5 - cut, -(0.3 - cut), 0]], rtol=1e-6)
    torch.testing.assert_close(soft_threshold(values, torch.tensor(-100.0)), values)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("feature-dimension", (60, 8)), ("dimension", (1, 8)), ("feature", (60, 1)), ("global", (1, 1))],
)
def test_pep_takes_up_the_initial_weights_again(granularity, shape):
    module = PEPEmbedding(60, 8, sparsity=0.8, granularity=granularity, random_state=0)
    assert module.threshold.shape == shape
    begun = module.weight.detach().clone()
    Loop(module).run("search")
    scores = (module.weight.abs() - module.threshold.sigmoid()).detach()
    assert not torch.equal(module.weight, begun)
    module.enter_stage("retrain")
    assert [p.numel() for p in module.parameters()] == [96, 0]
    rows = module(torch.arange(60)).detach()
    assert torch.equal(rows[rows != 0], begun[rows != 0])
    assert scores[rows != 0].min() >= scores[rows == 0].max()


def test_pep_ends_its_search_at_the_target():
    module = PEPEmbedding(60, 8, sparsity=0.5, random_state=0)
    shares = []
    loop = Loop(module, 4, 50, rate=0.001).run("search", lambda loop: shares.append(int((module._scores() > 0).sum())))
    assert module.finished
    assert loop.step < 100
    assert shares[0] == 480
    assert shares[-1] <= 240 < shares[-11]
    assert (module.threshold > -15).all()


def test_pep_thresholds_learn():
    module = PEPEmbedding(60, 8, random_state=0, threshold_init=-1.0)
    loss = module(torch.arange(60)).sum()
    loss.backward()
    weight, cut = module.weight.detach(), torch.tensor(-1.0).sigmoid()
    expected = -(weight.sign() * (weight.abs() > cut)).sum(0) * cut * (1 - cut)
    torch.testing.assert_close(module.threshold.grad[0], expected)


# -- AutoSrh --------------------------------------------------------------------------------------------------------


def test_autosrh_groups_by_frequency():
    frequencies = np.random.default_rng(0).permutation(60)
    module = AutoSrhEmbedding(60, 8, frequencies=frequencies, random_state=0)
    assert module.group.tolist() == ((59 - frequencies) // 10).tolist()
    assert AutoSrhEmbedding(60, 8, random_state=0).alpha.shape == (1, 8)
    with torch.no_grad():
        module.alpha[2] = 0.5
    ids = torch.arange(60)
    factor = torch.where(module.group == 2, 0.5, 1.0)[:, None]
    assert torch.equal(module(ids), module.weight * factor)


def test_autosrh_moves_alpha_alone_in_its_step():
    module = AutoSrhEmbedding(60, 8, frequencies=range(60), random_state=0)
    loop = Loop(module, 1, 10)
    weight, alpha = module.weight.detach().clone(), module.alpha.detach().clone()
    loop.batch_loss().backward()
    assert module.alpha.grad is None
    module.weight.grad = None
    loop.step = 1
    module.on_step(loop)
    assert torch.equal(module.weight, weight)
    assert module.weight.grad is None
    moved = (module.alpha - alpha).abs()
    # The largest entry moves by the whole rate, or stops at its bound of 1.
    assert 0 < moved.max() <= 0.1 + 1e-6
    assert not any(module.alpha is p for group in module.parameter_groups() for p in group["params"])


def test_autosrh_alpha_falls_where_a_column_only_hurts():
    module = AutoSrhEmbedding(40, 4, frequencies=range(40), search_epochs=1, random_state=0)
    loop = Loop(module, 1, 20, rate=0.0)
    loop.target[:] = module.weight.detach()
    loop.target[:, 3] = 0
    loop.run("search")
    alpha = module.alpha.detach()
    assert alpha[:, 3].mean() < 0.5
    assert alpha[:, :3].min() > 0.9


def test_autosrh_keeps_alpha_in_the_weights():
    module = AutoSrhEmbedding(60, 8, sparsity=0.5, frequencies=range(60), random_state=0)
    Loop(module).run("search")
    product = (module.weight * module.alpha[module.group.long()]).detach()
    module.enter_stage("retrain")
    rows = module(torch.arange(60)).detach()
    assert torch.equal(rows[rows != 0], product[rows != 0])
    assert product[rows == 0].abs().max() <= rows[rows != 0].abs().min()
    assert len(module.group) == len(module.alpha) == 0


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PEPEmbedding, {"granularity": "row"}, "granularity must be one of feature-dimension, dimension"),
        (PEPEmbedding, {"threshold_init": 1}, "threshold_init must be below -0.1, got 1"),
        (AutoSrhEmbedding, {"num_groups": 0}, "num_groups must be from 1 to 256, got 0"),
    ],
)
def test_errors_of_settings(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(100, 8, **settings)
