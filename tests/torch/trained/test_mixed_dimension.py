import io
import itertools
import math

import numpy as np
import pytest
import torch

from vqrs.torch.trained.mixed_dimension import MixedDimensionEmbedding, popular_dims

FIELDS = [3, 40, 500, 6000]
ROWS = sum(FIELDS)


def test_temperature_0_is_the_full_table():
    module = MixedDimensionEmbedding(ROWS, 12, field_sizes=FIELDS, temperature=0, random_state=0)
    assert module.dims == (12,) * 4
    assert module.inference_nbytes() == module.trained_floats() * 4 == module.full_nbytes
    table = torch.cat([getattr(module, f"weight_{field}") for field in range(4)])
    ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(ids), table[ids])


def test_a_budget_of_the_whole_table_is_the_full_table():
    assert MixedDimensionEmbedding(ROWS, 12, field_sizes=FIELDS, ratio=1, random_state=0).dims == (12,) * 4


def test_rows_are_projected_by_their_field():
    module = MixedDimensionEmbedding(ROWS, 16, field_sizes=FIELDS, dims=[16, 8, 4, 2], random_state=0)
    ids = torch.tensor([6542, 0, 43, 42, 3, 2, 543])  # fields 3, 0, 2, 1, 1, 0, 3
    expected = [(3, 5999), (0, 0), (2, 0), (1, 39), (1, 0), (0, 2), (3, 0)]
    for row, (field, local) in zip(module(ids), expected, strict=True):
        wanted = getattr(module, f"weight_{field}")[local]
        if field:
            wanted = wanted @ getattr(module, f"projection_{field}")
        torch.testing.assert_close(row, wanted)
    assert module.inference_nbytes() == 4 * (3 * 16 + 40 * 8 + 8 * 16 + 500 * 4 + 4 * 16 + 6000 * 2 + 2 * 16)


def test_dimensions_are_powers_of_two_of_the_rule():
    sizes = [300, 4000, 50_000, 600_000]
    wished = [64 * (size / 300) ** -0.4 for size in sizes]
    assert popular_dims(sizes, 64, 0.4) == [2 ** round(math.log2(wish)) for wish in wished] == [64, 32, 8, 4]
    # Two rows of 64 columns are fewer floats than two rows of 32 and a projection.
    assert popular_dims([2, 5000], 64, 0.0, scale=1 / 2) == [64, 32]


@pytest.mark.parametrize("fields", [FIELDS, [ROWS], [3000, 3543], [1] * 5])
@pytest.mark.parametrize("ratio", [1.5, 3, 10])
def test_budgets_are_used_and_kept(fields, ratio):
    n = sum(fields)
    if len(fields) == 5:
        with pytest.raises(ValueError, match="mixed-dimension needs at least 320 bytes here"):
            MixedDimensionEmbedding(n, 16, field_sizes=fields, ratio=ratio)
        return
    module = MixedDimensionEmbedding(n, 16, field_sizes=fields, ratio=ratio, random_state=0)
    used = module.inference_nbytes()
    assert used == sum(p.numel() * 4 for p in module.parameters()) <= module.full_nbytes / ratio
    # No field could have another column.
    for field, dim in enumerate(module.dims):
        if dim < 16:
            dims = [*module.dims[:field], dim + 1, *module.dims[field + 1 :]]
            with pytest.raises(ValueError, match="the budget is"):
                MixedDimensionEmbedding(n, 16, field_sizes=fields, ratio=ratio, dims=dims)
    sizes = sorted(zip(fields, module.dims, strict=True))
    assert all(small[1] >= large[1] for small, large in itertools.pairwise(sizes))


def test_a_budget_of_floats():
    module = MixedDimensionEmbedding(1000, 16, num_floats=5 * 1016 + 1000, random_state=0)
    assert module.dims == (5,)
    assert module.trained_floats() == 5 * 1016


def test_one_low_dimensional_table_learns_a_table_of_that_rank():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(60, 3, generator=generator) @ torch.randn(3, 12, generator=generator) / 3
    module = MixedDimensionEmbedding(60, 12, dims=[3], random_state=0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    ids = torch.arange(60)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (module(ids) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3 * target.square().mean()


def test_initial_rows_are_as_long_whatever_the_dimension():
    for dim in (1, 4, 16, 32):
        module = MixedDimensionEmbedding(4000, 32, dims=[dim], random_state=0)
        assert np.square(module.to_dense()).sum(1).mean() == pytest.approx(1 / 3, rel=0.35)


def test_gradients_in_float64():
    module = MixedDimensionEmbedding(9, 4, field_sizes=[2, 7], dims=[4, 2], random_state=0).double()
    ids = torch.tensor([8, 0, 8, 1])
    parameters = [p.detach().requires_grad_() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def rows(*values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (ids,))

    assert torch.autograd.gradcheck(rows, parameters)


def test_saved_and_loaded():
    module, other = (
        MixedDimensionEmbedding(ROWS, 16, field_sizes=FIELDS, ratio=8, random_state=seed) for seed in (0, 1)
    )
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert np.array_equal(module.to_dense(), other.to_dense())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": [2, 2]}, "dims must be 1 numbers from 1 to 8"),
        ({"dims": [9]}, "dims must be 1 numbers from 1 to 8"),
        ({"temperature": 2}, "temperature must be from 0 to 1, got 2"),
        ({"ratio": 10}, "mixed-dimension needs at least 432 bytes here, the budget is 320"),
        ({"ratio": 4, "dims": [3]}, r"dimensions \(3,\) needs at least 1296 bytes here, the budget is 800"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        MixedDimensionEmbedding(100, 8, **settings)


def test_no_ids():
    module = MixedDimensionEmbedding(ROWS, 12, field_sizes=FIELDS, ratio=8, random_state=0)
    rows = module(torch.arange(0))
    assert rows.shape == (0, 12)
    rows.sum().backward()  # an empty batch has gradients as any other has
