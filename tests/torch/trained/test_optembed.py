import io

import numpy as np
import pytest
import torch

from vqrs.torch.trained.optembed import OptEmbedEmbedding, _Step, evolve
from vqrs.torch.trained.positions import unpack_positions

FIELDS = [5, 45, 250]
ROWS = sum(FIELDS)


class Loop:
    """The protocol of a training loop on a regression of rows."""

    def __init__(self, module, epochs=2, steps=15, target=None):
        self.module, self.epochs, self.steps_per_epoch = module, epochs, steps
        self.generator = torch.Generator().manual_seed(5)
        shape = (module.num_embeddings, module.embedding_dim)
        self.target = torch.randn(shape, generator=self.generator) / 3 if target is None else target
        self.asked = 0

    def loss(self, ids):
        return (self.module(ids) - self.target[ids]).square().mean()

    @torch.no_grad()
    def validation_score(self):
        self.asked += 1
        self.within = self.module.within_budget()
        return -float(self.loss(torch.arange(self.module.num_embeddings)))

    def run(self, stage):
        self.module.train()
        self.module.enter_stage(stage)
        self.step = 0
        self.optimizer = torch.optim.AdamW(self.module.parameter_groups(), lr=0.02)
        while self.step < self.epochs * self.steps_per_epoch and not self.module.finished:
            self.optimizer.zero_grad()
            loss = self.loss(torch.randint(self.module.num_embeddings, (128,), generator=self.generator))
            penalty = self.module.penalty()
            (loss if penalty is None else loss + penalty).backward()
            self.optimizer.step()
            self.step += 1
            self.module.on_step(self)
        return self


def make(**settings):
    return OptEmbedEmbedding(ROWS, 8, **({"field_sizes": FIELDS, "random_state": 0} | settings))


def test_no_thresholds_and_whole_dimensions_are_the_full_table():
    module = make().eval()
    ids = torch.arange(ROWS)
    with torch.no_grad():
        module.threshold.fill_(-torch.inf)
    assert torch.equal(module(ids), module.weight)
    assert module.inference_nbytes() == module.full_nbytes
    whole = make(ratio=1).eval()
    whole.keep([8, 8, 8])
    assert torch.equal(whole(ids), whole.weight)
    module(ids).sum().backward()
    assert torch.equal(module.weight.grad, torch.ones(ROWS, 8))


def test_rows_below_their_threshold_are_zero():
    module = make().eval()
    norms = module.weight.detach().abs().sum(1)
    with torch.no_grad():
        module.threshold[1] = norms[5:50].median()
    found = module(torch.arange(ROWS)).detach()
    kept = torch.ones(ROWS, dtype=torch.bool)
    kept[5:50] = norms[5:50] > norms[5:50].median()
    assert int(kept.sum()) == ROWS - 23
    assert torch.equal(found, module.weight * kept[:, None])


def test_surrogate_gradient_of_the_step():
    x = torch.tensor([-2.0, -0.7, -0.2, 0.0, 0.3, 0.9, 1.5], requires_grad=True)
    y = _Step.apply(x)
    assert y.tolist() == [0, 0, 0, 0, 1, 1, 1]
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0, 0.4, 1.2, 2.0, 0.8, 0.4, 0]))


def test_supernet_draws_dimensions_of_fields():
    module = make().train()
    ids = torch.arange(ROWS)
    seen = set()
    for _ in range(40):
        filled = (module(ids) != 0).detach()
        for start, end in [(0, 5), (5, 50), (50, 300)]:
            columns = filled[start:end].any(0)
            dim = int(columns.sum())
            assert columns.tolist() == [column < dim for column in range(8)]
            assert torch.equal(filled[start:end], columns.expand(end - start, 8))
            seen.add(dim)
    assert seen == set(range(1, 9))


def test_thresholds_learn():
    module = make()
    penalty = module.penalty()
    assert penalty.item() == pytest.approx(3e-5)
    penalty.backward()
    torch.testing.assert_close(module.threshold.grad, torch.full((3,), -1e-5))
    Loop(module).run("supernet")
    assert (module.threshold != 0).all()
    assert module.parameter_groups()[1]["lr"] == 1e-4


def test_evolution_finds_the_best_and_asks_once():
    asked = []

    def score(dims):
        asked.append(dims)
        return -sum((dim - goal) ** 2 for dim, goal in zip(dims, (3, 7, 1, 5), strict=True))

    best = evolve(score, [(8,) * 4, (1,) * 4], 8, generations=30, generator=np.random.default_rng(0))
    assert best == (3, 7, 1, 5)
    assert len(set(asked)) == len(asked) <= 602
    assert all(1 <= dim <= 8 for dims in asked for dim in dims)


@pytest.mark.parametrize("ratio", [1.5, 4, 10, 60])
@pytest.mark.parametrize("dims", [(8, 8, 8), (1, 1, 1), (8, 3, 1)])
def test_budgets_decide_between_rows_and_columns(ratio, dims):
    module = make(ratio=ratio).eval()
    module.keep(dims)
    used = module.inference_nbytes()
    limit = module.budget.limit
    assert used <= limit
    found = module(torch.arange(ROWS)).detach()
    filled = (found != 0).sum(1)
    assert all(now >= asked for now, asked in zip(module.dims.tolist(), dims, strict=True)) or ratio == 60
    if (filled == 0).any():
        # The rows that are left out are the shortest, and one more would not fit.
        norms = module.weight.detach().abs().sum(1)
        assert norms[filled == 0].max() <= norms[filled > 0].min()
        assert used + 4 * 8 + 2 > limit
    else:
        assert used + 4 * 250 > limit


def test_what_is_held_gives_the_rows():
    module = make(ratio=5)
    for stage in module.stages:
        Loop(module).run(stage)
    values, *packed, dims = module.inference_tensors()
    n_kept = int((module.offsets >= 0).sum())
    kept = unpack_positions(packed, n_kept, ROWS)
    rows, at = np.zeros((ROWS, 8), np.float32), 0
    for row in kept.tolist():
        dim = int(dims[0 if row < 5 else 1 if row < 50 else 2])
        rows[row, :dim] = values[at : at + dim]
        at += dim
    assert at == len(values) == module.trained_floats()
    np.testing.assert_array_equal(rows, module.to_dense())


def test_the_search_leaves_weights_alone_and_keeps_to_the_budget():
    module = make(ratio=4, generations=2)
    Loop(module).run("supernet")
    before = module.weight.detach().clone()
    loop = Loop(module).run("search")
    assert module.finished
    assert loop.step == 1
    assert loop.within
    assert 14 <= loop.asked <= 54
    assert torch.equal(module.weight, before)
    chosen = module.eval()(torch.arange(ROWS)).detach()
    module.enter_stage("retrain")
    assert torch.equal(module(torch.arange(ROWS)), chosen)


def test_the_search_finds_columns_that_matter():
    target = torch.zeros(ROWS, 8)
    target[5:50] = 1.0
    module = make(generations=8)
    with torch.no_grad():
        module.weight.fill_(0.5)
        module.weight[5:50] = 1.0
    module.enter_stage("search")
    module.on_step(Loop(module, target=target))
    assert module.dims.tolist() == [1, 8, 1]


def test_left_out_values_stay_zero_in_retraining():
    module = make(ratio=5)
    Loop(module, 1, 5).run("supernet")
    module.enter_stage("retrain")
    ids = torch.arange(ROWS)
    before = module(ids).detach()
    Loop(module).run("retrain")
    after = module(ids).detach()
    assert not after[before == 0].any()
    assert (after[before != 0] != before[before != 0]).float().mean() > 0.9
    assert module.training_nbytes() == 16 * module.trained_floats() + 4 * ROWS + 4 * 3


def test_saved_and_loaded_in_each_stage():
    module = make(ratio=5)
    for stage in module.stages:
        Loop(module, 1, 5).run(stage)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = make(ratio=5, random_state=1)
        other.load_state_dict(torch.load(file))
        assert other.stage == stage
        np.testing.assert_array_equal(other.to_dense(), module.to_dense())
        assert other.inference_nbytes() == module.inference_nbytes()


@pytest.mark.parametrize("ratio", [None, 1, 2, 5, 30])
def test_a_packed_module_holds_what_is_counted(ratio):
    module = make(ratio=ratio)
    for stage in module.stages:
        Loop(module, 1, 5).run(stage)
        packed = module.packed()
        np.testing.assert_array_equal(packed(torch.arange(ROWS)), module.to_dense())
        assert sum(b.numel() * b.element_size() for b in packed.buffers()) == module.inference_nbytes()
    assert packed(torch.arange(0)).shape == (0, 8)


def test_a_finished_search_is_not_repeated():
    module = make(ratio=5, generations=0)
    loop = Loop(module).run("search")
    asked = loop.asked
    module.on_step(loop)
    assert loop.asked == asked > 0


def test_gradients_of_what_is_kept():
    module = OptEmbedEmbedding(6, 4, field_sizes=[2, 4], num_floats=11, random_state=0)
    module.keep([3, 2])
    module.enter_stage("retrain")
    module = module.double()
    weight = module.weight.detach().clone().requires_grad_()
    ids = torch.tensor([5, 0, 5, 3])
    assert len(weight) <= 11
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(module, {"weight": w}, (ids,)), [weight])


def test_errors():
    with pytest.raises(ValueError, match="generations must not be negative, got -1"):
        make(generations=-1)
    with pytest.raises(ValueError, match="optembed needs at least 13 bytes here, the budget is 9"):
        make(ratio=1000)
