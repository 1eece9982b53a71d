"""The compressed table: looked up like an array, kept as one file."""

from __future__ import annotations

import html
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from vqrs import _core
from vqrs._bytes import format_bytes
from vqrs._interrupt import LARGE, interruptible
from vqrs._validation import as_array, as_factors, as_ids, as_jobs, as_matrix, as_offsets
from vqrs.metrics import above_bound_db

__all__ = ["Table", "open"]

Metric = Literal["inner_product", "l2", "cosine"]
PoolMode = Literal["sum", "mean", "max"]

_ITERATION_ROWS = 1024
"""Rows that iteration decodes at a time."""


def open(
    path: str | os.PathLike[str],
    verify: Literal["header", "lazy", "full"] = "header",
    mode: Literal["mmap", "read"] = "mmap",
) -> Table:
    """Open a table file.

    Parameters
    ----------
    path : path-like
        A file that ``Table.save`` or ``compress`` wrote.
    verify : {"header", "lazy", "full"}, default="header"
        What is compared with its checksum: the header and the decoder's tensors, also each block of codes when it is
        first touched, or the whole file at once.
    mode : {"mmap", "read"}, default="mmap"
        Map the file, so that only what is looked up is read and processes share its pages; or read it into memory.

    Returns
    -------
    Table
        The table. Nothing writes to the file: what is written to ``codes`` stays in this process.

    Raises
    ------
    FileNotFoundError, PermissionError, OSError
        The file cannot be read.
    TableCorruptError
        It is no table, or it is damaged; the message says where.
    TableVersionError
        It needs a newer vqrs; the message names the feature.

    Examples
    --------
    >>> import numpy as np, os, tempfile, vqrs
    >>> path = os.path.join(tempfile.mkdtemp(), "rows.safetensors")
    >>> n_bytes = vqrs.compress(np.eye(4), method="scalar").save(path)
    >>> with vqrs.open(path) as table:
    ...     print(table.shape, n_bytes == os.path.getsize(path))
    (4, 4) True
    """
    table = Table(_core.Table.open(os.fsdecode(path), verify, mode))
    table._verify = verify
    return table


class Table:
    """Rows of float32, held as codes and decoded when they are read.

    Made by :func:`vqrs.compress`, a quantizer's ``compress`` or :func:`vqrs.open`. It indexes like a numpy array by its
    rows, converts to one with ``numpy.asarray``, and may be read from many threads at once.

    Parameters
    ----------
    core : _core.Table
        The compiled table.

    Examples
    --------
    >>> import numpy as np, vqrs
    >>> x = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=np.float32)
    >>> table = vqrs.compress(x, method="scalar", dtype="float16", names=["a", "b", "c"])
    >>> table[1]
    array([3., 4., 5.], dtype=float32)
    >>> table[[2, -3]].shape, table[::2].shape, table["c"]
    ((2, 3), (2, 3), array([6., 7., 8.], dtype=float32))
    >>> table.pool([0, 1, 2], offsets=[0, 2])
    array([[3., 5., 7.],
           [6., 7., 8.]], dtype=float32)
    """

    dtype = np.dtype(np.float32)
    """What rows are decoded to."""

    ndim = 2
    """A table has rows and columns."""

    def __init__(self, core: _core.Table) -> None:
        self._core = core
        # How a copy of this table is opened in another process.
        self._verify: Literal["header", "lazy", "full"] = "header"

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._core.n_rows, self._core.dim

    @property
    def size(self) -> int:
        """Number of values."""
        return self._core.n_rows * self._core.dim

    def __len__(self) -> int:
        return self._core.n_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the table's file, written or not: codes, codebooks, names, checksums, padding."""
        return self._core.nbytes

    @property
    def ratio(self) -> float:
        """Bytes of the rows in float32 over ``nbytes``."""
        return 4 * self.size / self.nbytes

    @property
    def kind(self) -> str:
        """The quantizer that made it, for example ``"product"``; see :func:`vqrs.kinds`."""
        return self._core.kind

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the quantizer that made it."""
        return json.loads(self._core.info())["parameters"]

    @property
    def relative_error(self) -> float:
        """Squared error over squared norm of the rows that were compressed; NaN where it is not known."""
        return self._core.relative_error

    @property
    def path(self) -> str | None:
        """The file that it was opened from, or None."""
        return None if self._core.path is None else os.fspath(self._core.path)

    @property
    def metadata(self) -> dict[str, str]:
        """What the user keeps with the table."""
        return self._core.metadata

    @property
    def names(self) -> list[str] | None:
        """One name a row, or None. A new list at each call."""
        return self._core.names()

    @property
    def codes(self) -> NDArray[np.uint8]:
        """Codes as stored, uint8 of shape (n_rows, row_bytes), without a copy."""
        return self._core.codes()

    def info(self) -> dict[str, Any]:
        """Everything that is known about the table, ready for JSON.

        Returns
        -------
        dict
            What the file's header says (kind, parameters, decoder, library), ``path``, ``tensors`` (shapes of the codes
            and of what decodes them), ``nbytes``, ``float32_nbytes``, ``ratio``, ``bits_per_value`` (all bytes
            counted), and ``errors``: ``relative`` (squared error over squared norm), ``centred`` (the same after
            removing the mean row; not for rows that are all equal), ``weighted`` if the rows had weights,
            ``gaussian_bound``, the least relative error of any code of as many bits on Gaussian rows of the same
            covariance, and ``above_bound_db``, the distance of ``relative`` to it in decibels (6.02 dB are worth one
            bit a value; None where it has none).
        """
        return self._header() | {
            "path": self.path,
            "tensors": {
                name: list(tensor.shape) for name, tensor in ({"codes": self.codes} | self._core.tensors()).items()
            },
            "nbytes": self.nbytes,
            "float32_nbytes": 4 * self.size,
            "ratio": self.ratio,
            "bits_per_value": 8 * self.nbytes / self.size if self.size else None,
        }

    def _header(self) -> dict[str, Any]:
        """What the file's header says, and how far the error is from the bound there."""
        header = json.loads(self._core.info())
        errors = header.get("errors", {})
        if "gaussian_bound" in errors:
            errors["above_bound_db"] = above_bound_db(self.relative_error, errors["gaussian_bound"])
        return header

    def __repr__(self) -> str:
        if self._core.closed:
            return "Table(closed)"
        return f"Table({', '.join(f'{name}={value}' for name, value in self._summary().items())})"

    def _repr_html_(self) -> str:
        if self._core.closed:
            return "<i>closed table</i>"
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name.replace('_', ' '))}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._summary().items()
        )
        return f"<table><caption>vqrs table</caption>{rows}</table>"

    def _summary(self) -> dict[str, str]:
        summary = {
            "shape": str(self.shape),
            "kind": self.kind,
            "bytes": f"{format_bytes(4 * self.size)} -> {format_bytes(self.nbytes)}",
            "ratio": f"{self.ratio:.2f}",
            "relative_error": f"{self.relative_error:.4g}",
        }
        errors = self._header().get("errors", {})
        if errors.get("above_bound_db") is not None:
            summary["gaussian_bound"] = f"{errors['gaussian_bound']:.4g} ({errors['above_bound_db']:+.2f} dB)"
        return summary if self.path is None else summary | {"path": self.path}

    # ---- reading ---------------------------------------------------------------------------------------------------

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Rows by number, slice, boolean mask, array of numbers of any shape, name or list of names.

        As numpy does, but for: one index alone (no columns, no None), masks of one bool a row alone, no masked ids;
        and integers in arrays of objects are taken.

        Raises
        ------
        IndexError
            A row that is not there, more than one index, or an index of another type; of several ids the message names
            the first bad position.
        KeyError
            A name that no row has.
        """
        if isinstance(rows, slice):
            return self._rows_of_slice(rows)
        if rows is Ellipsis:
            return self.decode()
        if isinstance(rows, tuple):
            raise IndexError(
                f"a table is indexed by its rows alone, not by {len(rows)} indices: use table[rows][:, columns]"
            )
        if rows is None:
            raise IndexError("a table cannot be indexed by None: use table[...][None] for another axis")
        return self.lookup(rows)

    def _rows_of_slice(self, rows: slice) -> NDArray[np.float32]:
        n_rows = len(self)
        start, stop, step = rows.indices(n_rows)
        if step == 1:
            return self.decode(start, max(start, stop))
        step = max(-n_rows - 1, min(step, n_rows + 1))  # no longer one takes other rows
        return self.lookup(np.arange(start, stop, step, dtype=np.int64))

    def lookup(
        self, ids: Any, out: Any = None, n_jobs: int | None = None, dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        """Decode rows.

        Parameters
        ----------
        ids : int, str, or array-like of either
            Row numbers of any shape and integer type, or a boolean mask of shape (n_rows,), or names. Negative numbers
            count from the end. numpy arrays, lists, torch CPU tensors. Arrays of int32 and int64 are read where they
            are.
        out : ndarray or torch CPU tensor of shape (*ids.shape, n_features), C-contiguous, optional
            Where the rows are written, so that nothing is allocated: float32, float16, or the bfloat16 of ml_dtypes.
            Worth it for large results above all: a fresh array of 32 MiB and more is mapped page by page, which takes
            longer than decoding into it.
        n_jobs : int or None, default=None
            Threads; None takes all that the process may use. Small lookups use one.
        dtype : {"float32", "float16", "bfloat16"} or dtype, optional
            Of the rows: that of ``out``, else float32. Rows are decoded in float32 and then rounded to the nearest.

        Returns
        -------
        ndarray of shape (*ids.shape, n_features)
            The rows; ``out`` where it was given.

        Raises
        ------
        IndexError
            A row that is not there; ids that are not integers. The message names the first bad position, counted in
            the flattened ids.
        KeyError
            A name that no row has.
        MemoryError
            There is no room for the rows.
        TypeError, ValueError
            ``out`` has another dtype, shape or layout; ``dtype`` is none of those.

        Examples
        --------
        >>> import numpy as np, vqrs
        >>> table = vqrs.compress(np.eye(3), method="scalar", dtype="float16")
        >>> buffer = np.empty((2, 3), np.float16)
        >>> table.lookup([0, -1], out=buffer) is buffer
        True
        >>> buffer
        array([[1., 0., 0.],
               [0., 0., 1.]], dtype=float16)
        """
        # What the compiled module does not read where it is, it answers by None.
        name = None if dtype is None else _float_name(dtype)
        jobs = None if n_jobs is None else as_jobs(n_jobs)
        rows = self._core.lookup(ids, out, jobs, name)
        if rows is None:
            array, name = _output(out, name)
            rows = self._core.lookup(self._row_numbers(ids), array, jobs, name)
        if out is not None:
            return out
        return _as_bfloat16(rows) if name == "bfloat16" else rows

    def decode(
        self,
        start: int = 0,
        stop: int | None = None,
        out: Any = None,
        n_jobs: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> NDArray[Any]:
        """Decode the rows from ``start`` up to ``stop``, all by default.

        Parameters
        ----------
        start, stop : int
            As in a slice.
        out : ndarray or torch CPU tensor of shape (stop - start, n_features), C-contiguous, optional
            Where the rows are written, as in ``lookup``.
        n_jobs : int or None, default=None
            Threads; None takes all that the process may use.
        dtype : {"float32", "float16", "bfloat16"} or dtype, optional
            Of the rows: that of ``out``, else float32.

        Returns
        -------
        ndarray of shape (stop - start, n_features)
            The rows; ``out`` where it was given.

        Raises
        ------
        MemoryError
            There is no room for the rows.
        TypeError, ValueError
            ``out`` has another dtype, shape or layout; ``dtype`` is none of those.
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        stop, name = max(start, stop), None if dtype is None else _float_name(dtype)
        array, name = _output(out, name)
        rows = self._core.decode(start, stop, array, as_jobs(n_jobs), name)
        if out is not None:
            return out
        return _as_bfloat16(rows) if name == "bfloat16" else rows

    def to_numpy(self) -> NDArray[np.float32]:
        """All rows, float32 of shape (n_rows, n_features)."""
        return self.decode()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a table is decoded into a new array: copy=False cannot be granted")
        decoded = self.decode()
        return decoded if dtype is None else decoded.astype(dtype, copy=False)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self), _ITERATION_ROWS):
            yield from self.decode(start, start + _ITERATION_ROWS)

    def pool(
        self,
        ids: Any,
        offsets: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        mode: PoolMode = "sum",
        out: Any = None,
        *,
        include_last_offset: bool = False,
        n_jobs: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> NDArray[Any]:
        """Sum, mean or maximum of the rows of each bag, in one pass.

        Parameters
        ----------
        ids : array-like of shape (n_ids,) or (n_bags, n_ids_of_a_bag)
            Row numbers or names, as in ``lookup``. Two-dimensional: each row is a bag.
        offsets : array-like of shape (n_bags,), optional
            Where each bag begins in one-dimensional ``ids``: from 0, never falling. None: all ids are one bag.
        weights : array-like of the shape of ids, optional
            Factor of each row.
        mode : {"sum", "mean", "max"}, default="sum"
            What is made of the rows of a bag, column by column.
        out : ndarray or torch CPU tensor of shape (n_bags, n_features), C-contiguous, optional
            Where the result is written, as in ``lookup``.
        include_last_offset : bool, default=False
            Whether ``offsets`` has one more entry, the end of the last bag, as in torch.
        n_jobs : int or None, default=None
            Threads; None takes all that the process may use.
        dtype : {"float32", "float16", "bfloat16"} or dtype, optional
            Of the result: that of ``out``, else float32. Bags are added in float32.

        Returns
        -------
        ndarray of shape (n_bags, n_features)
            A row for each bag, zeros for an empty one; ``out`` where it was given.

        Raises
        ------
        IndexError
            A row that is not there.
        ValueError
            Offsets that do not start at 0, fall, or pass the end; weights of another shape; an unknown mode; ``out`` of
            another shape or layout.
        """
        numbers = self._row_numbers(ids)
        starts = _bag_starts(numbers, offsets, include_last_offset)
        name = None if dtype is None else _float_name(dtype)
        array, name = _output(out, name)
        factors = None if weights is None else as_factors(weights, numbers.shape)
        pooled = self._core.pool(numbers, starts, factors, mode, array, as_jobs(n_jobs), name)
        if out is not None:
            return out
        return _as_bfloat16(pooled) if name == "bfloat16" else pooled

    def search(
        self, queries: ArrayLike, k: int = 10, metric: Metric = "inner_product", n_jobs: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Best rows for each query, by an exact scan of the codes.

        Parameters
        ----------
        queries : array-like of shape (n_queries, n_features) or (n_features,)
            What to look for.
        k : int, default=10
            How many rows a query gets; all, where the table has fewer.
        metric : {"inner_product", "l2", "cosine"}, default="inner_product"
            ``l2`` is the squared distance, where less is better; of the others more is.
        n_jobs : int or None, default=None
            Threads; None takes all that the process may use.

        Returns
        -------
        distances : ndarray of shape (n_queries, k), float32
            Best first. Of shape (k,) for a single query of shape (n_features,).
        ids : ndarray of the same shape, int64
            The rows; of equal ones the lower number comes first.

        Raises
        ------
        ValueError
            Queries of another width, not finite; k below 1; an unknown metric.

        Examples
        --------
        >>> import numpy as np, vqrs
        >>> table = vqrs.compress(np.eye(3), method="scalar", dtype="float16")
        >>> distances, ids = table.search([0.0, 2.0, 1.0], k=2)
        >>> distances, ids
        (array([2., 1.], dtype=float32), array([1, 2]))
        """
        array = as_array(queries, "queries")
        single = array.ndim == 1
        rows = as_matrix(array[None] if single else array, "queries")
        most = max(-1, min(operator.index(k), max(1, len(self))))
        distances, ids = self._core.search(rows, most, metric, as_jobs(n_jobs))
        return (distances[0], ids[0]) if single else (distances, ids)

    def _row_numbers(self, ids: Any) -> NDArray[Any]:
        """Row numbers as the compiled module takes them, in the shape that they were given."""
        large = isinstance(ids, np.ndarray) and ids.nbytes > LARGE
        array = interruptible(as_ids, ids, len(self)) if large else as_ids(ids, len(self))
        if array.dtype.kind != "O":
            return array
        numbers = [self._row_of_name(name, position) for position, name in enumerate(array.flat)]
        return np.array(numbers, np.int64).reshape(array.shape)

    def _row_of_name(self, name: str, position: int) -> int:
        row = self._core.find(name)
        if row is None:
            why = f"no row is named {name!r}" if self._core.names() else "the table's rows have no names"
            raise KeyError(f"{why}, at position {position}")
        return row

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, durable: bool = True) -> int:
        """Write the table to a file, whole or not at all.

        Parameters
        ----------
        path : path-like
            The file. It may be the one that this table is mapped from: that stays as it is for those who have it open.
        durable : bool, default=True
            Whether to wait until the file is on the disk, so that it survives a power cut.

        Returns
        -------
        int
            Bytes of the file.

        Raises
        ------
        OSError
            The file cannot be written: what stood there stays, and nothing else is left behind. Or, as its message then
            says, the new file is in place but may be lost in a power cut.
        """
        return self._core.save(os.fsdecode(path), durable=durable)

    def verify(self) -> None:
        """Compare every byte of the file with its checksums, and look at every scale inside the rows.

        Raises
        ------
        TableCorruptError
            Something is damaged; the message says where.
        """
        self._core.verify()

    def close(self) -> None:
        """Let go of the file. Arrays of ``codes`` stay readable; the table does not. Closing twice is allowed."""
        self._core.close()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None and not self._core.closed:
            mode = "mmap" if self._core.mapped else "read"
            return _reopen, (os.path.abspath(self.path), self._verify, mode, self._core.info())
        about, tensors = self._core.info(), self._core.tensors()
        return _from_parts, (about, tensors, self.codes, json.loads(about)["errors"], self.names, self.metadata)


def _reopen(
    path: str, verify: Literal["header", "lazy", "full"], mode: Literal["mmap", "read"], description: str
) -> Table:
    """The table of a file that a pickle names, if it is still the one."""
    table = open(path, verify, mode)
    if table._core.info() != description:
        table.close()
        raise _core.TableError(
            f"{path}: another table stands there now than when the copy or pickle was made: save to another path while "
            "copies may still be made"
        )
    return table


def _from_parts(
    description: str,
    tensors: Mapping[str, NDArray[Any]],
    codes: NDArray[np.uint8],
    errors: Mapping[str, float],
    names: Sequence[str] | None,
    metadata: Mapping[str, str],
) -> Table:
    core = _core.Table.from_parts(description, tensors, codes, errors=errors, names=names, metadata=metadata)
    return Table(core)


def _float_name(dtype: DTypeLike) -> str:
    """The name of a type that rows can have."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"rows cannot be decoded to {name}: expected float32, float16 or bfloat16")
    return name


def _output(out: Any, dtype: str | None) -> tuple[NDArray[Any] | None, str | None]:
    """Where the compiled module writes, and the type of what it writes."""
    if out is None or isinstance(out, np.ndarray):
        return out, dtype
    if not hasattr(out, "__array__"):
        raise TypeError(f"out must be an array, not {type(out).__name__}")
    if str(out.dtype) == "torch.bfloat16":
        import torch

        return out.view(torch.uint16).numpy(), dtype or "bfloat16"
    return np.asarray(out), dtype


def _as_bfloat16(rows: NDArray[np.uint16]) -> NDArray[Any]:
    """Bits as the type that ml_dtypes has for them: numpy itself has none."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise TypeError("numpy has no bfloat16: install ml_dtypes, or use float32 or float16") from error
    return rows.view(ml_dtypes.bfloat16)


def _bag_starts(ids: NDArray[Any], offsets: ArrayLike | None, include_last_offset: bool) -> NDArray[np.int64]:
    if ids.ndim == 2:
        if offsets is not None:
            raise ValueError("offsets cannot be given with two-dimensional ids: each of their rows is a bag already")
        return np.arange(ids.shape[0], dtype=np.int64) * ids.shape[1]
    if ids.ndim != 1:
        raise ValueError(f"ids to pool must have one or two dimensions, not {ids.ndim}")
    starts = np.zeros(1, np.int64) if offsets is None else as_offsets(offsets)
    if not include_last_offset or offsets is None:
        return starts
    if len(starts) == 0 or starts[-1] != len(ids):
        raise ValueError(f"with include_last_offset the last offset must be {len(ids)}, the number of ids")
    return starts[:-1]
