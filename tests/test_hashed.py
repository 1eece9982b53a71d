"""Forms "hashed" and "switch": rows computed from their numbers, judged by the plain NumPy version; hostile headers."""

import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vqrs
from vqrs import _core, reference

DTYPES = ("float32", "float16", "bfloat16", "int8", "uint8")
NONE = np.empty((0, 0), np.uint8)


def table_of(description, tensors, codes, **more) -> vqrs.Table:
    about = json.dumps({"kind": "test", "parameters": {}, "decoder": description})
    return vqrs.Table(_core.Table.from_parts(about, tensors, codes, errors={"relative": 0.0}, **more))


def array(rng, size, dtype="float32"):
    values = rng.normal(size=size).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if dtype in ("int8", "uint8"):
        return rng.integers(0, 256, size=size).astype(dtype)
    return values.astype(dtype)


def random_place(rng, bits, size):
    kind = rng.choice(["hash", "digit", "stored"] if bits else ["hash", "digit"])
    if kind == "hash":
        return {"kind": "hash", "seed": int(rng.integers(2**64, dtype=np.uint64)), "size": size}
    if kind == "digit":
        return {"kind": "digit", "divisor": int(rng.integers(1, 9)), "size": size}
    return {"kind": "stored", "field": int(rng.integers(3)), "size": size}


def random_hashed(rng, rows, dim, stored=True):
    """A part of terms that cover the row, some of them twice, with overlapping, far and repeated pieces."""
    bits = int(rng.choice([0, 1, 5, 8, 16, 25, 32])) if stored else 0
    dtypes = [str(rng.choice(DTYPES)) for _ in range(3)]
    lengths = [0, 0, 0]

    def piece(width):
        number, size = int(rng.integers(3)), int(rng.integers(1, 12))
        stride, offset = int(rng.choice([0, 1, width, width + 1])), int(rng.integers(5))
        lengths[number] = max(lengths[number], offset + (size - 1) * stride + width)
        return {"array": number, "place": random_place(rng, bits, size), "stride": stride, "offset": offset}

    cut = int(rng.integers(1, dim + 1))
    columns = [(0, cut)] + ([(cut, dim - cut)] if cut < dim else [])
    columns += [(start := int(rng.integers(dim)), int(rng.integers(1, dim - start + 1))) for _ in range(2)]
    terms = []
    for at, (start, width) in enumerate(columns):
        term = {"start": start, "width": width, "piece": piece(width)}
        if rng.integers(2):
            term["sign"] = int(rng.integers(2**64, dtype=np.uint64))
        if rng.integers(2):
            term["weight"] = piece(1)
        if at >= len(columns) - 2 and rng.integers(2):
            term["multiply"] = True
        terms.append(term)
    first = [0, 7, 2**63, 2**64 - 3][rng.integers(4)]
    description = {"form": "hashed", "dim": dim, "bits": bits, "first": first, "terms": terms}
    tensors = {
        f"arrays.{n}": array(rng, max(length, 1), d) for n, (length, d) in enumerate(zip(lengths, dtypes, strict=True))
    }
    codes = rng.integers(0, 256, size=(rows, reference.row_bytes(description))).astype(np.uint8)
    return description, tensors, codes


def random_levels(rng, rows, dim):
    codes = rng.normal(size=(rows, dim)).astype(np.float16).view(np.uint8)
    return (
        {
            "form": "levels",
            "dim": dim,
            "dtype": "float16",
            "granularity": "row",
            "block_size": 64,
            "symmetric": False,
            "scale_factor": 1.0,
            "offset_factor": 1.0,
        },
        {},
        codes,
    )


def random_linear(rng, rows, dim):
    inner, tensors, codes = random_hashed(rng, rows, 3, stored=False)
    description = {
        "form": "linear",
        "dim": dim,
        "mean": True,
        "rotation": {"kind": "matrix", "dtype": "float32"},
        "inner": inner,
    }
    tensors = {f"inner.{name}": value for name, value in tensors.items()}
    own = {"mean": array(rng, dim), "rotation": array(rng, 3 * dim).reshape(3, dim)}
    return description, tensors | own, codes


def random_join(rng, rows, dim, mode="sum"):
    parts = [random_levels(rng, rows, dim), random_hashed(rng, rows, dim, stored=False), random_levels(rng, rows, dim)]
    description = {"form": "join", "dim": dim, "mode": mode, "parts": [part[0] for part in parts]}
    if mode == "columns":
        description["dim"] = 3 * dim
    tensors = {f"parts.{n}.{name}": value for n, part in enumerate(parts) for name, value in part[1].items()}
    return description, tensors, np.hstack([part[2] for part in parts])


def random_switch(rng, rows, dim, makers):
    cases, tensors = [], {}
    for number, make in enumerate(makers):
        start, stop = sorted(int(n) for n in rng.integers(0, rows + 3, size=2))
        ids = (
            np.flatnonzero(rng.random(rows) < rng.choice([0.1, 0.5])) if rng.integers(2) else np.arange(start, stop + 1)
        )
        if len(ids) == 0:
            ids = np.array([int(rng.integers(rows))])
        inner, held, codes = make(rng, len(ids), dim)
        case = {"rows": len(ids), "decoder": inner}
        if len(ids) == ids[-1] - ids[0] + 1:
            case["start"] = int(ids[0])
        else:
            case["bits"] = int(rng.choice([12, 25, 32]))
            tensors[f"cases.{number}.ids"] = reference.pack_bits(ids[None], case["bits"])[0]
        tensors |= {f"cases.{number}.decoder.{name}": value for name, value in held.items()}
        if codes.shape[1]:
            tensors[f"cases.{number}.codes"] = codes
        cases.append(case)
    description = {"form": "switch", "dim": dim, "cases": cases, "otherwise": None, "shared": {}}
    codes = np.empty((rows, 0), np.uint8)
    if rng.integers(2):
        description["otherwise"], held, codes = [random_hashed, random_levels][rng.integers(2)](rng, rows, dim)
        tensors |= {f"otherwise.{name}": value for name, value in held.items()}
    return description, tensors, codes


def cases_of_anything(rng, rows, dim):
    nested = lambda rng, rows, dim: random_switch(rng, rows, dim, [random_levels])  # noqa: E731
    makers = [random_hashed, random_levels, random_linear, random_join, nested]
    return random_switch(rng, rows, dim, [makers[n] for n in rng.integers(0, len(makers), size=3)])


PARTS = {
    "hashed": random_hashed,
    "switch": cases_of_anything,
    "linear": random_linear,
    "join": random_join,
    "columns": lambda rng, rows, dim: random_join(rng, rows, dim, "columns"),
}


def assert_same_bits(found, expected):
    assert found.tobytes() == np.ascontiguousarray(expected, dtype=np.float32).tobytes()


@pytest.mark.parametrize("kind", PARTS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 150), dim=st.integers(1, 19))
def test_lookups_are_the_reference(kind, seed, rows, dim):
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        description, tensors, codes = PARTS[kind](rng, rows, dim)
        table = table_of(description, tensors, codes)
        expected = reference.decode(description, tensors, codes)
    assert_same_bits(table[...], expected)
    ids = rng.integers(0, rows, size=200)
    assert_same_bits(table[ids], expected[ids])
    assert_same_bits(table.lookup(ids.astype(np.int32)), expected[ids])
    with np.errstate(over="ignore"):
        assert np.array_equal(table.lookup(ids, dtype="float16"), expected[ids].astype(np.float16))
    sums = table.pool(ids, [0, 10, 10])
    # Of 190 numbers, each rounded once.
    rounding = 190 * np.finfo(np.float32).eps * np.abs(expected[ids]).sum(axis=0).max()
    np.testing.assert_allclose(sums, reference.pool(expected[ids], [0, 10, 10]), rtol=1e-6, atol=rounding)


@pytest.mark.parametrize("kind", PARTS)
def test_files_keep_everything(kind, tmp_path):
    description, tensors, codes = PARTS[kind](np.random.default_rng(3), 100, 7)
    table = table_of(description, tensors, codes, names=[f"row {n}" for n in range(100)])
    n_bytes = table.save(tmp_path / "a.safetensors")
    assert n_bytes == table.nbytes == (tmp_path / "a.safetensors").stat().st_size
    for verify, mode in itertools.product(("header", "lazy", "full"), ("mmap", "read")):
        with vqrs.open(tmp_path / "a.safetensors", verify=verify, mode=mode) as opened:
            assert_same_bits(opened[...], table[...])
            assert_same_bits(opened["row 3"], table[3])
            assert opened.info()["decoder"] == table.info()["decoder"]
            opened.verify()
            opened.save(tmp_path / "b.safetensors")
            again = pickle.loads(pickle.dumps(opened))
            assert_same_bits(again[...], table[...])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_same_bits(pickle.loads(pickle.dumps(table))[...], table[...])


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_search_finds_what_the_reference_finds(kind, metric):
    description, tensors, codes = PARTS[kind](np.random.default_rng(5), 120, 6)
    table = table_of(description, tensors, codes)
    query = np.random.default_rng(0).normal(size=(2, table.shape[1])).astype(np.float32)
    found, _ = table.search(query, 5, metric)
    np.testing.assert_allclose(found, reference.search(query, table[...], 5, metric)[0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["hashed", "switch", "linear", "join"])
def test_tensors_can_be_replaced(kind):
    description, tensors, codes = PARTS[kind](np.random.default_rng(11), 60, 5)
    table = table_of(description, tensors, codes)
    doubled = {name: value * 2 if value.dtype in (np.float32, np.float16) else value for name, value in tensors.items()}
    changed = vqrs.Table(table._core.with_tensors(doubled))
    assert_same_bits(changed[...], reference.decode(changed.info()["decoder"], changed._core.tensors(), codes))
    assert_same_bits(changed[...], reference.decode(description, doubled, codes))


def test_threads_give_the_same_bits():
    description, tensors, codes = PARTS["switch"](np.random.default_rng(1), 5000, 40)
    table = table_of(description, tensors, codes)
    ids = np.random.default_rng(2).integers(0, 5000, size=40_000)
    assert_same_bits(table.lookup(ids, n_jobs=2), table.lookup(ids, n_jobs=1))


def test_shared_tensors_are_stored_once():
    rng = np.random.default_rng(0)
    inner, tensors, _ = random_hashed(rng, 10, 4, stored=False)
    other, held, _ = random_hashed(rng, 30, 4, stored=False)
    description = {
        "form": "switch",
        "dim": 4,
        "otherwise": other,
        "shared": {"otherwise.arrays.0": "cases.0.decoder.arrays.0"},
        "cases": [{"start": 5, "rows": 10, "decoder": inner}],
    }
    large = max(tensors["arrays.0"], held["arrays.0"], key=len)
    given = {f"cases.0.decoder.{name}": value for name, value in (tensors | {"arrays.0": large}).items()}
    given |= {f"otherwise.{name}": value for name, value in held.items() if name != "arrays.0"}
    codes = np.empty((30, 0), np.uint8)
    table = table_of(description, given, codes)
    assert table._core.tensors().keys() == given.keys()
    assert_same_bits(table[...], reference.decode(description, given, codes))
    again = pickle.loads(pickle.dumps(table))
    assert_same_bits(again[...], table[...])
    for shared in ({"otherwise.arrays.0": "nothing"}, {"cases.0.decoder.arrays.1": "cases.0.decoder.arrays.0"}):
        with pytest.raises(ValueError, match="tensors that are there"):
            table_of(description | {"shared": shared}, given, codes)


def test_a_hundred_million_rows_take_no_bytes(tmp_path):
    weight = array(np.random.default_rng(0), 1000 * 100).reshape(1000, 100)
    piece = {"array": 0, "place": {"kind": "hash", "seed": 1, "size": 1000}, "stride": 100, "offset": 0}
    description = {
        "form": "hashed",
        "dim": 100,
        "bits": 0,
        "first": 0,
        "terms": [{"start": 0, "width": 100, "piece": piece}],
    }
    table = table_of(description, {"arrays.0": weight}, np.empty((10**8, 0), np.uint8))
    assert table.save(tmp_path / "t.safetensors") < weight.nbytes + 10_000
    with vqrs.open(tmp_path / "t.safetensors", verify="full") as opened:
        assert opened.shape == (10**8, 100)
        ids = np.array([0, 12_345_678, 10**8 - 1])
        places = (reference.hash_bits(ids, 1).astype(object) * 1000) >> 64
        assert_same_bits(opened[ids], weight[places.astype(int)])
        with pytest.raises(IndexError):
            opened[10**8]


@pytest.mark.parametrize("spread", [2**10, 2**20, 2**32 - 1])
def test_lists_find_their_ids_and_no_others(spread):
    """Ids close together and far apart, up to the last of 32 bits."""
    rng = np.random.default_rng(0)
    ids = np.unique(np.concatenate([rng.integers(0, spread, 700), rng.integers(0, 2**32 - 1, 3), [2**32 - 2]]))
    weight = (np.arange(len(ids)) + 1).astype(np.float32)
    piece = {"array": 0, "place": {"kind": "digit", "divisor": 1, "size": len(ids)}, "stride": 1, "offset": 0}
    inner = {"form": "hashed", "dim": 1, "bits": 0, "first": 0, "terms": [{"start": 0, "width": 1, "piece": piece}]}
    case = {"bits": 32, "rows": len(ids), "decoder": inner}
    description = {"form": "switch", "dim": 1, "cases": [case], "otherwise": None, "shared": {}}
    tensors = {"cases.0.ids": ids.astype("<u4").view(np.uint8), "cases.0.decoder.arrays.0": weight}
    table = table_of(description, tensors, np.empty((2**32 - 1, 0), np.uint8))
    assert np.array_equal(table[ids][:, 0], weight)
    near = np.unique(np.concatenate([ids - 1, ids + 1, rng.integers(0, 2**32 - 1, 1000)]))
    others = np.setdiff1d(near[(near >= 0) & (near < 2**32 - 1)], ids)
    assert not table[others].any()


# ---- what is refused -------------------------------------------------------------------------------------------------


def small_hashed():
    piece = {"array": 0, "place": {"kind": "digit", "divisor": 1, "size": 4}, "stride": 3, "offset": 0}
    weight = {"array": 1, "place": {"kind": "stored", "field": 0, "size": 2}, "stride": 1, "offset": 0}
    terms = [{"start": 0, "width": 3, "piece": piece, "weight": weight}]
    tensors = {"arrays.0": np.ones((4, 3), np.float32), "arrays.1": np.ones(2, np.float32)}
    return {"form": "hashed", "dim": 3, "bits": 2, "first": 0, "terms": terms}, tensors, np.zeros((5, 1), np.uint8)


def change(path, value):
    def apply(description):
        *way, last = path
        for step in way:
            description = description[step]
        description[last] = value

    return apply


TERM = ("terms", 0)
HASH = {"kind": "hash", "seed": 1, "size": 2**31 + 1}
HOSTILE = {
    "no columns": change(["dim"], 0),
    "more columns than terms": change(["dim"], 4),
    "too many columns": change(["dim"], 2**40),
    "no terms": change(["terms"], []),
    "too many bits": change(["bits"], 33),
    "no bits": change(["bits"], 0),
    "negative id": change(["first"], -1),
    "id beyond 64 bits": change(["first"], 2**64),
    "unknown key": change(["colour"], 1),
    "a start outside": change([*TERM, "start"], 1),
    "a start that overflows": change([*TERM, "start"], 2**64 - 1),
    "no width": change([*TERM, "width"], 0),
    "a width that overflows": change([*TERM, "width"], 2**64 - 1),
    "multiplies nothing": change([*TERM, "multiply"], True),
    "array that is not there": change([*TERM, "piece", "array"], 2),
    "array that overflows": change([*TERM, "piece", "array"], 2**64 - 1),
    "offset outside": change([*TERM, "piece", "offset"], 1),
    "offset that overflows": change([*TERM, "piece", "offset"], 2**64 - 1),
    "stride outside": change([*TERM, "piece", "stride"], 4),
    "stride that overflows": change([*TERM, "piece", "stride"], 2**63),
    "size outside": change([*TERM, "piece", "place", "size"], 5),
    "size that overflows": change([*TERM, "piece", "place", "size"], 2**64 - 1),
    "no places": change([*TERM, "piece", "place", "size"], 0),
    "no divisor": change([*TERM, "piece", "place", "divisor"], 0),
    "unknown place": change([*TERM, "piece", "place", "kind"], "random"),
    "place of another kind": change([*TERM, "piece", "place", "seed"], 1),
    "hash beyond 2^31": change([*TERM, "piece", "place"], HASH),
    "weight outside": change([*TERM, "weight", "place", "size"], 3),
    "field far away": change([*TERM, "weight", "place", "field"], 2**60),
    "seed beyond 64 bits": change([*TERM, "sign"], 2**64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions_are_refused(name):
    description, tensors, codes = small_hashed()
    table_of(description, tensors, codes)
    HOSTILE[name](description)
    with pytest.raises(ValueError, match=r"description|bytes|rows"):
        table_of(description, tensors, codes)


def test_terms_of_no_stride_are_bounded():
    """Many wide terms over one array would cost long work for few bytes."""
    piece = {"array": 0, "place": {"kind": "digit", "divisor": 1, "size": 1}, "stride": 0, "offset": 0}
    description = {
        "form": "hashed",
        "dim": 2**20,
        "bits": 0,
        "first": 0,
        "terms": [{"start": 0, "width": 2**20, "piece": piece}] * 100,
    }
    with pytest.raises(ValueError, match="columns of the row"):
        table_of(description, {"arrays.0": np.ones(2**20, np.float32)}, np.empty((1, 0), np.uint8))


def small_switch():
    inner, tensors, codes = random_levels(np.random.default_rng(0), 3, 2)
    description = {
        "form": "switch",
        "dim": 2,
        "otherwise": None,
        "shared": {},
        "cases": [{"bits": 4, "rows": 3, "decoder": inner}],
    }
    tensors = {"cases.0.ids": reference.pack_bits(np.array([[1, 5, 6]]), 4)[0], "cases.0.codes": codes}
    return description, tensors, np.empty((8, 0), np.uint8)


CASE = ("cases", 0)
HOSTILE_SWITCHES = {
    "no columns": change(["dim"], 0),
    "other columns": change(["dim"], 3),
    "no cases": change(["cases"], []),
    "more rows": change([*CASE, "rows"], 4),
    "no rows": change([*CASE, "rows"], 0),
    "rows that overflow": change([*CASE, "rows"], 2**63),
    "a list and a start": change([*CASE, "start"], 1),
    "neither": lambda description: description["cases"][0].pop("bits"),
    "no bits": change([*CASE, "bits"], 0),
    "too many bits": change([*CASE, "bits"], 33),
    "unknown form": change([*CASE, "decoder", "form"], "cloud"),
    "unknown key": change([*CASE, "colour"], 1),
}


@pytest.mark.parametrize("name", HOSTILE_SWITCHES)
def test_hostile_switches_are_refused(name):
    description, tensors, codes = small_switch()
    table_of(description, tensors, codes)
    HOSTILE_SWITCHES[name](description)
    with pytest.raises(ValueError, match=r"description|decoder|form|list of rows"):
        table_of(description, tensors, codes)


@pytest.mark.parametrize("ids", [[1, 1, 6], [5, 1, 6], [0, 0, 0]])
def test_lists_that_do_not_rise_are_refused(ids):
    description, tensors, codes = small_switch()
    tensors["cases.0.ids"] = reference.pack_bits(np.array([ids]), 4)[0]
    with pytest.raises(ValueError, match="rising numbers"):
        table_of(description, tensors, codes)


def test_cases_beyond_the_table_are_never_read():
    description, tensors, codes = small_switch()
    description["cases"][0] = {"start": 2**64 - 2, "rows": 3, "decoder": description["cases"][0]["decoder"]}
    table = table_of(description, {"cases.0.codes": tensors["cases.0.codes"]}, codes)
    assert not table[...].any()


def test_codes_of_cases_are_checked():
    inner = {
        "form": "levels",
        "dim": 2,
        "dtype": "int8",
        "granularity": "row",
        "block_size": 64,
        "symmetric": True,
        "scale_factor": 1.0,
        "offset_factor": 1.0,
    }
    codes = np.array([[1, 2, *np.array([np.inf], np.float16).view(np.uint8)]], np.uint8)
    description = {
        "form": "switch",
        "dim": 2,
        "otherwise": None,
        "shared": {},
        "cases": [{"start": 0, "rows": 1, "decoder": inner}],
    }
    with pytest.raises(ValueError, match="row 0 of case 0 holds NaN or infinity"):
        table_of(description, {"cases.0.codes": codes}, np.empty((1, 0), np.uint8))


def test_tables_without_codes_have_bounded_rows():
    description, tensors, _ = small_hashed()
    del description["terms"][0]["weight"]
    with pytest.raises(ValueError, match="rows without codes"):
        table_of(description, {"arrays.0": tensors["arrays.0"]}, np.empty((2**40 + 1, 0), np.uint8))


def test_joins_refuse_parts_of_codes_and_numbers():
    inner, tensors, codes = small_hashed()
    description = {"form": "join", "dim": 3, "mode": "sum", "parts": [inner]}
    tensors = {f"parts.0.{name}": value for name, value in tensors.items()}
    with pytest.raises(ValueError, match="by their codes or their numbers"):
        table_of(description, tensors, codes)


def test_segments_do_not_stand_inside():
    inner = {
        "form": "segments",
        "dim": 2,
        "map": False,
        "groups": [{"rows": 3, "decoder": small_switch()[0]["cases"][0]["decoder"]}],
    }
    description, tensors, codes = small_switch()
    description["cases"][0] = {"start": 0, "rows": 3, "decoder": inner}
    with pytest.raises(ValueError, match="rows stand apart"):
        table_of(description, {"cases.0.codes": tensors["cases.0.codes"]}, codes)
