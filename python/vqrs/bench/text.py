"""Data sets that are published as text, read in bounded memory: Criteo, Avazu, MovieLens, InstEval."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from vqrs.bench.datasets import SPLITS, Rows, places_in
from vqrs.bench.prepared import write

__all__ = ["TEXT_FORMATS", "Counts", "TextFormat", "prepare_text"]

CHUNK_ROWS = 1 << 14
_MERGED_KEYS = 1 << 18
_MERGED_CHUNKS = 256

Column = NDArray[Any]
"""Fields of a column as byte strings."""


class Counts:
    """How often each key was seen, in memory that grows with the distinct keys alone.

    Examples
    --------
    >>> import numpy as np
    >>> counts = Counts()
    >>> counts.add(np.array([5, 3, 5], dtype=np.uint64))
    >>> counts.add(np.array([9, 3, 5], dtype=np.uint64))
    >>> counts.settled()
    (array([3, 5, 9], dtype=uint64), array([2, 3, 1]))
    """

    def __init__(self) -> None:
        self._keys = np.zeros(0, dtype=np.uint64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._waiting: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        self._n_waiting = 0

    def add(self, keys: NDArray[np.uint64]) -> None:
        """Count these keys too."""
        self._waiting.append(np.unique(keys, return_counts=True))
        self._n_waiting += len(self._waiting[-1][0])
        # Waiting keys are merged when they are as many as the settled ones (each key is moved a few times in all), or
        # in so many parts that the parts themselves take memory.
        if self._n_waiting > max(_MERGED_KEYS, len(self._keys)) or len(self._waiting) == _MERGED_CHUNKS:
            self.settled()

    def settled(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The distinct keys in ascending order, and their counts."""
        if self._waiting:
            keys = np.concatenate([self._keys, *(keys for keys, _ in self._waiting)])
            counts = np.concatenate([self._counts, *(counts for _, counts in self._waiting)])
            order = np.argsort(keys, kind="stable")
            keys, counts = keys[order], counts[order]
            starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
            self._keys, self._counts = keys[starts], np.add.reduceat(counts, starts)
            self._waiting, self._n_waiting = [], 0
        return self._keys, self._counts


def keys_of(column: Column) -> NDArray[np.uint64]:
    """A number for each byte string: its own bytes for up to 8 of them, a 64-bit hash (BLAKE2b) for longer ones.

    Examples
    --------
    >>> import numpy as np
    >>> [hex(key) for key in keys_of(np.array([b"a", b"", b"bc"]))]
    ['0x6100000000000000', '0x0', '0x6263000000000000']
    """
    keys = column.astype("S8").view(">u8").astype(np.uint64)
    if column.dtype.itemsize > 8:
        long = np.flatnonzero(np.char.str_len(column) > 8)
        texts, places = np.unique(column[long], return_inverse=True)
        hashes = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") for text in texts.tolist()]
        keys[long] = np.array(hashes, dtype=np.uint64)[places]
    return keys


class Chunk(NamedTuple):
    """Some successive rows of a text: keys (n, fields), numbers, labels, and times where the format has them."""

    keys: NDArray[np.uint64]
    numeric: NDArray[np.float32]
    labels: NDArray[np.uint8]
    times: NDArray[np.int64] | None


class Cuts(NamedTuple):
    """Rows with an order below ``validation`` are for training, those below ``test`` for validation."""

    validation: int
    test: int


def _last_seventh(rows_of_files: list[int]) -> Cuts:
    """Seven days in one file: six for training, the halves of the last for validation and test."""
    n_rows = sum(rows_of_files)
    first = n_rows - n_rows // 7
    return Cuts(first, first + (n_rows - first) // 2)


def _last_file(rows_of_files: list[int]) -> Cuts:
    """A file a day: the halves of the last day are for validation and test."""
    if len(rows_of_files) < 2:
        raise ValueError(
            "criteo-terabyte: one day only; at least two are needed, the last one for validation and test."
        )
    first = sum(rows_of_files[:-1])
    return Cuts(first, first + rows_of_files[-1] // 2)


def _last_tenths(times: NDArray[np.uint64], counts: NDArray[np.int64]) -> Cuts:
    """The last tenth of the rows for test, the tenth before for validation; equal times stay together."""
    ends = counts.cumsum()
    places = np.searchsorted(ends, [0.8 * ends[-1], 0.9 * ends[-1]], side="right")
    return Cuts(*(int(time) for time in times[places]))


def _last_day(times: NDArray[np.uint64], counts: NDArray[np.int64]) -> Cuts:
    """Times are YYMMDDHH: the last day is for validation and test, its rows halved between two hours."""
    days = times // np.uint64(100)
    if days[0] == days[-1]:
        raise ValueError("avazu: one day only; at least two are needed, the last one for validation and test.")
    first = int(np.searchsorted(days, days[-1]))
    ends = counts[first:].cumsum()
    middle = first + max(int(np.searchsorted(ends, ends[-1] / 2, side="right")), 1)
    return Cuts(int(times[first]), int(times[middle]) if middle < len(times) else int(times[-1]) + 1)


def _hour_of_day(column: Column) -> Column:
    return np.array([time[-2:] for time in column.tolist()], dtype="S2")


def _weekday(column: Column) -> Column:
    hours, places = np.unique(column, return_inverse=True)
    if not all(re.fullmatch(rb"\d{8}", hour) for hour in hours.tolist()):
        raise ValueError("hour is not YYMMDDHH.")
    days = [date(2000 + int(hour[:2]), int(hour[2:4]), int(hour[4:6])).weekday() for hour in hours.tolist()]
    return np.array(days).astype("S1")[places]


@dataclass(frozen=True)
class TextFormat:
    """Columns of a text and what becomes of them.

    Parameters
    ----------
    name : str
        Of the format, and of sets in it.
    columns : tuple of str
        Columns that are read; all columns of a file without a header, some of the columns of one with a header.
    fields : tuple of (str, str)
        Name of each field of ids and the column that it is read from.
    label : str
        Column of the label: 0 or 1, or a rating.
    numbers : tuple of str
        Columns of numbers: log(1 + x), 0 for missing and negative ones, as DLRM does.
    liked : float, optional
        Least rating that counts as 1.
    time : str, optional
        Column of the time by which the splits are cut, an integer.
    cuts_of_rows, cuts_of_times : callable, optional
        Where the splits are cut, by the numbers of rows in the files or by the times and their counts.
    derived : dict
        For the fields that are made from their column: how.
    delimiters : tuple of str
        What may stand between columns; a file with commas has a header, others have none.
    file_names : str
        Pattern of names of the files in a folder.
    by_name : bool
        Whether a single file is of this format by its name alone.
    """

    name: str
    columns: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]
    label: str
    numbers: tuple[str, ...] = ()
    liked: float | None = None
    time: str | None = None
    cuts_of_rows: Callable[[list[int]], Cuts] | None = None
    cuts_of_times: Callable[[NDArray[np.uint64], NDArray[np.int64]], Cuts] | None = None
    derived: dict[str, Callable[[Column], Column]] = field(default_factory=dict)
    delimiters: tuple[str, ...] = (",",)
    file_names: str = ""
    by_name: bool = False

    def files(self, source: Path) -> list[Path]:
        """Files of the source, in order; numbers in their names count as numbers."""
        if not source.is_dir():
            return [source]

        def order(file: Path) -> list[Any]:
            return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]

        found = [file for file in source.iterdir() if re.fullmatch(self.file_names, file.name)]
        return sorted(found, key=order)

    def recognises(self, source: Path) -> bool:
        """Whether the files' names fit, where they must, and the first line has the columns of this format."""
        files = self.files(source)
        named = source.is_dir() or not self.by_name or re.fullmatch(self.file_names, source.name) is not None
        return bool(files) and named and self._layout(files[0]) is not None

    def _layout(self, file: Path) -> Layout | None:
        """How the file's columns lie, or None where its first line is not of this format."""
        try:
            with _open(file) as stream:
                line = stream.readline(1 << 16).rstrip("\r\n")
            for delimiter in self.delimiters:
                first = next(_records([line], delimiter), [])
                if delimiter == "," and set(self.columns) <= set(first):
                    return Layout(delimiter, True, len(first), tuple(first.index(column) for column in self.columns))
                if delimiter != "," and len(first) == len(self.columns) and re.fullmatch(r"-?[\d.]+", first[0]):
                    return Layout(delimiter, False, len(first), tuple(range(len(first))))
        except (csv.Error, EOFError, gzip.BadGzipFile):
            return None
        return None

    def tables(self, file: Path) -> Iterator[tuple[int, Column]]:
        """Chunks of the file's rows as byte strings (rows, columns), each with the number of its first line."""
        layout = self._layout(file)
        if layout is None:
            raise ValueError(
                f"{file}, line 1: not of the format {self.name}, whose {len(self.columns)} columns are "
                f"{', '.join(self.columns)}{' (a header names them)' if self.delimiters == (',',) else ''}."
            )
        picked = itemgetter(*layout.places)
        line = 1
        try:
            with _open(file) as stream:
                records = _records(stream, layout.delimiter)
                if layout.header:
                    next(records)
                    line += 1
                while chunk := list(itertools.islice(records, CHUNK_ROWS)):
                    n_lines = len(chunk)
                    while chunk and not chunk[-1]:
                        chunk.pop()
                    if set(map(len, chunk)) - {layout.n_columns}:
                        _refuse_odd_rows(chunk, f"{file}, line", line, layout.n_columns)
                    if chunk:
                        yield line, np.array([picked(record) for record in chunk], dtype="S")
                    line += n_lines
        except (csv.Error, EOFError, gzip.BadGzipFile, UnicodeEncodeError) as error:
            raise ValueError(f"{file}, from line {line}: cannot be read ({error}).") from error

    def chunks(self, file: Path) -> Iterator[Chunk]:
        """The file's rows, some at a time."""
        for line, table in self.tables(file):
            column = dict(zip(self.columns, table.T, strict=True))
            where = f"{file}, line"
            times = None if self.time is None else _numbers(column[self.time], np.int64, where, line, self.time)
            try:
                columns = [self.derived.get(name, np.ascontiguousarray)(column[origin]) for name, origin in self.fields]
            except ValueError as error:
                raise ValueError(f"{where} {line} or soon after: {error}") from error
            numeric = np.zeros((len(table), len(self.numbers)), dtype=np.float32)
            for place, name in enumerate(self.numbers):
                values = np.where(column[name] == b"", b"0", column[name])
                numeric[:, place] = np.log1p(np.maximum(_numbers(values, np.float64, where, line, name), 0))
            labels = _numbers(column[self.label], np.float64, where, line, self.label)
            if self.liked is not None:
                labels = labels >= self.liked
            elif not np.isin(labels, (0, 1)).all():
                wrong = int(np.flatnonzero(~np.isin(labels, (0, 1)))[0])
                raise ValueError(f"{where} {line + wrong}: {self.label} is {labels[wrong]:g}, expected 0 or 1.")
            keys = np.stack([keys_of(values) for values in columns], axis=1)
            yield Chunk(keys, numeric, labels.astype(np.uint8), times)


class Layout(NamedTuple):
    """Delimiter, whether there is a header, columns of the file, and places of those that are read."""

    delimiter: str
    header: bool
    n_columns: int
    places: tuple[int, ...]


def _open(file: Path) -> TextIO:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8", errors="surrogateescape", newline="")


def _records(lines: Any, delimiter: str) -> Iterator[list[str]]:
    """Columns of each line; none for an empty line."""
    if len(delimiter) == 1:
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE)
    return (text.split(delimiter) if (text := line.rstrip("\r\n")) else [] for line in lines)


def _refuse_odd_rows(chunk: list[list[str]], where: str, line: int, n_columns: int) -> None:
    for number, record in enumerate(chunk, line):
        if len(record) != n_columns:
            raise ValueError(f"{where} {number}: {len(record)} columns, expected {n_columns}.")


def _numbers(column: Column, dtype: Any, where: str, line: int, name: str) -> NDArray[Any]:
    """The column as numbers; an error names the line of the first that is none."""
    try:
        numbers = column.astype(dtype)
        if np.isfinite(numbers).all():
            return numbers
    except ValueError:
        pass
    kind = int if dtype is np.int64 else float
    for number, text in enumerate(column.tolist(), line):
        try:
            finite = np.isfinite(kind(text))
        except ValueError:
            finite = False
        if not finite:
            wanted = "an integer" if kind is int else "a number"
            raise ValueError(f"{where} {number}: {name} is {text.decode()!r}, expected {wanted}.")
    raise AssertionError("a column that is no numbers has a field that is none")


def row_hash(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64 of row numbers: where there is no time, it deals rows to splits.

    Examples
    --------
    >>> import numpy as np
    >>> hex(row_hash(np.array([0], dtype=np.uint64))[0])
    '0xe220a8397b1dcdaf'
    """
    with np.errstate(over="ignore"):
        mixed = rows + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _criteo(name: str, cuts: Callable[[list[int]], Cuts], file_names: str) -> TextFormat:
    numbers = tuple(f"I{number}" for number in range(1, 14))
    categories = tuple(f"C{number}" for number in range(1, 27))
    return TextFormat(
        name,
        ("label", *numbers, *categories),
        tuple((column, column) for column in categories),
        "label",
        numbers,
        cuts_of_rows=cuts,
        delimiters=("\t",),
        file_names=file_names,
        by_name=cuts is _last_file,
    )


_AVAZU = (
    "C1",
    "banner_pos",
    "site_id",
    "site_domain",
    "site_category",
    "app_id",
    "app_domain",
    "app_category",
    "device_id",
    "device_ip",
    "device_model",
    "device_type",
    "device_conn_type",
    *(f"C{number}" for number in range(14, 22)),
)
_INSTEVAL = ("s", "d", "studage", "lectage", "service", "dept")

TEXT_FORMATS = (
    _criteo("criteo-terabyte", _last_file, r"day_\d+(\.gz)?"),
    _criteo("criteo-kaggle", _last_seventh, r"train\.(txt|tsv)(\.gz)?"),
    TextFormat(
        "avazu",
        ("click", "hour", *_AVAZU),
        (("hour", "hour"), ("weekday", "hour"), *((column, column) for column in _AVAZU)),
        "click",
        time="hour",
        cuts_of_times=_last_day,
        derived={"hour": _hour_of_day, "weekday": _weekday},
        file_names=r"train(\.csv)?(\.gz)?",
    ),
    TextFormat(
        "movielens",
        ("userId", "movieId", "rating", "timestamp"),
        (("user", "userId"), ("item", "movieId")),
        "rating",
        liked=4.0,
        time="timestamp",
        cuts_of_times=_last_tenths,
        delimiters=("::", "\t", ","),
        file_names=r"(u\.data|(ratings|movielens)\.(dat|csv))(\.gz)?",
    ),
    TextFormat(
        "insteval",
        (*_INSTEVAL, "y"),
        tuple((column, column) for column in _INSTEVAL),
        "y",
        liked=4.0,
        file_names=r"(?i:insteval)\.csv(\.gz)?",
    ),
)
"""The formats that are known; where one is a special case of another, it comes first."""


def prepare_text(
    source: Path,
    folder: Path,
    format: TextFormat,
    *,
    name: str | None = None,
    min_count: int = 1,
    split: str = "time",
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """A text into a folder of mapped arrays, in memory that grows with the distinct ids and not with the rows.

    The text is read once to place the cuts between the splits (not where rows are dealt by a hash), once to count the
    ids of the training rows, and once to write. See :func:`vqrs.bench.formats.prepare`.

    Parameters
    ----------
    source, folder : path
        What is read, and what is made.
    format : TextFormat
        Of the text.
    name : str, optional
        Name of the data set; by default that of the format.
    min_count : int, default=1
        Ids seen fewer times in training share the field's id 0.
    split : {"time", "hash"}, default="time"
        By time where the format has times or an order in time, else by a hash of the row's number.
    overwrite : bool, default=False
        Replace the folder if it is there.
    progress : callable, optional
        Called with (stage, rows read) after each chunk.

    Raises
    ------
    ValueError
        The text is not of the format (the message names the line), or a split has no rows.
    """
    if split not in ("time", "hash"):
        raise ValueError(f"split={split!r}: expected 'time' or 'hash'.")
    files = format.files(source)
    if not files:
        raise ValueError(f"{source}: no file in it is named as those of {format.name}: {format.file_names}")
    by_time = split == "time" and (format.cuts_of_rows or format.cuts_of_times) is not None
    cuts = _place_cuts(format, files, progress) if by_time else Cuts(8, 9)
    counts = [Counts() for _ in format.fields]
    n_rows = dict.fromkeys(SPLITS, 0)
    for chunk, splits in _split_chunks(format, files, cuts, by_time, "counting ids", progress):
        for place, part in enumerate(SPLITS):
            n_rows[part] += int((splits == place).sum())
        training = chunk.keys[splits == 0]
        for counter, column in zip(counts, training.T, strict=True):
            counter.add(column)
    vocabularies, frequencies = [], []
    for counter in counts:
        keys, seen = counter.settled()
        kept = seen >= min_count
        vocabularies.append(keys[kept])
        frequencies.append(np.r_[seen[~kept].sum(), seen[kept]])

    def chunks() -> Iterator[tuple[str, Rows]]:
        for chunk, splits in _split_chunks(format, files, cuts, by_time, "writing", progress):
            columns = [places_in(known, column) for known, column in zip(vocabularies, chunk.keys.T, strict=True)]
            ids = np.stack(columns, axis=1)
            for place, part in enumerate(SPLITS):
                chosen = splits == place
                yield part, Rows(ids[chosen], chunk.numeric[chosen], chunk.labels[chosen])

    write(
        folder,
        chunks(),
        name=name or format.name,
        field_names=tuple(field_name for field_name, _ in format.fields),
        field_sizes=tuple(len(known) + 1 for known in vocabularies),
        n_numeric=len(format.numbers),
        n_rows=n_rows,
        has_unknown_ids=True,
        frequencies=np.concatenate(frequencies),
        origin={"format": format.name, "min_count": min_count, "split": "time" if by_time else "hash"},
        overwrite=overwrite,
    )


def _place_cuts(format: TextFormat, files: list[Path], progress: Callable[[str, int], None] | None) -> Cuts:
    if format.cuts_of_rows is not None:
        return format.cuts_of_rows([_count_lines(file) for file in files])
    assert format.cuts_of_times is not None
    times, n_read = Counts(), 0
    for chunk in itertools.chain.from_iterable(map(format.chunks, files)):
        assert chunk.times is not None
        times.add(chunk.times.astype(np.uint64))
        n_read += len(chunk.labels)
        if progress:
            progress("placing the cuts", n_read)
    if not n_read:
        raise ValueError(f"{files[0]}: no rows.")
    return format.cuts_of_times(*times.settled())


def _count_lines(file: Path) -> int:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    n_lines, end = 0, b"\n"
    try:
        with opener(file, "rb") as stream:
            while block := stream.read(1 << 20):
                n_lines += block.count(b"\n")
                end = block[-1:]
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: cannot be read ({error}).") from error
    return n_lines + (end != b"\n")


def _split_chunks(
    format: TextFormat,
    files: list[Path],
    cuts: Cuts,
    by_time: bool,
    stage: str,
    progress: Callable[[str, int], None] | None,
) -> Iterator[tuple[Chunk, NDArray[np.int64]]]:
    """The chunks of all files, each with the places in :data:`SPLITS` of its rows."""
    row = 0
    for chunk in itertools.chain.from_iterable(map(format.chunks, files)):
        numbers = np.arange(row, row + len(chunk.labels))
        row += len(numbers)
        if not by_time:
            order = (row_hash(numbers.astype(np.uint64)) % np.uint64(10)).astype(np.int64)
        elif format.cuts_of_times is None:
            order = numbers
        else:
            assert chunk.times is not None
            order = chunk.times
        yield chunk, np.searchsorted(np.array(cuts), order, side="right")
        if progress:
            progress(stage, row)
