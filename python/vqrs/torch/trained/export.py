"""Tables of trained embeddings: rows that are computed from their numbers, in a file as small as the module.

A *part* is how some rows are read: a decoder's description, its tensors and the codes of its rows. Parts are made of
terms (:func:`hashed_part`) and of other parts (:func:`join_part`, :func:`linear_part`, :func:`switch_part`);
:func:`as_table` makes the table. docs/format.md says what each form means, bit for bit.

Examples
--------
Two hashed columns of a module whose rows are ``cat(weight[0][h_0(id)], weight[1][h_1(id)])``:

>>> import torch
>>> weight, seeds = torch.randn(2, 50, 4), [7, 8]  # 2 columns of 50 rows of 4 values
>>> terms = [Term(weight, hashed(seeds[j], 50), start=4 * j, width=4, offset=200 * j) for j in (0, 1)]
>>> part = hashed_part(8, terms, rows=1000)
>>> part.description["dim"], list(part.tensors), part.codes.shape
(8, ['arrays.0'], (1000, 0))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import vqrs
from vqrs import _core
from vqrs.reference import pack_bits, row_bytes
from vqrs.torch.operators import as_arrays

if TYPE_CHECKING:
    from vqrs.torch.trained.base import TrainedEmbedding

__all__ = [
    "Part",
    "Scalar",
    "Term",
    "as_table",
    "books_part",
    "digit",
    "hashed",
    "hashed_part",
    "join_part",
    "levels_part",
    "linear_part",
    "rows_part",
    "segments_part",
    "stored",
    "switch_part",
]

Place = dict[str, Any]
"""Where a piece stands in its array, counted in strides: made by :func:`hashed`, :func:`digit` or :func:`stored`."""

_UNSIGNED = 2**64
_ARRAYS = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)


class Part(NamedTuple):
    """How some rows are read."""

    description: dict[str, Any]
    """The decoder's description, as in ``Table.info()["decoder"]``."""
    tensors: dict[str, Any]
    """The decoder's tensors by name: numpy arrays (bfloat16 as uint16)."""
    codes: NDArray[np.uint8]
    """Codes of the rows, uint8 of shape (rows, row_bytes); ``row_bytes`` is 0 where nothing is stored for each row."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.codes)

    @property
    def dim(self) -> int:
        """Values of a row."""
        return int(self.description["dim"])


def hashed(seed: int | Tensor, size: int) -> Place:
    """The place ``hash_ids(id, seed, size)`` of :mod:`vqrs.torch.trained.hashing`; ``size`` is at most 2^31."""
    return {"kind": "hash", "seed": int(seed) % _UNSIGNED, "size": int(size)}


def digit(size: int, divisor: int = 1) -> Place:
    """The place ``id // divisor % size``: the id itself (``size`` is the number of rows), quotient or remainder."""
    return {"kind": "digit", "divisor": int(divisor), "size": int(size)}


def stored(field: int, size: int) -> Place:
    """The place that stands in a field of the row's own code: a learned pointer, below ``size``."""
    return {"kind": "stored", "field": int(field), "size": int(size)}


class Scalar(NamedTuple):
    """A factor of a term: ``array.flatten()[offset + place * stride]``."""

    array: Tensor
    place: Place
    stride: int = 1
    offset: int = 0


class Term(NamedTuple):
    """A piece of an array that is added to some columns of a row.

    It is ``array.flatten()[at : at + width]`` with ``at = offset + place * stride``, times the sign and the weight, and
    it is added to (or with ``multiply`` multiplied with) the columns ``start : start + width``, which other terms have
    filled before. All numbers count values.
    """

    array: Tensor
    """float32, float16, bfloat16, int8 or uint8, of any shape; an array of several terms is stored once, so give all of
    them the same tensor with different offsets, not slices of it."""
    place: Place
    start: int = 0
    width: int | None = None
    """By default the array's last axis."""
    stride: int | None = None
    """By default the width: pieces stand one behind the other. 1 lets them overlap (ROBE): an array that wraps around
    must hold its first ``width - 1`` values once more behind its last one. 0 is the same piece for all rows."""
    offset: int = 0
    sign: int | Tensor | None = None
    """Seed of a random sign for each id: ``hash_signs``."""
    weight: Scalar | None = None
    multiply: bool = False


def hashed_part(
    dim: int,
    terms: Iterable[Term],
    *,
    rows: int | None = None,
    pointers: ArrayLike | None = None,
    codes: ArrayLike | None = None,
    bits: int = 0,
    first: int = 0,
) -> Part:
    """Rows that are sums of pieces of arrays, in the order of the terms.

    Parameters
    ----------
    dim : int
        Values of a row. Each column needs a term.
    terms : iterable of Term
    rows : int, optional
        Number of rows; where rows have pointers it is theirs.
    pointers : int array of shape (rows, fields), optional
        What :func:`stored` places read.
    codes : uint8 array of shape (rows, ceil(fields * bits / 8)), optional
        The same, packed already (least significant bit first, as ``vqrs.reference.pack_bits`` does).
    bits : int
        Bits of a pointer, 1 to 32, where there are any.
    first : int
        What hashes and digits take for the id of row 0: the first id of a field that is a case of its own.

    Returns
    -------
    Part

    Raises
    ------
    TypeError
        An array is of another type.
    ValueError
        Neither rows nor pointers are given.
    """
    arrays: dict[int, tuple[str, Tensor]] = {}

    def source(array: Tensor, place: Place, stride: int, offset: int) -> dict[str, Any]:
        if array.dtype not in _ARRAYS:
            raise TypeError(f"terms read float32, float16, bfloat16, int8 or uint8, not {array.dtype}")
        name, _ = arrays.setdefault(id(array), (str(len(arrays)), array))
        return {"array": int(name), "place": place, "stride": int(stride), "offset": int(offset)}

    described = []
    for term in terms:
        width = term.array.shape[-1] if term.width is None else int(term.width)
        stride = width if term.stride is None else term.stride
        entry = {
            "start": int(term.start),
            "width": width,
            "piece": source(term.array, term.place, stride, term.offset),
        }
        if term.sign is not None:
            entry["sign"] = int(term.sign) % _UNSIGNED
        if term.weight is not None:
            entry["weight"] = source(*term.weight)
        if term.multiply:
            entry["multiply"] = True
        described.append(entry)
    if pointers is not None:
        codes = pack_bits(np.asarray(pointers), bits)
    if codes is None:
        if rows is None:
            raise ValueError("give the number of rows, or their pointers")
        codes = np.empty((rows, 0), np.uint8)
    description = {"form": "hashed", "dim": int(dim), "bits": bits, "first": int(first), "terms": described}
    tensors = as_arrays({f"arrays.{name}": tensor for name, tensor in arrays.values()})
    return Part(description, tensors, np.ascontiguousarray(codes, dtype=np.uint8))


def rows_part(weight: Tensor) -> Part:
    """A row an id, stored as it is: ``weight`` of shape (rows, dim), of a type that :class:`Term` takes."""
    return hashed_part(weight.shape[1], [Term(weight, digit(len(weight)))], rows=len(weight))


def books_part(codebooks: Tensor, codes: ArrayLike, bits: int) -> Part:
    """Columns side by side, each an entry of its codebook that a stored pointer picks.

    Parameters
    ----------
    codebooks : tensor of shape (columns, entries, width)
    codes : uint8 array of shape (rows, ceil(columns * bits / 8))
        Packed pointers, below ``entries``.
    bits : int
        Bits of a pointer.

    Returns
    -------
    Part
        Of ``columns * width`` values a row.
    """
    columns, entries, width = codebooks.shape
    terms = [
        Term(codebooks, stored(column, entries), start=column * width, width=width, offset=column * entries * width)
        for column in range(columns)
    ]
    return hashed_part(columns * width, terms, codes=codes, bits=bits)


def levels_part(levels: Tensor, scales: Tensor) -> Part:
    """Integers with a float32 scale each row, or one for all: a value is ``level * scale``.

    Parameters
    ----------
    levels : int8 or int16 tensor of shape (rows, dim)
    scales : float32 tensor of shape (rows,), or of one value

    Returns
    -------
    Part
        Rows equal to ``levels.float() * scales[:, None]`` in every bit.
    """
    rows, dim = levels.shape
    scales = scales.detach().reshape(-1)
    place = digit(rows) if len(scales) == rows else digit(1)
    if levels.dtype == torch.int8:
        return hashed_part(dim, [Term(levels, digit(rows), weight=Scalar(scales, place))], rows=rows)
    if levels.dtype != torch.int16:
        raise TypeError(f"levels must be int8 or int16, not {levels.dtype}")
    # High and low bytes: sums of integers are exact, so that the product with the scale is the one rounding.
    low, high = levels.contiguous().view(torch.uint8).reshape(rows, dim, 2).unbind(2)
    ones = torch.ones(dim)
    terms = [
        Term(high.contiguous().view(torch.int8), digit(rows), weight=Scalar(torch.tensor([256.0]), digit(1))),
        Term(low.contiguous(), digit(rows)),
        Term(ones, digit(1), weight=Scalar(scales, place), multiply=True),
    ]
    return hashed_part(dim, terms, rows=rows)


def linear_part(inner: Part, matrix: Tensor, mean: Tensor | None = None) -> Part:
    """Rows of a part through a linear map: ``rows @ matrix + mean``.

    Parameters
    ----------
    inner : Part
        Of ``width`` values a row.
    matrix : tensor of shape (width, dim)
        Stored as float32.
    mean : tensor of shape (dim,), optional

    Returns
    -------
    Part
        A value is one chain of fused multiplications and additions, so that torch's product may differ in last bits.
    """
    own = {"rotation": matrix.float()} | ({} if mean is None else {"mean": mean.float()})
    tensors = {f"inner.{name}": value for name, value in inner.tensors.items()} | as_arrays(own)
    rotation = {"kind": "matrix", "dtype": "float32"}
    description = {
        "form": "linear",
        "dim": int(matrix.shape[1]),
        "mean": mean is not None,
        "rotation": rotation,
        "inner": inner.description,
    }
    return Part(description, tensors, inner.codes)


def join_part(parts: Sequence[Part], mode: Literal["sum", "columns"] = "sum") -> Part:
    """Rows of several parts, added in their order or side by side.

    Parameters
    ----------
    parts : sequence of Part
        Of the same number of rows. A part that has both codes and places that depend on the id is refused by the core:
        make two parts of it.
    mode : {"sum", "columns"}

    Returns
    -------
    Part
    """
    tensors = {f"parts.{at}.{name}": value for at, part in enumerate(parts) for name, value in part.tensors.items()}
    dims = [part.dim for part in parts]
    description = {
        "form": "join",
        "dim": dims[0] if mode == "sum" else sum(dims),
        "mode": mode,
        "parts": [part.description for part in parts],
    }
    return Part(description, tensors, np.concatenate([part.codes for part in parts], axis=1))


def switch_part(
    rows: int,
    cases: Iterable[tuple[range | ArrayLike, Part]],
    otherwise: Part | None = None,
    shared: Mapping[str, str] | None = None,
) -> Part:
    """Rows that are read in different ways.

    Parameters
    ----------
    rows : int
        Number of rows.
    cases : iterable of (where, Part)
        ``where`` is a range of ids (a field, say) or a rising list of ids. The part has a row for each of them: row 0
        for the first, and so on. An id in several cases belongs to the first of them.
    otherwise : Part, optional
        For all other ids, by the ids themselves: it has ``rows`` rows. Without it their rows are zeros.
    shared : mapping of str to str, optional
        Tensors that are stored once: the name of a later one to that of an earlier one, for example
        ``{"otherwise.arrays.0": "cases.0.decoder.arrays.0"}``.

    Returns
    -------
    Part

    Raises
    ------
    ValueError
        A part has another number of rows than its ids, ids do not rise or are outside, or there is nothing at all.
    """
    described, tensors, dim = [], {}, None if otherwise is None else otherwise.dim
    for at, (where, part) in enumerate(cases):
        dim = part.dim if dim is None else dim
        entry: dict[str, Any] = {"rows": part.rows, "decoder": part.description}
        if isinstance(where, range):
            ids = np.asarray([where.start, where.stop - 1])
            entry = {"start": where.start} | entry
            count = len(where) if where.step == 1 else -1
        else:
            ids = np.asarray(where, dtype=np.int64)
            count = len(ids)
            bits = max(int(rows - 1).bit_length(), 1)
            entry = {"bits": bits} | entry
            tensors[f"cases.{at}.ids"] = pack_bits(ids[None], bits)[0]
        if count != part.rows or count < 1 or ids[0] < 0 or ids[-1] >= rows or (np.diff(ids) < (count > 1)).any():
            raise ValueError(f"case {at} needs rising ids below {rows}, and a part of as many rows")
        if part.codes.shape[1]:
            tensors[f"cases.{at}.codes"] = part.codes
        tensors |= {f"cases.{at}.decoder.{name}": value for name, value in part.tensors.items()}
        described.append(entry)
    if dim is None:
        raise ValueError("a switch needs a case or a part for all others")
    codes = np.empty((rows, 0), np.uint8)
    if otherwise is not None:
        if otherwise.rows != rows:
            raise ValueError(f"the part for all other ids has {otherwise.rows} rows, expected {rows}")
        tensors |= {f"otherwise.{name}": value for name, value in otherwise.tensors.items()}
        codes = otherwise.codes
    for name in shared or {}:
        del tensors[name]
    description = {
        "form": "switch",
        "dim": dim,
        "cases": described,
        "otherwise": None if otherwise is None else otherwise.description,
        "shared": dict(shared or {}),
    }
    return Part(description, tensors, codes)


def segments_part(group_of: ArrayLike, parts: Sequence[Part]) -> Part:
    """Rows in groups, whose codes may have different lengths.

    Where most rows belong to a case, this is smaller than :func:`switch_part`: a row takes the bits of its group's
    number. Such rows do not stand apart, so that no other part can hold this one.

    Parameters
    ----------
    group_of : int array of shape (rows,)
        The group of each row.
    parts : sequence of Part
        At most 256; each has the rows of its group, in their order.

    Returns
    -------
    Part

    Raises
    ------
    ValueError
        A part has another number of rows than its group.
    """
    groups = np.asarray(group_of)
    counts = np.bincount(groups, minlength=len(parts)).tolist()
    if counts != [part.rows for part in parts]:
        raise ValueError(f"groups have {counts} rows, their parts {[part.rows for part in parts]}")
    tensors = {f"groups.{at}.{name}": value for at, part in enumerate(parts) for name, value in part.tensors.items()}
    mapped = bool((np.diff(groups) < 0).any())
    if mapped:
        tensors["map"] = pack_bits(groups[None], max(len(parts) - 1, 1).bit_length())[0]
    described = [{"rows": part.rows, "decoder": part.description} for part in parts]
    description = {"form": "segments", "dim": parts[0].dim, "map": mapped, "groups": described}
    codes = np.zeros(len(groups) * row_bytes(description), np.uint8)
    flat = np.concatenate([part.codes.reshape(-1) for part in parts])
    codes[: len(flat)] = flat
    return Part(description, tensors, codes.reshape(len(groups), -1))


def as_table(module: TrainedEmbedding, part: Part, kind: str | None = None) -> vqrs.Table:
    """The table of a trained module.

    Parameters
    ----------
    module : TrainedEmbedding
        Its name becomes the table's kind.
    part : Part
        How its rows are read.
    kind : str, optional
        Another name.

    Returns
    -------
    Table
        Its error is 0: the trained rows themselves are what it stands for.

    Raises
    ------
    ValueError
        The part's shape is not the module's, or its tensors do not fit its description.
    """
    shape = (module.num_embeddings, module.embedding_dim)
    if (part.rows, part.dim) != shape:
        raise ValueError(f"the part has the shape {(part.rows, part.dim)}, the module {shape}")
    if part.codes.shape[1] != row_bytes(part.description):
        raise ValueError(f"rows have {part.codes.shape[1]} bytes, expected {row_bytes(part.description)}")
    parameters = {"embedding_dim": module.embedding_dim, "field_sizes": list(module.field_sizes)}
    about = {"kind": kind or module.name, "parameters": parameters, "decoder": part.description}
    return vqrs.Table(_core.Table.from_parts(json.dumps(about), part.tensors, part.codes, errors={"relative": 0.0}))
