"""Tables of float rows in the files that they usually come in, without reading them whole where the format permits."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """What a file holds."""

    values: Any
    """Has ``shape`` (n_rows, n_features), and gives a block of rows for a slice or an array of row numbers."""
    names: list[str] | None = None
    """One name a row, where the format has them."""


def read_rows(source: str | os.PathLike[str]) -> Rows:
    r"""Open the rows of a file.

    Parameters
    ----------
    source : path-like
        ``.npy``, ``.npz``, ``.safetensors`` (a vqrs table too), ``.pt`` or ``.pth``: with ``:NAME`` behind it where the
        file holds several arrays. ``.bin`` is word2vec's binary format, anything else its text or GloVe's.

    Returns
    -------
    Rows
        Memory-mapped, but for ``.npz`` and the formats of word2vec.

    Raises
    ------
    FileNotFoundError, OSError
        The file cannot be read.
    ValueError
        It does not hold what its name says, or not one table and no name was given; the message names what it holds.
    ImportError
        A ``.pt`` file, and torch is not installed.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from vqrs._readers import read_rows
    >>> path = os.path.join(tempfile.mkdtemp(), "vectors.txt")
    >>> with open(path, "w") as file:
    ...     n_written = file.write("the 0.5 1\nof 2 -1\n")
    >>> read_rows(path).values, read_rows(path).names
    (array([[ 0.5,  1. ],
           [ 2. , -1. ]], dtype=float32), ['the', 'of'])
    """
    text = os.fspath(source)
    found = re.fullmatch(r"(.+\.(?:npz|safetensors|pt|pth)):([^/\\]+)", text, re.IGNORECASE)
    path, key = (Path(found[1]), found[2]) if found and not os.path.exists(text) else (Path(text), None)
    rows = _READERS.get(path.suffix.lower(), _read_text)(path, key)
    if len(rows.values.shape) != 2:
        raise ValueError(f"{source} has shape {tuple(rows.values.shape)}, expected two dimensions: rows and columns")
    return rows


def read_weights(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """One weight a row: a one-dimensional ``.npy``, or text with a number a line."""
    if Path(path).suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False).astype(np.float64)
    return np.loadtxt(path, dtype=np.float64, ndmin=1)


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """One name a row: text in UTF-8 with a name a line."""
    return Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _read_npy(path: Path, key: str | None) -> Rows:
    return Rows(np.load(path, mmap_mode="r", allow_pickle=False))


def _read_npz(path: Path, key: str | None) -> Rows:
    with np.load(path, allow_pickle=False) as arrays:
        if key is None and len(arrays.files) == 1:
            key = arrays.files[0]
        if key not in arrays.files:
            raise _which_one(path, key, arrays.files)
        return Rows(arrays[key])


def _read_torch(path: Path, key: str | None) -> Rows:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs torch: pip install 'vqrs[torch]'") from error
    path.stat()  # torch has its own words for a missing file
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.Tensor):
        return Rows(loaded.detach())
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a tensor or a dict of tensors")
    tables = {name: t for name, t in loaded.items() if isinstance(t, torch.Tensor) and t.ndim == 2}
    return Rows(tables[_choose(path, key, list(tables))].detach())


# ---- safetensors ---------------------------------------------------------------------------------------------------

_SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LARGEST_HEADER = 100 << 20


def _read_safetensors(path: Path, key: str | None) -> Rows:
    header, start = _safetensors_header(path)
    if key is None and "vqrs" in header.get("__metadata__", {}):
        from vqrs.table import open as open_table

        table = open_table(path)
        return Rows(table, table.names)
    tables = {
        name: tensor
        for name, tensor in header.items()
        if tensor.get("dtype") in _SAFETENSORS_DTYPES and len(tensor["shape"]) == 2
    }
    tensor = tables[_choose(path, key, list(tables))]
    begin, end = tensor["data_offsets"]
    values = np.memmap(path, mode="r", offset=start + begin, dtype=np.uint8, shape=(end - begin,))
    rows = values.view(_SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return Rows(BFloat16Rows(rows) if tensor["dtype"] == "BF16" else rows)


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its tensors begin."""
    with path.open("rb") as file:
        prefix = file.read(8)
        size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size > min(_LARGEST_HEADER, path.stat().st_size - 8):
            raise ValueError(f"{path} is no safetensors file: its header is cut")
        try:
            return json.loads(file.read(size)), 8 + size
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON") from error


class BFloat16Rows:
    """Rows of bfloat16, which numpy does not have: blocks of them are read as float32.

    Parameters
    ----------
    bits : ndarray of shape (n_rows, n_features), uint16
        The values as stored.
    """

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        self._bits = bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self._bits.shape

    def __len__(self) -> int:
        return len(self._bits)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        # A bfloat16 is the upper half of a float32.
        return (self._bits[rows].astype(np.uint32) << 16).view(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)


# ---- word2vec and GloVe --------------------------------------------------------------------------------------------


def _read_text(path: Path, key: str | None) -> Rows:
    """Lines of a name and numbers; word2vec puts a line with both sizes first, GloVe does not."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        first = file.readline()
        header = re.fullmatch(r"\s*(\d+)\s+(\d+)\s*", first)
        if header:
            n_rows, dim = int(header[1]), int(header[2])
            lines: Iterator[str] = iter(file)
        else:
            # The first line, the others, and perhaps a last one without an end.
            n_rows = 2 + sum(chunk.count("\n") for chunk in iter(lambda: file.read(1 << 20), ""))
            dim = len(first.split()) - 1
            file.seek(0)
            lines = iter(file)
        if dim < 1:
            raise ValueError(f"{path}: line 1 is not a name followed by numbers, as in word2vec and GloVe text files")
        return _parse_lines(path, lines, n_rows, dim, 2 if header else 1)


def _parse_lines(path: Path, lines: Iterator[str], n_rows: int, dim: int, first_line: int) -> Rows:
    values = np.empty((n_rows, dim), dtype=np.float32)
    names: list[str] = []
    for number, line in enumerate(lines, start=first_line):
        if not line.strip():
            continue
        if len(names) == n_rows:
            raise ValueError(f"{path}: line {number} is one too many for the {n_rows} rows that its first line says")
        name, *numbers = line.rstrip().rsplit(" ", dim)
        try:
            values[len(names)] = np.array(numbers, dtype=np.float32).reshape(dim)
        except ValueError:
            raise ValueError(f"{path}: line {number} is not a name and {dim} numbers") from None
        names.append(name)
    return _named(path, values, names, n_rows if first_line == 2 else len(names))


def _read_word2vec_binary(path: Path, key: str | None) -> Rows:
    with path.open("rb") as file:
        header = re.fullmatch(rb"(\d+) (\d+)\s*", file.readline(64))
        if header is None:
            raise ValueError(f"{path} is no binary file of word2vec: its first line is not two sizes")
        n_rows, dim = int(header[1]), int(header[2])
        if n_rows * (4 * dim + 2) > path.stat().st_size:
            raise ValueError(f"{path} is cut: {n_rows} rows of {dim} numbers do not fit into its bytes")
        values = np.empty((n_rows, dim), dtype=np.float32)
        names = []
        for row in range(n_rows):
            names.append(_read_word(file))
            block = file.read(4 * dim)
            if len(block) < 4 * dim:
                raise ValueError(f"{path} is cut in row {row} of {n_rows}")
            values[row] = np.frombuffer(block, dtype="<f4")
    return _named(path, values, names, n_rows)


def _read_word(file: BinaryIO) -> str:
    word = b"".join(itertools.takewhile(lambda byte: byte not in (b" ", b""), iter(lambda: file.read(1), None)))
    return word.decode("utf-8", errors="surrogateescape").lstrip("\n")


def _named(path: Path, values: NDArray[np.float32], names: list[str], n_rows: int) -> Rows:
    if len(names) != n_rows:
        raise ValueError(f"{path} has {len(names)} rows, but its first line says {n_rows}")
    # Bytes that are no UTF-8 cannot stay in a table's names.
    return Rows(
        values[: len(names)], [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    )


def _choose(path: Path, key: str | None, found: list[str]) -> str:
    if key is None and len(found) == 1:
        return found[0]
    if key not in found:
        raise _which_one(path, key, found)
    return key


def _which_one(path: Path, key: str | None, found: list[str]) -> ValueError:
    shown = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
    if key is not None:
        return ValueError(f"{path} has no table {key!r}; it has: {shown or 'none'}")
    return ValueError(f"{path} has {len(found)} tables: add ':NAME' with one of {shown or 'none'}")


_READERS: dict[str, Callable[[Path, str | None], Rows]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_word2vec_binary,
}
