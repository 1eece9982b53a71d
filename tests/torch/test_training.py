"""Training of torch modules: gradients of every form, sparse ones, codes chosen anew, codebooks of moving averages."""

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import vqrs
import vqrs.torch
from vqrs import _core
from vqrs.torch.forms import FORMS

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("*.safetensors"))
"""A table of 20 rows and 5 columns of every form and layout."""
WITHOUT_PARAMETERS = "levels-bfloat16-v1", "levels-float16-v1", "hashed-types-v1", "segments-map-v1"


def make_rows(n_rows: int = 300, dim: int = 13, seed: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n_rows, dim), dtype=np.float32))


def join_of_columns() -> vqrs.Table:
    """Two of the golden tables side by side: no quantizer makes this mode yet."""
    parts = [vqrs.open(path) for path in GOLDEN if path.stem in ("books-two-widths-float16-v1", "levels-row-int4-v1")]
    infos = [part.info() for part in parts]
    description = {
        "kind": "product",
        "parameters": infos[0]["parameters"],
        "decoder": {"form": "join", "dim": 10, "mode": "columns", "parts": [info["decoder"] for info in infos]},
    }
    tensors = {
        f"parts.{number}.{name}": tensor
        for number, part in enumerate(parts)
        for name, tensor in part._core.tensors().items()
    }
    codes = np.concatenate([part.codes for part in parts], axis=1)
    return vqrs.Table(_core.Table.from_parts(json.dumps(description), tensors, codes, errors={"relative": 0.0}))


def groups(group_of: np.ndarray) -> vqrs.Table:
    """Rows of two quantizers, as ``MixedPrecisionQuantizer`` makes them of tables too large for a gradient check."""
    rows = make_rows(len(group_of), 5).numpy()
    parts = [
        vqrs.compress(rows[group_of == 0], method="scalar", dtype="int4"),
        vqrs.compress(rows[group_of == 1], random_state=0, method="product", n_subvectors=2, n_bits=3),
    ]
    codecs, codes = [part._core.codec() for part in parts], [part.codes for part in parts]
    arguments = {"kind": "mixed", "parameters": {}, "errors": {"relative": 0.0}}
    return vqrs.Table(_core.Table.from_groups(codecs, codes, group_of, **arguments))


def tables() -> Iterator[tuple[str, vqrs.Table]]:
    for path in GOLDEN:
        if path.stem not in WITHOUT_PARAMETERS:
            yield path.stem, vqrs.open(path)
    yield "join-columns", join_of_columns()
    yield "segments", groups(np.repeat(np.uint8([0, 1]), 20))
    yield "segments-with-map", groups(np.random.default_rng(0).permutation(np.repeat(np.uint8([0, 1]), 20)))


TABLES = dict(tables())
every_form = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def forms_of(description: dict) -> set[str]:
    inside = [description.get("inner"), *description.get("parts", [])]
    inside += [group.get("decoder") for group in description.get("groups", [])]
    return {description["form"]}.union(*(forms_of(part) for part in inside if part))


def test_every_form_is_among_the_tables() -> None:
    assert set().union(*(forms_of(table.info()["decoder"]) for table in TABLES.values())) == set(FORMS)
    for name in ("segments", "segments-with-map"):
        description = TABLES[name].info()["decoder"]
        assert forms_of(description) == {"segments", "levels", "books"}
        assert ("map" in TABLES[name]._core.tensors()) == name.endswith("map")


# ---- gradients ------------------------------------------------------------------------------------------------------


def forward_of(module: nn.Module, *inputs: torch.Tensor | None) -> tuple:
    """The module as a function of its parameters, and these."""
    names = [name for name, _ in module.named_parameters()]

    def forward(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), inputs)

    assert names
    return forward, tuple(module.parameters())


@every_form
def test_gradients_of_every_form(table: vqrs.Table) -> None:
    embedding = vqrs.torch.Embedding.from_table(table, trainable=True, padding_idx=4).double()
    assert all(parameter.is_floating_point() for parameter in embedding.parameters())
    # Without the padding row: a numeric derivative knows no padding.
    assert torch.autograd.gradcheck(*forward_of(embedding, torch.tensor([[3, 3, 0], [7, 19, 3]])))


@every_form
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradients_of_bags_of_every_form(table: vqrs.Table, mode: str) -> None:
    bag = vqrs.torch.EmbeddingBag.from_table(table, trainable=True, mode=mode).double()
    ids, offsets = torch.tensor([3, 0, 5, 7, 19]), torch.tensor([0, 2, 2, 4])
    if mode != "sum":
        assert torch.autograd.gradcheck(*forward_of(bag, ids, offsets))
        return
    names = [name for name, _ in bag.named_parameters()]
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64).requires_grad_()

    def forward(weights: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(bag, dict(zip(names, values, strict=True)), (ids, offsets, weights))

    assert torch.autograd.gradcheck(forward, (weights, *bag.parameters()))


@every_form
def test_gradients_of_all_parameters_reach_them(table: vqrs.Table) -> None:
    embedding = vqrs.torch.Embedding.from_table(table, trainable=True)
    embedding.weight.square().sum().backward()
    for name, parameter in embedding.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@every_form
def test_loading_keeps_the_parameters_that_optimizers_hold(table: vqrs.Table) -> None:
    first, second = (vqrs.torch.Embedding.from_table(table, trainable=True) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.01)
    held = dict(second.named_parameters())
    second.load_state_dict(first.state_dict())
    assert held.keys() == dict(second.named_parameters()).keys()
    for name, parameter in second.named_parameters():
        assert parameter is held[name]
    assert torch.equal(second.weight, first.weight)


# ---- sparse gradients -----------------------------------------------------------------------------------------------


def pair(table: vqrs.Table) -> tuple[nn.Module, nn.Module]:
    return tuple(vqrs.torch.Embedding.from_table(table, trainable=True, sparse=sparse) for sparse in (False, True))


def is_sparse(name: str, parameter: torch.Tensor) -> bool:
    """What a gather picks from. What all rows share (means, rotations, scales of columns) stays dense."""
    own = name.rpartition(".")[2]
    return (
        own.startswith("codebooks_")
        or own in ("own", "values")
        or (own in ("scale", "offset") and parameter.dim() == 2)
    )


@every_form
def test_sparse_gradients_equal_dense_ones(table: vqrs.Table) -> None:
    dense, sparse = pair(table)
    ids = torch.tensor([[3, 3, 0], [7, 19, 3]])
    upstream = make_rows(6, table.shape[1]).reshape(2, 3, -1)
    for module in (dense, sparse):
        (module(ids) * upstream).sum().backward()
    expected = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        assert parameter.grad.is_sparse == is_sparse(name, parameter), name
        torch.testing.assert_close(parameter.grad.to_dense(), expected[name].grad)
        if parameter.grad.is_sparse:  # what no row picked is not there
            touched = expected[name].grad.flatten(parameter.grad.sparse_dim()).any(-1).sum()
            assert touched <= parameter.grad.coalesce()._nnz() <= 6 * parameter.shape[0]


@every_form
def test_sparse_gradients_of_bags(table: vqrs.Table) -> None:
    ids, offsets = torch.tensor([3, 0, 5, 7, 19]), torch.tensor([0, 2, 2, 4])
    gradients = []
    for sparse in (False, True):
        bag = vqrs.torch.EmbeddingBag.from_table(table, trainable=True, mode="sum", sparse=sparse)
        bag(ids, offsets, torch.linspace(-1, 2, 5)).square().sum().backward()
        gradients.append([parameter.grad.to_dense() for parameter in bag.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    "SGD with momentum": (torch.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    "SparseAdam": (torch.optim.Adam, torch.optim.SparseAdam, {"lr": 0.1}),
}


@pytest.mark.parametrize(("dense_kind", "sparse_kind", "arguments"), OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    "table",
    [t for name, t in TABLES.items() if not name.startswith(("trellis", "levels-column", "linear", "hashed"))],
)
def test_optimizers_take_the_same_steps(
    table: vqrs.Table, dense_kind: type, sparse_kind: type, arguments: dict
) -> None:
    """Adam moves on where there is no gradient, SparseAdam does not: they are equal where all that moves is touched."""
    modules = pair(table)
    parameters = [
        [parameter for name, parameter in module.named_parameters() if is_sparse(name, parameter)] for module in modules
    ]
    assert parameters[0]
    ids = torch.arange(len(table)) if sparse_kind is torch.optim.SparseAdam else torch.tensor([3, 0, 3, 7])
    for module, held, kind in zip(modules, parameters, (dense_kind, sparse_kind), strict=True):
        optimizer = kind(held, **arguments)
        for _ in range(3):
            optimizer.zero_grad()
            (module(ids) * torch.linspace(0.5, 2, table.shape[1])).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(parameters[1], parameters[0])
    assert not torch.equal(modules[1].weight, vqrs.torch.Embedding.from_table(table).weight)


def test_entries_that_no_row_picks_stay() -> None:
    """The point of SparseAdam: Adam's momentum moves entries that this batch does not hold."""
    embedding = vqrs.torch.Embedding.from_pretrained(
        make_rows(), method="product", n_subvectors=5, n_bits=4, trainable=True, sparse=True, random_state=0
    )
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    for ids in (torch.tensor([0, 1, 2]), torch.tensor([2])):
        before = embedding.weight.detach()
        optimizer.zero_grad()
        embedding(ids).square().sum().backward()
        optimizer.step()
        fields = embedding.decoder.fields(embedding.codes)
        shared = (fields[:, None] == fields[ids][None]).any(2).any(1)
        assert torch.equal(embedding.weight[~shared], before[~shared])
        assert not torch.equal(embedding.weight[ids], before[ids])


def test_attributes_are_torchs() -> None:
    for kind in ("Embedding", "EmbeddingBag"):
        plain = getattr(nn, kind)(50, 8, sparse=True)
        for trainable in (False, True):
            small = getattr(vqrs.torch, kind).from_pretrained(plain, method="scalar", trainable=trainable)
            for name in (
                "num_embeddings",
                "embedding_dim",
                "padding_idx",
                "max_norm",
                "norm_type",
                "scale_grad_by_freq",
                "sparse",
            ):
                assert getattr(small, name) == getattr(plain, name), name
        # Frozen rows have no gradient to scale.
        plain.scale_grad_by_freq = True
        assert not getattr(vqrs.torch, kind).from_pretrained(plain, method="scalar").scale_grad_by_freq
        with pytest.raises(ValueError, match="scale_grad_by_freq=True is not supported"):
            getattr(vqrs.torch, kind).from_pretrained(plain, method="scalar", trainable=True)


def test_positional_arguments_are_torchs() -> None:
    weight = make_rows(50, 8)
    for plain, small in (
        (
            nn.EmbeddingBag.from_pretrained(weight, False, None, 2.0, False, "sum", True, True, 3),
            vqrs.torch.EmbeddingBag.from_pretrained(
                weight, False, None, 2.0, False, "sum", True, True, 3, method="scalar"
            ),
        ),
        (
            nn.Embedding.from_pretrained(weight, False, 3, None, 2.0, False, True),
            vqrs.torch.Embedding.from_pretrained(weight, False, 3, None, 2.0, False, True, method="scalar"),
        ),
    ):
        names = {"padding_idx", "sparse", "max_norm", "norm_type", "mode", "include_last_offset"}
        for name in names & vars(plain).keys():
            assert getattr(small, name) == getattr(plain, name), name
        assert small.trainable
    with pytest.raises(TypeError, match="padding_idx both by position and by name"):
        vqrs.torch.Embedding.from_pretrained(weight, True, 3, padding_idx=4, method="scalar")
    with pytest.raises(TypeError, match="at most 7"):
        vqrs.torch.Embedding.from_pretrained(weight, True, 3, None, 2.0, False, True, 1, method="scalar")
    table = vqrs.compress(weight.numpy(), method="scalar")
    bag = vqrs.torch.EmbeddingBag.from_table(
        table, mode="sum", sparse=True, include_last_offset=True, padding_idx=3, max_norm=None, norm_type=1.0
    )
    assert (bag.mode, bag.sparse, bag.include_last_offset, bag.padding_idx, bag.norm_type) == (
        "sum",
        True,
        True,
        3,
        1.0,
    )


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_offsets_that_are_no_integers_are_refused(trainable: bool, include_last_offset: bool) -> None:
    bag = vqrs.torch.EmbeddingBag.from_table(
        TABLES["levels-row-int4-v1"], trainable=trainable, include_last_offset=include_last_offset
    )
    with pytest.raises(TypeError, match=r"offsets must be a tensor of int32 or int64, not torch\.float32"):
        bag(torch.tensor([1, 2, 3]), torch.tensor([0.0, 3.0]))


# ---- codes chosen anew ----------------------------------------------------------------------------------------------

KINDS = {entry["name"]: {} for entry in _core.kinds()} | {
    "low-rank": {"n_components": 5},
    "product": {"n_subvectors": 5, "n_bits": 3, "residual": {"kind": "scalar", "parameters": {"dtype": "int4"}}},
    "kmeans": {"n_clusters": 40},
    "scalar": {"dtype": "int4", "granularity": "block", "block_size": 4},
}
FREE4 = {"method": "scalar", "dtype": "free4"}
COLUMN = {"method": "scalar", "dtype": "int4", "granularity": "column"}
NF4 = {"method": "scalar", "dtype": "nf4"}
PRODUCT = {"method": "product", "n_subvectors": 5, "n_bits": 3}
WAYS = {name: {"method": name, **parameters} for name, parameters in KINDS.items()} | {
    "levels of a row's own": FREE4,
    "int4 of a column": COLUMN,
    "nf4": NF4,
    "int8 codebooks": PRODUCT | {"codebook_dtype": "int8"},
    "plain product": PRODUCT,
}


def squared_errors(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (rows.detach().double() - target.double()).square().sum(1)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_reassign_brings_rows_nearer(way: dict, trainable: bool) -> None:
    embedding = vqrs.torch.Embedding.from_pretrained(make_rows(), trainable=trainable, random_state=0, **way)
    target = make_rows().flip(0)
    held = dict(embedding.named_parameters())
    before, old_codes = embedding.weight.detach(), embedding.codes.clone()
    ids = torch.arange(0, 300, 2)
    others = torch.arange(1, 300, 2)
    outcome = embedding.reassign(ids, target[ids])
    after = embedding.weight.detach()
    errors = squared_errors(before[ids], target[ids]), squared_errors(after[ids], target[ids])
    # The compiled core adds in another order where there is a rotation.
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    assert outcome.n_rows == 150
    assert outcome.n_changed == int((before[ids] != after[ids]).any(1).sum()) > 100
    norm = float(target[ids].double().square().sum())
    assert outcome.error_before == pytest.approx(float(errors[0].sum()) / norm, rel=1e-6)
    assert outcome.error_after == pytest.approx(float(errors[1].sum()) / norm, rel=1e-6)
    assert outcome.error_after < 0.75 * outcome.error_before
    # Nothing else has moved, and everybody sees the new rows.
    assert torch.equal(after[others], before[others])
    assert all(parameter is held[name] for name, parameter in embedding.named_parameters())
    assert torch.equal(embedding(ids), after[ids])
    close = {"rtol": 2e-3, "atol": 2e-2 if trainable else 1e-6}
    torch.testing.assert_close(torch.from_numpy(embedding.to_table().to_numpy()), after, **close)
    again = vqrs.torch.Embedding.from_pretrained(make_rows(), trainable=trainable, random_state=0, **way)
    again.load_state_dict(embedding.state_dict())
    assert torch.equal(again.weight, after)
    assert not torch.equal(embedding.codes, old_codes)
    # A second time nothing is better.
    assert embedding.reassign(ids, target[ids]).n_changed == 0


def test_reassign_finds_the_nearest_entries() -> None:
    embedding = vqrs.torch.Embedding.from_pretrained(make_rows(), trainable=True, random_state=0, **PRODUCT)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(make_rows(parameter.numel(), 1, seed=1).reshape(parameter.shape).half())
    target = make_rows(seed=3)
    embedding.reassign(target=target)
    fields = embedding.decoder.fields(embedding.codes)
    first, column = 0, 0
    for parameter in embedding.parameters():
        for book in parameter.detach().half().double():
            width = book.shape[1]
            nearest = torch.cdist(target[:, column : column + width].double(), book).argmin(1)
            assert torch.equal(fields[:, first], nearest)
            first, column = first + 1, column + width


def test_reassign_is_deterministic_and_takes_any_ids() -> None:
    outcomes = []
    for n_jobs, order in ((1, slice(None)), (2, slice(None, None, -1))):
        embedding = vqrs.torch.EmbeddingBag.from_pretrained(make_rows(), trainable=True, random_state=0, **PRODUCT)
        ids = torch.arange(300, dtype=torch.int32).numpy()[order].copy()
        outcome = embedding.reassign(torch.from_numpy(ids), make_rows(seed=3)[ids], n_jobs=n_jobs)
        outcomes.append((embedding.codes.clone(), outcome.n_changed))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_reassign_never_writes_a_file_or_a_table(tmp_path: Path, trainable: bool) -> None:
    path = tmp_path / "rows.safetensors"
    vqrs.compress(make_rows().numpy(), random_state=0, **PRODUCT).save(path)
    before, table = path.read_bytes(), vqrs.open(path)
    rows = table.to_numpy()
    embedding = vqrs.torch.Embedding.from_table(table, trainable=trainable)
    embedding.reassign(target=make_rows(seed=3))
    own = embedding.codes.data_ptr()
    assert own != table.codes.ctypes.data
    first = embedding.to_table()
    expected = first.to_numpy()
    embedding.reassign(target=make_rows(seed=4))
    assert embedding.codes.data_ptr() != own  # the exported table keeps its codes
    np.testing.assert_array_equal(first.to_numpy(), expected)
    own = embedding.codes.data_ptr()
    embedding.reassign(target=make_rows(seed=5))
    assert embedding.codes.data_ptr() == own  # no copy for each call
    np.testing.assert_array_equal(table.to_numpy(), rows)
    assert path.read_bytes() == before
    for again in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(again.weight, embedding.weight)
        again.reassign(target=make_rows(seed=6))
        assert not torch.equal(again.weight, embedding.weight)


def test_reassign_refuses_what_does_not_fit() -> None:
    embedding = vqrs.torch.Embedding.from_pretrained(make_rows(), trainable=True, random_state=0, **PRODUCT)
    two, target = torch.tensor([1, 2]), make_rows(2)
    before = embedding.codes.clone()
    for arguments, message in (
        ((), "needs either target="),
        ((two, target[:1]), r"shape \(1, 13\)"),
        ((two, target[:, :5]), r"shape \(2, 5\)"),
        ((two, target.int()), "of floats"),
        ((two, target * float("nan")), "NaN or infinity"),
        ((torch.tensor([1, 1]), target), "given twice"),
        ((two[None], target), "one dimension, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            embedding.reassign(*arguments)
    with pytest.raises(IndexError, match="id 300 at position 1"):
        embedding.reassign(torch.tensor([1, 300]), target)
    with pytest.raises(ValueError, match="straight_through=True, which keeps"):
        embedding.reassign(learning_rate=0.1)
    with pytest.raises(ValueError, match="straight_through=True needs trainable=True"):
        vqrs.torch.Embedding.from_table(TABLES["levels-row-int4-v1"], straight_through=True)
    with pytest.raises(ValueError, match="whose groups of rows have a quantizer each"):
        vqrs.torch.Embedding.from_table(TABLES["segments"]).reassign(target=make_rows(40, 5))
    assert torch.equal(embedding.codes, before)
    nothing = embedding.reassign(torch.tensor([], dtype=torch.int64), target[:0])
    assert (nothing.n_rows, nothing.n_changed) == (0, 0)


def test_straight_through_gradients_are_those_of_the_rows() -> None:
    """What the module keeps is the gradient of a plain embedding of the decoded rows."""
    embedding = vqrs.torch.Embedding.from_pretrained(
        make_rows(), trainable=True, straight_through=True, padding_idx=5, random_state=0, **PRODUCT
    )
    plain = nn.Embedding.from_pretrained(embedding.weight.detach(), freeze=False, padding_idx=5)
    for ids in (torch.tensor([[9, 3], [9, 5]]), torch.tensor([3, 250])):
        for module in (embedding, plain):
            module(ids).pow(3).sum().backward()
    ids, gradients = embedding.row_gradients()
    assert ids.tolist() == [3, 9, 250]
    torch.testing.assert_close(gradients, plain.weight.grad[ids])
    embedding.zero_grad()
    assert embedding.row_gradients()[0].numel() == 0
    with torch.no_grad():
        embedding(torch.tensor([1]))
    embedding(torch.tensor([1]))
    assert embedding.row_gradients()[0].numel() == 0


@pytest.mark.parametrize("kind", [vqrs.torch.Embedding, vqrs.torch.EmbeddingBag])
def test_straight_through_steps_lower_a_loss_that_codebooks_cannot(kind: type) -> None:
    """Rows are to swap places: codebooks alone cannot tell them apart where they share entries."""
    target = make_rows().flip(0)
    ids = torch.arange(300)
    losses = {}
    for straight_through in (False, True):
        embedding = kind.from_pretrained(
            make_rows(), trainable=True, straight_through=straight_through, random_state=0, **PRODUCT
        )
        optimizer = torch.optim.Adam(embedding.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            rows = embedding(ids[:, None] if kind is vqrs.torch.EmbeddingBag else ids)
            F.mse_loss(rows, target, reduction="sum").backward()
            optimizer.step()
            if straight_through:
                outcome = embedding.reassign(learning_rate=0.5)
                assert outcome.n_rows == 300
        losses[straight_through] = F.mse_loss(embedding.weight.detach(), target).item()
    assert losses[True] < 0.5 * losses[False]


def test_straight_through_takes_the_ids_that_are_asked_for() -> None:
    embedding = vqrs.torch.Embedding.from_pretrained(
        make_rows(), trainable=True, straight_through=True, random_state=0, **PRODUCT
    )
    before = embedding.weight.detach()
    (embedding(torch.tensor([3, 9, 20])) - 5).square().sum().backward()
    outcome = embedding.reassign(torch.tensor([9, 20, 21]), learning_rate=0.5)
    assert (outcome.n_rows, outcome.n_changed) == (2, 2)
    assert (embedding.weight != before).any(1).nonzero().flatten().tolist() == [9, 20]
    assert embedding.row_gradients()[0].numel() == 0


# ---- moving averages ------------------------------------------------------------------------------------------------


def trained(**way: object) -> nn.Module:
    return vqrs.torch.Embedding.from_pretrained(make_rows(), trainable=True, random_state=0, **(way or PRODUCT))


def test_no_memory_and_the_whole_table_is_one_step_of_lloyds() -> None:
    embedding, target = trained(), make_rows(seed=3)
    averages = vqrs.torch.EMACodebooks(embedding, decay=0.0, restart_every=None)
    books = [parameter.detach().clone() for parameter in embedding.parameters()]
    averages.update(torch.arange(300), target)
    fields = embedding.decoder.fields(embedding.codes)
    first, column = 0, 0
    for old, new in zip(books, embedding.parameters(), strict=True):
        for number in range(len(old)):
            part = target[:, column : column + old.shape[2]]
            nearest = torch.cdist(part.double(), old[number].half().double()).argmin(1)
            assert torch.equal(fields[:, first], nearest)
            for entry in range(old.shape[1]):
                members = part[nearest == entry]
                expected = members.mean(0) if len(members) else old[number, entry]
                torch.testing.assert_close(new[number, entry], expected, rtol=1e-6, atol=1e-6)
            first, column = first + 1, column + old.shape[2]
    assert not any(parameter.requires_grad for parameter in embedding.parameters())


def test_averages_equal_their_formula() -> None:
    """Two batches by hand, for one entry of one book."""
    embedding = trained(method="kmeans", n_clusters=4)
    averages = vqrs.torch.EMACodebooks(embedding, decay=0.9, restart_every=None)
    fields = embedding.decoder.fields(embedding.codes)[:, 0]
    entry = embedding.decoder.codebooks_0[0, 2].detach().double()
    count = 100 * (fields == 2).double().mean()
    for start in (0, 100):
        ids, target = torch.arange(start, start + 100), make_rows(seed=start)[:100]
        averages.update(ids, target, reassign=False)
        members = target[fields[ids] == 2].double()
        entry, count = 0.9 * count * entry + 0.1 * members.sum(0), 0.9 * count + 0.1 * len(members)
        entry = entry / count
        torch.testing.assert_close(embedding.decoder.codebooks_0[0, 2].double(), entry, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averages.counts_0[0, 2], count)


LEARNED = {
    "product": PRODUCT,
    "residual": {"method": "residual", "n_stages": 3, "n_bits": 3},
    "additive": {"method": "additive", "n_codebooks": 3, "n_bits": 3},
    "optimized-product": {"method": "optimized-product", "n_subvectors": 5, "n_bits": 3},
    "rotated by signs": PRODUCT | {"rotation": "random", "center": True},
    "int8 codebooks": PRODUCT | {"codebook_dtype": "int8"},
}


@pytest.mark.parametrize("way", LEARNED.values(), ids=LEARNED)
def test_averages_follow_a_table_that_drifts(way: dict) -> None:
    embedding = trained(**way)
    averages = vqrs.torch.EMACodebooks(embedding, decay=0.8, restart_every=5)
    rows, generator = make_rows(), torch.Generator().manual_seed(0)
    start = embedding.to_table()
    for step in range(60):
        rows = rows * 0.98 + 0.05
        ids = torch.randperm(300, generator=generator)[:150]
        outcome = averages.update(ids, rows[ids])
        assert outcome.error_after < outcome.error_before + 0.05, step
    drifted = squared_errors(embedding.weight, rows).sum() / rows.double().square().sum()
    stood = squared_errors(torch.from_numpy(start.to_numpy()), rows).sum() / rows.double().square().sum()
    fresh = vqrs.torch.Embedding.from_pretrained(rows, random_state=0, **way).to_table().relative_error
    assert stood > 10 * fresh
    assert drifted < 2 * fresh


def test_whole_updates_without_memory_never_raise_the_error() -> None:
    for way in LEARNED.values():
        embedding, target = trained(**way), make_rows(seed=3)
        averages = vqrs.torch.EMACodebooks(embedding, decay=0.0, restart_every=None)
        for _ in range(4):
            outcome = averages.update(torch.arange(300), target)
            assert outcome.error_after <= outcome.error_before * (1 + 1e-6)


def test_entries_that_no_row_picks_restart() -> None:
    target = make_rows()
    errors = {}
    for restart_every in (None, 1):
        embedding = trained()
        with torch.no_grad():
            for parameter in embedding.parameters():
                parameter[:, 4:] = 100.0
        averages = vqrs.torch.EMACodebooks(embedding, decay=0.5, restart_every=restart_every)
        for _ in range(15):
            outcome = averages.update(torch.arange(300), target)
        usage = averages._usage()
        dead = sum(int((counts == 0).sum()) for counts in usage)
        errors[restart_every] = outcome.error_after
        assert (dead == 0) == (restart_every == 1)
    assert errors[1] < 0.7 * errors[None]


def test_averages_are_a_state() -> None:
    """A run that is interrupted goes on to the bit."""
    results = []
    for interrupted in (False, True):
        embedding = trained()
        averages = vqrs.torch.EMACodebooks(embedding, decay=0.7, restart_every=2)
        for step in range(6):
            if interrupted and step == 3:
                model = nn.ModuleDict({"embedding": embedding, "averages": averages})
                assert {key.split(".")[0] for key in averages.state_dict()} == {"n_updates", "counts_0", "counts_1"}
                state = copy.deepcopy(model.state_dict())
                embedding = trained(**PRODUCT)
                averages = vqrs.torch.EMACodebooks(embedding, decay=0.7, restart_every=2)
                nn.ModuleDict({"embedding": embedding, "averages": averages}).load_state_dict(state)
            ids = torch.arange(step * 40, step * 40 + 100)
            averages.update(ids, make_rows(seed=step)[ids])
        results.append((embedding.weight, averages.state_dict()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_averages_refuse_what_has_no_codebooks() -> None:
    with pytest.raises(ValueError, match="no codebooks of its own"):
        vqrs.torch.EMACodebooks(trained(method="scalar"))
    with pytest.raises(ValueError, match="trainable=True"):
        vqrs.torch.EMACodebooks(vqrs.torch.Embedding.from_table(TABLES["books-single-float32-v1"]))
    for arguments, message in (({"decay": 1.0}, "decay=1.0"), ({"restart_every": 0}, "restart_every=0")):
        with pytest.raises(ValueError, match=message):
            vqrs.torch.EMACodebooks(trained(), **arguments)


# ---- states in safetensors ------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two of our modules, one of them held twice, beside plain ones."""

    def __init__(self, trainable: bool, rows: torch.Tensor) -> None:
        super().__init__()
        self.tokens = vqrs.torch.Embedding.from_pretrained(rows, trainable=trainable, random_state=0, **PRODUCT)
        self.same_tokens = self.tokens
        self.features = vqrs.torch.EmbeddingBag.from_pretrained(
            rows, trainable=trainable, mode="sum", random_state=0, **WAYS["rotated"]
        )
        self.head = nn.Linear(13, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(ids) + self.same_tokens(ids + 1) + self.features(ids[:, None]))


@pytest.mark.parametrize("into_trainable", [False, True], ids=["into frozen", "into trainable"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_whole_models_go_through_safetensors(trainable: bool, into_trainable: bool, tmp_path: Path) -> None:
    model = Model(trainable, make_rows())
    model.tokens.reassign(torch.tensor([7]), make_rows(1, seed=3))
    ids = torch.tensor([7, 0, 250])
    expected = model(ids).detach()
    if trainable and not into_trainable:  # rounded to what a table stores
        expected = expected.half().float()
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    other = Model(into_trainable, make_rows(seed=1))
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    close = {"rtol": 1e-6, "atol": 1e-6} if trainable == into_trainable else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(other(ids).detach(), expected, **close)
    assert other.same_tokens is other.tokens
    # Without the module that is held twice, whose two names safetensors wants told apart, the plain functions do.
    plain = nn.Sequential(model.tokens, model.head)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    again = nn.Sequential(Model(into_trainable, make_rows(seed=1)).tokens, nn.Linear(13, 3))
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "plain.safetensors"))
    torch.testing.assert_close(again(ids).detach(), plain(ids).detach(), **close)


def test_states_of_a_mapped_table_go_through_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    table = vqrs.compress(make_rows().numpy(), random_state=0, **PRODUCT)
    table.save(path)
    embedding = vqrs.torch.Embedding.from_table(path)
    safetensors.torch.save_model(embedding, tmp_path / "model.safetensors")
    other = vqrs.torch.Embedding.from_pretrained(make_rows(seed=1), random_state=0, **PRODUCT)
    safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other.weight, embedding.weight)
    np.testing.assert_array_equal(vqrs.open(path).to_numpy(), table.to_numpy())


@pytest.mark.parametrize("half", [False, True], ids=["as made", "half"])
@every_form
def test_states_of_every_form_are_tensors_of_their_own(table: vqrs.Table, half: bool, tmp_path: Path) -> None:
    for trainable in (False, True):
        embedding = vqrs.torch.Embedding.from_table(table, trainable=trainable)
        embedding = embedding.half() if half and not trainable else embedding
        safetensors.torch.save_file(embedding.state_dict(), tmp_path / "state.safetensors")
        other = vqrs.torch.Embedding.from_pretrained(
            make_rows(*table.shape), trainable=trainable, method="product", n_subvectors=2, n_bits=2
        )
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
        torch.testing.assert_close(other.weight, embedding.float().weight, rtol=1e-6, atol=1e-6)


class Tied(nn.Module):
    """Two modules of one weight that do different things, so that they stay two."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(300, 8)
        self.sums = nn.EmbeddingBag(300, 8, mode="sum")
        self.sums.weight = self.rows.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(ids)[:, 0] + 3 * self.sums(ids)


@pytest.mark.parametrize("trainable", [False, True])
def test_reassign_and_distill_keep_modules_of_one_weight_together(trainable: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, again = Tied(), Tied()
    teacher = copy.deepcopy(model)
    vqrs.torch.compress_(model, method="product", n_subvectors=4, n_bits=4, min_rows=1, trainable=trainable)
    ids = torch.randint(300, (40, 3))
    for change in (
        lambda: model.rows.reassign(target=torch.randn(300, 8)),
        lambda: model.sums.reassign(target=torch.randn(300, 8)),
        lambda: vqrs.torch.distill(model, teacher, [ids], epochs=5),
    ):
        before = model.rows.weight.detach()
        change()
        assert not torch.equal(model.rows.weight, before)
        assert torch.equal(model.rows.weight, model.sums.weight)
        assert model.rows._table is model.sums._table
    assert copy.deepcopy(model).rows._origin.modules[0] is not model.rows
    vqrs.torch.save_pretrained(model, tmp_path)
    vqrs.torch.from_pretrained(tmp_path, model=again)
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-2, atol=1e-2)


def test_targets_of_averages_are_finite() -> None:
    module = vqrs.torch.Embedding(100, 8, method="product", n_subvectors=2, n_bits=3, trainable=True)
    averages = vqrs.torch.EMACodebooks(module)
    before = module.weight.detach()
    with pytest.raises(ValueError, match="NaN or infinity"):
        averages.update(torch.arange(100), torch.full((100, 8), torch.nan), reassign=False)
    assert torch.equal(module.weight, before)


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_trained_tables_of_any_dtype_can_be_stored_and_loaded(
    table: vqrs.Table, dtype: torch.dtype, tmp_path: Path
) -> None:
    embedding = vqrs.torch.Embedding.from_table(table, trainable=True).to(dtype)
    embedding.to_table().save(tmp_path / "rows.vqrs.safetensors")
    stored = torch.from_numpy(vqrs.open(tmp_path / "rows.vqrs.safetensors").to_numpy())
    torch.testing.assert_close(stored, embedding.weight.detach().float(), rtol=0.05, atol=0.05)
    for trainable in (False, True):
        again = vqrs.torch.Embedding.from_table(table, trainable=trainable)
        again.load_state_dict(embedding.state_dict())
        torch.testing.assert_close(again.weight.float(), stored, rtol=0.05, atol=0.05)


def test_straight_through_gradients_of_many_steps_take_bounded_memory() -> None:
    module = vqrs.torch.Embedding.from_table(TABLES["books-single-float32-v1"], trainable=True, straight_through=True)
    for step in range(100):
        module(torch.tensor([1, 2, 1])).sum().backward()
        assert len(module._row_gradients) <= 33, step
    ids, gradients = module.row_gradients()
    assert ids.tolist() == [1, 2]
    assert gradients[:, 0].tolist() == [200, 100]
