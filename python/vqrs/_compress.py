"""One call from rows to a table: chooses a quantizer and its parameters by bytes and error, fits, encodes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vqrs import _core
from vqrs._bytes import parse_bytes
from vqrs._encode import encode_table, table_from_codes
from vqrs._ladders import Candidate, Family, default_parameters, families_for
from vqrs._progress import printed_progress
from vqrs._search import EFFORTS, Effort, Fitted, Search
from vqrs._validation import RandomState, as_jobs, as_matrix, as_parameters, as_seed, as_size, as_weights, is_frame
from vqrs.table import Table
from vqrs.table import open as open_table

__all__ = ["compress", "estimate"]


def compress(
    x: Any,
    ratio: float | None = None,
    *,
    nbytes: int | str | None = None,
    max_error: float | None = None,
    method: Any = None,
    effort: Literal["fast", "balanced", "best"] = "balanced",
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
    chosen, all bytes counted; with ``max_error``, those of least bytes. Candidates are tried on a random sample of
    rows and judged on others; the best few are fitted in full and compared by their real error. Measured time plays no
    part, so that the choice repeats for a ``random_state``: what ``effort`` leaves out goes by the sizes alone.
    :func:`vqrs.tune` shows what was tried.

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
    effort : {"fast", "balanced", "best"}, default="balanced"
        How much is tried. "fast": cheap kinds on 4,096 rows, and one full fit. "balanced": the whole family on 8,192
        rows, without what would take minutes to fit, and one or two full fits. "best": everything on 16,384 rows, and
        up to four full fits, however long they take.
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
    rows = x if is_sliceable(x) else as_matrix(x, "x")
    n_rows, dim = (int(size) for size in rows.shape)
    if hasattr(method, "_compress_within"):
        # Groups of rows share one budget out among themselves.
        goal = _read_goal(ratio, nbytes, max_error, 4 * n_rows * dim, has_method=True)
        if goal.max_error is not None or parameters:
            raise ValueError("max_error and parameters cannot be combined with groups of rows: pass ratio or nbytes")
        extra = {"names": names, "metadata": metadata, "path": path, "durable": durable}
        return method._compress_within(rows, goal.nbytes, sample_weight, random_state, n_jobs, **extra)
    kind, parameters, random_state = read_method(method, parameters, random_state)
    goal = _read_goal(ratio, nbytes, max_error, 4 * n_rows * dim, kind is not None)
    trying = read_effort(effort)
    with printed_progress("vqrs.compress", int(progress is True)) as line:
        search = Search(
            rows,
            as_weights(sample_weight, n_rows),
            as_seed(random_state),
            as_jobs(n_jobs),
            progress if callable(progress) else line,
            trying,
        )
        families = partial(families_for, kind, parameters, n_rows, dim, trying.level)
        make = partial(_make_table, search, path=path, names=names, metadata=metadata, durable=durable)
        if goal.nbytes is not None:
            extra_bytes = _extra_bytes(n_rows, names, metadata)
            return _within_bytes(search, families(), goal.nbytes, extra_bytes, make)
        if goal.max_error is not None:
            return _within_error(search, families(), goal.max_error, make)
        assert kind is not None
        fitted = search.fit(Candidate(kind, parameters, 0))
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
    kind, parameters, _ = read_method(method, parameters, None)
    if kind is None:
        raise ValueError(f"method is needed: one of {', '.join(default_parameters())}")
    return _core.estimate(kind, parameters, as_size(n_rows, "n_rows"), as_size(n_features, "n_features"))


# ---- what the user asks for ----------------------------------------------------------------------------------------


class _Goal(NamedTuple):
    """At most one of the two; neither where the method says it all."""

    nbytes: int | None = None
    max_error: float | None = None


def is_sliceable(x: Any) -> bool:
    """Whether blocks of rows can be taken before they are converted."""
    return not is_frame(x) and len(getattr(x, "shape", ())) == 2 and hasattr(x, "__getitem__")


def read_method(
    method: Any, parameters: dict[str, Any], random_state: RandomState
) -> tuple[str | None, dict[str, Any], RandomState]:
    """Kind, parameters that are fixed, random state."""
    if method is None:
        if parameters:
            raise TypeError(f"compress() got {', '.join(map(repr, parameters))}: parameters of a kind need method=")
        return None, {}, random_state
    if isinstance(method, str):
        known = default_parameters()
        if method not in known:
            raise ValueError(f"unknown method {method!r}: expected one of {', '.join(known)}, or a quantizer")
        unknown = [name for name in parameters if name not in known[method]]
        if unknown:
            raise ValueError(f"method {method!r} has no parameter {unknown[0]!r}: it has {', '.join(known[method])}")
        return method, as_parameters(parameters), random_state
    if isinstance(method, type) and hasattr(method, "_core_parameters"):
        raise TypeError(f"method is a class: pass a quantizer, for example {method.__name__}()")
    if not hasattr(method, "_core_parameters"):
        raise TypeError(f"method must be the name of a kind or a quantizer of vqrs, not {method!r}")
    if parameters:
        raise TypeError(f"{', '.join(map(repr, parameters))}: a quantizer has its own parameters, set them there")
    state = getattr(method, "random_state", None) if random_state is None else random_state
    return method._kind, method._core_parameters(), state


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
        if not isinstance(ratio, Real) or not 0 < ratio < math.inf:
            raise ValueError(f"ratio={ratio!r} must be a positive number")
        return _Goal(nbytes=int(float32_nbytes / ratio))
    if max_error is not None and (not isinstance(max_error, Real) or not 0 <= max_error < math.inf):
        raise ValueError(f"max_error={max_error!r} must be a number from 0")
    return _Goal(None if nbytes is None else parse_bytes(nbytes), max_error)


def read_effort(effort: str) -> Effort:
    """The settings of an effort by its name."""
    if effort not in EFFORTS:
        raise ValueError(f"effort={effort!r} must be one of {', '.join(map(repr, EFFORTS))}")
    return EFFORTS[effort]


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
    search: Search, families: list[Family], nbytes: int, extra_bytes: int, make: Callable[[Fitted], Table]
) -> Table:
    fitted = search.least_error(families, nbytes - extra_bytes)
    if fitted is None:
        ladders = [ladder for family in families for ladder in family.ladders]
        least = min((ladder[0] for ladder in ladders), key=lambda candidate: candidate.nbytes)
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


def _within_error(search: Search, families: list[Family], max_error: float, make: Callable[[Fitted], Table]) -> Table:
    aim = max_error
    while True:
        table = make(search.least_bytes(families, aim))
        errors = table.info()["errors"]
        error = errors["relative" if search.weights is None else "weighted"]
        if error <= max_error:
            return table
        # Only where a sample was fitted: the other rows are a little worse.
        aim *= 0.99 * max_error / error


def _make_table(
    search: Search,
    fitted: Fitted,
    *,
    path: str | os.PathLike[str] | None,
    names: Sequence[str] | None,
    metadata: Mapping[str, str] | None,
    durable: bool,
) -> Table:
    """The table of all rows, with the codes of the fit where it saw them all."""
    extra: dict[str, Any] = {"sample_weight": search.weights, "names": names, "metadata": metadata}
    extra["n_jobs"] = search.n_jobs
    if len(search.sample.rows) < len(search.x):
        return encode_table(fitted.codec, search.x, path, durable=durable, progress=search.progress, **extra)
    table = table_from_codes(fitted.codec, search.sample.rows, fitted.codes, **extra)
    if path is None:
        return table
    table.save(path, durable=durable)
    return open_table(path)
