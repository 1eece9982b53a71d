"""Low rank and MEmCom: their formulas, limits and memory."""

import pytest
import torch
from torch.autograd import gradcheck

from vqrs.torch.trained import methods
from vqrs.torch.trained.low_rank import LowRankEmbedding
from vqrs.torch.trained.memcom import MemcomEmbedding

N, D = 300, 12
IDS = torch.arange(N)


def test_low_rank_rows_span_a_space_of_the_rank():
    module = LowRankEmbedding(N, D, rank=3, random_state=0)
    rows = module(IDS).detach()
    torch.testing.assert_close(rows, module.weight.detach() @ module.projection.detach())
    assert torch.linalg.matrix_rank(rows.double(), rtol=1e-5) == 3
    assert module.inference_nbytes() == 4 * (N * 3 + 3 * D)


@pytest.mark.parametrize("size", [{"rank": D}, {"rank": D + 5}, {"ratio": 1}])
def test_full_rank_is_the_full_table(size):
    module = LowRankEmbedding(N, D, random_state=0, **size)
    assert module.inference_nbytes() == module.full_nbytes
    assert torch.equal(module(IDS), module.weight)


@pytest.mark.parametrize("rank", range(1, D))
def test_ranks_follow_the_budget(rank):
    floats = rank * (N + D)
    assert LowRankEmbedding(N, D, num_floats=floats).rank == rank
    assert LowRankEmbedding(N, D, nbytes=4 * floats).rank == rank
    if rank > 1:
        assert LowRankEmbedding(N, D, num_floats=floats - 1).rank == rank - 1


def test_less_than_a_value_an_id_is_refused():
    with pytest.raises(ValueError, match="low-rank needs at least 312 trained floats here, the budget is 311"):
        LowRankEmbedding(N, D, num_floats=311)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LowRankEmbedding(N, D, rank=0)


@pytest.mark.parametrize("offsets", [False, True])
def test_memcom(offsets):
    module = MemcomEmbedding(N, D, num_rows=7, offsets=offsets, random_state=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    expected = module.weight[IDS % 7] * module.multipliers[:, None]
    if offsets:
        expected = expected + module.offsets[:, None]
    assert torch.equal(module(IDS), expected)
    assert module.inference_nbytes() == 4 * (7 * D + N * (1 + offsets))


def test_memcom_starts_with_the_shared_rows_and_parts_them():
    module = MemcomEmbedding(N, D, num_rows=7, random_state=0)
    assert torch.equal(module(IDS), module.weight[IDS % 7])
    module(torch.tensor([3])).sum().backward()
    assert module.multipliers.grad.nonzero().tolist() == [[3]]
    assert module.weight.grad.abs().sum(1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("size", [{"num_rows": N}, {"num_rows": N + 1}, {"ratio": 1}])
def test_memcom_of_all_rows_is_the_full_table(size):
    module = MemcomEmbedding(N, D, random_state=0, **size)
    assert module.inference_nbytes() == module.full_nbytes
    assert torch.equal(module(IDS), module.weight)


@pytest.mark.parametrize("offsets", [False, True])
def test_memcom_uses_its_budget_to_the_row(offsets):
    own = (1 + offsets) * N
    assert MemcomEmbedding(N, D, offsets=offsets, num_floats=own + 5 * D + D - 1).num_rows == 5
    assert MemcomEmbedding(N, D, offsets=offsets, nbytes=4 * (own + 5 * D)).num_rows == 5
    with pytest.raises(ValueError, match=f"memcom needs at least {own + D} trained floats here"):
        MemcomEmbedding(N, D, offsets=offsets, num_floats=own + D - 1)


def test_memcom_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        MemcomEmbedding(N, D, num_rows=0)


@pytest.mark.parametrize("settings", [{"name": "low-rank"}, {"name": "memcom"}, {"name": "memcom", "offsets": True}])
def test_gradients(settings):
    name = settings.pop("name")
    module = methods()[name](20, 4, num_floats=70, random_state=0, **settings).double()
    ids = torch.tensor([0, 3, 3, 19])
    names, values = zip(*module.named_parameters(), strict=True)
    assert len(names) > 1
    assert gradcheck(lambda *p: torch.func.functional_call(module, dict(zip(names, p, strict=True)), (ids,)), values)


@pytest.mark.parametrize("name", ["low-rank", "memcom"])
def test_initial_rows_have_the_variance_of_the_full_table(name):
    module = methods()[name](20_000, 32, ratio=8, random_state=0)
    assert float(module(torch.arange(20_000)).detach().var()) == pytest.approx(1 / (3 * 32), rel=0.15)
