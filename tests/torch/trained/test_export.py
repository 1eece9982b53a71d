"""Tables of trained embeddings: each part against plain torch, bit for bit, and what torch's modules do with them."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import vqrs
import vqrs.torch
from vqrs.torch.trained import export
from vqrs.torch.trained.export import Scalar, Term, digit, hashed, hashed_part, rows_part, stored, switch_part
from vqrs.torch.trained.hashing import hash_ids, hash_signs

ROWS, DIM = 300, 12
IDS = torch.arange(ROWS)
SEEDS = torch.tensor([-3, 2**62, 5])


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def table_of(part):
    module = SimpleNamespace(num_embeddings=part.rows, embedding_dim=part.dim, field_sizes=(part.rows,), name="made-up")
    return export.as_table(module, part)


def check(part, expected, exactly=True):
    table = table_of(part)
    assert table.relative_error == 0
    assert table.kind == "made-up"
    same = np.testing.assert_array_equal if exactly else np.testing.assert_allclose
    same(table[...], expected.numpy(), **({} if exactly else {"rtol": 1e-5, "atol": 1e-6}))
    embedding = vqrs.torch.Embedding.from_table(table)
    same(embedding(IDS[: part.rows]).numpy(), expected.numpy(), **({} if exactly else {"rtol": 1e-5, "atol": 1e-6}))
    np.testing.assert_allclose(embedding._gather(IDS[: part.rows]).numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    return table


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_rows_as_they_are():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = normal(ROWS, DIM).to(dtype)
        check(rows_part(weight), weight.float())


def test_signed_sums_with_weights():
    weight, importance = normal(20, DIM), normal(50, 2)
    terms = [
        Term(weight, hashed(SEEDS[j], 20), sign=9, weight=Scalar(importance, hashed(SEEDS[2], 50), 2, j))
        for j in (0, 1)
    ]
    expected = torch.zeros(ROWS, DIM)
    for j in (0, 1):
        picked = weight[hash_ids(IDS, SEEDS[j], 20)] * hash_signs(IDS, torch.tensor(9))[:, None]
        expected += picked * importance[hash_ids(IDS, SEEDS[2], 50), j, None]
    table = check(hashed_part(DIM, terms, rows=ROWS), expected)
    assert len(table._core.tensors()) == 2


def test_quotient_times_remainder():
    quotients, remainders = normal(30, DIM), normal(10, DIM)
    terms = [Term(quotients, digit(30, 10)), Term(remainders, digit(10), multiply=True)]
    check(hashed_part(DIM, terms, rows=ROWS), quotients[IDS // 10] * remainders[IDS % 10])


def test_pieces_that_overlap():
    """ROBE: two chunks of an array that wraps around."""
    array = normal(41)
    padded = torch.cat([array, array[:5]])
    terms = [Term(padded, hashed(SEEDS[j], 41), start=6 * j, width=6, stride=1) for j in (0, 1)]
    starts = hash_ids(IDS[:, None], SEEDS[:2], 41)
    expected = array[(starts[:, :, None] + torch.arange(6)) % 41].flatten(1)
    check(hashed_part(DIM, terms, rows=ROWS), expected)


def test_first_id_of_a_field():
    weight = normal(7, DIM)
    part = hashed_part(DIM, [Term(weight, hashed(SEEDS[0], 7))], rows=100, first=1000)
    check(part, weight[hash_ids(torch.arange(1000, 1100), SEEDS[0], 7)])


@pytest.mark.parametrize("entries", [8, 11])
def test_books(entries):
    books = normal(3, entries, 4)
    pointers = torch.randint(entries, (ROWS, 3), generator=torch.Generator().manual_seed(1))
    codes = vqrs.reference.pack_bits(pointers.numpy(), 4)
    check(export.books_part(books, codes, 4), books[torch.arange(3), pointers].flatten(1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("n_scales", [1, ROWS])
def test_levels(dtype, n_scales):
    limits = torch.iinfo(dtype)
    levels = torch.randint(limits.min, limits.max + 1, (ROWS, DIM), dtype=dtype)
    levels[0, :2] = torch.tensor([limits.min, limits.max])
    scales = normal(n_scales).abs() / 100
    table = check(export.levels_part(levels, scales), levels.float() * scales[:, None])
    assert table.nbytes < levels.nbytes + scales.nbytes + 8192
    with pytest.raises(TypeError, match="int8 or int16"):
        export.levels_part(levels.long(), scales)


def test_linear_and_join():
    inner, matrix, mean, other = normal(ROWS, 3), normal(3, DIM), normal(DIM), normal(5, DIM)
    low = export.linear_part(rows_part(inner), matrix, mean)
    check(low, inner @ matrix + mean, exactly=False)
    low = export.linear_part(rows_part(inner), matrix)
    hashes = hashed_part(DIM, [Term(other, hashed(SEEDS[1], 5))], rows=ROWS)
    picked = other[hash_ids(IDS, SEEDS[1], 5)]
    check(export.join_part([low, hashes]), inner @ matrix + picked, exactly=False)
    check(export.join_part([hashes, low], "columns"), torch.cat([picked, inner @ matrix], 1), exactly=False)


def cases():
    """Own rows for some ids, a field, and learned or hashed rows of one array for the rest."""
    own, field, shared = normal(4, DIM), normal(30, DIM), normal(16, DIM)
    hot = torch.tensor([3, 50, 51, 299])
    rest = hashed_part(DIM, [Term(shared, hashed(SEEDS[0], 16))], rows=ROWS)
    pointers = torch.arange(20) % 16
    learned = hashed_part(DIM, [Term(shared, stored(0, 16))], pointers=pointers[:, None], bits=4)
    part = switch_part(
        ROWS,
        [(hot, rows_part(own)), (range(40, 70), rows_part(field)), (np.arange(100, 140, 2), learned)],
        rest,
        {"otherwise.arrays.0": "cases.2.decoder.arrays.0"},
    )
    expected = shared[hash_ids(IDS, SEEDS[0], 16)]
    expected[100:140:2] = shared[pointers]
    expected[40:70] = field
    expected[hot] = own
    return part, expected


def test_switch():
    part, expected = cases()
    table = check(part, expected)
    assert sum(value.size for value in table._core.tensors().values() if value.dtype == np.float32) == 50 * DIM


def test_rows_of_no_case_are_zeros():
    expected = torch.zeros(ROWS, DIM)
    expected[7:9] = normal(2, DIM)
    check(switch_part(ROWS, [(range(7, 9), rows_part(expected[7:9]))]), expected)


@pytest.mark.parametrize("in_order", [False, True])
def test_groups_of_rows(in_order):
    group_of = torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(0))
    if in_order:
        group_of = group_of.sort().values
    expected, weight = torch.zeros(ROWS, DIM), normal(ROWS, DIM)
    counts = torch.bincount(group_of).tolist()
    for group in (1, 2):
        expected[group_of == group] = weight[: counts[group]]
    codes = vqrs.reference.pack_bits(np.arange(counts[2])[:, None], 10)
    parts = [
        hashed_part(DIM, [Term(torch.zeros(DIM), digit(1))], rows=counts[0]),
        rows_part(weight[: counts[1]]),
        export.books_part(weight[None, : counts[2]], codes, 10),
    ]
    check(export.segments_part(group_of, parts), expected)
    with pytest.raises(ValueError, match="groups have"):
        export.segments_part(group_of, parts[::-1])


def test_wrong_parts_are_refused():
    rows = rows_part(normal(3, DIM))
    for ids in (
        [0, 1],
        [2, 1, 0],
        [1, 1, 2],
        [-1, 0, 1],
        [0, 1, ROWS],
        range(2),
        range(0, 6, 2),
        range(ROWS, ROWS + 3),
    ):
        with pytest.raises(ValueError, match="case 0 needs rising ids below 300"):
            switch_part(ROWS, [(ids, rows)])
    with pytest.raises(ValueError, match="a case or a part"):
        switch_part(ROWS, [])
    with pytest.raises(ValueError, match="has 3 rows, expected 300"):
        switch_part(ROWS, [], rows)
    with pytest.raises(ValueError, match="number of rows"):
        hashed_part(DIM, [Term(normal(2, DIM), digit(2))])
    with pytest.raises(TypeError, match="not torch"):
        rows_part(normal(3, DIM).double())
    with pytest.raises(ValueError, match=r"shape \(3, 12\), the module \(4, 12\)"):
        export.as_table(SimpleNamespace(num_embeddings=4, embedding_dim=DIM), rows)


# ---- what is done with such tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
def test_modules_keep_their_state(trainable):
    part, expected = cases()
    embedding = vqrs.torch.Embedding.from_table(table_of(part), trainable=trainable)
    if trainable:
        optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
        F.mse_loss(embedding(IDS), expected * 2, reduction="sum").backward()
        optimizer.step()
        assert not torch.allclose(embedding(IDS).detach(), expected)
        shared = embedding.decoder.cases[2].decoder.arrays_0
        assert embedding.decoder.otherwise.arrays_0 is shared
        assert len({id(p) for p in embedding.parameters()}) == 3
    rows = embedding(IDS).detach()
    fresh = vqrs.torch.Embedding.from_table(table_of(part), trainable=trainable)
    fresh.load_state_dict(embedding.state_dict())
    for other in (fresh, copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(other(IDS).detach(), rows)
    np.testing.assert_array_equal(embedding.to_table()[...], rows.numpy())
    assert embedding.to_table().info()["decoder"] == table_of(part).info()["decoder"]
    half = embedding.half()
    torch.testing.assert_close(half(IDS).detach().float(), rows, rtol=2e-3, atol=2e-3)


def test_gradients_are_those_of_the_rows():
    part, expected = cases()
    embedding = vqrs.torch.Embedding.from_table(table_of(part), trainable=True)
    ids = torch.tensor([3, 45, 45, 100, 7])
    embedding(ids).square().sum().backward()
    gradients = {name: p.grad for name, p in embedding.named_parameters()}
    assert torch.allclose(gradients["decoder.cases.1.decoder.arrays_0"][5], 4 * expected[45])
    assert torch.allclose(gradients["decoder.cases.0.decoder.arrays_0"][0], 2 * expected[3])
    found = sum(g.square().sum() for g in gradients.values())
    assert found > 0


def test_what_cannot_be_done_says_so():
    levels = export.levels_part(torch.ones(5, DIM, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="int8 are not trained"):
        vqrs.torch.Embedding.from_table(table_of(levels), trainable=True)
    embedding = vqrs.torch.Embedding.from_table(table_of(rows_part(normal(5, DIM))), trainable=True)
    with pytest.raises(ValueError, match="no quantizer made"):
        embedding.reassign(target=normal(5, DIM))


def test_the_command_line_reads_them(tmp_path):
    part, _ = cases()
    path = tmp_path / "t.safetensors"
    table_of(part).save(path)
    for command in (["info", path], ["verify", path], ["lookup", path, "3", "45"]):
        done = subprocess.run([sys.executable, "-m", "vqrs", *command], capture_output=True, text=True, check=True)
        assert done.stdout


def test_a_hundred_million_hashed_rows(tmp_path):
    module = vqrs.torch.methods()["hash"](10**8, 100, ratio=1000, random_state=0).eval()
    table = module.to_table()
    assert table.save(tmp_path / "t.safetensors") < module.inference_nbytes() * 1.001
    ids = torch.randint(10**8, (1000,), generator=torch.Generator().manual_seed(0))
    with vqrs.open(tmp_path / "t.safetensors") as opened, torch.no_grad():
        assert opened.shape == (10**8, 100)
        np.testing.assert_array_equal(opened[ids.numpy()], module(ids).numpy())
        embedding = vqrs.torch.Embedding.from_table(opened)
        assert torch.equal(embedding(ids), module(ids))
        assert embedding.codes.shape == (10**8, 0)
