"""All formats that data sets are read from: text, prepared folders, lists of implicit feedback, arrays of ids."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqrs.bench.datasets import SPLITS, Dataset, Rows, places_in
from vqrs.bench.prepared import is_prepared, open_prepared, save
from vqrs.bench.text import TEXT_FORMATS, TextFormat, prepare_text

__all__ = ["FORMATS", "feedback_dataset", "prepare", "read"]

VALIDATION_SHARE = 0.1


def read(source: Path, *, format: str | None = None, **options: Any) -> Dataset:
    """The data set in a file or folder.

    A text is prepared in a temporary folder each time; for a large one, call :func:`prepare` once.

    Parameters
    ----------
    source : path
        File or folder.
    format : str, optional
        Name of the format; by default it is recognised.
    **options
        Those of the format: ``name`` for all; ``min_count`` for text and ``flights``; ``split`` for text
        (see :func:`prepare`); ``random_state`` of the negatives for ``gowalla`` and ``lightgcn``.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The format is unknown, or the file is not of it.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder, and no name of a synthetic data set.")
    return FORMATS[_format_of(source, format)].read(source, **options)


def prepare(
    source: str | Path,
    folder: str | Path,
    *,
    format: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
    **options: Any,
) -> Path:
    r"""A file or folder of a known format into a folder of mapped arrays, which ``open_dataset`` opens at once.

    =============== ============================================= ===============================================
    format          what                                          splits: training, validation, test
    =============== ============================================= ===============================================
    criteo-kaggle   ``train.txt``: label, 13 numbers, 26          by place in the file: six sevenths, and the
                    categories, tabs                              halves of the last
    criteo-terabyte ``day_0`` … ``day_23``, the same columns      by day: all but the last, and its halves
    avazu           ``train.csv`` with header                     by hour: all but the last day, and its halves
    movielens       ``u.data``, ``ratings.dat``, ``ratings.csv``; by timestamp: 80 %, 10 %, 10 % of the rows; equal
                    4 stars and more are label 1                  times stay together
    insteval        csv of the data set of R's lme4; marks of 4   by a hash of the row's number: 80 %, 10 %, 10 %
                    and more are label 1
    gowalla         npz of index lists, training and test         given; a random tenth of the pairs of training
                                                                  is for validation
    lightgcn        ``train.txt`` and ``test.txt``, a user and    as gowalla
                    its items a line
    flights         npz of ids with a split                       given
    =============== ============================================= ===============================================

    All text may be gzipped (``.gz``). A field's ids are those of the training rows; id 0 stands for all others, and for
    those that are rarer than ``min_count`` (with 1, no training row has id 0, so that its vector is not trained). Empty
    categories are an id like any other. Numbers x become log(1 + x), missing and negative ones 0. Of Avazu's time, the
    hour of the day and the weekday are fields.

    Text is read two or three times, and memory grows with the distinct ids only. The folder is written under another
    name and renamed when it is whole.

    Parameters
    ----------
    source : path
        What is read.
    folder : path
        What is made.
    format : str, optional
        Name of the format; by default it is recognised.
    overwrite : bool, default=False
        Replace the folder if it is there.
    progress : callable, optional
        Called with (stage, rows read) while text is read.
    **options
        ``name``; ``min_count=1`` (text and ``flights``); ``split="time"`` or ``"hash"`` (text: by time as in the table,
        or by a hash of the row's number); ``random_state=0`` of the negatives (``gowalla``, ``lightgcn``).

    Returns
    -------
    path
        The folder.

    Raises
    ------
    FileExistsError
        The folder is there and not empty, and is not to be replaced.
    FileNotFoundError
        There is no such source.
    ValueError
        The format is unknown, a line is not of it (the message names the line), or a split has no rows.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vqrs.bench import open_dataset
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> lines = [f"{row % 3}::{row % 4}::{row % 5 + 1}::{row}\n" for row in range(100)]
    >>> _ = (folder / "ratings.dat").write_text("".join(lines))
    >>> open_dataset(prepare(folder / "ratings.dat", folder / "prepared"))
    Dataset('movielens': 80 train, 10 validation, 10 test; 2 fields, 9 ids)
    """
    source, folder = Path(source), Path(folder)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder.")
    format = _format_of(source, format)
    text = next((known for known in TEXT_FORMATS if known.name == format), None)
    if text is not None:
        prepare_text(source, folder, text, overwrite=overwrite, progress=progress, **options)
        return folder
    return save(
        FORMATS[format].read(source, **options), folder, overwrite=overwrite, origin={"format": format} | options
    )


def _format_of(source: Path, format: str | None) -> str:
    found = format or next((name for name, known in FORMATS.items() if known.recognises(source)), None)
    if found not in FORMATS:
        raise ValueError(f"{source}: format {format or 'not recognised'}; the known formats are {', '.join(FORMATS)}.")
    is_text = any(text.name == found for text in TEXT_FORMATS)
    if format is not None and not is_text and not FORMATS[format].recognises(source):
        raise ValueError(f"{source} is not of the format {format}.")
    return found


def vocabulary_dataset(name: str, field_names: Any, rows: Mapping[str, Rows], min_count: int = 1) -> Dataset:
    """A data set of any ids: each field is renumbered by the ids that its training rows hold.

    Id 0 of a field stands for all ids that occur fewer than ``min_count`` times in training; the others follow in
    their order.
    """
    sizes, columns = [], {split: np.empty(rows[split].ids.shape, dtype=np.int32) for split in SPLITS}
    for field in range(rows["train"].ids.shape[1]):
        known, counts = np.unique(rows["train"].ids[:, field], return_counts=True)
        known = known[counts >= min_count]
        sizes.append(len(known) + 1)
        for split, column in columns.items():
            column[:, field] = places_in(known, rows[split].ids[:, field])
    renumbered = {split: rows[split]._replace(ids=columns[split]) for split in SPLITS}
    return Dataset(name, field_names, sizes, renumbered, has_unknown_ids=True)


def feedback_dataset(
    name: str, train: NDArray[np.int64], test: NDArray[np.int64], n_users: int, n_items: int, random_state: int = 0
) -> Dataset:
    """Implicit feedback as rows of user and item: each known pair with label 1, and one drawn pair with label 0.

    A random tenth of the training pairs is the validation split. Each pair gets one negative of the same user, an item
    drawn evenly from all that are none of the user's in the training list (validation included), and for the test
    split in neither list. Negatives are drawn once, so that every epoch sees the same ones; they are rows like the
    others, and count in the frequencies.

    Parameters
    ----------
    name : str
        What reports call it.
    train, test : ndarray of int64, shape (n_pairs, 2)
        Pairs of user and item.
    n_users, n_items : int
        Users are below ``n_users``, items below ``n_items``.
    random_state : int, default=0
        Seed of the validation split and of the negatives.

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        A user has all items, so that there is no negative.
    """
    generator = np.random.default_rng(random_state)
    keys = {
        "train": np.unique(train[:, 0] * n_items + train[:, 1]),
        "test": np.unique(test[:, 0] * n_items + test[:, 1]),
    }
    listed: NDArray[np.int64] = keys["train"]
    all_known = np.union1d(listed, keys["test"])
    order = generator.permutation(len(listed))
    n_held_out = int(VALIDATION_SHARE * len(listed))
    positives: dict[str, NDArray[np.int64]] = {
        "train": listed[np.sort(order[n_held_out:])],
        "validation": listed[np.sort(order[:n_held_out])],
        "test": keys["test"],
    }
    rows: dict[str, Rows] = {}
    for split, pairs in positives.items():
        negatives = _negatives(pairs // n_items, all_known if split == "test" else listed, n_items, generator)
        both = np.stack([pairs, negatives], axis=1).ravel()
        labels = np.tile(np.array([1, 0], dtype=np.uint8), len(pairs))
        rows[split] = Rows(
            np.stack(np.divmod(both, n_items), axis=1), np.zeros((len(both), 0), dtype=np.float32), labels
        )
    return vocabulary_dataset(name, ("user", "item"), rows)


def _negatives(
    users: NDArray[np.int64], known: NDArray[np.int64], n_items: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """For each user a pair that is not among the known ones (sorted): drawn again until it is not."""
    owners, counts = np.unique(known // n_items, return_counts=True)
    if (counts >= n_items).any():
        raise ValueError(f"user {owners[counts.argmax()]} has all {n_items} items: no negative can be drawn.")
    pairs = np.empty_like(users)
    open_places = np.arange(len(users))
    while len(open_places):
        pairs[open_places] = users[open_places] * n_items + generator.integers(n_items, size=len(open_places))
        open_places = open_places[places_in(known, pairs[open_places]) > 0]
    return pairs


def _arrays(source: Path) -> tuple[str, ...]:
    if source.suffix != ".npz" or not source.is_file():
        return ()
    try:
        with np.load(source) as arrays:
            return tuple(arrays.files)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source} is no whole file of numpy arrays ({error}).") from error


def _is_gowalla(source: Path) -> bool:
    return {"train_indptr", "train_items", "test_indptr", "test_items"} <= set(_arrays(source))


def _gowalla(source: Path, *, name: str = "gowalla", random_state: int = 0) -> Dataset:
    with np.load(source) as arrays:
        pairs, n_users = {}, len(arrays["train_indptr"]) - 1
        for split in ("train", "test"):
            users = np.repeat(np.arange(n_users), np.diff(arrays[f"{split}_indptr"]))
            pairs[split] = np.stack([users, arrays[f"{split}_items"].astype(np.int64)], axis=1)
        n_items = 1 + int(np.concatenate([array[:, 1] for array in pairs.values()]).max())
        if "n_items" in arrays:
            n_items = max(n_items, int(arrays["n_items"].item()))
    return feedback_dataset(name, pairs["train"], pairs["test"], n_users, n_items, random_state)


def _is_flights(source: Path) -> bool:
    return {"X", "y", "split", "card", "fields"} <= set(_arrays(source))


def _flights(source: Path, *, name: str = "flights", min_count: int = 1) -> Dataset:
    with np.load(source) as arrays:
        ids, labels, parts, fields = arrays["X"], arrays["y"], arrays["split"], arrays["fields"]
    none = np.zeros((len(labels), 0), dtype=np.float32)
    rows = {
        split: Rows(ids[parts == part], none[: (parts == part).sum()], labels[parts == part])
        for part, split in enumerate(SPLITS)
    }
    return vocabulary_dataset(name, fields, rows, min_count)


def _list_files(source: Path) -> list[Path]:
    """The files of training and test lists in a folder; none where it does not hold both."""
    files = [source / "train.txt", source / "test.txt"]
    return files if all(file.is_file() for file in files) else []


def _is_lightgcn(source: Path) -> bool:
    files = _list_files(source)
    if not files:
        return False
    with open(files[0], encoding="utf-8", errors="replace") as stream:
        return re.fullmatch(r"\d+( \d+)+", stream.readline().strip()) is not None


def _lightgcn(source: Path, *, name: str = "lightgcn", random_state: int = 0) -> Dataset:
    pairs = []
    for file in _list_files(source):
        lists = []
        with open(file, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    user, *items = (int(word) for word in line.split())
                except ValueError:
                    raise ValueError(f"{file}, line {number}: expected a user and its items, all integers.") from None
                lists.append(np.stack([np.full(len(items), user), np.array(items, dtype=np.int64)], axis=1))
        pairs.append(np.concatenate(lists))
    n_users, n_items = (1 + np.concatenate(pairs).max(axis=0)).tolist()
    return feedback_dataset(name, pairs[0], pairs[1], n_users, n_items, random_state)


class Format(NamedTuple):
    """Whether a file or folder is of the format, and the data set that it holds."""

    recognises: Callable[[Path], bool]
    read: Callable[..., Dataset]


def _read_text(format: TextFormat, source: Path, **options: Any) -> Dataset:
    folder = tempfile.mkdtemp(prefix="vqrs-")
    try:
        prepare_text(source, Path(folder) / "prepared", format, **options)
        dataset = open_prepared(Path(folder) / "prepared")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset


FORMATS: dict[str, Format] = {
    "prepared": Format(is_prepared, open_prepared),
    "gowalla": Format(_is_gowalla, _gowalla),
    "flights": Format(_is_flights, _flights),
    "lightgcn": Format(_is_lightgcn, _lightgcn),
    **{text.name: Format(text.recognises, functools.partial(_read_text, text)) for text in TEXT_FORMATS},
}
"""The known formats, the first that fits is taken."""
