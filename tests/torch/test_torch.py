"""The torch modules against the compiled core, the reference and torch's own modules."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import vqrs
import vqrs.torch
from vqrs import _core, reference
from vqrs.torch.forms import decoder_from_parts

EXAMPLE = Path(__file__).parents[2] / "examples" / "03_torch.py"
N_ROWS, DIM = 300, 13  # 13: no width of a sub-vector or block divides it

PARAMETERS = {
    "kmeans": [{"n_clusters": 40}],
    "product": [
        {"n_subvectors": 5, "n_bits": 3},
        {"n_subvectors": 13, "n_bits": 4},
        {"n_subvectors": 2, "n_bits": 8},
        {"n_subvectors": 3, "n_bits": 5, "codebook_dtype": "float32"},
        {"n_subvectors": 3, "n_bits": 5, "codebook_dtype": "bfloat16"},
        {"n_subvectors": 5, "n_bits": 3, "codebook_dtype": "int8"},
        {"n_subvectors": 5, "n_bits": 3, "center": True, "rotation": "random"},
        {"n_subvectors": 5, "n_bits": 3, "center": True, "rotation": "pca"},
        {"n_subvectors": 5, "n_bits": 3, "rotation": "dense", "rotation_dtype": "int8"},
        {"n_subvectors": 5, "n_bits": 3, "residual": {"kind": "scalar", "parameters": {"dtype": "int4"}}},
    ],
    "residual": [{"n_stages": 3, "n_bits": 3, "beam_width": 2}, {"n_stages": 2, "n_bits": 8, "beam_width": 1}],
    "scalar": [
        {"dtype": dtype, "granularity": granularity, "block_size": 4, "symmetric": symmetric}
        for dtype in ("int8", "int4", "int2")
        for granularity in ("row", "block", "column")
        for symmetric in (False, True)
    ]
    + [{"dtype": "float16"}, {"dtype": "bfloat16"}]
    + [{"dtype": dtype, "granularity": granularity} for dtype in ("int5", "nf4") for granularity in ("row", "column")]
    + [
        {"dtype": "float8", "granularity": "block", "block_size": 4, "scale_dtype": "float8"},
        {"dtype": "int6", "symmetric": True, "scale_dtype": "float8"},
        {"dtype": "free4"},
        {"dtype": "free4", "granularity": "block", "block_size": 6},
    ],
    "rotated": [{"n_bits": 1}, {"n_bits": 3, "rotation": None, "center": False}, {"n_bits": 4, "rotation": "dense"}],
    "sparse": [{"density": 0.5}, {"density": 0.1, "dtype": "int8"}, {"density": 0.7, "dtype": "float32"}],
}
"""Parameters to try of a kind; a kind that is not named here is tried with its defaults."""

CASES = [
    pytest.param(entry["name"], parameters, id="-".join([entry["name"], *map(str, parameters.values())]))
    for entry in _core.kinds()
    for parameters in PARAMETERS.get(entry["name"], [{}])
]

TRAINABLE = {
    "product": {"method": "product", "n_subvectors": 5, "n_bits": 3},
    "residual": {"method": "residual", "n_stages": 2, "n_bits": 3, "beam_width": 2},
    "int4 of a row": {"method": "scalar", "dtype": "int4", "granularity": "row"},
    "int4 of a block": {"method": "scalar", "dtype": "int4", "granularity": "block", "block_size": 4},
    "int2 of a column": {"method": "scalar", "dtype": "int2", "granularity": "column"},
    "symmetric int4 of a block": {
        "method": "scalar",
        "dtype": "int4",
        "granularity": "block",
        "block_size": 4,
        "symmetric": True,
    },
    "int8 codebooks": {"method": "product", "n_subvectors": 5, "n_bits": 3, "codebook_dtype": "int8"},
    "nf4 of a row": {"method": "scalar", "dtype": "nf4"},
    "nf4 of a column": {"method": "scalar", "dtype": "nf4", "granularity": "column"},
    "levels of a row's own": {"method": "scalar", "dtype": "free4"},
    "rotated": {"method": "rotated", "n_bits": 3},
    "sparse": {"method": "sparse", "density": 0.5},
    "symmetric int2 of a column": {"method": "scalar", "dtype": "int2", "granularity": "column", "symmetric": True},
}


def make_rows(n_rows: int = N_ROWS, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n_rows, dim), dtype=np.float32)


def make_table(method: str = "product", **parameters: object) -> vqrs.Table:
    parameters = parameters or {"n_subvectors": 5, "n_bits": 3}
    return vqrs.compress(make_rows(), method=method, random_state=0, **parameters)


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    path = tmp_path / "rows.safetensors"
    make_table().save(path)
    return path


@pytest.fixture(params=[False, True], ids=["frozen", "trainable"])
def trainable(request: pytest.FixtureRequest) -> bool:
    return request.param


def decoded(table: vqrs.Table) -> torch.Tensor:
    return torch.from_numpy(table.to_numpy())


# ---- one law: torch = core = reference ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_every_kind_reads_the_same(kind: str, parameters: dict) -> None:
    table = vqrs.compress(make_rows(), method=kind, random_state=0, **parameters)
    expected = decoded(table)
    judge = reference.decode(table.info()["decoder"], table._core.tensors(), table.codes)
    frozen = vqrs.torch.Embedding.from_table(table)
    ids = torch.tensor([[0, 299, 5], [5, 17, 100]])
    assert torch.equal(frozen(ids), expected[ids])
    assert torch.equal(frozen(ids.int()), expected[ids])
    assert torch.equal(frozen.weight, expected)
    np.testing.assert_array_equal(expected.numpy(), judge)
    # What another device or a compiler runs: the same bits but where a column's product is rounded by itself. Sums over
    # all columns, as a rotation needs them, come in another order.
    close = {"rtol": 2e-7, "atol": 2e-6 if {"rotation", "residual"} & set(parameters) else 1e-7}
    torch.testing.assert_close(frozen._gather(ids.flatten()), expected[ids.flatten()], **close)
    if parameters.get("dtype") in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match="no codebooks or scales to train"):
            vqrs.torch.Embedding.from_table(table, trainable=True)
        return
    trained = vqrs.torch.Embedding.from_table(table, trainable=True)
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())
    torch.testing.assert_close(trained(ids), expected[ids], **close)
    torch.testing.assert_close(trained.weight, expected, **close)
    # Nothing was trained: the way back gives every byte.
    again = trained.to_table()
    np.testing.assert_array_equal(again.codes, table.codes)
    np.testing.assert_array_equal(again.to_numpy(), table.to_numpy())
    assert np.isnan(again.relative_error)


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 11, 16])
def test_books_of_any_layout_equal_the_reference(bits: int) -> None:
    """Groups that lie side by side, over each other and out of order, in fields that straddle bytes."""
    rng = np.random.default_rng(bits)
    starts_of_width = {3: [0, 3, 6], 2: [9, 11], 13: [0, 0, 0], 5: [2, 7, 1]}
    groups = [{"width": width, "starts": starts} for width, starts in starts_of_width.items()]
    description = {"form": "books", "dim": 13, "bits": bits, "scale": 0.25, "dtype": "float16", "groups": groups}
    tensors = {
        f"codebooks.{number}": rng.standard_normal((len(starts), 2**bits, width)).astype(np.float16)
        for number, (width, starts) in enumerate(starts_of_width.items())
    }
    codes = reference.pack_bits(rng.integers(0, 2**bits, (50, 11)), bits)
    decoder = decoder_from_parts(
        description, {name: torch.from_numpy(array) for name, array in tensors.items()}, torch.from_numpy(codes)
    )
    values = decoder(torch.from_numpy(codes), torch.arange(50))
    np.testing.assert_array_equal(values.numpy(), reference.decode(description, tensors, codes))


def test_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="form 'cloud'"):
        decoder_from_parts({"form": "cloud", "dim": 4}, {}, torch.zeros(1, 1, dtype=torch.uint8))


# ---- Embedding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, trainable: bool) -> None:
    table = make_table()
    embedding = vqrs.torch.Embedding.from_table(table, trainable=trainable)
    ids = torch.randint(N_ROWS, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rows = embedding(ids)
    assert rows.shape == (*shape, DIM)
    assert rows.dtype == torch.float32
    assert rows.requires_grad == trainable
    torch.testing.assert_close(rows, F.embedding(ids, decoded(table)))


def test_ids_of_any_strides() -> None:
    table = make_table()
    ids = torch.arange(40).reshape(5, 8)[:, ::2].T
    assert torch.equal(vqrs.torch.Embedding.from_table(table)(ids), decoded(table)[ids])


@pytest.mark.parametrize("bad", [-1, N_ROWS, 2**40, -(2**40)])
def test_ids_out_of_range_are_named(bad: int, trainable: bool) -> None:
    ids = torch.tensor([0, bad, 1])
    embedding = vqrs.torch.Embedding.from_table(make_table(), trainable=trainable)
    with pytest.raises(IndexError, match=rf"id {bad} at position \d+ is out of range for a table of {N_ROWS} rows"):
        embedding(ids)
    bag = vqrs.torch.EmbeddingBag.from_table(make_table(), trainable=trainable)
    with pytest.raises(IndexError, match=rf"id {bad} "):
        bag(ids[None])


def test_ids_of_another_type_are_refused() -> None:
    embedding = vqrs.torch.Embedding.from_table(make_table())
    with pytest.raises(TypeError, match=r"int32 or int64, not torch\.float32"):
        embedding(torch.tensor([1.0]))
    with pytest.raises(TypeError, match=r"int32 or int64, not list"):
        embedding([1, 2])


def test_output_dtype_follows_the_module(trainable: bool) -> None:
    table = make_table()
    ids = torch.tensor([1, 2])
    embedding = vqrs.torch.Embedding.from_table(table, trainable=trainable, dtype=torch.bfloat16)
    assert embedding(ids).dtype == embedding.weight.dtype == torch.bfloat16
    assert embedding.half()(ids).dtype == torch.float16
    assert embedding.double()(ids).dtype == torch.float64
    fresh = vqrs.torch.Embedding.from_table(table, trainable=trainable).half()
    assert torch.equal(fresh(ids), decoded(table)[ids].half()) or trainable
    if not trainable:  # what the table stores is not rounded
        assert torch.equal(fresh.float()(ids), decoded(table)[ids])


# ---- where it comes from --------------------------------------------------------------------------------------------


def test_codes_are_the_mapping(mapped: Path, trainable: bool) -> None:
    table = vqrs.open(mapped)
    embedding = vqrs.torch.Embedding.from_table(table, trainable=trainable)
    assert embedding.codes.data_ptr() == table.codes.ctypes.data
    assert embedding.float().codes.data_ptr() == table.codes.ctypes.data
    assert vqrs.torch.Embedding.from_table(mapped).to_table()._core.mapped
    assert not vqrs.torch.Embedding.from_table(str(mapped), mmap=False, verify="full").to_table()._core.mapped


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_a_mapped_module_takes_no_memory(tmp_path: Path) -> None:
    codec = make_table()._core.codec()
    codes = np.random.default_rng(0).integers(0, 256, (10_000_000, codec.row_bytes), dtype=np.uint8)
    codes[:, -1] &= 0x7F  # 15 bits in two bytes
    path = tmp_path / "big.safetensors"
    _core.Table.from_codec(codec, codes, errors={"relative": 0.0}).save(str(path), durable=False)
    ids = torch.randint(len(codes), (1000,), generator=torch.Generator().manual_seed(0))
    before = anonymous_bytes()
    embedding = vqrs.torch.Embedding.from_table(path)
    embedding(ids)
    copied = copy.deepcopy(embedding)
    copied(ids)
    assert anonymous_bytes() - before < 5e6 < path.stat().st_size / 3


def test_without_a_table_torchs_initial_weights_are_compressed() -> None:
    torch.manual_seed(3)
    own = nn.Embedding(200, 8, padding_idx=-1)
    torch.manual_seed(3)
    embedding = vqrs.torch.Embedding(200, 8, padding_idx=-1, method="scalar", dtype="int8")
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (200, 8, 199)
    torch.testing.assert_close(embedding.weight, own.weight, rtol=0, atol=0.02)
    bag = vqrs.torch.EmbeddingBag(200, 8, _weight=own.weight, method="scalar", dtype="float16")
    assert torch.equal(bag.weight, own.weight.detach().half().float())


def test_a_budget_is_kept() -> None:
    weight = torch.from_numpy(make_rows(2000, 16))
    embedding = vqrs.torch.Embedding.from_pretrained(weight, ratio=6, random_state=0)
    assert 6 <= embedding.to_table().ratio < 8
    with pytest.raises(ValueError, match="ratio="):
        vqrs.torch.Embedding(100, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_rounded_once(dtype: torch.dtype) -> None:
    table = make_table()
    ids = torch.tensor([[3, 0], [299, 7]])
    rows = torch.from_numpy(table.lookup(ids))
    assert torch.equal(vqrs.torch.Embedding.from_table(table, dtype=dtype)(ids), rows.to(dtype))
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode="sum", dtype=dtype)
    assert torch.equal(bag(ids), torch.from_numpy(table.pool(ids)).to(dtype))
    if dtype != torch.float64:
        out = torch.empty(2, 2, table.shape[1], dtype=dtype)
        assert table.lookup(ids, out=out) is out
        assert torch.equal(out, rows.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pretrained_weight_of_any_dtype(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.from_numpy(make_rows()).to(dtype))
    embedding = vqrs.torch.Embedding.from_pretrained(weight, method=vqrs.ScalarQuantizer(dtype="int8"))
    rows = embedding(torch.arange(N_ROWS))
    assert rows.dtype == embedding.dtype == dtype
    torch.testing.assert_close(rows, weight.detach(), rtol=0, atol=0.05)


def test_pretrained_modules_hand_over_their_arguments() -> None:
    plain = nn.Embedding(50, 8, padding_idx=3, sparse=True)
    assert vqrs.torch.Embedding.from_pretrained(plain, method="scalar").padding_idx == 3
    assert vqrs.torch.Embedding.from_pretrained(plain, method="scalar", padding_idx=None).padding_idx is None
    assert vqrs.torch.Embedding.from_pretrained(plain, method="scalar").sparse
    assert vqrs.torch.Embedding.from_pretrained(plain, trainable=True, method="scalar").sparse
    with pytest.raises(ValueError, match="max_norm=1"):
        vqrs.torch.Embedding.from_pretrained(nn.Embedding(50, 8, max_norm=1.0), method="scalar")
    bag = nn.EmbeddingBag(50, 8, mode="max", include_last_offset=True, padding_idx=2)
    small = vqrs.torch.EmbeddingBag.from_pretrained(bag, method="scalar", dtype="float16")
    assert (small.mode, small.include_last_offset, small.padding_idx) == ("max", True, 2)


def test_freeze_is_torchs_name_for_not_trainable() -> None:
    weight = torch.from_numpy(make_rows())
    assert vqrs.torch.Embedding.from_pretrained(weight, freeze=False, method="scalar").trainable
    assert not vqrs.torch.Embedding.from_pretrained(weight, method="scalar").trainable
    assert vqrs.torch.Embedding(50, 8, _freeze=False, method="scalar").trainable
    assert vqrs.torch.Embedding.from_table(make_table(), freeze=False).trainable
    with pytest.raises(ValueError, match="contradict"):
        vqrs.torch.Embedding.from_pretrained(weight, freeze=True, trainable=True, method="scalar")


@pytest.mark.parametrize("kind", [vqrs.torch.Embedding, vqrs.torch.EmbeddingBag])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_norm": 2.0}, "max_norm=2.0 is not supported"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True is not supported"),
        ({"padding_idx": 50}, "padding_idx=50 is not allowed"),
        ({"_weight": torch.zeros(50, 7)}, r"shape \(50, 7\), expected \(50, 8\)"),
    ],
)
def test_what_is_not_supported_is_named(kind: type, argument: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(50, 8, method="scalar", **argument)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="takes no ratio"):
        vqrs.torch.Embedding.from_table(make_table(), ratio=8)
    with pytest.raises(TypeError, match="float dtype"):
        vqrs.torch.Embedding.from_pretrained(torch.zeros(50, 8, dtype=torch.int64), method="scalar")
    with pytest.raises(ValueError, match=r"two dimensions, rows and columns, not shape \(50,\)"):
        vqrs.torch.Embedding.from_pretrained(torch.zeros(50), method="scalar")
    with pytest.raises(ValueError, match="mode='median'"):
        vqrs.torch.EmbeddingBag.from_table(make_table(), mode="median")
    with pytest.raises(ValueError, match="no parameter 'n_bit'"):
        vqrs.torch.Embedding(50, 8, method="product", n_bit=4)


# ---- EmbeddingBag ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bags_equal_torchs(
    mode: str, padding_idx: int | None, include_last_offset: bool, dtype: torch.dtype, trainable: bool
) -> None:
    table = make_table()
    arguments = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset}
    bag = vqrs.torch.EmbeddingBag.from_table(table, trainable=trainable, **arguments)
    own = nn.EmbeddingBag.from_pretrained(decoded(table), **arguments)
    ids = torch.tensor([1, 4, 1, 9, 1, 1, 299, 8, 8], dtype=dtype)
    offsets = torch.tensor([0, 3, 3, 4, 6, 9], dtype=dtype)  # an empty bag, a bag of padding alone
    torch.testing.assert_close(bag(ids, offsets), own(ids, offsets))
    # torch 2.4 leaves out the last of two-dimensional bags where include_last_offset is set.
    of_rows = nn.EmbeddingBag.from_pretrained(decoded(table), **(arguments | {"include_last_offset": False}))
    torch.testing.assert_close(bag(ids.reshape(3, 3)), of_rows(ids.reshape(3, 3)))
    none = torch.tensor([], dtype=dtype)
    torch.testing.assert_close(bag(none, torch.zeros(3, dtype=dtype)), own(none, torch.zeros(3, dtype=dtype)))
    assert torch.equal(bag(torch.zeros(2, 0, dtype=dtype)), torch.zeros(2, DIM))
    if mode == "sum":
        weights = torch.linspace(-1, 2, 9)
        torch.testing.assert_close(bag(ids, offsets, weights), own(ids, offsets, weights))
        grid = weights.reshape(3, 3)
        torch.testing.assert_close(bag(ids.reshape(3, 3), None, grid), of_rows(ids.reshape(3, 3), None, grid))


def test_sample_weights_get_their_gradient(trainable: bool) -> None:
    table = make_table()
    ids, offsets = torch.tensor([1, 4, 1, 9]), torch.tensor([0, 3])
    gradients = []
    for bag in (
        vqrs.torch.EmbeddingBag.from_table(table, mode="sum", padding_idx=4, trainable=trainable),
        # Not frozen: torch 2.4 fails where weights have a gradient and rows none.
        nn.EmbeddingBag.from_pretrained(decoded(table), freeze=False, mode="sum", padding_idx=4),
    ):
        weights = torch.ones(4, requires_grad=True)
        bag(ids, offsets, weights).square().sum().backward()
        gradients.append(weights.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([1, 2]),), "need one-dimensional offsets"),
        ((torch.tensor([[1, 2]]), torch.tensor([0])), "two-dimensional ids"),
        ((torch.zeros(1, 1, 1, dtype=torch.int64),), "not 3"),
        ((torch.tensor([1, 2]), torch.tensor([1])), "offsets"),
        ((torch.tensor([1, 2]), torch.tensor([0, 3])), "offsets"),
        ((torch.tensor([1, 2]), torch.tensor([0]), torch.ones(3)), r"shape \(3,\)"),
    ],
)
def test_bags_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vqrs.torch.EmbeddingBag.from_table(make_table(), mode="sum")(*arguments)


def test_bags_refuse_weights_and_ends_that_do_not_fit() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="mode='mean'"):
        vqrs.torch.EmbeddingBag.from_table(make_table())(ids, torch.tensor([0]), torch.ones(2))
    bag = vqrs.torch.EmbeddingBag.from_table(make_table(), include_last_offset=True)
    with pytest.raises(ValueError, match="last offset must be 2"):
        bag(ids, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="last offset must be 2"):
        bag(ids, torch.tensor([], dtype=torch.int64))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", TRAINABLE.values(), ids=TRAINABLE)
def test_gradients_of_every_parameter(compression: dict) -> None:
    weight = torch.from_numpy(make_rows(20, 7))
    embedding = vqrs.torch.Embedding.from_pretrained(weight, trainable=True, random_state=0, **compression).double()
    ids = torch.tensor([[3, 3, 0], [7, 19, 3]])
    names = [name for name, _ in embedding.named_parameters()]

    def forward(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(embedding, dict(zip(names, values, strict=True)), (ids,))

    assert names
    assert torch.autograd.gradcheck(forward, tuple(embedding.parameters()))


def test_codebook_gradients_equal_a_dense_product() -> None:
    """A row is the product of the one-hot codes of its books with their entries."""
    table = make_table("product", n_subvectors=5, n_bits=3)
    embedding = vqrs.torch.Embedding.from_table(table, trainable=True)
    ids, upstream = torch.tensor([5, 9, 5, 200]), torch.randn(4, DIM, generator=torch.Generator().manual_seed(0))
    (embedding(ids) * upstream).sum().backward()
    fields = reference.unpack_bits(table.codes[ids.numpy()], 3, 5)
    one_hot = F.one_hot(torch.from_numpy(fields), 8).float()  # (4, 5, 8)
    first_book, column = 0, 0
    for parameter in embedding.parameters():
        n_books, _, width = parameter.shape
        part = upstream[:, column : column + n_books * width].reshape(4, n_books, width)
        expected = torch.einsum("nbe,nbw->bew", one_hot[:, first_book : first_book + n_books], part)
        torch.testing.assert_close(parameter.grad, expected)
        first_book, column = first_book + n_books, column + n_books * width
    assert (first_book, column) == (5, DIM)


@pytest.mark.parametrize("compression", TRAINABLE.values(), ids=TRAINABLE)
def test_weight_is_differentiable_and_padding_gets_no_gradient(compression: dict) -> None:
    weight = torch.from_numpy(make_rows(20, 7))
    embedding = vqrs.torch.Embedding.from_pretrained(
        weight, trainable=True, padding_idx=3, random_state=0, **compression
    )
    first = next(embedding.parameters())
    embedding(torch.tensor([3, 3])).sum().backward()
    assert not first.grad.any()
    embedding.weight.sum().backward()
    assert first.grad.any()


def test_a_frozen_module_has_no_parameters_and_no_graph() -> None:
    embedding = vqrs.torch.Embedding.from_table(make_table())
    assert not list(embedding.parameters())
    assert not embedding(torch.tensor([1])).requires_grad
    assert not embedding.weight.requires_grad
    assert torch.equal(embedding.train()(torch.tensor([1])), embedding.eval()(torch.tensor([1])))


@pytest.mark.parametrize("compression", TRAINABLE.values(), ids=TRAINABLE)
def test_a_trained_module_becomes_a_table(compression: dict, tmp_path: Path) -> None:
    target = torch.from_numpy(make_rows())
    embedding = vqrs.torch.Embedding.from_pretrained(
        0.6 * target + 0.3, trainable=True, random_state=0, names=[str(row) for row in range(N_ROWS)], **compression
    )
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(embedding(torch.arange(N_ROWS)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    table = embedding.to_table()
    assert table.names[7] == "7"
    step = 2e-2 if "int8" in compression.values() else 5e-3  # integers of a codebook share a scale
    torch.testing.assert_close(decoded(table), embedding.weight.detach(), rtol=2e-3, atol=step)
    table.save(tmp_path / "trained.safetensors")
    again = vqrs.torch.Embedding.from_table(tmp_path / "trained.safetensors")
    assert torch.equal(again.weight, decoded(table))


def test_values_that_no_table_can_store_are_refused() -> None:
    for compression in (
        {"n_subvectors": 5, "n_bits": 3},
        {"dtype": "int4"},
        {"dtype": "int4", "granularity": "column"},
    ):
        method = "product" if "n_bits" in compression else "scalar"
        embedding = vqrs.torch.Embedding.from_table(make_table(method, **compression), trainable=True)
        with torch.no_grad():
            next(embedding.parameters()).mul_(float("inf"))
        with pytest.raises(ValueError, match="not finite"):
            embedding.to_table()


# ---- states and copies ----------------------------------------------------------------------------------------------

OTHER = {"method": "scalar", "dtype": "int8"}


@pytest.mark.parametrize("compression", [*TRAINABLE.values(), OTHER], ids=[*TRAINABLE, "other"])
@pytest.mark.parametrize("to_trainable", [False, True], ids=["into frozen", "into trainable"])
def test_states_load_into_any_module_of_the_shape(
    compression: dict, trainable: bool, to_trainable: bool, tmp_path: Path
) -> None:
    rows = torch.from_numpy(make_rows())
    source = nn.Sequential(
        vqrs.torch.Embedding.from_pretrained(rows, trainable=trainable, random_state=0, **compression),
        nn.Linear(DIM, 2),
    )
    if trainable:
        with torch.no_grad():
            for parameter in source[0].parameters():
                parameter += 0.001 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
    expected = source[0].weight.detach()
    if trainable and not to_trainable:
        expected = decoded(source[0].to_table())
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.save(source.state_dict(), tmp_path / "model.pt")
    for state in (
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        target = nn.Sequential(
            vqrs.torch.Embedding.from_pretrained(
                rows - 1, trainable=to_trainable, method="product", n_subvectors=5, n_bits=3
            ),
            nn.Linear(DIM, 2),
        )
        target.load_state_dict(state)
        torch.testing.assert_close(target[0].weight.detach(), expected, rtol=2e-7, atol=1e-7)
        torch.testing.assert_close(target[0](torch.tensor([7])).detach(), expected[[7]], rtol=2e-7, atol=1e-7)
        torch.testing.assert_close(decoded(target[0].to_table()), expected, rtol=2e-3, atol=5e-3)


def test_loading_keeps_the_parameters_that_optimizers_hold() -> None:
    first = vqrs.torch.Embedding.from_table(make_table(), trainable=True)
    second = vqrs.torch.Embedding.from_table(make_table(), trainable=True)
    with torch.no_grad():
        first.decoder.codebooks_0.add_(1.0)
    held = second.decoder.codebooks_0
    second.load_state_dict(first.state_dict())
    assert second.decoder.codebooks_0 is held
    assert torch.equal(held, first.decoder.codebooks_0)


def test_loading_leaves_the_table_alone() -> None:
    table = make_table()
    before = table.to_numpy()
    embedding = vqrs.torch.Embedding.from_table(table)
    other = vqrs.torch.Embedding.from_pretrained(torch.zeros(N_ROWS, DIM), method="scalar")
    embedding.load_state_dict(other.state_dict())
    assert not embedding.weight.any()
    np.testing.assert_array_equal(table.to_numpy(), before)


def test_the_weight_of_a_plain_module_is_compressed_on_loading() -> None:
    plain = nn.Embedding.from_pretrained(torch.from_numpy(make_rows()))
    embedding = vqrs.torch.Embedding(N_ROWS, DIM, method="scalar", dtype="int8")
    embedding.load_state_dict(plain.state_dict())
    torch.testing.assert_close(embedding.weight, plain.weight, rtol=0, atol=0.03)
    with pytest.raises(RuntimeError, match="from_pretrained"):
        vqrs.torch.Embedding.from_table(make_table()).load_state_dict(plain.state_dict())


def test_states_that_do_not_fit_are_refused() -> None:
    embedding = vqrs.torch.Embedding.from_table(make_table())
    other = vqrs.torch.Embedding(50, DIM, method="scalar").state_dict()
    with pytest.raises(RuntimeError, match=r"shape \(50, 13\), this module one of shape \(300, 13\)"):
        embedding.load_state_dict(other)
    with pytest.raises(RuntimeError, match=r"Missing key.*codes"):
        embedding.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        embedding.load_state_dict(embedding.state_dict() | {"bias": torch.zeros(1)})
    state = embedding.state_dict()
    del state["decoder.codebooks_0"]
    with pytest.raises(RuntimeError, match="codebooks_0"):
        embedding.load_state_dict(state)
    damaged = embedding.state_dict() | {"codes": torch.full_like(embedding.codes, 255)[:, :1]}
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        embedding.load_state_dict(damaged)


def test_copies_and_pickles_reopen_the_file(mapped: Path, trainable: bool) -> None:
    embedding = vqrs.torch.Embedding.from_table(mapped, trainable=trainable, padding_idx=2)
    if trainable:
        with torch.no_grad():
            embedding.decoder.codebooks_0.add_(1.0)
    ids = torch.tensor([0, 299])
    text = pickle.dumps(embedding)
    assert bytes(embedding.codes[:20].flatten().tolist()) not in text
    for again in (copy.deepcopy(embedding), pickle.loads(text)):
        assert torch.equal(again(ids), embedding(ids))
        assert again.padding_idx == 2
        assert again.to_table()._core.mapped or trainable
        assert "codes" in again.state_dict()


def test_copies_and_pickles_of_a_table_in_memory(trainable: bool) -> None:
    embedding = vqrs.torch.EmbeddingBag.from_table(make_table(), trainable=trainable, mode="sum")
    for again in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(again.weight, embedding.weight)
        assert again.mode == "sum"
        assert again.codes.data_ptr() != embedding.codes.data_ptr()


def test_the_module_shows_what_it_holds() -> None:
    table = make_table()
    text = repr(vqrs.torch.Embedding.from_table(table, padding_idx=1, trainable=True))
    for part in ("300, 13", "kind=product", f"nbytes={table.nbytes}", f"ratio={table.ratio:.2f}", "padding_idx=1"):
        assert part in text
    assert "mode='max'" in repr(vqrs.torch.EmbeddingBag.from_table(table, mode="max"))


# ---- in programs ----------------------------------------------------------------------------------------------------


def test_compiles_and_exports_as_one_graph(trainable: bool) -> None:
    table = make_table()
    embedding = vqrs.torch.Embedding.from_table(table, trainable=trainable)
    ids = torch.tensor([[1, 2], [3, 299]])
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).detach(), decoded(table)[ids])
    exported = torch.export.export(embedding, (ids,)).module()
    torch.testing.assert_close(exported(ids.flip(0)).detach(), decoded(table)[ids.flip(0)])


def test_bags_compile_as_one_graph(trainable: bool) -> None:
    table = make_table()
    bag = vqrs.torch.EmbeddingBag.from_table(table, trainable=trainable, mode="sum", padding_idx=2)
    ids, offsets = torch.tensor([1, 2, 3, 299]), torch.tensor([0, 2])
    compiled = torch.compile(bag, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, offsets).detach(), bag(ids, offsets).detach())


def test_tracing_does_not_freeze_the_rows() -> None:
    embedding = vqrs.torch.Embedding.from_table(make_table())
    traced = torch.jit.trace(embedding, torch.tensor([1, 2]), check_trace=False)
    assert torch.equal(traced(torch.tensor([7, 8])), embedding(torch.tensor([7, 8])))


class Rows(torch.utils.data.Dataset):
    """Looks rows up in a worker."""

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding

    def __len__(self) -> int:
        return N_ROWS

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.embedding(torch.tensor(row))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same_rows(mapped: Path, start: str) -> None:
    embedding = vqrs.torch.Embedding.from_table(mapped)
    expected = embedding(torch.arange(N_ROWS).repeat(100))[:N_ROWS]  # the parent's threads are up before the fork
    loader = torch.utils.data.DataLoader(Rows(embedding), batch_size=50, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_another_device_and_back(mapped: Path) -> None:
    """The device "meta" holds no values, but shows where everything goes."""
    embedding = vqrs.torch.Embedding.from_table(mapped)
    away = copy.deepcopy(embedding).to("meta")
    assert away(torch.tensor([[1]], device="meta")).shape == (1, 1, DIM)
    assert {tensor.device.type for tensor in away.state_dict(keep_vars=True).values()} <= {"meta", "cpu"}
    assert away.codes.is_meta
    assert away.decoder.codebooks_0.is_meta


def test_a_missing_torch_is_one_line() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import vqrs\n"
        "try: import vqrs.torch\n"
        "except ImportError as error: print(error)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert answer == "vqrs.torch needs torch 2.4 or newer: pip install 'vqrs[torch]'\n"


def test_the_example_runs(tmp_path: Path) -> None:
    # One thread: the model is small, and threads that wait for each other make it slower where cores are few.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, EXAMPLE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "mapped back" in run.stdout
