"""What the quantizer classes promise beyond the laws that hold for every kind: input, errors, compress."""

import sys
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

import vqrs
from vqrs import (
    AdditiveQuantizer,
    ProductQuantizer,
    ProductResidualQuantizer,
    ResidualQuantizer,
    RotatedQuantizer,
    ScalarQuantizer,
    TreeQuantizer,
    VectorQuantizer,
)
from vqrs._encode import SAMPLE_ROWS, RowSample
from vqrs._validation import as_jobs, as_matrix, as_parameters, as_seed, as_weights
from vqrs.metrics import gaussian_bound, relative_error

QUANTIZERS = {
    "additive": AdditiveQuantizer(n_codebooks=3, n_bits=4, n_rounds=3, random_state=0),
    "kmeans": VectorQuantizer(n_clusters=8, random_state=0),
    "product": ProductQuantizer(n_subvectors=3, n_bits=4, random_state=0),
    "product-residual": ProductResidualQuantizer(n_subvectors=2, n_stages=2, n_bits=4, random_state=0),
    "residual": ResidualQuantizer(n_stages=3, n_bits=4, random_state=0),
    "scalar": ScalarQuantizer(dtype="int4"),
    "rotated": RotatedQuantizer(n_bits=4, random_state=0),
    "tree": TreeQuantizer(branching=4, random_state=0),
}

all_kinds = pytest.mark.parametrize("kind", QUANTIZERS)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((300, 7), dtype=np.float32)


def new(kind):
    return clone(QUANTIZERS[kind])


# -- input ---------------------------------------------------------------------------------------------------------


def memory_map(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def read_only(x, folder):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x, folder):
    buffer = bytearray(x.nbytes + 1)
    out = np.frombuffer(buffer, dtype=np.float32, offset=1, count=x.size).reshape(x.shape)
    out[:] = x
    return out


def frame(x, folder):
    import pandas as pd

    return pd.DataFrame(x)


def nullable_frame(x, folder):
    import pandas as pd

    return pd.DataFrame(x).convert_dtypes()


class OnlyDlpack:
    """What a library without numpy's protocol hands over."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **arguments):
        return self.x.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


FORMS = {
    "float64": lambda x, folder: x.astype(np.float64),
    "longdouble": lambda x, folder: x.astype(np.longdouble),
    "fortran": lambda x, folder: np.asfortranarray(x),
    "strided": lambda x, folder: np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3],
    "reversed": lambda x, folder: x[::-1].copy()[::-1],
    "big-endian": lambda x, folder: x.astype(">f4"),
    "unaligned": unaligned,
    "memory map": memory_map,
    "read-only": read_only,
    "list": lambda x, folder: x.tolist(),
    "object": lambda x, folder: x.astype(object),
    "masked, nothing hidden": lambda x, folder: np.ma.masked_array(x),
    "dlpack": lambda x, folder: OnlyDlpack(x),
    "pandas": frame,
    "pandas, nullable": nullable_frame,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_container_gives_the_same_codes(form, x, tmp_path):
    given = FORMS[form](x, tmp_path)
    expected = new("product").fit(x)
    quantizer = new("product").fit(given)
    np.testing.assert_array_equal(quantizer.transform(given), expected.transform(x))
    np.testing.assert_array_equal(new("product").fit_transform(given), expected.transform(x))


@pytest.mark.parametrize("dtype", ["float16", "int8", "int64", "uint16", "bool"])
def test_small_dtypes_are_read_by_value(dtype, x):
    given = (x * 3).astype(dtype)
    np.testing.assert_array_equal(as_matrix(given), given.astype(np.float32))


def test_float32_is_not_copied(x, tmp_path):
    for given in (x, read_only(x, tmp_path), memory_map(x, tmp_path)):
        assert np.shares_memory(as_matrix(given), given)


def test_torch_tensors(x):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.from_numpy(x)
    assert np.shares_memory(as_matrix(tensor), x)
    np.testing.assert_array_equal(as_matrix(tensor.clone().requires_grad_()), x)
    np.testing.assert_array_equal(as_matrix(torch.nn.Parameter(tensor).T), x.T)
    np.testing.assert_array_equal(as_matrix(tensor.half()), x.astype(np.float16))
    bfloat16 = tensor.bfloat16()
    np.testing.assert_array_equal(as_matrix(bfloat16), bfloat16.float().numpy())
    with pytest.raises(TypeError, match=r"Sparse data was passed for X.*to_dense"):
        as_matrix(tensor.to_sparse())
    with pytest.raises(ValueError, match="device meta: move it to the CPU"):
        as_matrix(tensor.to("meta"))


# -- wrong input ---------------------------------------------------------------------------------------------------


def sparse(x):
    import scipy.sparse

    return scipy.sparse.csr_array(x)


def with_value(x, value):
    x = x.copy()
    x[11, 3] = value
    return x


WRONG = {
    "1-D": (lambda x: x[0], ValueError, r"Expected 2D array, got 1D array.*Reshape your data"),
    "3-D": (lambda x: x[None], ValueError, "Expected 2D array, got 3D array"),
    "scalar": (lambda x: 1.0, ValueError, "Expected 2D array, got 0D array"),
    "no rows": (lambda x: x[:0], ValueError, r"0 sample\(s\)"),
    "no columns": (lambda x: x[:, :0], ValueError, r"0 feature\(s\)"),
    "NaN": (lambda x: with_value(x, np.nan), ValueError, r"NaN.*row 11, column 3"),
    "infinity": (lambda x: with_value(x, -np.inf), ValueError, r"infinity.*row 11, column 3"),
    "huge": (lambda x: with_value(x, 3e38), ValueError, r"3e38.*row 11, column 3"),
    "beyond float32": (
        lambda x: with_value(x.astype(np.float64), 1e39),
        ValueError,
        r"1e\+39 at row 11, column 3, which is out of the range of float32",
    ),
    "infinity in float64": (
        lambda x: with_value(x.astype(np.float64), np.inf),
        ValueError,
        r"infinity.*row 11, column 3",
    ),
    "complex": (lambda x: x + 1j, ValueError, "Complex data not supported"),
    "text": (lambda x: x.astype(str), ValueError, "X holds text"),
    "text in objects": (lambda x: [["a", "b"]], ValueError, "text|could not convert string to float"),
    "dates": (lambda x: x.astype("M8[s]"), TypeError, r"datetime64\[s\], which is no real number"),
    "None": (lambda x: None, (TypeError, ValueError), "None|Expected 2D"),
    "ragged": (lambda x: [[1.0], [1.0, 2.0]], ValueError, "inhomogeneous"),
    "sparse": (sparse, TypeError, "Sparse data was passed for X.*toarray"),
    "masked": (lambda x: np.ma.masked_greater(x, 1), ValueError, "masked values"),
}


@all_kinds
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", ["fit", "fit_transform", "transform", "score"])
def test_wrong_rows(kind, wrong, method, x):
    make, error, message = WRONG[wrong]
    quantizer = new(kind) if method.startswith("fit") else new(kind).fit(x)
    with pytest.raises(error, match=message):
        getattr(quantizer, method)(make(x))


@all_kinds
@pytest.mark.parametrize("method", ["transform", "score", "compress"])
def test_wrong_number_of_features(kind, method, x):
    quantizer = new(kind).fit(x)
    with pytest.raises(ValueError, match=rf"X has 6 features, but {type(quantizer).__name__} is expecting 7 features"):
        getattr(quantizer, method)(x[:, :6])


@all_kinds
@pytest.mark.parametrize(
    "call",
    [
        lambda q, x: q.transform(x),
        lambda q, x: q.inverse_transform(x.view(np.uint8)),
        lambda q, x: q.score(x),
        lambda q, x: q.compress(x),
        lambda q, x: q.get_feature_names_out(),
    ],
    ids=["transform", "inverse_transform", "score", "compress", "get_feature_names_out"],
)
def test_not_fitted(kind, call, x):
    with pytest.raises(NotFittedError):
        call(new(kind), x)


@all_kinds
def test_wrong_codes(kind, x):
    quantizer = new(kind).fit(x)
    codes = quantizer.transform(x)
    with pytest.raises(TypeError, match=r"codes must be uint8.*not int64"):
        quantizer.inverse_transform(codes.astype(np.int64))
    for wrong in (codes[:, :-1], np.repeat(codes, 2, axis=1), codes[0], codes[None]):
        with pytest.raises(ValueError, match=rf"codes must have shape \(n_rows, {quantizer.row_bytes_}\)"):
            quantizer.inverse_transform(wrong)
    np.testing.assert_array_equal(
        quantizer.inverse_transform(np.asfortranarray(codes)), quantizer.inverse_transform(codes)
    )


@all_kinds
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(299), r"sample_weight.shape == \(299,\), expected \(300,\)"),
        (np.ones((300, 2)), "Sample weights must be 1D"),
        (np.r_[-1.0, np.ones(299)], r"sample_weight\[0\]"),
        (np.r_[np.ones(299), np.nan], r"sample_weight\[299\]"),
        (np.zeros(300), "zero"),
        (["a"] * 300, "sample_weight holds text"),
    ],
    ids=["short", "2-D", "negative", "NaN", "all zero", "text"],
)
def test_wrong_weights(kind, weights, message, x):
    with pytest.raises(ValueError, match=message):
        new(kind).fit(x, sample_weight=weights)


@pytest.mark.parametrize(
    ("quantizer", "name"),
    [
        (VectorQuantizer(n_clusters=0), "n_clusters"),
        (VectorQuantizer(n_clusters="many"), "n_clusters"),
        (VectorQuantizer(tol=-1.0), "tol"),
        (ProductQuantizer(n_bits=0), "n_bits"),
        (ProductQuantizer(n_bits=17), "n_bits"),
        (ProductQuantizer(n_bits=2.5), "n_bits"),
        (ProductQuantizer(n_subvectors=0), "n_subvectors"),
        (ProductQuantizer(codebook_dtype="float8"), "codebook_dtype|float8"),
        (ProductQuantizer(max_iter=0), "max_iter"),
        (ResidualQuantizer(n_stages=0), "n_stages"),
        (ResidualQuantizer(beam_width=0), "beam_width"),
        (ResidualQuantizer(n_bits=17), "n_bits"),
        (ScalarQuantizer(dtype="int7"), "int7"),
        (ScalarQuantizer(granularity="rows"), "rows"),
        (ScalarQuantizer(granularity="block", block_size=0), "block_size"),
        (ScalarQuantizer(clip="median"), "median"),
        (ScalarQuantizer(symmetric="yes"), "symmetric"),
        (ProductQuantizer(random_state=-1), "random_state"),
        (ProductQuantizer(random_state="seed"), "random_state"),
        (ProductQuantizer(n_jobs=0), "n_jobs"),
        (ProductQuantizer(n_jobs="all"), "n_jobs"),
        (ProductQuantizer(verbose="loud"), "verbose"),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(quantizer, name, x):
    with pytest.raises((ValueError, TypeError), match=name):
        quantizer.fit(x)


@all_kinds
def test_misspelt_parameters_are_refused(kind):
    with pytest.raises(TypeError, match="n_bit_"):
        type(new(kind))(n_bit_=4)
    with pytest.raises(ValueError, match="n_bit_"):
        new(kind).set_params(n_bit_=4)


def test_an_estimator_stays_usable_after_an_error(x):
    quantizer = new("product").fit(x)
    before = quantizer.transform(x)
    with pytest.raises(ValueError, match="NaN"):
        quantizer.transform(with_value(x, np.nan))
    np.testing.assert_array_equal(quantizer.transform(x), before)


# -- small data ----------------------------------------------------------------------------------------------------


def repeated(n_rows, n_distinct):
    return np.random.default_rng(1).standard_normal((n_distinct, 6), dtype=np.float32)[np.arange(n_rows) % n_distinct]


@pytest.mark.parametrize(
    ("quantizer", "rows"),
    [
        (VectorQuantizer(n_clusters=16, random_state=0), repeated(9, 9)),
        (VectorQuantizer(n_clusters=16, random_state=0), repeated(90, 9)),
        (ProductQuantizer(n_subvectors=2, n_bits=4, random_state=0), repeated(9, 9)),
        (ProductQuantizer(n_subvectors=9, n_bits=2, random_state=0), repeated(90, 90)),
        (ResidualQuantizer(n_stages=2, n_bits=4, random_state=0), repeated(9, 9)),
        (VectorQuantizer(random_state=0), repeated(1, 1)),
    ],
    ids=["few rows", "few distinct rows", "product", "few columns", "residual", "one row"],
)
def test_small_data_shrinks_with_one_warning(quantizer, rows):
    with pytest.warns(ConvergenceWarning) as caught:
        codes = quantizer.fit_transform(rows)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{type(quantizer).__name__}: ")
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(quantizer.transform(rows), codes)
    assert quantizer.inverse_transform(codes).shape == rows.shape
    if len(rows) < 16 or not isinstance(quantizer, ProductQuantizer):
        assert quantizer.relative_error_ < 1e-6


def test_stopping_at_max_iter_does_not_warn(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProductQuantizer(n_subvectors=2, n_bits=4, max_iter=1, random_state=0).fit(x)


# -- what is learned -----------------------------------------------------------------------------------------------


def test_codebooks_are_what_is_decoded(x):
    quantizer = VectorQuantizer(n_clusters=8, random_state=0).fit(x)
    (book,) = quantizer.codebooks_
    assert book.shape == (8, 7)
    assert book.dtype == np.float32
    np.testing.assert_array_equal(quantizer.inverse_transform(np.arange(8, dtype=np.uint8)[:, None]), book)


def test_codebooks_of_pieces_of_unequal_width(x):
    quantizer = new("product").fit(x)
    assert [book.shape for book in quantizer.codebooks_] == [(16, 3), (16, 2), (16, 2)]
    codes = quantizer.transform(x)
    fields = np.stack([codes[:, 0] & 15, codes[:, 0] >> 4, codes[:, 1] & 15], axis=1)
    expected = np.concatenate([book[fields[:, m]] for m, book in enumerate(quantizer.codebooks_)], axis=1)
    np.testing.assert_array_equal(quantizer.inverse_transform(codes), expected)


def test_residual_codebooks_add_up(x):
    quantizer = new("residual").fit(x)
    codes = quantizer.transform(x)
    fields = np.stack([codes[:, 0] & 15, codes[:, 0] >> 4, codes[:, 1] & 15], axis=1)
    expected = sum(book[fields[:, m]] for m, book in enumerate(quantizer.codebooks_))
    np.testing.assert_allclose(quantizer.inverse_transform(codes), expected, rtol=1e-5, atol=1e-6)


def test_scales_of_columns(x):
    quantizer = ScalarQuantizer("int8", "column").fit(x)
    assert quantizer.scale_.shape == quantizer.offset_.shape == (7,)
    codes = quantizer.transform(x)
    np.testing.assert_allclose(
        quantizer.inverse_transform(codes), codes * quantizer.scale_ + quantizer.offset_, rtol=1e-6, atol=1e-6
    )
    assert quantizer.set_params(granularity="row").fit(x).scale_ is None


@all_kinds
def test_relative_error_and_score_are_those_of_the_decoded_rows(kind, x):
    quantizer = new(kind).fit(x)
    decoded = quantizer.inverse_transform(quantizer.transform(x))
    assert quantizer.relative_error_ == pytest.approx(relative_error(x, decoded), rel=1e-5)
    assert quantizer.score(x) == pytest.approx(-quantizer.relative_error_, rel=1e-6)
    weights = np.linspace(0, 2, len(x))
    assert quantizer.score(x, sample_weight=weights) == pytest.approx(-relative_error(x, decoded, weights), rel=1e-5)


@all_kinds
def test_seed_and_threads(kind, x):
    first = new(kind).fit_transform(x)
    np.testing.assert_array_equal(first, new(kind).set_params(n_jobs=1).fit_transform(x))
    np.testing.assert_array_equal(first, new(kind).set_params(n_jobs=2).fit_transform(x))
    if hasattr(new(kind).fit(x), "codebooks_"):
        other = new(kind).set_params(random_state=1).fit(x)
        assert not np.array_equal(other.codebooks_[0], new(kind).fit(x).codebooks_[0])


# -- compress ------------------------------------------------------------------------------------------------------


def blocks(x, size=77):
    for start in range(0, len(x), size):
        yield x[start : start + size]


@all_kinds
def test_memory_path_and_iterator_give_the_same_file(kind, x, tmp_path, monkeypatch):
    monkeypatch.setattr("vqrs._encode.BLOCK_BYTES", 40 * 4 * x.shape[1])
    quantizer = new(kind).fit(x)
    weights = np.linspace(1, 2, len(x))
    extra = {"names": [f"row {i}" for i in range(len(x))], "metadata": {"source": "test"}, "sample_weight": weights}
    quantizer.compress(x, **extra).save(tmp_path / "memory")
    quantizer.compress(x.astype(np.float64), tmp_path / "path", **extra)
    quantizer.compress(memory_map(x, tmp_path), tmp_path / "map", durable=False, **extra)
    table = quantizer.compress(blocks(x), tmp_path / "iterator", **extra)
    expected = (tmp_path / "memory").read_bytes()
    for way in ("path", "map", "iterator"):
        assert (tmp_path / way).read_bytes() == expected, way
    np.testing.assert_array_equal(table.to_numpy(), quantizer.inverse_transform(quantizer.transform(x)))
    assert table.relative_error == pytest.approx(quantizer.relative_error_, rel=1e-6)


@all_kinds
def test_compress_does_not_fit_again(kind, x):
    quantizer = new(kind).fit(x)
    other = np.random.default_rng(9).standard_normal((50, 7), dtype=np.float32)
    table = quantizer.compress(other)
    np.testing.assert_array_equal(table.to_numpy(), quantizer.inverse_transform(quantizer.transform(other)))


@all_kinds
@pytest.mark.parametrize("n_rows", [64, 300])
def test_estimate_is_the_size_of_the_table(kind, n_rows, x, tmp_path):
    quantizer = new(kind)
    expected = quantizer.estimate(n_rows, 7)
    table = quantizer.fit(x[:n_rows]).compress(x[:n_rows])
    assert table.nbytes == expected
    table.save(tmp_path / "t")
    assert (tmp_path / "t").stat().st_size == expected


def test_an_iterator_needs_a_path(x):
    with pytest.raises(ValueError, match="iterator of blocks needs path="):
        new("product").fit(x).compress(blocks(x))


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        (lambda x: blocks(with_value(x, np.nan)), {}, r"NaN.*row 11, column 3"),
        (lambda x: blocks(with_value(x[:, ::-1], np.inf)[::-1]), {}, r"infinity.*row 288, column 3"),
        (lambda x: blocks(x[:, :5]), {}, "5"),
        (lambda x: x, {"names": ["one"]}, "names"),
        (lambda x: blocks(x), {"sample_weight": np.ones(299)}, "sample_weight"),
        (lambda x: blocks(x), {"sample_weight": np.ones(301)}, "sample_weight"),
        (lambda x: iter([]), {}, "at least 1 row"),
    ],
    ids=["NaN", "infinity in a later block", "width", "names", "short weights", "long weights", "no blocks"],
)
def test_a_failed_compress_leaves_no_file(rows, extra, message, x, tmp_path):
    quantizer = new("product").fit(x)
    with pytest.raises(ValueError, match=message):
        quantizer.compress(rows(x), tmp_path / "table", **extra)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_iterator_leaves_no_file(x, tmp_path):
    def interrupted():
        yield x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new("product").fit(x).compress(interrupted(), tmp_path / "table")
    assert list(tmp_path.iterdir()) == []


def test_compress_takes_frames_and_checks_their_names(x, tmp_path):
    import pandas as pd

    named = pd.DataFrame(x).rename(columns="c{}".format)
    quantizer = new("product").fit(named)
    assert quantizer.compress(named, tmp_path / "t").shape == x.shape
    with pytest.raises(ValueError, match="feature names should match"):
        quantizer.compress(named.rename(columns={"c0": "other"}))


# -- small parts ---------------------------------------------------------------------------------------------------


def test_seeds():
    assert as_seed(5) == as_seed(np.int32(5)) == 5
    assert as_seed(2**64 - 1) == 2**64 - 1
    for make in (np.random.RandomState, np.random.default_rng):
        generator = make(0)
        assert as_seed(generator) == as_seed(make(0)) != as_seed(generator)
    np.random.seed(0)  # noqa: NPY002
    first = as_seed(None)
    np.random.seed(0)  # noqa: NPY002
    assert as_seed(None) == first != as_seed(None)
    for wrong in (-1, 2**64, "1", 1.5):
        with pytest.raises(ValueError, match="cannot be used to seed"):
            as_seed(wrong)


def test_a_generator_can_be_random_state(x):
    made = [ProductQuantizer(2, 4, random_state=np.random.default_rng(3)).fit(x) for _ in range(2)]
    np.testing.assert_array_equal(made[0].codebooks_[0], made[1].codebooks_[0])


def test_jobs():
    threads = vqrs.hardware()["threads"]
    assert as_jobs(None) is None
    assert as_jobs(3) == 3
    assert as_jobs(-1) == threads
    assert as_jobs(-threads - 5) == 1


def test_parameters_lose_their_numpy_types():
    plain = as_parameters({"n_bits": np.int64(4), "tol": np.float32(0.5), "dtype": "int8"})
    assert plain == {"n_bits": 4, "tol": 0.5, "dtype": "int8"}
    assert {type(value) for value in plain.values()} == {int, float, str}


def test_weights_may_be_a_number():
    np.testing.assert_array_equal(as_weights(2, 3), [2.0, 2.0, 2.0])
    assert as_weights(None, 3) is None


def test_gaussian_bound_is_reverse_water_filling():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200_000, 4)) * np.sqrt([8.0, 4.0, 2.0, 0.01])
    # At 1 bit a value: 4 bits over the first three columns, θ = (8·4·2 / 2^8)^(1/3), the last column is below it.
    theta = (64 / 2**8) ** (1 / 3)
    assert gaussian_bound(x, 1) == pytest.approx((3 * theta + 0.01) / 14.01, rel=0.01)
    assert gaussian_bound(x, 0) == pytest.approx(1, rel=1e-3)
    # The mean is known to the code, but counts in the energy.
    assert gaussian_bound(x + 10, 0) == pytest.approx(14.01 / 414.01, rel=0.01)
    assert gaussian_bound(np.ones((5, 3)), 1) == 0
    assert gaussian_bound(np.zeros((5, 3)), 1) == 0
    with pytest.raises(ValueError, match="negative"):
        gaussian_bound(x, -1)


def test_no_table_beats_the_bound_on_gaussian_rows():
    x = np.random.default_rng(0).standard_normal((20_000, 4), dtype=np.float32)
    table = VectorQuantizer(n_clusters=64, random_state=0).fit(x).compress(x)
    bound = table.info()["errors"]["gaussian_bound"]
    assert bound < table.relative_error
    assert bound == pytest.approx(gaussian_bound(x, 8 * table.nbytes / x.size), rel=0.02)


def test_relative_error():
    assert relative_error([[3.0, 4.0], [0.0, 5.0]], [[3.0, 4.0], [0.0, 0.0]]) == 0.5
    assert relative_error([[3.0, 4.0], [0.0, 5.0]], [[3.0, 4.0], [0.0, 0.0]], [1, 0]) == 0
    assert relative_error([[0.0]], [[0.0]]) == 0
    assert relative_error([[0.0]], [[1.0]]) == float("inf")
    with pytest.raises(ValueError, match="must be equal"):
        relative_error([[1.0]], [[1.0, 2.0]])


@pytest.mark.parametrize("size", [1000, 7777, 60_000])
def test_the_row_sample_does_not_depend_on_the_blocks(size):
    numbers = np.arange(60_000, dtype=np.float32)[:, None]
    sample, whole = RowSample(1), RowSample(1).add(numbers)
    for block in blocks(numbers, size):
        sample.add(block)
    assert sample.n_seen == 60_000
    assert len(sample.rows) == SAMPLE_ROWS
    np.testing.assert_array_equal(sample.rows, whole.rows)
    assert np.all(np.diff(sample.rows[:, 0]) > 0)
    # A uniform sample: the mean of 16,384 of 60,000 numbers.
    assert sample.rows.mean() == pytest.approx(30_000, rel=0.02)


def test_the_modules_below_the_estimators_do_not_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for name in ("vqrs._validation", "vqrs._encode", "vqrs.metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        __import__(name)


# ---- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"tol": float("nan")}, "tol=.*must be a finite number"),
        ({"n_bits": 8.5}, "n_bits=8.5 .*must be an integer"),
        ({"max_iter": -1}, "max_iter=-1 .*must be an integer, 0 or more"),
        ({"codebook_dtype": "float64"}, "float64.*float16"),
    ],
)
def test_a_wrong_parameter_is_told_in_python_words(parameters, words):
    with pytest.raises(ValueError, match=words):
        vqrs.ProductQuantizer(**parameters).fit(np.eye(4))


def test_names_are_strings():
    for names, words in [("abcd", "not one string"), ([1, 2, 3, 4], r"names\[0\] is of type int")]:
        with pytest.raises(TypeError, match=words):
            vqrs.compress(np.eye(4), method="scalar", names=names)


def test_a_class_is_no_method():
    with pytest.raises(TypeError, match=r"ProductQuantizer\(\)"):
        vqrs.compress(np.eye(4), method=vqrs.ProductQuantizer)


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="n_rows=-1"):
        vqrs.estimate(-1, 5)
    with pytest.raises(ValueError, match="k=-1"):
        vqrs.compress(np.eye(4), method="scalar").search(np.ones(4), k=-1)


# ---- values at the edges -------------------------------------------------------------------------------------------


def test_errors_of_rows_that_are_all_equal_or_zero(x):
    """Nothing is left of equal rows without their mean; an error of zeros is the largest number, not infinity."""
    equal = np.full((5, 3), 0.1, np.float32)
    quantizer = ScalarQuantizer("int4").fit(x[:, :3])
    assert "centred" not in quantizer.compress(equal).info()["errors"]
    assert np.isfinite(quantizer.score(np.zeros((5, 3))))
    coarse = VectorQuantizer(1, random_state=0).fit(x[:, :3])
    assert np.isfinite(coarse.score(np.zeros((5, 3))))
    assert np.isfinite(coarse.compress(np.zeros((5, 3))).relative_error)


def test_centred_error_of_rows_close_together(x):
    """In float32, so that what is left of the rows is known."""
    near = (1e4 + x.astype(np.float64)).astype(np.float32)
    table = ScalarQuantizer("int8", granularity="row").fit(near).compress(near)
    wide = near.astype(np.float64)
    expected = ((wide - table.to_numpy()) ** 2).sum() / ((wide - wide.mean(axis=0)) ** 2).sum()
    assert table.info()["errors"]["centred"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("by", ["norm", "importance"])
def test_mixed_precision_refuses_rows_by_their_place(x, value, by):
    wrong = x.copy()
    wrong[7, 2] = value
    quantizer = vqrs.MixedPrecisionQuantizer([ScalarQuantizer("int4")], n_bits=16.0, by=by)
    with pytest.raises(ValueError, match="row 7, column 2"):
        quantizer.fit(wrong, sample_weight=np.ones(len(x)))
    quantizer.fit(x, sample_weight=np.ones(len(x)))
    with pytest.raises(ValueError, match="row 7, column 2"):
        quantizer.compress(wrong, sample_weight=np.ones(len(x)))
    with pytest.raises(ValueError, match=r"sample_weight\[0\]"):
        quantizer.fit(x, sample_weight=np.full(len(x), np.nan))


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0, 1e300])
@pytest.mark.parametrize("method", ["partial_fit", "score"])
def test_clusters_refuse_weights_that_are_none(x, weight, method):
    kmeans = vqrs.KMeans(3, random_state=0).fit(x)
    weights = np.ones(len(x))
    weights[4] = weight
    with pytest.raises(ValueError, match=r"sample_weight\[4\]"):
        getattr(kmeans, method)(x, sample_weight=weights)
    assert np.isfinite(kmeans.cluster_centers_).all()
