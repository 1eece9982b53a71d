"""Rows of categories and numbers with a label of 0 or 1, in three splits, read in batches; and how a set is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SPLITS", "Batch", "Dataset", "Rows", "open_dataset"]

SPLITS = ("train", "validation", "test")
BLOCK_ROWS = 1 << 14
WINDOW_ROWS = 1 << 20


class Batch(NamedTuple):
    """Some rows, as a model takes them.

    Attributes
    ----------
    ids : ndarray of int64, shape (n_rows, n_fields)
        Global ids: the fields lie one after another in one table, so an id of field f is its place in the field plus
        the sizes of the fields before it.
    numeric : ndarray of float32, shape (n_rows, n_numeric)
        Numbers, already transformed; ``n_numeric`` may be 0.
    labels : ndarray of float32, shape (n_rows,)
        0 or 1.

    Examples
    --------
    >>> from vqrs.bench import open_dataset
    >>> batch = next(open_dataset("synthetic-50x40x500").batches("train", 64))
    >>> batch.ids.shape, batch.numeric.shape, batch.labels.dtype
    ((64, 2), (64, 0), dtype('float32'))
    """

    ids: NDArray[np.int64]
    numeric: NDArray[np.float32]
    labels: NDArray[np.float32]


class Rows(NamedTuple):
    """All rows of a split, as they are kept: in memory or mapped from files.

    Attributes
    ----------
    ids : ndarray of integers, shape (n_rows, n_fields)
        Ids within their fields, each in [0, size of the field).
    numeric : ndarray of float32, shape (n_rows, n_numeric)
        Numbers, already transformed.
    labels : ndarray, shape (n_rows,)
        0 or 1, of any type.

    Examples
    --------
    >>> import numpy as np
    >>> rows = Rows(ids=np.array([[0, 1], [1, 0]]), numeric=np.zeros((2, 0), np.float32), labels=np.array([0, 1]))
    >>> parts = dict.fromkeys(["train", "validation", "test"], rows)
    >>> Dataset("two", ["user", "item"], [2, 2], parts)
    Dataset('two': 2 train, 2 validation, 2 test; 2 fields, 4 ids)
    """

    ids: NDArray[Any]
    numeric: NDArray[np.float32]
    labels: NDArray[Any]


class Dataset:
    """Rows of ids, numbers and labels in the splits ``train``, ``validation`` and ``test``.

    Parameters
    ----------
    name : str
        What reports call it.
    field_names : sequence of str
        Names of the fields of ids.
    field_sizes : sequence of int
        Ids of each field.
    rows : mapping of str to Rows
        One for each of the three splits; arrays in memory or memory-mapped.
    has_unknown_ids : bool, default=False
        Whether id 0 of each field stands for all ids that are unknown, or too rare, in the training split.
    frequencies : ndarray of int64, shape (sum of field_sizes,), optional
        What :meth:`frequencies` returns, if it is known; else it is counted when first asked for.
    window_rows : int, optional
        Most rows that a shuffled reading holds at once (see :meth:`batches`); by default all of a split.

    Attributes
    ----------
    name, field_names, field_sizes, has_unknown_ids : as given, the sequences as tuples
    n_numeric : int
        Numbers in a row.

    Raises
    ------
    ValueError
        A split is missing, arrays differ in their numbers of rows, fields or numbers, or there is no training row.

    Examples
    --------
    >>> import numpy as np
    >>> rows = Rows(np.array([[0, 1], [1, 0], [1, 2]]), np.zeros((3, 0), np.float32), np.array([0, 1, 1]))
    >>> dataset = Dataset("three", ["user", "item"], [2, 3], dict.fromkeys(["train", "validation", "test"], rows))
    >>> next(dataset.batches("train", 2)).ids
    array([[0, 3],
           [1, 2]])
    >>> dataset.frequencies()
    array([1, 2, 1, 1, 1])
    """

    def __init__(
        self,
        name: str,
        field_names: Any,
        field_sizes: Any,
        rows: Mapping[str, Rows],
        *,
        has_unknown_ids: bool = False,
        frequencies: NDArray[np.int64] | None = None,
        window_rows: int | None = None,
    ) -> None:
        self.name, self.has_unknown_ids = name, has_unknown_ids
        self.field_names: tuple[str, ...] = tuple(str(field) for field in field_names)
        self.field_sizes: tuple[int, ...] = tuple(int(size) for size in field_sizes)
        if len(self.field_names) != len(self.field_sizes):
            raise ValueError(f"{name}: {len(self.field_names)} field names for {len(self.field_sizes)} field sizes.")
        missing = [split for split in SPLITS if split not in rows]
        if missing:
            raise ValueError(f"{name}: no rows for {', '.join(missing)}; a data set has {', '.join(SPLITS)}.")
        self._rows = {split: rows[split] for split in SPLITS}
        self.n_numeric: int = self._rows["train"].numeric.shape[1]
        for split, part in self._rows.items():
            wanted = (len(part.labels), len(self.field_names)), (len(part.labels), self.n_numeric)
            if (part.ids.shape, part.numeric.shape) != wanted:
                raise ValueError(
                    f"{name}: the {split} split has ids of shape {part.ids.shape} and numbers of shape "
                    f"{part.numeric.shape} for {len(part.labels)} labels: expected {wanted[0]} and {wanted[1]}."
                )
        if not len(self._rows["train"].labels):
            raise ValueError(f"{name}: no training rows.")
        self._offsets = np.cumsum([0, *self.field_sizes[:-1]], dtype=np.int64)
        self._frequencies = frequencies
        self._window_rows = window_rows

    def __repr__(self) -> str:
        splits = ", ".join(f"{self.n_rows(split):,} {split}" for split in SPLITS)
        return f"Dataset({self.name!r}: {splits}; {len(self.field_names)} fields, {sum(self.field_sizes):,} ids)"

    def rows(self, split: str) -> Rows:
        """All rows of a split, as they are kept (ids within their fields); not to be written to.

        Raises
        ------
        ValueError
            No such split.
        """
        if split not in self._rows:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
        return self._rows[split]

    def n_rows(self, split: str) -> int:
        """Rows of a split."""
        return len(self.rows(split).labels)

    def frequencies(self) -> NDArray[np.int64]:
        """How often each id occurs in the training split: int64 of shape (sum of field_sizes,)."""
        if self._frequencies is None:
            ids, counts = self._rows["train"].ids, [np.zeros(size, dtype=np.int64) for size in self.field_sizes]
            for start in range(0, len(ids), WINDOW_ROWS):
                for column, count in zip(np.asarray(ids[start : start + WINDOW_ROWS]).T, counts, strict=True):
                    count += np.bincount(column, minlength=len(count))
            self._frequencies = np.concatenate(counts)
        return self._frequencies

    def batches(self, split: str, batch_size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Rows of a split, ``batch_size`` at a time; the last batch may be shorter.

        Shuffled readings of sets that are not held in memory go by windows: blocks of 16,384 successive rows are
        dealt in random order, 64 at a time, and the rows of such a window are shuffled together, so that no more than
        a window (about a million rows) is held. Sets in memory, and splits of one window, are shuffled as a whole.

        Parameters
        ----------
        split : {"train", "validation", "test"}
            Which rows.
        batch_size : int
            Rows of a batch.
        seed : int, optional
            Seed of the order, the same order for the same seed; without it, rows come as they stand.

        Returns
        -------
        iterator of Batch

        Raises
        ------
        ValueError
            No such split, or ``batch_size`` below 1.
        """
        rows = self.rows(split)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        if seed is None:
            places = range(0, len(rows.labels), batch_size)
            return (self._batch(rows, slice(place, place + batch_size)) for place in places)
        return self._shuffled(rows, batch_size, np.random.default_rng(seed))

    def _batch(self, rows: Rows, places: slice | NDArray[np.int64]) -> Batch:
        # Copies: a batch may be written to, and torch takes no read-only arrays.
        return Batch(
            np.asarray(rows.ids[places]) + self._offsets,
            np.array(rows.numeric[places], dtype=np.float32),
            np.array(rows.labels[places], dtype=np.float32),
        )

    def _shuffled(self, rows: Rows, batch_size: int, generator: np.random.Generator) -> Iterator[Batch]:
        n_rows = len(rows.labels)
        if self._window_rows is None or n_rows <= self._window_rows:
            windows: list[Any] = [None]
        else:
            starts = generator.permutation(np.arange(0, n_rows, BLOCK_ROWS))
            windows = np.split(starts, np.arange(0, len(starts), max(self._window_rows // BLOCK_ROWS, 1))[1:])
        rest = Rows(rows.ids[:0], rows.numeric[:0], rows.labels[:0])
        for window in windows:
            held = rows if window is None else _gather(rest, rows, window)
            order = generator.permutation(len(held.labels))
            n_whole = len(order) // batch_size * batch_size
            for place in range(0, n_whole, batch_size):
                yield self._batch(held, order[place : place + batch_size])
            rest = Rows(*(array[order[n_whole:]] for array in held))
        if len(rest.labels):
            yield self._batch(rest, slice(None))


def _gather(rest: Rows, rows: Rows, starts: NDArray[np.int64]) -> Rows:
    """What was left of the last window, and the blocks that start there."""
    return Rows(
        *(
            np.concatenate([left, *(array[start : start + BLOCK_ROWS] for start in starts)])
            for left, array in zip(rest, rows, strict=True)
        )
    )


def places_in(known: NDArray[Any], values: NDArray[Any]) -> NDArray[np.int64]:
    """1 + the place of each value in the sorted array, 0 for values that are not in it.

    Examples
    --------
    >>> import numpy as np
    >>> places_in(np.array([3, 5]), np.array([5, 4, 3, 9]))
    array([2, 0, 1, 0])
    """
    if not len(known):
        return np.zeros(len(values), dtype=np.int64)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[places] == values, places + 1, 0)


def open_dataset(source: str | Path, **options: Any) -> Dataset:
    """A data set by its name or from its files.

    Parameters
    ----------
    source : str or path
        ``synthetic-10m``, ``synthetic-1m`` or ``synthetic-USERSxITEMSxPAIRS``
        (see :func:`~vqrs.bench.synthetic.synthetic`), or a file or folder of a known format.
    **options
        Those of the generator or of the format.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        Neither a name nor a path that is there.
    ValueError
        Files of no known format.

    Examples
    --------
    >>> open_dataset("synthetic-50x40x500", random_state=1)
    Dataset('synthetic-50x40x500': 400 train, 50 validation, 50 test; 2 fields, 90 ids)
    """
    from vqrs.bench import formats, synthetic

    sizes = synthetic.named_sizes(str(source))
    if sizes is not None:
        return synthetic.synthetic(*sizes, name=str(source), **options)
    return formats.read(Path(source), **options)
