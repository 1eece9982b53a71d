"""KMeans beside scikit-learn's, and what it adds."""

import itertools
import warnings

import numpy as np
import pytest
import sklearn.cluster
from sklearn.base import clone
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from vqrs import KMeans


def blobs():
    return make_blobs(n_samples=3000, centers=20, n_features=8, cluster_std=2.0, random_state=1)[0].astype(np.float32)


def noise():
    return np.random.default_rng(2).standard_normal((2000, 16), dtype=np.float32)


def digits():
    return load_digits().data.astype(np.float32)


TABLES = {"blobs": (blobs, 20), "noise": (noise, 32), "digits": (digits, 10)}


@pytest.fixture(scope="module", params=TABLES)
def table(request):
    make, n_clusters = TABLES[request.param]
    x = make()
    first = x[np.random.default_rng(3).choice(len(x), n_clusters, replace=False)]
    return x, first


def theirs_and_ours(x, first, **parameters):
    common = {"n_clusters": len(first), "init": first, "n_init": 1, **parameters}
    return sklearn.cluster.KMeans(**common).fit(x), KMeans(**common).fit(x)


@pytest.mark.parametrize("max_iter", [1, 5, 300])
def test_inertia_is_that_of_scikit_learn(table, max_iter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs, ours = theirs_and_ours(*table, max_iter=max_iter)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=0.005)
    assert ours.n_iter_ <= max_iter


def test_labels_for_the_same_centres_are_those_of_scikit_learn(table):
    x, first = table
    theirs, _ = theirs_and_ours(x, first, max_iter=10)
    ours = clone(KMeans(len(first), init=theirs.cluster_centers_)).fit(x)
    ours.cluster_centers_ = theirs.cluster_centers_
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=1e-3, atol=1e-3)
    assert ours.score(x) == pytest.approx(theirs.score(x), rel=1e-5)


def test_seeding_is_as_good_as_that_of_scikit_learn(table):
    x, first = table
    theirs = [sklearn.cluster.KMeans(len(first), random_state=seed).fit(x).inertia_ for seed in range(5)]
    ours = [KMeans(len(first), random_state=seed).fit(x).inertia_ for seed in range(5)]
    assert np.mean(ours) < 1.02 * np.mean(theirs)


def test_attributes(table):
    x, first = table
    kmeans = KMeans(len(first), random_state=0).fit(x)
    assert kmeans.cluster_centers_.shape == first.shape
    assert kmeans.cluster_centers_.dtype == np.float32
    assert kmeans.labels_.shape == (len(x),)
    assert kmeans.labels_.dtype == np.int32
    assert isinstance(kmeans.inertia_, float)
    assert kmeans.inertia_ == pytest.approx(-kmeans.score(x), rel=1e-6)
    np.testing.assert_array_equal(kmeans.labels_, kmeans.predict(x))
    np.testing.assert_array_equal(kmeans.labels_, kmeans.transform(x).argmin(axis=1))
    assert kmeans.get_feature_names_out()[0] == "kmeans0"
    again = clone(kmeans)
    np.testing.assert_array_equal(again.fit_predict(x), kmeans.labels_)
    np.testing.assert_array_equal(clone(kmeans).fit_transform(x), kmeans.transform(x))


def test_centres_are_the_means_of_their_rows():
    x = blobs()
    kmeans = KMeans(20, random_state=0, tol=0).fit(x)
    for label in range(20):
        np.testing.assert_allclose(kmeans.cluster_centers_[label], x[kmeans.labels_ == label].mean(axis=0), atol=1e-4)


@pytest.mark.parametrize("n_jobs", [1, 2, -1])
def test_threads_do_not_change_the_result(n_jobs):
    x = noise()
    one, other = KMeans(16, random_state=0, n_jobs=1).fit(x), KMeans(16, random_state=0, n_jobs=n_jobs).fit(x)
    np.testing.assert_array_equal(one.cluster_centers_, other.cluster_centers_)


def test_integer_weights_are_repeated_rows():
    x = blobs()[:500]
    weights = np.random.default_rng(4).integers(0, 4, len(x))
    first = x[:20]
    weighted = KMeans(20, init=first).fit(x, sample_weight=weights)
    repeated = KMeans(20, init=first).fit(np.repeat(x, weights, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-5)
    assert weighted.score(x, sample_weight=weights) == pytest.approx(-weighted.inertia_, rel=1e-5)


def test_rows_without_weight_do_not_matter():
    x = blobs()[:500]
    far = np.full((10, 8), 1e4, dtype=np.float32)
    both, weights = np.concatenate([x, far]), np.r_[np.ones(500), np.zeros(10)]
    kmeans = KMeans(5, random_state=0).fit(both, sample_weight=weights)
    assert np.abs(kmeans.cluster_centers_).max() < 1e3


def test_cosine_looks_at_directions():
    generator = np.random.default_rng(5)
    directions = np.linalg.qr(generator.standard_normal((16, 16)))[0][:4]
    true = generator.integers(0, 4, 800)
    lengths = generator.uniform(0.1, 50, (800, 1))
    x = ((directions[true] + 0.05 * generator.standard_normal((800, 16))) * lengths).astype(np.float32)
    kmeans = KMeans(4, metric="cosine", random_state=0).fit(x)
    assert sklearn.metrics.adjusted_rand_score(true, kmeans.labels_) == 1.0
    np.testing.assert_allclose(np.linalg.norm(kmeans.cluster_centers_, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(kmeans.predict(x * np.float32(7)), kmeans.labels_)
    cosine = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ kmeans.cluster_centers_.T
    np.testing.assert_allclose(kmeans.transform(x), 1 - cosine, atol=1e-5)
    assert kmeans.inertia_ == pytest.approx((1 - cosine.max(axis=1)).sum(), rel=1e-3)


def test_mini_batches_come_close():
    x = blobs()
    full = KMeans(20, random_state=0, n_init=3).fit(x).inertia_
    batches = KMeans(20, random_state=0, n_init=3, batch_size=256).fit(x)
    assert batches.inertia_ < 1.15 * full
    assert batches.inertia_ == pytest.approx(-batches.score(x), rel=1e-5)
    assert batches.labels_.shape == (len(x),)


def test_max_samples_learns_from_fewer_and_labels_all():
    x = blobs()
    kmeans = KMeans(20, random_state=0, max_samples=600).fit(x)
    assert kmeans.labels_.shape == (len(x),)
    assert kmeans.inertia_ == pytest.approx(-kmeans.score(x), rel=1e-5)
    assert not np.array_equal(kmeans.cluster_centers_, KMeans(20, random_state=0).fit(x).cluster_centers_)


def test_partial_fit_is_as_good_as_that_of_scikit_learn():
    x = blobs()

    def mean_inertia(estimator, seeds=range(8)):
        inertias = []
        for seed in seeds:
            kmeans = clone(estimator).set_params(random_state=seed)
            for start in range(0, len(x), 500):
                kmeans.partial_fit(x[start : start + 500])
            inertias.append(-kmeans.score(x))
        return np.mean(inertias)

    assert mean_inertia(KMeans(20)) < 1.15 * mean_inertia(MiniBatchKMeans(20))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_partial_fit_moves_a_centre_to_the_mean_of_its_rows(metric):
    kmeans = KMeans(1, metric=metric)
    x = np.abs(noise()[:60])
    kmeans.partial_fit(x[:30]).partial_fit(x[30:], sample_weight=np.ones(30))
    if metric == "euclidean":
        np.testing.assert_allclose(kmeans.cluster_centers_[0], x.mean(axis=0), rtol=1e-5)
    else:
        assert np.linalg.norm(kmeans.cluster_centers_[0]) == pytest.approx(1, rel=1e-6)
        mean = (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0)
        assert kmeans.cluster_centers_[0] @ mean / np.linalg.norm(mean) > 0.999


def test_more_runs_are_never_worse():
    x = noise()[:400]
    inertia = [KMeans(16, init="random", n_init=n_init, random_state=0).fit(x).inertia_ for n_init in (1, 2, 8)]
    assert inertia == sorted(inertia, reverse=True)


@pytest.mark.parametrize(("init", "n_init"), [("k-means++", 1), ("random", 10)])
def test_n_init_auto(init, n_init):
    x = noise()[:300]
    auto, explicit = (KMeans(8, init=init, n_init=n, random_state=0).fit(x) for n in ("auto", n_init))
    np.testing.assert_array_equal(auto.cluster_centers_, explicit.cluster_centers_)


def test_init_callable_is_called_for_each_run_and_the_best_run_is_kept():
    x = noise()[:300]
    drawn = []

    def init(X, n_clusters, random_state):
        drawn.append(X[random_state.permutation(len(X))[:n_clusters]])
        return drawn[-1]

    best = KMeans(8, init=init, random_state=0).fit(x)
    assert len(drawn) == 10
    runs = [KMeans(8, init=centers).fit(x).inertia_ for centers in drawn]
    assert best.inertia_ == min(runs) < max(runs)


def test_an_init_array_makes_one_run_and_says_so():
    x = noise()[:300]
    with pytest.warns(RuntimeWarning, match="performing only one init in KMeans instead of n_init=3"):
        three = KMeans(8, init=x[:8], n_init=3).fit(x)
    np.testing.assert_array_equal(three.cluster_centers_, KMeans(8, init=x[:8]).fit(x).cluster_centers_)


def test_empty_clusters_are_filled():
    x = blobs()
    first = np.concatenate([x[:10], np.full((10, 8), 1e4, dtype=np.float32)])
    kmeans = KMeans(20, init=first).fit(x)
    assert len(np.unique(kmeans.labels_)) == 20
    theirs = sklearn.cluster.KMeans(20, init=first).fit(x)
    assert kmeans.inertia_ < 1.1 * theirs.inertia_


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_fewer_distinct_rows_than_clusters_warns_in_the_words_of_scikit_learn(init):
    x = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    with pytest.warns(ConvergenceWarning) as ours:
        kmeans = KMeans(6, init=init, random_state=0).fit(x)
    assert [str(w.message) for w in ours] == [
        "Number of distinct clusters (3) found smaller than n_clusters (6). Possibly due to duplicate points in X."
    ]
    assert kmeans.inertia_ == 0
    assert kmeans.cluster_centers_.shape == (6, 3)
    assert np.isfinite(kmeans.cluster_centers_).all()


def message_of(make, x):
    with pytest.raises(ValueError) as error:
        make().fit(x)
    return str(error.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"n_clusters": 0},
        {"n_clusters": "8"},
        {"n_clusters": 1000},
        {"init": "furthest"},
        {"init": np.zeros((3, 6))},
        {"init": np.zeros((8, 5))},
        {"n_init": 0},
        {"max_iter": 0},
        {"tol": -1},
        {"copy_x": 2},
        {"algorithm": "full"},
        {"verbose": "loud"},
    ],
    ids=str,
)
def test_errors_are_those_of_scikit_learn(parameters):
    x = np.random.default_rng(0).standard_normal((50, 6))
    assert message_of(lambda: KMeans(**parameters), x) == message_of(lambda: sklearn.cluster.KMeans(**parameters), x)


@pytest.mark.parametrize("parameters", [{"metric": "manhattan"}, {"batch_size": 0}, {"max_samples": 0.5}], ids=str)
def test_errors_of_the_parameters_that_are_ours(parameters):
    (name,) = parameters
    assert f"The '{name}' parameter of KMeans must be" in message_of(lambda: KMeans(**parameters), np.eye(10))


@pytest.mark.parametrize("method", ["predict", "transform", "score"])
def test_not_fitted(method):
    with pytest.raises(NotFittedError):
        getattr(KMeans(), method)(np.eye(8))


def memory_map(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def read_only(x, folder):
    x = x.copy()
    x.flags.writeable = False
    return x


FORMS = {
    "float64": lambda x, folder: x.astype(np.float64),
    "fortran": lambda x, folder: np.asfortranarray(x),
    "strided": lambda x, folder: np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3],
    "reversed": lambda x, folder: x[::-1].copy()[::-1],
    "big-endian": lambda x, folder: x.astype(">f4"),
    "memory map": memory_map,
    "read-only": read_only,
    "list": lambda x, folder: x.tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_container_gives_the_same_clusters(form, tmp_path):
    x = noise()[:200]
    given = FORMS[form](x, tmp_path)
    kept = np.array(given)
    expected = KMeans(5, random_state=0).fit(x)
    kmeans = KMeans(5, random_state=0, copy_x=False).fit(given)
    np.testing.assert_array_equal(kmeans.cluster_centers_, expected.cluster_centers_)
    np.testing.assert_array_equal(kmeans.predict(given), expected.labels_)
    np.testing.assert_array_equal(np.array(given), kept)


def relocated_row():
    """Rows, weights and centres where a row is moved to an empty cluster that then drifts away from it.

    The row's former centre comes nearer meanwhile, while most rows stay with theirs, so that they are spared.
    """
    rng = np.random.default_rng(0)
    pairs = [(i, j, a, b) for i, j in itertools.combinations(range(2, 16), 2) for a in (60, -60) for b in (60, -60)]

    def at(place, group, aside=0.0):
        x = np.zeros(64)
        i, j, x_i, x_j = pairs[group]
        x[[0, 1, i, j]] = place, aside, x_i, x_j
        return x

    steady = [at(0, group + 40) + rng.normal(size=(6, 64)) * 0.01 for group in range(119)]
    rows = [row.astype("f4") for group in steady for row in group]
    weights = [1.0] * len(rows)
    for weight, row in [(1e-6, at(0, 0)), (1, at(7, 0)), (1, at(20, 0)), (0.9, at(26, 0)), (0.1, at(36, 0))]:
        rows, weights = [*rows, row], [*weights, weight]
    for weight, row in [(5, at(44.8, 0)), (1, at(0, 0, 9)), (5, at(0, 0, 21))]:
        rows, weights = [*rows, row], [*weights, weight]
    centers = [group.astype("f4").astype("f8").mean(0) for group in steady]
    centers += [at(13.5, 0), at(27, 0), at(45.2, 0), at(0, 0, 19), at(-32, 0), at(-34.1, 0), at(-29.9, 0)]
    centers += [at(0, 12), at(1.5, 12)]
    more = [at(v - 32, 0) for v in (-1, 1, -1.9, -1.9, -1.9, 1.9, 1.9, 1.9)] + [
        at(v, 12) for v in np.arange(0, 12, 0.3)
    ]
    return np.array(rows + more, "f4"), np.array(weights + [1.0] * len(more)), np.array(centers, "f4")


def test_a_relocated_row_is_compared_with_its_former_centre():
    x, weights, centers = relocated_row()
    kmeans = KMeans(len(centers), init=centers, n_init=1, max_iter=100, tol=0.0).fit(x, sample_weight=weights)
    assert np.array_equal(kmeans.labels_, kmeans.predict(x))


@pytest.mark.parametrize("ratio", [1e8, 1e17, 1e20])
def test_heavy_rows_leave_nothing_behind(ratio):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = rng.uniform(-10, 10, size=(60, 2)).astype("f4")
        weights = np.where(np.arange(60) < 6, ratio * rng.uniform(0.5, 2, 60), 1.0)
        kmeans = KMeans(8, init=x[6:14], n_init=1, max_iter=4, tol=0.0).fit(x, sample_weight=weights)
        assert np.abs(kmeans.cluster_centers_).max() <= 10


def test_weights_that_overflow_are_refused():
    with pytest.raises(ValueError, match=r"sample_weight\[0\]=1e308 .*scale all of them down"):
        KMeans(3).fit(np.eye(24), sample_weight=np.full(24, 1e308))
