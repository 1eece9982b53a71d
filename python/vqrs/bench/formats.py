"""Formats of data sets that are kept as arrays: implicit feedback by user, and rows of ids with a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqrs.bench.datasets import SPLITS, Dataset, Rows

__all__ = ["feedback_dataset", "read"]

VALIDATION_SHARE = 0.1


def read(source: Path, *, format: str | None = None, **options: Any) -> Dataset:
    """The data set in a file or folder.

    Parameters
    ----------
    source : path
        File or folder.
    format : str, optional
        Name of the format; by default it is recognised.
    **options
        Those of the format: ``random_state`` of the negatives and ``name``.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The format is unknown.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder, and no name of a synthetic data set.")
    if format is None:
        format = next((name for name, (recognises, _) in FORMATS.items() if recognises(source)), None)
    if format not in FORMATS:
        raise ValueError(f"{source}: format {format or 'not recognised'}; the known formats are {', '.join(FORMATS)}.")
    return FORMATS[format][1](source, **options)


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
    return Dataset(name, field_names, sizes, {split: rows[split]._replace(ids=columns[split]) for split in SPLITS})


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


def feedback_dataset(
    name: str, train: NDArray[np.int64], test: NDArray[np.int64], n_users: int, n_items: int, random_state: int = 0
) -> Dataset:
    """Implicit feedback as rows of user and item: each known pair with label 1, and one drawn pair with label 0.

    A random tenth of the training pairs is the validation split. Each pair gets one negative of the same user, an item
    drawn evenly from all that are none of the user's in the training list (validation included), and for the test
    split in neither list. Negatives are drawn once, so that every epoch sees the same ones.

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
    if source.suffix != ".npz":
        return ()
    with np.load(source) as arrays:
        return tuple(arrays.files)


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


FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[..., Dataset]]] = {
    "gowalla": (_is_gowalla, _gowalla),
    "flights": (_is_flights, _flights),
}
