"""Runs of the benchmark: what is run, what is written, and that they go on where they stopped."""

import json

import pytest

from vqrs.bench import ctr
from vqrs.bench.ctr import Budget, Plan, parse_method, read_runs, run

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
    # Another setting is another run.
    run(Plan(**vars(plan_of(seeds=1)) | {"settings": SETTINGS | {"epochs": 1}}), out)
    assert len(trained) == 2


def test_processes_give_the_same_runs(tmp_path):
    plan = plan_of(methods=["full", "hash"], seeds=1)
    alone, together = run(plan, tmp_path / "a.jsonl"), run(plan, tmp_path / "b.jsonl", n_jobs=2)

    def scores(lines):
        return sorted((line["method"], line["auc"], line["validation_auc"]) for line in lines)

    assert scores(alone) == scores(together)


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


def test_full_tables_are_compressed_afterwards(tmp_path):
    plan = plan_of(methods=["full"], compress=["scalar", "kmeans"], seeds=2, budgets=[Budget("ratio", 2)])
    lines = run(plan, tmp_path / "runs.jsonl")
    assert [line["method"] for line in lines].count("compress-scalar") == 2
    for line in lines:
        if line["method"] == "compress-scalar":
            assert line["inference_nbytes"] <= 110 * 8 * 4 / 2
            assert line["auc"] == pytest.approx(lines[0]["auc"], abs=0.2)
            # What training needed is what the full table needed.
            assert line["training_nbytes"] == lines[0]["training_nbytes"]
    assert run(plan, tmp_path / "runs.jsonl") == lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["hush"]}, "unknown method 'hush'"),
        ({"models": ["dlmr"]}, "unknown model 'dlmr'"),
        ({"compress": ["pq"]}, "unknown kind to compress with 'pq'"),
        ({"budgets": [Budget("rows", 1)]}, "a budget is"),
    ],
)
def test_wrong_plans(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(plan_of(**changes), tmp_path / "runs.jsonl")
    assert not (tmp_path / "runs.jsonl").exists()


def test_lines_are_whole_json(tmp_path):
    run(plan_of(), tmp_path / "runs.jsonl")
    assert all(json.loads(line)["key"] for line in (tmp_path / "runs.jsonl").read_text().splitlines())
