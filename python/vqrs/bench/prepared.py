"""Data sets in a folder of mapped arrays: written once, whole or not at all, and read without being held in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqrs.bench.datasets import SPLITS, WINDOW_ROWS, Dataset, Rows

__all__ = ["is_prepared", "open_prepared", "save", "write"]

ABOUT = "dataset.json"
VERSION = 1
_COPIED_ROWS = 1 << 16


def write(
    folder: Path,
    chunks: Iterable[tuple[str, Rows]],
    *,
    name: str,
    field_names: tuple[str, ...],
    field_sizes: tuple[int, ...],
    n_numeric: int,
    n_rows: dict[str, int],
    has_unknown_ids: bool,
    frequencies: NDArray[np.int64],
    origin: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Rows into a folder that is there only when it is whole.

    For each split there are ``SPLIT.ids.npy`` (int32, ids within their fields), ``SPLIT.labels.npy`` (uint8) and, where
    there are numbers, ``SPLIT.numeric.npy`` (float32); besides them ``frequencies.npy`` and ``dataset.json``. All is
    written beside the folder, under its name with ``.partial``, and renamed at the end; what a broken run left there
    is replaced by the next.

    Parameters
    ----------
    folder : path
        What is made.
    chunks : iterable of (str, Rows)
        Rows and the split that they belong to, in the order of each split.
    name, field_names, field_sizes, n_numeric, has_unknown_ids, frequencies
        Of the data set.
    n_rows : dict of str to int
        Rows of each split, all of which ``chunks`` must give.
    origin : dict
        How the set was made; kept in ``dataset.json``.
    overwrite : bool, default=False
        Replace the folder if it is there and is such a folder, whole or broken.

    Raises
    ------
    FileExistsError
        The folder is there and not empty, and is not to be replaced; or it holds something else, which never is.
    ValueError
        A split has no rows.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not is_prepared(folder):
            raise FileExistsError(f"{folder} is there already and no prepared data set: choose another folder.")
        if not overwrite:
            raise FileExistsError(f"{folder} is there already: choose another folder, or overwrite it.")
    empty = [split for split in SPLITS if not n_rows[split]]
    if empty:
        counts = ", ".join(f"{n_rows[split]} {split}" for split in SPLITS)
        raise ValueError(f"{name}: the {empty[0]} split would have no rows ({counts}); more rows are needed.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shapes = _shapes(len(field_names), n_numeric, n_rows)
    arrays = {
        file: np.lib.format.open_memmap(partial / file, mode="w+", dtype=dtype, shape=shape)
        for file, (dtype, shape) in shapes.items()
    }
    ends = dict.fromkeys(SPLITS, 0)
    for split, rows in chunks:
        start, ends[split] = ends[split], ends[split] + len(rows.labels)
        for part, values in zip(Rows._fields, rows, strict=True):
            if f"{split}.{part}.npy" in arrays:
                arrays[f"{split}.{part}.npy"][start : ends[split]] = values
    if ends != n_rows:
        raise ValueError(f"{name}: the rows changed while they were read: {n_rows} expected, {ends} found.")
    for array in arrays.values():
        array.flush()
    np.save(partial / "frequencies.npy", np.asarray(frequencies, dtype=np.int64))
    about = {
        "version": VERSION,
        "name": name,
        "field_names": field_names,
        "field_sizes": field_sizes,
        "n_numeric": n_numeric,
        "has_unknown_ids": has_unknown_ids,
        "n_rows": n_rows,
        "origin": origin,
    }
    (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _shapes(n_fields: int, n_numeric: int, n_rows: dict[str, int]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Type and shape of each file of rows."""
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for split in SPLITS:
        shapes[f"{split}.ids.npy"] = np.int32, (n_rows[split], n_fields)
        shapes[f"{split}.labels.npy"] = np.uint8, (n_rows[split],)
        if n_numeric:
            shapes[f"{split}.numeric.npy"] = np.float32, (n_rows[split], n_numeric)
    return shapes


def save(
    dataset: Dataset, folder: str | Path, *, overwrite: bool = False, origin: dict[str, Any] | None = None
) -> Path:
    """A data set into a folder, from which ``open_dataset`` maps it.

    Parameters
    ----------
    dataset : Dataset
        Any.
    folder : path
        What is made; see :func:`write`.
    overwrite : bool, default=False
        Replace the folder if it is there.
    origin : dict, optional
        How the set was made; kept beside it.

    Returns
    -------
    path
        The folder.

    Raises
    ------
    FileExistsError
        The folder is there and not empty, and is not to be replaced.

    Examples
    --------
    >>> import tempfile
    >>> from vqrs.bench import open_dataset
    >>> open_dataset(save(open_dataset("synthetic-50x40x500"), tempfile.mkdtemp()))
    Dataset('synthetic-50x40x500': 400 train, 50 validation, 50 test; 2 fields, 90 ids)
    """

    def chunks() -> Iterator[tuple[str, Rows]]:
        for split in SPLITS:
            rows = dataset.rows(split)
            for start in range(0, len(rows.labels), _COPIED_ROWS):
                yield split, Rows(*(array[start : start + _COPIED_ROWS] for array in rows))

    write(
        Path(folder),
        chunks(),
        name=dataset.name,
        field_names=dataset.field_names,
        field_sizes=dataset.field_sizes,
        n_numeric=dataset.n_numeric,
        has_unknown_ids=dataset.has_unknown_ids,
        n_rows={split: dataset.n_rows(split) for split in SPLITS},
        frequencies=dataset.frequencies(),
        origin=origin or {},
        overwrite=overwrite,
    )
    return Path(folder)


def is_prepared(folder: Path) -> bool:
    """Whether the folder is one that :func:`write` made, whole or broken."""
    return folder.is_dir() and ((folder / ABOUT).exists() or (folder / "train.ids.npy").exists())


def open_prepared(folder: Path, *, name: str | None = None) -> Dataset:
    """The data set of a folder, mapped: rows are read when batches ask for them.

    Parameters
    ----------
    folder : path
        What :func:`write` made.
    name : str, optional
        Another name for reports.

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        The folder is not whole, is of another version, or a file is not of the size that ``dataset.json`` tells.
    """
    if not (folder / ABOUT).exists():
        raise ValueError(f"{folder} has no {ABOUT}: it is not whole; prepare it again.")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / ABOUT} cannot be read ({error}): prepare the folder again.") from error
    about = about if isinstance(about, dict) else {}
    if about.get("version") != VERSION:
        raise ValueError(f"{folder} is of version {about.get('version')}, this package reads {VERSION}: prepare again.")
    try:
        n_fields, n_numeric, n_rows = len(about["field_names"]), about["n_numeric"], about["n_rows"]
        n_ids, has_unknown_ids = sum(about["field_sizes"]), about["has_unknown_ids"]
        files = _shapes(n_fields, n_numeric, n_rows) | {"frequencies.npy": (np.int64, (n_ids,))}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / ABOUT} is not whole (about {error}): prepare the folder again.") from error
    arrays: dict[str, NDArray[Any]] = {}
    for file, (dtype, shape) in files.items():
        try:
            arrays[file] = np.load(folder / file, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{folder / file} cannot be read ({error}): prepare the folder again.") from error
        if (arrays[file].dtype, arrays[file].shape) != (dtype, shape):
            raise ValueError(
                f"{folder / file} holds {arrays[file].dtype} of shape {arrays[file].shape}, {ABOUT} tells "
                f"{np.dtype(dtype)} of shape {shape}: prepare the folder again."
            )
    rows = {
        split: Rows(
            arrays[f"{split}.ids.npy"],
            arrays.get(f"{split}.numeric.npy", np.broadcast_to(np.float32(0), (n_rows[split], 0))),
            arrays[f"{split}.labels.npy"],
        )
        for split in SPLITS
    }
    return Dataset(
        name or about["name"],
        about["field_names"],
        about["field_sizes"],
        rows,
        has_unknown_ids=has_unknown_ids,
        frequencies=np.array(arrays["frequencies.npy"]),
        window_rows=WINDOW_ROWS,
    )
