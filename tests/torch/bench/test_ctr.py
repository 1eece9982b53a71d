"""Runs of the benchmark: what is run, what is written, and that they go on where they stopped."""

import json
import os

import numpy as np
import pytest

import vqrs
from vqrs.bench import ctr
from vqrs.bench.ctr import Budget, Plan, parse_method, read_runs, run
from vqrs.bench.datasets import Dataset, Rows, open_dataset
from vqrs.bench.prepared import save
from vqrs.torch.trained import fields

DATASET = "synthetic-60x50x2500"
SETTINGS = {"epochs": 2, "batch_size": 200}


def plan_of(**changes):
    plan = {"methods": ["hash"], "budgets": [Budget("ratio", 4)], "models": ["gmf"], "seeds": 2, "embedding_dim": 8}
    return Plan(DATASET, settings=SETTINGS, **plan | changes)


def test_budgets():
    sizes = [100, 300]
    assert Budget("ratio", 10).settings(sizes, 16) == {"ratio": 10}
    assert Budget("ratio", 10).nbytes(sizes, 16) == 2560
    assert Budget("ppd", 8).settings(sizes, 16) == {"num_floats": 256}
    assert Budget("ppd", 8).nbytes(sizes, 16) == 1024
    assert Budget("nbytes", 99).settings(sizes, 16) == {"nbytes": 99}
    assert Budget("ratio", 1e9).nbytes(sizes, 16) == 1
    with pytest.raises(ValueError, match="not 'rows'"):
        Budget("rows", 1).settings(sizes, 16)


def test_methods_with_settings():
    assert parse_method("hash") == ("hash", {})
    assert parse_method("robe:chunk=8,sign=True,mode=vq") == ("robe", {"chunk": 8, "sign": True, "mode": "vq"})
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_method("hash:rows")


def test_a_line_a_run(tmp_path):
    told = []
    plan = plan_of(methods=["full", "hash"])
    lines = run(plan, tmp_path / "runs.jsonl", progress=lambda *news: told.append(news[:2]))
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert len(lines) == 4
    assert lines == read_runs(tmp_path / "runs.jsonl")
    for line in lines:
        assert line["error"] is None
        assert line["chosen"]
        assert 0 <= line["auc"] <= 1
        assert line["training_nbytes"] >= 16 * line["trained_floats"]
        assert line["lookups_per_second"] > 0
    full, hashed = lines[0], lines[-1]
    assert full["inference_nbytes"] == full["full_nbytes"] == 110 * 8 * 4
    assert hashed["inference_nbytes"] <= full["full_nbytes"] / 4
    assert hashed["budget"] == {"unit": "ratio", "value": 4}


def test_runs_go_on_where_they_stopped(tmp_path, monkeypatch):
    out = tmp_path / "runs.jsonl"
    first = run(plan_of(seeds=1), out)
    # The line of a process that was killed while it wrote.
    with open(out, "a") as file:
        file.write('{"key": "half')
    trained = []
    train = ctr.train
    monkeypatch.setattr(ctr, "train", lambda *args, **settings: trained.append(args) or train(*args, **settings))
    both = run(plan_of(seeds=2), out)
    assert len(trained) == 1
    assert both[0] == first[0]
    assert run(plan_of(seeds=2), out) == both
    assert len(trained) == 1
    # Numbers are what they are, however they are written.
    assert run(plan_of(seeds=2, budgets=[Budget("ratio", 4.0)]), out) == both
    assert len(trained) == 1
    # Another setting is another run.
    run(Plan(**vars(plan_of(seeds=1)) | {"settings": SETTINGS | {"epochs": 1}}), out)
    assert len(trained) == 2


def repeatable(lines):
    """Lines less what the clock says, in one order."""
    timed = ("seconds", "seconds_per_step", "lookups_per_second")
    return sorted(json.dumps({k: v for k, v in line.items() if k not in timed}, sort_keys=True) for line in lines)


def test_the_same_run_gives_the_same_line_in_any_process(tmp_path):
    plan = plan_of(methods=["full", "cce"], seeds=2, compress=["scalar"], budgets=[Budget("ratio", 2)])
    first, again = run(plan, tmp_path / "a.jsonl"), run(plan, tmp_path / "b.jsonl")
    assert repeatable(first) == repeatable(again)
    assert repeatable(run(plan, tmp_path / "c.jsonl", n_jobs=2)) == repeatable(first)
    assert len({line["auc"] for line in first if line["method"] == "cce"}) == 2, "seeds differ"


class Deadly:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_killed_process_is_told(tmp_path):
    plan = plan_of(dataset_options={"deadly": Deadly()})
    with pytest.raises(ChildProcessError, match=r"one of 2 processes was killed.*with fewer processes"):
        run(plan, tmp_path / "runs.jsonl", n_jobs=2)


def test_damaged_files_of_runs_are_gone_on_with(tmp_path):
    out = tmp_path / "runs.jsonl"
    (line,) = run(plan_of(seeds=1), out)
    with open(out, "ab") as file:
        file.write(b'12\n[]\n{"a": 1}\n{"dataset": "d", "model": "m", "method": "hash"}\n\xff\n')
        file.write(b'{"key": "z", "dataset": "d", "model": "m", "method": "hash"}\n{"key": "ha')
    assert read_runs(out) == [line]
    assert run(plan_of(seeds=1), out) == [line]
    assert out.read_bytes().endswith(b'{"key": "ha\n'), "what follows starts on a new line"


def test_a_full_disk_is_told(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("a device of Linux")
    worker = ctr._Worker(plan_of(), tmp_path / "runs.jsonl")
    worker.out = "/dev/full"
    with pytest.raises(OSError, match="No space left"):
        worker._write({"key": "a"})
    assert worker.done == {}


def test_a_place_that_cannot_be_written_to_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(ctr, "train", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(OSError, match="directory"):
        run(plan_of(), tmp_path)


def test_the_learning_rate_is_chosen_on_the_validation_part(tmp_path):
    out = tmp_path / "runs.jsonl"
    lines = run(plan_of(learning_rates=[1e-6, 2e-2], seeds=2), out)
    tried = [line for line in read_runs(out) if line["seed"] == 0]
    best = max(tried, key=lambda line: line["validation_auc"])
    assert {line["learning_rate"] for line in lines} == {best["learning_rate"]}
    assert [line["chosen"] for line in tried] == [line is best for line in tried]
    assert len(read_runs(out)) == 3


def test_out_of_reach_is_a_line_with_the_reason(tmp_path):
    (line,) = run(plan_of(budgets=[Budget("nbytes", 8)]), tmp_path / "runs.jsonl")
    assert line["auc"] is None
    assert "at least" in line["error"]
    assert line["training_nbytes"] > 0


def test_less_than_a_byte_is_out_of_reach(tmp_path):
    (line,) = run(plan_of(budgets=[Budget("ratio", 1e9)], seeds=1), tmp_path / "runs.jsonl")
    assert "must be positive, got 0" in line["error"]


def test_divergence_is_told_without_bytes(tmp_path, monkeypatch):
    def diverged(*_, **__):
        raise FloatingPointError("the loss of epoch 1 is not a number: lower the learning rate")

    monkeypatch.setattr(ctr, "train", diverged)
    (line,) = run(plan_of(seeds=1), tmp_path / "runs.jsonl")
    assert "lower the learning rate" in line["error"]
    assert line["training_nbytes"] is None, "the method can reach the budget"


def test_full_tables_are_compressed_afterwards(tmp_path):
    plan = plan_of(methods=["full"], compress=["scalar", "kmeans"], seeds=2, budgets=[Budget("ratio", 2)])
    lines = run(plan, tmp_path / "runs.jsonl")
    assert [line["method"] for line in lines].count("compress-scalar") == 2
    for line in lines:
        if line["method"] == "compress-scalar":
            assert line["inference_nbytes"] <= 110 * 8 * 4 / 2
            (full,) = (one for one in lines if (one["method"], one["seed"]) == ("full", line["seed"]))
            assert line["auc"] == pytest.approx(full["auc"], abs=0.02)
            # What training needed is what the full table needed.
            assert line["training_nbytes"] == lines[0]["training_nbytes"]
    assert run(plan, tmp_path / "runs.jsonl") == lines


def test_methods_get_frequencies_of_the_training_rows(tmp_path, monkeypatch):
    given = []

    class Seen(fields.FieldEmbeddings):
        def __init__(self, *args, **settings):
            given.append(settings["frequencies"])
            super().__init__(*args, **settings)

    monkeypatch.setattr(fields, "FieldEmbeddings", Seen)
    run(plan_of(seeds=1), tmp_path / "runs.jsonl")
    users, items = open_dataset(DATASET).rows("train").ids.T
    wanted = [*np.bincount(users, minlength=60), *np.bincount(items, minlength=50)]
    assert [list(found) for found in given] == [wanted]


def test_compressing_trains_the_full_table(tmp_path):
    plan = plan_of(methods=["hash"], compress=["scalar"], seeds=1, budgets=[Budget("ratio", 2)])
    lines = run(plan, tmp_path / "runs.jsonl")
    assert [line["method"] for line in lines] == ["full", "compress-scalar", "hash"]


def test_compressed_tables_hold_no_more_than_the_budget(tmp_path, monkeypatch):
    """Where the header of a file is smaller than it is taken for, the rest is not the table's to use."""
    taken = 2 * ctr.FILE_NBYTES
    monkeypatch.setattr(ctr, "FILE_NBYTES", taken)
    plan = plan_of(methods=["full"], compress=["scalar"], seeds=1, budgets=[Budget("ratio", 6)])
    line = run(plan, tmp_path / "runs.jsonl")[-1]
    assert line["method"] == "compress-scalar"
    assert line["inference_nbytes"] <= 110 * 8 * 4 / 6
    # There is a larger one that would have been taken.
    larger = vqrs.compress(np.zeros((110, 8), np.float32), nbytes=110 * 8 * 4 // 6 + taken, method="scalar")
    assert larger.codes.nbytes > 110 * 8 * 4 / 6


def labelled(tmp_path, *labels, fields=2):
    """A folder whose splits have these labels."""
    rows = {
        split: Rows(np.zeros((len(found), fields), int), np.zeros((len(found), 0), np.float32), np.array(found))
        for split, found in zip(("train", "validation", "test"), labels, strict=True)
    }
    names = [f"f{place}" for place in range(fields)]
    return str(save(Dataset("labelled", names, [3] * fields, rows), tmp_path / "data"))


@pytest.mark.parametrize(
    ("labels", "part"), [(([0, 1], [1, 1], [0, 1]), "validation"), (([0, 1], [0, 1], [0]), "test")]
)
def test_parts_of_one_label_have_no_auc(tmp_path, labels, part):
    plan = Plan(**vars(plan_of()) | {"dataset": labelled(tmp_path, *labels)})
    with pytest.raises(ValueError, match=f"the {part} part has . rows of one label"):
        run(plan, tmp_path / "runs.jsonl")
    assert (tmp_path / "runs.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("model", "fields", "dim", "message"),
    [("gmf", 3, 8, "two fields, users and items, got 3"), ("deepfm", 2, 1, "at least 2 for deepfm, got 1")],
)
def test_models_that_do_not_suit_the_data_are_no_dashes(tmp_path, model, fields, dim, message):
    data = labelled(tmp_path, [0, 1], [0, 1], [0, 1], fields=fields)
    plan = Plan(**vars(plan_of(models=[model], embedding_dim=dim)) | {"dataset": data})
    with pytest.raises(ValueError, match=message):
        run(plan, tmp_path / "runs.jsonl")
    assert (tmp_path / "runs.jsonl").read_text() == ""


def test_a_single_field_and_numbers(tmp_path):
    generator = np.random.default_rng(0)
    rows = Rows(generator.integers(0, 40, (300, 1)), generator.random((300, 3)).astype(np.float32), np.arange(300) % 2)
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    folder = save(Dataset("single", ["id"], [40], splits), tmp_path / "data")
    models = ["dlrm", "wide-and-deep", "dcn-v2", "deepfm"]
    lines = run(Plan(**vars(plan_of(models=models, seeds=1)) | {"dataset": str(folder)}), tmp_path / "runs.jsonl")
    assert [line["model"] for line in lines] == models
    assert all(0 < line["auc"] < 1 for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["hush"]}, "unknown method 'hush'"),
        ({"models": ["dlmr"]}, "unknown model 'dlmr'"),
        ({"compress": ["pq"]}, "unknown kind to compress with 'pq'"),
        ({"budgets": [Budget("rows", 1)]}, "a budget is"),
        ({"budgets": [Budget("ratio", 0)]}, "a budget must be positive, got ratio=0"),
        ({"budgets": [Budget("ratio", -3)]}, "a budget must be positive, got ratio=-3"),
        ({"budgets": [Budget("ratio", float("nan"))]}, "a budget must be positive, got ratio=nan"),
        ({"learning_rates": [1e-3, -1]}, "a learning rate must be positive, got -1"),
        ({"methods": ["cce:colums=3"]}, "method cce has no setting 'colums': it has .*num_columns"),
        ({"methods": ["hash:ratio=3"]}, "method hash has no setting 'ratio'"),
        ({"models": ["gmf:weigths=False"]}, "model gmf has no setting 'weigths': it has weights$"),
    ],
)
def test_wrong_plans(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(plan_of(**changes), tmp_path / "runs.jsonl")
    assert not (tmp_path / "runs.jsonl").exists()


def test_lines_are_whole_json(tmp_path):
    run(plan_of(), tmp_path / "runs.jsonl")
    assert all(json.loads(line)["key"] for line in (tmp_path / "runs.jsonl").read_text().splitlines())
