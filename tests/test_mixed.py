"""Groups of rows with quantizers of their own: how bytes are shared out, and the form that reads them."""

import json
import pickle

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

import vqrs
from vqrs import MixedPrecisionQuantizer, ProductQuantizer, ScalarQuantizer, VectorQuantizer, _core, reference
from vqrs.mixed import _at_best_price, _Budget, _Option

N_ROWS, DIM = 12_000, 24


def quantizers():
    return [
        VectorQuantizer(64),
        *(ProductQuantizer(n_subvectors, 6) for n_subvectors in (4, 8, 12)),
        ScalarQuantizer("int8", granularity="column"),
    ]


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((N_ROWS, DIM), dtype=np.float32)


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    """How often rows are looked up: Zipf's law, in the order of the rows."""
    return 1 / np.arange(1, N_ROWS + 1)


@pytest.fixture(scope="module", params=["in order", "shuffled"])
def table(request, x, weight) -> vqrs.Table:
    if request.param == "shuffled":
        weight = np.random.default_rng(0).permutation(weight)
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=4.0, random_state=0).fit(x, sample_weight=weight)
    return mixed.compress(x, sample_weight=weight)


def weighted_error(table, x, weight) -> float:
    left = ((x.astype(np.float64) - table[:]) ** 2).sum(1)
    return float(weight @ left / (weight @ (x.astype(np.float64) ** 2).sum(1)))


# ---- sharing out ---------------------------------------------------------------------------------------------------


def options() -> list[_Option]:
    """Errors of three classes that fall by four with each byte."""
    return [_Option(None, n, 10, np.array([64.0, 8.0, 1.0]) * 4.0**-n) for n in (1, 2, 4, 8)]


@pytest.mark.parametrize(("budget", "expected"), [(10**9, 3), (30 + 15 + 10, 0)])
def test_bytes_without_end_and_bytes_that_barely_do(budget, expected):
    chosen, error = _at_best_price(np.array([10, 10, 10]), options(), [0, 1, 2, 3], _Budget(budget, 30))
    assert chosen.tolist() == [expected] * 3
    assert error == options()[expected].errors.sum()


def test_too_few_bytes_are_told():
    assert _at_best_price(np.array([10, 10, 10]), options(), [0, 1, 2, 3], _Budget(39, 30))[1] == np.inf


@pytest.mark.parametrize("budget", [100, 130, 160, 250])
def test_no_other_choice_at_the_same_bytes_is_better_than_the_next_price(budget):
    """Least error among all choices of no more bytes than were used: the sum of error and price is least."""
    counts, every = np.array([10, 10, 10]), options()
    chosen, error = _at_best_price(counts, every, [0, 1, 2, 3], _Budget(budget, 30))
    used = sum(10 * every[option].row_bytes for option in chosen)
    for other in np.ndindex(4, 4, 4):
        if sum(10 * every[option].row_bytes for option in other) <= used:
            assert sum(every[o].errors[c] for c, o in enumerate(other)) >= error - 1e-12


@pytest.mark.parametrize("n_bits", [2.0, 3.0, 5.0])
def test_budget_is_kept_and_used(x, weight, n_bits):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=n_bits, random_state=0).fit(x, sample_weight=weight)
    table = mixed.compress(x, sample_weight=weight)
    assert table.nbytes <= mixed.estimate(N_ROWS, DIM) == n_bits * N_ROWS * DIM / 8
    # Rows take whole bytes together, and the file has bytes of its own: no more than these may be left.
    assert table.nbytes >= mixed.estimate(N_ROWS, DIM) - 2 * N_ROWS - 16_384


def test_equal_rows_make_one_group(x):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=4.0, by="sample_weight", random_state=0)
    mixed.fit(x, sample_weight=np.ones(N_ROWS))
    assert len(mixed.groups_) == 1
    assert mixed.groups_[0][1] == N_ROWS


def test_more_important_rows_get_more_bytes(x, weight):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=4.0, random_state=0).fit(x, sample_weight=weight)
    row_bytes = [quantizer.row_bytes_ for quantizer, _ in mixed.groups_]
    assert len(row_bytes) > 1
    assert row_bytes == sorted(row_bytes, reverse=True)
    assert (np.diff(mixed.thresholds_) < 0).all()
    assert sum(n_rows for _, n_rows in mixed.groups_) == N_ROWS


def test_weighted_error_falls_by_far_more_than_a_third(x, weight):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=3.6, random_state=0).fit(x, sample_weight=weight)
    table = mixed.compress(x, sample_weight=weight)
    plain = ProductQuantizer(12, 6, random_state=0).fit(x).compress(x)
    assert table.nbytes <= plain.nbytes
    ours, theirs = weighted_error(table, x, weight), weighted_error(plain, x, weight)
    assert ours < 0.67 * theirs
    assert table.info()["errors"]["weighted"] == pytest.approx(ours, rel=1e-6)
    assert mixed.relative_error_ == pytest.approx(ours, rel=1e-6)


def test_norms_where_there_are_no_weights(x):
    scaled = x * np.where(np.arange(N_ROWS) % 3 == 0, 8, 1)[:, None].astype(np.float32)
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=3.9, random_state=0).fit(scaled)
    assert len(mixed.groups_) > 1
    plain = ProductQuantizer(12, 6, random_state=0).fit(scaled)
    assert mixed.relative_error_ < plain.relative_error_


def test_same_seed_same_bytes(x, weight):
    one, other = (
        MixedPrecisionQuantizer(quantizers(), n_bits=4.0, random_state=5, n_jobs=jobs)
        .fit(x, sample_weight=weight)
        .compress(x, sample_weight=weight)
        for jobs in (1, 3)
    )
    assert one.codes.tobytes() == other.codes.tobytes()


# ---- the form ------------------------------------------------------------------------------------------------------


def test_lookup_is_the_reference_and_survives_the_file(table, tmp_path):
    decoded = reference.decode(table.info()["decoder"], table._core.tensors(), table.codes)
    assert np.array_equal(table[:], decoded)
    ids = np.random.default_rng(1).integers(-N_ROWS, N_ROWS, 500)
    assert np.array_equal(table[ids], decoded[ids])
    table.save(tmp_path / "t.safetensors")
    for verify in ("header", "lazy", "full"):
        opened = vqrs.open(tmp_path / "t.safetensors", verify=verify)
        assert np.array_equal(opened[ids], decoded[ids])
    opened.verify()
    assert opened.nbytes == (tmp_path / "t.safetensors").stat().st_size == table.nbytes
    assert np.array_equal(pickle.loads(pickle.dumps(table))[ids], decoded[ids])


def test_pool_and_search_read_it(table, x):
    decoded = table[:]
    bags = table.pool(np.arange(10), np.array([0, 4]), mode="sum")
    np.testing.assert_allclose(bags[0], decoded[:4].sum(0), rtol=1e-5, atol=1e-5)
    _, ids = table.search(x[:5], k=1, metric="l2")
    nearest = ((x[:5, None] - decoded[None]) ** 2).sum(2).argmin(1)
    assert ids[:, 0].tolist() == nearest.tolist()


def test_a_map_is_stored_only_where_rows_are_not_in_order(x, weight):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=4.0, random_state=0).fit(x, sample_weight=weight)
    in_order = mixed.compress(x, sample_weight=weight)
    turned = mixed.compress(x[::-1], sample_weight=weight[::-1])
    assert "map" not in in_order._core.tensors()
    assert "map" in turned._core.tensors()
    assert np.array_equal(in_order[:], turned[::-1])


def test_a_map_that_names_more_rows_than_a_group_has_is_refused(x, weight):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=4.0, random_state=0).fit(x, sample_weight=weight)
    table = mixed.compress(x[::-1], sample_weight=weight[::-1])
    about, tensors = table._core.info(), dict(table._core.tensors())
    tensors["map"] = np.zeros_like(tensors["map"])
    with pytest.raises(ValueError, match=r"row \d+ in group 0"):
        _core.Table.from_parts(about, tensors, table.codes, errors={"relative": 0.0})
    described = json.loads(about)
    described["decoder"]["groups"][0]["rows"] += 1
    with pytest.raises(ValueError, match=r"map|rows"):
        _core.Table.from_parts(json.dumps(described), table._core.tensors(), table.codes, errors={"relative": 0.0})


def test_codes_for_new_rows_are_the_widest_groups(x, weight):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=4.0, random_state=0)
    codes = mixed.fit_transform(x, sample_weight=weight)
    assert codes.shape == (N_ROWS, mixed.row_bytes_)
    assert mixed.row_bytes_ == max(quantizer.row_bytes_ for quantizer, _ in mixed.groups_)
    assert mixed.inverse_transform(codes).shape == x.shape


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_bits": 0}, "n_bits=0"),
        ({"by": "colour"}, "by='colour'"),
        ({"quantizers": []}, "quantizers is empty"),
    ],
)
def test_wrong_parameters_are_named(x, parameters, message):
    with pytest.raises(ValueError, match=message):
        MixedPrecisionQuantizer(**parameters).fit(x)


def test_a_budget_that_nothing_reaches_warns(x):
    with pytest.warns(ConvergenceWarning, match="no quantizer reaches"):
        MixedPrecisionQuantizer(quantizers(), n_bits=0.05).fit(x[:500])


def test_groups_by_weight_need_weights(x, weight):
    mixed = MixedPrecisionQuantizer(quantizers(), n_bits=4.0, random_state=0).fit(x, sample_weight=weight)
    with pytest.raises(ValueError, match="sample_weight is needed"):
        mixed.compress(x)
    with pytest.raises(TypeError, match="iterator"):
        mixed.compress(iter([x]), sample_weight=weight)


def test_compress_takes_it_with_a_budget(x, weight):
    table = vqrs.compress(
        x, ratio=9, method=MixedPrecisionQuantizer(quantizers()), sample_weight=weight, random_state=0
    )
    assert table.kind == "mixed"
    assert table.ratio >= 9
    with pytest.raises(ValueError, match="max_error"):
        vqrs.compress(x, max_error=0.1, method=MixedPrecisionQuantizer(quantizers()), sample_weight=weight)


@pytest.mark.parametrize("outside", [{"form": "linear", "mean": False, "rotation": {"kind": "none"}}, {"form": "join"}])
def test_groups_stand_in_no_other_decoder(table, outside):
    about = json.loads(table._core.info())
    inner = about["decoder"]
    prefix = "inner." if outside["form"] == "linear" else "parts.0."
    nested = {"inner": inner} if outside["form"] == "linear" else {"mode": "sum", "parts": [inner]}
    about["decoder"] = {**outside, "dim": DIM, **nested}
    tensors = {prefix + name: tensor for name, tensor in table._core.tensors().items()}
    with pytest.raises(ValueError, match="rows stand apart"):
        _core.Table.from_parts(json.dumps(about), tensors, table.codes, errors={"relative": 0.0})


def test_the_better_of_two_of_equal_bytes_is_taken(x):
    coarse, fine = ProductQuantizer(8, 6, max_iter=1, random_state=0), ProductQuantizer(8, 6, random_state=0)
    for pair in ([coarse, fine], [fine, coarse]):
        mixed = MixedPrecisionQuantizer(pair, n_bits=6.0, by="norm", random_state=0).fit(x)
        assert all(quantizer.max_iter == 25 for quantizer, _ in mixed.groups_)


def test_groups_are_no_codec(table):
    about = json.loads(table._core.info()) | {"kind": "kmeans", "parameters": {}}
    with pytest.raises(ValueError, match="rows stand apart"):
        _core.Codec.from_parts(json.dumps(about), table._core.tensors())
