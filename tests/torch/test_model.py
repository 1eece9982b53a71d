"""compress_ and decompress_: ties, budgets, refusals, and nothing done by halves."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import vqrs
import vqrs.torch
from vqrs.torch import (
    CompressionReport,
    Embedding,
    EmbeddingBag,
    ScaledEmbedding,
    TiedLinear,
    compress_,
    decompress_,
    tied,
)
from vqrs.torch.budget import lower_hull, share_out

N, DIM = 1200, 16
INT4 = {"method": "scalar", "dtype": "int4", "min_rows": 100, "random_state": 0}
"""A kind that is quick to fit, and far enough from the rows to be told from them."""


def low_rank_rows(n_rows: int, dim: int = DIM, rank: int = 3, seed: int = 0) -> Tensor:
    """Rows that some bytes say much of, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, rank, generator=generator) @ torch.randn(rank, dim, generator=generator)
    return rows + 0.05 * torch.randn(n_rows, dim, generator=generator)


class TwoTables(nn.Module):
    """A recommender's kind: two tables, one of bags, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(N, DIM, padding_idx=0)
        self.items = nn.EmbeddingBag(2 * N, DIM, mode="sum", padding_idx=3, include_last_offset=True)
        self.small = nn.Embedding(7, DIM)
        self.out = nn.Linear(DIM, 1)

    def forward(self, user: Tensor, items: Tensor, offsets: Tensor) -> Tensor:
        return self.out(self.user(user) + self.items(items, offsets) + self.small(user % 7))


class LanguageModel(nn.Module):
    """A table tied to an output layer with a bias."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(N, DIM)
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, N, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.words(ids))))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, N, (3, 5), generator=torch.Generator().manual_seed(1))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, state: dict[str, Tensor], classes: list[type]) -> None:
    assert [type(module) for module in model.modules()] == classes
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], value) for name, value in state.items())


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# ---- what is replaced ----------------------------------------------------------------------------------------------


def test_both_kinds_of_modules_are_replaced_with_their_arguments(ids: Tensor) -> None:
    model = TwoTables()
    model.user.train(False)
    report = compress_(model, **INT4)
    assert type(model.user) is Embedding
    assert type(model.items) is EmbeddingBag
    assert type(model.small) is nn.Embedding
    assert (model.user.padding_idx, model.items.padding_idx) == (0, 3)
    assert (model.items.mode, model.items.include_last_offset) == ("sum", True)
    assert not model.user.training
    assert model.items.training
    assert [row.name for row in report] == ["user", "items", "small"]
    assert "fewer than min_rows=100" in (report["small"].skipped or "")
    bags, offsets = torch.tensor([1, 3, 5, 7]), torch.tensor([0, 2, 3, 4])
    expected = F.embedding_bag(bags, model.items.weight, offsets, mode="sum", include_last_offset=True, padding_idx=3)
    torch.testing.assert_close(model.items(bags, offsets), expected)


def test_outputs_are_those_of_the_decoded_tables(ids: Tensor) -> None:
    model = TwoTables()
    arguments = ids[0], torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 1, 2, 4, 5, 6])
    before = model(*arguments)
    report = compress_(model, **INT4)
    small = model(*arguments)
    assert not torch.equal(before, small)
    assert (before - small).norm() < 0.3 * before.norm()
    assert all(0 < row.relative_error < 0.02 for row in report if row.skipped is None)
    torch.testing.assert_close(decompress_(model)(*arguments), small)


def test_the_report_tells_bytes_and_errors() -> None:
    model = TwoTables()
    weight = model.user.weight.detach().clone()
    report = compress_(model, **INT4)
    row = report["user"]
    table = model.user.to_table()
    assert (row.kind, row.nbytes, row.ratio) == ("scalar", table.nbytes, table.ratio)
    assert row.nbytes_before == 4 * N * DIM
    error = float(((model.user.weight - weight) ** 2).sum() / (weight**2).sum())
    assert row.relative_error == pytest.approx(error, rel=1e-4)
    assert report.nbytes == report["user"].nbytes + report["items"].nbytes
    assert report.nbytes_before == 4 * 3 * N * DIM
    assert report.ratio == pytest.approx(4 * 3 * N * DIM / report.nbytes)
    errors = [report[name].relative_error for name in ("user", "items")]
    assert min(errors) <= report.relative_error <= max(errors)
    text = repr(report)
    assert "2 of 3 embeddings" in text
    assert "left alone: 7 rows" in text
    assert "total" in text
    assert report._repr_html_().count("<tr>") == len(report.lines())
    assert json.loads(json.dumps(report.to_dict()))["modules"][0]["name"] == "user"
    assert len(report[:2]) == 2
    with pytest.raises(KeyError, match="there are user, items, small"):
        report["words"]


def test_a_dry_run_tells_what_the_real_one_does() -> None:
    model = TwoTables()
    state, classes = state_of(model), classes_of(model)
    arguments = {"nbytes": "30KiB", "effort": "fast", "min_rows": 100, "random_state": 0}
    dry = compress_(model, dry_run=True, **arguments)
    assert_untouched(model, state, classes)
    real = compress_(model, **arguments)
    assert dry.dry_run
    assert not real.dry_run
    assert dry.rows == real.rows
    assert "(dry run)" in repr(dry)


def test_a_second_call_finds_nothing_left() -> None:
    model = TwoTables()
    compress_(model, **INT4)
    with pytest.raises(ValueError, match="no embedding to compress: small: 7 rows"):
        compress_(model, **INT4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype, ids: Tensor) -> None:
    model = LanguageModel().to(dtype)
    report = compress_(model, **INT4)
    assert report["words"].nbytes_before == N * DIM * dtype.itemsize
    assert model(ids).dtype == dtype
    assert model.words(ids).dtype == dtype
    assert decompress_(model).words.weight.dtype == dtype


def test_forward_hooks_are_kept_and_removable(ids: Tensor) -> None:
    model, seen = LanguageModel(), []
    handle = model.words.register_forward_hook(lambda module, arguments, output: seen.append(type(module)))
    compress_(model, **INT4)
    model(ids)
    handle.remove()
    model(ids)
    assert seen == [Embedding]


def test_models_without_a_table_are_told_why() -> None:
    with pytest.raises(ValueError, match=r"the model has no torch\.nn\.Embedding"):
        compress_(nn.Sequential(nn.Linear(3, 3)), ratio=4)
    with pytest.raises(ValueError, match=r"0: 300 rows, fewer than min_rows=4,096"):
        compress_(nn.Sequential(nn.Embedding(300, 4)), ratio=4)
    with pytest.raises(TypeError, match=r"Embedding.from_pretrained\(model"):
        compress_(nn.Embedding(5000, 4), ratio=4)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not dict"):
        compress_({}, ratio=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no compressed embedding"):
        decompress_(nn.Sequential(nn.Embedding(300, 4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass one of ratio=, nbytes= and max_error="),
        ({"ratio": 4, "nbytes": 100}, "ratio and nbytes were given"),
        ({"ratio": -1}, "must be a positive number"),
        ({"nbytes": "many"}, "cannot read 'many'"),
        ({"ratio": 4, "effort": "most"}, "effort='most' must be one of"),
        ({"method": "magic"}, "user: unknown method 'magic'"),
        ({"method": "product", "n_bit": 4}, "user: method 'product' has no parameter 'n_bit'"),
        ({"nbytes": 4000, "per_table": False}, "per_table=False is about ratio="),
        ({"method": {"user": {"path": "x"}}}, "path cannot be given"),
        ({"method": {"user": 0}}, "is no ratio"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = TwoTables()
    state, classes = state_of(model), classes_of(model)
    with pytest.raises(ValueError, match=message):
        compress_(model, min_rows=100, **arguments)
    assert_untouched(model, state, classes)


def test_parameters_need_a_method() -> None:
    with pytest.raises(TypeError, match=r"'n_bits': parameters of a kind need method="):
        compress_(TwoTables(), ratio=4, n_bits=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failure_at_the_last_table_changes_nothing(value: float) -> None:
    model = TwoTables()
    with torch.no_grad():
        model.items.weight[17, 5] = value
    classes = classes_of(model)
    before = model.user.weight
    with pytest.raises(ValueError, match=r"items: .* at row 17, column 5"):
        compress_(model, **INT4)
    assert classes_of(model) == classes
    assert model.user.weight is before


def test_a_failure_while_modules_are_built_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel()
    state, classes = state_of(model), classes_of(model)

    def fail(*arguments: object) -> None:
        raise ValueError("no head today")

    monkeypatch.setattr(TiedLinear, "__init__", fail)
    with pytest.raises(ValueError, match="no head today"):
        compress_(model, **INT4)
    assert_untouched(model, state, classes)
    assert model.head.weight is model.words.weight


# ---- ties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_reads_the_same_table(bias: bool, ids: Tensor) -> None:
    model = LanguageModel(bias)
    old_bias = model.head.bias
    report = compress_(model, **INT4)
    assert report["words"].tied == ("head",)
    assert report["head"] is report["words"]
    assert type(model.head) is TiedLinear
    assert model.head.embedding is model.words
    assert model.head.bias is old_bias
    hidden = torch.randn(2, 3, DIM)
    torch.testing.assert_close(model.head(hidden), F.linear(hidden, model.words.weight, old_bias))
    assert not [key for key in model.state_dict() if key.startswith("head.") and key != "head.bias"]
    assert torch.equal(model.head.weight, model.words.weight)
    assert (model.head.in_features, model.head.out_features) == (DIM, N)


def test_blocks_of_a_head_give_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel()
    compress_(model, trainable=True, **INT4)
    hidden = torch.randn(4, DIM, requires_grad=True)

    def outcome() -> list[Tensor]:
        output = model.head(hidden)
        values = list(model.words.parameters())
        gradients = torch.autograd.grad(output.tanh().sum(), [hidden, model.head.bias, *values])
        return [output.detach(), *gradients]

    whole = outcome()
    monkeypatch.setattr(tied, "BLOCK_VALUES", 100 * DIM)
    assert len(model.head._blocks()) == 12
    for one, other in zip(whole, outcome(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_head_gives_gradients_to_its_input_and_bias() -> None:
    model = LanguageModel()
    compress_(model, **INT4)
    hidden = torch.randn(4, DIM, requires_grad=True)
    weight = model.words.weight
    output = model.head(hidden)
    expected = F.linear(hidden, weight, model.head.bias)
    factors = torch.randn_like(output)
    got = torch.autograd.grad((output * factors).sum(), [hidden, model.head.bias])
    wanted = torch.autograd.grad((expected * factors).sum(), [hidden, model.head.bias])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_a_trainable_head_are_right_in_float64() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(40, 4, padding_idx=2)
            self.head = nn.Linear(4, 40)
            self.head.weight = self.words.weight

    model = Small()
    compress_(model, method={"words": {"method": "product", "n_subvectors": 2, "n_bits": 2}}, trainable=True)
    model.double()
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (books,) = model.words.parameters()

    def output(hidden: Tensor, bias: Tensor, books: Tensor) -> Tensor:
        return model.head(hidden)  # they are the parameters themselves

    torch.autograd.gradcheck(output, (hidden, model.head.bias, books))
    # The row that lookups treat as padding trains as an output.
    gradient = torch.autograd.grad(model.head(hidden)[:, 2].sum(), books)[0]
    assert gradient.abs().sum() > 0


def test_training_moves_lookup_and_head_together(ids: Tensor) -> None:
    model = LanguageModel()
    compress_(model, method="product", n_subvectors=4, n_bits=4, min_rows=1, trainable=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.words.weight.detach().clone()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    assert not torch.equal(model.words.weight, before)
    assert torch.equal(model.head.weight, model.words.weight)
    torch.testing.assert_close(model.head(torch.eye(DIM)) - model.head.bias, model.words.weight.T)


def test_decoded_rows_are_kept_on_request_and_follow_the_table(ids: Tensor) -> None:
    model = LanguageModel()
    compress_(model, **INT4)
    model.head.keep_decoded = True
    hidden = torch.randn(2, DIM, requires_grad=True)
    other = LanguageModel()
    with torch.no_grad():
        other.words.weight.mul_(3)
    compress_(other, **INT4)
    for change in (
        lambda: None,
        model.double,
        model.float,
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.words.reassign(target=-model.words.weight),
        lambda: model.words.reassign(target=-model.words.weight),  # now in the codes that the first one made
    ):
        change()
        own = hidden.to(model.words.dtype)
        torch.testing.assert_close(model.head(own), F.linear(own, model.words.weight, model.head.bias))
        assert model.head._kept_weight() is model.head._kept_weight()
    model.head(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, model.words.weight.sum(0).expand(2, -1))
    assert len(pickle.dumps(model)) < 4 * N * DIM


def test_a_module_at_two_places_is_one_table() -> None:
    shared = nn.Embedding(N, DIM)
    model = nn.ModuleDict({"encoder": nn.Sequential(shared), "decoder": nn.Sequential(shared), "x": shared})
    report = compress_(model, **INT4)
    assert len(report) == 1
    assert report[0].tied == ("decoder.0", "x")
    assert model["encoder"][0] is model["decoder"][0] is model["x"]
    decompress_(model)
    assert model["encoder"][0] is model["decoder"][0] is model["x"]
    assert type(model["x"]) is nn.Embedding


@pytest.mark.parametrize("trainable", [False, True])
def test_modules_with_one_parameter_share_one_table(trainable: bool) -> None:
    model = nn.ModuleDict({"source": nn.Embedding(N, DIM), "bag": nn.EmbeddingBag(N, DIM, mode="sum")})
    model["target"] = nn.Embedding(N, DIM, padding_idx=1)
    model["head"] = nn.Linear(DIM, N, bias=False)
    for name in ("bag", "target", "head"):
        model[name].weight = model["source"].weight
    keys = set(model.state_dict())
    report = compress_(model, trainable=trainable, **INT4)
    assert report[0].tied == ("bag", "target", "head")
    assert report.nbytes == model["source"].to_table().nbytes
    assert model["source"].codes.data_ptr() == model["bag"].codes.data_ptr() == model["target"].codes.data_ptr()
    assert (model["source"].padding_idx, model["target"].padding_idx) == (None, 1)
    if trainable:
        with torch.no_grad():
            for parameter in model["target"].parameters():
                parameter.mul_(2)
        assert len(list(model.parameters())) == len(list(model["source"].parameters()))
    assert torch.equal(model["source"].weight, model["target"].weight)
    assert torch.equal(model["bag"].weight, model["head"].weight)
    values = model["source"].weight.detach().clone()
    decompress_(model)
    assert set(model.state_dict()) == keys
    assert len({id(model[name].weight) for name in model}) == 1
    assert torch.equal(model["head"].weight, values)


def test_modules_that_do_the_same_become_one() -> None:
    model = nn.ModuleDict({name: nn.Embedding(N, DIM, padding_idx=2) for name in ("shared", "encoder", "hooked")})
    model["scaled"] = ScaledWordEmbedding(N, DIM, 2, embed_scale=2.0)
    model["other"] = ScaledWordEmbedding(N, DIM, 2, embed_scale=3.0)
    for module in model.values():
        module.weight = model["shared"].weight
    model["hooked"].register_forward_hook(lambda module, arguments, output: output + 1)
    keys = list(model.state_dict())
    compress_(model, **INT4)
    assert model["encoder"] is model["shared"]
    assert len({id(module) for module in model.values()}) == 4
    place = torch.tensor([5])
    row = model["shared"](place)
    for name, expected in {"hooked": row + 1, "scaled": 2 * row, "other": 3 * row}.items():
        torch.testing.assert_close(model[name](place), expected)
    decompress_(model)
    assert list(model.state_dict()) == keys
    assert len({id(module.weight) for module in model.values()}) == 1


def test_a_head_of_bags_reads_their_table() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(N, DIM, mode="sum", padding_idx=2), "head": nn.Linear(DIM, N)})
    model["head"].weight = model["bag"].weight
    compress_(model, **INT4)
    torch.testing.assert_close(model["head"](torch.eye(DIM)) - model["head"].bias, model["bag"].weight.T)


class Conv1D(nn.Module):
    """Something that holds an embedding's weight and is no linear layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.kernel = weight


class MyLinear(nn.Linear):
    pass


def tie_to_other(model: nn.ModuleDict) -> None:
    model["other"] = Conv1D(model["words"].weight)


def tie_to_subclass(model: nn.ModuleDict) -> None:
    model["other"] = MyLinear(DIM, N)
    model["other"].weight = model["words"].weight


def tie_by_memory(model: nn.ModuleDict) -> None:
    model["other"] = nn.Linear(DIM, N)
    model["other"].weight.data = model["words"].weight.data


def tie_to_part(model: nn.ModuleDict) -> None:
    model["other"] = nn.Linear(DIM, N // 2)
    model["other"].weight = nn.Parameter(model["words"].weight.data[N // 2 :])


@pytest.mark.parametrize(
    ("tie", "reason"),
    [
        (tie_to_other, "its weight is also other.kernel of a Conv1D, which cannot read"),
        (tie_to_subclass, "its weight is also other.weight of a MyLinear, which cannot read"),
        (tie_by_memory, "shares its memory with another parameter, other.weight"),
        (tie_to_part, "shares its memory with another parameter, other.weight"),
    ],
)
def test_ties_that_cannot_be_kept_are_left_alone(tie, reason: str) -> None:
    model = nn.ModuleDict({"words": nn.Embedding(N, DIM), "things": nn.Embedding(N, DIM)})
    tie(model)
    report = compress_(model, **INT4)
    assert reason in (report["words"].skipped or "")
    assert report["things"].skipped is None
    with torch.no_grad():
        model["words"].weight[N - 1, 0] = 77.0
    tied = next(parameter for name, parameter in model["other"].named_parameters() if name != "bias")
    assert tied[-1, 0] == 77.0


def test_one_module_that_cannot_leaves_all_that_share_its_weight_alone() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(N, DIM), "normed": nn.Embedding(N, DIM, max_norm=1.0)})
    model["normed"].weight = model["words"].weight
    model["things"] = nn.Embedding(N, DIM)
    report = compress_(model, **INT4)
    assert report["words"].skipped == "tied to normed, for which: max_norm=1.0 rescales rows as they are looked up"
    assert model["normed"].weight is model["words"].weight
    assert type(model["words"]) is nn.Embedding


# ---- what is left alone --------------------------------------------------------------------------------------------


class ScaledWordEmbedding(nn.Embedding):
    """As in models of transformers."""

    def __init__(self, *arguments: object, embed_scale: float) -> None:
        super().__init__(*arguments)
        self.embed_scale = embed_scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class BufferScaledWordEmbedding(nn.Embedding):
    def __init__(self, *arguments: object, embed_scale: float) -> None:
        super().__init__(*arguments)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Liar(ScaledWordEmbedding):
    """Has the attribute, and does something else with it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight) * self.embed_scale + 1


class Positions(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.arange(input.shape[-1]))


class Named(nn.Embedding):
    """Adds nothing to the lookup."""


class Decoupled(nn.Embedding):
    """More rows in a parameter of its own."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.more = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("kind", [ScaledWordEmbedding, BufferScaledWordEmbedding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embeddings_stay_scaled(kind: type, dtype: torch.dtype, ids: Tensor) -> None:
    model = nn.ModuleDict({"words": kind(N, DIM, embed_scale=5.7), "head": nn.Linear(DIM, N, bias=False)})
    model["head"].weight = model["words"].weight
    model = model.to(dtype)
    keys = list(model.state_dict())
    compress_(model, **INT4)
    words = model["words"]
    assert type(words) is ScaledEmbedding
    # A number multiplies as it is, a tensor as the rows' dtype has it.
    factor = 5.7 if kind is ScaledWordEmbedding else torch.tensor(5.7).to(dtype)
    assert torch.equal(words(ids), F.embedding(ids, words.weight) * factor)
    torch.testing.assert_close(model["head"](torch.eye(DIM, dtype=dtype)), words.weight.T)
    assert "embed_scale=5.7" in repr(words) or "embed_scale=5.6" in repr(words)
    small = words(ids)
    decompress_(model)
    assert type(model["words"]) is kind
    assert torch.equal(model["words"](ids), small)
    assert list(model.state_dict()) == keys


def test_subclasses_that_change_the_lookup_are_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "liar": Liar(N, DIM, embed_scale=2.0),
            "positions": Positions(N, DIM),
            "decoupled": Decoupled(N, DIM),
            "named": Named(N, DIM),
        }
    )
    report = compress_(model, **INT4)
    assert report["liar"].skipped == "Liar changes what is looked up"
    assert report["positions"].skipped == "Positions changes what is looked up"
    assert report["decoupled"].skipped == "Decoupled changes what is looked up"
    assert report["named"].skipped is None
    assert type(decompress_(model)["named"]) is Named


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def on_meta() -> nn.Embedding:
    return nn.Embedding(N, DIM, device="meta")


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.Embedding(N, DIM), "weight", Twice())


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Embedding(N, DIM), "weight", 0.5)


def with_own_forward() -> nn.Module:
    module = nn.Embedding(N, DIM)
    module.forward = lambda input: module.weight[input] * 3  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (on_meta, "meta device"),
        (parametrized, "parametrized"),
        (pruned, "not a parameter but computed"),
        (with_own_forward, "its forward was replaced"),
        (lambda: nn.Embedding(N, DIM, max_norm=2.0), "max_norm=2.0"),
    ],
)
def test_modules_of_other_kinds_are_left_alone(make, reason: str) -> None:
    model = nn.ModuleDict({"odd": make(), "plain": nn.Embedding(N, DIM)})
    odd = model["odd"]
    report = compress_(model, **INT4)
    assert reason in (report["odd"].skipped or "")
    assert model["odd"] is odd
    assert type(model["plain"]) is Embedding


def test_arguments_about_gradients_matter_only_in_training() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Embedding(N, DIM, scale_grad_by_freq=True), nn.Embedding(N, DIM))

    model = make()
    compress_(model, **INT4)
    assert type(model[0]) is Embedding
    assert decompress_(model)[0].scale_grad_by_freq
    report = compress_(make(), trainable=True, **INT4)
    assert "scale_grad_by_freq" in (report["0"].skipped or "")


def test_sparse_gradients_stay_sparse(ids: Tensor) -> None:
    model = nn.Sequential(nn.Embedding(N, DIM, sparse=True))
    compress_(model, method="product", n_subvectors=4, n_bits=4, min_rows=1, trainable=True)
    model(ids).sum().backward()
    assert all(parameter.grad.is_sparse for parameter in model.parameters() if parameter.grad is not None)
    torch.optim.SparseAdam(model.parameters()).step()
    assert decompress_(model)[0].sparse


def test_scaled_rows_are_written_where_they_are_wanted(ids: Tensor) -> None:
    model = nn.Sequential(ScaledWordEmbedding(N, DIM, embed_scale=3.0))
    compress_(model, **INT4)
    out = torch.empty(*ids.shape, DIM)
    assert model[0](ids, out=out) is out
    assert torch.equal(out, model(ids))


# ---- methods by name -----------------------------------------------------------------------------------------------


def test_a_mapping_says_what_is_done_with_each() -> None:
    model = nn.ModuleDict({f"item_{n}": nn.Embedding(N, DIM) for n in range(3)})
    model["user"], model["tiny"] = nn.Embedding(N, DIM), nn.Embedding(50, DIM)
    model["rest"] = nn.Embedding(N, DIM)
    method = {
        "item_*": "scalar",
        "item_1": {"method": "product", "n_subvectors": 4, "n_bits": 4},
        "item_2": None,
        "user": 5,
        "tiny": vqrs.ScalarQuantizer("int4"),
    }
    report = compress_(model, method, min_rows=100, effort="fast", random_state=0)
    assert [report[f"item_{n}"].kind for n in range(3)] == ["scalar", "product", None]
    assert report["item_2"].skipped == "method has None for 'item_2'"
    assert report["user"].ratio >= 5
    assert (report["tiny"].kind, report["tiny"].parameters["dtype"]) == ("scalar", "int4")
    assert report["rest"].skipped == "no name or pattern of method matches it"


def test_other_arguments_hold_for_modules_that_a_mapping_does_not_name() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(N, DIM), "b": nn.Embedding(N, DIM)})
    report = compress_(model, {"a": "product"}, ratio=4, min_rows=1, effort="fast", random_state=0)
    assert report["a"].kind == "product"
    assert all(row.ratio >= 4 for row in report)


def test_a_pattern_that_matches_nothing_names_what_there_is() -> None:
    model = TwoTables()
    with pytest.raises(ValueError, match=r"'item_\*' matches no embedding of the model: they are user, items, small"):
        compress_(model, {"item_*": "scalar"})
    assert type(model.items) is nn.EmbeddingBag


def test_patterns_keep_to_min_rows_and_names_do_not() -> None:
    report = compress_(TwoTables(), {"*": "scalar"}, min_rows=100, dry_run=True)
    assert report["small"].skipped is not None
    report = compress_(TwoTables(), {"small": "scalar"}, min_rows=100, dry_run=True)
    assert report["small"].kind == "scalar"


# ---- budgets -------------------------------------------------------------------------------------------------------


class Different(nn.Module):
    """Tables that need bytes differently: one nearly of low rank, one noise, one of small values."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.easy = nn.Embedding.from_pretrained(low_rank_rows(3000))
        self.hard = nn.Embedding.from_pretrained(torch.randn(2000, DIM, generator=generator))
        self.faint = nn.Embedding.from_pretrained(0.01 * torch.randn(2000, DIM, generator=generator))


FAST = {"effort": "fast", "min_rows": 100, "random_state": 0}


PRODUCT = {"method": "product", **FAST}
"""One kind, where it does not matter which: all of them take longer."""


@pytest.mark.parametrize("method", [None, "product"])
@pytest.mark.parametrize("budget", [27_000, 64_000, 200_000, 10_000_000])
def test_a_budget_is_never_exceeded(budget: int, method: str | None) -> None:
    report = compress_(Different(), method, nbytes=budget, dry_run=True, **FAST)
    assert report.nbytes <= budget
    assert all(row.kind for row in report)


def test_bytes_go_where_they_lower_the_error_most() -> None:
    even = compress_(Different(), ratio=8, dry_run=True, **FAST)
    shared = compress_(Different(), nbytes=even.nbytes, dry_run=True, **FAST)
    assert shared.nbytes <= even.nbytes
    assert shared.relative_error < 0.7 * even.relative_error
    assert shared["hard"].nbytes > 2 * shared["faint"].nbytes
    assert shared["hard"].relative_error < shared["faint"].relative_error


def test_relative_errors_spare_tables_of_small_values() -> None:
    plain = compress_(Different(), nbytes=60_000, dry_run=True, **PRODUCT)
    relative = compress_(Different(), nbytes=60_000, relative=True, dry_run=True, **PRODUCT)
    assert relative.nbytes <= 60_000
    assert relative["faint"].relative_error < 0.7 * plain["faint"].relative_error
    assert relative["faint"].relative_error == pytest.approx(relative["hard"].relative_error, rel=0.3)


def test_a_ratio_of_the_whole_is_a_budget() -> None:
    report = compress_(Different(), ratio=10, per_table=False, dry_run=True, **PRODUCT)
    assert report.ratio >= 10
    same = compress_(Different(), nbytes=4 * 7000 * DIM // 10, dry_run=True, **PRODUCT)
    assert report.rows == same.rows


def test_a_budget_too_small_names_the_least_and_the_least_can_be_had() -> None:
    model = Different()
    state, classes = state_of(model), classes_of(model)
    with pytest.raises(ValueError, match="1000 bytes are too few for the 3 tables together: the least is") as caught:
        compress_(model, nbytes=1000, **PRODUCT)
    assert_untouched(model, state, classes)
    least = int(str(caught.value).split("the least is ")[1].split()[0])
    with pytest.raises(ValueError, match=f"the least is {least} bytes"):
        compress_(model, nbytes=least - 1, **PRODUCT)
    assert compress_(model, nbytes=least, **PRODUCT).nbytes <= least


def test_tables_with_budgets_of_their_own_come_off_the_whole() -> None:
    method = {"hard": "scalar", "easy": {"ratio": 20, "method": "product"}, "faint": "product"}
    report = compress_(Different(), method, nbytes=64_000, dry_run=True, **FAST)
    assert report.nbytes <= 64_000
    assert report["easy"].ratio >= 20
    assert report["hard"].kind == "scalar"
    with pytest.raises(ValueError, match="budgets of their own take more than nbytes=500"):
        compress_(Different(), {"*": {"method": "product", "ratio": 10}}, nbytes=500, dry_run=True, **FAST)


def test_frequencies_weight_tables() -> None:
    counts = {"easy": np.full(3000, 1.0), "hard": np.full(2000, 1.0), "faint": np.full(2000, 1e7)}
    plain = compress_(Different(), nbytes=60_000, dry_run=True, **PRODUCT)
    weighted = compress_(Different(), nbytes=60_000, frequencies=counts, dry_run=True, **PRODUCT)
    assert weighted.nbytes <= 60_000
    assert weighted["faint"].nbytes > 1.5 * plain["faint"].nbytes
    assert weighted["faint"].relative_error < 0.5 * plain["faint"].relative_error


def test_frequencies_weight_rows() -> None:
    zipf = 1 / np.arange(1, 2001)
    weight = Different().hard.weight.detach().numpy()

    def error_of(**frequencies: dict) -> float:
        model = Different()
        report = compress_(model, {"hard": {"ratio": 10, "method": "product"}}, **FAST, **frequencies)
        squares = ((model.hard.weight.numpy() - weight) ** 2).sum(1)
        error = float(zipf @ squares / (zipf @ (weight**2).sum(1)))
        if frequencies:
            assert report["hard"].relative_error == pytest.approx(error, rel=1e-3)
        return error

    assert error_of(frequencies={"hard": zipf}) < 0.8 * error_of()


@pytest.mark.slow
def test_more_effort_gives_frequent_rows_more_bits() -> None:
    zipf = 1e6 / np.arange(1, 16_001)
    weight = torch.randn(16_000, 2 * DIM, generator=torch.Generator().manual_seed(3))
    errors, kinds = [], []
    for effort in ("fast", "balanced"):
        model = nn.Sequential(nn.Embedding.from_pretrained(weight))
        report = compress_(model, ratio=12, min_rows=1, frequencies={"0": zipf}, effort=effort, random_state=0)
        errors.append(report.relative_error)
        kinds.append(report[0].kind)
        assert report.ratio >= 12
    assert kinds[1] == "mixed"
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        ({"users": np.ones(3)}, "'users', which is no embedding of the model: easy, hard, faint are"),
        ({"easy": np.ones(3)}, "frequencies of 'easy'"),
        ({"easy": -np.ones(3000)}, "must be finite, not negative, and not all zero"),
        ({"easy": np.zeros(3000)}, "must be finite, not negative, and not all zero"),
        ({"easy": np.full(3000, np.nan)}, "frequencies of 'easy'"),
    ],
)
def test_wrong_frequencies_are_refused(frequencies: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_(Different(), ratio=8, frequencies=frequencies, **FAST)


def test_shares_are_those_of_the_best_split() -> None:
    """Against every split of a few hundred bytes."""
    generator = np.random.default_rng(2)
    for _ in range(20):
        curves = []
        for _ in range(2):
            sizes = np.sort(generator.choice(np.arange(10, 300), 5, replace=False)).astype(float)
            curves.append(lower_hull(sizes, np.exp(-np.sort(generator.uniform(0, 6, 5))) * generator.uniform(1, 100)))
        budget = int(curves[0][0][0] + curves[1][0][0] + generator.integers(5, 200))
        shares = share_out(curves, budget)

        def error(split: tuple[int, ...], curves: list = curves) -> float:
            return sum(
                float(np.exp(np.interp(share, sizes, np.log(errors))))
                for share, (sizes, errors) in zip(split, curves, strict=True)
            )

        # Each share is rounded down to a whole byte.
        low, high = int(curves[0][0][0]), budget - 2 - int(curves[1][0][0])
        best = min(error((first, budget - 2 - first)) for first in range(low, high + 1))
        assert sum(shares) <= budget
        assert all(share >= int(sizes[0]) for share, (sizes, _) in zip(shares, curves, strict=True))
        assert error(tuple(shares)) <= 1.001 * best


# ---- the way back --------------------------------------------------------------------------------------------------


def test_decompress_restores_keys_ties_modes_and_gradients(ids: Tensor) -> None:
    model = LanguageModel()
    model.words.requires_grad_(False)
    model.words.eval()
    keys = list(model.state_dict())
    compress_(model, **INT4)
    small = model(ids)
    assert decompress_(model) is model
    assert list(model.state_dict()) == keys
    assert model.head.weight is model.words.weight
    assert type(model.head) is nn.Linear
    assert not model.words.weight.requires_grad
    assert not model.words.training
    assert model.head.training
    torch.testing.assert_close(model(ids), small)
    model.load_state_dict(LanguageModel().state_dict())


def test_kept_originals_come_back_to_the_bit() -> None:
    model = LanguageModel()
    state = state_of(model)
    compress_(model, keep_original=True, **INT4)
    assert not torch.equal(model.words.weight, state["words.weight"])
    decompress_(model)
    assert torch.equal(model.head.weight, state["words.weight"])
    assert list(model.state_dict()) == list(state)


def test_modules_of_tables_become_torchs_own() -> None:
    table = vqrs.compress(low_rank_rows(300).numpy(), method="scalar")
    model = nn.Sequential(Embedding.from_table(table, padding_idx=4), EmbeddingBag.from_table(table, mode="max"))
    decompress_(model)
    assert type(model[0]) is nn.Embedding
    assert model[0].padding_idx == 4
    assert (type(model[1]), model[1].mode) == (nn.EmbeddingBag, "max")
    torch.testing.assert_close(model[0].weight.detach(), torch.from_numpy(table.to_numpy()))


def test_trained_values_are_what_comes_back(ids: Tensor) -> None:
    model = LanguageModel()
    compress_(model, trainable=True, **INT4)
    with torch.no_grad():
        for parameter in model.words.parameters():
            parameter.mul_(1.5)
    trained = model.words.weight.detach().clone()
    decompress_(model)
    assert torch.equal(model.words.weight, trained)
    assert model.words.weight.requires_grad


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_ties_and_can_be_undone(through: str, ids: Tensor) -> None:
    model = LanguageModel()
    compress_(model, **INT4)
    if through == "deepcopy":
        other = copy.deepcopy(model)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.head.embedding is other.words
    assert other.words is not model.words
    torch.testing.assert_close(other(ids), model(ids))
    decompress_(other)
    assert other.head.weight is other.words.weight
    assert type(model.head) is TiedLinear


def test_a_state_goes_into_a_compressed_model_of_another_kind(ids: Tensor) -> None:
    model, other = LanguageModel(), LanguageModel()
    compress_(model, **INT4)
    compress_(other, method="product", n_subvectors=8, min_rows=1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(ids), model(ids))


def test_the_state_of_a_plain_model_is_refused_with_advice() -> None:
    model = LanguageModel()
    compress_(model, **INT4)
    with pytest.raises(RuntimeError, match="load the weight into a torch module"):
        model.load_state_dict(LanguageModel().state_dict())


def test_heads_compile_without_a_graph_break(ids: Tensor) -> None:
    model = LanguageModel().eval()
    compress_(model, **INT4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids))


def test_heads_export(ids: Tensor) -> None:
    model = LanguageModel().eval()
    compress_(model, **INT4)
    with torch.no_grad():
        program = torch.export.export(model, (ids,))
        torch.testing.assert_close(program.module()(ids), model(ids))


def test_the_report_is_a_sequence() -> None:
    report = compress_(TwoTables(), dry_run=True, **INT4)
    assert isinstance(report, CompressionReport)
    assert [row.name for row in report] == [report[n].name for n in range(len(report))]
