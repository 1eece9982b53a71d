"""The whole family on a sample of rows: what each kind reaches, for how many bytes and how much time."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqrs import _core
from vqrs._bytes import format_bytes, parse_bytes
from vqrs._compress import compress, is_sliceable, read_effort, read_method
from vqrs._encode import LARGEST_BOUND_DIM, RowSample
from vqrs._interrupt import interruptible
from vqrs._ladders import families_for
from vqrs._progress import printed_progress
from vqrs._search import Search
from vqrs._validation import RandomState, as_jobs, as_matrix, as_seed, as_weights
from vqrs.metrics import Spectrum, above_bound_db

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vqrs._base import Quantizer
    from vqrs.table import Table

__all__ = ["TuneResult", "TuneTrial", "tune"]

RATIOS = (4.0, 8.0, 16.0, 32.0)
"""Budgets that are tried where none is given."""

SHOWN_ROWS = 40
"""Most lines of a printed result."""


def tune(
    x: Any,
    ratio: float | Sequence[float] | None = None,
    *,
    nbytes: int | str | Sequence[int | str] | None = None,
    max_error: float | None = None,
    method: str | Sequence[str] | None = None,
    effort: Literal["fast", "balanced", "best"] = "balanced",
    cross_validate: int | None = None,
    sample_weight: ArrayLike | None = None,
    random_state: RandomState = None,
    n_jobs: int | None = None,
    progress: bool | _core.Progress = False,
) -> TuneResult:
    """Try the family of quantizers on a sample of the rows.

    For each budget every kind gets the parameters that fill it; codebooks grow as long as they bring something. The
    bytes are those of the whole table, the errors those expected of a full fit. Nothing is fitted in full until
    :meth:`TuneResult.table` or :meth:`TuneResult.fit` is called.

    Parameters
    ----------
    x : array-like of shape (n_rows, n_features)
        The rows, as in :func:`vqrs.compress`; the result keeps a reference to them.
    ratio : float or sequence of float, optional
        Budgets: float32 bytes of the rows over bytes of the file. 4, 8, 16 and 32 if no other budget is given.
    nbytes : int, str or sequence of them, optional
        Budgets in bytes, for example ``["1MiB", "2MiB"]``.
    max_error : float, optional
        Error that :meth:`TuneResult.best` looks for by default.
    method : str or sequence of str, optional
        Kinds to try (see :func:`vqrs.kinds`); all by default.
    effort : {"fast", "balanced", "best"}, default="balanced"
        How much is tried, as in :func:`vqrs.compress`.
    cross_validate : int, optional
        For tables to which rows will be added: errors are those of rows that were not fitted, the mean over so many
        folds of the sample. By default they are those of the table's own rows.
    sample_weight : array-like of shape (n_rows,), optional
        Weight of each row in the errors.
    random_state : int, RandomState, Generator or None, default=None
        Draws samples and first centroids; an int repeats bytes and errors (times are measured).
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use.
    progress : bool or callable, default=False
        True prints a line; a callable gets (stage, done, total).

    Returns
    -------
    TuneResult
        Prints as a table, plots, and gives the best for a budget or an error.

    Raises
    ------
    ValueError
        Two kinds of budget; an unknown kind or effort; wrong rows, weights or folds; budgets that nothing can reach.

    See Also
    --------
    vqrs.compress : Chooses and makes the table in one call.

    Examples
    --------
    >>> import numpy as np, vqrs
    >>> x = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)
    >>> result = vqrs.tune(x, ratio=[6, 10], method=["product", "scalar"], random_state=0)
    >>> best = result.best(ratio=6)
    >>> best.ratio >= 6, 0 < best.error < 0.1
    (True, True)
    >>> table = result.table(ratio=6)
    >>> table.kind == best.kind, table.nbytes == best.nbytes
    (True, True)
    """
    rows = x if is_sliceable(x) else as_matrix(x, "x")
    n_rows, dim = (int(size) for size in rows.shape)
    budgets = _read_budgets(ratio, nbytes, 4 * n_rows * dim)
    settings = read_effort(effort)
    n_folds = _read_folds(cross_validate)
    kinds = [None] if method is None else [method] if isinstance(method, str) else list(method)
    for kind in kinds:
        read_method(kind, {}, None)
    weights, seed, jobs = as_weights(sample_weight, n_rows), as_seed(random_state), as_jobs(n_jobs)
    with printed_progress("vqrs.tune", int(progress is True)) as line:
        report = progress if callable(progress) else line
        search = Search(rows, weights, seed, jobs, report, settings, n_folds, timed=True)
        families = [family for kind in kinds for family in families_for(kind, {}, n_rows, dim, settings.level)]
        for budget in sorted(budgets, reverse=True):
            search.candidates_within(families, budget, alone=False)
    trials = _public_trials(search, n_rows, dim)
    if not trials:
        raise ValueError(f"nothing is as small as {max(budgets)} bytes for {n_rows} x {dim} rows")
    if max_error is not None and not 0 <= max_error < np.inf:
        raise ValueError(f"max_error={max_error!r} must be a number from 0")
    goal: dict[str, Any] = {} if max_error is None else {"max_error": max_error}
    if max_error is None and len(budgets) == 1:
        goal = {"nbytes": budgets[0]}
    again = _Again(rows, weights, seed, jobs)
    return TuneResult(trials, (n_rows, dim), len(search.folds[0][0].rows), n_folds, goal, again)


@dataclass(frozen=True)
class TuneTrial:
    """One kind with its parameters, and what to expect of it.

    Attributes
    ----------
    kind, parameters
        What :func:`vqrs.compress` takes as ``method`` and parameters; the others have their defaults.
    nbytes, ratio, bits_per_value
        Of the table of all rows, everything counted.
    error : float
        Relative squared error to expect; weighted where weights were given.
    spread : float
        Standard deviation of the error over the folds; 0 without ``cross_validate``.
    fit_seconds : float
        Of the cheap fit on the sample.
    lookup_ns : float
        Nanoseconds a row of random lookups, on one thread, of a table that the caches may hold.
    gaussian_bound, above_bound_db : float or None
        The bound at the same bits (see :func:`vqrs.metrics.gaussian_bound`), and how far the error lies above it.

    Examples
    --------
    >>> import numpy as np, vqrs
    >>> trial = vqrs.tune(np.eye(200), ratio=4, method="scalar", random_state=0).best()
    >>> trial.kind, sorted(trial.parameters)
    ('scalar', ['dtype', 'granularity'])
    """

    kind: str
    parameters: dict[str, Any]
    nbytes: int
    ratio: float
    bits_per_value: float
    error: float
    spread: float
    fit_seconds: float
    lookup_ns: float
    gaussian_bound: float | None
    above_bound_db: float | None

    @property
    def name(self) -> str:
        """Kind and parameters in one short text."""
        return f"{self.kind} {_text_of(self.parameters)}".strip()


@dataclass(frozen=True)
class _Again:
    """What a later fit needs."""

    rows: Any
    weights: NDArray[np.float64] | None
    seed: int
    n_jobs: int | None


class TuneResult:
    """What :func:`vqrs.tune` found.

    Attributes
    ----------
    trials : list of TuneTrial
        All that was tried, from the least bytes.
    front : list of TuneTrial
        Those that no other beats or equals in bytes, error, seconds to fit and nanoseconds a lookup at once. Times are
        measured, so that this list may change from run to run.
    curve : list of TuneTrial
        Those of less error than all of fewer or equal bytes: what ``best`` chooses from. It repeats.
    shape : tuple of int
        Of the table.
    n_train_rows : int
        Rows that each trial fitted.

    Examples
    --------
    >>> import numpy as np, vqrs
    >>> x = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
    >>> result = vqrs.tune(x, ratio=[4, 6], method="product", random_state=0)
    >>> [trial.error for trial in result.curve] == sorted((trial.error for trial in result.curve), reverse=True)
    True
    >>> result.best(ratio=4).error < result.best(ratio=6).error
    True
    """

    def __init__(
        self,
        trials: list[TuneTrial],
        shape: tuple[int, int],
        n_train_rows: int,
        n_folds: int | None,
        goal: dict[str, Any],
        again: _Again,
    ) -> None:
        self.trials = trials
        self.front = _front(trials)
        self.curve = _curve(trials)
        self.shape, self.n_train_rows, self.n_folds = shape, n_train_rows, n_folds
        self._goal, self._again = goal, again
        self._estimators: dict[str, Quantizer] = {}

    def best(
        self, ratio: float | None = None, *, nbytes: int | str | None = None, max_error: float | None = None
    ) -> TuneTrial:
        """The trial of least error within a budget, or of least bytes within an error.

        Parameters
        ----------
        ratio, nbytes, max_error
            One of them, as in :func:`vqrs.compress`; by default that of ``tune``, where there was one.

        Returns
        -------
        TuneTrial
            Bytes and error alone decide, so that the choice repeats.

        Raises
        ------
        ValueError
            None or several were given, or no trial reaches it.
        """
        goal: dict[str, Any] = {"ratio": ratio, "nbytes": nbytes, "max_error": max_error}
        given: dict[str, Any] = {name: value for name, value in goal.items() if value is not None} or self._goal
        if len(given) != 1:
            raise ValueError("pass one of ratio=, nbytes= and max_error=")
        if "max_error" in given:
            found = [trial for trial in self.curve if trial.error <= given["max_error"]]
            if not found:
                raise ValueError(
                    f"no trial has an error of {given['max_error']:g}: the least is {self.curve[-1].error:.3g}; tune "
                    "with larger budgets"
                )
            return found[0]
        if "ratio" in given:
            if not 0 < given["ratio"] < np.inf:
                raise ValueError(f"ratio={given['ratio']!r} must be a positive number")
            most = int(4 * self.shape[0] * self.shape[1] / given["ratio"])
        else:
            most = parse_bytes(given["nbytes"])
        found = [trial for trial in self.curve if trial.nbytes <= most]
        if not found:
            raise ValueError(f"no trial has at most {most} bytes: the least has {self.curve[0].nbytes}")
        return found[-1]

    def table(
        self,
        ratio: float | None = None,
        *,
        nbytes: int | str | None = None,
        max_error: float | None = None,
        path: str | os.PathLike[str] | None = None,
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Table:
        """Fit the best in full and make the table of all rows.

        Parameters
        ----------
        ratio, nbytes, max_error
            As in ``best``.
        path, names, metadata
            As in :func:`vqrs.compress`.

        Returns
        -------
        Table
            Its real error, in ``relative_error``, is near the one expected.
        """
        best, again = self.best(ratio, nbytes=nbytes, max_error=max_error), self._again
        return compress(
            again.rows,
            method=best.kind,
            path=path,
            names=names,
            metadata=metadata,
            sample_weight=again.weights,
            random_state=again.seed,
            n_jobs=again.n_jobs,
            **best.parameters,
        )

    def fit(
        self,
        X: Any = None,
        *,
        ratio: float | None = None,
        nbytes: int | str | None = None,
        max_error: float | None = None,
    ) -> Quantizer:
        """The estimator of the best, fitted in full.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features), optional
            Rows to fit; those of ``tune``, with their weights, by default.
        ratio, nbytes, max_error
            As in ``best``.

        Returns
        -------
        Quantizer
            A fitted estimator, for example a :class:`vqrs.ProductQuantizer`. Needs scikit-learn.
        """
        best, again = self.best(ratio, nbytes=nbytes, max_error=max_error), self._again
        estimator = _estimator(best, again)
        return estimator.fit(again.rows, sample_weight=again.weights) if X is None else estimator.fit(X)

    @property
    def best_estimator_(self) -> Quantizer:
        """The fitted best for the budget or error of ``tune``, which must have had one. Fitted on first use."""
        key = self.best().name
        if key not in self._estimators:
            self._estimators[key] = self.fit()
        return self._estimators[key]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON.

        Returns
        -------
        dict
            ``shape``, ``n_train_rows``, ``cross_validate`` and ``trials``, each with ``front`` and ``curve``: whether
            it is there.
        """
        return {
            "shape": list(self.shape),
            "n_train_rows": self.n_train_rows,
            "cross_validate": self.n_folds,
            "trials": [
                dataclasses.asdict(trial) | {"front": trial in self.front, "curve": trial in self.curve}
                for trial in self.trials
            ],
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Error beside bits a value, the Gaussian bound below. Needs matplotlib.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        Axes
            What was drawn on.
        """
        if ax is None:
            ax = _new_axes()
        for kind in sorted({trial.kind for trial in self.trials}):
            points = [(trial.bits_per_value, trial.error) for trial in self.trials if trial.kind == kind]
            ax.plot(*zip(*points, strict=True), ".", label=kind, alpha=0.7)
        ax.plot(*_points(self.curve, "error"), "k-", linewidth=1, label="best")
        bound = [trial for trial in self.trials if trial.gaussian_bound]
        if bound:
            ax.plot(*_points(bound, "gaussian_bound"), "k:", linewidth=1, label="Gaussian bound")
        ax.set(xlabel="bits a value, all bytes counted", ylabel="relative squared error", xscale="log", yscale="log")
        ax.set_title(f"{self.shape[0]:,} x {self.shape[1]} rows")
        ax.legend(fontsize="small")
        return ax

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Write the plot to a picture, without a display. Needs matplotlib.

        Parameters
        ----------
        path : path-like
            Its ending says the format: .png, .svg, .pdf.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(_NO_MATPLOTLIB) from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        self.plot(figure.add_subplot())
        figure.savefig(os.fspath(path), dpi=150)

    def lines(self) -> list[list[str]]:
        """The front as rows of texts below a head, as it is printed; ``*`` marks the curve."""
        shown = _evenly(self.front, SHOWN_ROWS)
        return [list(_HEAD), *(_line(trial, trial in self.curve) for trial in shown)]

    def title(self) -> str:
        """What the lines are about."""
        judged = f"{self.n_folds} folds, rows not fitted" if self.n_folds else "errors of the table's own rows"
        return (
            f"{self.shape[0]:,} x {self.shape[1]} rows, {format_bytes(4 * self.shape[0] * self.shape[1])} in float32; "
            f"{len(self.trials)} trials on {self.n_train_rows:,} rows ({judged}), {len(self.front)} on the front"
        )

    def __repr__(self) -> str:
        lines = self.lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([f"TuneResult: {self.title()}", *(text.rstrip() for text in texts)])

    def _repr_html_(self) -> str:
        head, *body = (
            "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line)
            for tag, line in zip(["th", *["td"] * len(self.front)], self.lines(), strict=False)
        )
        rows = "".join(f"<tr>{line}</tr>" for line in [head, *body])
        return f"<table><caption>{html.escape(self.title())}</caption>{rows}</table>"


# ---- what the user asks for ----------------------------------------------------------------------------------------


def _read_budgets(
    ratio: float | Sequence[float] | None, nbytes: int | str | Sequence[int | str] | None, float32_nbytes: int
) -> list[int]:
    if ratio is not None and nbytes is not None:
        raise ValueError("ratio and nbytes were given: pass one of them")
    if nbytes is not None:
        given: Iterable[int | str] = [nbytes] if isinstance(nbytes, int | float | str) else nbytes
        budgets = [parse_bytes(value) for value in given]
    else:
        ratios = RATIOS if ratio is None else np.atleast_1d(np.asarray(ratio, dtype=np.float64)).tolist()
        if not all(0 < value < np.inf for value in ratios):
            raise ValueError(f"ratio={ratio!r} must be positive")
        budgets = [int(float32_nbytes / value) for value in ratios]
    if not budgets:
        raise ValueError("no budget is given: pass at least one ratio or number of bytes")
    return budgets


def _read_folds(cross_validate: int | None) -> int | None:
    if cross_validate is not None and (not isinstance(cross_validate, int) or cross_validate < 2):
        raise ValueError(f"cross_validate={cross_validate!r} must be a number of folds from 2, or None")
    return cross_validate


def _estimator(best: TuneTrial, again: _Again) -> Quantizer:
    from vqrs import quantizers

    found = (getattr(quantizers, name) for name in quantizers.__all__)
    make = next(one for one in found if getattr(one, "_kind", None) == best.kind)
    return make(**best.parameters, random_state=again.seed, n_jobs=again.n_jobs)


# ---- what was found ------------------------------------------------------------------------------------------------


def _public_trials(search: Search, n_rows: int, dim: int) -> list[TuneTrial]:
    """All that worked, with the bound at the bits of each."""
    spectrum = None
    if dim <= LARGEST_BOUND_DIM:
        spectrum = interruptible(lambda: Spectrum(RowSample(dim).add(search.sample.rows).rows))
    found = []
    for trial in search.finished_trials():
        kind, parameters, n_bytes = trial.candidate
        bits = 8 * n_bytes / (n_rows * dim)
        bound = None if spectrum is None else spectrum.bound(bits)
        found.append(
            TuneTrial(
                kind=kind,
                parameters=parameters,
                nbytes=n_bytes,
                ratio=4 * n_rows * dim / n_bytes,
                bits_per_value=bits,
                error=trial.error,
                spread=trial.spread,
                fit_seconds=trial.fit_seconds,
                lookup_ns=trial.lookup_ns,
                gaussian_bound=bound,
                above_bound_db=None if bound is None else above_bound_db(trial.error, bound),
            )
        )
    return sorted(found, key=lambda trial: (trial.nbytes, trial.error, trial.name))


def _front(trials: list[TuneTrial]) -> list[TuneTrial]:
    """Those that no other is as good as in all four."""
    values = np.array([(t.nbytes, t.error, t.fit_seconds, t.lookup_ns) for t in trials])
    return [
        trial
        for trial, own in zip(trials, values, strict=True)
        if not ((values <= own).all(axis=1) & (values < own).any(axis=1)).any()
    ]


def _curve(trials: list[TuneTrial]) -> list[TuneTrial]:
    """Of trials in the order of their bytes, those of less error than all before."""
    found: list[TuneTrial] = []
    for trial in trials:
        if not found or trial.error < found[-1].error:
            found.append(trial)
    return found


# ---- how it is shown -----------------------------------------------------------------------------------------------

_HEAD = ("", "kind", "parameters", "bytes", "ratio", "bits", "error", "to bound", "fit s", "lookup ns")


def _line(trial: TuneTrial, best: bool) -> list[str]:
    spread = f" ±{trial.spread:.1g}" if trial.spread else ""
    return [
        "*" if best else "",
        trial.kind,
        _text_of(trial.parameters),
        format_bytes(trial.nbytes),
        f"{trial.ratio:.2f}",
        f"{trial.bits_per_value:.3f}",
        f"{trial.error:.4g}{spread}",
        "" if trial.above_bound_db is None else f"{trial.above_bound_db:+.2f} dB",
        f"{trial.fit_seconds:.2g}",
        f"{trial.lookup_ns:.0f}",
    ]


def _text_of(parameters: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in parameters.items()
    )


def _evenly(trials: list[TuneTrial], most: int) -> list[TuneTrial]:
    """All, or so many spread over them."""
    if len(trials) <= most:
        return trials
    return [trials[int(i)] for i in np.linspace(0, len(trials) - 1, most)]


def _points(trials: Iterable[TuneTrial], value: str) -> tuple[list[float], list[float]]:
    listed = list(trials)
    return [trial.bits_per_value for trial in listed], [getattr(trial, value) for trial in listed]


_NO_MATPLOTLIB = "plots need matplotlib: pip install 'vqrs[plot]'"


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(_NO_MATPLOTLIB) from error
    return pyplot.subplots(layout="constrained")[1]
