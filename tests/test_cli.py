"""The command line: what it reads, prints and returns."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import vqrs
from vqrs import _readers, cli, demo
from vqrs._commands import app


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def source(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, rows)
    return path


@pytest.fixture
def table(rows, tmp_path):
    path = tmp_path / "table.safetensors"
    names = [f"row-{number}" for number in range(2000)]
    vqrs.compress(rows, method="product", n_subvectors=4, n_bits=6, random_state=0, names=names, path=path)
    return path


def run(*arguments):
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments):
    return json.loads(run(arguments[0], "--json", *arguments[1:]))


def main(capsys, *arguments):
    """Exit code and both outputs of the program."""
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


# ---- commands ------------------------------------------------------------------------------------------------------


def test_compress(rows, source, tmp_path):
    out = tmp_path / "out.safetensors"
    shown = run_json("compress", source, out, "--ratio", 6, "--seed", 3)
    assert shown["nbytes"] == os.path.getsize(out) <= rows.nbytes / 6
    assert (shown["path"], shown["shape"], shown["float32_nbytes"]) == (str(out), [2000, 16], rows.nbytes)
    assert np.array_equal(vqrs.open(out)[...], vqrs.compress(rows, ratio=6, random_state=3)[...])


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (["--bytes", "24KiB"], lambda table: table.nbytes <= 24 * 1024),
        (["--max-error", "0.05"], lambda table: table.relative_error <= 0.05),
        (["--method", "scalar", "--set", "dtype=int4"], lambda table: table.parameters["dtype"] == "int4"),
        (["--method", "product", "--set", "n_bits=5", "--ratio", "5"], lambda table: table.parameters["n_bits"] == 5),
        (["--method", "scalar", "--set", "symmetric=true"], lambda table: table.parameters["symmetric"] is True),
        (["--method", "product", "--threads", "1"], lambda table: table.kind == "product"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_compress_options(source, tmp_path, options, check):
    run("compress", source, tmp_path / "out", *options)
    assert check(vqrs.open(tmp_path / "out"))


def test_compress_with_weights_and_names(source, tmp_path):
    np.savetxt(tmp_path / "weights.txt", np.linspace(0, 1, 2000))
    (tmp_path / "names.txt").write_text("\n".join(f"n{number}" for number in range(2000)) + "\n")
    options = ["--weights", tmp_path / "weights.txt", "--names", tmp_path / "names.txt"]
    shown = run_json("compress", source, tmp_path / "out", "--method", "scalar", *options)
    assert "weighted" in shown["errors"]
    assert vqrs.open(tmp_path / "out").names[-1] == "n1999"


def test_info(table):
    assert run_json("info", table) == vqrs.open(table).info()
    shown = run("info", table)
    for part in ["product", "n_subvectors", "relative", "codebook_dtype"]:
        assert part in shown


def test_verify(table, capsys):
    assert run_json("verify", table) == {"path": str(table), "intact": True}
    damaged = bytearray(table.read_bytes())
    damaged[4500] ^= 16
    table.write_bytes(damaged)
    code, out, err = main(capsys, "verify", table)
    assert (code, out, err.count("\n")) == (1, "", 1)
    code, out, err = main(capsys, "verify", table, "--json")
    assert (code, json.loads(out)["intact"], err) == (1, False, "")


def test_lookup(table):
    decoded = vqrs.open(table)[...]
    shown = run_json("lookup", table, "5", "row-7", "--", "-1")
    assert shown["ids"] == ["5", "row-7", "-1"]
    assert np.array_equal(np.array(shown["rows"], np.float32), decoded[[5, 7, -1]])
    lines = run("lookup", table, "5", "row-7").splitlines()
    assert [line.split()[0] for line in lines] == ["5", "row-7"]
    assert np.allclose([float(value) for value in lines[1].split()[1:]], decoded[7])


def test_eval(rows, source, table):
    decoded = vqrs.open(table)[...].astype(np.float64)
    shown = run_json("eval", table, source)
    squares = ((rows - decoded) ** 2).sum(axis=1)
    cosines = (rows * decoded).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(decoded, axis=1)
    assert shown["relative_error"] == pytest.approx(squares.sum() / (rows.astype(np.float64) ** 2).sum())
    assert shown["cosine"] == pytest.approx({"mean": cosines.mean(), "min": cosines.min()})
    assert shown["max_absolute_error"] == pytest.approx(np.abs(rows - decoded).max())
    worst = (squares / (rows.astype(np.float64) ** 2).sum(axis=1)).max()
    assert shown["relative_error_of_rows"]["percentile_100"] == pytest.approx(worst)
    assert shown["nbytes"] == os.path.getsize(table)
    errors = run_json("info", table)["errors"]
    assert shown["gaussian_bound"] == pytest.approx(errors["gaussian_bound"], rel=1e-3)
    assert shown["above_bound_db"] == pytest.approx(errors["above_bound_db"], abs=0.01)
    assert "percentile_99" in run("eval", table, source)


def test_eval_of_zero_rows(tmp_path):
    x = np.zeros((3, 4), np.float32)
    x[0] = 1
    np.save(tmp_path / "rows.npy", x)
    run("compress", tmp_path / "rows.npy", tmp_path / "table", "--method", "scalar")
    assert run_json("eval", tmp_path / "table", tmp_path / "rows.npy")["cosine"] == {"mean": 1.0, "min": 1.0}


def test_tune(source, tmp_path):
    shown = run_json("tune", source, "--ratio", "2", "--method", "scalar", "--method", "product", "--effort", "fast")
    assert {trial["kind"] for trial in shown["trials"]} == {"product", "scalar"}
    assert any(trial["curve"] for trial in shown["trials"])
    text = run("tune", source, "--bytes", "20KiB", "--effort", "fast", "--plot", tmp_path / "front.png")
    assert "lookup ns" in text
    assert (tmp_path / "front.png").exists()


def test_help_names_the_commands():
    shown = run("--help")
    for command in ["compress", "info", "verify", "lookup", "eval", "tune", "demo"]:
        assert command in shown
    assert "--max-error" in run("compress", "--help")


# ---- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "command"),
        (["explode"], 2, "explode"),
        (["info"], 2, "'T'"),
        (["info", "{table}", "--colour"], 2, "--colour"),
        (["compress", "{source}", "{out}"], 2, "--ratio, --bytes and --max-error"),
        (["compress", "{source}", "{out}", "--ratio", "2", "--bytes", "9"], 2, "--ratio, --bytes and --max-error"),
        (["compress", "{source}", "{out}", "--ratio", "two"], 2, "--ratio.*number|--ratio.*float"),
        (["compress", "{source}", "{out}", "--bytes", "many"], 2, "many"),
        (["compress", "{source}", "{out}", "--method", "zip"], 2, "'zip'; there are .*product"),
        (["compress", "{source}", "{out}", "--ratio", "2", "--set", "a=1"], 2, "--set needs --method"),
        (
            ["compress", "{source}", "{out}", "--method", "scalar", "--set", "a=1"],
            2,
            "no parameter 'a'; it has .*dtype",
        ),
        (["compress", "{source}", "{out}", "--method", "scalar", "--set", "dtype"], 2, "expected NAME=VALUE"),
        (["compress", "{source}", "{out}", "--method", "scalar", "--set", "dtype=int99"], 1, "int99"),
        (["compress", "{source}", "{out}", "--ratio", "1e6"], 1, "too few .* the least is"),
        (["compress", "missing.npy", "{out}", "--ratio", "2"], 1, "missing.npy"),
        (["compress", "{source}", "no-folder/out", "--ratio", "2"], 1, "no-folder"),
        (["info", "missing"], 1, "missing"),
        (["info", "{source}"], 1, "rows.npy"),
        (["lookup", "{table}", "2000"], 1, "2000 .*2000 rows"),
        (["lookup", "{table}", "nobody"], 1, "no row is named 'nobody'"),
        (["eval", "{table}", "missing.npy"], 1, "missing.npy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_take_one_line(capsys, source, table, tmp_path, arguments, code, words):
    places = {"source": source, "table": table, "out": tmp_path / "out"}
    found, out, err = main(capsys, *(argument.format(**places) for argument in arguments))
    assert (found, out) == (code, "")
    assert err.startswith("vqrs: ")
    assert err.count("\n") == 1
    assert re.search(words, err), err


@pytest.mark.parametrize("program", [["-m", "vqrs"], ["-c", "import sys; from vqrs.cli import main; sys.exit(main())"]])
def test_as_a_program(table, program):
    def call(*arguments):
        return subprocess.run([sys.executable, *program, *map(str, arguments)], capture_output=True, text=True)

    done = call("lookup", table, "0", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["rows"][0]) == 16
    failed, wrong = call("info", "missing"), call("info")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (1, "", 1)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)


def test_without_typer(table):
    program = "import sys; sys.modules['typer'] = None; from vqrs.cli import main; sys.exit(main())"
    found = subprocess.run([sys.executable, "-c", program, "info", str(table)], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == "vqrs: the command line needs typer and rich: pip install 'vqrs[cli]'\n"


INTERRUPTIBLE = """
import signal, sys, threading
import vqrs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
from vqrs.cli import main
def compress(*arguments, **options):
    print("ready", flush=True)
    while True:
        threading.Event().wait(0.1)
vqrs.compress = compress
sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGINT to one process")
def test_interrupt(source, tmp_path):
    arguments = [sys.executable, "-c", INTERRUPTIBLE, "compress", str(source), str(tmp_path / "out"), "--ratio", "2"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "vqrs: interrupted\n")


# ---- files of rows -------------------------------------------------------------------------------------------------


def check_reads(source, rows, names=None, mapped=True):
    read = _readers.read_rows(source)
    assert tuple(read.values.shape) == rows.shape
    assert np.array_equal(np.asarray(read.values[10:20]), rows[10:20])
    assert np.array_equal(np.asarray(read.values), rows)
    assert read.names == names
    if mapped:
        base = read.values
        while base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)


def test_reads_npy(source, rows):
    check_reads(source, rows)


def test_reads_npz(rows, tmp_path):
    np.savez(tmp_path / "one.npz", rows=rows)
    check_reads(tmp_path / "one.npz", rows, mapped=False)
    np.savez(tmp_path / "two.npz", rows=rows, other=rows + 1)
    check_reads(f"{tmp_path / 'two.npz'}:other", rows + 1, mapped=False)
    with pytest.raises(ValueError, match=r"two.npz has 2 tables: add ':NAME' with one of rows, other"):
        _readers.read_rows(tmp_path / "two.npz")
    with pytest.raises(ValueError, match=r"no table 'third'; it has: rows, other"):
        _readers.read_rows(f"{tmp_path / 'two.npz'}:third")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_reads_safetensors(rows, tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    save_file = pytest.importorskip("safetensors.torch", reason="writes the file").save_file
    tensor = torch.from_numpy(rows).to(getattr(torch, dtype))
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": tensor + 1, "b.weight": tensor, "bias": torch.ones(3), "ids": torch.arange(3)}, path)
    check_reads(f"{path}:b.weight", tensor.double().numpy(), mapped=dtype != "bfloat16")
    with pytest.raises(ValueError, match=r"2 tables: add ':NAME' with one of a.weight, b.weight"):
        _readers.read_rows(path)
    shown = run_json("compress", f"{path}:b.weight", tmp_path / "out", "--method", "scalar")
    assert shown["errors"]["relative"] < 1e-4
    assert run_json("eval", tmp_path / "out", f"{path}:b.weight")["relative_error"] < 1e-4


@pytest.mark.parametrize(
    "content", [b"", b"abc", (2**62).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"nope"], ids=range(4)
)
def test_files_that_are_no_safetensors(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.safetensors is no safetensors file"):
        _readers.read_rows(tmp_path / "bad.safetensors")


def test_reads_a_table(table):
    opened = vqrs.open(table)
    check_reads(table, opened[...], opened.names, mapped=False)
    assert run_json("eval", table, table)["relative_error"] == 0


def test_reads_torch(rows, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    torch.save(torch.from_numpy(rows), tmp_path / "tensor.pt")
    check_reads(tmp_path / "tensor.pt", rows, mapped=False)
    torch.save({"weight": torch.from_numpy(rows), "bias": torch.ones(3)}, tmp_path / "state.pt")
    check_reads(tmp_path / "state.pt", rows, mapped=False)
    torch.save({"a": torch.ones(2, 2), "b": torch.from_numpy(rows)}, tmp_path / "two.pt")
    check_reads(f"{tmp_path / 'two.pt'}:b", rows, mapped=False)
    with pytest.raises(ValueError, match="2 tables"):
        _readers.read_rows(tmp_path / "two.pt")
    with pytest.raises(FileNotFoundError):
        _readers.read_rows(tmp_path / "missing.pt")


def lines_of(rows, names):
    return [" ".join([name, *(f"{value:.9g}" for value in row)]) for name, row in zip(names, rows, strict=True)]


@pytest.mark.parametrize("header", ["2000 16\n", ""], ids=["word2vec", "GloVe"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_reads_text(rows, tmp_path, header, end):
    names = [f"wörd{number}" for number in range(1999)] + [". . ."]
    (tmp_path / "vectors.txt").write_text(header + "\n".join(lines_of(rows, names)) + end, encoding="utf-8")
    check_reads(tmp_path / "vectors.txt", rows, names, mapped=False)
    run("compress", tmp_path / "vectors.txt", tmp_path / "out", "--method", "scalar")
    assert vqrs.open(tmp_path / "out").names == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1 is not a name followed by numbers"),
        ("word\n", "line 1 is not a name followed by numbers"),
        ("a 1 2\nb 1\n", "line 2 is not a name and 2 numbers"),
        ("a 1 2\nb 1 x\n", "line 2 is not a name and 2 numbers"),
        ("3 2\na 1 2\nb 1 2\n", "has 2 rows, but its first line says 3"),
        ("1 2\na 1 2\nb 1 2\n", "line 3 is one too many for the 1 rows"),
    ],
)
def test_wrong_text(tmp_path, text, words):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        _readers.read_rows(tmp_path / "vectors.txt")


@pytest.mark.parametrize("separator", [b"", b"\n"])
def test_reads_word2vec_binary(rows, tmp_path, separator):
    names = [f"wörd{number}" for number in range(2000)]
    records = (name.encode() + b" " + row.tobytes() + separator for name, row in zip(names, rows, strict=True))
    content = b"2000 16\n" + b"".join(records)
    (tmp_path / "vectors.bin").write_bytes(content)
    check_reads(tmp_path / "vectors.bin", rows, names, mapped=False)
    (tmp_path / "cut.bin").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="is cut"):
        _readers.read_rows(tmp_path / "cut.bin")


def test_one_dimension_is_refused(tmp_path):
    np.save(tmp_path / "flat.npy", np.arange(5.0))
    with pytest.raises(ValueError, match=r"flat.npy has shape \(5,\), expected two dimensions"):
        _readers.read_rows(tmp_path / "flat.npy")


# ---- demo ----------------------------------------------------------------------------------------------------------


def test_demo_without_the_model_says_the_command(capsys, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    code, out, err = main(capsys, "demo")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert demo.INSTALL in err


@pytest.mark.slow
def test_demo(minilm_tokens, tmp_path):
    shown = run_json("demo", "--out", tmp_path / "tables")
    for ratio, entry in zip(demo.RATIOS, shown["tables"], strict=True):
        with vqrs.open(entry["path"]) as table:
            assert (table.shape, table.nbytes) == ((30522, 384), entry["nbytes"])
            assert table.ratio >= ratio
            table.verify()
    neighbours = shown["neighbours"]
    for word in demo.WORDS:
        assert len(set(neighbours["before"][word]) & set(neighbours["after"][word])) >= 2
    assert len(shown["speed"]) == 2
    assert all(len(row) == len(rows[0]) for _, rows in demo.report(shown) for row in rows)


def test_a_table_never_takes_the_place_of_its_rows(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.eye(8, dtype=np.float32))
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "vqrs", "compress", str(path), str(path), "--ratio", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "OUT is IN" in done.stderr
    assert path.read_bytes() == before
