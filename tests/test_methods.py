"""Figures that a right implementation of each method reaches, and properties that catch a wrong one.

The figures are relative squared errors on standard normal rows, from theory or measured once with other programs; each
states its tolerance. Methods are named by paper in the modules that implement them.
"""

import itertools
import json
import statistics

import numpy as np
import pytest

from vqrs import _core, reference
from vqrs.metrics import gaussian_bound


def normal(n_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_rows, dim)).astype(np.float32)


def normal_quantiles(n: int) -> np.ndarray:
    """A sample of n values with the standard normal distribution and no noise, as one column."""
    inverse = statistics.NormalDist().inv_cdf
    return np.array([[inverse((i + 0.5) / n)] for i in range(n)], np.float32)


def fit(kind: str, x: np.ndarray, **parameters) -> tuple[_core.Codec, np.ndarray]:
    return _core.fit(kind, parameters, x)


def fit_error(kind: str, x: np.ndarray, **parameters) -> float:
    return fit(kind, x, **parameters)[0].relative_error


def kmeans(x: np.ndarray, init: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray, float, int, int]:
    """Lloyd's iterations from given centres, to the end unless told otherwise."""
    return _core.kmeans_fit(x, len(init), init=init, **{"max_iter": 300, "tol": 0.0, **options})


def table_of(kind: str, x: np.ndarray, **parameters) -> _core.Table:
    codec, codes = fit(kind, x, **parameters)
    return _core.Table.from_codec(codec, codes, errors={"relative": codec.relative_error})


def squared_error(x: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Of each row."""
    return ((x.astype(np.float64) - decoded) ** 2).sum(axis=1)


# ---- conventions ---------------------------------------------------------------------------------------------------

LLOYD_MAX_LEVELS = {
    1: [0.79788],
    2: [0.45278, 1.51042],
    3: [0.24509, 0.75601, 1.34391, 2.15195],
    4: [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259],
}
LLOYD_MAX_ERROR = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_kmeans_of_one_column_is_the_lloyd_max_quantizer(bits):
    x = normal_quantiles(20_000)
    codec, _ = fit("kmeans", x, n_clusters=2**bits, max_iter=2000, tol=0.0, codebook_dtype="float32")
    positive = np.array(LLOYD_MAX_LEVELS[bits])
    assert np.sort(codec.books()[0][:, 0]) == pytest.approx([*-positive[::-1], *positive], abs=0.02)
    assert codec.relative_error == pytest.approx(LLOYD_MAX_ERROR[bits], rel=0.01)


@pytest.mark.parametrize(("dtype", "figure"), [("int2", 0.11885), ("int4", 0.01154)])
def test_searched_range_of_a_column_is_the_best_uniform_quantizer(dtype, figure):
    x = normal_quantiles(20_000)
    error = fit_error("scalar", x, dtype=dtype, granularity="column", clip="mse")
    assert error == pytest.approx(figure, rel=0.01)


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4])
def test_no_code_of_normal_rows_beats_shannon(n_bits):
    """With 20,000 rows for 2**n_bits entries of one column, codebooks cannot learn the noise."""
    assert fit_error("product", normal(20_000, 2), n_subvectors=2, n_bits=n_bits) > 4.0**-n_bits


def water_filled(variances: list[float], bits_per_row: float) -> float:
    """Least total error of independent normal values, by halving the interval in which the water level lies."""
    low, high = 0.0, max(variances)
    for _ in range(200):
        level = (low + high) / 2
        rate = sum(0.5 * np.log2(v / level) for v in variances if v > level)
        low, high = (level, high) if rate > bits_per_row else (low, level)
    return sum(min(level, v) for v in variances)


@pytest.mark.parametrize("variances", [[1, 1, 1], [9, 1, 0.01], [4, 4, 0]])
@pytest.mark.parametrize("bits", [0.5, 1, 2, 4])
def test_gaussian_bound_is_reverse_water_filling(variances, bits):
    x = normal(4000, 3).astype(np.float64)
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / len(x))).T  # covariance exactly I
    rotation = np.linalg.qr(normal(3, 3))[0]
    rows = white * np.sqrt(variances) @ rotation
    expected = water_filled(variances, 3 * bits) / sum(variances)
    assert gaussian_bound(rows, bits) == pytest.approx(expected, rel=1e-6)
    if variances == [1, 1, 1]:
        assert expected == pytest.approx(4.0**-bits)


ROW_FIGURES = {
    16: {"int8": 1.47e-5, "int8 symmetric": 2.20e-5, "int4": 0.0043, "int2": 0.108},
    64: {"int8": 2.76e-5, "int8 symmetric": 3.48e-5, "int4": 0.0080, "int2": 0.201},
    128: {"int8": 3.45e-5, "int8 symmetric": 4.19e-5, "int4": 0.0100, "int2": 0.251},
    768: {"int8": 5.17e-5, "int8 symmetric": 5.91e-5, "int4": 0.0149, "int2": 0.379},
}
"""Errors of ranges from the smallest to the largest value of a row."""


@pytest.mark.parametrize("dim", list(ROW_FIGURES))
@pytest.mark.parametrize("name", ["int8", "int8 symmetric", "int4", "int2"])
def test_scales_by_row_reach_the_figures(dim, name):
    dtype, *symmetric = name.split()
    x = normal(max(1500, 640_000 // dim), dim)
    error = fit_error("scalar", x, dtype=dtype, granularity="row", clip="minmax", symmetric=bool(symmetric))
    assert error == pytest.approx(ROW_FIGURES[dim][name], rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "block_size", "symmetric", "figure"),
    [("int4", 64, True, 0.0116), ("int4", 64, False, 0.00804), ("int8", 32, True, 2.86e-5)],
)
def test_scales_by_block_reach_the_figures(dtype, block_size, symmetric, figure):
    parameters = {"dtype": dtype, "granularity": "block", "block_size": block_size, "symmetric": symmetric}
    assert fit_error("scalar", normal(1000, 256), clip="minmax", **parameters) == pytest.approx(figure, rel=0.02)


@pytest.mark.parametrize("kind", [entry["name"] for entry in _core.kinds()])
def test_bytes_count_everything(kind, tmp_path):
    """Codes and decoder tensors are all there, and the rest of the file is small and fixed."""
    table = table_of(kind, normal(600, 16))
    held = table.codes().nbytes + sum(tensor.nbytes for tensor in table.tensors().values())
    size = table.save(str(tmp_path / "table.safetensors"))
    assert size == table.nbytes
    assert held < size <= held + 2 * 4096 + 8 * (held // 65536 + 2) + 64 * 8


def test_rounding_takes_ties_upwards():
    """One rule for all kinds and paths: level k + 1/2 becomes k + 1."""
    x = np.array([[0, 0.5, 1.5, 2.5, 254.5, 255], [-255, -254.5, -1.5, -0.5, -0.25, 0]], np.float32)
    codec, codes = fit("scalar", x, dtype="int8", clip="minmax")
    assert codec.decode(codes).tolist() == [[0, 1, 2, 3, 255, 255], [-255, -254, -1, 0, 0, 0]]


# ---- A1: casts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "figure"), [("float16", 4.3e-8), ("bfloat16", 2.76e-6)])
def test_casts_round_to_nearest_even(dtype, figure):
    """Truncation instead of rounding would cost four times as much."""
    codec, codes = fit("scalar", normal(2000, 64), dtype=dtype)
    assert codec.relative_error == pytest.approx(figure, rel=0.02)
    assert codes.shape == (2000, 2 * 64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_finite_pattern_survives(dtype):
    """Subnormal numbers and minus zero among them."""
    patterns = np.arange(2**16, dtype=np.uint16)
    if dtype == "float16":
        values = patterns.view(np.float16).astype(np.float32)
    else:
        values = (patterns.astype(np.uint32) << 16).view(np.float32)
    kept = np.abs(values) <= 1e15  # the largest magnitude that a table may hold; False for NaN
    codec, codes = fit("scalar", values[kept].reshape(-1, 1), dtype=dtype)
    assert codes.view(np.uint16).ravel().tolist() == patterns[kept].tolist()
    assert codec.decode(codes).tobytes() == values[kept].tobytes()


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_values_beyond_float16_are_refused_with_the_way_out(value):
    with pytest.raises(ValueError, match=r"float16.*65504.*bfloat16"):
        fit("scalar", np.array([[1.0, value]], np.float32), dtype="float16")


def test_the_largest_float16_is_kept():
    codec, codes = fit("scalar", np.array([[65504.0, -65519.0]], np.float32), dtype="float16")
    assert codec.decode(codes).tolist() == [[65504.0, -65504.0]]


# ---- A2, A3: integers by row and block -----------------------------------------------------------------------------

INTEGERS = ["int8", "int6", "int5", "int4", "int3", "int2"]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("granularity", ["row", "block", "column"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_full_ranges_err_by_half_a_step(dtype, granularity, symmetric):
    x = normal(200, 50) + 0.3
    bits, size = int(dtype[3:]), {"row": 50, "column": 1, "block": 16}[granularity]
    parameters = {"dtype": dtype, "granularity": granularity, "block_size": 16, "symmetric": symmetric}
    codec, codes = fit("scalar", x, clip="minmax", **parameters)
    error = np.abs(x - codec.decode(codes))
    for start in range(0, 50, size):
        columns = slice(start, start + size)
        axis = 0 if granularity == "column" else 1
        low, high = x[:, columns].min(axis=axis), x[:, columns].max(axis=axis)
        steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        step = (np.maximum(np.abs(low), np.abs(high)) if symmetric else high - low) / steps
        # float16 scales: a minimum of up to 8 moves down by up to 2**-8 before the step is chosen.
        slack = 0 if granularity == "column" else 2.0**-8 / steps
        assert (error[:, columns].max(axis=axis) <= step * 0.502 + slack).all()


@pytest.mark.parametrize("dtype", ["int4", "int3", "int2", "nf4", "float4"])
@pytest.mark.parametrize("granularity", ["row", "block", "column"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_searched_ranges_are_never_worse_in_any_row(dtype, granularity, symmetric):
    x = normal(300, 48)
    parameters = {"dtype": dtype, "granularity": granularity, "symmetric": symmetric}
    full, searched = (fit("scalar", x, clip=clip, **parameters) for clip in ("minmax", "mse"))
    errors = [squared_error(x, codec.decode(codes)) for codec, codes in (full, searched)]
    assert errors[1].sum() < errors[0].sum()
    if granularity != "column":
        assert (errors[1] <= errors[0] * 1.0001).all()


SEARCHED_FIGURES = (
    {(64, "int2"): 0.112, (128, "int2"): 0.118, (768, "int2"): 0.124}
    | {(64, "int3"): 0.0302, (128, "int3"): 0.0335, (768, "int3"): 0.0383}
    | {(64, "int4"): 0.0074, (128, "int4"): 0.0088, (768, "int4"): 0.0112}
)


@pytest.mark.parametrize(("dim", "dtype"), list(SEARCHED_FIGURES))
def test_searched_ranges_reach_the_figures(dim, dtype):
    """The figures shrink the range around its middle; moving both ends may do better."""
    assert fit_error("scalar", normal(1500, dim), dtype=dtype, clip="mse") <= 1.02 * SEARCHED_FIGURES[dim, dtype]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("granularity", ["row", "block", "column"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_decoded_row_has_its_own_code(dtype, granularity, symmetric):
    """Where blocks are long enough that the float16 minimum is finer than half a step."""
    parameters = {"dtype": dtype, "granularity": granularity, "block_size": 10, "symmetric": symmetric}
    codec, codes = fit("scalar", normal(300, 30), clip="minmax", **parameters)
    assert np.array_equal(codec.encode(codec.decode(codes)), codes)


@pytest.mark.parametrize(("dtype", "bits"), [(dtype, int(dtype[-1])) for dtype in INTEGERS])
def test_rows_have_the_bytes_of_the_formula(dtype, bits):
    x = normal(20, 13)
    levels = -(-13 * bits // 8)
    assert fit("scalar", x, dtype=dtype)[0].row_bytes == levels + 4
    assert fit("scalar", x, dtype=dtype, symmetric=True)[0].row_bytes == levels + 2
    assert fit("scalar", x, dtype=dtype, granularity="column")[0].row_bytes == levels
    assert fit("scalar", x, dtype=dtype, granularity="block", block_size=5)[0].row_bytes == levels + 3 * 4


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("clip", ["mse", "minmax"])
def test_constant_rows_that_float16_holds_are_exact(dtype, clip):
    x = np.repeat(np.array([[1.0], [-0.75], [0.0], [1000.0]], np.float32), 9, axis=1)
    codec, codes = fit("scalar", x, dtype=dtype, clip=clip)
    assert codec.decode(codes).tolist() == x.tolist()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_constant_rows_keep_float16_precision(dtype):
    x = np.repeat(np.array([[1 / 3], [-np.pi]], np.float32), 9, axis=1)
    codec, codes = fit("scalar", x, dtype=dtype)
    assert np.allclose(codec.decode(codes), x, rtol=2.0**-10)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_blocks_do_not_cross_rows_and_the_last_may_be_short(dtype):
    """A huge value spoils its own block and no other, and a block of zeros is zeros."""
    x = normal(4, 10)
    x[1, 9] = 1000
    x[2, :4] = 0
    parameters = {"dtype": dtype, "granularity": "block", "block_size": 4, "clip": "minmax"}
    codec, codes = fit("scalar", x, **parameters)
    decoded = codec.decode(codes)
    spoiled = x.copy()
    spoiled[1, 9] = x[1, 8]
    calm, calm_codes = fit("scalar", spoiled, **parameters)
    same = calm.decode(calm_codes)
    assert np.allclose(decoded[0], same[0], rtol=1e-3, atol=1e-3)
    assert np.allclose(decoded[2:], same[2:], rtol=1e-3, atol=1e-3)
    assert np.allclose(decoded[1, :8], same[1, :8], rtol=1e-3, atol=1e-3)
    assert decoded[2, :4].tolist() == [0, 0, 0, 0]


BLOCK_FIGURES = [
    (0.00846, {"dtype": "nf4", "block_size": 64}),
    (0.0116, {"dtype": "int4", "block_size": 64, "symmetric": True}),
    (0.00804, {"dtype": "int4", "block_size": 64}),
    (2.86e-5, {"dtype": "int8", "block_size": 32, "symmetric": True}),
]


@pytest.mark.parametrize(("figure", "parameters"), BLOCK_FIGURES)
def test_block_formats_reach_the_figures(figure, parameters):
    x = normal(1000, 256)
    full, searched = (fit_error("scalar", x, granularity="block", clip=c, **parameters) for c in ("minmax", "mse"))
    assert full == pytest.approx(figure, rel=0.02)
    assert searched <= full


def test_four_bits_in_blocks_of_32_are_not_worse_than_q4_0():
    """That format has the largest value as its lowest level, -8, whatever its sign."""
    error = fit_error("scalar", normal(1000, 256), dtype="int4", granularity="block", block_size=32, symmetric=True)
    assert error <= 0.00739


@pytest.mark.parametrize(("dtype", "bytes_"), [("nf4", 64), ("int4", 64), ("int8", 128)])
def test_scales_of_one_byte_cost_little_error(dtype, bytes_):
    """A byte less a block; without a sign, and off by a thirtieth, which the outer ones of even levels feel most."""
    parameters = {"dtype": dtype, "granularity": "block", "block_size": 32, "symmetric": True}
    wide, narrow = (fit("scalar", normal(500, 128), scale_dtype=s, **parameters)[0] for s in ("float16", "float8"))
    assert (wide.row_bytes, narrow.row_bytes) == (bytes_ + 8, bytes_ + 4)
    assert narrow.relative_error <= (1.04 if dtype == "nf4" else 1.17) * wide.relative_error


def test_scales_of_one_byte_need_levels_around_zero():
    with pytest.raises(ValueError, match="symmetric=True"):
        fit("scalar", normal(5, 4), dtype="int4", scale_dtype="float8")


FLOAT_LEVELS = {
    "float4": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "nf4": [
        *(-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1),
    ],
}


def test_float4_and_nf4_have_the_published_levels():
    for dtype, levels in FLOAT_LEVELS.items():
        table = fit("scalar", normal(5, 4), dtype=dtype)[0].tensors()["levels"]
        assert np.unique(np.abs(table) if dtype == "float4" else table) == pytest.approx(np.array(levels), abs=1e-6)


def test_float8_has_the_levels_of_e4m3():
    """Against torch's own type where it is there; all ones are zero here, because every code can be read."""
    table = fit("scalar", normal(5, 4), dtype="float8")[0].tensors()["levels"]
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    expected = np.where(codes >= 128, -magnitude, magnitude)
    expected[[127, 255]] = 0
    assert np.array_equal(table, expected.astype(np.float32))
    assert table.max() == 448


@pytest.mark.parametrize("granularity", ["row", "block", "column"])
def test_float8_errs_by_a_sixteenth_of_each_value(granularity):
    x = normal(200, 64)
    codec, codes = fit("scalar", x, dtype="float8", granularity=granularity, block_size=16)
    reach = np.abs(x).max()
    assert (np.abs(x - codec.decode(codes)) <= np.abs(x) / 16 * 1.002 + reach / 448 * 2.0**-9).all()
    assert 4e-4 < codec.relative_error < 7e-4


def test_values_on_levels_are_kept():
    for dtype, levels in FLOAT_LEVELS.items():
        x = np.array([levels + [-level for level in levels if dtype == "float4"]], np.float32) * 4
        codec, codes = fit("scalar", x, dtype=dtype)
        assert np.allclose(codec.decode(codes), x, atol=1e-6)


# ---- A2: levels of a row's own -------------------------------------------------------------------------------------


def test_levels_of_a_rows_own_are_the_best_sixteen():
    x = normal(20, 48)
    codec, codes = fit("scalar", x, dtype="free4")
    assert codec.row_bytes == 24 + 32
    for row, decoded in zip(x, codec.decode(codes), strict=True):
        levels = reference.best_levels(row, 16)
        nearest = levels[np.abs(row[:, None] - levels).argmin(axis=1)]
        assert ((row - decoded) ** 2).sum() <= 1.001 * ((row - nearest) ** 2).sum() + 1e-9


def test_levels_of_a_rows_own_beat_even_ones():
    """At 256 values 32 bytes of levels cost an eighth of what the codes take, and save a third of the error."""
    x = normal(300, 256)
    assert fit_error("scalar", x, dtype="free4") < 0.85 * fit_error("scalar", x, dtype="int4")


def test_rows_of_sixteen_values_are_kept_as_float16():
    x = normal(50, 16)
    codec, codes = fit("scalar", x, dtype="free4")
    assert np.allclose(codec.decode(codes), x, rtol=2.0**-10, atol=1e-6)


# ---- A4, A5: rotation and the levels of the normal distribution ----------------------------------------------------

ROTATED_FIGURES = {1: 0.362, 2: 0.115, 3: 0.0334, 4: 0.0091}

AS_THEY_ARE = {"center": False, "rotation": None}
"""Rows that are normal already."""


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_those_of_lloyd_and_max(bits):
    table = fit("rotated", normal(5, 8), n_bits=bits, **AS_THEY_ARE)[0].tensors()["levels"]
    assert np.array_equal(table, reference.normal_levels(bits))
    if bits in LLOYD_MAX_LEVELS:
        assert table[2 ** (bits - 1) :] == pytest.approx(LLOYD_MAX_LEVELS[bits], abs=1e-5)


@pytest.mark.parametrize("bits", ROTATED_FIGURES)
def test_normal_rows_reach_the_figures(bits):
    """The figures have levels for the row's norm and then a scale; going on from there saves up to a seventh."""
    x = normal(2000, 128)
    for parameters in (AS_THEY_ARE, {"center": False}, {}):
        assert 0.84 <= fit_error("rotated", x, n_bits=bits, **parameters) / ROTATED_FIGURES[bits] <= 1.02


@pytest.mark.parametrize("bits", ROTATED_FIGURES)
@pytest.mark.parametrize("dim", [128, 100])
@pytest.mark.parametrize("rotation", ["random", "dense"])
def test_any_rows_err_like_normal_ones_after_a_rotation(bits, dim, rotation):
    """Rows with one value, and rows with a few large ones."""
    rng = np.random.default_rng(0)
    spiky = normal(500, dim) * np.where(rng.random((500, dim)) < 0.03, 30, 1).astype(np.float32)
    parameters = {"n_bits": bits, "center": False, "rotation": rotation}
    expected = fit_error("rotated", normal(500, dim), **parameters)
    for x in (np.eye(dim, dtype=np.float32), spiky):
        errors = [_core.fit("rotated", parameters, x, seed=seed)[0].relative_error for seed in range(4)]
        assert np.mean(errors) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dim", [16, 768])
def test_two_bits_reach_the_figures_at_other_widths(dim):
    figure = {16: 0.0998, 768: 0.1174}[dim]
    assert fit_error("rotated", normal(40_000 // dim + 500, dim), n_bits=2, **AS_THEY_ARE) <= 1.02 * figure


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_scales_have_the_least_squared_error(bits):
    x = normal(100, 40)
    codec, codes = fit("rotated", x, n_bits=bits, **AS_THEY_ARE)
    decoded = codec.decode(codes).astype(np.float64)
    best = (x * decoded).sum(axis=1) / (decoded**2).sum(axis=1)
    assert best == pytest.approx(np.ones(100), abs=1e-3)


@pytest.mark.parametrize("bits", [1, 3])
def test_the_reference_chooses_the_same_levels(bits):
    x = normal(200, 24)
    codec, codes = fit("rotated", x, n_bits=bits, **AS_THEY_ARE)
    places, _ = reference.encode_rotated(x, codec.tensors()["levels"])
    same = (reference.unpack_bits(codes, bits, 24) == places).mean()
    assert same > 0.995


def test_one_bit_is_the_sign_and_its_projection():
    """RaBitQ at one bit with the scale of least squares: ‖y‖⟨ō, o⟩ along the signs."""
    x = normal(100, 64)
    codec, codes = fit("rotated", x, n_bits=1, **AS_THEY_ARE)
    signs = np.where(x >= 0, 1, -1)
    expected = np.abs(x).mean(axis=1, keepdims=True) * signs
    assert np.allclose(codec.decode(codes), expected, rtol=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unbiased_rows_project_on_their_own_rows(bits):
    """The part of a decoded row along the row is the row itself, so that what is left has no direction on average."""
    x = normal(200, 96)
    codec, codes = fit("rotated", x, n_bits=bits, estimator="unbiased", **AS_THEY_ARE)
    share = (x * codec.decode(codes)).sum(axis=1, dtype=np.float64) / (x.astype(np.float64) ** 2).sum(axis=1)
    assert share == pytest.approx(np.ones(200), abs=1e-3)
    squares = fit("rotated", x, n_bits=bits, **AS_THEY_ARE)[0].relative_error
    assert codec.relative_error == pytest.approx(squares / (1 - squares), rel=0.03)


def test_unbiased_inner_products_are_right_on_average_over_rotations():
    """The mean over 2000 rotations lies within four standard errors of the truth; with least squares it falls short."""
    rng = np.random.default_rng(0)
    row, query = rng.normal(size=(2, 32))
    query += row
    turns = np.linalg.qr(rng.normal(size=(2000, 32, 32)))[0] * np.sign(rng.normal(size=(2000, 1, 32)))
    turned, queries = (np.ascontiguousarray(turns @ v, dtype=np.float32) for v in (row, query))
    errors = {}
    for estimator in ("unbiased", "squares"):
        codec, codes = fit("rotated", turned, n_bits=1, estimator=estimator, **AS_THEY_ARE)
        products = (codec.decode(codes) * queries).sum(axis=1, dtype=np.float64)
        errors[estimator] = (products.mean() - row @ query) / (products.std() / np.sqrt(2000))
    assert abs(errors["unbiased"]) < 4
    assert errors["squares"] < -20


def test_a_scale_of_one_byte_is_better_for_short_rows():
    x = normal(2000, 16)
    wide, narrow = (fit("rotated", x, n_bits=3, scale_dtype=s, **AS_THEY_ARE)[0] for s in ("float16", "float8"))
    assert (wide.row_bytes, narrow.row_bytes) == (8, 7)
    assert narrow.relative_error < 1.03 * wide.relative_error


# ---- A16: magnitude pruning ----------------------------------------------------------------------------------------

# Of normal values, with as many kept in each row: less than where one bar stands for all rows.
SPARSE_FIGURES = {0.75: 0.0083, 0.5: 0.0713, 0.25: 0.276, 0.1: 0.561}


@pytest.mark.parametrize("density", SPARSE_FIGURES)
def test_pruned_rows_lose_the_energy_of_their_small_values(density):
    x = normal(1000, 400)
    error = fit_error("sparse", x, density=density, dtype="float32")
    assert error == pytest.approx(SPARSE_FIGURES[density], rel=0.05)
    ordered = np.sort(x.astype(np.float64) ** 2, axis=1)[:, : 400 - round(density * 400)]
    assert error == pytest.approx(ordered.sum() / (x.astype(np.float64) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_pruning_keeps_the_largest_values_untouched(density):
    x = normal(100, 70)
    codec, codes = fit("sparse", x, density=density, dtype="float32")
    decoded, kept = codec.decode(codes), round(density * 70)
    assert ((decoded != 0).sum(axis=1) == kept).all()
    assert np.array_equal(decoded[decoded != 0], x[decoded != 0])
    bar = np.sort(np.abs(x), axis=1)[:, 70 - kept]
    assert (np.abs(x) >= bar[:, None])[decoded != 0].all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_kept_values_are_rounded_to_their_type(dtype):
    x = normal(100, 70)
    codec, codes = fit("sparse", x, density=0.3, dtype=dtype)
    decoded = codec.decode(codes)
    kept = decoded != 0
    slack = np.abs(x).max(axis=1, keepdims=True) / 254 * 1.001 if dtype == "int8" else np.abs(x) * 2.0**-11
    assert kept.sum() >= 0.99 * 100 * 21
    assert (np.abs(decoded - x) <= slack)[kept].all()


def test_columns_are_written_in_the_shorter_way():
    for density, places, bytes_ in ((0.5, "bitmap", 32), (0.05, "columns", 13)):
        codec, _ = fit("sparse", normal(5, 256), density=density)
        assert json.loads(codec.description())["places"] == places
        assert codec.row_bytes == bytes_ + 2 * round(256 * density)


def test_equal_magnitudes_keep_the_lowest_columns_and_zeros_stay_zero():
    x = np.array([[1, -1, 1, -1], [0, 0, 0, 0]], np.float32)
    codec, codes = fit("sparse", x, density=0.5)
    assert codec.decode(codes).tolist() == [[1, -1, 0, 0], [0, 0, 0, 0]]


# ---- A17: de-duplication -------------------------------------------------------------------------------------------


def planted(n_kept: int, copies: int, dim: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows in random order that repeat some, but for noise of at most that much; and which one each repeats."""
    rng = np.random.default_rng(0)
    source = rng.permutation(np.repeat(np.arange(n_kept), copies))
    x = normal(n_kept, dim)[source]
    return (x + rng.uniform(-noise, noise, size=x.shape)).astype(np.float32), source


def test_repeated_rows_are_stored_once_and_nothing_is_lost():
    x, _ = planted(100, 7, 24)
    codec, codes = fit("deduplicating", x)
    assert codec.books()[0].shape == (100, 24)
    assert codes.shape == (700, 1)
    assert np.array_equal(codec.decode(codes), x)
    assert np.array_equal(codec.encode(codec.decode(codes)), codes)


@pytest.mark.parametrize("dim", [1, 3, 24, 200])
def test_nearly_equal_rows_are_found(dim):
    """Copies differ by less than the tolerance; different rows by more, unless they are short."""
    x, source = planted(200, 5, dim, noise=0.01)
    codec, codes = fit("deduplicating", x, tolerance=0.02)
    decoded = codec.decode(codes)
    assert (np.abs(decoded.astype(np.float64) - x) <= 0.02).all()
    assert len(codec.books()[0]) <= 200
    if dim > 3:
        assert len(codec.books()[0]) == 200
        assert [len(set(codes[source == k, 0].tolist())) for k in range(200)] == [1] * 200


def test_deduplicating_twice_changes_nothing():
    x = np.random.default_rng(0).uniform(size=(2000, 2)).astype(np.float32)
    codec, codes = fit("deduplicating", x, tolerance=0.05)
    decoded = codec.decode(codes)
    again, codes_again = fit("deduplicating", decoded, tolerance=0.05)
    assert 20 < len(codec.books()[0]) < 500
    assert np.array_equal(again.decode(codes_again), decoded)


def test_a_row_is_never_replaced_through_another_one():
    """Steps of a little less than the tolerance: a chain of replacements would end far away."""
    x = (np.arange(100, dtype=np.float32) * 0.9)[:, None].repeat(4, axis=1)
    codec, codes = fit("deduplicating", x, tolerance=1.0)
    assert np.abs(codec.decode(codes) - x).max() <= 1
    assert len(codec.books()[0]) >= 34


def test_rows_without_weight_are_not_kept():
    x, source = planted(50, 3, 6)
    codec, codes = _core.fit("deduplicating", {}, x, sample_weight=(source < 20).astype(np.float64))
    assert codec.books()[0].shape == (20, 6)
    assert np.array_equal(codec.decode(codes)[source < 20], x[source < 20])


def test_new_rows_become_the_nearest_kept_row():
    x, _ = planted(50, 3, 6)
    codec, _ = fit("deduplicating", x)
    new = normal(40, 6, seed=5)
    assert (
        reference.unpack_bits(codec.encode(new), 6, 1)[:, 0].tolist()
        == reference.encode_kmeans(new, codec.books()[0]).tolist()
    )


# ---- A8: k-means ---------------------------------------------------------------------------------------------------


def test_inertia_never_increases():
    x = normal(2000, 8)
    init = x[:40].copy()
    inertias = [kmeans(x, init, max_iter=n)[2] for n in range(1, 15)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(inertias))
    assert inertias[-1] < 0.95 * inertias[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_each_centre_is_the_mean_of_its_rows(weighted):
    x = normal(500, 4)
    weights = np.random.default_rng(1).uniform(0.5, 3, size=500) if weighted else None
    centers, labels, inertia, _, _ = kmeans(x, x[:10].copy(), sample_weight=weights)
    used = np.ones(500) if weights is None else weights
    means = [np.average(x[labels == k], axis=0, weights=used[labels == k]) for k in range(10)]
    assert np.allclose(centers, means, atol=1e-5)
    assert inertia == pytest.approx((used * squared_error(x, centers[labels])).sum(), rel=1e-5)


@pytest.mark.parametrize("kind", ["kmeans", "product", "residual"])
def test_enough_entries_for_the_distinct_rows_are_exact(kind):
    x = normal(6, 4)[np.random.default_rng(0).integers(0, 6, size=50)]
    parameters = {"kmeans": {"n_clusters": 8}, "product": {"n_subvectors": 2, "n_bits": 3}}
    options = parameters.get(kind, {"n_stages": 1, "n_bits": 3})
    codec, codes = fit(kind, x, codebook_dtype="float32", **options)
    assert np.allclose(codec.decode(codes), x, rtol=1e-6, atol=1e-7)
    assert codec.relative_error < 1e-12


@pytest.mark.parametrize("shape", [(1000, 2, 7), (500, 17, 33), (300, 130, 65)])
def test_labels_are_the_nearest_centres(shape):
    n_rows, dim, n_clusters = shape
    x, centers = normal(n_rows, dim), normal(n_clusters, dim, seed=1)
    labels, distances = _core.kmeans_predict(x, centers, "euclidean")
    assert labels.tolist() == reference.encode_kmeans(x, centers).tolist()
    assert np.allclose(distances, squared_error(x, centers[labels]), rtol=1e-4)


def test_equally_near_centres_go_to_the_lowest_index():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, size=(500, 3)).astype(np.float32)
    centers = rng.integers(-3, 4, size=(40, 3)).astype(np.float32)
    labels, _ = _core.kmeans_predict(x, centers, "euclidean")
    assert labels.tolist() == reference.encode_kmeans(x, centers).tolist()


def test_permuting_rows_permutes_labels_only():
    x = normal(400, 5)
    order = np.random.default_rng(1).permutation(400)
    centers, labels, *_ = kmeans(x, x[:8].copy())
    permuted_centers, permuted_labels, *_ = kmeans(x[order], x[:8].copy())
    assert np.allclose(centers, permuted_centers, atol=1e-5)
    assert labels[order].tolist() == permuted_labels.tolist()


@pytest.mark.parametrize(("factor", "shift"), [(4.0, 0.0), (1.0, 8.0), (0.5, -3.0)])
def test_scaling_and_shifting_move_the_centres_alike(factor, shift):
    x = normal(400, 5)
    centers, labels, *_ = kmeans(x, x[:8].copy())
    moved = (x * factor + shift).astype(np.float32)
    moved_centers, moved_labels, *_ = kmeans(moved, moved[:8].copy())
    assert np.allclose(moved_centers, centers * factor + shift, atol=1e-4)
    assert (labels == moved_labels).mean() > 0.99


def test_integer_weights_are_repeated_rows():
    x = normal(300, 4)
    counts = np.random.default_rng(0).integers(0, 4, size=300)
    init = x[:8].copy()
    weighted = kmeans(x, init, sample_weight=counts.astype(np.float64))
    repeated = kmeans(np.repeat(x, counts, axis=0), init)
    assert np.allclose(weighted[0], repeated[0], atol=1e-5)
    assert weighted[2] == pytest.approx(repeated[2], rel=1e-6)
    assert np.repeat(weighted[1], counts).tolist() == repeated[1].tolist()


@pytest.mark.parametrize("kind", ["kmeans", "product", "residual"])
def test_weights_count_in_the_error(kind):
    """Rows that are looked up often are kept better than without weights."""
    x = normal(2000, 8)
    weights = np.where(np.arange(2000) < 200, 50.0, 1.0)
    parameters = {"kmeans": {"n_clusters": 32}, "product": {"n_subvectors": 4, "n_bits": 3}}
    options = parameters.get(kind, {"n_stages": 2, "n_bits": 4})
    errors = []
    for sample_weight in (None, weights):
        codec, codes = _core.fit(kind, options, x, sample_weight=sample_weight)
        errors.append((weights * squared_error(x, codec.decode(codes))).sum())
    assert errors[1] < 0.97 * errors[0]


def test_empty_clusters_are_filled():
    x = normal(200, 3)
    init = np.concatenate([x[:5], np.full((3, 3), 1e6, np.float32)])
    _, labels, inertia, _, _ = kmeans(x, init)
    assert set(labels.tolist()) == set(range(8))
    assert inertia < kmeans(x, x[:5].copy())[2]


def test_seeding_spreads_over_separated_clusters():
    """Distances so large that k-means++ misses a cluster with a chance of about one in a million."""
    middle = 1000.0 * np.arange(20)[:, None] * np.array([1.0, -1.0])
    x = (np.repeat(middle, 30, axis=0) + np.random.default_rng(0).normal(size=(600, 2))).astype(np.float32)
    for seed in range(5):
        _, labels, inertia, _, _ = _core.kmeans_fit(x, 20, seed=seed)
        assert inertia < 3 * 1200
        assert all(len(set(labels[start : start + 30].tolist())) == 1 for start in range(0, 600, 30))


def test_cosine_clusters_ignore_the_length_of_rows():
    x = normal(500, 6)
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(500, 1)).astype(np.float32)
    centers, labels, *_ = kmeans(x, x[:8].copy(), metric="cosine")
    _, scaled_labels, *_ = kmeans(x * lengths, x[:8].copy(), metric="cosine")
    assert (labels == scaled_labels).mean() > 0.98
    cosine = (x @ centers.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(centers, axis=1)
    assert labels.tolist() == cosine.argmax(axis=1).tolist()


def test_mini_batches_come_near_full_iterations():
    x = normal(20_000, 4)
    full = _core.kmeans_fit(x, 32, seed=0)[2]
    assert _core.kmeans_fit(x, 32, seed=0, batch_size=1024, max_iter=50)[2] < 1.1 * full


def test_kmeans_bytes_are_those_of_the_formula():
    codec, codes = fit("kmeans", normal(100, 6), n_clusters=33)
    assert codes.shape == (100, 1)  # 6 bits
    assert [(t.dtype, t.shape) for t in codec.tensors().values()] == [(np.float16, (1, 64, 6))]


# ---- A10: product quantization -------------------------------------------------------------------------------------


def test_one_part_is_kmeans():
    x = normal(500, 6)
    flat, product = fit("kmeans", x, n_clusters=32), fit("product", x, n_subvectors=1, n_bits=5)
    assert np.array_equal(flat[0].decode(flat[1]), product[0].decode(product[1]))


def test_each_part_is_kmeans_on_its_columns():
    """So parts are optimal independently of each other, and with one column each are scalar quantizers."""
    x = normal(500, 5)
    for n_subvectors, starts in ((2, [0, 3, 5]), (5, [0, 1, 2, 3, 4, 5])):
        codec, codes = _core.fit("product", {"n_subvectors": n_subvectors, "n_bits": 3}, x, seed=10)
        decoded = codec.decode(codes)
        for part, (start, stop) in enumerate(itertools.pairwise(starts)):
            columns = np.ascontiguousarray(x[:, start:stop])
            alone, alone_codes = _core.fit("kmeans", {"n_clusters": 8}, columns, seed=10 + part)
            assert np.allclose(alone.decode(alone_codes), decoded[:, start:stop], rtol=1e-3, atol=1e-4)


def test_error_is_the_sum_of_the_errors_of_the_parts():
    x = normal(500, 7)
    codec, codes = fit("product", x, n_subvectors=3, n_bits=4)
    parts = zip(np.split(x, [3, 5], axis=1), np.split(codec.decode(codes), [3, 5], axis=1), strict=True)
    total = sum(squared_error(part, decoded).sum() for part, decoded in parts)
    assert codec.relative_error * (x.astype(np.float64) ** 2).sum() == pytest.approx(total, rel=1e-6)


def test_uneven_dimensions_differ_by_one_column():
    widths = [book.shape[1] for book in fit("product", normal(50, 11), n_subvectors=4, n_bits=2)[0].books()]
    assert widths == [3, 3, 3, 2]


def test_one_entry_is_the_mean():
    x = normal(100, 5) + 3
    codec, codes = fit("kmeans", x, n_clusters=1, codebook_dtype="float32")
    assert np.allclose(codec.decode(codes), x.mean(axis=0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "figure"), [(2, 0.00755), (4, 0.0950), (8, 0.313)])
def test_256_entries_for_normal_parts_reach_the_figures(width, figure):
    """At width 2, k-means from random rows instead of k-means++ ends at .0084."""
    x = normal(65_536, width)
    error = fit_error("product", x, n_subvectors=1, n_bits=8, max_iter=50, tol=0.0)
    assert error == pytest.approx(figure, rel=0.02)


def test_float16_codebooks_cost_nothing():
    x = normal(2000, 8)
    half, single = (fit_error("product", x, n_subvectors=2, codebook_dtype=dtype) for dtype in ("float16", "float32"))
    assert half == pytest.approx(single, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "parameters", "books"),
    [
        ("kmeans", {"n_clusters": 64}, 1),
        ("product", {"n_subvectors": 3, "n_bits": 6}, 3),
        ("residual", {"n_stages": 3, "n_bits": 5}, 3),
    ],
)
def test_integer_codebooks_take_a_byte_a_value_and_cost_little_error(kind, parameters, books):
    x = normal(3000, 10) * np.array([10.0] * 4 + [1.0] * 6, np.float32)
    half, byte = (fit(kind, x, codebook_dtype=dtype, **parameters)[0] for dtype in ("float16", "int8"))
    assert byte.relative_error == pytest.approx(half.relative_error, rel=0.02)
    sizes = [sum(tensor.nbytes for tensor in codec.tensors().values()) for codec in (half, byte)]
    assert sizes[1] == sizes[0] / 2 + 4 * books
    for book, scale in zip(byte.books(), byte.tensors()["scales"], strict=True):
        integers = book.astype(np.float64) / scale
        assert np.array_equal(integers, np.rint(integers))
        assert np.abs(integers).max() == 127


def test_product_bytes_are_those_of_the_formula():
    codec, codes = fit("product", normal(300, 10), n_subvectors=5, n_bits=3)
    assert codes.shape == (300, 2)  # 15 bits
    assert sum(tensor.nbytes for tensor in codec.tensors().values()) == 2 * 8 * 10


# ---- A12: residual quantization ------------------------------------------------------------------------------------


def test_one_stage_is_kmeans():
    x = normal(500, 6)
    flat = fit("kmeans", x, n_clusters=32)
    residual = fit("residual", x, n_stages=1, n_bits=5, n_refinements=0)
    assert np.array_equal(flat[0].decode(flat[1]), residual[0].decode(residual[1]))


def test_a_beam_of_one_is_greedy():
    x = normal(300, 6)
    codec, codes = fit("residual", x, n_stages=4, n_bits=3, beam_width=1)
    greedy = reference.encode_residual(x, codec.books(), beam_width=1)
    assert np.array_equal(reference.unpack_bits(codes, 3, 4), greedy)


def with_beam(codec: _core.Codec, beam_width: int) -> _core.Codec:
    """The same codebooks, searched with another beam."""
    description, tensors = codec.to_parts()
    old = f'"beam_width":{codec.parameters["beam_width"]}'
    assert description.replace(" ", "").count(old) == 1
    return _core.Codec.from_parts(description.replace(" ", "").replace(old, f'"beam_width":{beam_width}'), tensors)


def test_wider_beams_and_more_stages_are_never_worse():
    x = normal(500, 8)
    codec, _ = fit("residual", x, n_stages=4, n_bits=4, beam_width=8)
    errors = [
        squared_error(x, coder.decode(coder.encode(x))).sum()
        for coder in (with_beam(codec, b) for b in (1, 2, 4, 8, 16, 64))
    ]
    assert all(wider <= narrower * 1.0005 for narrower, wider in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]
    stages = [fit_error("residual", x, n_stages=n, n_bits=4) for n in (1, 2, 3, 4)]
    assert all(more < fewer for fewer, more in itertools.pairwise(stages))


def test_a_beam_of_all_partial_codes_is_exact():
    x = normal(200, 5)
    codec, _ = fit("residual", x, n_stages=3, n_bits=2, beam_width=1)
    every_code = reference.pack_bits(np.array(list(itertools.product(range(4), repeat=3))), bits=2)
    sums = codec.decode(every_code)
    best = ((x[:, None].astype(np.float64) - sums) ** 2).sum(axis=2).min(axis=1)
    exact = with_beam(codec, 16)
    assert np.allclose(squared_error(x, exact.decode(exact.encode(x))), best, rtol=1e-4, atol=1e-5)


def test_refinement_never_raises_the_error():
    x = normal(1000, 8)
    errors = []
    for rounds in range(5):
        parameters = {"n_stages": 3, "n_bits": 4, "n_refinements": rounds, "codebook_dtype": "float32"}
        codec, _ = _core.fit("residual", parameters, x, keep_better_codes=True)
        errors.append(codec.relative_error)
    assert all(later <= earlier * 1.0001 for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.98 * errors[0]


@pytest.mark.parametrize("factor", [2.0**-1000, 2.0**-170, 2.0**200, 2.0**800])
def test_refinement_takes_weights_of_any_magnitude(factor):
    x, weights = normal(500, 8), np.random.default_rng(1).random(500)
    parameters = {"n_stages": 3, "n_bits": 3}
    codes = [_core.fit("residual", parameters, x, sample_weight=w)[1] for w in (weights, factor * weights)]
    assert np.array_equal(*codes)


def test_the_first_codes_are_a_coarser_code():
    """Codes of the first stages alone err more with each stage left out, and less than the mean row."""
    x = normal(1000, 8)
    codec, codes = fit("residual", x, n_stages=4, n_bits=4, n_refinements=0)
    fields, books = reference.unpack_bits(codes, 4, 4), codec.books()
    prefixes = [sum(book[fields[:, m]] for m, book in enumerate(books[:count])) for count in (1, 2, 3, 4)]
    errors = [squared_error(x, prefix).sum() for prefix in prefixes]
    assert errors[0] < (x.astype(np.float64) ** 2).sum()
    assert all(more < fewer for fewer, more in itertools.pairwise(errors))


def test_residual_bytes_are_those_of_the_formula():
    codec, codes = fit("residual", normal(300, 10), n_stages=5, n_bits=3)
    assert codes.shape == (300, 2)  # 15 bits
    assert sum(tensor.nbytes for tensor in codec.tensors().values()) == 2 * 5 * 8 * 10


# ---- A14: additive quantization ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_codebooks", "n_bits"), [(2, 4), (4, 3), (3, 5)])
def test_additive_is_never_above_residual(n_codebooks, n_bits):
    x = normal(1500, 8)
    residual = fit_error("residual", x, n_stages=n_codebooks, n_bits=n_bits)
    assert fit_error("additive", x, n_codebooks=n_codebooks, n_bits=n_bits) < residual


@pytest.mark.parametrize("n_rounds", [0, 1, 5])
def test_additive_codes_of_a_fit_are_never_above_those_of_residual(n_rounds):
    """Even where the rounds are too few for the noise to fall, and on few rows."""
    for x in (normal(40, 3), normal(700, 8)):
        parameters = {"n_bits": 3, "codebook_dtype": "float32"}
        start, _ = _core.fit("residual", parameters | {"n_stages": 3}, x, keep_better_codes=True)
        codec, _ = _core.fit(
            "additive", parameters | {"n_codebooks": 3, "n_rounds": n_rounds, "noise": 3.0}, x, keep_better_codes=True
        )
        assert codec.relative_error <= start.relative_error * (1 + 1e-6)


def test_more_rounds_lower_the_error():
    x = normal(2000, 8)
    errors = [fit_error("additive", x, n_codebooks=4, n_bits=4, n_rounds=n) for n in (0, 5, 25)]
    assert errors[0] > 1.01 * errors[1] > 1.01 * errors[2]


def with_searches(codec: _core.Codec, n_searches: int) -> _core.Codec:
    """The same codebooks, searched another number of times."""
    description, tensors = codec.to_parts()
    parts = json.loads(description)
    parts["parameters"]["n_searches"] = n_searches
    return _core.Codec.from_parts(json.dumps(parts), tensors)


def test_more_searches_never_raise_a_row_s_error():
    """A search is kept only where it is better, so that each longer one goes on from a shorter one."""
    x = normal(500, 8)
    codec, _ = fit("additive", x, n_codebooks=4, n_bits=4)
    coders = [with_searches(codec, n) for n in (0, 1, 4, 16)]
    errors = [squared_error(x, coder.decode(coder.encode(x))) for coder in coders]
    for fewer, more in itertools.pairwise(errors):
        # The search knows products of entries to half precision.
        assert (more <= fewer + 2e-3 * (x**2).sum(axis=1)).all()
        assert more.sum() < fewer.sum()


def test_without_searches_codes_are_minima():
    """No change of a single entry lowers a row's error, up to the precision of the tables."""
    x = normal(300, 6)
    codec, codes = fit("additive", x, n_codebooks=3, n_bits=3, n_searches=0)
    books, fields = codec.books(), reference.unpack_bits(codes, 3, 3)
    own = squared_error(x, codec.decode(codes))
    for m, book in enumerate(books):
        others = sum(books[j][fields[:, j]] for j in range(3) if j != m)
        changed = ((x[:, None] - others[:, None] - book) ** 2).sum(axis=2)
        assert (own <= changed.min(axis=1) + 2e-3 * (x**2).sum(axis=1)).all()


@pytest.mark.parametrize(("n_codebooks", "n_bits"), [(2, 2), (3, 2)])
def test_the_search_finds_the_best_of_all_codes(n_codebooks, n_bits):
    x = normal(400, 5)
    codec, codes = fit("additive", x, n_codebooks=n_codebooks, n_bits=n_bits)
    every = np.array(list(itertools.product(range(2**n_bits), repeat=n_codebooks)))
    sums = codec.decode(reference.pack_bits(every, bits=n_bits))
    best = ((x[:, None].astype(np.float64) - sums) ** 2).sum(axis=2).min(axis=1)
    found = squared_error(x, codec.decode(codes))
    assert np.mean(found <= best * 1.001 + 1e-5) > 0.97


def test_the_order_of_codebooks_is_irrelevant():
    """Books exchanged in the decoder give the same errors, but for rows that end in another minimum."""
    x = normal(500, 6)
    codec, _ = fit("additive", x, n_codebooks=3, n_bits=3, codebook_dtype="float32")
    description, tensors = codec.to_parts()
    backwards = {name: np.ascontiguousarray(tensor[::-1]) for name, tensor in tensors.items()}
    turned = _core.Codec.from_parts(description, backwards)
    ours, theirs = (squared_error(x, c.decode(c.encode(x))) for c in (codec, turned))
    assert np.mean(np.isclose(ours, theirs, rtol=1e-4)) > 0.9
    assert theirs.sum() == pytest.approx(ours.sum(), rel=2e-2)


@pytest.mark.parametrize("factor", [2.0**-1000, 2.0**200, 2.0**800])
def test_additive_takes_weights_of_any_magnitude(factor):
    x, weights = normal(400, 8), np.random.default_rng(1).random(400)
    parameters = {"n_codebooks": 3, "n_bits": 3, "n_rounds": 4}
    codes = [_core.fit("additive", parameters, x, sample_weight=w)[1] for w in (weights, factor * weights)]
    assert np.array_equal(*codes)


def test_additive_weights_count_in_the_error():
    x, weights = normal(2000, 8), np.where(np.arange(2000) < 200, 50.0, 1.0)
    errors = []
    for sample_weight in (None, weights):
        codec, codes = _core.fit("additive", {"n_codebooks": 2, "n_bits": 4}, x, sample_weight=sample_weight)
        errors.append((weights * squared_error(x, codec.decode(codes))).sum())
    assert errors[1] < 0.97 * errors[0]


def test_additive_bytes_are_those_of_the_formula():
    codec, codes = fit("additive", normal(300, 10), n_codebooks=5, n_bits=3, n_rounds=1)
    assert codes.shape == (300, 2)  # 15 bits
    assert sum(tensor.nbytes for tensor in codec.tensors().values()) == 2 * 5 * 8 * 10


def test_codebooks_whose_tables_would_be_huge_are_refused():
    with pytest.raises(ValueError, match="searched together"):
        fit("additive", normal(20_000, 2), n_codebooks=4, n_bits=14)
    with pytest.raises(ValueError, match="noise"):
        fit("additive", normal(20, 2), noise=-1.0)


# ---- A13: product-residual quantization ----------------------------------------------------------------------------


def test_one_piece_is_residual_quantization():
    x = normal(600, 7)
    residual = fit("residual", x, n_stages=3, n_bits=4)
    both = fit("product-residual", x, n_subvectors=1, n_stages=3, n_bits=4)
    assert np.array_equal(both[1], residual[1])
    assert np.array_equal(both[0].decode(both[1]), residual[0].decode(residual[1]))


def test_one_stage_of_each_piece_is_product_quantization():
    x = normal(600, 7)
    product = fit("product", x, n_subvectors=3, n_bits=4)
    both = fit("product-residual", x, n_subvectors=3, n_stages=1, n_bits=4)
    tensors = [list(codec.tensors().values()) for codec, _ in (both, product)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*tensors, strict=True))
    assert both[0].relative_error == pytest.approx(product[0].relative_error, rel=1e-6)


def test_each_piece_is_residual_quantization_of_its_columns():
    x = normal(500, 5)
    parameters = {"n_stages": 2, "n_bits": 3, "codebook_dtype": "float32"}
    codec, codes = _core.fit("product-residual", parameters | {"n_subvectors": 2}, x, seed=10)
    decoded = codec.decode(codes)
    for part, (start, stop) in enumerate([(0, 3), (3, 5)]):
        columns = np.ascontiguousarray(x[:, start:stop])
        alone, alone_codes = _core.fit("residual", parameters, columns, seed=10 + part)
        assert np.array_equal(alone.decode(alone_codes), decoded[:, start:stop])


def test_pieces_in_stages_lie_between_product_and_residual():
    """At 32 bits a row, with books of 16 entries."""
    x = normal(3000, 16) @ np.random.default_rng(5).normal(size=(16, 16)).astype(np.float32)
    errors = [
        fit_error("product-residual", x, n_subvectors=parts, n_stages=8 // parts, n_bits=4) for parts in (8, 4, 2, 1)
    ]
    assert all(more > fewer for more, fewer in itertools.pairwise(errors)), errors


def test_product_residual_bytes_are_those_of_the_formula():
    codec, codes = fit("product-residual", normal(300, 10), n_subvectors=2, n_stages=3, n_bits=3)
    assert codes.shape == (300, 3)  # 18 bits
    assert sum(tensor.nbytes for tensor in codec.tensors().values()) == 2 * 3 * 8 * 10


# ---- A9: tree-structured quantization ------------------------------------------------------------------------------


def test_a_tree_of_one_level_is_kmeans():
    x = normal(500, 6)
    flat, tree = fit("kmeans", x, n_clusters=32), fit("tree", x, branching=32, depth=1)
    assert np.array_equal(flat[1], tree[1])
    assert np.array_equal(flat[0].decode(flat[1]), tree[0].decode(tree[1]))


def levels_of(leaves: np.ndarray, branching: int, depth: int) -> list[np.ndarray]:
    """For each level below the root its nodes, each the mean of its leaves."""
    return [leaves.reshape(branching**n, -1, leaves.shape[1]).mean(axis=1) for n in range(1, depth + 1)]


def test_each_level_errs_less_than_the_one_above():
    """A prefix of a code is a code of lower rate."""
    x = normal(2000, 5)
    codec, codes = fit("tree", x, branching=4, depth=4, beam_width=8)
    leaves = reference.unpack_bits(codes, 8, 1)[:, 0]
    errors = [
        squared_error(x, nodes[leaves // 4 ** (4 - level)]).sum()
        for level, nodes in enumerate(levels_of(codec.books()[0], 4, 4), start=1)
    ]
    assert all(lower < upper for upper, lower in itertools.pairwise([squared_error(x, x.mean(axis=0)).sum(), *errors]))


def test_a_beam_of_all_nodes_finds_the_nearest_leaf():
    x = normal(600, 5)
    codec, codes = fit("tree", x, branching=4, depth=3, beam_width=16)
    assert reference.unpack_bits(codes, 6, 1)[:, 0].tolist() == reference.encode_kmeans(x, codec.books()[0]).tolist()
    almost = with_beam(codec, 15)
    errors = [squared_error(x, c.decode(c.encode(x))) for c in (codec, almost)]
    assert np.mean(np.isclose(*errors, rtol=1e-5)) > 0.99
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("beam_width", [1, 2, 5])
def test_the_beam_is_that_of_the_reference(beam_width):
    x = normal(500, 6)
    codec, codes = fit("tree", x, branching=4, depth=3, beam_width=beam_width)
    expected = reference.encode_tree(x, codec.books()[0], 4, 3, beam_width)
    assert np.mean(reference.unpack_bits(codes, 6, 1)[:, 0] == expected) > 0.998


def test_wider_beams_of_a_tree_are_never_worse():
    x = normal(1500, 8)
    codec, _ = fit("tree", x, branching=4, depth=4, beam_width=1)
    coders = [with_beam(codec, b) for b in (1, 2, 4, 16, 64)]
    errors = [squared_error(x, coder.decode(coder.encode(x))).sum() for coder in coders]
    assert all(wider <= narrower for narrower, wider in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.9 * errors[0]


def test_a_tree_is_near_the_kmeans_of_as_many_centroids():
    x = normal(8000, 4)
    flat = fit_error("kmeans", x, n_clusters=256)
    assert flat < fit_error("tree", x, branching=16, depth=2, beam_width=16) < 1.12 * flat


def test_tree_weights_count_in_the_error():
    x, weights = normal(2000, 8), np.where(np.arange(2000) < 200, 50.0, 1.0)
    errors = []
    for sample_weight in (None, weights):
        codec, codes = _core.fit("tree", {"branching": 4, "depth": 2}, x, sample_weight=sample_weight)
        errors.append((weights * squared_error(x, codec.decode(codes))).sum())
    assert errors[1] < 0.97 * errors[0]


def test_trees_with_more_leaves_than_rows():
    x = normal(5, 3)
    codec, codes = fit("tree", x, branching=4, depth=3, codebook_dtype="float32")
    assert np.allclose(codec.decode(codes), x, atol=1e-6)
    assert any("fewer than 64 leaves" in note for note in codec.notes)
    with pytest.raises(ValueError, match="depth"):
        fit("tree", x, branching=1000, depth=3)


@pytest.mark.parametrize("dim", [129, 257, 300, 520])
def test_random_rotations_mix_rows_of_any_width(dim):
    """Rows of a single value become like normal ones, also where the width is a little above a power of two."""
    error = fit_error("rotated", np.eye(dim, dtype=np.float32), n_bits=2, center=False)
    assert error == pytest.approx(0.1152, rel=0.05)


def test_moments_do_not_depend_on_the_size_of_the_weights():
    x = normal(400, 6) * np.arange(1, 7, dtype=np.float32)
    weights = np.random.default_rng(1).uniform(0.5, 2, 400)
    errors = [
        _core.fit("low-rank", {"n_components": 3}, x, sample_weight=weights * factor)[0].relative_error
        for factor in (1.0, 2.0**-200, 2.0**200)
    ]
    assert errors[0] == errors[1] == errors[2]
