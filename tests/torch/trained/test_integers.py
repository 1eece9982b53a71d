"""INT8, INT16 and ALPT: rows that are integers in training too."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vqrs.torch.trained.alpt import ALPTEmbedding, _Rounded
from vqrs.torch.trained.fixed_point import Int8Embedding, Int16Embedding
from vqrs.torch.trained.integers import stochastic_round

N, DIM = 200, 8
CLASSES = [Int8Embedding, Int16Embedding, ALPTEmbedding]


def step_of(module, ids, target, rate, repeat=1):
    """Steps on the squared distance from a target; returns the last loss."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)

    def batch_loss():
        return (module(ids) - target).square().mean()

    training = SimpleNamespace(optimizer=optimizer, batch_loss=batch_loss)
    for _ in range(repeat):
        loss = batch_loss()
        loss.backward()
        module.on_step(training)
    return loss.item()


def test_stochastic_rounding_has_the_expected_value():
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-3, 3, 61)
    rounded = stochastic_round(x.expand(20_000, -1), torch.rand(20_000, 61, generator=generator))
    fraction = x - x.floor()
    deviation = (fraction * (1 - fraction) / 20_000).sqrt()
    assert ((rounded.mean(0) - x).abs() <= 4.5 * deviation + 1e-6).all()
    assert ((rounded - x).abs() < 1).all()


@pytest.mark.parametrize("kind", CLASSES)
def test_is_integers_and_learns(kind):
    module = kind(N, DIM, random_state=0)
    assert not list(module.parameters())
    held = module.codes if kind is ALPTEmbedding else module.weight
    assert held.dtype == {Int8Embedding: torch.int8, Int16Embedding: torch.int16, ALPTEmbedding: torch.uint8}[kind]
    ids, target = torch.arange(N), 0.3 * torch.randn(N, DIM, generator=torch.Generator().manual_seed(1))
    first = step_of(module, ids, target, 0.01)
    assert step_of(module, ids, target, 0.01, repeat=100) < 0.1 * first
    rows = module.eval().to_dense()
    levels = rows / module.step.reshape(-1, 1).expand(N, -1)[:, :1].numpy()
    np.testing.assert_allclose(levels, np.round(levels), atol=0.01)


@pytest.mark.parametrize("kind", CLASSES)
def test_rows_are_within_a_step_of_what_is_stored(kind):
    """|w - ŵ| < s: a row goes where its update brings it, but for the rounding."""
    module = kind(N, DIM, random_state=0)
    module._noise = lambda like: torch.rand(like.shape, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(50)
    before = module(ids).detach()
    gradient = torch.randn(50, DIM, generator=torch.Generator().manual_seed(2))
    (module(ids) * gradient).sum().backward()
    training = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}]), batch_loss=lambda: module(ids).square().sum()
    )
    module.on_step(training)
    # The first step of row-wise Adam: the gradient over its root mean square.
    wanted = before - 0.1 * gradient / (gradient.square().mean(1, keepdim=True).sqrt() + 1e-8)
    step = module.step.reshape(-1, 1)[:50] if kind is ALPTEmbedding else module.step
    assert ((module(ids).detach() - wanted).abs() < step * 1.001).all()
    assert torch.equal(module.eval()(torch.arange(50, N)), kind(N, DIM, random_state=0)(torch.arange(50, N)))


def test_small_updates_move_rows_only_where_rounding_is_stochastic():
    ids, target = torch.arange(N), torch.full((N, DIM), 0.5)
    moved = {}
    for rounding in ("nearest", "stochastic"):
        module = Int8Embedding(N, DIM, step=0.01, rounding=rounding, random_state=0)
        before = module.to_dense()
        step_of(module, ids, target, 1e-4, repeat=300)  # steps of about a hundredth of what a level is worth
        moved[rounding] = module.to_dense() - before
    assert not moved["nearest"].any()
    # 300 steps of 1e-4 times the gradient over its root mean square in the row, which is about 1.
    mean = moved["stochastic"].mean()
    assert 0.025 < mean < 0.035


def test_values_are_clipped_and_never_wrap():
    module = Int8Embedding(3, 4, step=0.01, random_state=0)
    step_of(module, torch.arange(3), torch.full((3, 4), 100.0), 0.5, repeat=10)
    np.testing.assert_allclose(module.to_dense(), 1.27, rtol=1e-5)
    step_of(module, torch.arange(3), torch.full((3, 4), -100.0), 0.5, repeat=20)
    np.testing.assert_allclose(module.to_dense(), -1.28, rtol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_of_repeated_ids_and_of_several_passes_add_up(kind):
    module = kind(N, DIM, random_state=0)
    ids, other = torch.tensor([3, 5, 3]), torch.tensor([5, 9])
    (module(ids) * torch.tensor([[1.0], [2.0], [4.0]])).sum().backward()
    (module(other) * torch.tensor([[8.0], [16.0]])).sum().backward()
    module(torch.arange(20))  # a look without a backward pass leaves no trace
    found, gradient = module._gathered()
    assert found.tolist() == [3, 5, 9]
    assert torch.equal(gradient, torch.tensor([[5.0], [10.0], [16.0]]).expand(3, DIM))
    assert not len(module._gathered()[0])


def test_second_moments_decay_where_rows_are_absent():
    """What a row meets after 99 steps without it is what Adam's dense moments would be."""
    module = Int16Embedding(4, DIM, random_state=0)
    gradient = torch.full((1, DIM), 3.0)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    for step in range(1, 101):
        (module(torch.tensor([1 if step in (1, 100) else 2])) * gradient).sum().backward()
        before = module(torch.tensor([1])).detach()
        module.on_step(SimpleNamespace(optimizer=optimizer))
    moment = (0.001 * 9 * 0.999**99 + 0.001 * 9) / (1 - 0.999**100)
    assert module.second_moment[1].item() == pytest.approx(moment * (1 - 0.999**100), rel=1e-4)
    change = (before - module(torch.tensor([1])).detach()) / module.step
    assert change.mean().item() == pytest.approx(1e-3 * 3 / moment**0.5 / module.step.item(), abs=1)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradient_of_the_step_is_that_of_the_expected_row(bits):
    """Against finite differences of E[SR(w)] = clip(w, lowest * step, highest * step)."""
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scaled = torch.tensor([[-1.7, -0.4, 0.3, 0.6], [1.3 * highest, 0.2, 2.0 * lowest, 0.0]], dtype=torch.float64)
    step = torch.tensor([0.1, 0.03], dtype=torch.float64)
    rows, draws = scaled * step[:, None], 20_000

    def expected(step):
        return torch.maximum(torch.minimum(rows, highest * step[:, None]), lowest * step[:, None])

    delta = 1e-6
    slope = (expected(step + delta) - expected(step - delta)) / (2 * delta)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    steps = step.repeat(draws).requires_grad_()
    noise = torch.rand(2 * draws, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    rounded = _Rounded.apply(steps, rows.repeat(draws, 1), noise, lowest, highest)
    torch.testing.assert_close(rounded.view(draws, 2, 4).mean(0), expected(step), atol=0.002, rtol=0)
    (rounded * weights).sum().backward()
    found = steps.grad.view(draws, 2)
    assert ((found.mean(0) - (slope * weights).sum(1)).abs() <= 4.5 * found.std(0) / draws**0.5 + 1e-9).all()


def test_steps_are_learned_in_the_second_phase():
    """Rows beyond their levels ask for larger steps, at the steps' own rate."""
    module = ALPTEmbedding(N, DIM, n_bits=4, step_rate=1e-3, random_state=0)
    before = module.step.clone()
    ids = torch.arange(100)
    step_of(module, ids, torch.full((100, DIM), 5.0), 0.1)
    torch.testing.assert_close((module.step - before).abs()[:100], torch.full((100,), 1e-3), rtol=1e-3, atol=0)
    step_of(module, ids, torch.full((100, DIM), 5.0), 0.1, repeat=30)
    assert (module.step[:100] > before[:100]).all()
    assert torch.equal(module.step[100:], before[100:])


def test_steps_stay_positive():
    module = ALPTEmbedding(N, DIM, n_bits=8, step_rate=10.0, random_state=0)
    ids = torch.arange(N)
    step_of(module, ids, torch.zeros(N, DIM), 0.01, repeat=20)
    assert (module.step > 0).all()
    assert np.isfinite(module.to_dense()).all()


@pytest.mark.parametrize(("bits", "dim"), [(8, 3), (4, 5), (2, 7), (4, 8), (2, 8)])
def test_short_integers_are_packed(bits, dim):
    module = ALPTEmbedding(50, dim, n_bits=bits, random_state=0)
    levels = torch.randint(module.lowest, module.highest + 1, (50, dim)).float()
    assert module._packed(levels).shape == module.codes.shape == (50, -(-dim * bits // 8))
    module.codes.copy_(module._packed(levels))
    assert torch.equal(module._levels(torch.arange(50)), levels.long())


@pytest.mark.parametrize("kind", CLASSES)
def test_memory_is_that_of_the_integers(kind):
    module = kind(1000, 16, random_state=0)
    bits = {Int8Embedding: 8, Int16Embedding: 16, ALPTEmbedding: 8}[kind]
    steps = 4000 if kind is ALPTEmbedding else 4
    assert module.inference_nbytes() == 1000 * 16 * bits // 8 + steps
    # A float and a step number a row, another float for its step; the full table needs 16 bytes a value.
    state = 12_008 if kind is ALPTEmbedding else 8_008
    assert module.training_nbytes(2) == module.inference_nbytes() + state
    assert module.trained_floats() == 16_000 + (1000 if kind is ALPTEmbedding else 0)


def test_the_budget_chooses_the_bits():
    assert [ALPTEmbedding(1000, 16, ratio=ratio).n_bits for ratio in (2, 3.2, 3.3, 5, 6, 8)] == [8, 8, 4, 4, 2, 2]
    with pytest.raises(ValueError, match="alpt needs at least 8000 bytes here, the budget is 6400"):
        ALPTEmbedding(1000, 16, ratio=10)
    with pytest.raises(ValueError, match="int8 needs at least 16004 bytes here, the budget is 12800"):
        Int8Embedding(1000, 16, ratio=5)
    with pytest.raises(ValueError, match="int16 needs at least 16000 trained floats here, the budget is 15999"):
        Int16Embedding(1000, 16, num_floats=15_999)


def test_wrong_parameters_are_named():
    with pytest.raises(ValueError, match="step must be positive, got 0"):
        Int8Embedding(10, 4, step=0)
    with pytest.raises(ValueError, match='rounding must be "stochastic" or "nearest"'):
        Int8Embedding(10, 4, rounding="up")
    with pytest.raises(ValueError, match="n_bits must be one of"):
        ALPTEmbedding(10, 4, n_bits=3)
    with pytest.raises(ValueError, match="initial_step must be at least"):
        ALPTEmbedding(10, 4, initial_step=0.0)


@pytest.mark.parametrize("kind", CLASSES)
def test_small_tables_and_no_ids(kind):
    for n, dim in [(1, 1), (2, 7)]:
        module = kind(n, dim, random_state=0)
        step_of(module, torch.zeros(3, dtype=torch.int64), torch.ones(3, dim), 0.01, repeat=2)
        assert module(torch.zeros(0, dtype=torch.int64)).shape == (0, dim)
        assert np.isfinite(module.to_dense()).all()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_new_stage_forgets_the_moments(kind):
    module = kind(N, DIM, random_state=0)
    step_of(module, torch.arange(N), torch.zeros(N, DIM), 0.01, repeat=3)
    assert module.second_moment.any()
    module.enter_stage("train")
    state = [module.second_moment, module.last_step, module.steps]
    assert not any(tensor.any() for tensor in state)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Int8Embedding, {}), (Int16Embedding, {}), *((ALPTEmbedding, {"n_bits": b}) for b in (8, 4, 2))],
)
def test_tables_have_the_rows_of_evaluation(kind, settings):
    module = kind(N, DIM, random_state=0, **settings)
    step_of(module, torch.arange(N), torch.zeros(N, DIM), 0.01, repeat=3)
    np.testing.assert_array_equal(module.to_table()[:], module.to_dense())
