"""``distill``: losses that fall, models that are left as they were, errors that say what to do."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vqrs
import vqrs.torch
from vqrs.torch import distill, output_loss

ROOT = Path(__file__).parents[2]
N_ROWS, DIM = 240, 20

METHODS = {
    "kmeans": {"method": "kmeans", "n_clusters": 40},
    "product": {"method": "product", "n_subvectors": 4, "n_bits": 3},
    "product, int8 codebooks": {"method": "product", "n_subvectors": 4, "n_bits": 3, "codebook_dtype": "int8"},
    "optimized product": {"method": "optimized-product", "n_subvectors": 4, "n_bits": 3},
    "product, random rotation": {"method": "product", "n_subvectors": 4, "n_bits": 3, "rotation": "random"},
    "residual": {"method": "residual", "n_stages": 2, "n_bits": 3, "beam_width": 2},
    "additive": {"method": "additive", "n_codebooks": 3, "n_bits": 3},
    "int2 of a row": {"method": "scalar", "dtype": "int2"},
    "int2 of a column": {"method": "scalar", "dtype": "int2", "granularity": "column"},
    "int2 of a block": {"method": "scalar", "dtype": "int2", "granularity": "block", "block_size": 4},
    "levels of a row's own": {"method": "scalar", "dtype": "free4"},
    "rotated": {"method": "rotated", "n_bits": 2},
    "trellis": {"method": "trellis", "n_bits": 1, "state_bits": 6},
    "low-rank": {"method": "low-rank", "n_components": 6},
    "sparse": {"method": "sparse", "density": 0.4},
    "join": {
        "method": "product",
        "n_subvectors": 4,
        "n_bits": 2,
        "residual": {"kind": "scalar", "parameters": {"dtype": "int2"}},
    },
    "segments": {
        "method": vqrs.MixedPrecisionQuantizer(
            [vqrs.ScalarQuantizer("int2"), vqrs.ScalarQuantizer("int4")], n_bits=32.0, random_state=0
        )
    },
}
"""Every form of decoder, and what forms hold of others."""

FORMS = {
    "optimized product": "linear",
    "product, random rotation": "linear",
    "int2 of a row": "levels",
    "int2 of a column": "levels",
    "int2 of a block": "levels",
    "levels of a row's own": "levels",
    "rotated": "linear",
    "trellis": "linear",
    "low-rank": "linear",
    "sparse": "sparse",
    "join": "join",
    "segments": "segments",
}


class Model(nn.Module):
    """An embedding, a dropout that must not act, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N_ROWS, DIM)
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.dropout(self.embedding(ids)))))


def make_teacher() -> Model:
    torch.manual_seed(3)
    return Model()


def make_student(teacher: Model, trainable: bool = False, **compression: Any) -> Model:
    student = copy.deepcopy(teacher)
    compression = compression or METHODS["product"]
    student.embedding = vqrs.torch.Embedding.from_pretrained(
        teacher.embedding, trainable=trainable, random_state=0, **compression
    )
    return student


def batches() -> list[Tensor]:
    return list(torch.arange(N_ROWS).split(40))


def difference(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        ids = torch.arange(N_ROWS)
        return float(output_loss(student.eval()(ids), teacher.eval()(ids)))


# ---- what it brings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_form_learns_and_stores_what_was_measured(name: str, tmp_path: Path) -> None:
    teacher = make_teacher()
    student = make_student(teacher, **METHODS[name])
    assert student.embedding.to_table().info()["decoder"]["form"] == FORMS.get(name, "books")
    before, nbytes = difference(student, teacher), student.embedding.to_table().nbytes
    result = distill(student, teacher, batches(), validation=batches(), epochs=15, lr=0.03)
    assert result.loss_before == pytest.approx(before, rel=0.05)  # a mean over batches, each relative to its own norm
    assert result.loss_after < 0.985 * result.loss_before
    assert not student.embedding.trainable
    assert not list(student.embedding.parameters())
    assert difference(student, teacher) == pytest.approx(result.loss_after, rel=0.05)

    path = tmp_path / "tuned.safetensors"
    student.embedding.to_table().save(path)
    again = make_student(teacher)
    again.embedding = vqrs.torch.Embedding.from_table(path)
    assert torch.equal(again.eval()(torch.arange(N_ROWS)), student.eval()(torch.arange(N_ROWS)))
    assert again.embedding.to_table().nbytes <= nbytes + 256  # the note of the error in the header may be longer


def test_the_measured_loss_is_that_of_the_stored_table() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    ids = [torch.arange(N_ROWS)]
    result = distill(student, teacher, batches(), validation=ids, epochs=3)
    assert difference(student, teacher) == result.loss_after


def test_layers_help_and_only_the_named_ones_change() -> None:
    teacher = make_teacher()
    tables_alone, with_layers = make_student(teacher), make_student(teacher)
    settings = {"validation": batches(), "epochs": 30}
    alone = distill(tables_alone, teacher, batches(), **settings)
    both = distill(with_layers, teacher, batches(), layers="hidden", **settings)
    assert both.loss_after < alone.loss_after
    assert {name for name in both.tuned if not name.startswith("embedding.")} == {"hidden.weight", "hidden.bias"}
    assert all(name.startswith("embedding.decoder.") for name in alone.tuned)
    assert torch.equal(with_layers.head.weight, teacher.head.weight)
    assert not torch.equal(with_layers.hidden.weight, teacher.hidden.weight)
    assert torch.equal(tables_alone.hidden.weight, teacher.hidden.weight)


@pytest.mark.parametrize("layers", ["h*d*", ["hidden", "head.*"], lambda name, value: "h" in name and value.dim()])
def test_layers_by_pattern_list_and_callable(layers: Any) -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    tuned = distill(student, teacher, batches(), layers=layers, max_steps=2).tuned
    expected = {"hidden.weight": 400, "hidden.bias": 20, "head.weight": 60, "head.bias": 3}
    assert {name: size for name, size in tuned.items() if not name.startswith("embedding.")} == expected


def test_the_loss_of_the_task_needs_no_teacher() -> None:
    torch.manual_seed(0)
    student = make_student(make_teacher())
    labels = torch.arange(N_ROWS) % 3
    loader = DataLoader(TensorDataset(torch.arange(N_ROWS), labels), batch_size=40, shuffle=True)

    def loss(output: Tensor, target: None, batch: list[Tensor]) -> Tensor:
        assert target is None
        return F.cross_entropy(output, batch[1])

    result = distill(student, None, loader, loss=loss, forward=lambda model, batch: model(batch[0]), lr=0.05, epochs=20)
    assert result.loss_after < 0.95 * result.loss_before
    with torch.no_grad():
        whole = F.cross_entropy(student.eval()(torch.arange(N_ROWS)), labels)
    assert float(whole) == pytest.approx(result.loss_after, rel=0.1)


def test_bags_and_models_that_are_a_table() -> None:
    teacher = nn.EmbeddingBag(N_ROWS, DIM, mode="sum", padding_idx=0)
    student = vqrs.torch.EmbeddingBag.from_pretrained(teacher, random_state=0, **METHODS["product"])
    ids = torch.arange(N_ROWS).reshape(-1, 4)
    result = distill(student, teacher, list(ids.split(10)), epochs=20)
    assert result.loss_after < 0.95 * result.loss_before
    assert student.mode == "sum"
    assert set(result.tuned) == {"decoder.codebooks_0"}


# ---- batches and outputs --------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Takes keywords, and answers as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(N_ROWS, DIM)
        self.head = nn.Linear(DIM, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        rows = self.words(input_ids) * attention_mask[..., None]
        pooled = rows.sum(1) / attention_mask.sum(1, keepdim=True)
        hidden = self.head(rows)
        return {"loss": pooled.mean(), "last_hidden_state": hidden, "parts": (pooled, [hidden]), "ids": input_ids}


def test_batches_of_keywords_and_nested_outputs() -> None:
    torch.manual_seed(0)
    teacher = Named()
    student = copy.deepcopy(teacher)
    student.words = vqrs.torch.Embedding.from_pretrained(teacher.words, random_state=0, **METHODS["product"])
    ids = torch.randint(N_ROWS, (6, 10, 5))
    mask = (torch.rand(6, 10, 5) < 0.7).long()
    mask[..., 0] = 1
    loader = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    result = distill(student, teacher, loader, epochs=20)
    assert result.loss_after < 0.95 * result.loss_before


def test_transformers_models_and_their_tokenized_batches() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=N_ROWS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    teacher = transformers.BertModel(config)
    student = copy.deepcopy(teacher)
    student.set_input_embeddings(
        vqrs.torch.Embedding.from_pretrained(teacher.get_input_embeddings(), method="product", n_bits=3, random_state=0)
    )
    ids = torch.randint(N_ROWS, (4, 8, 6))
    loader = [transformers.BatchEncoding({"input_ids": i, "attention_mask": torch.ones_like(i)}) for i in ids]
    result = distill(student, teacher, loader, epochs=10, layers="embeddings.LayerNorm")
    assert result.loss_after < 0.95 * result.loss_before
    assert "embeddings.LayerNorm.weight" in result.tuned


def test_the_default_loss() -> None:
    one, two = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(output_loss(one, two)) == pytest.approx((16 + 16) / 25)
    assert float(output_loss((one, two), (two, two))) == pytest.approx((16 + 16) / 25 / 2)
    masked = output_loss(one[:, :, None], two[:, :, None], {"attention_mask": torch.tensor([[1, 1], [0, 0]])})
    assert float(masked) == pytest.approx(16 / 9)
    assert float(output_loss(one * 0, two)) == 1
    assert float(output_loss(two.half(), two.double())) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"the output of the student has shape \(2, 3\)"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, r"the output of the student has \['a'\], that of the teacher"),
        ((torch.ones(2),), (torch.ones(2), torch.ones(2)), "has 1 parts, that of the teacher 2"),
        ({"a": (torch.ones(2),)}, {"a": (torch.ones(3),)}, r"the output\['a'\]\[0\] of the student has shape"),
        (torch.ones(2), None, "give a teacher of the same outputs, or loss="),
        (torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.long), "hold no float tensor to compare"),
    ],
)
def test_outputs_that_do_not_fit(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_loss(student, teacher)


# ---- what is left as it was -----------------------------------------------------------------------------------------


def test_modes_gradients_generators_and_the_teacher_are_as_before() -> None:
    teacher = make_teacher().train()
    student = make_student(teacher).train()
    student.hidden.eval()
    student.head.bias.requires_grad_(False)
    modes = {name: module.training for name, module in student.named_modules()}
    required = {name: value.requires_grad for name, value in student.named_parameters()}
    whole = copy.deepcopy(teacher.state_dict())
    table = student.embedding
    generator = torch.get_rng_state()
    distill(student, teacher, batches(), layers="h*", max_steps=4)
    assert student.embedding is table
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert {name: value.requires_grad for name, value in student.named_parameters()} == required
    assert all(value.grad is None for value in [*student.parameters(), *teacher.parameters()])
    assert all(torch.equal(value, whole[name]) for name, value in teacher.state_dict().items())
    assert teacher.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_trainable_tables_stay_trainable_and_keep_their_parameters() -> None:
    teacher = make_teacher()
    student = make_student(teacher, trainable=True)
    held = dict(student.named_parameters())
    result = distill(student, teacher, batches(), epochs=5)
    assert result.loss_after < result.loss_before
    assert student.embedding.trainable
    now = dict(student.named_parameters())
    assert now.keys() == held.keys()
    assert all(now[name] is value for name, value in held.items())
    assert all(value.requires_grad for value in now.values())


def test_nothing_gained_is_said_and_leaves_the_student_alone() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    table = student.embedding.to_table()
    with pytest.warns(UserWarning, match=r"no step brought the loss below .*lower lr=1000"):
        result = distill(student, teacher, batches(), layers="hidden", lr=1000, epochs=2)
    assert (result.loss_after, result.best_step) == (result.loss_before, 0)
    assert student.embedding.to_table() is table
    assert torch.equal(student.hidden.weight, teacher.hidden.weight)


def test_the_best_measured_state_is_kept() -> None:
    """A loss that turns against the student after the second epoch."""
    teacher = make_teacher()
    student = make_student(teacher)
    n_calls = 0

    def loss(output: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += torch.is_grad_enabled()
        return output_loss(output, target) * (1 if n_calls <= 12 or not torch.is_grad_enabled() else -20)

    result = distill(student, teacher, batches(), loss=loss, validation=[torch.arange(N_ROWS)], epochs=6)
    assert result.best_step == 12
    assert [entry["step"] for entry in result.history] == [0, 6, 12, 18, 24, 30, 36]
    assert result.history[-1]["validation"] > result.loss_after == result.history[2]["validation"]
    assert difference(student, teacher) == result.loss_after


def test_patience_ends_early() -> None:
    teacher = make_teacher()
    with pytest.warns(UserWarning, match="no step"):
        result = distill(make_student(teacher), teacher, batches(), lr=1000, max_steps=50, measure_every=2, patience=3)
    assert result.n_steps == 6


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(None, None, 6), (2, None, 12), (None, 8, 8), (2, 8, 8)])
def test_the_number_of_steps(epochs: int | None, max_steps: int | None, expected: int) -> None:
    teacher = make_teacher()
    told: list[tuple[int, int]] = []
    result = distill(
        make_student(teacher),
        teacher,
        batches(),
        epochs=epochs,
        max_steps=max_steps,
        progress=lambda stage, done, total: told.append((done, total)),
    )
    assert result.n_steps == expected == result.history[-1]["step"]
    assert told == [(step + 1, expected) for step in range(expected)]


def test_the_end_is_measured_whatever_the_interval() -> None:
    teacher = make_teacher()
    result = distill(make_student(teacher), teacher, batches(), epochs=2, measure_every=5)
    assert [entry["step"] for entry in result.history] == [0, 5, 10, 12]
    assert result.best_step == 12
    assert str(result).startswith("loss 0.")
    assert f"after step 12 of 12; {result.tuned['embedding.decoder.codebooks_0']:,} values tuned" in str(result)


def test_a_loader_that_cannot_tell_its_length() -> None:
    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(batches())

    teacher = make_teacher()
    result = distill(make_student(teacher), teacher, Stream(), epochs=3)
    assert result.n_steps == 18
    assert result.loss_after < result.loss_before


def test_the_seed_repeats() -> None:
    def run(seed: int, draws: int) -> np.ndarray:
        torch.manual_seed(draws)
        teacher = make_teacher()
        student = make_student(teacher)
        torch.rand(draws)
        loader = DataLoader(torch.arange(N_ROWS), batch_size=40, shuffle=True)
        distill(student, teacher, loader, epochs=2, random_state=seed)
        return student.embedding.to_table().to_numpy()

    assert np.array_equal(run(0, 1), run(0, 2))
    assert not np.array_equal(run(0, 1), run(1, 1))


def test_half_precision_students() -> None:
    teacher = make_teacher().bfloat16()
    student = make_student(teacher)
    assert student.embedding.dtype == torch.bfloat16
    result = distill(student, teacher, batches(), epochs=10)
    assert result.loss_after < result.loss_before
    assert student.embedding.dtype == torch.bfloat16


def test_one_table_at_two_places_is_tuned_once() -> None:
    teacher = nn.ModuleDict({"one": nn.Embedding(N_ROWS, DIM)})
    teacher["two"] = teacher["one"]
    table = vqrs.torch.Embedding.from_pretrained(teacher["one"], random_state=0, **METHODS["product"])
    student = nn.ModuleDict({"one": table, "two": table})

    def forward(model: nn.ModuleDict, ids: Tensor) -> Tensor:
        return model["one"](ids) * model["two"](ids.flip(0))

    result = distill(student, teacher, batches(), forward=forward, epochs=10)
    assert result.loss_after < result.loss_before
    assert student["one"] is student["two"] is table
    assert set(result.tuned) == {"one.decoder.codebooks_0"}


def test_tables_with_nothing_to_train_are_left() -> None:
    teacher = nn.Sequential(nn.Embedding(N_ROWS, DIM), nn.Linear(DIM, 3))
    student = copy.deepcopy(teacher)
    student[0] = vqrs.torch.Embedding.from_pretrained(teacher[0], method="scalar", dtype="float16")
    with pytest.raises(ValueError, match="a float16 table has no codebooks or scales to train"):
        distill(student, teacher, batches())
    assert not student[0].trainable
    result = distill(student, teacher, batches(), layers="1", validation=batches(), epochs=3, lr=1e-5)
    assert result.left == ["0"]
    assert set(result.tuned) == {"1.weight", "1.bias"}


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_says_what_to_do_and_leaves_the_student_alone() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    table = student.embedding.to_table()
    calls = []

    def loss(output: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return output_loss(output, target) * (math.nan if sum(calls) == 4 else 1)

    with pytest.raises(FloatingPointError, match=r"the loss is nan after 3 steps: lower lr=0\.01 or give max_norm"):
        distill(student, teacher, batches(), loss=loss, layers="hidden")
    assert student.embedding.to_table() is table
    assert not student.embedding.trainable
    assert torch.equal(student.hidden.weight, teacher.hidden.weight)
    with pytest.raises(FloatingPointError, match="nan after 0 steps: look at the models' outputs"):
        distill(student, teacher, batches(), loss=lambda *_: torch.tensor(math.nan))


def test_gradients_are_clipped() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    made: list[torch.optim.SGD] = []

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.SGD:
        made.append(torch.optim.SGD(groups))
        made[0].register_step_pre_hook(lambda steps, *_: norms.append(norm(steps)))
        return made[0]

    def norm(steps: torch.optim.Optimizer) -> float:
        return float(torch.stack([v.grad.norm() for g in steps.param_groups for v in g["params"]]).norm())

    norms: list[float] = []
    distill(student, teacher, batches(), layers="hidden", max_norm=1e-3, optimizer=optimizer, validation=batches())
    assert len(norms) == 6
    assert norms == pytest.approx([1e-3] * 6, rel=1e-3)
    assert {name for name in ("lr",) if len({group["lr"] for group in made[0].param_groups}) > 1} == {"lr"}


def wrong_arguments() -> dict[str, tuple[Any, ...]]:
    plain, teacher = make_teacher(), make_teacher()
    student = make_student(teacher)
    shares = make_student(teacher)
    shares.hidden = teacher.hidden
    loader = batches()
    return {
        "no table": (ValueError, r"a Model, has no vqrs.torch module.*compress_", plain, teacher, loader, {}),
        "itself": (ValueError, "the teacher shares 'embedding' with the student", student, student, loader, {}),
        "shared layer": (ValueError, "shares 'hidden.weight'", shares, teacher, loader, {"layers": "hidden"}),
        "no teacher": (ValueError, "give teacher=, or loss=", student, None, loader, {}),
        "empty loader": (ValueError, "the loader is empty", student, teacher, [], {}),
        "empty validation": (ValueError, "the validation is empty", student, teacher, loader, {"validation": []}),
        "iterator": (TypeError, "read once only: pass a DataLoader", student, teacher, iter(loader), {}),
        "unknown layer": (
            ValueError,
            "layers='body' fits no parameter.*hidden",
            student,
            teacher,
            loader,
            {"layers": "body"},
        ),
        "lr": (ValueError, "lr=0 is not allowed", student, teacher, loader, {"lr": 0}),
        "epochs": (ValueError, "epochs=0 is not allowed: must be at least 1", student, teacher, loader, {"epochs": 0}),
        "loss of many values": (
            ValueError,
            "a tensor of one value",
            student,
            teacher,
            loader,
            {"loss": lambda found, *_: found},
        ),
        "detached": (
            ValueError,
            "does not depend on what is tuned",
            student,
            teacher,
            loader,
            {"loss": lambda found, wanted, _: output_loss(found.detach(), wanted)},
        ),
    }


@pytest.mark.parametrize("name", wrong_arguments())
def test_wrong_arguments(name: str) -> None:
    error, message, student, teacher, loader, arguments = wrong_arguments()[name]
    with pytest.raises(error, match=message):
        distill(student, teacher, loader, **arguments)
    assert student.training
    assert all(value.requires_grad for value in student.parameters())
    assert not getattr(student.embedding, "trainable", False)


def test_an_interrupt_leaves_the_student_alone() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    table = student.embedding.to_table()
    stop = SimpleNamespace(after=3)

    def progress(stage: str, done: int, total: int) -> None:
        if done == stop.after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, batches(), progress=progress)
    assert student.embedding.to_table() is table


def test_the_example_runs(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    example = ROOT / "examples" / "04_distill.py"
    run = subprocess.run([sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "distilled" in run.stdout
