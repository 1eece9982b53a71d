"""One call from rows to a table: what is chosen, and that budgets hold."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vqrs
from vqrs._ladders import ladders_for


def errors_of(table):
    return table.info()["errors"]


def float32_bytes(x):
    return 4 * x.shape[0] * x.shape[1]


# ---- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.9, 3, 6, 10, 18])
def test_ratio_holds_and_is_used(small_rows, ratio):
    table = vqrs.compress(small_rows, ratio=ratio, random_state=0)
    assert table.ratio >= ratio
    assert table.nbytes > 0.5 * float32_bytes(small_rows) / ratio


def test_error_falls_with_the_budget(small_rows):
    errors = [vqrs.compress(small_rows, ratio=ratio, random_state=0).relative_error for ratio in (16, 8, 4, 1.9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(("nbytes", "budget"), [(30_000, 30_000), ("40KiB", 40_960), ("0.05 MB", 50_000)])
def test_nbytes(small_rows, nbytes, budget):
    table = vqrs.compress(small_rows, nbytes=nbytes, random_state=0)
    assert 0.5 * budget < table.nbytes <= budget


@given(st.integers(30, 400), st.integers(1, 40), st.floats(1.01, 30), st.integers(0, 9))
@settings(max_examples=15)
def test_no_budget_is_ever_passed(n_rows, dim, ratio, seed):
    x = np.random.default_rng(seed).normal(size=(n_rows, dim)).astype(np.float32)
    budget = int(float32_bytes(x) / ratio)
    if budget < min(ladder[0].nbytes for ladder in ladders_for(None, {}, n_rows, dim)):
        with pytest.raises(ValueError, match="too few"):
            vqrs.compress(x, ratio=ratio, random_state=seed)
    else:
        assert vqrs.compress(x, ratio=ratio, random_state=seed).nbytes <= budget


def test_names_and_metadata_count(small_rows):
    names = [f"a long name of row {number}" for number in range(3000)]
    table = vqrs.compress(small_rows, nbytes=150_000, names=names, metadata={"a": "b" * 5000}, random_state=0)
    assert 100_000 < table.nbytes <= 150_000
    assert (table.names, table.metadata) == (names, {"a": "b" * 5000})
    with pytest.raises(ValueError, match="too few"):
        vqrs.compress(small_rows, nbytes=60_000, names=names)


def test_a_budget_that_nothing_reaches_names_the_least(small_rows):
    with pytest.raises(
        ValueError, match=r"100 bytes \(ratio 2880\) are too few for 3000 x 24 rows: the least is"
    ) as caught:
        vqrs.compress(small_rows, nbytes=100)
    least = int(str(caught.value).split("the least is ")[1].split()[0])
    assert vqrs.compress(small_rows, nbytes=least, random_state=0).nbytes == least
    with pytest.raises(ValueError, match="too few"):
        vqrs.compress(small_rows, nbytes=least - 1)


def test_least_of_a_method(small_rows):
    with pytest.raises(ValueError, match="by the kind 'scalar'"):
        vqrs.compress(small_rows, method="scalar", ratio=40)


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_no_plain_choice_is_better(small_rows):
    """The chosen table is about as good as the best of those that a user would try by hand."""
    chosen = vqrs.compress(small_rows, ratio=6, random_state=0)
    by_hand = []
    for method, parameters in [
        *(("product", {"n_subvectors": m, "n_bits": b}) for m in (6, 8, 12, 24) for b in (4, 6, 8)),
        *(("scalar", {"dtype": d, "granularity": g}) for d in ("int2", "int4") for g in ("row", "column")),
        *(("kmeans", {"n_clusters": k}) for k in (64, 256)),
        *(("residual", {"n_stages": s}) for s in (1, 2)),
    ]:
        if vqrs.estimate(3000, 24, method, **parameters) <= float32_bytes(small_rows) / 6:
            by_hand.append(vqrs.compress(small_rows, method=method, random_state=0, **parameters).relative_error)
    assert len(by_hand) > 5
    assert chosen.relative_error <= 1.05 * min(by_hand)


def test_few_distinct_rows_are_kept_as_they_are():
    generator = np.random.default_rng(0)
    distinct = generator.integers(-100, 100, size=(200, 32)).astype(np.float32)
    x = distinct[generator.integers(0, 200, 20_000)]
    assert vqrs.compress(x, ratio=60, random_state=0).relative_error == 0


def test_repeated_rows_are_kept_once():
    """More distinct rows than a trial sees, and more than any codebook of the others has."""
    generator = np.random.default_rng(0)
    distinct = generator.normal(size=(4000, 16)).astype(np.float32)
    x = np.repeat(distinct, 5, axis=0)[generator.permutation(20_000)]
    for goal in ({"ratio": 4}, {"max_error": 0}):
        table = vqrs.compress(x, random_state=0, **goal)
        assert (table.kind, table.relative_error, table.ratio > 4) == ("deduplicating", 0, True)
        assert np.array_equal(table[...], x)


@pytest.mark.parametrize("goal", [{"ratio": 8}, {"max_error": 0.05}])
def test_repeats_for_a_random_state(small_rows, goal):
    first = vqrs.compress(small_rows, random_state=3, n_jobs=1, **goal)
    again = vqrs.compress(small_rows, random_state=3, n_jobs=2, **goal)
    assert first.info() == again.info()
    assert np.array_equal(first.codes, again.codes)


def test_weights_matter(small_rows):
    weights = np.where(np.arange(3000) < 300, 1.0, 0.0)
    weighted = vqrs.compress(small_rows, ratio=16, method="product", sample_weight=weights, random_state=0)
    plain = vqrs.compress(small_rows, ratio=16, method="product", random_state=0)

    def error_of_first(table):
        return ((table[:300] - small_rows[:300]) ** 2).sum()

    assert error_of_first(weighted) < 0.8 * error_of_first(plain)


def test_values_that_float16_cannot_hold(small_rows):
    table = vqrs.compress(small_rows * np.float32(1e6), ratio=1.9, random_state=0)
    assert table.relative_error < 1e-3


@pytest.mark.parametrize("max_error", [0.3, 0.1, 0.03, 1e-3, 1e-5])
def test_max_error_holds(small_rows, max_error):
    table = vqrs.compress(small_rows, max_error=max_error, random_state=0)
    assert table.relative_error <= max_error
    # A table of less bytes that holds it, too, would have been found with its bytes as the budget.
    try:
        smaller = vqrs.compress(small_rows, nbytes=int(0.9 * table.nbytes), random_state=0)
    except ValueError:
        return
    assert smaller.relative_error > max_error


def test_max_error_of_weights(small_rows):
    weights = np.random.default_rng(1).uniform(size=3000)
    table = vqrs.compress(small_rows, max_error=0.05, sample_weight=weights, random_state=0)
    assert errors_of(table)["weighted"] <= 0.05


def test_max_error_out_of_reach(small_rows):
    with pytest.raises(ValueError, match=r"max_error=1e-12 cannot be reached: the least error found is \d"):
        vqrs.compress(small_rows, max_error=1e-12)
    with pytest.raises(ValueError, match="cannot be reached"):
        vqrs.compress(small_rows, max_error=1e-6, method="scalar", dtype="int4")


# ---- methods -------------------------------------------------------------------------------------------------------


def test_every_kind_by_name(small_rows):
    for entry in vqrs.kinds():
        table = vqrs.compress(small_rows, method=entry["name"], random_state=0)
        assert table.kind == entry["name"]
        assert table.parameters == entry["parameters"]
        if entry["name"] == "deduplicating":  # these rows have no equals, and an estimate is its most
            assert table.nbytes <= vqrs.estimate(3000, 24, entry["name"])
            continue
        assert table.nbytes == vqrs.estimate(3000, 24, entry["name"])
        within = vqrs.compress(small_rows, method=entry["name"], ratio=3, random_state=0)
        assert (within.kind, within.ratio >= 3) == (entry["name"], True)


def test_what_a_method_leaves_open_is_chosen(small_rows):
    table = vqrs.compress(small_rows, method="product", n_bits=4, ratio=9, random_state=0)
    assert table.parameters["n_bits"] == 4
    more = vqrs.estimate(3000, 24, "product", n_bits=4, n_subvectors=table.parameters["n_subvectors"] + 2)
    assert more > float32_bytes(small_rows) / 9
    table = vqrs.compress(small_rows, method="scalar", dtype="int4", ratio=5, random_state=0)
    assert (table.parameters["dtype"], table.ratio >= 5) == ("int4", True)


def test_an_estimator_as_method(small_rows):
    quantizer = vqrs.ProductQuantizer(n_subvectors=6, n_bits=5, random_state=0)
    table = vqrs.compress(small_rows, method=quantizer)
    assert np.array_equal(
        table.codes, vqrs.compress(small_rows, method="product", n_subvectors=6, n_bits=5, random_state=0).codes
    )
    assert not hasattr(quantizer, "codebooks_")
    assert vqrs.estimate(3000, 24, quantizer) == table.nbytes == quantizer.estimate(3000, 24)
    with pytest.raises(ValueError, match="too few"):
        vqrs.compress(small_rows, method=quantizer, ratio=100)


def test_too_little_data_for_a_method_warns():
    with pytest.warns(UserWarning, match="kmeans: "):
        vqrs.compress(np.eye(4), method="kmeans", n_clusters=64)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "pass one of ratio=, nbytes= and max_error="),
        ({"ratio": 2, "nbytes": 100}, ValueError, "ratio and nbytes were given"),
        ({"ratio": 0}, ValueError, "ratio=0 must be a positive number"),
        ({"ratio": float("nan")}, ValueError, "ratio=nan"),
        ({"max_error": -1}, ValueError, "max_error=-1"),
        ({"nbytes": "64 parsecs"}, ValueError, "64 parsecs.*64MiB"),
        ({"nbytes": 0}, ValueError, "positive"),
        ({"nbytes": 1.5}, TypeError, "1.5"),
        ({"method": "zip"}, ValueError, "unknown method 'zip': expected one of .*product"),
        ({"method": "product", "n_clusters": 3}, ValueError, "no parameter 'n_clusters': it has .*n_subvectors"),
        ({"method": "product", "n_bits": 99}, ValueError, "n_bits"),
        ({"method": 3}, TypeError, "quantizer of vqrs, not 3"),
        ({"ratio": 2, "n_bits": 3}, TypeError, "'n_bits'.*method="),
        ({"ratio": 2, "sample_weight": np.ones(5)}, ValueError, "sample_weight"),
        ({"ratio": 2, "sample_weight": -np.ones(3000)}, ValueError, "weight"),
        ({"ratio": 1.5, "names": ["a"]}, ValueError, "name"),
        ({"ratio": 2, "n_jobs": 0}, ValueError, "n_jobs=0"),
        ({"ratio": 2, "random_state": "x"}, ValueError, "random_state='x'"),
    ],
    ids=str,
)
def test_wrong_arguments(small_rows, arguments, error, words):
    with pytest.raises(error, match=words):
        vqrs.compress(small_rows, **arguments)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.zeros(5), ValueError, "2D array"),
        (np.zeros((0, 4)), ValueError, "0 sample"),
        (np.full((3, 2), np.nan), ValueError, "NaN at row 0, column 0"),
        (np.array([[1, 2], [3, np.inf]]), ValueError, "infinity at row 1, column 1"),
        (np.array([["a"]]), ValueError, "text"),
        (iter([np.zeros((2, 2))]), TypeError, "estimator"),
    ],
    ids=["1d", "empty", "nan", "infinity", "text", "iterator"],
)
def test_wrong_rows(x, error, words):
    with pytest.raises(error, match=words):
        vqrs.compress(x, method="scalar")


# ---- containers and streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
def test_dtypes_and_strides(dtype):
    x = np.random.default_rng(0).integers(-100, 100, size=(20, 6)).astype(dtype)
    expected = vqrs.compress(x.astype(np.float32), method="scalar", dtype="float16")[...]
    assert np.array_equal(expected, x)
    for same in (x, np.asfortranarray(x), x[::-1][::-1], x.tolist(), memoryview(x)):
        assert np.array_equal(vqrs.compress(same, method="scalar", dtype="float16")[...], expected)


def test_torch_rows():
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    x = torch.arange(12.0).reshape(4, 3)
    for same in (x, x.half(), x.bfloat16(), x.T.contiguous().T, torch.nn.Parameter(x)):
        assert np.array_equal(vqrs.compress(same, method="scalar", dtype="float16")[...], x.numpy())


def test_frames():
    pandas = pytest.importorskip("pandas", reason="pandas is an optional dependency")
    x = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(vqrs.compress(pandas.DataFrame(x), method="scalar", dtype="float16")[...], x)


@pytest.fixture
def memory_map(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(30_000, 32)).astype(np.float32))
    return np.load(tmp_path / "rows.npy", mmap_mode="r")


def test_a_path_gives_the_same_bytes(memory_map, tmp_path):
    arguments = {"method": "product", "n_subvectors": 4, "random_state": 0, "metadata": {"a": "b"}}
    mapped = vqrs.compress(memory_map, path=tmp_path / "streamed", **arguments)
    assert (mapped.path, mapped.shape) == (str(tmp_path / "streamed"), (30_000, 32))
    vqrs.compress(np.array(memory_map), **arguments).save(tmp_path / "saved")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()


def test_streams_of_large_rows(memory_map, tmp_path, monkeypatch):
    """More rows than are fitted: a sample is, and the rest is streamed block by block."""
    monkeypatch.setattr("vqrs._search.FIT_ROWS", 5000)
    monkeypatch.setattr("vqrs._encode.BLOCK_BYTES", 1 << 18)
    streamed = vqrs.compress(memory_map, ratio=10, path=tmp_path / "streamed", random_state=0)
    vqrs.compress(np.array(memory_map), ratio=10, random_state=0).save(tmp_path / "saved")
    assert streamed.ratio >= 10
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()
    streamed.verify()
    assert vqrs.compress(memory_map, max_error=0.2, random_state=0).relative_error <= 0.2


def test_streams_of_blocks(memory_map, tmp_path):
    quantizer = vqrs.ProductQuantizer(n_subvectors=4, random_state=0).fit(memory_map[:4000])
    cuts = [0, 1, 7000, 7000, 29_999, 30_000]
    blocks = (memory_map[start:stop] for start, stop in itertools.pairwise(cuts))
    quantizer.compress(blocks, tmp_path / "streamed")
    quantizer.compress(np.array(memory_map)).save(tmp_path / "saved")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()


def test_nan_in_a_stream_leaves_nothing_behind(memory_map, tmp_path, monkeypatch):
    monkeypatch.setattr("vqrs._search.FIT_ROWS", 5000)
    x = np.array(memory_map)
    x[12_345, 3] = np.nan
    folder = tmp_path / "tables"
    folder.mkdir()
    with pytest.raises(ValueError, match="NaN at row 12345, column 3"):
        vqrs.compress(x, method="product", path=folder / "table", random_state=0)
    assert list(folder.iterdir()) == []


# ---- progress and interruption -------------------------------------------------------------------------------------


def test_progress(small_rows, capsys):
    calls = []
    vqrs.compress(small_rows, ratio=8, progress=lambda *call: calls.append(call), random_state=0)
    assert any("trying product" in stage for stage, _, _ in calls)
    assert all(0 <= done <= total for _, done, total in calls)
    vqrs.compress(small_rows, method="product", n_subvectors=4, progress=True, random_state=0)
    assert "vqrs.compress" in capsys.readouterr().out
    vqrs.compress(small_rows, method="scalar", random_state=0)
    assert capsys.readouterr().out == ""


def test_an_error_in_the_progress_function_comes_through(small_rows):
    def fail(stage, done, total):
        raise RuntimeError("from the progress function")

    with pytest.raises(RuntimeError, match="from the progress function"):
        vqrs.compress(small_rows, method="product", progress=fail)


INTERRUPTED = """
import signal, numpy as np, vqrs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
x = np.random.default_rng(0).normal(size=(100_000, 128)).astype(np.float32)
small = x[:1000]
quantizer = vqrs.ProductQuantizer(n_subvectors=8, n_bits=4, random_state=0).fit(small)
before = quantizer.transform(small)
print("ready", flush=True)
try:
    quantizer.set_params(n_bits=12, max_iter=100_000, tol=0).fit(x)
except KeyboardInterrupt:
    assert (quantizer.transform(small) == before).all()
    quantizer.set_params(n_bits=4, max_iter=25).fit(small)
    print("interrupted")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGINT to one process")
def test_interrupt():
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # into the fit, which would take hours
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n"
        assert process.returncode == 0


# ---- estimate ------------------------------------------------------------------------------------------------------


def test_estimate_is_exact(tmp_path):
    x = np.random.default_rng(0).normal(size=(500, 10)).astype(np.float32)
    for method, parameters in [
        ("product", {"n_subvectors": 3, "n_bits": 5}),
        ("residual", {"n_stages": 2, "n_bits": 3}),
        ("kmeans", {"n_clusters": 20}),
        *(("scalar", {"dtype": d, "granularity": g}) for d in ("int2", "int8", "float16") for g in ("row", "column")),
        ("scalar", {"dtype": "int4", "granularity": "block", "block_size": 3}),
    ]:
        n_bytes = vqrs.estimate(500, 10, method, **parameters)
        assert vqrs.compress(x, method=method, path=tmp_path / "t", random_state=0, **parameters).nbytes == n_bytes
        assert (tmp_path / "t").stat().st_size == n_bytes


def test_wrong_estimates():
    with pytest.raises(ValueError, match="unknown method"):
        vqrs.estimate(10, 10, "zip")
    with pytest.raises(ValueError, match="n_bits"):
        vqrs.estimate(10, 10, "product", n_bits=0)
    with pytest.raises(ValueError, match="at least one row and one feature"):
        vqrs.estimate(10, 0, "product")


# ---- a real table --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "effort", "largest_error"), [(8, "fast", 0.006), (16, "balanced", 0.062), (32, "fast", 0.25)]
)
def test_minilm_tokens(minilm_tokens, ratio, effort, largest_error):
    table = vqrs.compress(minilm_tokens, ratio=ratio, effort=effort, random_state=0)
    assert table.ratio >= ratio
    assert table.nbytes > 0.93 * float32_bytes(minilm_tokens) / ratio
    assert table.relative_error < largest_error
