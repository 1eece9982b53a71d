"""The family on a sample: what is tried, what is kept, and that the choice repeats."""

import builtins
import itertools
import json
import math

import numpy as np
import pytest

import vqrs
from vqrs import _core, _ladders
from vqrs._ladders import Family, Ladder, Rates, Variant, families_for
from vqrs._tune import SHOWN_ROWS
from vqrs.metrics import gaussian_bound


@pytest.fixture(scope="module")
def result(small_rows):
    return vqrs.tune(small_rows, ratio=[4, 8, 16], effort="fast", random_state=0)


# ---- what is tried -------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_whole_table(result):
    for trial in result.trials:
        assert trial.nbytes == vqrs.estimate(3000, 24, trial.kind, **trial.parameters)
        assert trial.ratio == pytest.approx(4 * 3000 * 24 / trial.nbytes)
        assert trial.bits_per_value == pytest.approx(32 / trial.ratio)


def test_trials_of_large_tables_count_the_codebooks_of_the_whole_table():
    """A codebook weighs more beside the rows of a sample than beside all."""
    x = np.random.default_rng(0).normal(size=(40_000, 8)).astype(np.float32)
    tuned = vqrs.tune(x, ratio=8, method="product", effort="fast", random_state=0)
    assert tuned.n_train_rows < 5000
    best = tuned.best()
    assert tuned.table().nbytes == best.nbytes == vqrs.estimate(40_000, 8, "product", **best.parameters)


def test_expected_errors_are_near_the_real_ones(small_rows):
    tuned = vqrs.tune(small_rows, ratio=8, method=["product", "scalar", "kmeans"], random_state=0)
    for trial in tuned.trials:
        table = vqrs.compress(small_rows, method=trial.kind, random_state=0, **trial.parameters)
        assert trial.error == pytest.approx(table.relative_error, rel=0.15)


def test_bounds(result, small_rows):
    trial = result.curve[0]
    assert trial.gaussian_bound == pytest.approx(gaussian_bound(small_rows, trial.bits_per_value))
    assert trial.above_bound_db == pytest.approx(10 * math.log10(trial.error / trial.gaussian_bound))


def test_times_are_measured(result):
    assert all(trial.fit_seconds > 0 and 0 < trial.lookup_ns < 1e6 for trial in result.trials)


def test_some_kinds_only(small_rows):
    tuned = vqrs.tune(small_rows, ratio=8, method=["scalar", "kmeans"], effort="fast", random_state=0)
    assert {trial.kind for trial in tuned.trials} == {"scalar", "kmeans"}


def test_more_codebook_stops_where_it_brings_little():
    """A single outlier a codebook: beyond the middle nothing falls, and no larger codebook is tried."""
    x = np.random.default_rng(0).integers(0, 2, size=(40_000, 4)).astype(np.float32)
    tuned = vqrs.tune(x, ratio=5, method="product", random_state=0)
    assert max(trial.parameters["n_bits"] for trial in tuned.trials) <= 8


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_front_is_what_nothing_beats(result):
    def values(trial):
        return trial.nbytes, trial.error, trial.fit_seconds, trial.lookup_ns

    for trial in result.trials:
        beaten = any(
            all(a <= b for a, b in zip(values(other), values(trial), strict=True)) and values(other) != values(trial)
            for other in result.trials
        )
        assert (trial in result.front) == (not beaten)


def test_curve_falls_and_holds_the_best(result):
    assert [trial.nbytes for trial in result.curve] == sorted({trial.nbytes for trial in result.curve})
    for trial in result.trials:
        assert min(other.error for other in result.curve if other.nbytes <= trial.nbytes) <= trial.error


def test_best(result):
    best = result.best(ratio=8)
    within = [trial for trial in result.trials if trial.ratio >= 8]
    assert best.error == min(trial.error for trial in within)
    assert result.best(nbytes=best.nbytes) == best
    smallest = result.best(max_error=0.1)
    assert smallest.nbytes == min(trial.nbytes for trial in result.trials if trial.error <= 0.1)


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({}, "pass one of"),
        ({"ratio": 2, "nbytes": 3}, "pass one of"),
        ({"ratio": 1000}, "no trial has at most 288 bytes: the least has"),
        ({"max_error": 1e-30}, "no trial has an error of 1e-30: the least is"),
    ],
    ids=str,
)
def test_what_no_trial_reaches(result, goal, words):
    with pytest.raises(ValueError, match=words):
        result.best(**goal)


def test_repeats_for_a_random_state(small_rows):
    arguments = {"ratio": [6, 12], "method": ["product", "residual"], "effort": "fast", "random_state": 1}
    first, again = (vqrs.tune(small_rows, n_jobs=n_jobs, **arguments) for n_jobs in (1, 2))
    assert [(t.name, t.nbytes, t.error) for t in first.trials] == [(t.name, t.nbytes, t.error) for t in again.trials]
    assert [trial.name for trial in first.curve] == [trial.name for trial in again.curve]


def test_the_table_of_the_best(small_rows, tmp_path):
    tuned = vqrs.tune(small_rows, ratio=8, effort="fast", random_state=0)
    table = tuned.table(path=tmp_path / "table")
    best = tuned.best()
    assert (table.kind, table.nbytes, table.ratio >= 8) == (best.kind, best.nbytes, True)
    assert best.parameters.items() <= table.parameters.items()
    assert table.relative_error == pytest.approx(best.error, rel=0.25)


def test_the_estimator_of_the_best(small_rows):
    tuned = vqrs.tune(small_rows, ratio=8, method="product", effort="fast", random_state=0)
    fitted = tuned.best_estimator_
    assert isinstance(fitted, vqrs.ProductQuantizer)
    assert fitted is tuned.best_estimator_
    assert fitted.get_params().items() >= tuned.best().parameters.items()
    assert -fitted.score(small_rows) == pytest.approx(tuned.best().error, rel=0.2)
    assert tuned.fit(small_rows[:500]).n_features_in_ == 24


def test_weights(small_rows):
    weights = np.where(np.arange(3000) < 300, 1.0, 0.0)
    tuned = vqrs.tune(small_rows, ratio=16, method="kmeans", sample_weight=weights, random_state=0)
    plain = vqrs.tune(small_rows, ratio=16, method="kmeans", random_state=0)
    assert tuned.best().error < 0.8 * plain.best().error
    assert "weighted" in tuned.table().info()["errors"]


# ---- rows that come later ------------------------------------------------------------------------------------------


def test_cross_validation_tells_the_error_of_other_rows():
    rng = np.random.default_rng(0)
    x, later = (rng.normal(size=(n, 12)).astype(np.float32) for n in (1500, 3000))
    own = vqrs.tune(x, nbytes=20_000, method="kmeans", random_state=0)
    other = vqrs.tune(x, nbytes=20_000, method="kmeans", cross_validate=4, random_state=0)
    fitted = other.best_estimator_
    assert -fitted.score(later) == pytest.approx(other.best().error, rel=0.1)
    assert -fitted.score(x) == pytest.approx(own.best().error, rel=0.1)
    assert other.best().error > 1.5 * own.best().error
    assert other.best().spread > 0
    assert "folds" in repr(other)


def test_folds_need_rows():
    with pytest.raises(ValueError, match="cross_validate=5 needs as many rows"):
        vqrs.tune(np.eye(3), nbytes=100_000, cross_validate=5)


# ---- how it is shown -----------------------------------------------------------------------------------------------


def test_prints(result):
    text = repr(result)
    assert "3,000 x 24 rows" in text
    for trial in result.front:
        assert trial.kind in text
    assert "to bound" in text
    assert result._repr_html_().count("<tr>") == min(len(result.front), SHOWN_ROWS) + 1


def test_to_dict_is_json(result):
    described = json.loads(json.dumps(result.to_dict()))
    assert described["shape"] == [3000, 24]
    assert len(described["trials"]) == len(result.trials)
    assert sum(trial["curve"] for trial in described["trials"]) == len(result.curve)


def test_plot(result, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    matplotlib.use("Agg")
    axes = result.plot()
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"best", "Gaussian bound", "product"} <= labels
    assert result.plot(axes) is axes
    matplotlib.pyplot.close(axes.figure)
    result.save_plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_without_matplotlib(result, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'vqrs\[plot\]'"):
        result.plot()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ratio": 2, "nbytes": 100}, ValueError, "ratio and nbytes were given"),
        ({"ratio": [4, -1]}, ValueError, "must be positive"),
        ({"ratio": []}, ValueError, "no budget"),
        ({"nbytes": "many"}, ValueError, "many"),
        ({"nbytes": 10}, ValueError, "nothing is as small as 10 bytes"),
        ({"method": "zip"}, ValueError, "unknown method 'zip'"),
        ({"effort": "most"}, ValueError, "effort='most' must be one of 'fast', 'balanced', 'best'"),
        ({"cross_validate": 1}, ValueError, "cross_validate=1"),
    ],
    ids=str,
)
def test_wrong_arguments(small_rows, arguments, error, words):
    with pytest.raises(error, match=words):
        vqrs.tune(small_rows, **arguments)


# ---- efforts and ladders -------------------------------------------------------------------------------------------


def test_more_effort_has_no_more_error(small_rows):
    fast, balanced = (vqrs.compress(small_rows, ratio=8, effort=e, random_state=0) for e in ("fast", "balanced"))
    assert balanced.relative_error <= 1.01 * fast.relative_error


def test_unknown_effort(small_rows):
    with pytest.raises(ValueError, match="effort='most'"):
        vqrs.compress(small_rows, ratio=8, effort="most")


@pytest.mark.parametrize("kind", [entry["name"] for entry in vqrs.kinds()])
@pytest.mark.parametrize("effort", [_ladders.FAST, _ladders.BALANCED, _ladders.BEST])
def test_steps_grow(kind, effort):
    """Every step of every ladder is accepted and takes more bytes than the one before, or as many but for padding."""
    for family in families_for(kind, {}, 20_000, 48, effort):
        assert 0 <= family.start < len(family.ladders)
        for ladder in family.ladders:
            sizes = [ladder[step].nbytes for step in range(len(ladder))]
            assert all(b > 0.95 * a - 512 for a, b in itertools.pairwise(sizes))
            for nbytes in (sizes[0] - 1, sizes[-1], sum(sizes) // len(sizes)):
                steps = ladder.steps_within(nbytes)
                assert steps == 0 or sizes[steps - 1] <= nbytes
            assert len(ladder) > 0


def test_variants_that_a_kind_refuses_are_left_out(monkeypatch):
    variants = [Variant({}), Variant({"no_such_parameter": 1}), Variant({"codebook_dtype": "no_such_type"})]
    monkeypatch.setitem(
        _ladders.RATES, "product", Rates("n_subvectors", lambda n, d, _: range(1, d + 1), lambda n, d: variants)
    )
    families = families_for("product", {}, 1000, 8)
    assert [family.ladders[0].fixed for family in families] == [{}]


def test_a_kind_without_a_line_gets_a_ladder(monkeypatch):
    monkeypatch.delitem(_ladders.RATES, "residual")
    (family,) = families_for("residual", {}, 1000, 8)
    assert family.ladders[0].rate == "n_stages"


def test_too_much_work_is_left_out(monkeypatch):
    work = lambda n_rows, dim, parameters: 10.0 * parameters["n_stages"]  # noqa: E731
    monkeypatch.setitem(_ladders.RATES, "residual", _ladders.RATES["residual"]._replace(work=work, bits=()))
    lengths = []
    for effort in (_ladders.FAST, _ladders.BALANCED, _ladders.BEST):
        of_kind = [f for f in families_for(None, {}, 5000, 64, effort) if f.ladders[0].kind == "residual"]
        lengths.append(len(of_kind[0].ladders[0]))
    assert lengths == [_ladders.MOST_WORK[0] // 10, _ladders.MOST_WORK[1] // 10, 64]
    (asked, *_) = families_for("residual", {}, 5000, 64, _ladders.FAST)
    assert len(asked.ladders[0]) == 64


def test_outward_starts_in_the_middle():
    ladders = [Ladder("product", {"n_bits": b}, None, [None], (10, 4)) for b in (4, 6, 8, 10)]
    assert [ladder.fixed["n_bits"] for ladder in Family(ladders, 2).outward()] == [8, 6, 10, 4]


def test_estimates_are_remembered():
    assert _ladders.estimated_bytes("product", {"n_bits": 4}, (100, 8)) == _core.estimate(
        "product", {"n_bits": 4}, 100, 8
    )
