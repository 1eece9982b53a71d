"""The operators ``vqrs::lookup`` and ``vqrs::pool``: torch's own checks, gradients, compiled and exported programs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vqrs
import vqrs.torch
from vqrs import _core
from vqrs.torch import operators
from vqrs.torch.trained.export import (
    Scalar,
    Term,
    digit,
    hashed,
    hashed_part,
    linear_part,
    rows_part,
    stored,
    switch_part,
)

N_ROWS, DIM = 60, 13
ROWS = np.random.default_rng(7).standard_normal((N_ROWS, DIM), dtype=np.float32)
OPERATORS = torch.ops.vqrs
IDS = torch.tensor([[3, 3, 0], [7, 19, 59]])
OFFSETS = torch.tensor([0, 2, 2])

COMPRESSIONS = {
    "books": {"method": "product", "n_subvectors": 5, "n_bits": 3},
    "int8 books": {"method": "product", "n_subvectors": 5, "n_bits": 3, "codebook_dtype": "int8"},
    "sums": {"method": "residual", "n_stages": 2, "n_bits": 3},
    "levels of rows": {"method": "scalar", "dtype": "int4"},
    "levels of columns": {"method": "scalar", "dtype": "int8", "granularity": "column"},
    "levels of a table": {"method": "scalar", "dtype": "nf4", "granularity": "block", "block_size": 4},
    "linear": {"method": "rotated", "n_bits": 3},
    "matrix": {"method": "optimized-product", "n_subvectors": 4, "n_bits": 3},
    "join": {"method": "product", "n_subvectors": 5, "n_bits": 3, "residual": {"kind": "scalar", "parameters": {}}},
    "trellis": {"method": "trellis"},
    "sparse": {"method": "sparse", "density": 0.5},
}


def of_groups() -> vqrs.Table:
    """Rows of two quantizers in no order, as ``MixedPrecisionQuantizer`` makes them of larger tables."""
    group_of = np.random.default_rng(0).permutation(np.repeat(np.uint8([0, 1]), N_ROWS // 2))
    parts = [
        vqrs.compress(ROWS[group_of == 0], method="scalar", dtype="int4"),
        vqrs.compress(ROWS[group_of == 1], method="product", n_subvectors=2, n_bits=3, random_state=0),
    ]
    codecs, codes = [part._core.codec() for part in parts], [part.codes for part in parts]
    about = {"kind": "mixed", "parameters": {}, "errors": {"relative": 0.0}}
    return vqrs.Table(_core.Table.from_groups(codecs, codes, group_of, **about))


def of_numbers() -> vqrs.Table:
    """Rows of every kind of place: hashed, own rows of some ids, stored pointers, a product, shared arrays."""
    array, scales = torch.from_numpy(ROWS[:20]), torch.linspace(0.5, 1.5, N_ROWS)
    pointers = np.random.default_rng(0).integers(0, 20, size=(N_ROWS, 1))
    terms = [
        Term(array, hashed(2**64 - 3, 240), width=4, stride=1, sign=5),
        Term(array, stored(0, 20), start=4, width=9, stride=13, weight=Scalar(scales, digit(N_ROWS))),
        Term(array, digit(20, 3), multiply=True),
    ]
    rest = hashed_part(DIM, terms, pointers=pointers, bits=5)
    own = linear_part(rows_part(torch.from_numpy(ROWS[:10, :3].copy())), torch.from_numpy(ROWS[:3]))
    few = hashed_part(DIM, [Term(array, hashed(9, 20))], rows=7)
    shared = {"cases.1.decoder.arrays.0": "otherwise.arrays.0"}
    part = switch_part(N_ROWS, [(range(5, 15), own), ([0, 1, 7, 20, 40, 50, 59], few)], rest, shared)
    about = {"kind": "made up", "parameters": {}, "decoder": part.description}
    return vqrs.Table(_core.Table.from_parts(json.dumps(about), part.tensors, part.codes, errors={"relative": 0.0}))


@pytest.fixture(params=[*COMPRESSIONS, "segments", "switch"], scope="module")
def table(request: pytest.FixtureRequest) -> vqrs.Table:
    if request.param in ("segments", "switch"):
        return of_groups() if request.param == "segments" else of_numbers()
    return vqrs.compress(ROWS, random_state=0, **COMPRESSIONS[request.param])


@pytest.fixture(params=[False, True], ids=["frozen", "trainable"])
def embedding(request: pytest.FixtureRequest, table: vqrs.Table) -> vqrs.torch.Embedding:
    made = vqrs.torch.Embedding.from_table(table, trainable=request.param)
    return made.double() if request.param else made


def decoded(table: vqrs.Table) -> torch.Tensor:
    return torch.from_numpy(table.to_numpy())


# ---- one law: operators = modules = core ----------------------------------------------------------------------------


def test_operators_read_the_same_rows(table: vqrs.Table) -> None:
    embedding = vqrs.torch.Embedding.from_table(table)
    expected = decoded(table)
    for ids in (IDS, IDS.int(), IDS[:0], IDS.T):
        rows = OPERATORS.lookup(ids, *embedding._reads(), torch.float32, -1)
        assert torch.equal(rows, expected[ids.long()])
    for mode in ("sum", "mean", "max"):
        pooled = OPERATORS.pool(IDS.flatten(), OFFSETS, None, *embedding._reads(), mode, torch.float32, -1)
        torch.testing.assert_close(pooled, F.embedding_bag(IDS.flatten(), expected, OFFSETS, mode=mode))
    assert OPERATORS.lookup(IDS, *embedding._reads(), torch.bfloat16, -1).dtype == torch.bfloat16
    with pytest.raises(IndexError, match="id 60 at position 1"):
        OPERATORS.lookup(torch.tensor([0, 60]), *embedding._reads(), torch.float32, -1)
    with pytest.raises(TypeError, match=r"not torch\.float32"):
        OPERATORS.lookup(torch.tensor([0.0]), *embedding._reads(), torch.float32, -1)


def test_operators_read_tensors_that_no_table_owns(table: vqrs.Table) -> None:
    """As in a program that was exported and loaded: without a copy of the codes, and with later changes seen."""
    embedding = vqrs.torch.Embedding.from_table(table)
    codes, tensors, text = embedding._reads()
    codes, tensors = codes.clone(), [tensor.clone() for tensor in tensors]
    expected = decoded(table)
    assert torch.equal(OPERATORS.lookup(IDS, codes, tensors, text, torch.float32, -1), expected[IDS])
    known = operators._TABLES[id(codes)]
    assert torch.equal(OPERATORS.lookup(IDS, codes, tensors, text, torch.float32, -1), expected[IDS])
    assert operators._TABLES[id(codes)] is known
    assert known.table.codes().ctypes.data == codes.data_ptr()
    if table.info()["decoder"]["form"] not in ("segments", "switch"):  # whose rows are more than their codes
        codes.copy_(codes.flip(0))
        assert torch.equal(OPERATORS.lookup(IDS, codes, tensors, text, torch.float32, -1), expected.flip(0)[IDS])
    before = len(operators._TABLES)
    del codes, known
    assert len(operators._TABLES) == before - 1


def test_codes_that_do_not_fit_are_refused(table: vqrs.Table) -> None:
    codes, tensors, text = vqrs.torch.Embedding.from_table(table)._reads()
    with pytest.raises((ValueError, RuntimeError)):
        OPERATORS.lookup(IDS, codes[:, :-1].clone(), tensors, text, torch.float32, -1)
    if tensors:
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            OPERATORS.lookup(IDS, codes.clone(), [tensor[:1] for tensor in tensors], text, torch.float32, -1)


# ---- torch's own checks ---------------------------------------------------------------------------------------------


def test_opcheck_of_every_operator(embedding: vqrs.torch.Embedding) -> None:
    reads, dtype = embedding._reads(), embedding.dtype
    weights = torch.rand(6, dtype=dtype, requires_grad=True)
    detached = reads[0], [tensor.detach() for tensor in reads[1]], reads[2]
    rows = torch.rand(2, 3, DIM, dtype=dtype)
    bags = torch.rand(3, DIM, dtype=dtype)
    flat = IDS.flatten()
    for operator, arguments in (
        (OPERATORS.lookup, (IDS, *reads, dtype, -1)),
        (OPERATORS.pool, (flat, OFFSETS, None, *reads, "mean", dtype, -1)),
        (OPERATORS.pool, (flat, OFFSETS, weights, *reads, "sum", dtype, 3)),
        (OPERATORS.lookup_backward, (rows, IDS, *detached, 3)),
        (OPERATORS.pool_backward, (bags, flat, OFFSETS, weights.detach(), *detached, "sum", 3)),
    ):
        answers = torch.library.opcheck(operator.default, arguments)
        assert len(answers) == 4
        assert set(answers.values()) == {"SUCCESS"}


def test_gradients_of_every_differentiable_input(table: vqrs.Table) -> None:
    embedding = vqrs.torch.Embedding.from_table(table, trainable=True).double()
    codes, tensors, text = embedding._reads()
    floats = [number for number, tensor in enumerate(tensors) if tensor.requires_grad]
    assert floats

    def among(values: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        chosen = dict(zip(floats, values, strict=True))
        return [chosen.get(number, tensor) for number, tensor in enumerate(tensors)]

    def lookup(*values: torch.Tensor) -> torch.Tensor:
        return OPERATORS.lookup(IDS, codes, among(values), text, torch.float64, -1)

    def pool(weights: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return OPERATORS.pool(IDS.flatten(), OFFSETS, weights, codes, among(values), text, "sum", torch.float64, 3)

    leaves = [tensors[number].detach().requires_grad_() for number in floats]
    assert torch.autograd.gradcheck(lookup, leaves)
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, (weights, *leaves))


def test_padding_gets_no_gradient() -> None:
    table = vqrs.compress(ROWS, method="product", n_subvectors=5, n_bits=3, random_state=0)
    codes, tensors, text = vqrs.torch.Embedding.from_table(table, trainable=True)._reads()
    ids = torch.tensor([3, 3])
    OPERATORS.lookup(ids, codes, tensors, text, torch.float32, 3).sum().backward()
    assert not tensors[0].grad.any()
    OPERATORS.lookup(ids, codes, tensors, text, torch.float32, 4).sum().backward()
    assert tensors[0].grad.any()


def test_weights_of_a_frozen_bag_get_torchs_gradient() -> None:
    table = vqrs.compress(ROWS, method="scalar")
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode="sum", padding_idx=3)
    own = nn.EmbeddingBag.from_pretrained(decoded(table), mode="sum", padding_idx=3, freeze=False)
    gradients = []
    for module in (bag, own):
        weights = torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()
        module(IDS, None, weights).square().sum().backward()
        gradients.append(weights.grad)
    torch.testing.assert_close(*gradients)


# ---- eager modules --------------------------------------------------------------------------------------------------


def test_out_is_filled(table: vqrs.Table) -> None:
    embedding = vqrs.torch.Embedding.from_table(table)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.full((2, 3, DIM), 7.0, dtype=dtype)
        assert embedding(IDS, out=out) is out
        assert torch.equal(out, decoded(table)[IDS].to(dtype))
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode="sum")
    pooled = torch.empty(2, DIM)
    assert bag(IDS, out=pooled) is pooled
    assert torch.equal(pooled, bag(IDS))
    for bad in (
        torch.empty(2, 3, DIM + 1),
        torch.empty(2, 3, DIM, dtype=torch.float64),
        torch.empty(DIM, 3, 2).permute(2, 1, 0),
        torch.empty(2, 3, DIM, requires_grad=True),
        torch.empty(2, 3, DIM, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"expected a contiguous CPU tensor of shape \(2, 3, 13\)"):
            embedding(IDS, out=bad)


def test_out_is_refused_where_torch_gathers() -> None:
    table = vqrs.compress(ROWS, method="product", n_subvectors=5, n_bits=3)
    embedding = vqrs.torch.Embedding.from_table(table, trainable=True)
    with pytest.raises(ValueError, match="out= is for frozen modules"):
        embedding(IDS, out=torch.empty(2, 3, DIM))


def test_large_results_are_aligned_and_right() -> None:
    table = vqrs.compress(ROWS, method="product", n_subvectors=5, n_bits=3)
    embedding = vqrs.torch.Embedding.from_table(table)
    ids = torch.arange(700_000) % N_ROWS
    rows = embedding(ids)
    assert rows.nbytes > operators._LARGE
    assert rows.data_ptr() % 64 == 0
    assert torch.equal(rows[-N_ROWS:], decoded(table)[ids[-N_ROWS:]])
    assert torch.equal(embedding.half()(ids)[-N_ROWS:], decoded(table)[ids[-N_ROWS:]].half())


def test_offsets_must_be_integers() -> None:
    bag = vqrs.torch.EmbeddingBag.from_table(vqrs.compress(ROWS, method="scalar"))
    with pytest.raises(TypeError, match=r"offsets must be a tensor of int32 or int64, not torch\.float32"):
        bag(torch.tensor([1, 2]), torch.tensor([0.0]))


def test_threads_of_torch_bound_those_of_a_call() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert operators._threads(operators._ALONE + 1) == threads
            assert operators._threads(operators._ALONE) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("transform", ["vmap", "fake", "make_fx", "meta device"])
def test_modes_of_torch_see_the_call(transform: str) -> None:
    table = vqrs.compress(ROWS, method="product", n_subvectors=5, n_bits=3)
    embedding = vqrs.torch.Embedding.from_table(table)
    expected = decoded(table)[IDS]
    if transform == "vmap":
        torch.testing.assert_close(torch.func.vmap(embedding)(IDS), expected)
    elif transform == "make_fx":
        traced = torch.fx.experimental.proxy_tensor.make_fx(embedding)(torch.zeros_like(IDS))
        assert torch.equal(traced(IDS), expected)
    elif transform == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert embedding(mode.from_tensor(IDS)).shape == expected.shape
    else:
        with torch.device("meta"):  # new tensors go there, rows of ids on the CPU do not
            assert torch.equal(embedding(IDS), expected)


# ---- programs -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Rows, bags with padding and weights, and a layer behind them."""

    def __init__(self, table: vqrs.Table, trainable: bool = False) -> None:
        super().__init__()
        self.rows = vqrs.torch.Embedding.from_table(table, trainable=trainable)
        self.bags = vqrs.torch.EmbeddingBag.from_table(table, trainable=trainable, mode="sum", padding_idx=3)
        self.layer = nn.Linear(DIM, 2)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.layer(self.rows(ids).mean(1) + self.bags(ids, None, weights))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_compiles_without_a_graph_break(table: vqrs.Table, trainable: bool) -> None:
    torch._dynamo.reset()
    model = Model(table, trainable)
    weights = torch.rand(IDS.shape, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(IDS, weights)
    result = compiled(IDS, weights)
    torch.testing.assert_close(result, expected)
    parameters = [weights, *model.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), parameters), wanted)
    if not trainable:
        with pytest.raises(IndexError, match="is out of range for a table of 60 rows"):
            compiled(IDS + 60, weights)


def test_frozen_programs_call_the_operators(table: vqrs.Table) -> None:
    model = Model(table).eval()
    program = torch.export.export(model, (IDS, torch.rand(IDS.shape)))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"vqrs.lookup.default", "vqrs.pool.default"} <= called
    for module in (model.rows, model.bags):
        module._operators = False
    program = torch.export.export(model, (IDS, torch.rand(IDS.shape)))
    assert not any("vqrs" in str(node.target) for node in program.graph.nodes)


LOADED = """
import sys, torch, vqrs.torch
ids, weights, expected = torch.load(sys.argv[2], weights_only=True)
if sys.argv[1].endswith(".aot.pt2"):
    program = torch._inductor.aoti_load_package(sys.argv[1])
else:
    program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    torch.testing.assert_close(program(ids, weights), expected)
    assert program(ids.repeat(4, 1), weights.repeat(4, 1)).shape == (8, 2)
    program(ids + 60, weights)
"""


def run_loaded(path: Path, model: nn.Module, folder: Path) -> str:
    weights = torch.rand(IDS.shape)
    torch.save((IDS, weights, model(IDS, weights).detach()), folder / "expected.pt")
    command = [sys.executable, "-c", LOADED, str(path), str(folder / "expected.pt")]
    return subprocess.run(command, capture_output=True, text=True).stderr


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=1024)
    dynamic = {"ids": {0: batch}, "weights": {0: batch}}
    return torch.export.export(model, (IDS, torch.rand(IDS.shape)), dynamic_shapes=dynamic)


@pytest.mark.parametrize("table", ["books", "trellis", "segments", "switch"], indirect=True)
def test_exported_programs_load_in_another_process(table: vqrs.Table, tmp_path: Path) -> None:
    model = Model(table).eval()
    torch.export.save(exported(model), tmp_path / "model.pt2")
    errors = run_loaded(tmp_path / "model.pt2", model, tmp_path)
    assert "is out of range for a table of 60 rows" in errors.splitlines()[-1]


NO_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is None


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("method", ["product", "trellis"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_inductor_compiles(method: str, trainable: bool) -> None:
    torch._dynamo.reset()
    parameters = {"n_subvectors": 5, "n_bits": 3} if method == "product" else {}
    model = Model(vqrs.compress(ROWS, method=method, random_state=0, **parameters), trainable)
    weights = torch.rand(IDS.shape)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(IDS, weights), model(IDS, weights))


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C++ compiler")
@pytest.mark.skipif(not hasattr(torch._inductor, "aoti_compile_and_package"), reason="needs torch 2.6")
def test_packages_compiled_ahead_of_time_load_in_another_process(tmp_path: Path) -> None:
    model = Model(vqrs.compress(ROWS, method="product", n_subvectors=5, n_bits=3, random_state=0)).eval()
    path = tmp_path / "model.aot.pt2"
    torch._inductor.aoti_compile_and_package(exported(model), package_path=str(path))
    errors = run_loaded(path, model, tmp_path)
    assert "is out of range for a table of 60 rows" in errors


def test_other_tensors_at_the_same_address_are_not_taken_for_those_of_before() -> None:
    embedding = vqrs.torch.Embedding.from_table(vqrs.compress(ROWS, **COMPRESSIONS["levels of columns"]))
    codes, tensors, text = embedding._reads()
    expected = embedding(IDS)
    for factor in range(1, 100):  # each scaled tensor is freed, and its memory used again
        rows = OPERATORS.lookup(IDS, codes, [tensor * factor for tensor in tensors], text, torch.float32, -1)
        torch.testing.assert_close(rows / factor, expected, rtol=1e-4, atol=1e-4)


def test_outputs_that_autograd_saved_are_not_overwritten_unseen() -> None:
    embedding = vqrs.torch.Embedding.from_table(vqrs.compress(ROWS, **COMPRESSIONS["books"]))
    out, layer = torch.empty(2, 3, DIM), nn.Linear(DIM, 2)
    loss = layer(embedding(IDS, out=out)).sum()
    embedding(IDS + 0, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_outputs_share_no_memory_with_what_is_read() -> None:
    table = vqrs.compress(ROWS, **COMPRESSIONS["books"])
    embedding = vqrs.torch.Embedding.from_table(table)
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode="sum")
    memory = torch.zeros(100 * DIM)
    ids = memory.view(torch.int32)[-100:]
    with pytest.raises(ValueError, match="out shares memory"):
        embedding(ids, out=memory.view(100, DIM))
    weights = memory[:100].view(100, 1)
    with pytest.raises(ValueError, match="out shares memory"):
        bag(torch.zeros(100, 1, dtype=torch.int64), per_sample_weights=weights, out=memory.view(100, DIM))
    over_codes = embedding.codes.view(-1)[: 4 * DIM].view(torch.float32).view(1, DIM)
    with pytest.raises(ValueError, match="out shares memory"):
        embedding(torch.tensor([1]), out=over_codes)
    apart = torch.zeros(200 * DIM)
    assert embedding(apart.view(torch.int32)[:100], out=apart[100 * DIM :].view(100, DIM)).shape == (100, DIM)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, -1, 4], [1, 2], [0, 7], []])
def test_offsets_that_do_not_fit_are_refused(trainable: bool, padding_idx: int | None, offsets: list[int]) -> None:
    """Torch's own embedding bag reads memory that is not its own with some of them."""
    table = vqrs.compress(ROWS, **COMPRESSIONS["books"])
    for mode in ("sum", "mean", "max"):
        bag = vqrs.torch.EmbeddingBag.from_table(table, mode=mode, trainable=trainable, padding_idx=padding_idx)
        with pytest.raises(ValueError, match="not falling, at most 6"):
            bag(IDS.flatten(), torch.tensor(offsets, dtype=torch.int64))
        assert bag(IDS.flatten()[:0], torch.tensor([], dtype=torch.int64)).shape == (0, DIM)


def test_codes_that_are_replaced_are_read() -> None:
    table = vqrs.compress(ROWS, **COMPRESSIONS["books"])
    embedding = vqrs.torch.Embedding.from_table(table)
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode="sum")
    expected = decoded(table).flip(0)
    for module in (embedding, bag):
        module.codes = module.codes.flip(0).clone()
        torch.testing.assert_close(module.weight, expected)
    torch.testing.assert_close(embedding(IDS), expected[IDS])
    torch.testing.assert_close(bag(IDS), expected[IDS].sum(1))
    torch.testing.assert_close(torch.compile(embedding, backend="aot_eager")(IDS), expected[IDS])
