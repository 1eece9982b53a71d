"""What every method that trains a compressed table must hold, whatever it is: methods x laws."""

import copy
import json
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import vqrs
import vqrs.torch
from vqrs.torch.trained.base import Budget

METHODS = vqrs.torch.methods()
ROWS, DIM = 600, 8
FIELDS = (20, 180, 400)
FREQUENCIES = np.random.default_rng(0).zipf(1.5, ROWS).clip(0, 1000)

IN_DESIGN = {
    "full",
    "hash",
    "hash-embedding",
    "bloom",
    "compositional",
    "robe",
    "tt-rec",
    "dhe",
    "memcom",
    "dedup",
    "mgqe",
    "adaptive",
    "int8",
    "int16",
    "alpt",
    "mixed-dimension",
    "autodim",
    "optembed",
    "deeplight",
    "pep",
    "autosrh",
    "dpq",
    "cce",
    "cce-robe",
    "cafe",
    "low-rank",
}


def make(name, rows=ROWS, dim=DIM, fields=FIELDS, **settings):
    """A module of a method; without a budget, unless one is given."""
    frequencies = FREQUENCIES[:rows] if rows <= ROWS else None
    fields = fields if sum(fields) == rows else None
    settings.setdefault("random_state", 0)
    return METHODS[name](rows, dim, field_sizes=fields, frequencies=frequencies, **settings)


def at_ratio(name, ratios=(10, 4, 2, 1)):
    """A module within the tightest of some budgets that the method reaches on this small table."""
    for ratio in ratios:
        try:
            return make(name, ratio=ratio)
        except ValueError:
            continue
    pytest.fail(f"{name} reaches none of the ratios {ratios} on {ROWS} x {DIM}")


class Loop:
    """A small training loop, the protocol and nothing else: learns to tell which of two halves an id is in."""

    def __init__(self, module, epochs=3, steps=30, rate=0.02):
        self.module, self.epochs, self.steps_per_epoch, self.rate = module, epochs, steps, rate
        self.generator = torch.Generator().manual_seed(0)
        self.readout = torch.nn.Linear(module.embedding_dim, 1)
        self.losses = []

    def draw(self):
        ids = torch.randint(self.module.num_embeddings, (256,), generator=self.generator)
        return ids, (ids % 2).float()

    def loss(self, ids, labels):
        return F.binary_cross_entropy_with_logits(self.readout(self.module(ids))[:, 0], labels)

    def batch_loss(self):
        return self.loss(*self.batch)

    def validation_loss(self):
        return self.loss(*self.draw())

    @torch.no_grad()
    def validation_score(self):
        return -float(self.loss(*self.draw()))

    def run(self):
        torch.manual_seed(0)
        for stage in self.module.stages:
            self.module.enter_stage(stage)
            self.run_stage()
        return self

    def run_stage(self):
        self.step = self.epoch = 0
        groups = [{"params": list(self.readout.parameters())}, *self.module.parameter_groups()]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.rate)
        self.module.train()
        while self.epoch < self.epochs and not self.module.finished:
            self.epoch += 1
            for _ in range(self.steps_per_epoch):
                self.batch = self.draw()
                loss, penalty = self.batch_loss(), self.module.penalty()
                self.losses.append(float(loss.detach()))
                self.optimizer.zero_grad(set_to_none=True)
                (loss if penalty is None else loss + penalty).backward()
                self.optimizer.step()
                self.step += 1
                self.module.on_step(self)
                if self.module.finished:
                    break
            self.module.on_epoch(self)


@pytest.fixture(scope="module")
def trained():
    """Each method after a short training through all its stages, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = Loop(at_ratio(name)).run()
        return made[name]

    return of


every_method = pytest.mark.parametrize("name", METHODS)


def test_the_methods_of_the_design_are_there():
    assert set(METHODS) >= IN_DESIGN


@every_method
def test_says_what_it_is(name):
    method = METHODS[name]
    assert method.name == name
    assert len(method.about) > 10
    assert method.__doc__
    assert all(section in method.__doc__ for section in ("Raises\n", "Examples\n"))
    assert re.search(r"\b(19|20)\d\d\b", method.__doc__) or name == "full", "the paper and its year are missing"
    assert method.restarts <= set(method.stages)
    assert method.searches <= set(method.stages)


@every_method
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_shapes(name, dtype):
    module = at_ratio(name).eval()
    for shape in [(), (0,), (5,), (2, 3), (2, 0, 3)]:
        rows = module(torch.zeros(shape, dtype=dtype))
        assert rows.shape == (*shape, DIM)
        assert rows.dtype == torch.float32
        assert torch.isfinite(rows).all()


@every_method
def test_wrong_ids_are_refused(name):
    module = at_ratio(name)
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError, match=f"id {wrong} is out of range for a table of {ROWS} rows"):
            module(torch.tensor([3, wrong]))
    with pytest.raises(TypeError, match="integers"):
        module(torch.tensor([1.0]))


@every_method
def test_wrong_arguments_are_refused(name):
    with pytest.raises(ValueError, match="one of nbytes, ratio"):
        make(name, nbytes=10_000, ratio=2)
    with pytest.raises(ValueError, match="field_sizes"):
        METHODS[name](ROWS, DIM, field_sizes=[1, 2])
    with pytest.raises(ValueError, match="frequencies"):
        METHODS[name](ROWS, DIM, frequencies=np.ones(3))
    with pytest.raises(ValueError, match="num_embeddings"):
        METHODS[name](0, DIM)
    with pytest.raises(ValueError, match=r"ratio must be positive"):
        make(name, ratio=0)


@every_method
def test_an_unreachable_budget_names_what_can_be_reached(name):
    with pytest.raises(ValueError, match=r"at least \d+ bytes") as caught:
        make(name, nbytes=4)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert least > 4
    # What it names is within reach.
    assert Loop(make(name, nbytes=least), epochs=2, steps=6).run().module.inference_nbytes() <= least


@every_method
def test_same_id_same_row(name, trained):
    module = trained(name).module.eval()
    ids = torch.randint(ROWS, (64,), generator=torch.Generator().manual_seed(1))
    once = module(ids).detach()
    others = module(ids.repeat(2))[:64], module(ids.flip(0)).flip(0), torch.from_numpy(module.to_dense())[ids]
    # A network's product of matrices may round by the place in the batch.
    exact = {"rtol": 0, "atol": 0} if module.has_table else {"rtol": 1e-5, "atol": 1e-6}
    for other in others:
        torch.testing.assert_close(other.detach(), once, **exact)


@every_method
def test_same_random_state_same_rows(name):
    first, second, other = (at_ratio(name).eval(), at_ratio(name).eval(), make(name, random_state=1).eval())
    np.testing.assert_array_equal(first.to_dense(), second.to_dense())
    assert not np.array_equal(make(name).eval().to_dense(), other.to_dense())


@every_method
def test_initial_rows_have_a_norm_of_about_one(name):
    norms = np.linalg.norm(at_ratio(name).eval().to_dense(), axis=1)
    assert 0.02 < norms.mean() < 1.5


@every_method
def test_a_planted_problem_is_learned(name, trained):
    losses = trained(name).losses
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.005, "the loss does not fall"


@every_method
def test_budgets_are_kept_after_training(name, trained):
    module = trained(name).module
    assert module.budget is not None
    assert module.within_budget()
    assert module.inference_nbytes() <= module.budget.limit


@every_method
def test_budgets_are_used(name):
    """Four times the budget must be put to use, unless there is nothing left to gain."""
    small, large = (Loop(make(name, ratio=r), epochs=2, steps=6).run().module for r in smallest_ratios(name))
    assert large.inference_nbytes() > 1.3 * small.inference_nbytes() or name in ("full", "int8", "int16", "alpt")


def smallest_ratios(name):
    for ratio in (10, 4, 1):
        try:
            make(name, ratio=ratio)
        except ValueError:
            continue
        return ratio, ratio / 4
    pytest.fail("no ratio is reached")


@every_method
def test_bytes_are_those_that_are_held(name, trained):
    module = trained(name).module
    held = sum(t.numel() * t.element_size() for t in {id(t): t for t in module.inference_tensors()}.values())
    assert module.inference_nbytes() == held
    state = [*module.parameters(), *module.buffers()]
    assert module.training_nbytes(0) >= sum(t.numel() * t.element_size() for t in state)
    # Methods that train integers move numbers that no optimizer holds.
    in_optimizer = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert module.training_nbytes(2) - module.training_nbytes(0) == 8 * in_optimizer
    assert in_optimizer in (0, module.trained_floats())
    # Nothing as large as the table hides in attributes that are no buffers.
    hidden = [
        value
        for part in module.modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor | np.ndarray) and key != "_frequencies"
    ]
    assert sum(np.asarray(value).nbytes for value in hidden) <= 4096


@every_method
def test_state_goes_into_a_fresh_module(name, trained):
    module = trained(name).module.eval()
    fresh = copy.deepcopy(at_ratio(name))
    fresh.load_state_dict(copy.deepcopy(module.state_dict()))
    fresh.eval()
    np.testing.assert_array_equal(fresh.to_dense(), module.to_dense())
    assert fresh.stage == module.stage
    assert fresh.inference_nbytes() == module.inference_nbytes()
    again = pickle.loads(pickle.dumps(module))
    np.testing.assert_array_equal(again.to_dense(), module.to_dense())


@every_method
def test_gradients_reach_what_is_trained(name):
    module = at_ratio(name).train()
    loss = module(torch.arange(ROWS)).square().sum()
    penalty = module.penalty()
    (loss if penalty is None else loss + penalty).backward()
    groups = [p for group in module.parameter_groups() for p in group["params"]]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in groups)
    assert groups or METHODS[name].name in ("int8", "int16", "alpt")


STRAIGHT_THROUGH = {"alpt", "dpq", "dpq-sx", "int8", "int16", "low-rank-int", "mgqe", "optembed"}
"""What they round or mask has no gradient of its own: their own tests hold the one that is used in its place."""


@pytest.mark.parametrize("name", sorted(set(METHODS) - STRAIGHT_THROUGH))
def test_gradients_are_those_of_the_function(name):
    """In float64, along a random direction through all parameters at once."""
    module = at_ratio(name).double().train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(ROWS, (40,), generator=generator)
    weights = torch.randn(40, DIM, dtype=torch.float64, generator=generator)

    def value():
        module._generator.manual_seed(2)  # the same draws each time, where a method draws
        return (module(ids) * weights).sum()

    parameters = [p for group in module.parameter_groups() for p in group["params"]]
    gradients = torch.autograd.grad(value(), parameters)
    direction = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
    along = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))

    def value_at(distance):
        with torch.no_grad():
            for parameter, step in zip(parameters, direction, strict=True):
                parameter.add_(step, alpha=distance)
            found = value()
            for parameter, step in zip(parameters, direction, strict=True):
                parameter.sub_(step, alpha=distance)
        return float(found)

    assert along == pytest.approx((value_at(1e-6) - value_at(-1e-6)) / 2e-6, rel=1e-4, abs=1e-6)


@every_method
def test_tables_give_the_rows_of_the_module(name, trained, tmp_path):
    module = trained(name).module.eval()
    if not module.has_table:
        with pytest.raises(TypeError, match="no table form"):
            module.to_table()
        return
    table = module.to_table()
    assert table.shape == (ROWS, DIM)
    assert table.kind == name
    table.save(tmp_path / "table.safetensors")
    with vqrs.open(tmp_path / "table.safetensors", verify="full") as opened:
        np.testing.assert_allclose(opened[:], module.to_dense(), rtol=1e-6, atol=1e-6)
    # What inference holds is what the file holds, but for numbers of rows that stand there as they are.
    assert stored_nbytes(tmp_path / "table.safetensors") <= 1.3 * module.inference_nbytes() + 1024


def after_a_step(name, parts):
    """The state of a module after one step on ids that came in parts, a backward pass each."""
    module = at_ratio(name).train()
    ids, weights = torch.arange(0, ROWS, 3), torch.linspace(-1, 1, ROWS // 3)[:, None]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}, *module.parameter_groups()]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=0.1)

    def loss(part):
        return (module(ids[part]) * weights[part]).sum()

    for part in parts:
        loss(part).backward()
    optimizer.step()
    module.on_step(
        SimpleNamespace(
            **{"step": 1, "epoch": 1, "epochs": 3, "steps_per_epoch": 30, "optimizer": optimizer},
            batch_loss=lambda: sum(loss(part) for part in parts),
            validation_loss=lambda: loss(slice(None)),
        )
    )
    return {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"autodim", "dpq-sx", "optembed"}))
def test_passes_before_a_step_add_up(name):
    """Gradient accumulation; but for methods that normalise over a batch, or draw for each."""
    once, parts = (after_a_step(name, parts) for parts in ([slice(None)], [slice(70), slice(70, 70), slice(70, None)]))
    assert once.keys() == parts.keys()
    for key, value in once.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-5)


def stored_nbytes(path):
    """Bytes of a table file's tensors, without its header and padding."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return sum(end - start for name, (start, end) in spans.items() if not name.startswith("__pad"))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.per_id_state])
def test_large_tables_cost_what_the_budget_says(name):
    module = METHODS[name](10**8, 16, ratio=1000, random_state=0)
    assert module.inference_nbytes() <= 4 * 16 * 10**5
    assert module.training_nbytes() < 16 * 4 * 16 * 10**5
    ids = torch.tensor([0, 10**8 - 1, 12_345_678])
    assert torch.isfinite(module.eval()(ids)).all()


def test_budgets_find_the_largest_size():
    budget = Budget(100)
    assert budget.largest(lambda n: SimpleNamespace(nbytes=7 * n), 1, 1000, "x") == 14
    assert budget.largest(lambda n: SimpleNamespace(nbytes=7 * n), 1, 5, "x") == 5
    with pytest.raises(ValueError, match="x needs at least 101 bytes here, the budget is 100"):
        budget.largest(lambda n: SimpleNamespace(nbytes=100 + n), 1, 5, "x")
