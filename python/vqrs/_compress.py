"""One call from rows to a table: chooses a quantizer and its parameters by bytes and error, fits, encodes."""

from __future__ import annotations

import bisect
import heapq
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqrs import _core
from vqrs._bytes import parse_bytes
from vqrs._encode import encode_table, table_from_codes
from vqrs._progress import printed_progress
from vqrs._validation import RandomState, as_jobs, as_matrix, as_parameters, as_seed, as_weights, is_frame
from vqrs.table import Table
from vqrs.table import open as open_table

__all__ = ["compress", "estimate"]

FIT_ROWS = 262_144
"""More rows than these are not fitted, only encoded: a random sample of so many stands for them."""

TRIAL_ROWS = 8_192
"""Rows that a trial fits, fewer where they are wide; half as many others judge it."""

TRIAL_VALUES = 1 << 22
"""Most values that a trial fits."""

CLOSE_ENOUGH = 0.97
"""A trial above this share of the largest error allowed ends the search for a smaller step."""

TRIAL_SETTINGS = {"max_iter": 5, "n_refinements": 1}
"""Parameters that make a trial cheap, for the kinds that have them: enough to rank, not to win."""

FINALISTS = 2
FINALIST_MARGIN = 1.06
"""Trials within this factor of the best error are fitted in full, the best few of them."""


# ---- public --------------------------------------------------------------------------------------------------------


def compress(
    x: Any,
    ratio: float | None = None,
    *,
    nbytes: int | str | None = None,
    max_error: float | None = None,
    method: Any = None,
    path: str | os.PathLike[str] | None = None,
    sample_weight: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    random_state: RandomState = None,
    n_jobs: int | None = None,
    progress: bool | _core.Progress = False,
    durable: bool = True,
    **parameters: Any,
) -> Table:
    """Compress rows into a table.

    With a budget (``ratio`` or ``nbytes``) the kind of quantizer and its parameters of least error that fit into it are
    chosen, all bytes counted; with ``max_error``, those of least bytes. Candidates are tried on a random sample of at
    most 8,192 rows and judged on others; the best few are fitted in full and compared by their real error. Time plays
    no part, so that the choice repeats for a ``random_state``.

    Parameters
    ----------
    x : array-like of shape (n_rows, n_features)
        The rows: any real dtype and strides, numpy array or memory map, torch CPU tensor, data frame. Of more than
        262,144 rows a random sample of so many is fitted; all are encoded, block by block where ``path`` is given, so
        that ``x`` may be a memory map larger than memory.
    ratio : float, optional
        Budget: float32 bytes of the rows over bytes of the file.
    nbytes : int or str, optional
        Budget in bytes, for example ``"64MiB"`` (1024² each) or ``"1.5GB"`` (1000³ each).
    max_error : float, optional
        Largest relative error, squared error over squared norm; weighted where ``sample_weight`` is given.
    method : str or quantizer, optional
        A kind (see :func:`vqrs.kinds`) with its ``parameters``, or a quantizer, whose parameters are taken; it is not
        changed. Without a budget it is fitted as given; with one, what is left open is chosen within it.
    path : path-like, optional
        File to write; the table returned is mapped from it. None: the table stays in memory.
    sample_weight : array-like of shape (n_rows,), optional
        Weight of each row in the squared error, for example how often it is looked up.
    names : sequence of str, optional
        One name a row.
    metadata : mapping of str to str, optional
        What you want to keep with the table.
    random_state : int, RandomState, Generator or None, default=None
        Draws samples and first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    progress : bool or callable, default=False
        True prints a line; a callable gets (stage, done, total).
    durable : bool, default=True
        Whether the file of ``path`` is forced to the disk before it gets its name.
    **parameters
        Parameters of ``method``.

    Returns
    -------
    Table
        The compressed rows, never larger than the budget.

    Raises
    ------
    ValueError
        No budget and no method, or two budgets; a budget or error that nothing can reach (the message names the
        least); wrong rows, weights, names or parameters.
    TypeError
        Rows of a dtype that is no number; parameters without a method.

    Warns
    -----
    UserWarning
        There was too little data for the parameters given; the message says what was made smaller.

    See Also
    --------
    vqrs.ProductQuantizer : One of the quantizers, to fit on some rows and encode others.

    Examples
    --------
    >>> import numpy as np, vqrs
    >>> x = np.random.default_rng(0).standard_normal((4000, 16))
    >>> table = vqrs.compress(x, ratio=7, random_state=0)
    >>> table.shape, table.ratio >= 7, bool(table.relative_error < 0.05)
    ((4000, 16), True, True)
    >>> vqrs.compress(x, method="scalar", dtype="int8").nbytes
    84192
    """
    if isinstance(x, Iterator):
        raise TypeError(
            "x is read more than once, which an iterator cannot be: fit an estimator on some rows and pass the blocks "
            "to its compress(blocks, path=...)"
        )
    rows = x if _is_sliceable(x) else as_matrix(x, "x")
    kind, parameters, random_state = _read_method(method, parameters, random_state)
    n_rows, dim = (int(size) for size in rows.shape)
    goal = _read_goal(ratio, nbytes, max_error, 4 * n_rows * dim, kind is not None)
    with printed_progress("vqrs.compress", int(progress is True)) as line:
        search = _Search(
            rows,
            as_weights(sample_weight, n_rows),
            as_seed(random_state),
            as_jobs(n_jobs),
            progress if callable(progress) else line,
        )
        make = partial(search.table, path=path, names=names, metadata=metadata, durable=durable)
        if goal.nbytes is not None:
            extra_bytes = _extra_bytes(n_rows, names, metadata)
            return _within_bytes(search, _ladders(kind, parameters, n_rows, dim), goal.nbytes, extra_bytes, make)
        if goal.max_error is not None:
            return _within_error(search, _ladders(kind, parameters, n_rows, dim), goal.max_error, make)
        assert kind is not None
        fitted = search.fit(_Candidate(kind, parameters, 0))
        if fitted.codec.notes:
            warnings.warn(f"{kind}: {'; '.join(fitted.codec.notes)}.", UserWarning, stacklevel=2)
        return make(fitted)


def estimate(n_rows: int, n_features: int, method: Any = "product", **parameters: Any) -> int:
    """Bytes of a table's file without making it; names and metadata aside.

    Parameters
    ----------
    n_rows, n_features : int
        Shape of the table.
    method : str or quantizer, default="product"
        A kind (see :func:`vqrs.kinds`) with its ``parameters``, or a quantizer.
    **parameters
        Parameters of ``method``; the others have their defaults.

    Returns
    -------
    int
        Bytes, all counted: header, codes, codebooks, checksums, padding.

    Raises
    ------
    ValueError
        An unknown kind, or a wrong parameter.

    Examples
    --------
    >>> import vqrs
    >>> vqrs.estimate(30_522, 384, "product", n_subvectors=96) < 30_522 * 384 * 4 / 14
    True
    """
    kind, parameters, _ = _read_method(method, parameters, None)
    if kind is None:
        raise ValueError(f"method is needed: one of {', '.join(_defaults())}")
    return _core.estimate(kind, parameters, n_rows, n_features)


# ---- what the user asks for ----------------------------------------------------------------------------------------


class _Goal(NamedTuple):
    """At most one of the two; neither where the method says it all."""

    nbytes: int | None = None
    max_error: float | None = None


def _is_sliceable(x: Any) -> bool:
    """Whether blocks of rows can be taken before they are converted."""
    return not is_frame(x) and len(getattr(x, "shape", ())) == 2 and hasattr(x, "__getitem__")


def _read_method(
    method: Any, parameters: dict[str, Any], random_state: RandomState
) -> tuple[str | None, dict[str, Any], RandomState]:
    """Kind, parameters that are fixed, random state."""
    if method is None:
        if parameters:
            raise TypeError(f"compress() got {', '.join(map(repr, parameters))}: parameters of a kind need method=")
        return None, {}, random_state
    if isinstance(method, str):
        known = _defaults()
        if method not in known:
            raise ValueError(f"unknown method {method!r}: expected one of {', '.join(known)}, or a quantizer")
        unknown = [name for name in parameters if name not in known[method]]
        if unknown:
            raise ValueError(f"method {method!r} has no parameter {unknown[0]!r}: it has {', '.join(known[method])}")
        return method, as_parameters(parameters), random_state
    if not hasattr(method, "_core_parameters"):
        raise TypeError(f"method must be the name of a kind or a quantizer of vqrs, not {method!r}")
    if parameters:
        raise TypeError(f"{', '.join(map(repr, parameters))}: a quantizer has its own parameters, set them there")
    state = getattr(method, "random_state", None) if random_state is None else random_state
    return method._kind, method._core_parameters(), state


def _defaults() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry["parameters"] for entry in _core.kinds()}


def _read_goal(
    ratio: float | None, nbytes: int | str | None, max_error: float | None, float32_nbytes: int, has_method: bool
) -> _Goal:
    given = [
        name for name, value in (("ratio", ratio), ("nbytes", nbytes), ("max_error", max_error)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given: pass one of them")
    if not given and not has_method:
        raise ValueError("pass one of ratio=, nbytes= and max_error=, or a method= with its parameters")
    if ratio is not None:
        if not 0 < ratio < math.inf:
            raise ValueError(f"ratio={ratio!r} must be a positive number")
        return _Goal(nbytes=int(float32_nbytes / ratio))
    if max_error is not None and not 0 <= max_error < math.inf:
        raise ValueError(f"max_error={max_error!r} must be a number from 0")
    return _Goal(None if nbytes is None else parse_bytes(nbytes), max_error)


def _extra_bytes(n_rows: int, names: Sequence[str] | None, metadata: Mapping[str, str] | None) -> int:
    """Bytes that names and metadata add to a table, at most: measured on one that costs nothing to make."""
    if names is None and not metadata:
        return 0
    codec, _ = _core.fit("kmeans", {"n_clusters": 1}, np.zeros((1, 1), np.float32))
    codes = np.zeros((n_rows, codec.row_bytes), np.uint8)
    with_extra, without = (
        _core.Table.from_codec(codec, codes, errors={"relative": 0.0}, names=n, metadata=m).nbytes
        for n, m in ((names, metadata), (None, None))
    )
    # The header is padded to whole pages: that of another kind may be just below the end of one.
    return with_extra - without + 4096


def _within_bytes(
    search: _Search, ladders: list[_Ladder], nbytes: int, extra_bytes: int, make: Callable[[_Fitted], Table]
) -> Table:
    fitted = search.least_error(ladders, nbytes - extra_bytes)
    if fitted is None:
        least = min((ladder[0] for ladder in ladders if len(ladder)), key=lambda candidate: candidate.nbytes)
        n_rows, dim = ladders[0].shape
        reachable = least.nbytes + extra_bytes
        raise ValueError(
            f"{nbytes} bytes (ratio {4 * n_rows * dim / max(nbytes, 1):.4g}) are too few for {n_rows} x {dim} rows: "
            f"the least is {reachable} bytes (ratio {4 * n_rows * dim / reachable:.4g}), by the kind {least.kind!r}"
        )
    table = make(fitted)
    if table.nbytes > nbytes:
        raise _core.InternalError(
            f"the table has {table.nbytes} bytes, more than the {nbytes} allowed: please report it"
        )
    return table


def _within_error(search: _Search, ladders: list[_Ladder], max_error: float, make: Callable[[_Fitted], Table]) -> Table:
    aim = max_error
    while True:
        table = make(search.least_bytes(ladders, aim))
        errors = table.info()["errors"]
        error = errors["relative" if search.weights is None else "weighted"]
        if error <= max_error:
            return table
        # Only where a sample was fitted: the other rows are a little worse.
        aim *= 0.99 * max_error / error


# ---- candidates ----------------------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    kind: str
    parameters: dict[str, Any]
    nbytes: int


@dataclass(frozen=True)
class _Ladder:
    """Parameters of one kind, where each step takes more bytes than the one before and has less error."""

    kind: str
    fixed: dict[str, Any]
    rate: str | None
    """The parameter that grows; None where all are fixed."""
    values: Sequence[Any]
    shape: tuple[int, int]
    stagewise: bool = False
    """Each step costs as much as all before it and gains no more: see ``_Search._hopeless``."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, step: int) -> _Candidate:
        chosen = {} if self.rate is None else {self.rate: self.values[step]}
        parameters = self.fixed | chosen
        return _Candidate(self.kind, parameters, _core.estimate(self.kind, parameters, *self.shape))

    def steps_within(self, nbytes: float) -> int:
        """How many steps take no more than so many bytes."""
        return bisect.bisect_right(range(len(self)), nbytes, key=lambda step: self[step].nbytes)


class _Rates(NamedTuple):
    """How the parameters of a kind are searched."""

    rate: str
    values: Callable[[int, int], Sequence[Any]]
    """Of (n_rows, dim), from small to large tables."""
    variants: Callable[[int, int], list[dict[str, Any]]] = lambda n_rows, dim: [{}]
    """Other parameters, each of which starts a ladder of its own."""
    stagewise: bool = False


ROWS_PER_CENTROID = 64
"""Codebooks of more than 256 entries are tried where each entry stands for so many rows."""

RATES = {
    "scalar": _Rates(
        "dtype",
        lambda n_rows, dim: ["int2", "int4", "int8", "float16"],
        lambda n_rows, dim: [
            {"granularity": "row"},
            {"granularity": "column"},
            *({"granularity": "block", "block_size": size} for size in (32, 64, 128) if size < dim),
        ],
    ),
    "product": _Rates(
        "n_subvectors",
        lambda n_rows, dim: range(1, dim + 1),
        lambda n_rows, dim: [{"n_bits": b} for b in (8, 6, 4, 10, 12) if b <= 8 or n_rows >= ROWS_PER_CENTROID << b],
    ),
    # Codebooks are padded to a power of two, so nothing between two of them is smaller than the larger.
    "kmeans": _Rates("n_clusters", lambda n_rows, dim: [1 << b for b in range(1, 17) if 1 << b < 2 * n_rows]),
    "residual": _Rates("n_stages", lambda n_rows, dim: range(1, 33), stagewise=True),
}
"""The kinds whose parameters are searched, from the cheapest to the dearest to try. Others are tried as they are."""


def _ladders(kind: str | None, parameters: dict[str, Any], n_rows: int, dim: int) -> list[_Ladder]:
    known = [entry["name"] for entry in _core.kinds()]
    kinds = [kind] if kind is not None else sorted(known, key=lambda k: list(RATES).index(k) if k in RATES else -1)
    ladders: list[_Ladder] = []
    for name in kinds:
        for ladder in _ladders_of(name, parameters, (n_rows, dim)):
            if ladder not in ladders:
                ladders.append(ladder)
    return ladders


def _ladders_of(kind: str, parameters: dict[str, Any], shape: tuple[int, int]) -> Iterator[_Ladder]:
    rates = RATES.get(kind)
    if rates is None:
        yield _Ladder(kind, parameters, None, [None], shape)
        return
    for variant in rates.variants(*shape):
        fixed = variant | parameters
        if rates.rate in parameters:
            yield _Ladder(kind, fixed, None, [None], shape)
        else:
            yield _Ladder(kind, fixed, rates.rate, rates.values(*shape), shape, rates.stagewise)


# ---- the search ----------------------------------------------------------------------------------------------------


class _Fitted(NamedTuple):
    candidate: _Candidate
    codec: _core.Codec
    codes: NDArray[np.uint8]
    error: float
    """Relative error of the fitted rows, weighted if they were."""


@dataclass(frozen=True)
class _Sample:
    """Rows with their weights."""

    rows: NDArray[np.float32]
    weights: NDArray[np.float64] | None

    def take(self, numbers: NDArray[np.int64]) -> _Sample:
        return _Sample(self.rows[numbers], None if self.weights is None else self.weights[numbers])

    def error(self, codec: _core.Codec, codes: NDArray[np.uint8], n_jobs: int | None) -> float:
        errors = _core.reconstruction_errors(self.rows, codes, codec, self.weights, n_jobs)
        return errors["relative" if self.weights is None else "weighted"]


class _Search:
    """Rows to compress, and what was learned about candidates for them."""

    def __init__(
        self,
        x: Any,
        weights: NDArray[np.float64] | None,
        seed: int,
        n_jobs: int | None,
        progress: _core.Progress | None,
    ) -> None:
        self.x, self.weights, self.seed, self.n_jobs, self.progress = x, weights, seed, n_jobs, progress
        generator = np.random.default_rng(seed)
        self.sample = _read_sample(x, weights, generator)
        self._train, self._judge = _split(self.sample, generator)
        self._trials: dict[str, float] = {}
        self._fits: dict[str, _Fitted | None] = {}
        self._refusal: ValueError | None = None

    @property
    def sees_all(self) -> bool:
        """Whether all rows are fitted."""
        return len(self.sample.rows) == len(self.x)

    def table(
        self,
        fitted: _Fitted,
        path: str | os.PathLike[str] | None,
        names: Sequence[str] | None,
        metadata: Mapping[str, str] | None,
        durable: bool,
    ) -> Table:
        """The table of all rows, with the codes of the fit where it saw them all."""
        extra: dict[str, Any] = {"sample_weight": self.weights, "names": names, "metadata": metadata}
        extra["n_jobs"] = self.n_jobs
        if not self.sees_all:
            return encode_table(fitted.codec, self.x, path, durable=durable, progress=self.progress, **extra)
        table = table_from_codes(fitted.codec, self.sample.rows, fitted.codes, **extra)
        if path is None:
            return table
        table.save(path, durable=durable)
        return open_table(path)

    # ---- least error within a budget ----

    def least_error(self, ladders: list[_Ladder], nbytes: int) -> _Fitted | None:
        """The fit of least error of at most so many bytes; None if nothing is as small."""
        candidates = self._candidates_within(ladders, nbytes)
        if not candidates:
            return None
        if len(candidates) > 1:
            ranked = sorted(candidates, key=lambda candidate: (self._trial(candidate), candidate.nbytes))
            limit = FINALIST_MARGIN * self._trial(ranked[0])
            candidates = [candidate for candidate in ranked[:FINALISTS] if self._trial(candidate) <= limit]
        fits = [fitted for fitted in map(self._attempt, candidates) if fitted is not None]
        return min(fits or [self._refused()], key=lambda fitted: (fitted.error, fitted.candidate.nbytes))

    def _candidates_within(self, ladders: list[_Ladder], nbytes: int) -> list[_Candidate]:
        """The largest step of each ladder that is small enough, but for those that cannot win."""
        reachable = [(ladder, steps) for ladder in ladders if (steps := ladder.steps_within(nbytes)) > 0]
        if len(reachable) == 1 and reachable[0][1] == 1:
            return [reachable[0][0][0]]
        found: list[_Candidate] = []
        for ladder, steps in reachable:
            least = min(map(self._trial, found), default=math.inf)
            if not self._hopeless(ladder, steps, least):
                found.append(ladder[self._usable_steps(ladder, steps) - 1])
        return found

    # ---- least bytes within an error ----

    def least_bytes(self, ladders: list[_Ladder], max_error: float) -> _Fitted:
        """The fit of least bytes with at most this error: trials tell where to start on a ladder, real fits decide."""
        queue = self._starts(ladders, max_error)
        least = math.inf
        while queue:
            _, order, step = heapq.heappop(queue)
            ladder = ladders[order]
            fitted = self._attempt(ladder[step])
            if fitted is not None and fitted.error <= max_error:
                return self._smaller(ladder, step, fitted, max_error)
            error = math.inf if fitted is None else fitted.error
            least = min(least, error)
            if step + 1 < len(ladder):
                step = min(len(ladder) - 1, max(step + 1, _extrapolate(step, error, max_error)))
                heapq.heappush(queue, (ladder[step].nbytes, order, step))
        if least == math.inf:
            self._refused()
        raise ValueError(f"max_error={max_error:g} cannot be reached: the least error found is {least:.3g}")

    def _starts(self, ladders: list[_Ladder], max_error: float) -> list[tuple[int, int, int]]:
        """A heap of (bytes, number of the ladder, step) where trials meet the error with fewer bytes than those of the
        ladders before; where none does, of the step of least error.
        """
        starts: list[tuple[int, int, int]] = []
        fallback: list[tuple[float, int, int, int]] = []
        for order, ladder in enumerate(ladders):
            steps = ladder.steps_within(min(starts)[0] - 1 if starts else math.inf)
            if steps == 0 or self._hopeless(ladder, steps, max_error):
                continue
            steps = self._usable_steps(ladder, steps)
            top = ladder[steps - 1]
            fallback.append((self._trial(top), top.nbytes, order, steps - 1))
            if self._trial(top) <= max_error:
                step = self._first_within(ladder, steps, max_error)
                starts.append((ladder[step].nbytes, order, step))
        if not starts and fallback:
            starts = [min(fallback)[1:]]
        heapq.heapify(starts)
        return starts

    def _first_within(self, ladder: _Ladder, steps: int, max_error: float) -> int:
        """The first step whose trial meets the error, or one close above it. The last of ``steps`` is known to."""
        low, high = -1, steps - 1
        error_low, error_high = 1.0, self._trial(ladder[high])
        interpolate = True
        while high - low > 1 and error_high < CLOSE_ENOUGH * max_error:
            middle = (low + high) // 2
            if interpolate and 0 < error_high < max_error < error_low:
                share = math.log(error_low / max_error) / math.log(error_low / error_high)
                middle = min(high - 1, low + max(1, math.ceil(share * (high - low))))
            error = self._trial(ladder[middle])
            if error <= max_error:
                high, error_high = middle, error
            else:
                low, error_low = middle, error
            interpolate = not interpolate
        return high

    def _smaller(self, ladder: _Ladder, step: int, fitted: _Fitted, max_error: float) -> _Fitted:
        """A smaller step of the ladder, where the real error left room for one."""
        lower = _extrapolate(step, fitted.error, max_error)
        if not 0 <= lower < step:
            return fitted
        other = self._attempt(ladder[lower])
        return other if other is not None and other.error <= max_error else fitted

    # ---- fits ----

    def fit(self, candidate: _Candidate) -> _Fitted:
        """In full, on the whole sample."""
        codec, codes = _core.fit(
            candidate.kind,
            candidate.parameters,
            self.sample.rows,
            sample_weight=self.sample.weights,
            seed=self.seed,
            n_jobs=self.n_jobs,
            progress=_labelled(self.progress, candidate.kind),
            keep_better_codes=True,
        )
        return _Fitted(candidate, codec, codes, self.sample.error(codec, codes, self.n_jobs))

    def _attempt(self, candidate: _Candidate) -> _Fitted | None:
        """The full fit, once; None where the kind refuses the rows, as float16 does large values."""
        key = repr(candidate)
        if key not in self._fits:
            try:
                self._fits[key] = self.fit(candidate)
            except ValueError as error:
                self._fits[key], self._refusal = None, error
        return self._fits[key]

    def _refused(self) -> NoReturn:
        raise self._refusal or ValueError("no kind accepts these rows")

    def _trial(self, candidate: _Candidate) -> float:
        """The error that a full fit is expected to have; infinite where the kind refuses the rows."""
        key = repr(candidate)
        if key not in self._trials:
            try:
                self._trials[key] = self._expected_error(candidate)
            except ValueError as error:
                self._trials[key], self._refusal = math.inf, error
        return self._trials[key]

    def _expected_error(self, candidate: _Candidate) -> float:
        known = _defaults()[candidate.kind] | candidate.parameters
        cheap = {name: min(value, known[name]) for name, value in TRIAL_SETTINGS.items() if name in known}
        train, judge = self._train, self._judge
        codec, codes = _core.fit(
            candidate.kind,
            candidate.parameters | cheap,
            train.rows,
            sample_weight=train.weights,
            seed=self.seed,
            n_jobs=self.n_jobs,
            progress=_labelled(self.progress, f"trying {candidate.kind}"),
        )
        trained = train.error(codec, codes, self.n_jobs)
        if judge is None:
            return trained
        judged = judge.error(codec, codec.encode(judge.rows, n_jobs=self.n_jobs), self.n_jobs)
        # Centroids fitted on n rows lie nearer to these, and farther from others, by an error that falls as 1 / n. The
        # table's own rows are the ones fitted, so the small gap of the full fit is to be taken off the middle.
        middle, gap = (judged + trained) / 2, max(0.0, judged - trained) / 2
        return max(0.0, middle - gap * len(train.rows) / len(self.sample.rows))

    def _usable_steps(self, ladder: _Ladder, steps: int) -> int:
        """``steps``, less the last ones that refuse the rows."""
        while steps > 1 and self._trial(ladder[steps - 1]) == math.inf:
            steps -= 1
        return steps

    def _hopeless(self, ladder: _Ladder, steps: int, error: float) -> bool:
        """Whether a ladder of stages stays above an error: no stage takes off a larger share than the second did, so
        the trials of two cheap stages tell without one of all.
        """
        if not ladder.stagewise or steps <= 2:
            return False
        first, second = self._trial(ladder[0]), self._trial(ladder[1])
        return 0 < first < math.inf and second * (second / first) ** (steps - 2) > error


def _read_sample(x: Any, weights: NDArray[np.float64] | None, generator: np.random.Generator) -> _Sample:
    """The rows to fit: all, or so many at random."""
    if len(x) <= FIT_ROWS:
        sample, numbers = _Sample(as_matrix(x, "x"), weights), None
    else:
        numbers = _draw(len(x), weights, FIT_ROWS, generator)
        sample = _Sample(as_matrix(x[numbers], "x"), None if weights is None else weights[numbers])
    # Here and not in the core, where trials would name a row by its place in their sample.
    if not np.isfinite(sample.rows).all():
        row, column = np.argwhere(~np.isfinite(sample.rows))[0]
        value = "NaN" if np.isnan(sample.rows[row, column]) else "infinity"
        raise ValueError(
            f"Input x contains {value} at row {row if numbers is None else numbers[row]}, column {column}: "
            "clean the table first, for example with numpy.nan_to_num"
        )
    return sample


def _split(sample: _Sample, generator: np.random.Generator) -> tuple[_Sample, _Sample | None]:
    """Rows that trials fit and rows that judge them; None where there are so few that all are fitted."""
    n_rows, dim = sample.rows.shape
    n_train = min(TRIAL_ROWS, max(TRIAL_ROWS // 4, TRIAL_VALUES // dim))
    if n_rows <= n_train + n_train // 2:
        return sample, None
    numbers = generator.permutation(_draw(n_rows, sample.weights, n_train + n_train // 2, generator))
    n_train = len(numbers) * 2 // 3
    return sample.take(np.sort(numbers[:n_train])), sample.take(np.sort(numbers[n_train:]))


def _draw(
    n_rows: int, weights: NDArray[np.float64] | None, size: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Numbers of rows at random, rising; rows without weight count for nothing, so they are left out."""
    numbers = np.arange(n_rows) if weights is None else np.flatnonzero(weights)
    return np.sort(generator.choice(numbers, min(size, len(numbers)), replace=False))


def _extrapolate(step: int, error: float, max_error: float) -> int:
    """The step expected to have ``max_error``, where the error falls by the same factor with each step from 1."""
    if not 0 < error < 1 or not 0 < max_error < 1:
        return step
    return math.ceil((step + 1) * math.log(max_error) / math.log(error)) - 1


def _labelled(progress: _core.Progress | None, label: str) -> _core.Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)
