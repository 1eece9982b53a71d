"""What must always be true: every kind of quantizer times every law.

The kinds come from the core and the laws are the tests below, so a new kind is tested without a new line here. A line
in PARAMETERS tries it with more than its defaults; a line in EXEMPT says which law it does not obey, and why.
"""

import hashlib
import inspect
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vqrs
from vqrs import _core, reference

PRODUCT_BEHIND = {"kind": "product", "parameters": {"n_subvectors": 2, "n_bits": 3}}

PARAMETERS = {
    "additive": [
        {"n_codebooks": 3, "n_bits": 3, "beam_width": 4, "n_rounds": 3},
        {"n_codebooks": 2, "n_bits": 5, "n_rounds": 2, "n_searches": 3, "codebook_dtype": "float32"},
    ],
    "kmeans": [
        {"n_clusters": 6},
        {"n_clusters": 17, "codebook_dtype": "float32"},
        {"n_clusters": 4, "codebook_dtype": "bfloat16", "max_iter": 3},
        {"n_clusters": 12, "codebook_dtype": "int8"},
    ],
    "product": [
        {"n_subvectors": 3, "n_bits": 3},
        {"n_subvectors": 2, "n_bits": 8, "codebook_dtype": "float32"},
        {"n_subvectors": 4, "n_bits": 1, "codebook_dtype": "bfloat16"},
        {"n_subvectors": 3, "n_bits": 3, "codebook_dtype": "int8"},
        {"n_subvectors": 3, "n_bits": 3, "center": True, "rotation": "random"},
        {"n_subvectors": 2, "n_bits": 3, "rotation": "dense", "rotation_dtype": "float32"},
        {"n_subvectors": 2, "n_bits": 3, "center": True, "rotation": "pca", "rotation_dtype": "int8"},
    ],
    "optimized-product": [
        {"n_subvectors": 3, "n_bits": 3},
        {"n_subvectors": 2, "n_bits": 4, "rotation": "auto", "rotation_dtype": "float32"},
    ],
    "low-rank": [
        {"n_components": 3},
        {"n_components": 2, "dtype": "int4", "rotation_dtype": "float32", "granularity": "row"},
    ],
    "product-residual": [
        {"n_subvectors": 3, "n_stages": 2, "n_bits": 2, "beam_width": 3},
        {"n_subvectors": 2, "n_stages": 1, "n_bits": 4, "codebook_dtype": "float32"},
    ],
    "residual": [
        {"n_stages": 3, "n_bits": 3, "beam_width": 4},
        {"n_stages": 2, "n_bits": 5, "beam_width": 1, "n_refinements": 0, "codebook_dtype": "float32"},
        {"n_stages": 3, "n_bits": 2, "codebook_dtype": "int8"},
    ],
    "scalar": [
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"dtype": "int8", "granularity": "column"},
        {"dtype": "int8", "granularity": "block", "block_size": 3, "symmetric": True},
        {"dtype": "int4"},
        {"dtype": "int4", "granularity": "column", "symmetric": True},
        {"dtype": "int4", "granularity": "block", "block_size": 4, "clip": "minmax"},
        {"dtype": "int2"},
        {"dtype": "int2", "clip": "minmax"},
        {"dtype": "int2", "center": True, "residual": PRODUCT_BEHIND},
        {"dtype": "int6"},
        {"dtype": "int5", "granularity": "block", "block_size": 4, "symmetric": True, "scale_dtype": "float8"},
        {"dtype": "int3", "granularity": "column"},
        {"dtype": "float8"},
        {"dtype": "float8", "granularity": "column"},
        {"dtype": "nf4", "granularity": "block", "block_size": 4},
        {"dtype": "nf4", "granularity": "column"},
        {"dtype": "float4", "clip": "minmax", "granularity": "block", "block_size": 3, "scale_dtype": "float8"},
        {"dtype": "free4"},
        {"dtype": "free4", "granularity": "block", "block_size": 8},
    ],
    "trellis": [
        {"n_bits": 2, "state_bits": 8},
        {"n_bits": 3.3, "state_bits": 6, "bit_allocation": "variance", "rotation_dtype": "float32"},
        {"n_bits": 1.7, "state_bits": 9, "scale_bits": 1, "rotation": None},
    ],
    "rotated": [
        {"n_bits": 1},
        {"n_bits": 3, "scale_dtype": "float8"},
        {"n_bits": 4},
        {"n_bits": 5},
        {"n_bits": 8},
        {"n_bits": 2, "estimator": "unbiased"},
    ],
    "sparse": [
        {"density": 0.5, "dtype": "float32"},
        {"density": 0.3},
        {"density": 0.1, "rotation": "pca", "center": True},
        {"density": 0.8, "dtype": "int8"},
    ],
    "deduplicating": [{}, {"codebook_dtype": "float16"}, {"tolerance": 1e-9}],
    "tree": [
        {"branching": 4, "depth": 2, "beam_width": 4},
        {"branching": 3, "depth": 3, "beam_width": 2, "codebook_dtype": "float32"},
    ],
}
"""Parameters to try each kind with; a kind without a line is tried with its defaults."""

RATES = {
    "additive": [{"n_codebooks": books, "n_bits": 2, "n_rounds": 3} for books in (1, 2, 3, 4)],
    "kmeans": [{"n_clusters": n} for n in (2, 4, 8, 16, 32)],
    "product": [{"n_subvectors": 2, "n_bits": bits} for bits in (1, 2, 3, 4, 5)],
    "optimized-product": [{"n_subvectors": 2, "n_bits": bits} for bits in (1, 2, 3, 4, 5)],
    "low-rank": [{"n_components": n} for n in (1, 2, 3, 4, 5)],
    "product-residual": [{"n_subvectors": 2, "n_stages": stages, "n_bits": 2} for stages in (1, 2, 3)],
    "residual": [{"n_stages": stages, "n_bits": 2} for stages in (1, 2, 3, 4)],
    "scalar": [{"dtype": dtype} for dtype in ("int2", "int3", "int4", "int5", "int6", "int8", "float16")],
    "rotated": [{"n_bits": bits} for bits in range(1, 9)],
    "sparse": [{"density": density} for density in (0.1, 0.3, 0.5, 0.8)],
    "trellis": [{"n_bits": bits} for bits in (1, 2, 3, 5, 8)],
    "tree": [{"branching": 2, "depth": depth, "beam_width": 64} for depth in (1, 2, 3, 4)],
}
"""Parameters of growing rate: the error must not grow."""

EXEMPT = [
    ("permutation", "optimized-product", {}, "rows to learn from are drawn by their position"),
    ("permutation", "low-rank", {}, "sums over rows in another order give other last bits of the components"),
    ("fixed point", "low-rank", {}, "turning there and back rounds"),
    ("fixed point", "optimized-product", {}, "turning there and back rounds"),
    ("doubling", "low-rank", {"granularity": "row"}, "scales that live in rows are no tensors"),
    ("reference", "rotated", {"estimator": "unbiased"}, "its longer rows are not those of the least error"),
    ("reference", "trellis", {}, "the scale of a row is part of the search: see test_trellis.py"),
    ("permutation", "trellis", {}, "the variances of columns are summed in the order of the rows"),
    ("fixed point", "trellis", {}, "the search may cut a row where the stream that it was decoded from does not show"),
    ("reference", "scalar", {"residual": PRODUCT_BEHIND}, "each part is judged where it stands alone"),
    ("permutation", "scalar", {"residual": PRODUCT_BEHIND}, "seeding draws rows by their position"),
    ("doubling", "scalar", {"residual": PRODUCT_BEHIND}, "scales that live in rows are no tensors"),
    ("scaling", "scalar", {"dtype": "float16"}, "the range of float16 is fixed, so small values lose bits"),
    ("permutation", "additive", {}, "seeding draws rows by their position"),
    ("permutation", "kmeans", {}, "seeding draws rows by their position"),
    ("permutation", "product", {}, "seeding draws rows by their position"),
    ("permutation", "product-residual", {}, "seeding draws rows by their position"),
    ("permutation", "residual", {}, "seeding draws rows by their position"),
    ("fixed point", "additive", {}, "a search may miss the code that a row was decoded from"),
    ("permutation", "tree", {}, "seeding draws rows by their position"),
    ("fixed point", "tree", {"beam_width": 2}, "a beam may pass by the leaf that a row was decoded from"),
    ("greedy", "tree", {"beam_width": 2}, "a beam may pass by the nearest leaf"),
    ("fixed point", "product-residual", {}, "a beam may miss the code that a row was decoded from"),
    ("fixed point", "residual", {}, "a beam may miss the code that a row was decoded from"),
    (
        "fixed point",
        "scalar",
        {"granularity": "block", "symmetric": True},
        "the largest value may not use the top level",
    ),
    ("fixed point", "scalar", {"dtype": "nf4"}, "the largest value may not use the top level"),
    ("fixed point", "rotated", {}, "the largest value may not use the top level"),
    ("fixed point", "sparse", {"center": True}, "values that were left out come back by the rotation"),
    ("permutation", "deduplicating", {}, "rows that are kept stand in the order in which they were met"),
    ("scaling", "deduplicating", {"tolerance": 1e-9}, "the tolerance does not scale"),
    ("doubling", "sparse", {"center": True}, "values that live in rows are no tensors"),
    *(("mean row", "sparse", {"density": part}, "without the mean taken off, zero is far") for part in (0.3, 0.5, 0.8)),
    ("seed", "deduplicating", {}, "nothing is drawn"),
]
"""(law, kind, parameters, why the law does not hold there)"""

REFERENCE_ENCODERS = {
    "additive": lambda x, codec: reference.encode_additive(x, codec.books(), codec.parameters["beam_width"]),
    "kmeans": lambda x, codec: reference.encode_kmeans(x, codec.books()[0])[:, None],
    "product": lambda x, codec: reference.encode_product(x, codec.books()),
    "optimized-product": lambda x, codec: reference.encode_product(x, codec.books()),
    "residual": lambda x, codec: reference.encode_residual(x, codec.books(), codec.parameters["beam_width"]),
    "product-residual": lambda x, codec: reference.encode_product_residual(
        x, codec.books(), codec.parameters["n_stages"], codec.parameters["beam_width"]
    ),
    "tree": lambda x, codec: reference.encode_tree(
        x, codec.books()[0], *(codec.parameters[name] for name in ("branching", "depth", "beam_width"))
    )[:, None],
}
"""Encoders of the form "books", from rows and codec to fields; for kinds without a line see greedy."""


# ---- kinds, tables and what the laws look at -----------------------------------------------------------------------


def cases(law: str | None = None) -> list:
    """Each kind with each of its parameters, but for those exempt from a law."""
    found = []
    for kind in (entry["name"] for entry in _core.kinds()):
        for parameters in PARAMETERS.get(kind, [{}]):
            exempt = any(law == e[0] and kind == e[1] and e[2].items() <= parameters.items() for e in EXEMPT)
            if not exempt:
                found.append(pytest.param((kind, parameters), id=case_name(kind, parameters)))
    return found


def case_name(kind: str, parameters: dict) -> str:
    return "-".join([kind, *map(str, parameters.values())])


every_case = pytest.mark.parametrize("case", cases())

# There are many cases, so that each gets fewer examples than a single property would.
few = settings(max_examples=settings().max_examples // 8, deadline=None, suppress_health_check=list(HealthCheck))


def largest_value(case) -> float:
    """The largest magnitude that a case accepts."""
    return 6e4 if case[1].get("dtype") == "float16" else 1e15


CONTENTS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "far from zero": lambda rng, shape: rng.normal(size=shape) + 100,
    "integers": lambda rng, shape: rng.integers(-2, 3, size=shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, rng.normal()),
    "duplicates": lambda rng, shape: rng.normal(size=(3, shape[1]))[rng.integers(0, 3, size=shape[0])],
    "denormal": lambda rng, shape: rng.normal(size=shape) * 1e-41,
    "all magnitudes": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.integers(-12, 4, size=(shape[0], 1)),
    "huge": lambda rng, shape: rng.uniform(-1, 1, size=shape),
}


@st.composite
def recipes(draw, contents=tuple(CONTENTS)):
    """What a table is made from: (content, shape, seed), which prints shorter than its values."""
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 13))
    return draw(st.sampled_from(contents)), shape, draw(st.integers(0, 2**16))


def make(recipe, case) -> np.ndarray:
    content, shape, seed = recipe
    scale = largest_value(case) if content == "huge" else 1.0
    return np.ascontiguousarray(CONTENTS[content](np.random.default_rng(seed), shape) * scale, dtype=np.float32)


def normal(n_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_rows, dim)).astype(np.float32)


def fit(case, x, **options):
    return _core.fit(*case, x, **options)


def table_of(case, x) -> _core.Table:
    codec, codes = fit(case, x)
    return _core.Table.from_codec(codec, codes, errors={"relative": codec.relative_error})


def state(codec: _core.Codec) -> tuple:
    """Everything that reading depends on, to compare."""
    return codec.description(), {name: tensor.tobytes() for name, tensor in codec.tensors().items()}


def squared_error(x, decoded) -> np.ndarray:
    """Of each row."""
    return ((x.astype(np.float64) - decoded) ** 2).sum(axis=1)


def greedy(x, codec: _core.Codec) -> np.ndarray:
    """Fields that take each book's nearest entry in turn, which no encoder of sums should fall behind."""
    description = json.loads(codec.description())
    groups = description.get("inner", description)["groups"]
    places = [(start, group["width"]) for group in groups for start in group["starts"]]
    outside = [(start, x.shape[1] - start - width) for start, width in places]
    books = [np.pad(book, ((0, 0), columns)) for book, columns in zip(codec.books(), outside, strict=True)]
    return reference.encode_residual(x, books, beam_width=1)


# ---- reading -------------------------------------------------------------------------------------------------------


@every_case
@few
@given(recipe=recipes(), data=st.data())
def test_lookup_is_decode_in_any_order(case, recipe, data):
    table = table_of(case, make(recipe, case))
    n = table.n_rows
    ids = np.array(data.draw(st.lists(st.integers(-n, n - 1), max_size=50)), np.int64)
    everything = table.decode(0, n)
    assert np.array_equal(table.lookup(ids), everything[ids])
    assert np.array_equal(table.lookup(ids.astype(np.int32)), everything[ids])
    out = np.full((len(ids), table.dim), np.nan, np.float32)
    table.lookup(ids, out)
    assert np.array_equal(out, everything[ids])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    assert np.array_equal(table.decode(start, stop), everything[start:stop])


@every_case
@few
@given(recipe=recipes())
def test_lookup_is_the_reference(case, recipe):
    x = make(recipe, case)
    codec, codes = fit(case, x)
    table = _core.Table.from_codec(codec, codes, errors={"relative": codec.relative_error})
    expected = reference.decode(codec.description(), codec.tensors(), codes)
    assert expected.dtype == np.float32
    assert np.array_equal(codec.decode(codes), expected)
    assert np.array_equal(table.lookup(np.arange(len(x))), expected)


@every_case
def test_any_code_can_be_read(case):
    """Codebooks are padded, so that no byte of a code reads out of bounds; scales that are not finite are refused."""
    codec, _ = fit(case, normal(20, 7))
    codes = np.random.default_rng(1).integers(0, 256, size=(200, codec.row_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = reference.decode(codec.description(), codec.tensors(), codes)
    read = 0
    for code, row in zip(codes, expected, strict=True):
        try:
            decoded = codec.decode(code[None])
        except ValueError as error:
            # Also where no column takes the number that is not finite.
            assert "NaN or infinity" in str(error)  # noqa: PT017 - most rows are read
            continue
        assert np.array_equal(decoded[0], row)
        read += 1
    assert read > 0


@every_case
@pytest.mark.parametrize("position", [0, 3])
def test_ids_out_of_range_are_named(case, position):
    table = table_of(case, normal(10, 5))
    for wrong in (10, -11, 2**40, -(2**40)):
        ids = np.array([0, -1, 9, 3], np.int64)
        ids[position] = wrong
        with pytest.raises(IndexError, match=rf"{wrong}.* 10 rows"):
            table.lookup(ids)


@every_case
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@few
@given(recipe=recipes(["normal", "integers", "duplicates"]), data=st.data())
def test_pool_is_numpy_on_lookups(case, mode, recipe, data):
    table = table_of(case, make(recipe, case))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    offsets = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    rng = np.random.default_rng(len(lengths))
    ids = rng.integers(-table.n_rows, table.n_rows, size=sum(lengths))
    rows = table.lookup(ids)
    assert np.allclose(
        table.pool(ids, offsets, None, mode), reference.pool(rows, offsets, mode=mode), rtol=1e-5, atol=1e-5
    )
    if mode == "sum":
        weights = rng.normal(size=len(ids)).astype(np.float32)
        expected = reference.pool(rows, offsets, weights)
        assert np.allclose(table.pool(ids, offsets, weights, mode), expected, rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@few
@given(recipe=recipes(["normal", "far from zero", "integers", "zeros", "duplicates"]), k=st.integers(1, 50))
def test_search_is_exact_on_decoded_rows(case, metric, recipe, k):
    table = table_of(case, make(recipe, case))
    queries = normal(3, table.dim, seed=k)
    decoded = table.decode(0, table.n_rows)
    scores, ids = table.search(queries, k, metric)
    expected, _ = reference.search(queries, decoded, k, metric)
    assert scores.shape == ids.shape == (3, min(k, table.n_rows))
    slack = 1e-5 * (1 + np.abs(decoded).max()) ** 2 * table.dim
    assert np.allclose(scores, expected, atol=slack)
    every_score, every_id = reference.search(queries, decoded, table.n_rows, metric)
    own = np.take_along_axis(every_score, np.argsort(every_id, axis=1), axis=1)
    assert np.allclose(scores, np.take_along_axis(own, ids, axis=1), atol=slack)
    tied = np.diff(scores, axis=1) == 0
    assert (np.diff(ids, axis=1)[tied] > 0).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())


# ---- learning ------------------------------------------------------------------------------------------------------


@every_case
@few
@given(recipe=recipes())
def test_fit_returns_the_codes_of_encode(case, recipe):
    x = make(recipe, case)
    codec, codes = fit(case, x)
    assert codes.shape == (len(x), codec.row_bytes)
    assert np.array_equal(codes, codec.encode(x))


@every_case
@few
@given(recipe=recipes(), split=st.integers(0, 40))
def test_encode_does_not_depend_on_batches(case, recipe, split):
    x = make(recipe, case)
    codec, codes = fit(case, x)
    parts = [part for part in (x[:split], x[split:]) if len(part)]
    assert np.array_equal(np.concatenate([codec.encode(part) for part in parts]), codes)


@every_case
def test_same_seed_same_bytes_for_any_number_of_threads(case):
    x = normal(1300, 9)
    results = []
    for n_jobs in (1, 2, 3, 1):
        codec, codes = fit(case, x, seed=7, n_jobs=n_jobs)
        table = _core.Table.from_codec(codec, codes, errors={"relative": codec.relative_error})
        rows = table.lookup(np.arange(len(x))[::-1].copy(), n_jobs=n_jobs)
        scores, ids = table.search(x[:5], 10, "inner_product", n_jobs)
        encoded = codec.encode(x, n_jobs=n_jobs)
        results.append(
            (state(codec), *(a.tobytes() for a in (codes, encoded, rows, scores, ids)), codec.relative_error)
        )
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("case", cases("reference"))
@few
@given(recipe=recipes(["normal", "far from zero", "integers", "duplicates", "zeros", "constant"]))
def test_encode_is_the_reference_or_better(case, recipe):
    x = make(recipe, case)
    codec, codes = fit(case, x)
    description, tensors, projected = reference.project(codec.description(), codec.tensors(), x)
    if description["form"] == "levels":
        expected = reference.encode_scalar(projected, description, tensors)
    elif description["form"] == "sparse":
        expected = reference.encode_sparse(projected, description)
    else:
        fields = REFERENCE_ENCODERS.get(codec.kind, greedy)(projected, codec)
        expected = reference.pack_bits(fields, description["bits"])
    ours, theirs = squared_error(x, codec.decode(codes)), squared_error(x, codec.decode(expected))
    # Distances are taken in float32; where that makes a beam keep other codes, only the sum over rows is promised.
    rounding = 1e-5 * (x.astype(np.float64) ** 2).sum(axis=1)
    if codec.kind not in ("kmeans", "product", "scalar"):
        ours, theirs, rounding = ours.sum(), theirs.sum(), rounding.sum()
    assert (ours <= theirs * 1.0001 + rounding).all()


@pytest.mark.parametrize("case", [case for case in cases("greedy") if case.values[0][0] in REFERENCE_ENCODERS])
def test_no_encoder_falls_behind_the_greedy_one(case):
    """So that greedy may judge the kinds that have no reference encoder."""
    x = normal(60, 7)
    codec, codes = fit(case, x)
    description, _, projected = reference.project(codec.description(), codec.tensors(), x)
    greedy_codes = reference.pack_bits(greedy(projected, codec), description["bits"])
    ours, theirs = squared_error(x, codec.decode(codes)).sum(), squared_error(x, codec.decode(greedy_codes)).sum()
    assert ours <= theirs * 1.0001


@pytest.mark.parametrize("case", cases("mean row"))
def test_decodes_better_than_the_mean_row(case):
    x = normal(300, 8) + 5
    codec, codes = fit(case, x)
    mean = x.mean(axis=0, dtype=np.float64)
    assert squared_error(x, codec.decode(codes)).sum() < 0.9 * squared_error(x, mean).sum()


@every_case
def test_relative_error_is_what_it_says(case):
    x = normal(300, 8) + 1
    codec, codes = fit(case, x)
    expected = squared_error(x, codec.decode(codes)).sum() / (x.astype(np.float64) ** 2).sum()
    assert codec.relative_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [entry["name"] for entry in _core.kinds()])
def test_error_does_not_grow_with_the_rate(kind):
    x = normal(500, 8)
    errors = [_core.fit(kind, parameters, x)[0].relative_error for parameters in RATES.get(kind, [{}])]
    assert all(finer < coarser for coarser, finer in itertools.pairwise(errors)), errors


@every_case
def test_better_codes_are_never_worse(case):
    x = normal(300, 8)
    codec, codes = fit(case, x)
    kept_codec, kept = fit(case, x, keep_better_codes=True)
    assert state(kept_codec) == state(codec)
    plain, better = squared_error(x, codec.decode(codes)), squared_error(x, codec.decode(kept))
    assert (better <= plain * (1 + 1e-6)).all()
    assert kept_codec.relative_error <= codec.relative_error


@pytest.mark.parametrize("case", cases("scaling"))
@few
@given(recipe=recipes(["normal", "far from zero", "integers", "duplicates"]), exponent=st.integers(-12, 12))
def test_scaling_by_a_power_of_two_scales_exactly(case, recipe, exponent):
    x, factor = make(recipe, case), np.float32(2.0**exponent)
    (codec, codes), (scaled_codec, scaled_codes) = fit(case, x), fit(case, x * factor)
    assert np.array_equal(codec.decode(codes) * factor, scaled_codec.decode(scaled_codes))


@pytest.mark.parametrize("case", cases("permutation"))
@few
@given(recipe=recipes())
def test_permuting_rows_permutes_codes(case, recipe):
    x = make(recipe, case)
    order = np.random.default_rng(0).permutation(len(x))
    assert np.array_equal(fit(case, x)[1][order], fit(case, x[order])[1])


@pytest.mark.parametrize("case", cases("fixed point"))
@few
@given(recipe=recipes(["normal", "integers", "zeros", "duplicates"]))
def test_a_decoded_row_decodes_to_itself(case, recipe):
    x = make(recipe, case)
    codec, codes = fit(case, x)
    decoded = codec.decode(codes)
    again = codec.decode(codec.encode(decoded))
    dtype = case[1].get("dtype", "")
    bits = int(dtype[-1]) if dtype.startswith("int") else None
    if bits is None:
        assert np.array_equal(again, decoded)
        return
    rounding = 2.0**-10 * np.abs(x).max()  # of scales and minima to float16
    if case[1].get("clip") == "minmax":
        assert np.allclose(again, decoded, rtol=0, atol=rounding)
    else:
        # The search of the best range tries others than the one that the row came from, but none is worse than the
        # extremes, which err by half a step at most.
        step = (decoded.max() - decoded.min()) / (2**bits - 1)
        assert np.sqrt(np.mean((again - decoded) ** 2)) <= step / 2 + rounding


@pytest.mark.parametrize("case", cases("seed"))
def test_seed_is_what_makes_fits_differ(case):
    """A fit is a function of its arguments; those with random choices use the seed for them."""
    x = normal(200, 6)
    same = [state(fit(case, x, seed=3)[0]) for _ in range(2)]
    assert same[0] == same[1]
    if json.loads(same[0][0])["form"] == "books":
        assert state(fit(case, x, seed=4)[0]) != same[0]


# ---- strange and wrong input ---------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 1), (3, 2), (40, 13)])
@pytest.mark.parametrize("content", list(CONTENTS))
def test_every_table_is_defined(case, content, shape):
    x = make((content, shape, 5), case)
    codec, codes = fit(case, x)
    decoded = codec.decode(codes)
    assert decoded.shape == x.shape
    assert np.isfinite(decoded).all()
    assert np.isfinite(codec.relative_error)
    if content == "zeros":
        assert not decoded.any()
        assert codec.relative_error == 0
    elif content != "denormal":  # whose squares are zero in float32
        assert squared_error(x, decoded).sum() <= 1.001 * squared_error(x, np.zeros(1)).sum()


@every_case
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_place(case, value):
    clean = normal(600, 5)
    codec, _ = fit(case, clean)
    x = clean.copy()
    x[513, 3] = value
    name = "NaN" if np.isnan(value) else "infinity"
    for refuse in (lambda: fit(case, x), lambda: codec.encode(x)):
        with pytest.raises(ValueError, match=rf"{name} at row 513, column 3"):
            refuse()


@every_case
def test_values_that_would_overflow_are_refused_by_place(case):
    x = normal(4, 5)
    x[2, 1] = 1e16
    with pytest.raises(ValueError, match=r"row 2, column 1"):
        fit(case, x)


@every_case
def test_rows_of_another_width_are_refused(case):
    codec, _ = fit(case, normal(10, 5))
    with pytest.raises(ValueError, match=r"4 features.*5 features"):
        codec.encode(normal(3, 4))


@every_case
def test_no_rows_cannot_be_fitted_but_can_be_encoded(case):
    with pytest.raises(ValueError, match="at least 1 row"):
        fit(case, np.empty((0, 5), np.float32))
    codec, _ = fit(case, normal(10, 5))
    nothing = codec.encode(np.empty((0, 5), np.float32))
    assert nothing.shape == (0, codec.row_bytes)
    assert codec.decode(nothing).shape == (0, 5)


@every_case
def test_unknown_parameters_are_refused_by_name(case):
    kind, parameters = case
    with pytest.raises(ValueError, match=r"n_cabbages.*" + kind):
        _core.fit(kind, {**parameters, "n_cabbages": 3}, normal(10, 5))


@every_case
@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0] * 9, "9 values.*10 rows"), ([-1.0] + [1.0] * 9, r"sample_weight\[0\]"), ([0.0] * 10, "all zero")],
)
def test_wrong_weights_are_refused(case, weights, message):
    with pytest.raises(ValueError, match=message):
        fit(case, normal(10, 5), sample_weight=np.array(weights))


@every_case
def test_small_data_shrinks_with_a_note(case):
    """Fewer rows than entries: each row is kept as well as its stored type allows."""
    kind, parameters = case
    x = normal(2, 5)
    codec, codes = _core.fit(kind, parameters, x)
    wanted = {"kmeans": parameters.get("n_clusters", 0), "product": 2 ** parameters.get("n_bits", 0)}.get(kind, 0)
    if wanted > 2:
        assert any("2 rows" in note for note in codec.notes)
        assert np.allclose(codec.decode(codes), x, rtol=1e-2, atol=0.02 if "int8" in parameters.values() else 0)


# ---- files and objects ---------------------------------------------------------------------------------------------


@every_case
def test_saved_tables_open_with_the_same_bytes(case, tmp_path):
    table = table_of(case, normal(300, 9))
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    sizes = [table.save(path) for path in paths]
    contents = [Path(path).read_bytes() for path in paths]
    assert contents[0] == contents[1]
    assert sizes == [len(contents[0])] * 2
    assert table.nbytes == len(contents[0])
    for mode in ("mmap", "read"):
        opened = _core.Table.open(paths[0], "full", mode)
        assert np.array_equal(opened.codes(), table.codes())
        assert opened.decode(0, 300).tobytes() == table.decode(0, 300).tobytes()
        assert state(opened.codec()) == state(table.codec())
        assert (opened.kind, opened.form, opened.n_rows, opened.dim) == (table.kind, table.form, 300, 9)
        assert opened.relative_error == table.relative_error
        opened.save(paths[1])
        assert Path(paths[1]).read_bytes() == contents[0]


@every_case
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1500, 9)])
def test_estimate_is_the_size_of_the_file(case, shape, tmp_path):
    table = table_of(case, normal(*shape))
    assert _core.estimate(*case, *shape) == table.nbytes == table.save(str(tmp_path / "t.safetensors"))


@every_case
def test_streamed_table_is_the_table(case, tmp_path):
    x = normal(700, 6)
    codec, codes = fit(case, x)
    whole, streamed = tmp_path / "whole.safetensors", tmp_path / "streamed.safetensors"
    writer = _core.TableWriter(str(streamed), codec)
    for start in (0, 100, 613):
        writer.write(x[start : {0: 100, 100: 613, 613: 700}[start]])
    assert writer.finish() == streamed.stat().st_size
    errors = _core.reconstruction_errors(x, codes, codec, None)
    table = _core.Table.from_codec(codec, codes, errors=errors)
    table.save(str(whole))
    opened = _core.Table.open(str(streamed), "full", "mmap")
    assert np.array_equal(opened.codes(), codes)
    assert opened.relative_error == pytest.approx(table.relative_error, rel=1e-9)
    assert streamed.stat().st_size == whole.stat().st_size


@every_case
def test_codec_survives_its_parts(case):
    x = normal(100, 6)
    codec, codes = fit(case, x)
    description, tensors = codec.to_parts()
    again = _core.Codec.from_parts(description, pickle.loads(pickle.dumps(tensors)))
    assert state(again) == state(codec)
    assert again.parameters == codec.parameters
    assert np.array_equal(again.encode(x), codes)


@pytest.mark.parametrize("case", cases("doubling"))
def test_tensors_can_be_replaced(case):
    table = table_of(case, normal(100, 6))
    tensors = {name: reference._as_float32(tensor) for name, tensor in table.tensors().items()}
    assert np.array_equal(table.with_tensors(tensors).decode(0, 100), table.decode(0, 100))
    # Of a rotation and what it turns, or of levels or integers and their scales, one factor is enough.
    factors = {name: 1 if name.startswith(("rotation", "scale")) or name.endswith("scales") else 2 for name in tensors}
    if "offset" in tensors:
        factors["scale"] = 2
    doubled = table.with_tensors({name: tensor * factors[name] for name, tensor in tensors.items()})
    assert np.array_equal(doubled.decode(0, 100), table.decode(0, 100) * (2 if tensors else 1))
    assert np.isnan(doubled.relative_error)


# ---- the same bytes on every path ----------------------------------------------------------------------------------


def digests() -> dict[str, str]:
    """What fit, encode and lookup give for each case, as one digest each."""
    found = {}
    for kind, parameters in (param.values[0] for param in cases()):
        digest = hashlib.sha256()
        for x in (normal(700, 19), normal(300, 33, seed=1), make(("duplicates", (90, 5), 2), (kind, parameters))):
            codec, codes = fit((kind, parameters), x)
            table = _core.Table.from_codec(codec, codes, errors={"relative": 0.0})
            ids = np.random.default_rng(0).integers(-len(x), len(x), size=500)
            digest.update(repr(state(codec)).encode())
            for array in (codes, codec.encode(x), table.lookup(ids), table.decode(0, len(x))):
                digest.update(array.tobytes())
        found[case_name(kind, parameters)] = digest.hexdigest()
    return found


@pytest.fixture(scope="module")
def digests_of_paths() -> dict[str, dict[str, str]]:
    """Digests by instruction set, each from a process that was told to use it."""
    program = "import json, test_contract as t; print(json.dumps([t._core.hardware()['simd'], t.digests()]))"
    found = {}
    for path in _core.hardware()["available"]:
        environment = {**os.environ, "VQRS_SIMD": path}
        output = subprocess.run(
            [sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
        )
        assert output.returncode == 0, output.stderr
        used, found[path] = json.loads(output.stdout)
        assert used == path
    return found


@every_case
def test_every_instruction_set_gives_the_same_bytes(case, digests_of_paths):
    name = case_name(*case)
    assert "scalar" in digests_of_paths
    assert {path: found[name] for path, found in digests_of_paths.items()} == dict.fromkeys(
        digests_of_paths, digests_of_paths["scalar"][name]
    )


# ---- one estimator for each kind -----------------------------------------------------------------------------------


def estimators() -> dict[str, type]:
    """The public estimator class of each kind."""
    classes = [getattr(vqrs, name) for name in vqrs.__all__]
    return {c._kind: c for c in classes if inspect.isclass(c) and getattr(c, "_kind", None)}


@pytest.mark.parametrize("kind", [entry["name"] for entry in _core.kinds()])
def test_each_kind_has_an_estimator_with_its_parameters(kind):
    defaults = next(entry["parameters"] for entry in _core.kinds() if entry["name"] == kind)
    signature = inspect.signature(estimators()[kind].__init__).parameters
    general = {"self", "random_state", "n_jobs", "verbose"}
    assert {name: p.default for name, p in signature.items() if name not in general} == defaults


@every_case
def test_estimator_is_the_core(case):
    kind, parameters = case
    x = normal(300, 6)
    estimator = estimators()[kind](**parameters)
    if "random_state" in estimator.get_params():
        estimator.set_params(random_state=0)
    codes = estimator.fit_transform(x)
    assert codes.dtype == np.uint8
    assert codes.tobytes() == estimator.fit(x).transform(x).tobytes()
    decoded = estimator.inverse_transform(codes)
    table = estimator.compress(x)
    assert np.array_equal(table[:], decoded)
    assert np.array_equal(table.codes, codes)
    assert estimator.score(x) == pytest.approx(-table.relative_error, rel=1e-6)
    assert estimator.estimate(300, 6) == table.nbytes
