"""k-means with scikit-learn's interface."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from sklearn.base import ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from vqrs import _core
from vqrs._base import Estimator
from vqrs._validation import as_jobs, as_matrix, as_seed, as_weights

__all__ = ["KMeans"]

MOST = 2**63 - 1
"""As good as any larger number of rows, runs or iterations."""


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, Estimator):
    """k-means clustering: takes the place of ``sklearn.cluster.KMeans``, for dense data, in float32.

    Parameters
    ----------
    n_clusters : int, default=8
        Number of clusters.
    init : {"k-means++", "random"}, callable or array-like of shape (n_clusters, n_features), default="k-means++"
        First centres: seeded far apart, rows drawn at random, what ``init(X, n_clusters, random_state=...)`` returns,
        or the ones given.
    n_init : int or "auto", default="auto"
        Number of runs, of which the one with the least inertia is kept. "auto" is 10 for ``init="random"`` and
        callables, otherwise 1.
    max_iter : int, default=300
        Most iterations of a run.
    tol : float, default=1e-4
        A run stops when the summed squared movement of its centres is at most this times the mean variance of the
        features.
    verbose : int, default=0
        1 prints progress.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centres; an int repeats them. The draws differ from scikit-learn's.
    copy_x : bool, default=True
        Accepted for compatibility: the data are never modified.
    algorithm : {"lloyd", "elkan"}, default="lloyd"
        Accepted for compatibility: both names give the same result here, as they do in scikit-learn.
    metric : {"euclidean", "cosine"}, default="euclidean"
        "cosine" compares directions: distances are 1 − cosine, and centres have length one.
    batch_size : int or None, default=None
        Rows of a mini-batch; None uses all rows in each iteration.
    max_samples : int or None, default=None
        Rows to learn from, drawn at random; None learns from all. Labels are given to all rows.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.

    Attributes
    ----------
    cluster_centers_ : ndarray of shape (n_clusters, n_features), float32
        The centres.
    labels_ : ndarray of shape (n_samples,), int32
        Cluster of each row.
    inertia_ : float
        Sum of squared distances of the rows to their centres (of 1 − cosine, if ``metric="cosine"``), weighted if
        weights were given.
    n_iter_ : int
        Iterations of the run that was kept.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    VectorQuantizer : Stores a table as labels and centres.

    References
    ----------
    S. Lloyd, "Least squares quantization in PCM", 1982. D. Arthur, S. Vassilvitskii, "k-means++", 2007.
    D. Sculley, "Web-scale k-means clustering", 2010, for mini-batches and ``partial_fit``.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import KMeans
    >>> x = np.array([[1, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
    >>> kmeans = KMeans(n_clusters=2, random_state=0).fit(x)
    >>> bool(kmeans.labels_[0] == kmeans.labels_[1] != kmeans.labels_[3])
    True
    >>> kmeans.inertia_
    16.0
    >>> kmeans.cluster_centers_[kmeans.predict([[0, 0], [12, 3]])]
    array([[ 1.,  2.],
           [10.,  2.]], dtype=float32)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **Estimator._parameter_constraints,
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "init": [StrOptions({"k-means++", "random"}), callable, "array-like"],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "copy_x": ["boolean"],
        "algorithm": [StrOptions({"lloyd", "elkan"})],
        "metric": [StrOptions({"euclidean", "cosine"})],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "max_samples": [Interval(Integral, 1, None, closed="left"), None],
    }

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | Literal["auto"] = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: Literal["lloyd", "elkan"] = "lloyd",
        metric: Literal["euclidean", "cosine"] = "euclidean",
        batch_size: int | None = None,
        max_samples: int | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.metric = metric
        self.batch_size = batch_size
        self.max_samples = max_samples
        self.n_jobs = n_jobs

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> KMeans:
        """Find the clusters.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The rows: any real dtype and strides, numpy array or memory map, torch CPU tensor, DLPack object or frame.
        y : Ignored
            Present by convention.
        sample_weight : array-like of shape (n_samples,), optional
            Weight of each row.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError
            A parameter out of range, fewer rows than clusters, rows that are not finite, or wrong weights.
        TypeError
            Sparse rows, or of a dtype that is no number.

        Warns
        -----
        ConvergenceWarning
            Fewer distinct rows than clusters.
        """
        x = self._read_rows(X, reset=True)
        weights = as_weights(sample_weight, len(x))
        if len(x) < self.n_clusters:
            raise ValueError(f"n_samples={len(x)} should be >= n_clusters={self.n_clusters}.")
        with self._progress(x, {"sample_weight": sample_weight}) as progress:
            runs = (self._run(x, init, n_init, weights, progress) for init, n_init in self._starts(x))
            centers, labels, inertia, n_iter, _ = min(runs, key=lambda run: run[2])
            self.cluster_centers_, self.labels_, self.inertia_, self.n_iter_ = centers, labels, inertia, n_iter
            self._weight_seen = np.bincount(labels, weights, minlength=self.n_clusters)
        self._warn_of_duplicates()
        return self

    def _run(
        self,
        x: NDArray[np.float32],
        init: str | NDArray[np.float32],
        n_init: int,
        weights: NDArray[np.float64] | None,
        progress: _core.Progress | None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int32], float, int, int]:
        return _core.kmeans_fit(
            x,
            int(self.n_clusters),
            init=init,
            n_init=min(n_init, MOST),
            sample_weight=weights,
            max_iter=min(int(self.max_iter), MOST),
            tol=float(self.tol),
            metric=self.metric,
            batch_size=None if self.batch_size is None else min(self.batch_size, MOST),
            max_samples=None if self.max_samples is None else min(self.max_samples, MOST),
            seed=as_seed(self.random_state),
            n_jobs=as_jobs(self.n_jobs),
            progress=progress,
        )

    def _starts(self, x: NDArray[np.float32]) -> list[tuple[str | NDArray[np.float32], int]]:
        """First centres, or the way to draw them, with how many runs to make of each."""
        n_init = self.n_init
        if isinstance(self.init, str):
            if n_init == "auto":
                n_init = 10 if self.init == "random" else 1
            return [(self.init, int(n_init))]
        if callable(self.init):
            generator = np.random.RandomState(as_seed(self.random_state) % 2**32)
            draws = (
                self.init(x, self.n_clusters, random_state=generator) for _ in range(10 if n_init == "auto" else n_init)
            )
            return [(self._check_centers(x, centers), 1) for centers in draws]
        if n_init not in ("auto", 1):
            warnings.warn(
                f"Explicit initial center position passed: performing only one init in {type(self).__name__} "
                f"instead of n_init={n_init}.",
                RuntimeWarning,
                stacklevel=4,
            )
        return [(self._check_centers(x, self.init), 1)]

    def _check_centers(self, x: NDArray[np.float32], init: Any) -> NDArray[np.float32]:
        centers = as_matrix(init, "init")
        if centers.shape[0] != self.n_clusters:
            raise ValueError(
                f"The shape of the initial centers {centers.shape} does not match the number of clusters "
                f"{self.n_clusters}."
            )
        if centers.shape[1] != x.shape[1]:
            raise ValueError(
                f"The shape of the initial centers {centers.shape} does not match the number of features of the data "
                f"{x.shape[1]}."
            )
        return centers

    def _warn_of_duplicates(self) -> None:
        distinct = len(np.unique(self.labels_))
        if distinct < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters ({self.n_clusters}). "
                "Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=4,
            )

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> KMeans:
        """Move the centres towards one more batch of rows; the first batch places them.

        A centre is the mean of all rows that were ever assigned to it, at the time they came. ``labels_`` and
        ``inertia_`` are those of the last batch.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The batch, as in ``fit``. The first one needs at least ``n_clusters`` rows.
        y : Ignored
            Present by convention.
        sample_weight : array-like of shape (n_samples,), optional
            Weight of each row.

        Returns
        -------
        self
            The fitted estimator.
        """
        if not hasattr(self, "cluster_centers_"):
            return self.fit(X, sample_weight=sample_weight)
        x = self._read_rows(X, reset=False)
        weights = as_weights(sample_weight, len(x))
        _core.check_rows(x, weights)
        self.labels_, distances = _core.kmeans_predict(x, self.cluster_centers_, self.metric, as_jobs(self.n_jobs))
        self.inertia_ = _weighted_sum(distances, weights)
        self._move_centers(x, np.ones(len(x)) if weights is None else weights)
        self.n_iter_ += 1
        return self

    def _move_centers(self, x: NDArray[np.float32], weights: NDArray[np.float64]) -> None:
        rows = x.astype(np.float64)
        if self.metric == "cosine":
            rows = _directions(rows)
        members = csr_array((weights, self.labels_, np.arange(len(x) + 1)), shape=(len(x), self.n_clusters))
        sums = self.cluster_centers_ * self._weight_seen[:, np.newaxis] + members.T @ rows
        self._weight_seen = self._weight_seen + np.bincount(self.labels_, weights, minlength=len(sums))
        seen = self._weight_seen > 0
        centers = self.cluster_centers_.astype(np.float64)
        centers[seen] = sums[seen] / self._weight_seen[seen, np.newaxis]
        if self.metric == "cosine":
            centers = _directions(centers)
        self.cluster_centers_ = centers.astype(np.float32)

    def fit_predict(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> NDArray[np.int32]:
        """``fit(X).labels_``.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``.

        Returns
        -------
        ndarray of shape (n_samples,), int32
            Cluster of each row.
        """
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> NDArray[np.float32]:
        """``fit(X).transform(X)``.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``.

        Returns
        -------
        ndarray of shape (n_samples, n_clusters), float32
            Distances to the centres.
        """
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def predict(self, X: Any) -> NDArray[np.int32]:
        """Nearest centre of each row; the lowest number where two are equally near.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The rows, as in ``fit``.

        Returns
        -------
        ndarray of shape (n_samples,), int32
            Numbers of the centres.
        """
        check_is_fitted(self)
        return self._nearest(self._read_rows(X, reset=False))[0]

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Distances to all centres, not squared (1 − cosine, if ``metric="cosine"``).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The rows, as in ``fit``.

        Returns
        -------
        ndarray of shape (n_samples, n_clusters), float32
            The distances.
        """
        check_is_fitted(self)
        x = self._read_rows(X, reset=False)
        return _core.kmeans_transform(x, self.cluster_centers_, self.metric, as_jobs(self.n_jobs))

    def score(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> float:
        """Minus the inertia of rows with the centres that were found.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The rows, as in ``fit``.
        y : Ignored
            Present by convention.
        sample_weight : array-like of shape (n_samples,), optional
            Weight of each row.

        Returns
        -------
        float
            Minus the weighted sum of squared distances.
        """
        check_is_fitted(self)
        x = self._read_rows(X, reset=False)
        weights = as_weights(sample_weight, len(x))
        _core.check_rows(x, weights)
        return -_weighted_sum(self._nearest(x)[1], weights)

    def _nearest(self, x: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        return _core.kmeans_predict(x, self.cluster_centers_, self.metric, as_jobs(self.n_jobs))

    @property
    def _n_features_out(self) -> int:
        return self.cluster_centers_.shape[0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _weighted_sum(values: NDArray[np.float32], weights: NDArray[np.float64] | None) -> float:
    return float(np.sum(values, dtype=np.float64) if weights is None else np.dot(values.astype(np.float64), weights))


def _directions(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows scaled to length one; zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
