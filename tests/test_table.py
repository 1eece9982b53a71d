"""What users do with a table."""

import json
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vqrs

INTEGER_TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.fixture(scope="module")
def decoded(small_table):
    return small_table.to_numpy()


@pytest.fixture
def table_file(small_table, tmp_path):
    path = tmp_path / "table.safetensors"
    small_table.save(path)
    return path


# ---- indexing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        5,
        -1,
        np.int16(7),
        np.array(7),
        slice(None),
        slice(10, 20),
        slice(20, 10),
        slice(-5, None),
        slice(100, 3, -7),
        slice(None, None, -1),
        slice(2995, 9999),
        slice(1, 1),
        [3, 1, 2],
        [],
        [[0, 1], [2, -3]],
        np.empty((2, 0, 3), np.int64),
        np.arange(24).reshape(2, 3, 4),
        np.arange(24)[::-2],
        np.arange(24).reshape(4, 6).T,
        range(4),
    ],
    ids=str,
)
def test_indexes_as_numpy_does(small_table, decoded, rows):
    taken = small_table[rows]
    wanted = decoded[np.array(rows, dtype=int) if isinstance(rows, (list, range)) else rows]
    assert taken.dtype == np.float32
    assert taken.shape == wanted.shape
    assert np.array_equal(taken, wanted)


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_ids_of_every_integer_type(small_table, decoded, dtype):
    ids = np.array([[0, 1, 127], [3, 3, 100]], dtype=dtype)
    assert np.array_equal(small_table[ids], decoded[ids])
    assert np.array_equal(small_table[ids[0, 2]], decoded[127])


def test_ids_that_an_int64_cannot_hold(small_table):
    with pytest.raises(IndexError, match="18446744073709551615 at position 0 is out of range for a table of 3000 rows"):
        small_table[np.array([2**64 - 1], dtype=np.uint64)]


def test_boolean_mask(small_table, decoded):
    mask = decoded[:, 0] > 0
    assert 0 < mask.sum() < len(mask)
    assert np.array_equal(small_table[mask], decoded[mask])
    assert np.array_equal(small_table[mask.tolist()], decoded[mask])
    assert small_table[np.zeros(3000, bool)].shape == (0, 24)


def test_ellipsis_and_iteration(small_table, decoded):
    assert np.array_equal(small_table[...], decoded)
    assert np.array_equal(np.stack(list(small_table)), decoded)


def test_torch_ids(small_table, decoded):
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    ids = torch.tensor([[1, 2], [-3, 4]])
    assert np.array_equal(small_table[ids], decoded[ids.numpy()])
    assert np.array_equal(small_table[ids.int()], decoded[ids.numpy()])
    out = torch.empty(2, 2, 24)
    assert small_table.lookup(ids, out=out) is out
    assert np.array_equal(out.numpy(), decoded[ids.numpy()])


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (3000, IndexError, "3000.*out of range for a table of 3000 rows"),
        (-3001, IndexError, "-3001.*out of range"),
        ([0, 9999], IndexError, "9999 at position 1"),
        (2**70, IndexError, "at position 0 is out of range.*integers"),
        ((1, 2), IndexError, r"table\[rows\]\[:, columns\]"),
        (None, IndexError, "None"),
        (True, IndexError, "mask"),
        (1.5, IndexError, "integers.*float64"),
        (np.array([1.0]), IndexError, "integers.*float64"),
        (np.ones(2, bool), IndexError, r"mask must have shape \(3000,\)"),
        (np.ones((3000, 24), bool), IndexError, r"mask must have shape \(3000,\)"),
        ("row", KeyError, "no row is named 'row'"),
        (["row 1", "x"], KeyError, "no row is named 'x'"),
    ],
    ids=str,
)
def test_wrong_indices(small_table, rows, error, words):
    with pytest.raises(error, match=words):
        small_table[rows]


@given(st.data())
def test_any_shape_of_ids(small_table, decoded, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    ids = data.draw(st.lists(st.integers(-3000, 2999), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    ids = np.array(ids, dtype=data.draw(st.sampled_from(["int16", "int32", "int64"]))).reshape(shape)
    assert np.array_equal(small_table.lookup(ids), decoded[ids])


def test_names(small_table, decoded):
    assert np.array_equal(small_table["row 17"], decoded[17])
    assert np.array_equal(small_table[["row 2", "row 1"]], decoded[[2, 1]])
    assert np.array_equal(small_table.lookup([["row 2"], ["row 1"]]), decoded[[[2], [1]]])
    assert small_table.names[:2] == ["row 0", "row 1"]
    assert small_table.metadata == {"source": "a test"}


def test_no_names():
    table = vqrs.compress(np.eye(4), method="scalar")
    assert table.names is None
    with pytest.raises(KeyError, match="rows have no names"):
        table["a"]


# ---- output arrays -------------------------------------------------------------------------------------------------


def test_lookup_into_out(small_table, decoded):
    out = np.full((2, 3, 24), np.nan, np.float32)
    ids = np.array([[1, 2, 3], [-1, 5, 0]])
    assert small_table.lookup(ids, out=out) is out
    assert np.array_equal(out, decoded[ids])
    part = np.full((5, 24), np.nan, np.float32)
    assert small_table.decode(10, 13, out=part[1:4]).base is not None
    assert np.array_equal(part[1:4], decoded[10:13])
    assert np.isnan(part[[0, 4]]).all()


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (np.empty((2, 24)), TypeError, "float64, expected float32"),
        (np.empty((3, 24), np.float32), ValueError, r"\(3, 24\), expected \(2, 24\)"),
        (np.empty((2, 48), np.float32)[:, ::2], ValueError, "C-contiguous"),
        (np.broadcast_to(np.float32(0), (2, 24)), ValueError, "writeable"),
    ],
)
def test_wrong_out(small_table, out, error, words):
    with pytest.raises(error, match=words):
        small_table.lookup([0, 1], out=out)


def test_wrong_out_of_ids_that_need_no_conversion(small_table):
    ids = np.array([0, 1])
    with pytest.raises(ValueError, match="contiguous"):
        small_table.lookup(ids, out=np.empty((24, 2), np.float32).T)
    frozen = np.empty((2, 24), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="share no memory"):
        small_table.lookup(ids, out=frozen)
    with pytest.raises(TypeError, match="list"):
        small_table.lookup(ids, out=[[0.0] * 24] * 2)
    with pytest.raises(TypeError, match="leave one of them out"):
        small_table.lookup(ids, out=np.empty((2, 24), np.float32), dtype="float16")
    with pytest.raises(TypeError, match="float64"):
        small_table.lookup(ids, dtype=np.float64)


@pytest.mark.parametrize("ids", [[3, -1, 0], np.array([[1, 2], [0, 5]], np.int32), np.array(7)])
def test_lookup_in_half_precision(small_table, decoded, ids):
    rows = decoded[np.asarray(ids)]
    assert np.array_equal(small_table.lookup(ids, dtype="float16"), rows.astype(np.float16))
    out = np.empty(rows.shape, np.float16)
    assert small_table.lookup(ids, out=out) is out
    assert np.array_equal(out, rows.astype(np.float16))
    assert np.array_equal(small_table.decode(2, 9, dtype=np.float16), decoded[2:9].astype(np.float16))
    pooled_half = small_table.pool([1, 2, 3], dtype="float16")
    assert np.array_equal(pooled_half, small_table.pool([1, 2, 3]).astype(np.float16))


def test_lookup_of_ids_in_any_layout(small_table, decoded):
    ids = np.arange(40)
    raw = np.zeros(8 * 5 + 1, np.uint8)
    unaligned = raw[1:].view(np.int64)
    unaligned[:] = ids[:5]
    for some in (ids[::3], ids[::-1], ids.reshape(8, 5).T, ids.astype(">i8"), ids.astype(np.uint16), unaligned):
        assert np.array_equal(small_table.lookup(some), decoded[np.asarray(some).astype(int)])


# ---- pool ----------------------------------------------------------------------------------------------------------


def pooled(rows, ids, offsets, weights, mode):
    ends = [*offsets[1:], len(ids)]
    bags = []
    for start, end in zip(offsets, ends, strict=True):
        bag = rows[ids[start:end]].astype(np.float64)
        if weights is not None:
            bag = bag * weights[start:end, None]
        bags.append(np.zeros(rows.shape[1]) if end == start else getattr(np, mode)(bag, axis=0))
    return np.array(bags)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_pool(small_table, decoded, mode):
    ids = np.random.default_rng(1).integers(-3000, 3000, 50)
    offsets = np.array([0, 0, 7, 30, 30, 49, 50])
    result = small_table.pool(ids, offsets, mode=mode)
    assert result.shape == (7, 24)
    assert np.allclose(result, pooled(decoded, ids, offsets, None, mode), atol=1e-4)
    out = np.empty((7, 24), np.float32)
    assert small_table.pool(ids.astype(np.int32), offsets.tolist(), mode=mode, out=out) is out
    assert np.array_equal(out, result)


def test_pool_with_weights(small_table, decoded):
    generator = np.random.default_rng(2)
    ids, weights = generator.integers(0, 3000, 20), generator.normal(size=20)
    expected = pooled(decoded, ids, np.array([0, 8]), weights, "sum")
    assert np.allclose(small_table.pool(ids, [0, 8], weights), expected, atol=1e-4)


def test_pool_of_two_dimensions(small_table, decoded):
    ids = np.random.default_rng(3).integers(0, 3000, (6, 4))
    assert np.allclose(small_table.pool(ids), decoded[ids].sum(axis=1), atol=1e-4)
    weights = np.random.default_rng(4).normal(size=(6, 4)).astype(np.float32)
    assert np.allclose(small_table.pool(ids, weights=weights), (decoded[ids] * weights[..., None]).sum(1), atol=1e-4)
    assert np.array_equal(small_table.pool(np.empty((3, 0), int)), np.zeros((3, 24)))


def test_pool_of_one_bag_and_names(small_table, decoded):
    assert np.allclose(
        small_table.pool([1, 2, 3], mode="mean"), decoded[[1, 2, 3]].mean(axis=0, keepdims=True), atol=1e-5
    )
    assert np.array_equal(small_table.pool(["row 1"], [0]), decoded[[1]])


def test_pool_include_last_offset(small_table):
    ids = [5, 6, 7, 8]
    expected = small_table.pool(ids, [0, 3])
    assert np.array_equal(small_table.pool(ids, [0, 3, 4], include_last_offset=True), expected)
    with pytest.raises(ValueError, match="last offset must be 4"):
        small_table.pool(ids, [0, 3], include_last_offset=True)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ids": [1, 2], "offsets": [1]}, ValueError, "offset"),
        ({"ids": [1, 2], "offsets": [0, 2, 1]}, ValueError, "offset"),
        ({"ids": [1, 2], "offsets": [0, 3]}, ValueError, "offset"),
        ({"ids": [1, 2], "offsets": [0.0]}, ValueError, "integers"),
        ({"ids": [1, 2], "offsets": [[0]]}, ValueError, "one dimension"),
        ({"ids": [[1, 2]], "offsets": [0]}, ValueError, "each of their rows is a bag"),
        ({"ids": [[[1]]]}, ValueError, "one or two dimensions, not 3"),
        ({"ids": [1, 2], "weights": [1.0]}, ValueError, r"\(1,\), expected \(2,\)"),
        ({"ids": [1, 2], "mode": "median"}, ValueError, "median"),
        ({"ids": [1, 3000]}, IndexError, "3000"),
        ({"ids": [1, 2], "out": np.empty((2, 24), np.float32)}, ValueError, r"expected \(1, 24\)"),
    ],
    ids=str,
)
def test_wrong_pools(small_table, arguments, error, words):
    with pytest.raises(error, match=words):
        small_table.pool(**arguments)


# ---- search --------------------------------------------------------------------------------------------------------


def scores(rows, queries, metric):
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    if metric == "l2":
        return ((queries[:, None] - rows) ** 2).sum(axis=2)
    products = queries @ rows.T
    return (
        products
        if metric == "inner_product"
        else products / np.linalg.norm(rows, axis=1) / np.linalg.norm(queries, axis=1, keepdims=True)
    )


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_search(small_table, small_rows, decoded, metric):
    queries = small_rows[:4].astype(np.float64)
    distances, ids = small_table.search(queries, k=7, metric=metric)
    assert distances.shape == ids.shape == (4, 7)
    assert (distances.dtype, ids.dtype) == (np.float32, np.int64)
    expected = scores(decoded, queries, metric)
    best = np.sort(expected, axis=1)
    best = best[:, :7] if metric == "l2" else best[:, :-8:-1]
    assert np.allclose(distances, best, rtol=1e-4, atol=1e-4)
    assert np.allclose(np.take_along_axis(expected, ids, 1), distances, rtol=1e-4, atol=1e-4)


def test_search_of_one_query(small_table, small_rows):
    distances, ids = small_table.search(small_rows[:1], k=3)
    of_one = small_table.search(small_rows[0], k=3)
    assert of_one[0].shape == of_one[1].shape == (3,)
    assert np.array_equal(of_one[0], distances[0])
    assert np.array_equal(of_one[1], ids[0])
    assert small_table.search(small_rows[0], k=9999)[1].shape == (3000,)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"queries": np.zeros((2, 23))}, ValueError, "23.*24"),
        ({"queries": np.zeros((1, 1, 24))}, ValueError, "2D"),
        ({"queries": np.full((1, 24), np.nan)}, ValueError, "NaN"),
        ({"queries": np.zeros((1, 24)), "k": 0}, ValueError, "k"),
        ({"queries": np.zeros((1, 24)), "k": 2.5}, TypeError, "integer"),
        ({"queries": np.zeros((1, 24)), "metric": "hamming"}, ValueError, "hamming"),
    ],
    ids=str,
)
def test_wrong_searches(small_table, arguments, error, words):
    with pytest.raises(error, match=words):
        small_table.search(**arguments)


# ---- as an array ---------------------------------------------------------------------------------------------------


def test_is_like_an_array(small_table, decoded):
    assert (small_table.shape, small_table.ndim, small_table.size, len(small_table)) == ((3000, 24), 2, 72000, 3000)
    assert small_table.dtype == np.float32
    assert np.array_equal(np.asarray(small_table), decoded)
    assert np.asarray(small_table, dtype=np.float16).dtype == np.float16
    assert np.allclose(np.mean(small_table, axis=0), decoded.mean(axis=0))
    with pytest.raises(ValueError, match="copy=False"):
        np.array(small_table, copy=False)


def test_bytes_are_those_of_the_file(small_table, table_file):
    assert small_table.nbytes == os.path.getsize(table_file)
    assert small_table.ratio == 4 * 3000 * 24 / small_table.nbytes


def test_info(small_table, small_rows, decoded, table_file):
    info = small_table.info()
    assert json.loads(json.dumps(info)) == info
    assert (info["kind"], info["path"], info["nbytes"]) == ("product", None, small_table.nbytes)
    assert small_table.parameters["n_subvectors"] == 6
    relative = ((small_rows - decoded) ** 2).sum() / (small_rows**2).sum()
    assert info["errors"]["relative"] == small_table.relative_error == pytest.approx(relative, rel=1e-4)
    centred = ((small_rows - decoded) ** 2).sum() / ((small_rows - small_rows.mean(axis=0)) ** 2).sum()
    assert info["errors"]["centred"] == pytest.approx(centred, rel=1e-4)
    bound = info["errors"]["gaussian_bound"]
    assert 0 < bound < relative
    assert info["errors"]["above_bound_db"] == pytest.approx(10 * np.log10(relative / bound), rel=1e-4)
    assert info["bits_per_value"] == pytest.approx(32 / small_table.ratio)
    with vqrs.open(table_file) as opened:
        assert opened.info() == info | {"path": str(table_file)}


def test_weighted_error(small_rows):
    weights = np.random.default_rng(5).uniform(size=3000)
    table = vqrs.compress(small_rows, method="scalar", dtype="int2", sample_weight=weights)
    squares = ((small_rows - table.to_numpy()) ** 2).sum(axis=1)
    weighted = (weights * squares).sum() / (weights * (small_rows**2).sum(axis=1)).sum()
    assert table.info()["errors"]["weighted"] == pytest.approx(weighted, rel=1e-4)


def test_prints(small_table, table_file):
    text = repr(small_table)
    for part in ["(3000, 24)", "product", "281.2 KiB -> ", f"ratio={small_table.ratio:.2f}", "relative_error=0."]:
        assert part in text
    above = small_table.info()["errors"]["above_bound_db"]
    assert f"({above:+.2f} dB)" in text
    assert "<td" in small_table._repr_html_()
    assert f"({above:+.2f} dB)" in small_table._repr_html_()
    table = vqrs.open(table_file)
    assert str(table_file) in repr(table)
    table.close()
    assert repr(table) == "Table(closed)"
    assert "closed" in table._repr_html_()


def test_html_escapes_the_path(small_table, tmp_path):
    path = tmp_path / "<b>&.safetensors"
    small_table.save(path)
    assert "&lt;b&gt;&amp;" in vqrs.open(path)._repr_html_()


# ---- keeping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["header", "lazy", "full"])
@pytest.mark.parametrize("mode", ["mmap", "read"])
@pytest.mark.parametrize("of_type", [str, pathlib.Path, os.fsencode])
def test_open(small_table, decoded, table_file, verify, mode, of_type):
    with vqrs.open(of_type(table_file), verify=verify, mode=mode) as table:
        assert np.array_equal(table[...], decoded)
        assert (table.names, table.metadata, table.kind) == (small_table.names, small_table.metadata, "product")
        table.verify()


def test_saving_what_was_opened_gives_the_same_bytes(table_file, tmp_path):
    other = tmp_path / "other.safetensors"
    with vqrs.open(table_file) as table:
        assert table.save(other, durable=False) == table.nbytes
        table.save(table_file)
        assert len(table[:]) == 3000
    assert other.read_bytes() == table_file.read_bytes()


def test_wrong_opens(tmp_path, table_file):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        vqrs.open(tmp_path / "nothing-here")
    with pytest.raises(ValueError, match="never"):
        vqrs.open(table_file, verify="never")
    with pytest.raises(ValueError, match="write"):
        vqrs.open(table_file, mode="write")
    (tmp_path / "text").write_text("no table")
    with pytest.raises(vqrs.TableCorruptError, match="text"):
        vqrs.open(tmp_path / "text")
    with pytest.raises(OSError, match="no-folder"):
        vqrs.open(table_file).save(tmp_path / "no-folder" / "table")


def test_damage_is_found(tmp_path):
    path = tmp_path / "table.safetensors"
    vqrs.compress(np.random.default_rng(0).normal(size=(20_000, 8)), method="scalar", path=path)
    damaged = bytearray(path.read_bytes())
    damaged[100_000] ^= 1
    path.write_bytes(damaged)
    with vqrs.open(path) as table, pytest.raises(vqrs.TableCorruptError, match=r"table\.safetensors"):
        table.verify()
    with pytest.raises(vqrs.TableError):
        vqrs.open(path, verify="full")
    assert issubclass(vqrs.TableError, ValueError)


@pytest.mark.parametrize(
    "use",
    [
        lambda table: table[0],
        lambda table: table[1:3],
        lambda table: table.lookup([1]),
        lambda table: table.pool([1]),
        lambda table: table.search(np.zeros(24)),
        lambda table: table.decode(),
        lambda table: table.verify(),
        lambda table: table.codes,
        lambda table: table.save("never-written"),
    ],
)
def test_a_closed_table_says_so(table_file, use):
    table = vqrs.open(table_file)
    table.close()
    table.close()
    with pytest.raises(ValueError, match=r"closed.*vqrs\.open"):
        use(table)


def test_codes_outlive_the_table(small_table, table_file):
    table = vqrs.open(table_file)
    codes = table.codes
    table.close()
    assert np.array_equal(codes, small_table.codes)


def test_pickle_in_memory(small_table, decoded):
    copy = pickle.loads(pickle.dumps(small_table))
    assert np.array_equal(copy[...], decoded)
    assert copy.info() == small_table.info()
    assert copy.names == small_table.names


def test_pickle_by_path(table_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(vqrs.open(table_file.name))
    assert len(data) < 1000
    monkeypatch.chdir("/")
    assert pickle.loads(data).shape == (3000, 24)


def first_row(table):
    return table[0]


def test_spawned_worker(table_file, decoded):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(first_row, (vqrs.open(table_file),)), decoded[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_forked_child_looks_up_and_compresses(small_table, small_rows, decoded):
    small_table.decode(n_jobs=2)  # the parent's threads exist, the child's do not

    def work(queue):
        table = vqrs.compress(small_rows, method="product", n_subvectors=2, n_bits=4, random_state=0)
        queue.put((np.array_equal(small_table.decode(n_jobs=2), decoded), table.nbytes))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    same, n_bytes = queue.get(timeout=120)
    child.join(timeout=120)
    assert same
    assert n_bytes == vqrs.estimate(3000, 24, "product", n_subvectors=2, n_bits=4)
    assert child.exitcode == 0


SHARER = """
import sys, vqrs
table = vqrs.open(sys.argv[1])
table.decode()
with open("/proc/self/smaps") as maps:
    lines = maps.read().splitlines()
inside, private, shared = False, 0, 0
for line in lines:
    if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
        inside = line.endswith(sys.argv[1])
    elif inside and line.startswith(("Private_Dirty", "Shared_Clean")):
        kibibytes = int(line.split()[1])
        private, shared = (private + kibibytes, shared) if line[0] == "P" else (private, shared + kibibytes)
print(private, shared, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_processes_share_the_file(tmp_path):
    path = tmp_path / "shared.safetensors"
    x = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    n_bytes = vqrs.compress(x, method="scalar", path=path).nbytes
    program = [sys.executable, "-c", SHARER, str(path)]
    # The first holds its mapping while the second looks at how its own pages are held.
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline()
        second = subprocess.run(program, input="", capture_output=True, text=True, check=True)
    private, shared = map(int, second.stdout.split())
    assert private == 0
    assert shared * 1024 > 0.9 * n_bytes


def test_saving_a_damaged_table_again_is_refused(small_rows, tmp_path):
    path = tmp_path / "table.safetensors"
    vqrs.compress(small_rows, method="product", random_state=0).save(path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(vqrs.TableCorruptError, match="checksum"):
        vqrs.open(path).save(tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_save_follows_links_and_refuses_what_is_no_file(small_rows, tmp_path):
    table = vqrs.compress(small_rows, method="scalar")
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    target.write_bytes(b"old")
    link.symlink_to(target)
    table.save(link)
    assert link.is_symlink()
    assert vqrs.open(target).shape == table.shape
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        table.save(tmp_path / "pipe")


def test_a_copy_in_another_process_checks_as_much(small_rows, tmp_path):
    path = tmp_path / "table.safetensors"
    vqrs.compress(small_rows, method="product", random_state=0).save(path)
    content = bytearray(path.read_bytes())
    content[4096] ^= 1
    path.write_bytes(content)
    with pytest.raises(vqrs.TableCorruptError):
        pickle.loads(pickle.dumps(vqrs.open(path, verify="lazy")))[0]


def test_cosine_of_tiny_rows_is_exact(small_rows):
    table = vqrs.compress(small_rows, method="scalar", dtype="int8")
    tiny = vqrs.compress(small_rows * np.float32(2.0**-80), method="scalar", dtype="int8")
    wanted = table.search(small_rows[:3], k=4, metric="cosine")
    found = tiny.search(small_rows[:3] * np.float32(2.0**-60), k=4, metric="cosine")
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)


def test_sizes_that_no_machine_holds_are_refused():
    with pytest.raises(ValueError, match="too large"):
        vqrs.estimate(10, 4096, "residual", n_stages=4096, n_bits=16)
    with pytest.raises(ValueError, match=r"2\^48 rows"):
        vqrs.estimate(2**62, 2**40)


def test_what_replaces_a_file_keeps_its_permissions(small_table, tmp_path):
    path = tmp_path / "table"
    small_table.save(path)
    path.chmod(0o640)
    before = path.stat().st_mode
    small_table.save(path)
    assert path.stat().st_mode == before


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(IsADirectoryError):
        vqrs.open(tmp_path)


@pytest.mark.parametrize("shape", [(0, 2**58), (2**58, 0), (1,) * 64])
def test_shapes_that_numpy_refuses(small_table, shape):
    with pytest.raises(ValueError, match=r"too big|maximum supported dimension"):
        small_table.lookup(np.zeros(shape, np.int64))


def test_a_pickle_does_not_take_another_table(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 8), dtype="f4")
    path = tmp_path / "rows.safetensors"
    vqrs.compress(x, method="scalar").save(path)
    table = vqrs.open(path)
    text = pickle.dumps(table)
    np.testing.assert_array_equal(pickle.loads(text).to_numpy(), table.to_numpy())
    vqrs.compress(2 * x + 1, method="scalar").save(path)
    with pytest.raises(vqrs.TableError, match="another table stands there now"):
        pickle.loads(text)


# ---- ids that numpy has no integer type for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "position"),
    [
        (np.ma.array([1, 2, 3], mask=[0, 1, 0]), 1),
        ([0, 1.0, 2], 1),
        ([0, 1, 2**70], 2),
        ([0, -(10**5000)], 1),
        (np.array([1, 2**63, 2**64 - 1], np.uint64), 1),
        ([0, None], 1),
        ([[0, 1], [2]], 1),
        (["row 1", 2], 1),
        (np.array([1, True], object), 1),
        ((row for row in range(3)), 0),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("read", ["lookup", "pool", "__getitem__"])
def test_the_first_bad_position_is_named(small_table, ids, position, read):
    with pytest.raises(IndexError, match=rf"position {position}\b"):
        getattr(small_table, read)(ids)


def test_names_in_arrays_of_objects(small_table, decoded):
    assert np.array_equal(small_table[np.array(["row 1", "row 2"], object)], decoded[1:3])
    with pytest.raises(KeyError, match="'x', at position 1"):
        small_table[["row 1", "x"]]


def test_masked_ids_without_a_mask_are_ids(small_table, decoded):
    assert np.array_equal(small_table[np.ma.array([1, 2])], decoded[1:3])


def test_numbers_beyond_64_bits_stand_for_all(small_table, decoded):
    assert np.array_equal(small_table[:: 2**70], decoded[:1])
    assert np.array_equal(small_table[:: -(2**70)], decoded[-1:])
    assert small_table.search(decoded[:2], k=2**70)[1].shape == (2, 3000)
    with pytest.raises(ValueError, match="k="):
        small_table.search(decoded[:2], k=-(2**70))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"offsets": [0, 5, 3]}, "3 at position 2, after 5"),
        ({"offsets": [0, 9]}, "9 at position 1"),
        ({"offsets": [1]}, "1 at position 0"),
        ({"offsets": [0, 1.5]}, "position 1 holds 1.5"),
        ({"offsets": np.array([0, 2**63], np.uint64)}, "position 1"),
        ({"weights": [1.0, 1.0, 1e300, 1, 1, 1, 1]}, r"1e\+300 at position 2"),
    ],
    ids=str,
)
def test_the_first_bad_offset_or_weight_is_named(small_table, arguments, words):
    with pytest.raises(ValueError, match=words):
        small_table.pool(np.arange(7), **arguments)


def test_a_mapping_that_holds_itself_is_refused(small_rows):
    endless: dict = {}
    endless["a"] = endless
    with pytest.raises(ValueError, match="64 deep"):
        vqrs.compress(small_rows, method="scalar", metadata=endless)
    with pytest.raises(ValueError, match="64 deep"):
        vqrs.compress(small_rows, method="scalar", residual={"kind": "scalar", "parameters": endless})
