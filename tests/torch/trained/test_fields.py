"""Embeddings of several fields."""

import numpy as np
import pytest
import torch

import vqrs.torch
from vqrs.torch.trained.fields import FieldEmbeddings
from vqrs.torch.trained.full import FullEmbedding
from vqrs.torch.trained.hash import HashEmbedding

SIZES = (500, 4, 300, 7)


def of_fields(method=HashEmbedding, **settings):
    return FieldEmbeddings(method, SIZES, 8, random_state=0, **settings)


def ids_of(n, seed=0):
    generator = np.random.default_rng(seed)
    starts = np.r_[0, np.cumsum(SIZES)[:-1]]
    return torch.from_numpy(np.stack([generator.integers(size, size=n) for size in SIZES], 1) + starts)


def test_small_fields_are_whole_and_the_budget_holds_for_all():
    embedding = of_fields(ratio=10)
    kept, main = embedding.parts
    assert isinstance(kept, FullEmbedding)
    assert kept.field_sizes == (4, 7)
    assert main.field_sizes == (500, 300)
    assert embedding.inference_nbytes() <= embedding.full_nbytes / 10
    assert embedding.inference_nbytes() > 0.95 * embedding.full_nbytes / 10
    # Beside a budget of a few rows no field is small.
    assert len(of_fields(nbytes=10 * 32).parts) == 1


def test_rows_stand_where_their_fields_do():
    embedding = of_fields(ratio=10).eval()
    ids = ids_of(50)
    rows = embedding(ids)
    assert rows.shape == (50, 4, 8)
    kept, main = embedding.parts
    torch.testing.assert_close(rows[:, 1], kept(ids[:, 1] - 500))
    torch.testing.assert_close(rows[:, 3], kept(ids[:, 3] - 804 + 4))
    torch.testing.assert_close(rows[:, 0], main(ids[:, 0]))
    torch.testing.assert_close(rows[:, 2], main(ids[:, 2] - 4))


def test_a_whole_table_is_one_table():
    embedding = of_fields(FullEmbedding).eval()
    assert len(embedding.parts) == 1
    ids = ids_of(50)
    torch.testing.assert_close(embedding(ids), embedding.parts[0](ids))


def test_separate_fields_share_the_budget_by_rows():
    embedding = of_fields(separate=True, num_floats=811 * 8 // 4)
    assert [len(part.weight) for part in embedding.parts] == [125, 1, 75, 1]
    assert embedding.trained_floats() <= 811 * 2
    assert embedding(ids_of(3)).shape == (3, 4, 8)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="field 1, of 4 rows, gets no part of the budget"):
        of_fields(separate=True, nbytes=200)  # 0.98 bytes for the field of four rows


def test_frequencies_go_to_their_fields():
    counts = np.arange(sum(SIZES))
    embedding = of_fields(ratio=10, frequencies=counts)
    kept, main = embedding.parts
    np.testing.assert_array_equal(kept._frequencies, np.r_[500:504, 804:811])
    np.testing.assert_array_equal(main._frequencies, np.r_[0:500, 504:804])


def test_wrong_use():
    embedding = of_fields(ratio=10)
    with pytest.raises(ValueError, match="4 columns"):
        embedding(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(IndexError, match="out of range"):
        embedding(torch.tensor([[0, 500, 504, 811]]))
    with pytest.raises(ValueError, match="one of nbytes"):
        of_fields(ratio=10, nbytes=100)
    with pytest.raises(ValueError, match="at least"):
        of_fields(FullEmbedding, ratio=2)


def test_state_round_trip():
    first, second = of_fields(ratio=10), FieldEmbeddings(HashEmbedding, SIZES, 8, ratio=10, random_state=5)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(ids_of(9)), second(ids_of(9)))


@pytest.mark.parametrize("method", vqrs.torch.methods())
def test_the_protocol_reaches_every_method(method):
    for ratio in (10, 4, 2, 1):
        try:
            embedding = of_fields(vqrs.torch.methods()[method], ratio=ratio, frequencies=np.arange(sum(SIZES)))
            break
        except ValueError:
            continue
    else:
        pytest.fail("no ratio is reached")
    assert embedding.stages == vqrs.torch.methods()[method].stages
    for stage in embedding.stages:
        embedding.enter_stage(stage)
    embedding(ids_of(5)).sum().backward()
    assert embedding.training_nbytes() > embedding.training_nbytes(0)
    assert embedding.parameter_groups()
