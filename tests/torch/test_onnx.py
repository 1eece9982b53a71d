"""Models with compressed embeddings, exported to ONNX and run by onnxruntime."""

import collections
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vqrs
import vqrs.torch
import vqrs.torch.onnx
from vqrs import _core

onnx = pytest.importorskip("onnx", reason="export to ONNX needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="running an exported model needs onnxruntime")

GOLDEN = {path.stem: path for path in sorted((Path(__file__).parents[1] / "data").glob("*.safetensors"))}
COMPUTED = {name: GOLDEN.pop(name) for name in list(GOLDEN) if name.startswith(("hashed", "switch"))}
"""Tables whose rows are computed from their numbers, in 64 bits."""
GROUPS = {name: GOLDEN.pop(name) for name in list(GOLDEN) if name.startswith("segments")}
"""Tables of groups of rows, which are refused: a test below says with which words."""
N_ROWS, DIM = 3000, 32


def has_onnxscript() -> bool:
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        return False
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


DYNAMO = pytest.param(
    True,
    id="dynamo",
    marks=pytest.mark.skipif(not has_onnxscript(), reason="this exporter needs torch 2.6 and onnxscript"),
)
LEGACY = pytest.param(False, id="torchscript")
both_exporters = pytest.mark.parametrize("dynamo", [DYNAMO, LEGACY])


def make_rows(n_rows: int = N_ROWS, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n_rows, dim), dtype=np.float32)


def export(model: nn.Module, inputs: tuple, path: Path, dynamo: bool) -> onnx.ModelProto:
    """Export with every axis of every input dynamic."""
    names = [f"input_{number}" for number in range(len(inputs))]
    axes = [{axis: f"axis_{number}_{axis}" for axis in range(tensor.dim())} for number, tensor in enumerate(inputs)]
    arguments: dict = {"input_names": names, "dynamo": dynamo}
    if dynamo:
        arguments |= {"dynamic_shapes": [dict.fromkeys(axis, torch.export.Dim.AUTO) for axis in axes], "verbose": False}
        arguments |= {"external_data": False}
    else:
        arguments |= {"dynamic_axes": dict(zip(names, axes, strict=True)), "opset_version": 18}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        vqrs.torch.onnx.export(model.eval(), inputs, path, **arguments)
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def run(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def nodes(model: onnx.ModelProto) -> collections.Counter:
    assert not model.functions
    return collections.Counter(node.op_type for node in model.graph.node)


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# ---- every form, every layout ---------------------------------------------------------------------------------------

ROTATED = {"linear-hadamard-table2-v1", "trellis-even-v1", "trellis-variance-v1"}
"""Two matrix products stand for sums, which come in another order."""
FUSED = {"levels-column-int8-v1", "linear-matrix-int8-v1"}
"""The core rounds a product and its offset once, ONNX twice."""


SLOWLY = (
    "join-sum-v1",
    "levels-block-nf4-byte-scales-v1",
    "levels-free4-v1",
    "linear-matrix-int8-v1",
    "sparse-bitmap-int8-v1",
    "trellis-variance-v1",
)
"""One of each form by the newer exporter too, which takes seconds; the graphs below are all made by it."""


def join_of_columns() -> vqrs.Table:
    parts = [vqrs.open(GOLDEN[name]) for name in ("books-two-widths-float16-v1", "levels-row-int4-v1")]
    decoders = [part.info()["decoder"] for part in parts]
    description = {
        "kind": "product",
        "parameters": parts[0].parameters,
        "decoder": {"form": "join", "dim": 10, "mode": "columns", "parts": decoders},
    }
    tensors = {
        f"parts.{n}.{name}": array for n, part in enumerate(parts) for name, array in part._core.tensors().items()
    }
    codes = np.concatenate([part.codes for part in parts], axis=1)
    return vqrs.Table(_core.Table.from_parts(json.dumps(description), tensors, codes, errors={"relative": 0.0}))


def golden(name: str) -> vqrs.Table:
    return join_of_columns() if name == "join-columns" else vqrs.open(GOLDEN[name])


@pytest.mark.parametrize(
    ("name", "dynamo"),
    [(name, False) for name in [*GOLDEN, "join-columns"]]
    + [pytest.param(name, *DYNAMO.values, marks=DYNAMO.marks) for name in SLOWLY],
)
def test_every_form_gives_equal_rows(name: str, dynamo: bool, tmp_path: Path) -> None:
    embedding = vqrs.torch.Embedding.from_table(golden(name))
    ids = torch.tensor([[3, 0, 19], [7, 7, 1]])
    export(embedding, (ids,), tmp_path / "model.onnx", dynamo)
    for other in (ids, torch.arange(20).reshape(4, 5).flip(0)):
        found, expected = run(tmp_path / "model.onnx", other), embedding(other)
        if name in ROTATED | FUSED:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in ("levels-bfloat16-v1", "levels-float16-v1")])
def test_trained_values_are_exported(name: str, tmp_path: Path) -> None:
    embedding = vqrs.torch.Embedding.from_table(golden(name), trainable=True)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.mul_(1.1)
    ids = torch.tensor([[3, 0, 19], [7, 7, 1]])
    export(embedding, (ids,), tmp_path / "model.onnx", dynamo=False)
    torch.testing.assert_close(run(tmp_path / "model.onnx", ids), embedding(ids).detach(), rtol=1e-6, atol=1e-6)
    assert all(parameter.requires_grad for parameter in embedding.parameters())


@pytest.mark.parametrize("path", COMPUTED.values(), ids=COMPUTED)
def test_rows_computed_from_their_numbers_are_refused(path: Path, tmp_path: Path) -> None:
    embedding = vqrs.torch.Embedding.from_table(path)
    with pytest.raises(ValueError, match="computed from their numbers, which ONNX cannot"):
        export(embedding, (torch.tensor([1]),), tmp_path / "model.onnx", dynamo=False)


# ---- graphs and files ------------------------------------------------------------------------------------------------

GRAPHS = {
    "product, 8 bits": (
        {"method": "product", "n_subvectors": 4, "n_bits": 8},
        {"Gather": 2, "Concat": None, "Add": 1},
        ((N_ROWS, 4), np.uint8),
    ),
    "product, 4 bits": (
        {"method": "product", "n_subvectors": 8, "n_bits": 4},
        {"Gather": 3, "Concat": None, "Add": 1},
        ((N_ROWS, 4), np.uint8),
    ),
    "product, 5 bits": (
        {"method": "product", "n_subvectors": 8, "n_bits": 5},
        {"Gather": 3, "Concat": None, "Add": 1, "ReduceSum": 1},
        ((N_ROWS, 5), np.uint8),
    ),
    "residual": (
        {"method": "residual", "n_stages": 4, "n_bits": 6},
        {"Gather": 3, "Add": 4, "ReduceSum": 1},
        ((N_ROWS, 3), np.uint8),
    ),
    "int8 of a row": (
        {"method": "scalar", "dtype": "int8"},
        {"Gather": 3, "Mul": 3, "Add": 1, "Cast": None},
        ((N_ROWS, DIM), np.uint8),
    ),
    "int8 of a column": (
        {"method": "scalar", "dtype": "int8", "granularity": "column"},
        {"Gather": 1, "Mul": 1, "Add": 1},
        ((N_ROWS, DIM), np.uint8),
    ),
    "int4 of a row": (
        {"method": "scalar", "dtype": "int4"},
        {"Gather": 4, "Mul": 3, "Add": 1},
        ((N_ROWS, DIM // 2), np.uint8),
    ),
    "int4 of a block": (
        {"method": "scalar", "dtype": "int4", "granularity": "block", "block_size": 8},
        {"Gather": 4, "Mul": 3, "Add": 1, "Expand": 2},
        ((N_ROWS, DIM // 2), np.uint8),
    ),
    "nf4": (
        {"method": "scalar", "dtype": "nf4"},
        {"Gather": 4, "Mul": 2},
        ((N_ROWS, DIM // 2), np.uint8),
    ),
    "rotated": (
        {"method": "rotated", "n_bits": 4},
        {"Gather": 4, "MatMul": 6},
        ((N_ROWS, DIM // 2), np.uint8),
    ),
    "float16": ({"method": "scalar", "dtype": "float16"}, {"Gather": 1, "Cast": 1}, ((N_ROWS, DIM), np.float16)),
}
"""What is in a graph: nodes (all of these types; None: any number), and the shape and type of the codes."""
FREE = {"Shape", "Reshape", "Cast", "Unsqueeze", "Squeeze", "Slice", "Concat", "Constant", "Div", "Pad", "Mul", "Add"}
"""Nodes about shapes and types, and the constants of a rotation."""


@pytest.mark.parametrize("dynamo", [DYNAMO])
@pytest.mark.parametrize(("way", "expected", "codes"), GRAPHS.values(), ids=GRAPHS)
def test_graphs_are_gathers_and_files_as_small_as_tables(
    way: dict, expected: dict, codes: tuple, dynamo: bool, tmp_path: Path
) -> None:
    table = vqrs.compress(make_rows(), random_state=0, **way)
    embedding, path = vqrs.torch.Embedding.from_table(table), tmp_path / "model.onnx"
    model = export(embedding, (torch.tensor([[3, 0, 19]]),), path, dynamo)
    found = nodes(model)
    assert {kind: found[kind] for kind, count in expected.items() if count} == {
        kind: count for kind, count in expected.items() if count
    }
    assert set(found) <= FREE | set(expected)
    arrays = initializers(model)
    shape, dtype = codes
    # One tensor of as many rows as the table holds the codes; others, if any, the scales of rows: two bytes each.
    of_rows = [array for array in arrays.values() if array.ndim and array.shape[0] == N_ROWS]
    assert sum(array.shape == shape and array.dtype == dtype for array in of_rows) == 1
    assert sum(array.nbytes for array in of_rows) == table.codes.nbytes
    assert not any(array.dtype in (np.float32, np.float64) for array in of_rows)
    # 40 kB: the text of the graph, where each node tells where it comes from, and constants of rotations.
    assert path.stat().st_size < table.codes.nbytes + sum(a.nbytes for a in table._core.tensors().values()) + 40_000
    ids = torch.randint(N_ROWS, (50, 40), generator=torch.Generator().manual_seed(0))
    close = {"rtol": 2e-6, "atol": 2e-6} if "MatMul" in expected or "column" in way.values() else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(run(path, ids), embedding(ids), **close)


def test_a_file_of_codes_is_not_blown_up(tmp_path: Path) -> None:
    """The promise in figures: the file of a 16 times smaller table is 16 times smaller than that of the plain one."""
    rows = make_rows(20_000, 64)
    small = vqrs.torch.Embedding.from_pretrained(rows, method="product", n_subvectors=16, n_bits=8, random_state=0)
    export(small, (torch.tensor([1, 2]),), tmp_path / "small.onnx", dynamo=False)
    assert (tmp_path / "small.onnx").stat().st_size < 1.05 * small.to_table().nbytes < rows.nbytes / 13


# ---- inputs, modules, models -----------------------------------------------------------------------------------------


@both_exporters
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.int64, (4,)), (torch.int64, (2, 3, 4)), (torch.int32, (2, 3))], ids=str
)
def test_ids_of_any_shape(dtype: torch.dtype, shape: tuple, dynamo: bool, tmp_path: Path) -> None:
    table = vqrs.compress(make_rows(), random_state=0, method="product", n_subvectors=4, n_bits=8)
    embedding = vqrs.torch.Embedding.from_table(table)
    ids = torch.randint(N_ROWS, shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    export(embedding, (ids,), tmp_path / "model.onnx", dynamo)
    more = torch.randint(N_ROWS, [size + 3 for size in shape], dtype=dtype, generator=torch.Generator().manual_seed(1))
    for other in (ids, more):
        assert torch.equal(run(tmp_path / "model.onnx", other), embedding(other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_rows_have_the_dtype_of_the_module(dtype: torch.dtype, tmp_path: Path) -> None:
    table = vqrs.compress(make_rows(), random_state=0, method="product", n_subvectors=4, n_bits=8)
    embedding = vqrs.torch.Embedding.from_table(table, dtype=dtype)
    ids = torch.tensor([[3, 0, 19]])
    export(embedding, (ids,), tmp_path / "model.onnx", dynamo=False)
    assert torch.equal(run(tmp_path / "model.onnx", ids), embedding(ids))


@both_exporters
@pytest.mark.parametrize("padding_idx", [None, 5])
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)], ids=str
)
def test_bags(mode: str, padding_idx: int | None, weighted: bool, dynamo: bool, tmp_path: Path) -> None:
    table = vqrs.compress(make_rows(), random_state=0, method="scalar", dtype="int8")
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode=mode, padding_idx=padding_idx)
    model = Weighted(bag) if weighted else bag
    generator = torch.Generator().manual_seed(0)
    ids, more = torch.tensor([[3, 5, 19], [5, 5, 5]]), torch.randint(12, (7, 6), generator=generator)
    weights = [torch.randn(batch.shape, generator=generator) for batch in (ids, more)]
    export(model, (ids, weights[0]) if weighted else (ids,), tmp_path / "model.onnx", dynamo)
    for batch, factor in zip((ids, more), weights, strict=True):
        inputs = (batch, factor) if weighted else (batch,)
        found, expected = run(tmp_path / "model.onnx", *inputs), model(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Weighted(nn.Module):
    """A bag with weights as its second input."""

    def __init__(self, bag: nn.Module) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.bag(ids, per_sample_weights=weights)


class Classifier(nn.Module):
    """Two tables, one of them used twice, beside plain layers."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.from_numpy(make_rows())
        self.tokens = vqrs.torch.Embedding.from_pretrained(
            rows, method="product", n_subvectors=8, n_bits=4, random_state=0
        )
        self.features = vqrs.torch.EmbeddingBag.from_pretrained(rows, method="scalar", dtype="int4", mode="mean")
        self.same_tokens = self.tokens
        self.head = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(ids).mean(1) + self.same_tokens(ids[:, 0]) + self.features(features))


@both_exporters
def test_whole_models(dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier()
    inputs = torch.randint(N_ROWS, (2, 5)), torch.randint(N_ROWS, (2, 4))
    graph = export(model, inputs, tmp_path / "model.onnx", dynamo)
    more = torch.randint(N_ROWS, (9, 7)), torch.randint(N_ROWS, (9, 2))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "model.onnx", *more), model(*more), rtol=1e-5, atol=1e-5)
    # The table that is used twice is there once.
    tokens = [array for array in initializers(graph).values() if array.shape == (N_ROWS, 4)]
    assert len(tokens) == 1
    assert tokens[0].dtype == np.uint8


@both_exporters
def test_torchs_own_export_reads_codebooks_and_names_what_scales_need(dynamo: bool, tmp_path: Path) -> None:
    ids, path = torch.tensor([[3, 0, 19]]), tmp_path / "model.onnx"
    arguments = {"verbose": False} if dynamo else {"opset_version": 18}
    ways = {"product": {"n_subvectors": 4, "n_bits": 4}, "scalar": {"dtype": "int4"}}
    small = {
        method: vqrs.torch.Embedding.from_pretrained(make_rows(), method=method, random_state=0, **way)
        for method, way in ways.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(nn.Sequential(small["product"]), (ids,), path, dynamo=dynamo, **arguments)
        assert torch.equal(run(path, ids), small["product"](ids))
        # The newer exporter tries again in another way, and stops at an operator that ONNX has not: vqrs.lookup.
        with pytest.raises(Exception, match=r"vqrs\.lookup" if dynamo else r"vqrs\.torch\.onnx\.export"):
            torch.onnx.export(nn.Sequential(small["scalar"]), (ids,), path, dynamo=dynamo, **arguments)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_as_before(fail: bool) -> None:
    model = Classifier()
    before = {name: (type(module), module.decoder, module.codes) for name, module in compressed(model)}
    ids = torch.tensor([[1, 2, 3]])
    expected, state = model(ids, ids), model.state_dict()
    try:
        with vqrs.torch.onnx.exportable(model) as same:
            assert same is model
            torch.testing.assert_close(model(ids, ids), expected)
            assert type(model.tokens) is not vqrs.torch.Embedding
            if fail:
                raise KeyError("an exporter gave up")
    except KeyError:
        assert fail
    after = {name: (type(module), module.decoder, module.codes) for name, module in compressed(model)}
    assert all(new is old for name in before for new, old in zip(after[name], before[name], strict=True))
    assert torch.equal(model(ids, ids), expected)
    assert model.state_dict().keys() == state.keys()


def compressed(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = vqrs.torch.Embedding, vqrs.torch.EmbeddingBag
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    rows = make_rows(40, 5)
    parts = [vqrs.compress(rows[:20], method="scalar"), vqrs.compress(rows[20:], method="scalar", dtype="int4")]
    groups = _core.Table.from_groups(
        [part._core.codec() for part in parts],
        [part.codes for part in parts],
        np.repeat(np.uint8([0, 1]), 20),
        kind="mixed",
        parameters={},
        errors={"relative": 0.0},
    )
    embedding = vqrs.torch.Embedding.from_table(vqrs.Table(groups))
    with pytest.raises(ValueError, match=r"groups of rows \(MixedPrecisionQuantizer\) cannot be exported"):
        vqrs.torch.onnx.export(embedding, (torch.tensor([1]),), tmp_path / "model.onnx")
    floats = {"residual": {"kind": "scalar", "parameters": {"dtype": "float16"}}}
    table = vqrs.compress(rows, method="product", n_subvectors=5, n_bits=3, random_state=0, **floats)
    with pytest.raises(ValueError, match="rows of floats beside other codes"):
        vqrs.torch.onnx.export(vqrs.torch.Embedding.from_table(table), (torch.tensor([1]),), tmp_path / "model.onnx")
    bag = vqrs.torch.EmbeddingBag.from_table(parts[0])
    with vqrs.torch.onnx.exportable(bag), pytest.raises(ValueError, match="offsets cannot be exported"):
        bag(torch.tensor([1, 2]), torch.tensor([0]))


def test_rotations_of_any_width(tmp_path: Path) -> None:
    for dim in (3, 8, 24, 33):
        embedding = vqrs.torch.Embedding.from_pretrained(
            make_rows(200, dim), method="rotated", n_bits=4, random_state=0
        )
        ids = torch.arange(200).reshape(10, 20)
        export(embedding, (ids,), tmp_path / "model.onnx", dynamo=False)
        found, expected = run(tmp_path / "model.onnx", ids), embedding(ids)
        assert float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).max()) < 4e-7 * math.sqrt(dim)


class Scaled(nn.Embedding):
    """As the word embeddings of some language models."""

    embed_scale = 3.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


@both_exporters
def test_scaled_embeddings_are_exported_with_their_factor(dynamo: bool, tmp_path: Path) -> None:
    model = nn.Sequential(Scaled(N_ROWS, DIM))
    vqrs.torch.compress_(model, method="scalar", dtype="int8", min_rows=1)
    assert type(model[0]) is vqrs.torch.ScaledEmbedding
    ids = torch.randint(N_ROWS, (2, 5))
    export(model, (ids,), tmp_path / "model.onnx", dynamo)
    torch.testing.assert_close(run(tmp_path / "model.onnx", ids), model(ids))


class Shifted(vqrs.torch.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input) + 1


def test_a_forward_that_is_not_known_is_refused(tmp_path: Path) -> None:
    model = Shifted(N_ROWS, DIM, method="scalar", dtype="int8")
    with pytest.raises(ValueError, match="Shifted has a forward of its own"):
        vqrs.torch.onnx.export(model, (torch.tensor([1]),), tmp_path / "model.onnx")
    assert type(model) is Shifted
