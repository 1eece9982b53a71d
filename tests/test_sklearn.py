"""The estimators under scikit-learn's own checks, and inside its machinery."""

import inspect
import os
import pickle
import unittest

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import vqrs
from vqrs import KMeans, ProductQuantizer, ResidualQuantizer, ScalarQuantizer, VectorQuantizer, _core, quantizers
from vqrs._base import Estimator, Quantizer

sklearn_version = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
QUANTIZERS = [getattr(quantizers, name) for name in quantizers.__all__]
ESTIMATORS = [KMeans, *QUANTIZERS]

# A round of k-means draws rows by their weights, so that repeating rows draws others, and sums over repeated rows round
# differently. scikit-learn's own KMeans is exempt for the same reason. ScalarQuantizer draws nothing and passes.
EXEMPT = {
    estimator: ["check_sample_weight_equivalence_on_dense_data"]
    for estimator in ESTIMATORS
    if estimator is not ScalarQuantizer
}

SMALL = {cls: cls(random_state=0) for cls in QUANTIZERS} | {
    KMeans: KMeans(n_clusters=3, random_state=0),
    VectorQuantizer: VectorQuantizer(n_clusters=4, random_state=0),
    ProductQuantizer: ProductQuantizer(n_subvectors=2, n_bits=3, random_state=0),
    ResidualQuantizer: ResidualQuantizer(n_stages=2, n_bits=3, random_state=0),
    ScalarQuantizer: ScalarQuantizer(),
    vqrs.AdditiveQuantizer: vqrs.AdditiveQuantizer(n_codebooks=2, n_bits=3, n_rounds=2, random_state=0),
    vqrs.ProductResidualQuantizer: vqrs.ProductResidualQuantizer(2, 2, n_bits=3, random_state=0),
    vqrs.TreeQuantizer: vqrs.TreeQuantizer(branching=3, random_state=0),
}


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((120, 6), dtype=np.float32)


def checks_of(estimator):
    return list(estimator_checks_generator(estimator))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        pytest.param(cls, check, id=f"{cls.__name__}-{number}-{check.func.__name__}")
        for cls in ESTIMATORS
        for number, (_, check) in enumerate(checks_of(cls()))
        if check.func.__name__ not in EXEMPT.get(cls, [])
    ],
)
def test_estimator_check(estimator, check):
    assert os.environ["SCIPY_ARRAY_API"] == "1", "conftest.py sets it before scipy is imported"
    try:
        check(estimator())
    except (pytest.skip.Exception, unittest.SkipTest) as skipped:
        pytest.fail(f"scikit-learn skipped the check: {skipped}")


# Of scikit-learn 1.9.1; the one that is exempt is among them.
N_CHECKS = dict.fromkeys(QUANTIZERS, 53) | {KMeans: 58}


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_number_of_checks(cls):
    """A check that silently goes missing is noticed; newer versions of scikit-learn may add some."""
    if sklearn_version >= (1, 9):
        assert len(checks_of(cls())) >= N_CHECKS[cls]
    assert len(EXEMPT.get(cls, [])) <= 1


@pytest.mark.parametrize("cls", QUANTIZERS)
def test_parameters_are_those_of_the_core(cls):
    kind = next(kind for kind in _core.kinds() if kind["name"] == cls._kind)
    signature = inspect.signature(cls).parameters
    shared = set(Estimator._parameter_constraints)
    assert {name: p.default for name, p in signature.items() if name not in shared} == kind["parameters"]
    assert {"random_state", "n_jobs", "verbose"} <= set(signature)


def test_each_kind_has_one_class():
    # Groups of rows have a quantizer of their own, which is none of the core's.
    kinds = [*(kind["name"] for kind in _core.kinds()), vqrs.MixedPrecisionQuantizer._kind]
    assert sorted(cls._kind for cls in Quantizer.__subclasses__()) == sorted(kinds)


def test_kmeans_signature_is_that_of_scikit_learn():
    theirs = inspect.signature(sklearn.cluster.KMeans).parameters
    ours = inspect.signature(KMeans).parameters
    assert {name: (p.default, p.kind) for name, p in theirs.items()}.items() <= {
        name: (p.default, p.kind) for name, p in ours.items()
    }.items()
    assert set(ours) - set(theirs) == {"metric", "batch_size", "max_samples", "n_jobs"}


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_clone_pickle_and_copy_keep_what_was_learned(cls, x):
    fitted = clone(SMALL[cls]).fit(x)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(x), fitted.transform(x))
    assert again.get_params() == fitted.get_params()
    assert not hasattr(clone(fitted), "n_features_in_")


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_set_output_gives_named_columns(cls, x):
    import pandas as pd

    frame = pd.DataFrame(x, index=np.arange(len(x)) + 1000).rename(columns="c{}".format)
    estimator = clone(SMALL[cls]).set_output(transform="pandas")
    out = estimator.fit_transform(frame)
    assert list(out.columns) == list(estimator.get_feature_names_out())
    assert out.columns[0] == f"{cls.__name__.lower()}0"
    assert out.index.equals(frame.index)
    assert list(estimator.feature_names_in_) == list(frame.columns)
    np.testing.assert_array_equal(out.to_numpy(), clone(SMALL[cls]).fit(x).transform(x))
    if cls is not KMeans:
        np.testing.assert_array_equal(estimator.inverse_transform(out), estimator.inverse_transform(out.to_numpy()))


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_pipeline(cls, x):
    pipeline = make_pipeline(StandardScaler(), clone(SMALL[cls])).fit(x)
    scaled = StandardScaler().fit_transform(x)
    np.testing.assert_array_equal(pipeline.transform(x), clone(SMALL[cls]).fit(scaled).transform(scaled))
    assert pipeline.score(x) <= 0


def test_grid_search_prefers_more_bits(x):
    search = GridSearchCV(ProductQuantizer(n_subvectors=3, random_state=0), {"n_bits": np.array([1, 2, 4])}, cv=2).fit(
        x
    )
    assert search.best_params_ == {"n_bits": 4}
    assert search.best_score_ > -1


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_sample_weight_is_routed(cls, x):
    weights = np.linspace(0, 3, len(x))
    with sklearn.config_context(enable_metadata_routing=True):
        step = clone(SMALL[cls]).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        pipeline = make_pipeline(step).fit(x, sample_weight=weights)
        routed = pipeline.score(x, sample_weight=weights)
    assert routed == clone(SMALL[cls]).fit(x, sample_weight=weights).score(x, sample_weight=weights)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_html_repr_names_the_class(cls):
    assert cls.__name__ in SMALL[cls]._repr_html_()


class Recorder:
    """A callback of scikit-learn that writes down what it is told."""

    def __init__(self):
        self.begun, self.ended, self.scores = [], [], []

    def setup(self, estimator, context):
        self.begun.append("setup")

    def teardown(self, estimator, context):
        self.ended.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.begun.append(context.task_name)

    def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None):
        self.ended.append(context.task_name)
        if fitted_estimator is not None:
            self.scores.append(fitted_estimator.score(X))


@pytest.mark.skipif(not hasattr(Estimator, "set_callbacks"), reason="scikit-learn has callbacks from 1.9 on")
@pytest.mark.parametrize("cls", ESTIMATORS)
def test_callbacks_are_told_of_the_fit_and_its_stages(cls, x):
    recorder = Recorder()
    estimator = clone(SMALL[cls]).set_callbacks(recorder).fit(x)
    assert recorder.begun[:2] == ["setup", "fit"]
    assert recorder.ended[-2:] == ["fit", "teardown"]
    assert sorted(recorder.begun[1:]) == sorted(recorder.ended[:-1])
    assert recorder.scores == [estimator.score(x)]


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_verbose_prints_one_line(cls, x, capsys):
    quiet = clone(SMALL[cls]).fit(x)
    assert capsys.readouterr().out == ""
    loud = clone(SMALL[cls]).set_params(verbose=1).fit(x)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert cls.__name__ in printed
    np.testing.assert_array_equal(loud.transform(x), quiet.transform(x))


def test_public_names():
    assert all(getattr(vqrs, cls.__name__) is cls for cls in ESTIMATORS)
