"""``vqrs bench``: what its commands read, write, print and refuse."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from vqrs import cli
from vqrs._commands import app
from vqrs.bench import scale as bench_scale

DATA = "synthetic-60x50x1500"
FAST = ["--model", "gmf", "--dim", "8", "--epochs", "1", "--batch-size", "256", "--separate"]


def run(*arguments):
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def main(capsys, *arguments):
    """Exit code and both outputs of the program."""
    code = cli.main(["bench", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Raw results of two methods, one of which cannot reach the smaller budget."""
    path = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    methods = ["--method", "low-rank", "--method", "low-rank:rank=2"]
    run("ctr", DATA, *methods, "--ratio", 3, "--ratio", 5, "--seeds", 2, *FAST, "--out", path)
    return path


def test_help():
    text = run().stdout
    for command in ("ctr", "prepare", "report", "scale", "theory", "traits"):
        assert f"  {command} " in text
    assert "DATASET" in run("ctr", "--help").stdout


def test_ctr_writes_a_line_a_run(runs):
    lines = [json.loads(line) for line in runs.read_text().splitlines()]
    keys = {line["key"]: line for line in lines}
    assert len(keys) == 7  # two seeds each, and one run that is out of reach
    assert {line["seed"] for line in keys.values()} == {0, 1}
    assert {round(line["ratio"], 1) for line in keys.values()} == {3, 5}
    assert sum(line["error"] is not None for line in keys.values()) == 1


def test_ctr_goes_on_where_it_was_stopped(runs, tmp_path):
    copy = tmp_path / "runs.jsonl"
    text = runs.read_text()
    copy.write_text(text)
    again = ["ctr", DATA, "--method", "low-rank", "--ratio", 5, "--ratio", 3, "--seeds", 2, *FAST, "--out", copy]
    result = run(*again)
    assert copy.read_text() == text
    assert "2/2 low-rank, " in result.stderr
    assert "| low-rank | " in result.stdout
    run(*again, "--seeds", 3)
    added = [json.loads(line) for line in copy.read_text()[len(text) :].splitlines()]
    assert {line["seed"] for line in added} == {2}


def test_ctr_as_json_with_every_kind_of_budget(tmp_path):
    budgets = ["--bytes", "1KiB", "--floats", 400, "--ppd", 9]
    found = json.loads(
        run(
            "ctr", DATA, "--method", "low-rank", *budgets, "--seeds", 1, *FAST, "--json",
            "--learning-rate", 1e-3, "--learning-rate", 1e-2, "--option", "random_state=3",
            "--out", tmp_path / "new" / "runs.jsonl",
        ).stdout
    )  # fmt: skip
    sizes = {(s["unit"], s["value"]): s["means"] for s in found["summaries"]}
    assert sizes["nbytes", 1024]["inference_nbytes"] <= 1024
    assert 360 <= sizes["num_floats", 400]["trained_floats"] <= 400
    assert sizes["ppd", 9]["trained_floats"] == 60 + 50 + 2 * 8
    lines = [json.loads(line) for line in (tmp_path / "new" / "runs.jsonl").read_text().splitlines()]
    assert {line["learning_rate"] for line in lines} == {1e-3, 1e-2}
    assert {json.dumps(json.loads(line["key"])[1]) for line in lines} == {'{"random_state": 3}'}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctr_is_interrupted(tmp_path):
    """Ctrl-C reaches all processes of the terminal's group; those that train do not go on with what is queued."""
    out = tmp_path / "runs.jsonl"
    methods = ["--method", "low-rank", "--method", "hash", "--method", "robe", "--jobs", "2", "--out", str(out)]
    long = ["synthetic-2000x2000x200000", "--model", "gmf", "--dim", "16", "--seeds", "1", "--epochs", "3"]
    program = [sys.executable, "-m", "vqrs", "bench", "ctr", *long, *methods]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == cli.INTERRUPTED
    assert error.splitlines()[-1] == "vqrs: interrupted"
    assert "Traceback" not in error
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["key"] for line in lines}) < 5  # of 9


def test_all_methods_beside_settings_of_one(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr("vqrs.bench.ctr.run", lambda plan, *_, **__: plans.append(plan) or [])
    monkeypatch.chdir(tmp_path)
    run("ctr", DATA)
    run("ctr", DATA, "--method", "all", "--method", "cce:num_columns=8")
    assert "full" in plans[0].methods
    assert len(plans[0].methods) > 20
    assert plans[1].methods == [*plans[0].methods, "cce:num_columns=8"]


def test_report(runs):
    text = run("report", runs).stdout
    assert f"### {DATA}, gmf, d = 8" in text
    assert "Means over 2 seeds with 95 % confidence intervals" in text
    assert "– (trains in " in text
    found = json.loads(run("report", runs, "--json").stdout)
    assert {s["method"] for s in found["summaries"]} == {"low-rank", "low-rank:rank=2"}
    assert {w["best"] for w in found["winners"] if w["ratio"] > 4} <= {"low-rank", "low-rank:rank=2", None}


def test_report_of_a_damaged_file(runs, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(runs.read_text() + '{"key": "half')
    result = run("report", path)
    assert "is damaged, it was left out" in result.stderr
    assert result.stdout == run("report", runs).stdout


def test_report_in_a_folder(runs, tmp_path):
    assert run("report", runs, "--out", tmp_path / "made", "--plot").stdout == ""
    name = f"{DATA}-gmf.png"
    assert f"]({name})" in (tmp_path / "made" / "report.md").read_text()
    assert (tmp_path / "made" / name).read_bytes()[:4] == b"\x89PNG"


def test_report_into_a_document(runs, tmp_path):
    document = tmp_path / "benchmark.md"
    document.write_text("Before.\n<!-- results begin -->\nold\n<!-- results end -->\nAfter.\n")
    for _ in range(2):
        run("report", runs, "--into", document, "--plot")
        text = document.read_text()
        assert text.startswith("Before.\n<!-- results begin -->\n### Winners")
        assert text.endswith("<!-- results end -->\nAfter.\n")
        assert "old" not in text
    assert (tmp_path / f"benchmark-{DATA}-gmf.png").exists()


def test_traits(runs):
    text = run("traits", DATA, "synthetic-30x20x300", "--runs", runs).stdout
    assert f"{DATA}: 1,200 training, 150 validation, 150 test rows; 110 ids" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| gmf | 3×: low-rank" in rows[DATA]
    assert rows["synthetic-30x20x300"].endswith("| – | – | – | – |")
    found = json.loads(run("traits", DATA, "--runs", runs, "--json").stdout)
    assert found["traits"][0]["name"] == DATA
    assert {winner["section"]["dataset"] for winner in found["winners"]} == {DATA}


def test_prepare(tmp_path):
    lines = [f"{row % 3}::{row % 4}::{row % 5 + 1}::{row}\n" for row in range(100)]
    (tmp_path / "ratings.dat").write_text("".join(lines))
    asked = ["prepare", tmp_path / "ratings.dat", tmp_path / "made", "--option", "name=films"]
    assert run(*asked).stdout == "Dataset('films': 80 train, 10 validation, 10 test; 2 fields, 9 ids)\n"
    assert "films: 80 training" in run("traits", tmp_path / "made").stdout
    assert run(*asked, "--overwrite", "--option", "split=hash").stdout.startswith("Dataset('films': ")


def test_theory(tmp_path):
    text = run("theory", "--runs", 2, "--rounds", 3, "--plot", tmp_path / "theory.png").stdout
    assert (tmp_path / "theory.png").read_bytes()[:4] == b"\x89PNG"
    figures = [[float(figure) for figure in line.split()] for line in text.splitlines()[2:]]
    assert [number for number, *_ in figures] == [1, 2, 3]
    assert all(least <= mean <= most < 1 for _, least, mean, most, _ in figures)
    found = json.loads(run("theory", "--runs", 2, "--rounds", 3, "--json").stdout)
    assert [round(limit, 5) for limit in found["bound"]] == [limit for *_, limit in figures]
    assert round(min(excess[2] for excess in found["excess"]), 5) == figures[2][1]


def test_scale(monkeypatch):
    asked = ["scale", "--method", "low-rank", "--rows", 5000, "--dim", 8, "--ratio", 5, "--steps", 20]
    (found,) = json.loads(run(*asked, "--json").stdout)
    assert found["method"] == "low-rank"
    assert found["inference_nbytes"] <= 4 * 5000 * 8 / 5
    monkeypatch.setattr(bench_scale, "run_scale", lambda *_, **__: found | {"exported_nbytes": None})
    text = run(*asked).stdout
    assert f"  inference_nbytes: {found['inference_nbytes']:,} (" in text
    assert "  exported_nbytes: None\n" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ctr", DATA, "--method", "nothing"], 1, "unknown method 'nothing': there are "),
        (["ctr", DATA, "--model", "nothing", "--method", "low-rank"], 1, "unknown model 'nothing': there are "),
        (["ctr", "nowhere.npz", "--method", "low-rank"], 1, "nowhere.npz: no such file"),
        (["ctr", DATA, "--method", "low-rank:rank"], 1, "NAME=VALUE, got 'rank'"),
        (["ctr", DATA, "--bytes", "many"], 2, "--bytes: cannot read 'many'"),
        (["ctr", DATA, "--seeds", "0"], 2, "--seeds"),
        (["ctr", DATA, "--method", "low-rank", "--ratio", "0"], 1, "a budget must be positive, got ratio=0"),
        (["ctr", DATA, "--method", "low-rank", "--learning-rate", "0"], 1, "a learning rate must be positive, got 0"),
        (["ctr", DATA, "--method", "low-rank:rang=3"], 1, "method low-rank has no setting 'rang': it has "),
        (["ctr"], 2, "DATASET"),
        (["scale", "--method", "hush", "--rows", "50"], 1, "vqrs: unknown method 'hush': there are "),
        (["prepare", "nowhere.npz", "made"], 1, "nowhere.npz: no such file"),
        (["prepare", "{empty}", "made", "--option", "name"], 2, "--option name: expected NAME=VALUE"),
        (["traits", "nowhere.npz"], 1, "nowhere.npz: no such file"),
        (["report", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["report", "{empty}"], 1, "no runs in "),
        (["report", "{runs}", "--plot"], 2, "--plot needs --out FOLDER or --into FILE"),
        (["report", "{runs}", "--into", "{empty}"], 1, "<!-- results begin -->"),
    ],
)
def test_wrong_use(arguments, code, words, capsys, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty.md"
    empty.touch()
    found, out, err = main(capsys, *(argument.format(runs=runs, empty=empty) for argument in arguments))
    assert (found, out) == (code, "")
    assert err.startswith("vqrs: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("torch", ["ctr", DATA], "vqrs: this benchmark needs torch: pip install 'vqrs[torch]'\n"),
        ("torch", ["scale"], "vqrs: this benchmark needs torch: pip install 'vqrs[torch]'\n"),
        ("sklearn", ["ctr", DATA], "vqrs: this benchmark needs sklearn: pip install 'vqrs[sklearn]'\n"),
        ("matplotlib.figure", ["report", "{runs}", "--out", "{folder}", "--plot"],
         "vqrs: plots need matplotlib: pip install 'vqrs[plot]'\n"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(module, arguments, words, capsys, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    found = main(capsys, *(argument.format(runs=runs, folder=tmp_path) for argument in arguments))
    assert found == (1, "", words)


def test_nothing_heavy_is_imported_for_help():
    program = (
        "import sys; from vqrs.cli import main; main(['bench', '--help']); "
        "sys.exit(' '.join({'torch', 'sklearn', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
