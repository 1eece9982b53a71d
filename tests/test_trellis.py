"""Trellis coding: the figures that only a right implementation reaches, and the search against a slow one."""

import numpy as np
import pytest

import vqrs
from vqrs import TrellisQuantizer, _core, reference


def normal(n_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_rows, dim)).astype(np.float32)


def relative(x: np.ndarray, decoded: np.ndarray) -> float:
    return float(((x - decoded) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    ("n_bits", "state_bits", "limit"),
    [(2, 12, 0.0720), (2, 16, 0.0710), (2, 8, 0.0775), (1, 12, 0.282), (3, 12, 0.0186), (4, 12, 0.00480)],
)
def test_normal_rows_come_near_the_bound(n_bits, state_bits, limit):
    """Relative error of rows of 128 normal values, all bytes of the row counted; the bound is 4**-n_bits."""
    x = normal(60 if state_bits > 12 else 300, 128)
    quantizer = TrellisQuantizer(n_bits, state_bits=state_bits, random_state=0).fit(x)
    assert quantizer.row_bytes_ == 16 * n_bits
    assert 4.0**-n_bits < quantizer.relative_error_ < limit


@pytest.mark.parametrize(
    ("n_bits", "excess"), [(0.25, 1.13), (0.5, 1.13), (1.5, 1.15), (2.25, 1.15), (6, 1.30), (8, 1.60)]
)
def test_any_number_of_bits(n_bits, excess):
    """Fractions of bits and many of them stay about as near to the bound."""
    x = normal(200, 160)
    error = TrellisQuantizer(n_bits, random_state=0).fit(x).relative_error_
    assert 1.0 < error * 4.0**n_bits < excess


def test_bits_follow_the_variance():
    """Reverse water-filling: D = sum(min(level, variance)), and columns below the level get nothing."""
    deviations = 2.0 ** np.linspace(2, -4, 96)
    x = normal(1500, 96, 1) * deviations
    quantizers = [TrellisQuantizer(1.5, bit_allocation=how, random_state=0).fit(x) for how in ("even", "variance")]
    even, variance = (quantizer.relative_error_ for quantizer in quantizers)
    levels = np.geomspace(1e-4, 20, 4000)
    rates = np.maximum(0, np.log2(deviations[:, None] ** 2 / levels) / 2).sum(axis=0)
    level = levels[np.argmin(np.abs(rates - 96 * 1.5))]
    bound = np.minimum(level, deviations**2).sum() / (deviations**2).sum()
    assert bound < variance < 1.15 * bound < even


def test_short_rows():
    """Streams of few bits: the search tries what stands at the seam. Best levels for each value alone reach 0.117."""
    x = normal(600, 16, 5)
    assert TrellisQuantizer(2, scale_bits=0, random_state=0).fit(x).relative_error_ < 0.088


def test_sizes_of_rows_cost_few_bits():
    """Rows whose scales differ: with them the error is near that of rows of one size, without them it is not."""
    sizes = np.exp(np.random.default_rng(2).normal(0, 0.6, (400, 1)))
    x = normal(400, 64, 3) * sizes
    errors = {
        bits: TrellisQuantizer(4, scale_bits=bits, random_state=0).fit(x).relative_error_ for bits in (0, None, 8)
    }
    assert errors[None] < errors[8] * 1.01 < errors[0]


@pytest.mark.parametrize(
    "parameters",
    [{"n_bits": 2}, {"n_bits": 3, "bit_allocation": "variance"}, {"n_bits": 0.7, "state_bits": 6}],
)
def test_search_is_the_reference(parameters):
    x = normal(12, 100) * 2.0 ** np.linspace(1, -2, 100, dtype=np.float32)
    codec, codes = _core.fit("trellis", {"state_bits": 8, **parameters}, x)
    description, tensors, projected = reference.project(codec.description(), codec.tensors(), x)
    n_bits, scale_bits = reference.trellis_layout(description)[2], description["scale_bits"]
    behind = np.unpackbits(codes, axis=1, bitorder="little")[:, n_bits : n_bits + scale_bits]
    numbers = behind @ (1 << np.arange(scale_bits))
    expected = reference.encode_trellis(projected, description, tensors, numbers)
    ours, theirs = relative(x, codec.decode(codes)), relative(x, codec.decode(expected))
    # The search may have seen another of the scales.
    assert 0.98 * ours < theirs < 1.02 * ours
    if scale_bits == 0:
        assert (codes == expected).mean() > 0.95


def test_any_code_is_a_row():
    """Every byte string decodes, as the reference has it, in every layout."""
    rng = np.random.default_rng(4)
    for n_bits, dim, state_bits in [(2, 7, 12), (0.4, 33, 16), (8, 3, 12), (1.3, 50, 9), (5, 1, 4)]:
        x = rng.normal(size=(30, dim)).astype(np.float32)
        parameters = {"n_bits": n_bits, "state_bits": state_bits, "rotation": None}
        codec, codes = _core.fit("trellis", parameters, x)
        codes = rng.integers(0, 256, size=(200, codes.shape[1]), dtype=np.uint8)
        expected = reference.decode(codec.description(), codec.tensors(), codes)
        assert np.array_equal(codec.decode(codes), expected)


def test_levels_are_fixed_for_ever():
    assert reference.trellis_levels(4, 1).astype(np.float64).round(7).tolist() == LEVELS_4_1
    tables = np.stack([reference.trellis_levels(12, table) for table in range(8)])
    places = np.arange(1, tables.size + 1, dtype=np.uint64).reshape(tables.shape)
    assert int((tables.view(np.uint32) * places).sum(dtype=np.uint64)) == 1144068899925951984


def test_zero_rows_stay_zero():
    x = normal(200, 32)
    x[::3] = 0
    table = vqrs.compress(x, method=TrellisQuantizer(3, center=False, random_state=0))
    assert not table[np.arange(0, 200, 3)].any()


HALF_4_1 = [-1.0099902, 0.4022501, 1.3180109, -0.2372021, -0.5791321, 0.7764218, 0.0784124, -1.8627318]
LEVELS_4_1 = [*HALF_4_1, *(-HALF_4_1[place] for place in (3, 2, 1, 0, 7, 6, 5, 4))]
