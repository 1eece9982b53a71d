"""Rows to a table with a codec that is already fitted: in memory, or streamed to a file block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqrs import _core
from vqrs._interrupt import interruptible
from vqrs._validation import as_matrix, as_weights, is_frame
from vqrs.metrics import gaussian_bound

if TYPE_CHECKING:
    from vqrs.table import Table

BLOCK_BYTES = 64 << 20
"""Float32 bytes of the blocks that a table is streamed in."""

SAMPLE_ROWS = 16_384
"""Rows that the Gaussian bound is computed from."""

LARGEST_BOUND_DIM = 2048
"""Wider rows get no Gaussian bound: their eigenvalues would take longer than the table."""


def encode_table(
    codec: _core.Codec,
    X: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    sample_weight: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    durable: bool = True,
    n_jobs: int | None = None,
    progress: _core.Progress | None = None,
) -> Table:
    """Encode rows with a fitted codec into a table.

    Parameters
    ----------
    codec : Codec
        What encodes; it is not fitted again.
    X : array-like of shape (n_rows, n_features), or iterator of such blocks
        An iterator needs ``path``. With ``path``, arrays and memory maps are read in blocks and may exceed memory.
    path : path-like, optional
        File to write; the table returned is mapped from it. None: the table stays in memory.
    sample_weight : array-like of shape (n_rows,), optional
        Weight of each row in the table's weighted error.
    names : sequence of str, optional
        One name a row.
    metadata : mapping of str to str, optional
        What the user wants to keep with the table.
    durable : bool, default=True
        Whether the file is forced to the disk before it gets its name.
    n_jobs : int, optional
        Threads.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    Table
        With the same bytes whichever way the rows came.

    Raises
    ------
    ValueError
        Wrong rows, names or weights, or an iterator without ``path``.
    """
    if path is None:
        if isinstance(X, Iterator):
            raise ValueError("An iterator of blocks needs path=, the file to write them to as they come.")
        x = as_matrix(X)
        codes = codec.encode(x, n_jobs=n_jobs, progress=progress)
        return table_from_codes(
            codec, x, codes, sample_weight=sample_weight, names=names, metadata=metadata, n_jobs=n_jobs
        )
    from vqrs.table import open

    _stream(codec, X, os.fspath(path), sample_weight, names, metadata, durable, n_jobs, progress)
    return open(path)


def table_from_codes(
    codec: _core.Codec,
    x: NDArray[np.float32],
    codes: NDArray[np.uint8],
    *,
    sample_weight: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    n_jobs: int | None = None,
) -> Table:
    """The table in memory of rows, float32 of shape (n_rows, dim), and their codes, with its errors measured."""
    from vqrs.table import Table

    errors = _core.reconstruction_errors(x, codes, codec, as_weights(sample_weight, len(x)), n_jobs)
    errors |= interruptible(lambda: RowSample(codec.dim).add(x).gaussian_bound(codec))
    return Table(_core.Table.from_codec(codec, codes, errors=errors, names=names, metadata=metadata))


def _stream(
    codec: _core.Codec,
    X: Any,
    path: str,
    sample_weight: ArrayLike | None,
    names: Sequence[str] | None,
    metadata: Mapping[str, str] | None,
    durable: bool,
    n_jobs: int | None,
    progress: _core.Progress | None,
) -> None:
    weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    sample = RowSample(codec.dim)
    writer = None
    try:
        writer = _core.TableWriter(path, codec, names=names, metadata=metadata, durable=durable)
        for block in _blocks(X, codec.dim):
            of_block = None if weights is None else weights[sample.n_seen : sample.n_seen + len(block)]
            writer.write(block, sample_weight=as_weights(of_block, len(block)), n_jobs=n_jobs, progress=progress)
            sample.add(block)
        as_weights(weights, sample.n_seen)
        writer.finish(interruptible(sample.gaussian_bound, codec))
    except BaseException:
        if writer is not None:
            writer.abort()
        raise


def _blocks(X: Any, dim: int) -> Iterator[NDArray[np.float32]]:
    """Blocks of float32 rows. What can be sliced by rows is sliced before it is converted, so that no more than a block
    of it is in memory.
    """
    if isinstance(X, Iterator):
        yield from (as_matrix(block, min_rows=0) for block in X)
        return
    if is_frame(X) or len(getattr(X, "shape", ())) != 2:
        X = as_matrix(X)
    step = max(1, BLOCK_BYTES // (4 * dim))
    for start in range(0, max(1, len(X)), step):
        yield as_matrix(X[start : start + step])


class RowSample:
    """A random sample of the rows of a stream, the same however the stream is cut into blocks.

    Each row number has a fixed pseudo-random priority; the ``SAMPLE_ROWS`` rows of the lowest priorities stay.
    """

    def __init__(self, dim: int) -> None:
        self.n_seen = 0
        self.rows: NDArray[np.float32] = np.empty((0, dim), dtype=np.float32)
        self._priorities = np.empty(0, dtype=np.uint64)

    def add(self, block: NDArray[np.float32]) -> RowSample:
        """Takes the next rows of the stream in."""
        priorities = _priorities(self.n_seen, self.n_seen + len(block))
        self.n_seen += len(block)
        best = _lowest(priorities)
        rows = np.concatenate([self.rows, block[best]])
        priorities = np.concatenate([self._priorities, priorities[best]])
        best = _lowest(priorities)
        self.rows, self._priorities = rows[best], priorities[best]
        return self

    def gaussian_bound(self, codec: _core.Codec) -> dict[str, float]:
        """The bound at the rate of a table of the rows seen, as an entry of its errors; none where too costly."""
        if self.n_seen == 0 or codec.dim > LARGEST_BOUND_DIM:
            return {}
        # Without names and metadata, which say nothing about the rows.
        nbytes = min(
            _core.estimate(codec.kind, codec.parameters, self.n_seen, codec.dim), _stored_bytes(codec, self.n_seen)
        )
        bound = gaussian_bound(self.rows, 8 * nbytes / (self.n_seen * codec.dim))
        # Six digits: the last ones depend on the machine's BLAS and its threads, and the table's bytes must not.
        return {"gaussian_bound": float(f"{bound:.6g}")}


def _stored_bytes(codec: _core.Codec, n_rows: int) -> int:
    """About the bytes of a table: where a kind's size depends on its rows, an estimate is an upper bound only."""
    stored = n_rows * codec.row_bytes + sum(tensor.nbytes for tensor in codec.tensors().values())
    return stored + stored // 4096 + 8192


def _priorities(start: int, stop: int) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (G. Steele, D. Lea, C. Flood, 2014) of each row number."""
    z = (np.arange(start, stop, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _lowest(priorities: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Where the ``SAMPLE_ROWS`` lowest priorities are, in order. No two are equal: the finalizer is one to one."""
    if len(priorities) <= SAMPLE_ROWS:
        return np.arange(len(priorities))
    return np.sort(np.argpartition(priorities, SAMPLE_ROWS)[:SAMPLE_ROWS])
