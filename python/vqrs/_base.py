"""What every estimator shares (input, progress), and the whole of a quantizer but its parameters."""

from __future__ import annotations

import copyreg
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqrs import _core
from vqrs._encode import encode_table
from vqrs._progress import CallbackSteps, printed_progress
from vqrs._validation import as_codes, as_jobs, as_matrix, as_parameters, as_seed, as_size, as_weights, is_frame

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils._param_validation import Interval
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("The estimators of vqrs need scikit-learn 1.6 or newer: pip install 'vqrs[sklearn]'") from error

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn before 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in where scikit-learn has no callbacks yet."""


if TYPE_CHECKING:
    from vqrs.table import Table


def _codec_to_parts(codec: _core.Codec) -> tuple[Any, ...]:
    return _codec_from_parts, codec.to_parts()


def _codec_from_parts(description: str, tensors: dict[str, NDArray[Any]]) -> _core.Codec:
    return _core.Codec.from_parts(description, tensors)


# The compiled class cannot be pickled by itself; with this, pickle, copy and joblib can.
copyreg.pickle(_core.Codec, _codec_to_parts)


class Estimator(CallbackSupportMixin, BaseEstimator):
    """Base of quantizers and of ``KMeans``."""

    # Kinds that draw nothing have no such parameter.
    random_state: Any = 0
    n_jobs: int | None
    verbose: int

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "random_state": [
            Interval(Integral, 0, 2**64 - 1, closed="both"),
            np.random.RandomState,
            np.random.Generator,
            None,
        ],
        "n_jobs": [Integral, None],
        "verbose": ["verbose"],
    }

    def _read_rows(self, X: Any, *, reset: bool) -> NDArray[np.float32]:
        """X as the compiled module takes it; its features are noted (``reset``) or compared with those of fit."""
        x = as_matrix(X)
        # Only frames have names to look at; other containers may be ones that scikit-learn cannot count.
        validate_data(self, X if is_frame(X) else x, reset=reset, skip_check_array=True)
        return x

    @contextmanager
    def _progress(self, x: NDArray[np.float32], metadata: dict[str, Any]) -> Iterator[_core.Progress | None]:
        """A progress function for one fit, or None where nobody looks: it feeds the printed line and scikit-learn's
        callbacks, whose task of the whole fit begins and ends here.
        """
        with printed_progress(type(self).__name__, self.verbose) as line:
            if not hasattr(self, "_init_callback_context"):
                yield line
                return
            task = self._init_callback_context(max_subtasks=None)
            task.call_on_fit_task_begin(estimator=self, X=x, metadata=metadata)
            steps = CallbackSteps(self, task) if hasattr(self, "_skl_callbacks") else None
            yield _both(line, steps)
            if steps is not None:
                steps.close()
            # No attributes need adding to reconstruct the fitted estimator: it has them all.
            task.call_on_fit_task_end(estimator=self, X=x, metadata=metadata, reconstruction_attributes={})


def _both(first: _core.Progress | None, second: _core.Progress | None) -> _core.Progress | None:
    if first is None or second is None:
        return first or second

    def call(stage: str, done: int, total: int) -> None:
        first(stage, done, total)
        second(stage, done, total)

    return call


def _inner(tensors: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    """The tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Quantizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Base of all quantizers: a subclass adds its parameters and names its kind.

    Attributes
    ----------
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of the longest-running k-means, or of the rounds of a kind without one.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted, weighted if they were.
    mean_ : ndarray of shape (n_features_in_,), float32
        The mean row, if ``center``.
    components_ : ndarray of shape (n_components, n_features_in_), float32
        The rotation as it is read, if it is stored.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.
    """

    _kind: ClassVar[str]

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> Quantizer:
        """Learn the codebooks.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features)
            The rows: any real dtype and strides, numpy array or memory map, torch CPU tensor, DLPack object or frame.
        y : Ignored
            Present by convention.
        sample_weight : array-like of shape (n_rows,), optional
            Weight of each row in the squared error, for example how often it is looked up.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError
            A parameter out of range; rows that are empty, not finite, or not two-dimensional; wrong weights.
        TypeError
            Sparse rows, or of a dtype that is no number.

        Warns
        -----
        ConvergenceWarning
            There was too little data for the parameters; the message says what was made smaller.
        """
        self._fit(X, sample_weight, stacklevel=4)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> NDArray[np.uint8]:
        """Learn the codebooks and return the codes: ``fit(X).transform(X)`` byte for byte, in one pass less.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``.

        Returns
        -------
        ndarray of shape (n_rows, row_bytes_), uint8
            The codes.
        """
        # One frame more than fit: that of set_output.
        return self._fit(X, sample_weight, stacklevel=5)

    def _fit(self, X: Any, sample_weight: ArrayLike | None, stacklevel: int) -> NDArray[np.uint8]:
        """Fits and returns the codes; a warning points at the caller, ``stacklevel`` frames up."""
        x = self._read_rows(X, reset=True)
        with self._progress(x, {"sample_weight": sample_weight}) as progress:
            codec, codes = _core.fit(
                self._kind,
                self._core_parameters(),
                x,
                sample_weight=as_weights(sample_weight, len(x)),
                seed=as_seed(self.random_state),
                n_jobs=as_jobs(self.n_jobs),
                progress=progress,
            )
            self._set_codec(codec)
        if codec.notes:
            warnings.warn(
                f"{type(self).__name__}: {'; '.join(codec.notes)}.", ConvergenceWarning, stacklevel=stacklevel
            )
        return codes

    def transform(self, X: Any) -> NDArray[np.uint8]:
        """Encode rows.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
            The rows, as in ``fit``.

        Returns
        -------
        ndarray of shape (n_rows, row_bytes_), uint8
            The codes, packed as a table stores them, least significant bit first.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            Rows that are empty, not finite, or have another number of features than those of ``fit``.
        """
        check_is_fitted(self)
        return self._codec.encode(self._read_rows(X, reset=False), n_jobs=as_jobs(self.n_jobs))

    def inverse_transform(self, codes: Any) -> NDArray[np.float32]:
        """Decode codes.

        Parameters
        ----------
        codes : array-like of shape (n_rows, row_bytes_), uint8
            What ``transform`` returned.

        Returns
        -------
        ndarray of shape (n_rows, n_features_in_), float32
            The rows that the codes stand for.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        TypeError
            The codes are not uint8.
        ValueError
            The codes are not ``row_bytes_`` wide.
        """
        check_is_fitted(self)
        return self._codec.decode(as_codes(codes, self.row_bytes_), n_jobs=as_jobs(self.n_jobs))

    def score(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> float:
        """Minus the relative squared error ‖X − X̂‖² / ‖X‖², so that more is better.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
            The rows, as in ``fit``.
        y : Ignored
            Present by convention.
        sample_weight : array-like of shape (n_rows,), optional
            Weight of each row in both sums.

        Returns
        -------
        float
            0 is perfect; -1 is no better than decoding to zeros.
        """
        check_is_fitted(self)
        x = self._read_rows(X, reset=False)
        n_jobs = as_jobs(self.n_jobs)
        weights = as_weights(sample_weight, len(x))
        codes = self._codec.encode(x, n_jobs=n_jobs)
        errors = _core.reconstruction_errors(x, codes, self._codec, weights, n_jobs)
        return -errors["relative" if weights is None else "weighted"]

    def estimate(self, n_rows: int, n_features: int) -> int:
        """Bytes of the table's file for so many rows, without fitting; names and metadata aside.

        Exact, but an upper bound where the rows decide: equal rows, and principal components that get no bits.

        Parameters
        ----------
        n_rows, n_features : int
            Shape of the table.

        Returns
        -------
        int
            Bytes, all counted: header, codes, codebooks, checksums, padding.
        """
        sizes = as_size(n_rows, "n_rows"), as_size(n_features, "n_features")
        return _core.estimate(self._kind, self._core_parameters(), *sizes)

    def compress(
        self,
        X: Any,
        path: str | PathLike[str] | None = None,
        *,
        sample_weight: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> Table:
        """Encode rows into a table with what was fitted; nothing is fitted again.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_), or iterator of such blocks
            With ``path``, it may be a memory map larger than memory, or an iterator of blocks of rows.
        path : path-like, optional
            File to write; the table is then mapped from it. None: the table stays in memory.
        sample_weight : array-like of shape (n_rows,), optional
            Weight of each row in the table's weighted error.
        names : sequence of str, optional
            One name a row.
        metadata : mapping of str to str, optional
            What you want to keep with the table.
        durable : bool, default=True
            Whether the file is forced to the disk before it gets its name.

        Returns
        -------
        Table
            The compressed rows.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            Wrong rows, names or weights, or an iterator without ``path``.
        """
        check_is_fitted(self)
        # Blocks of a stream are looked at as they come.
        if is_frame(X) or (path is None and not isinstance(X, Iterator)):
            X = self._read_rows(X, reset=False)
        with printed_progress(type(self).__name__, self.verbose) as progress:
            return encode_table(
                self._codec,
                X,
                path,
                sample_weight=sample_weight,
                names=names,
                metadata=metadata,
                durable=durable,
                n_jobs=as_jobs(self.n_jobs),
                progress=progress,
            )

    def _core_parameters(self) -> dict[str, Any]:
        shared = Estimator._parameter_constraints
        parameters = self.get_params(deep=False).items()
        return as_parameters({name: value for name, value in parameters if name not in shared})

    def _set_codec(self, codec: _core.Codec) -> None:
        self._codec = codec
        self.row_bytes_ = codec.row_bytes
        self.n_iter_ = codec.n_iter
        self.relative_error_ = codec.relative_error
        form, tensors = self._read_front(codec)
        if form == "books":
            self.codebooks_ = codec.books()
        elif form == "levels":
            self.scale_, self.offset_ = tensors.get("scale"), tensors.get("offset")

    def _read_front(self, codec: _core.Codec) -> tuple[str, dict[str, NDArray[Any]]]:
        """Sets ``mean_`` and ``components_`` where rows are centred or turned by a matrix; form and tensors behind."""
        for name in ("mean_", "components_"):
            self.__dict__.pop(name, None)  # of a fit with other parameters
        description, tensors = json.loads(codec.description()), codec.tensors()
        if description["form"] == "join":
            description, tensors = description["parts"][0], _inner(tensors, "parts.0.")
        if description["form"] != "linear":
            return description["form"], tensors
        self.mean_ = tensors.get("mean")
        self.components_ = tensors.get("rotation")
        if self.components_ is not None:
            self.components_ = self.components_.astype(np.float32) * tensors.get("rotation.scale", np.ones(1))[:, None]
        return description["inner"]["form"], _inner(tensors, "inner.")

    @property
    def _n_features_out(self) -> int:
        return self.row_bytes_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags
