"""The plain NumPy version against definitions that are plainer still; test_contract.py compares the core with it."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqrs import reference

singles = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**40), max_value=2.0**40)


def rounded_once(exact: Fraction) -> np.float32:
    """The float32 nearest to an exact number, ties to even, by looking at its neighbours."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    last_bit = [int(value.view(np.uint32)) & 1 for value in around]
    distance = [abs(Fraction(float(value)) - exact) for value in around]
    return min(zip(distance, last_bit, around, strict=True), key=lambda candidate: candidate[:2])[2]


@given(singles, singles, singles)
def test_fused_multiply_add_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert reference.fused_multiply_add(np.float32(a), np.float32(b), np.float32(c)) == rounded_once(exact)


def test_rounding_twice_would_be_wrong():
    """The case for which fused_multiply_add rounds to odd: a level of 8 bits, a scale of a column, an offset of 1."""
    level, scale, offset = np.float32(65), np.float32(16519105 * 2.0**-54), np.float32(1)
    twice = np.float32(float(level) * float(scale) + float(offset))
    once = rounded_once(Fraction(float(level)) * Fraction(float(scale)) + 1)
    assert twice == 1
    assert once == np.float32(1 + 2.0**-23)
    assert reference.fused_multiply_add(level, scale, offset) == once


@given(st.integers(1, 24), st.integers(0, 9), st.integers(1, 3), st.randoms(use_true_random=False))
def test_bits_stand_where_the_format_says(bits, n_fields, n_rows, random):
    fields = [[random.randrange(2**bits) for _ in range(n_fields)] for _ in range(n_rows)]
    n_bytes = -(-n_fields * bits // 8)
    expected = [sum(v << (bits * j) for j, v in enumerate(row)).to_bytes(n_bytes, "little") for row in fields]
    packed = reference.pack_bits(np.array(fields, np.int64).reshape(n_rows, n_fields), bits)
    assert [row.tobytes() for row in packed] == expected
    assert reference.unpack_bits(packed, bits, n_fields).tolist() == fields


def test_decode_takes_json_and_refuses_unknown_forms():
    tensors = {"codebooks.0": np.array([[[1.0], [2.0]]], np.float16)}
    description = {"form": "books", "dim": 1, "bits": 1, "scale": 1.0, "groups": [{"width": 1, "starts": [0]}]}
    assert reference.decode(json.dumps(description), tensors, np.array([[1]], np.uint8)) == [[2.0]]
    with pytest.raises(ValueError, match=r"'cloud'.*books, hashed, join, levels"):
        reference.decode({"form": "cloud"}, {}, np.zeros((1, 1), np.uint8))


def test_books_of_two_widths_and_overlapping_columns_add_up():
    description = {
        "form": "books",
        "dim": 3,
        "bits": 2,
        "scale": 0.25,
        "groups": [{"width": 2, "starts": [0]}, {"width": 1, "starts": [1, 2]}],
    }
    wide = np.arange(8, dtype=np.float32).reshape(1, 4, 2)
    narrow = np.arange(8, dtype=np.float32).reshape(2, 4, 1) * 100
    codes = reference.pack_bits(np.array([[3, 1, 2]]), bits=2)
    rows = reference.decode(description, {"codebooks.0": wide, "codebooks.1": narrow}, codes)
    assert rows.tolist() == [[6 / 4, (7 + 100) / 4, 600 / 4]]


def test_bfloat16_is_the_upper_half_of_float32():
    description = {"form": "levels", "dim": 2, "dtype": "bfloat16"}
    x = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8]], np.float32)  # both half-way between two bfloat16
    codes = reference.encode_scalar(x, description, {})
    assert reference.decode_levels(description, {}, codes).tolist() == [[1.0, 1 + 2.0**-6]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["row", "block"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scalar_errs_by_half_a_step(bits, granularity, symmetric):
    x = np.random.default_rng(bits).normal(size=(20, 13)).astype(np.float32)
    description = {
        "form": "levels",
        "dim": 13,
        "dtype": f"int{bits}",
        "granularity": granularity,
        "block_size": 5,
        "symmetric": symmetric,
        "scale_factor": 1.0,
        "offset_factor": 1.0,
    }
    codes = reference.encode_scalar(x, description, {})
    error = np.abs(reference.decode(description, {}, codes) - x)
    for start in range(0, 13, 5 if granularity == "block" else 13):
        block = x[:, start : start + (5 if granularity == "block" else 13)]
        if symmetric:
            step = np.abs(block).max(axis=1) / (2 ** (bits - 1) - 1)
        else:
            step = np.ptp(block, axis=1) / (2**bits - 1)
        # float16 widens a step by at most 2**-10 of itself; a minimum of up to 4 moves by at most 2**-8.
        assert (error[:, start : start + block.shape[1]].max(axis=1) <= step * 0.502 + 2.0**-8).all()


def test_nearest_entry_and_ties():
    assert reference.encode_kmeans(np.array([[1.0], [3.1]]), np.array([[0.0], [2.0], [2.0], [4.0]])).tolist() == [0, 3]


def test_beam_as_wide_as_all_partial_codes_is_exhaustive():
    rng = np.random.default_rng(0)
    codebooks = [rng.normal(size=(3, 4)) for _ in range(3)]
    x = rng.normal(size=(30, 4))
    codes = np.array(list(itertools.product(range(3), repeat=3)))

    def error(codes):
        sums = sum(book[field] for book, field in zip(codebooks, codes.T, strict=True))
        return ((x[:, None] - sums) ** 2).sum(axis=2)

    best = error(codes).min(axis=1)
    exhaustive = np.diagonal(error(reference.encode_residual(x, codebooks, beam_width=9)))
    greedy = np.diagonal(error(reference.encode_residual(x, codebooks, beam_width=1)))
    assert np.allclose(exhaustive, best)
    assert (greedy >= best - 1e-12).all()
    assert greedy.sum() > 1.01 * best.sum()


def test_search_and_pool_of_nothing():
    scores, ids = reference.search(np.ones((1, 2)), np.zeros((2, 2)), k=5, metric="cosine")
    assert scores.tolist() == [[0.0, 0.0]]
    assert ids.tolist() == [[0, 1]]
    assert reference.pool(np.ones((1, 2)), [0, 0, 1], mode="max").tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
