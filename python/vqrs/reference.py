"""Every decoder form and every encoder once more, in plain NumPy: slow, readable, and the judge of the compiled core.

Start reading here. A *decoder* turns the bytes of a row into ``float32`` values; there are few forms of it, and
:func:`decode` picks one by the name in its description. An *encoder* picks the bytes; there is one for each kind of
quantizer, and it is what the paper that is named beside it says, without any of the tricks that make it fast.

Decoding agrees with the core in every bit. Encoding agrees with it wherever two choices differ by more than the
rounding of ``float32``.

Examples
--------
>>> import numpy as np
>>> description = {"form": "books", "dim": 2, "bits": 1, "scale": 0.5, "dtype": "float32",
...                "groups": [{"width": 1, "starts": [0, 1]}]}
>>> tensors = {"codebooks.0": np.array([[[2.0], [4.0]], [[6.0], [8.0]]], np.float32)}
>>> decode(description, tensors, np.array([[0b00], [0b01], [0b10]], np.uint8))
array([[1., 3.],
       [2., 3.],
       [1., 4.]], dtype=float32)
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "File",
    "best_levels",
    "decode",
    "decode_books",
    "decode_hashed",
    "decode_join",
    "decode_levels",
    "decode_linear",
    "decode_segments",
    "decode_sparse",
    "decode_switch",
    "decode_trellis",
    "encode_additive",
    "encode_kmeans",
    "encode_product",
    "encode_product_residual",
    "encode_residual",
    "encode_rotated",
    "encode_scalar",
    "encode_sparse",
    "encode_tree",
    "encode_trellis",
    "fused_multiply_add",
    "groups_of_rows",
    "hash_bits",
    "normal_levels",
    "pack_bits",
    "pool",
    "project",
    "random_sign",
    "read_table",
    "row_bytes",
    "search",
    "trellis_layout",
    "trellis_levels",
    "unpack_bits",
    "xxh3_64",
    "xxh3_128",
]

Tensors = Mapping[str, NDArray[Any]]

LOG_2 = 0.6931471805599453

COVERED = 1e-3
"""The part of a step by which the top level of a row may stay below the row's maximum."""


# ---- bits ----------------------------------------------------------------------------------------------------------


def pack_bits(fields: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Integers of a fixed width in bytes, least significant bit first, each row padded with zero bits to a whole byte.

    Parameters
    ----------
    fields : integers of shape (n_rows, n_fields), each from 0 to ``2**bits - 1``
    bits : width of a field

    Returns
    -------
    uint8 array of shape (n_rows, ceil(n_fields * bits / 8))

    Examples
    --------
    >>> pack_bits(np.array([[1, 2, 3]]), bits=4)
    array([[33,  3]], dtype=uint8)
    """
    single_bits = (np.asarray(fields)[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(single_bits.reshape(len(fields), -1).astype(np.uint8), axis=1, bitorder="little")


def unpack_bits(codes: NDArray[np.uint8], bits: int, n_fields: int) -> NDArray[np.int64]:
    """The first ``n_fields`` integers of each row: what :func:`pack_bits` packed.

    Parameters
    ----------
    codes : uint8 array of shape (n_rows, n_bytes)
    bits : width of a field
    n_fields : fields to read of each row

    Returns
    -------
    int64 array of shape (n_rows, n_fields)

    Examples
    --------
    >>> unpack_bits(np.array([[33, 3]], np.uint8), bits=4, n_fields=3)
    array([[1, 2, 3]])
    """
    single_bits = np.unpackbits(codes, axis=1, count=bits * n_fields, bitorder="little")
    return single_bits.reshape(len(codes), n_fields, bits).astype(np.int64) @ (1 << np.arange(bits))


# ---- decoding ------------------------------------------------------------------------------------------------------


def decode(description: str | Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of a table from their codes.

    Parameters
    ----------
    description : the decoder's description, a mapping or its JSON text
    tensors : the decoder's tensors by name, as stored (bfloat16 as uint16)
    codes : uint8 array of shape (n_rows, row_bytes)

    Returns
    -------
    float32 array of shape (n_rows, dim)

    Raises
    ------
    ValueError
        If no decoder has this form.

    Examples
    --------
    >>> description = {"form": "levels", "dim": 2, "dtype": "float16"}
    >>> decode(description, {}, np.array([[1, 2]], np.float16).view(np.uint8))
    array([[1., 2.]], dtype=float32)
    """
    parsed: Mapping[str, Any] = json.loads(description) if isinstance(description, str) else description
    form = parsed["form"]
    if form not in FORMS:
        raise ValueError(f"unknown decoder form {form!r}: expected one of {', '.join(sorted(FORMS))}")
    return FORMS[form](parsed, tensors, codes)


def decode_books(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "books": a row is the sum of one entry of each codebook, placed at that codebook's columns.

    ``codebooks.g`` holds the codebooks of group ``g``, of equal width, as an array of shape (n_codebooks, 2**bits,
    width); a row's code holds one field of ``bits`` bits for each codebook, in order. The scale is a power of two, so
    that multiplying by it is exact, and entries are added in ``float32`` in the order of the codebooks. Codebooks of
    ``int8`` have a scale each, in the tensor ``scales``, of so few bits that products with integers are exact.

    Parameters and the result are those of :func:`decode`.

    Examples
    --------
    A book for both columns and, on top of it, one for the second column alone:

    >>> description = {"dim": 2, "bits": 1, "scale": 1.0,
    ...                "groups": [{"width": 2, "starts": [0]}, {"width": 1, "starts": [1]}]}
    >>> tensors = {"codebooks.0": np.array([[[1, 2], [3, 4]]], np.float16),
    ...            "codebooks.1": np.array([[[0], [10]]], np.float16)}
    >>> decode_books(description, tensors, np.array([[0b11]], np.uint8))
    array([[ 3., 14.]], dtype=float32)
    """
    bits, scale = description["bits"], np.float32(description["scale"])
    places = [
        (start, group["width"], book)
        for number, group in enumerate(description["groups"])
        for start, book in zip(group["starts"], _as_float32(tensors[f"codebooks.{number}"]), strict=True)
    ]
    fields = unpack_bits(codes, bits, len(places))
    rows = np.zeros((len(codes), description["dim"]), np.float32)
    scales = tensors.get("scales", np.full(len(places), scale, np.float32))
    for field, factor, (start, width, book) in zip(fields.T, scales, places, strict=True):
        columns = rows[:, start : start + width]
        columns[:] = fused_multiply_add(book[field], factor, columns)
    return rows


def decode_levels(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "levels": a row is one small number for each value, with a scale and an offset for a row, block or column.

    For ``float16`` and ``bfloat16`` the code is the values themselves. For ``int2`` to ``int8`` it is one unsigned
    level for each value, and ``value = level * scale + offset`` in one rounding. For ``table1`` to ``table8`` the level
    is a place in the tensor ``levels``, and ``value = levels[level] * scale``. Scales of a row or block stand behind
    its levels as ``float16`` or one byte, to be multiplied by a power of two that the whole table shares. For ``free4``
    the levels of the row or block itself stand there, sixteen of them.

    Parameters and the result are those of :func:`decode`.

    Examples
    --------
    Two levels of 8 bits, then a scale of 0.5 and a minimum of -1:

    >>> description = {"dim": 2, "dtype": "int8", "granularity": "row", "symmetric": False,
    ...                "scale_factor": 1.0, "offset_factor": 1.0}
    >>> codes = np.concatenate([np.array([0, 4], np.uint8), np.array([0.5, -1], np.float16).view(np.uint8)])
    >>> decode_levels(description, {}, codes[None])
    array([[-1.,  1.]], dtype=float32)
    """
    dim, dtype = description["dim"], description["dtype"]
    if dtype in ("float16", "bfloat16"):
        return _as_float32(np.ascontiguousarray(codes).view("<f2" if dtype == "float16" else "<u2"))
    bits = int(dtype[-1])
    places = unpack_bits(codes, bits, dim)
    stored = codes[:, (dim * bits + 7) // 8 :]
    block = np.arange(dim) // _block_size(description)
    if dtype == "free4":
        own = np.ascontiguousarray(stored).view("<f2").astype(np.float32) * np.float32(description["scale_factor"])
        return np.take_along_axis(own, block * 16 + places, axis=1)
    levels = tensors["levels"][places] if dtype.startswith("table") else places.astype(np.float32)
    if description["granularity"] == "column":
        scale, offset = tensors["scale"], tensors.get("offset", np.zeros(dim, np.float32))
    else:
        scale, offset = (side[:, block] for side in _stored_ranges(description, bits, stored))
    return levels * scale if dtype.startswith("table") else fused_multiply_add(levels, scale, offset)


def decode_linear(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "linear": the rows of another decoder, turned back, plus a mean row.

    A stored rotation has one row for each inner column: the value of a column is one chain of fused multiply-adds from
    zero over the inner columns. Without a matrix the rotation is rounds of signs and Walsh-Hadamard transforms, made
    from a seed (Ailon and Chazelle 2009).

    Parameters and the result are those of :func:`decode`.

    Examples
    --------
    >>> inner = {"form": "levels", "dim": 1, "dtype": "float16"}
    >>> description = {"dim": 2, "mean": True, "rotation": {"kind": "matrix", "dtype": "float16"}, "inner": inner}
    >>> tensors = {"mean": np.array([0, 1], np.float32), "rotation": np.array([[0.5, 2]], np.float16)}
    >>> decode_linear(description, tensors, np.array([[4.0]], np.float16).view(np.uint8))
    array([[2., 9.]], dtype=float32)
    """
    rows = decode(description["inner"], _inner(tensors, "inner."), codes)
    rotation = description["rotation"]
    if rotation["kind"] == "matrix":
        matrix = _as_float32(tensors["rotation"])
        if "rotation.scale" in tensors:
            matrix = matrix * tensors["rotation.scale"][:, None]
        turned = np.zeros((len(rows), description["dim"]), np.float32)
        for column, vector in zip(rows.T, matrix, strict=True):
            turned = fused_multiply_add(column[:, None], vector[None, :], turned)
        rows = turned
    elif rotation["kind"] == "hadamard":
        rows = _turn_back(rows, rotation["seed"], rotation["rounds"])
    return rows + tensors["mean"] if description["mean"] else rows


def decode_join(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "join": the rows of several decoders, side by side or added in ``float32``, in order.

    A row's code is the codes of the parts, one behind the other.

    Parameters and the result are those of :func:`decode`.

    Examples
    --------
    >>> part = {"form": "levels", "dim": 1, "dtype": "float16"}
    >>> codes = np.array([[1.0, 2.0]], np.float16).view(np.uint8)
    >>> decode_join({"dim": 2, "mode": "columns", "parts": [part, part]}, {}, codes)
    array([[1., 2.]], dtype=float32)
    >>> decode_join({"dim": 1, "mode": "sum", "parts": [part, part]}, {}, codes)
    array([[3.]], dtype=float32)
    """
    pieces, start = [], 0
    for number, part in enumerate(description["parts"]):
        end = start + row_bytes(part)
        pieces.append(decode(part, _inner(tensors, f"parts.{number}."), codes[:, start:end]))
        start = end
    if description["mode"] == "columns":
        return np.concatenate(pieces, axis=1)
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total


def decode_trellis(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "trellis": a row is a circular stream of bits, and each column reads a window of it that picks a level.

    ``bits`` tells how many bits of the stream lie between the starts of a column's window and of the next one. The
    value is ``level * columns[column] * scales[number]``, with two roundings; the number of the scale stands in
    ``scale_bits`` bits behind the stream.

    Parameters and the result are those of :func:`decode`.

    Examples
    --------
    Four columns of two bits each, whose windows are four bits long:

    >>> description = {"dim": 4, "row_bytes": 1, "state_bits": 4, "scale_bits": 0, "scales": 1, "bits": ""}
    >>> tensors = {"columns": np.ones(4, np.float32), "scales": np.array([2], np.float32)}
    >>> decode_trellis(description, tensors, np.array([[0b11100100]], np.uint8)).shape
    (1, 4)
    """
    starts, tables, n_bits = trellis_layout(description)
    state_bits, scale_bits = description["state_bits"], description["scale_bits"]
    single_bits = np.unpackbits(codes, axis=1, bitorder="little").astype(np.int64)
    windows = single_bits[:, (starts[:, None] + np.arange(state_bits)) % n_bits]
    states = windows @ (1 << np.arange(state_bits))
    levels = np.stack([trellis_levels(state_bits, table) for table in range(tables.max() + 1)])
    numbers = single_bits[:, n_bits : n_bits + scale_bits] @ (1 << np.arange(scale_bits))
    return levels[tables, states] * tensors["columns"] * tensors["scales"][numbers][:, None]


def decode_segments(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "segments": groups of rows with a decoder each.

    All codes together are the groups' codes, one behind the other, padded with zeros to rows of equal length. Without
    a ``map`` the groups' rows follow each other; else it tells each row's group in ⌈log₂ groups⌉ bits.

    Parameters and the result are those of :func:`decode`; codes must be those of the whole table.

    Examples
    --------
    >>> groups = [{"rows": 1, "decoder": {"form": "levels", "dim": 1, "dtype": "float16"}}] * 2
    >>> codes = np.array([[1.0], [2.0]], np.float16).view(np.uint8)
    >>> decode_segments({"dim": 1, "map": True, "groups": groups}, {"map": np.array([0b01], np.uint8)}, codes)
    array([[2.],
           [1.]], dtype=float32)
    """
    group_of = groups_of_rows(description, tensors.get("map"))
    rows = np.zeros((len(group_of), description["dim"]), np.float32)
    flat, start = codes.reshape(-1), 0
    for number, group in enumerate(description["groups"]):
        width = row_bytes(group["decoder"])
        own = flat[start : start + group["rows"] * width].reshape(group["rows"], width)
        rows[group_of == number] = decode(group["decoder"], _inner(tensors, f"groups.{number}."), own)
        start += own.size
    return rows


def groups_of_rows(description: Mapping[str, Any], packed: NDArray[np.uint8] | None) -> NDArray[np.int64]:
    """The group of each row of a table of the form "segments".

    Examples
    --------
    >>> groups_of_rows({"groups": [{"rows": 1}, {"rows": 2}]}, None)
    array([0, 1, 1])
    """
    counts = [group["rows"] for group in description["groups"]]
    if packed is None:
        return np.repeat(np.arange(len(counts)), counts)
    bits = max(len(counts) - 1, 1).bit_length()
    return unpack_bits(packed[None, :], bits, sum(counts))[0]


def decode_sparse(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "sparse": a row is ``kept`` values with their columns, and the others are zero.

    The columns come first: a bit for each column of the row, or the numbers of the columns, rising. Then the values, as
    ``float32``, as ``float16`` to be multiplied by a power of two that the whole table shares, or as ``int8`` with such
    a ``float16`` scale behind them. Values whose column is named twice are added; columns outside the row are left out.

    Parameters and the result are those of :func:`decode`.

    Examples
    --------
    >>> description = {"dim": 4, "kept": 2, "dtype": "float16", "places": "bitmap", "scale_factor": 1.0}
    >>> codes = np.concatenate([np.array([0b1010], np.uint8), np.array([3, -4], np.float16).view(np.uint8)])
    >>> decode_sparse(description, {}, codes[None])
    array([[ 0.,  3.,  0., -4.]], dtype=float32)
    """
    dim, kept, dtype = description["dim"], description["kept"], description["dtype"]
    place_bytes = _place_bytes(description)
    stored, factor = np.ascontiguousarray(codes[:, place_bytes:]), np.float32(description["scale_factor"])
    if dtype == "int8":
        scale = np.ascontiguousarray(stored[:, kept:]).view("<f2").astype(np.float32) * factor
        values = stored[:, :kept].view(np.int8).astype(np.float32) * scale
    elif dtype == "float16":
        values = stored.view("<f2").astype(np.float32) * factor
    else:
        values = stored.view("<f4")
    rows = np.zeros((len(codes), dim), np.float32)
    for row, code, present in zip(rows, codes, values, strict=True):
        if description["places"] == "bitmap":
            columns = np.flatnonzero(unpack_bits(code[None, :place_bytes], 1, dim)[0])[:kept]
        else:
            columns = unpack_bits(code[None, :place_bytes], _column_bits(dim), kept)[0]
        for column, value in zip(columns, present, strict=False):
            if column < dim:
                row[column] += value
    return rows


def decode_hashed(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "hashed": a row is a sum of pieces of arrays, and where they start is computed from the row's number.

    A term's piece starts at ``offset + place * stride`` of its array. Its place is a hash of the id, a digit of it
    (``id // divisor % size``), or a field of the row's code; the id is the row's number plus ``first``. A piece may
    have a sign for each id and a weight, which is a value of an array that is found in the same way, and it is added to
    its columns or multiplied with them.

    Parameters and the result are those of :func:`decode`; row ``i`` of the codes is row number ``i``.

    Examples
    --------
    The hashing trick of Weinberger and others (2009): 1,000 rows that share two.

    >>> place = {"kind": "hash", "seed": 42, "size": 2}
    >>> piece = {"array": 0, "place": place, "stride": 1, "offset": 0}
    >>> description = {"dim": 1, "bits": 0, "first": 0, "terms": [{"start": 0, "width": 1, "piece": piece}]}
    >>> tensors = {"arrays.0": np.array([[1.0], [2.0]], np.float32)}
    >>> np.unique(decode_hashed(description, tensors, np.empty((1000, 0), np.uint8)), return_counts=True)
    (array([1., 2.], dtype=float32), array([495, 505]))
    """
    ids = np.arange(len(codes), dtype=np.uint64) + np.uint64(description["first"])

    def values(piece: Mapping[str, Any], width: int) -> NDArray[np.float32]:
        start = _place(piece["place"], ids, codes, description["bits"]) * piece["stride"] + piece["offset"]
        array = tensors[f"arrays.{piece['array']}"].reshape(-1)
        return _as_float32(array[start[:, None] + np.arange(width)]).astype(np.float32)

    # Nothing changes by being added to this zero, a zero's sign neither.
    rows = np.full((len(codes), description["dim"]), -0.0, np.float32)
    for term in description["terms"]:
        added = values(term["piece"], term["width"])
        if "sign" in term:
            added = (
                added * np.where(hash_bits(ids, term["sign"]) & np.uint64(1), np.float32(-1), np.float32(1))[:, None]
            )
        if "weight" in term:
            added = added * values(term["weight"], 1)
        columns = rows[:, term["start"] : term["start"] + term["width"]]
        columns[:] = columns * added if term.get("multiply") else columns + added
    return rows


def _place(place: Mapping[str, Any], ids: NDArray[np.uint64], codes: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Numbers below the place's size."""
    if place["kind"] == "hash":
        high = [(int(number) * place["size"]) >> 64 for number in hash_bits(ids, place["seed"])]
        return np.array(high, np.int64)
    if place["kind"] == "digit":
        return (ids // np.uint64(place["divisor"]) % np.uint64(place["size"])).astype(np.int64)
    return np.minimum(unpack_bits(codes, bits, place["field"] + 1)[:, -1], place["size"] - 1)


def hash_bits(ids: NDArray[np.integer], seed: int) -> NDArray[np.uint64]:
    """64 random bits for each id: one step of SplitMix64 (Steele, Lea and Flood 2014) from ``id ^ seed``.

    Parameters
    ----------
    ids : integers of any shape
    seed : of 64 bits

    Returns
    -------
    uint64 array of the same shape

    Examples
    --------
    >>> hash_bits(np.array([0, 1]), 42)
    array([13679457532755275413, 13432527470776545160], dtype=uint64)
    """
    mixed = (np.asarray(ids).astype(np.uint64) ^ np.uint64(seed)) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def decode_switch(description: Mapping[str, Any], tensors: Tensors, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Form "switch": rows that are read in different ways.

    A case is rows from a start on, or those in a rising list; its decoder reads codes of its own, by the row's place in
    the case. A row that is in no case is read by the last decoder, by its own number and code, or it is zeros.

    Parameters and the result are those of :func:`decode`; row ``i`` of the codes is row number ``i``.

    Examples
    --------
    >>> inner = {"form": "levels", "dim": 1, "dtype": "float16"}
    >>> description = {"dim": 1, "cases": [{"bits": 2, "rows": 2, "decoder": inner}], "otherwise": None, "shared": {}}
    >>> own = np.array([[3.0], [4.0]], np.float16).view(np.uint8)
    >>> tensors = {"cases.0.ids": np.array([0b11_01], np.uint8), "cases.0.codes": own}
    >>> decode_switch(description, tensors, np.empty((4, 0), np.uint8)).T
    array([[0., 3., 0., 4.]], dtype=float32)
    """
    tensors = {**tensors, **{name: tensors[held] for name, held in description["shared"].items()}}
    rows = np.zeros((len(codes), description["dim"]), np.float32)
    if description["otherwise"] is not None:
        rows = decode(description["otherwise"], _inner(tensors, "otherwise."), codes)
    # The first case that has a row reads it.
    for at, case in reversed(list(enumerate(description["cases"]))):
        own = tensors.get(f"cases.{at}.codes", np.empty((case["rows"], 0), np.uint8))
        if "start" in case:
            own = own[: max(len(rows) - case["start"], 0)]
        decoded = decode(case["decoder"], _inner(tensors, f"cases.{at}.decoder."), own)
        if "start" in case:
            numbers = min(case["start"], len(rows)) + np.arange(len(own))
        else:
            numbers = unpack_bits(tensors[f"cases.{at}.ids"][None], case["bits"], case["rows"])[0]
        inside = numbers < len(rows)
        rows[numbers[inside]] = decoded[inside]
    return rows


def _column_bits(dim: int) -> int:
    return max((dim - 1).bit_length(), 1)


def _place_bytes(description: Mapping[str, Any]) -> int:
    """Bytes of a row that say which columns it keeps."""
    if description["places"] == "bitmap":
        return (description["dim"] + 7) // 8
    return (description["kept"] * _column_bits(description["dim"]) + 7) // 8


def _row_bytes_of_sparse(description: Mapping[str, Any]) -> int:
    kept = description["kept"]
    return (
        _place_bytes(description) + {"float32": 4 * kept, "float16": 2 * kept, "int8": kept + 2}[description["dtype"]]
    )


def encode_sparse(x: NDArray[np.float32], description: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Magnitude pruning: the values of largest magnitude are kept, of equals those in the lowest columns.

    Parameters
    ----------
    x : float32 array of shape (n_rows, dim)
    description : the decoder's description

    Returns
    -------
    uint8 array of shape (n_rows, row_bytes)

    Examples
    --------
    >>> description = {"dim": 4, "kept": 2, "dtype": "float16", "places": "columns", "scale_factor": 1.0}
    >>> codes = encode_sparse(np.array([[0.5, 3, 1, -4]], np.float32), description)
    >>> decode_sparse(description, {}, codes)
    array([[ 0.,  3.,  0., -4.]], dtype=float32)
    """
    dim, kept, factor = description["dim"], description["kept"], np.float32(description["scale_factor"])
    columns = np.sort(np.argsort(-np.abs(x), axis=1, kind="stable")[:, :kept], axis=1)
    values = np.take_along_axis(x, columns, axis=1)
    if description["places"] == "bitmap":
        present = np.zeros((len(x), dim), np.int64)
        np.put_along_axis(present, columns, 1, axis=1)
        places = pack_bits(present, 1)
    else:
        places = pack_bits(columns, _column_bits(dim))
    if description["dtype"] == "float32":
        return np.hstack([places, values.astype("<f4").view(np.uint8)])
    if description["dtype"] == "float16":
        return np.hstack([places, (values / factor).astype("<f2").view(np.uint8)])
    stored = (np.abs(values).max(axis=1, keepdims=True) / np.float32(127) / factor).astype("<f2")
    scale = stored.astype(np.float32) * factor
    levels = np.clip(np.rint(values / np.where(scale > 0, scale, np.inf)), -127, 127).astype(np.int8)
    return np.hstack([places, levels.view(np.uint8), stored.view(np.uint8)])


def _nearest_places(x: NDArray[np.float64], levels: NDArray[np.floating]) -> NDArray[np.int64]:
    """The place of the nearest level for each value."""
    return np.abs(x[..., None] - np.asarray(levels, np.float64)).argmin(axis=-1)


def _encode_table(x: NDArray[np.float32], description: Mapping[str, Any], tensors: Tensors) -> NDArray[np.uint8]:
    """Places in a table of levels, and the scales of rows and blocks."""
    levels = tensors["levels"]
    bits = int(description["dtype"].removeprefix("table"))
    if description["granularity"] == "column":
        scale = np.asarray(tensors["scale"], np.float64)
        return pack_bits(_nearest_places(x / np.where(scale > 0, scale, np.inf), levels), bits)
    size, factor = _block_size(description), description["scale_factor"]
    starts = range(0, x.shape[1], size)
    reach = np.stack([np.abs(x[:, start : start + size]).max(axis=1) for start in starts], axis=1)
    halves = (reach.astype(np.float64) / np.abs(levels).max() / factor).astype("<f2")
    if description.get("scale_dtype", "float16") == "float8":
        stored = np.maximum((halves.view(np.uint16) + 32) >> 6, reach > 0).astype(np.uint8)
    else:
        stored = np.ascontiguousarray(halves).view(np.uint8)
    scales = _stored_ranges(description, bits, stored)[0][:, np.arange(x.shape[1]) // size].astype(np.float64)
    return np.hstack([pack_bits(_nearest_places(x / np.where(scales > 0, scales, np.inf), levels), bits), stored])


def _encode_free(x: NDArray[np.float32], description: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Sixteen levels for each row or block."""
    size, factor, rows = _block_size(description), description["scale_factor"], []
    for row in x:
        places, stored = [], []
        for start in range(0, len(row), size):
            values = row[start : start + size].astype(np.float64)
            levels = np.resize(best_levels(values, 16), 16) / factor
            stored.append(levels.astype("<f2"))
            places.append(_nearest_places(values, stored[-1].astype(np.float64) * factor))
        rows.append(np.hstack([pack_bits(np.hstack(places)[None], 4)[0], np.hstack(stored).view(np.uint8)]))
    return np.stack(rows)


def best_levels(values: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """One-dimensional k-means, solved exactly: the means of the runs of sorted values with the least squared error.

    Parameters
    ----------
    values : array of shape (n,)
    count : how many levels; fewer come back where there are fewer values

    Returns
    -------
    float64 array of at most ``count`` levels, in order

    Examples
    --------
    >>> best_levels(np.array([0.0, 1.0, 10.0, 11.0, 30.0]), 3)
    array([ 0.5, 10.5, 30. ])
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n, count = len(ordered), min(count, len(ordered))
    cost = [
        [((ordered[i:j] - ordered[i:j].mean()) ** 2).sum() if i < j else 0.0 for j in range(n + 1)] for i in range(n)
    ]
    best: list[tuple[float, tuple[int, ...]]] = [(cost[0][j], (0,)) for j in range(n + 1)]
    for used in range(1, count):
        ends = range(used + 1, n + 1)
        longer = [min((best[i][0] + cost[i][j], (*best[i][1], i)) for i in range(used, j)) for j in ends]
        best = [(np.inf, ())] * (used + 1) + longer
    runs = np.split(ordered, best[n][1][1:])
    return np.array([run.mean() for run in runs])


def normal_levels(bits: int) -> NDArray[np.float32]:
    """The levels of the normal distribution with the least squared error (Lloyd, 1957; Max, 1960).

    Each level is the mean of the values nearest to it: Newton's method on those equations, from the quantiles of a
    wider normal distribution.

    Parameters
    ----------
    bits : 1 to 8

    Returns
    -------
    float32 array of ``2**bits`` levels, in order

    Examples
    --------
    >>> normal_levels(2)
    array([-1.5104176 , -0.45278004,  0.45278004,  1.5104176 ], dtype=float32)
    """
    half = 2 ** (bits - 1)
    wide = statistics.NormalDist(0, math.sqrt(3)).inv_cdf
    levels = np.array([wide(0.5 + (i + 0.5) / (2 * half)) for i in range(half)])
    for _ in range(50):
        bounds = [0.0, *((levels[1:] + levels[:-1]) / 2), math.inf]
        density = [math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi) for bound in bounds]
        means, slopes = np.empty(half), np.eye(half)
        for i, (low, high) in enumerate(itertools.pairwise(bounds)):
            # Differences of what is left beyond each end keep their digits far from zero, those of erf near it.
            beyond = math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))
            share = (beyond if low > 1 else math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
            means[i] = (density[i] - density[i + 1]) / share
            if i > 0:
                slopes[i, i - 1 : i + 1] -= density[i] * (means[i] - low) / share / 2
            if i < half - 1:
                slopes[i, i : i + 2] -= density[i + 1] * (high - means[i]) / share / 2
        step = np.linalg.solve(slopes, levels - means)
        levels = levels - step
        if np.abs(step).max() < 1e-13:
            break
    return np.concatenate([-levels[::-1], levels]).astype(np.float32)


def encode_rotated(
    x: NDArray[np.floating], levels: NDArray[np.floating], *, rounds: int = 10
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Levels of the normal distribution with a scale for each row (Zandieh et al. 2025); the rotation is not done here.

    Levels and the scale with the least squared error follow each other, from a scale that gives the values the variance
    of the levels' distribution, from one that puts the largest value on the last level and, above four levels, from two
    around the first.

    Parameters
    ----------
    x : array of shape (n_rows, d), rotated rows
    levels : the levels of a scale of 1
    rounds : how often levels and scale follow each other

    Returns
    -------
    int64 places of shape (n_rows, d), and one scale a row

    Examples
    --------
    >>> places, scales = encode_rotated(np.array([[3.0, -1.0, 1.0, -3.0]]), normal_levels(2))
    >>> places
    array([[3, 1, 2, 0]])
    """
    rows, table = np.asarray(x, np.float64), np.asarray(levels, np.float64)
    best = np.full(len(rows), np.inf)
    best_places, best_scales = np.zeros(rows.shape, np.int64), np.zeros(len(rows))
    middle = np.sqrt((rows**2).mean(axis=1))
    starts = [middle, np.abs(rows).max(axis=1) / np.abs(table).max(), 0.85 * middle, 1.15 * middle]
    for scale in starts[: 4 if len(table) > 4 else 2]:
        for _ in range(rounds):
            places = _nearest_places(rows / np.where(scale > 0, scale, np.inf)[:, None], table)
            chosen = table[places]
            scale = (rows * chosen).sum(axis=1) / (chosen**2).sum(axis=1)
        error = ((rows - chosen * scale[:, None]) ** 2).sum(axis=1)
        better = error < best
        best[better], best_places[better], best_scales[better] = error[better], places[better], scale[better]
    return best_places, best_scales


FORMS = {
    "books": decode_books,
    "levels": decode_levels,
    "linear": decode_linear,
    "join": decode_join,
    "trellis": decode_trellis,
    "segments": decode_segments,
    "sparse": decode_sparse,
    "hashed": decode_hashed,
    "switch": decode_switch,
}


def row_bytes(description: Mapping[str, Any]) -> int:
    """Bytes of a row's code.

    Examples
    --------
    >>> row_bytes({"form": "levels", "dim": 3, "dtype": "float16"})
    6
    """
    if description["form"] == "linear":
        return row_bytes(description["inner"])
    if description["form"] == "segments":
        groups = description["groups"]
        total = sum(group["rows"] * row_bytes(group["decoder"]) for group in groups)
        return -(-total // sum(group["rows"] for group in groups))
    if description["form"] == "join":
        return sum(row_bytes(part) for part in description["parts"])
    return ROW_BYTES[description["form"]](description)


def _row_bytes_of_books(description: Mapping[str, Any]) -> int:
    fields = sum(len(group["starts"]) for group in description["groups"])
    return (fields * description["bits"] + 7) // 8


def _row_bytes_of_levels(description: Mapping[str, Any]) -> int:
    dim, dtype = description["dim"], description["dtype"]
    if dtype in ("float16", "bfloat16"):
        return 2 * dim
    levels = (dim * int(dtype[-1]) + 7) // 8
    if description["granularity"] == "column":
        return levels
    pairs = -(-dim // _block_size(description))
    if dtype == "free4":
        return levels + pairs * 32
    if description.get("scale_dtype", "float16") == "float8":
        return levels + pairs
    return levels + pairs * (2 if description["symmetric"] else 4)


def _row_bytes_of_hashed(description: Mapping[str, Any]) -> int:
    sources = [term[name] for term in description["terms"] for name in ("piece", "weight") if name in term]
    fields = [source["place"]["field"] + 1 for source in sources if source["place"]["kind"] == "stored"]
    return (max(fields, default=0) * description["bits"] + 7) // 8


ROW_BYTES = {
    "books": _row_bytes_of_books,
    "levels": _row_bytes_of_levels,
    "trellis": lambda description: description["row_bytes"],
    "sparse": _row_bytes_of_sparse,
    "hashed": _row_bytes_of_hashed,
    "switch": lambda description: row_bytes(description["otherwise"]) if description["otherwise"] else 0,
}
"""Of the other forms."""


def _inner(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _turn_back(rows: NDArray[np.float32], seed: int, rounds: int) -> NDArray[np.float32]:
    """Signs, then Walsh-Hadamard, of the first and of the last 2**k columns in turns; undone from the last one on."""
    dim = rows.shape[1]
    size = 1 << (dim.bit_length() - 1)
    passes = rounds if size == dim else 2 * rounds
    signs = np.array([random_sign(seed, place) for place in range(passes * dim)], np.float32).reshape(passes, dim)
    rows = rows.copy()
    for number in reversed(range(passes)):
        start = dim - size if number % 2 else 0
        rows[:, start : start + size] = _hadamard(rows[:, start : start + size])
        rows *= signs[number]
    return rows


def _hadamard(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Walsh-Hadamard transform of each row, over the root of its length."""
    n_rows, size = rows.shape
    half = 1
    while half < size:
        pairs = rows.reshape(n_rows, size // (2 * half), 2, half)
        rows = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        rows = rows.reshape(n_rows, size)
        half *= 2
    return rows * np.float32(1.0 / np.sqrt(np.float64(size)))


def random_sign(seed: int, place: int) -> float:
    """1 or -1: the first bit of the finaliser of SplitMix64 (Steele, Lea and Flood 2014).

    Examples
    --------
    >>> [random_sign(7, place) for place in range(4)]
    [1.0, -1.0, -1.0, 1.0]
    """
    number = (seed + place) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return 1.0 - 2.0 * ((number ^ (number >> 31)) >> 63)


def trellis_layout(description: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Where each column of the form "trellis" reads: the first bit of its window, and the number of its table.

    Columns that add no bits have the window of the next column, and the table after its table, of eight. After the last
    column comes the first one.

    Parameters
    ----------
    description : the decoder's description

    Returns
    -------
    starts and tables, int64 of shape (dim,), and the bits of the stream

    Examples
    --------
    >>> starts, tables, n_bits = trellis_layout({"dim": 5, "bits": "20110"})
    >>> starts.tolist(), tables.tolist(), n_bits
    ([0, 2, 2, 3, 4], [0, 1, 0, 0, 1], 4)
    """
    dim = description["dim"]
    if description["bits"]:
        bits = np.array([int(digit) for digit in description["bits"]])
    else:
        room = 8 * description["row_bytes"] - description["scale_bits"]
        bits = np.diff((2 * np.arange(dim + 1) * room + dim) // (2 * dim))
    tables = np.zeros(dim, np.int64)
    last = int(np.flatnonzero(bits)[-1])
    for column in (np.arange(last - 1, last - dim, -1) % dim).tolist():
        if bits[column] == 0:
            tables[column] = (tables[(column + 1) % dim] + 1) % 8
    return np.cumsum(bits) - bits, tables, int(bits.sum())


@functools.cache
def trellis_levels(state_bits: int, table: int) -> NDArray[np.float32]:
    """The level of each state of the form "trellis": normal quantiles in an order that is fixed for ever.

    The highest bit of a level's rank is the lowest bit of the state plus its highest, flipped by a hash of those
    between; the next one the second lowest plus the second highest, and so on to the middle; from there on each bit is
    flipped by a hash of those above it.

    Parameters
    ----------
    state_bits : bits of a state
    table : number of the table

    Returns
    -------
    float32 array of shape (2**state_bits,)

    Examples
    --------
    >>> trellis_levels(2, 0).round(3)
    array([-1.15 ,  0.319,  1.15 , -0.319], dtype=float32)
    """
    state = np.arange(1 << state_bits, dtype=np.uint64)
    rank = np.zeros(1 << state_bits, np.int64)
    for bit in range(state_bits):
        first, mirror = bit + 1, state_bits - 1 - bit
        upper, flipped = state >> np.uint64(first), state >> np.uint64(bit)
        if bit < state_bits // 2:
            upper = upper & np.uint64((1 << (mirror - first)) - 1)
            flipped = flipped ^ state >> np.uint64(mirror)
        key = np.uint64(table << 40 | state_bits << 32 | bit << 24) | upper
        flipped = flipped ^ _mix(_mix(key))
        rank |= (flipped.astype(np.int64) & 1) << mirror
    half = 1 << (state_bits - 1)
    quantiles = _normal_quantiles((np.arange(half) + 0.5) / (2 * half)).astype(np.float32)
    return np.concatenate([quantiles, -quantiles[::-1]])[rank]


def _mix(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def _normal_quantiles(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles up to the median by Acklam's rational functions, with nothing that two machines could round apart."""
    a = (-3.969683028665376e1, 2.209460984245205e2, -2.759285104469687e2, 1.38357751867269e2, -3.066479806614716e1)
    b = (-5.447609879822406e1, 1.615858368580409e2, -1.556989798598866e2, 6.680131188771972e1, -1.328068155288572e1)
    c = (-7.784894002430293e-3, -3.223964580411365e-1, -2.400758277161838, -2.549732539343734, 4.374664141464968)
    d = (7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0)
    mantissa, exponent = np.frexp(p)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner([1.0 / (2 * i + 1) for i in reversed(range(12))], s * s)
    tail = np.sqrt(-2.0 * (exponent * LOG_2 + 2.0 * s * series))
    in_tail = _horner((*c, 2.938163982698783), tail) / _horner(d, tail)
    q = p - 0.5
    return np.where(p < 0.02425, in_tail, _horner((*a, 2.506628277459239), q * q) * q / _horner((*b, 1.0), q * q))


def _horner(factors: Sequence[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.zeros_like(x)
    for factor in factors:
        total = total * x + factor
    return total


def _block_size(description: Mapping[str, Any]) -> int:
    """Values that share a scale within a row."""
    return description["block_size"] if description["granularity"] == "block" else description["dim"]


def _stored_ranges(
    description: Mapping[str, Any], bits: int, stored: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], ...]:
    """Scale and offset of each block of each row, from the bytes that stand behind its levels."""
    if description.get("scale_dtype", "float16") == "float8":
        halves = (stored.astype("<u2") << 6).view("<f2").astype(np.float32)
    else:
        halves = np.ascontiguousarray(stored).view("<f2").astype(np.float32)
    if description["symmetric"]:
        scale = halves * np.float32(description["scale_factor"])
        return scale, -scale * np.float32(2 ** (bits - 1))
    return (
        halves[:, 0::2] * np.float32(description["scale_factor"]),
        halves[:, 1::2] * np.float32(description["offset_factor"]),
    )


def fused_multiply_add(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    """``a * b + c`` in ``float32`` with one rounding, as the instruction of that name gives it.

    The product of two ``float32`` is exact in ``float64``. Its sum with ``c`` is not, and rounding the rounded sum
    again can be wrong by one unit in the last place where the first rounding lands half-way between two ``float32``.
    So the sum is rounded *to odd* first: an inexact sum takes the neighbour whose last bit is 1, which is never
    half-way (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).

    Examples
    --------
    >>> scale, level, offset = np.float32(16519105 * 2.0**-54), np.float32(65), np.float32(1)
    >>> float(np.float32(float(level) * float(scale) + 1.0))
    1.0
    >>> float(fused_multiply_add(level, scale, offset))
    1.0000001192092896
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    # Knuth's two-sum: what the addition lost.
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    to_odd = np.nextafter(total, np.copysign(np.inf, lost))
    is_even = total.view(np.int64) % 2 == 0
    return np.where((lost != 0) & is_even, to_odd, total).astype(np.float32)


def _as_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values as float32; uint16 is bfloat16, the upper half of a float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def project(
    description: str | Mapping[str, Any], tensors: Tensors, x: NDArray[np.floating]
) -> tuple[Mapping[str, Any], Tensors, NDArray[np.float32]]:
    """What a quantizer behind a mean and a rotation works on: its decoder, and the rows as it sees them.

    Parameters
    ----------
    description : the decoder's description, a mapping or its JSON text
    tensors : the decoder's tensors by name, as stored
    x : array of shape (n_rows, dim)

    Returns
    -------
    description and tensors of the decoder inside, and its rows, float32; all as they were for other forms

    Examples
    --------
    >>> inner = {"form": "levels", "dim": 1, "dtype": "float16"}
    >>> description = {"form": "linear", "dim": 2, "mean": True, "inner": inner,
    ...                "rotation": {"kind": "matrix", "dtype": "float16"}}
    >>> tensors = {"mean": np.array([0, 1], np.float32), "rotation": np.array([[0.6, 0.8]], np.float32)}
    >>> project(description, tensors, np.array([[3.0, 5.0]]))[2]
    array([[5.]], dtype=float32)
    """
    parsed: Mapping[str, Any] = json.loads(description) if isinstance(description, str) else description
    if parsed["form"] != "linear":
        return parsed, tensors, x.astype(np.float32)
    rows = x - tensors["mean"] if parsed["mean"] else x
    rotation = parsed["rotation"]
    if rotation["kind"] == "matrix":
        matrix = _as_float32(tensors["rotation"]).astype(np.float64)
        rows = rows @ (matrix * tensors["rotation.scale"][:, None] if "rotation.scale" in tensors else matrix).T
    elif rotation["kind"] == "hadamard":
        # The rotation of each axis, turned back, is a row of its inverse.
        axes = _turn_back(np.eye(parsed["dim"], dtype=np.float32), rotation["seed"], rotation["rounds"])
        rows = rows @ axes.astype(np.float64).T
    return parsed["inner"], _inner(tensors, "inner."), rows.astype(np.float32)


# ---- encoding ------------------------------------------------------------------------------------------------------


def encode_kmeans(x: NDArray[np.floating], codebook: NDArray[np.floating]) -> NDArray[np.int64]:
    """The nearest entry of each row: smallest squared distance, the lowest index where several are equally near.

    Parameters
    ----------
    x : array of shape (n_rows, d)
    codebook : array of shape (n_entries, d)

    Returns
    -------
    int64 array of shape (n_rows,)

    Examples
    --------
    >>> encode_kmeans(np.array([[0.9], [0.5]]), np.array([[0.0], [1.0]]))
    array([1, 0])
    """
    entries = np.asarray(codebook, np.float64)
    return np.array([np.argmin(((row - entries) ** 2).sum(axis=1)) for row in np.asarray(x, np.float64)], np.int64)


def encode_product(x: NDArray[np.floating], codebooks: Sequence[NDArray[np.floating]]) -> NDArray[np.int64]:
    """Product quantization (Jégou, Douze, Schmid 2011): each part of a row by itself takes its nearest entry.

    Parameters
    ----------
    x : array of shape (n_rows, d)
    codebooks : one array of shape (n_entries, width) for each part, whose widths add up to d

    Returns
    -------
    int64 array of shape (n_rows, n_codebooks)

    Examples
    --------
    >>> books = [np.array([[0.0], [1.0]]), np.array([[5.0], [7.0]])]
    >>> encode_product(np.array([[0.9, 5.2], [0.1, 9.0]]), books)
    array([[1, 0],
           [0, 1]])
    """
    borders = np.cumsum([book.shape[1] for book in codebooks])[:-1]
    parts = np.split(np.asarray(x), borders, axis=1)
    return np.stack([encode_kmeans(part, book) for part, book in zip(parts, codebooks, strict=True)], axis=1)


def encode_residual(
    x: NDArray[np.floating], codebooks: Sequence[NDArray[np.floating]], beam_width: int = 1
) -> NDArray[np.int64]:
    """Residual quantization (Chen, Guan, Wang 2010): each stage explains what the stages before it left over.

    With ``beam_width=1`` every stage takes the entry nearest to the remainder. A wider beam keeps that many partial
    codes with the smallest remainders and extends each by every entry (Babenko and Lempitsky 2014). Equal remainders:
    the code that comes first in the order of its fields.

    Parameters
    ----------
    x : array of shape (n_rows, d)
    codebooks : one array of shape (n_entries, d) for each stage
    beam_width : partial codes kept after each stage

    Returns
    -------
    int64 array of shape (n_rows, n_codebooks)

    Examples
    --------
    >>> books = [np.array([[0.0], [6.0]]), np.array([[0.0], [4.0]])]
    >>> encode_residual(np.array([[3.9], [10.0]]), books, beam_width=1)
    array([[1, 0],
           [1, 1]])
    >>> encode_residual(np.array([[3.9], [10.0]]), books, beam_width=2)
    array([[0, 1],
           [1, 1]])
    """
    return np.array([_beam_search(row, codebooks, beam_width) for row in np.asarray(x, np.float64)], np.int64)


def _beam_search(row: NDArray[np.float64], codebooks: Sequence[NDArray[Any]], beam_width: int) -> tuple[int, ...]:
    """The best code of one row that a beam finds."""
    beam: list[tuple[tuple[int, ...], NDArray[np.float64]]] = [((), row)]
    for codebook in codebooks:
        longer = [((*fields, index), left - entry) for fields, left in beam for index, entry in enumerate(codebook)]
        longer.sort(key=lambda partial: (partial[1] @ partial[1], partial[0]))
        beam = longer[:beam_width]
    return beam[0][0]


def encode_product_residual(
    x: NDArray[np.floating], codebooks: Sequence[NDArray[np.floating]], n_stages: int, beam_width: int = 1
) -> NDArray[np.int64]:
    """Product-residual quantization: :func:`encode_residual` of each part of a row by itself.

    Parameters
    ----------
    x : array of shape (n_rows, d)
    codebooks : ``n_stages`` arrays of shape (n_entries, width) for each part, whose widths add up to d
    n_stages : stages of a part
    beam_width : partial codes kept after each stage

    Returns
    -------
    int64 array of shape (n_rows, n_codebooks)

    Examples
    --------
    >>> book, fine = np.array([[0.0], [6.0]]), np.array([[0.0], [4.0]])
    >>> encode_product_residual(np.array([[3.9, 10.0]]), [book, fine, book, fine], n_stages=2)
    array([[1, 0, 1, 1]])
    """
    parts = [codebooks[first : first + n_stages] for first in range(0, len(codebooks), n_stages)]
    borders = np.cumsum([part[0].shape[1] for part in parts])[:-1]
    columns = np.split(np.asarray(x), borders, axis=1)
    return np.hstack([encode_residual(c, part, beam_width) for c, part in zip(columns, parts, strict=True)])


def encode_tree(
    x: NDArray[np.floating], leaves: NDArray[np.floating], branching: int, depth: int, beam_width: int = 1
) -> NDArray[np.int64]:
    """Tree-structured quantization (Buzo and others 1980): from the root down to a leaf, always to the nearest nodes.

    The leaves under a node follow each other, and a node is their mean. Of all children of the nodes that a level kept,
    the next one keeps the ``beam_width`` nearest, the first of equals.

    Parameters
    ----------
    x : array of shape (n_rows, d)
    leaves : array of shape (branching**depth, d)
    branching : children of a node
    depth : levels below the root
    beam_width : nodes kept at a level

    Returns
    -------
    int64 array of shape (n_rows,): numbers of leaves

    Examples
    --------
    The nodes are at 3 and 6.5; 5.1 belongs to a leaf of the first one, and is nearer to the second:

    >>> leaves = np.array([[1.0], [5.0], [6.0], [7.0]])
    >>> encode_tree(np.array([[5.1]]), leaves, branching=2, depth=2)
    array([2])
    >>> encode_tree(np.array([[5.1]]), leaves, branching=2, depth=2, beam_width=2)
    array([1])
    """
    leaves = np.asarray(leaves, np.float64)
    levels = [leaves.reshape(branching**level, -1, leaves.shape[1]).mean(axis=1) for level in range(1, depth + 1)]
    found = []
    for row in np.asarray(x, np.float64):
        beam = np.array([0])
        for nodes in levels:
            children = (beam[:, None] * branching + np.arange(branching)).ravel()
            distances = ((row - nodes[children]) ** 2).sum(axis=1)
            beam = children[np.lexsort((children, distances))[:beam_width]]
        found.append(beam[0])
    return np.array(found, np.int64)


def encode_additive(
    x: NDArray[np.floating], codebooks: Sequence[NDArray[np.floating]], beam_width: int = 1
) -> NDArray[np.int64]:
    """Additive quantization by iterated conditional modes (Martinez and others 2016): one entry changes at a time.

    The codes of :func:`encode_residual` are the start. Each book in turn takes the entry that is best given those of
    the other books, until no book changes. The result is a minimum that no change of a single entry lowers.

    Parameters
    ----------
    x : array of shape (n_rows, d)
    codebooks : one array of shape (n_entries, d) for each book
    beam_width : partial codes kept by the search that gives the start

    Returns
    -------
    int64 array of shape (n_rows, n_codebooks)

    Examples
    --------
    The greedy code takes 6, the entry nearest to the row, but 4 leaves less:

    >>> books = [np.array([[4.0], [6.0]]), np.array([[1.2], [3.0]])]
    >>> encode_residual(np.array([[5.1]]), books), encode_additive(np.array([[5.1]]), books)
    (array([[1, 0]]), array([[0, 0]]))
    """
    fields = encode_residual(x, codebooks, beam_width)
    for row, code in zip(np.asarray(x, np.float64), fields, strict=True):
        while True:
            before = code.copy()
            for book, entries in enumerate(codebooks):
                others = sum(other[code[m]] for m, other in enumerate(codebooks) if m != book)
                errors = ((row - others - entries) ** 2).sum(axis=1)
                if errors.min() < errors[code[book]]:
                    code[book] = errors.argmin()
            if np.array_equal(code, before):
                break
    return fields


def encode_scalar(x: NDArray[np.float32], description: Mapping[str, Any], tensors: Tensors) -> NDArray[np.uint8]:
    """Scalar quantization by smallest and largest value: each value takes the nearest of evenly spaced levels.

    ``float16`` and ``bfloat16`` round each value to the nearest, ties to even. For integers of ``b`` bits a row or
    block has ``step = (max - min) / (2**b - 1)`` and ``level = round((value - min) / step)``; symmetric ones have
    ``step = max |value| / (2**(b - 1) - 1)`` and level ``2**(b - 1)`` for zero. Steps and minima are rounded to
    ``float16`` before the levels are chosen: the minimum downwards, the step so that the top level reaches the
    maximum to within a thousandth of a step (and a row on such a grid finds the same grid again). Columns take the
    scales in ``tensors``, which a fit has found. Levels of a table are scaled so that the largest one is the largest
    magnitude; levels of a row's own are those with the least squared error.

    Parameters
    ----------
    x : float32 array of shape (n_rows, dim)
    description : the decoder's description
    tensors : the decoder's tensors: ``scale`` and ``offset`` of each column for granularity "column", else none

    Returns
    -------
    uint8 array of shape (n_rows, row_bytes)

    Examples
    --------
    >>> description = {"form": "levels", "dim": 4, "dtype": "int2", "granularity": "row", "block_size": 64,
    ...                "symmetric": False, "scale_factor": 1.0, "offset_factor": 1.0}
    >>> codes = encode_scalar(np.array([[-1, 0, 1, 2]], np.float32), description, {})
    >>> unpack_bits(codes, bits=2, n_fields=4)
    array([[0, 1, 2, 3]])
    >>> decode_levels(description, {}, codes)
    array([[-1.,  0.,  1.,  2.]], dtype=float32)
    """
    dtype = description["dtype"]
    if dtype == "float16":
        return x.astype("<f2").view(np.uint8)
    if dtype == "bfloat16":
        return _round_to_bfloat16(x).view(np.uint8)
    if dtype == "free4":
        return _encode_free(x, description)
    if dtype.startswith("table"):
        return _encode_table(x, description, tensors)
    bits, symmetric = int(dtype.removeprefix("int")), description["symmetric"]
    if description["granularity"] == "column":
        return pack_bits(_nearest_levels(x, tensors["scale"], tensors["offset"], bits, symmetric), bits)
    stored = _ranges(x, description, bits)
    scale, offset = _stored_ranges(description, bits, stored)
    block = np.arange(x.shape[1]) // _block_size(description)
    levels = _nearest_levels(x, scale[:, block], offset[:, block], bits, symmetric)
    return np.hstack([pack_bits(levels, bits), stored])


def encode_trellis(
    x: NDArray[np.floating], description: Mapping[str, Any], tensors: Tensors, numbers: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """Trellis coding (Tseng, Sun, Hou, De Sa 2024): the best stream by dynamic programming over the states.

    Columns are visited from the last one to the first. A first search, with the row cut in the middle and any bits
    at the cut, says which bits stand at the ends of the row; with these a second one finds the best stream that
    closes, and a third one, cut in the middle again, is no worse.

    Parameters
    ----------
    x : array of shape (n_rows, dim)
    description : the decoder's description
    tensors : the decoder's tensors
    numbers : the number of each row's scale, of shape (n_rows,)

    Returns
    -------
    uint8 array of shape (n_rows, row_bytes)

    Examples
    --------
    >>> description = {"dim": 4, "row_bytes": 1, "state_bits": 3, "scale_bits": 0, "scales": 1, "bits": "2222"}
    >>> tensors = {"columns": np.ones(4, np.float32), "scales": np.ones(1, np.float32)}
    >>> decoded = decode_trellis(description, tensors, np.array([[0b10110100]], np.uint8))
    >>> encode_trellis(decoded, description, tensors, np.array([0])) == 0b10110100
    array([[ True]])
    """
    starts, tables, n_bits = trellis_layout(description)
    state_bits, scale_bits = description["state_bits"], description["scale_bits"]
    bits = np.diff(np.append(starts, n_bits))
    dim = description["dim"]
    columns = zip(tables.tolist(), tensors["columns"], strict=True)
    levels = [trellis_levels(state_bits, table) * scale for table, scale in columns]
    codes = np.zeros((len(x), description["row_bytes"]), np.uint8)
    for row, number, code in zip(np.asarray(x, np.float64), numbers, codes, strict=True):
        scaled = [level * tensors["scales"][number] for level in levels]
        states = np.zeros(dim, np.int64)
        for turn, cut in enumerate((dim // 2, 0, dim // 2)):
            order = [*range(cut - 1, -1, -1), *range(dim - 1, cut - 1, -1)]
            kept = int(states[order[-1]]) % (1 << (state_bits - bits[order[0]]))
            states = _best_states(row, order, bits, scaled, kept if turn else None)
        stream = [(state >> bit) & 1 for state, count in zip(states, bits, strict=True) for bit in range(count)]
        behind = [(int(number) >> bit) & 1 for bit in range(scale_bits)]
        packed = np.packbits(np.array([*stream, *behind], np.uint8), bitorder="little")
        code[: len(packed)] = packed
    return codes


def _best_states(
    row: NDArray[np.float64], order: list[int], bits: NDArray[np.int64], levels: list[NDArray[Any]], kept: int | None
) -> NDArray[np.int64]:
    """The states of least squared error, visited in an order; ``kept`` are the bits that first and last one share."""
    state = np.arange(len(levels[0]))
    n_states, first = len(state), bits[order[0]]
    costs = np.zeros(n_states)
    if kept is not None:
        costs[state >> first != kept] = np.inf
    costs = costs + (row[order[0]] - levels[order[0]]) ** 2
    origins = []
    for column in order[1:]:
        before = costs.reshape(1 << bits[column], -1)
        origins.append(before.argmin(axis=0))
        costs = before.min(axis=0)[state >> bits[column]] + (row[column] - levels[column]) ** 2
    if kept is not None:
        costs[state % (n_states >> first) != kept] = np.inf
    states = np.zeros(len(order), np.int64)
    best = int(costs.argmin())
    for place in range(len(order) - 1, -1, -1):
        column = order[place]
        states[column] = best
        if place:
            head = best >> bits[column]
            best = int(origins[place - 1][head]) * (n_states >> bits[column]) + head
    return states


def _nearest_levels(
    x: NDArray[np.float32], scale: NDArray[np.float32], offset: NDArray[np.float32], bits: int, symmetric: bool
) -> NDArray[np.int64]:
    """The nearest of 2**bits levels, ties upwards; symmetric grids leave out the lowest one."""
    steps = (np.asarray(x, np.float64) - offset) / np.where(scale > 0, scale, np.inf)
    return np.clip(np.floor(steps + 0.5), int(symmetric), 2**bits - 1).astype(np.int64)


def _ranges(x: NDArray[np.float32], description: Mapping[str, Any], bits: int) -> NDArray[np.uint8]:
    """Step and (unless symmetric) minimum of each block as the bytes that stand behind a row's levels."""
    scale_factor, offset_factor = description["scale_factor"], description["offset_factor"]
    size, columns = _block_size(description), []
    for start in range(0, x.shape[1], size):
        block = x[:, start : start + size].astype(np.float64)
        if description.get("scale_dtype", "float16") == "float8":
            reach, n_steps = np.abs(block).max(axis=1), 2 ** (bits - 1) - 1
            halves = (reach / n_steps / scale_factor).astype("<f2").view(np.uint16)
            nearest = np.maximum((halves + 32) >> 6, reach > 0)
            step = (nearest << 6).astype("<u2").view("<f2").astype(np.float64) * scale_factor
            columns.append((nearest + (step * (n_steps + COVERED) < reach)).astype(np.uint8))
        elif description["symmetric"]:
            columns.append(_rounded_step(np.abs(block).max(axis=1) / scale_factor, 2 ** (bits - 1) - 1))
        else:
            minimum = _float16_below(block.min(axis=1) / offset_factor)
            reach = block.max(axis=1) - minimum.astype(np.float64) * offset_factor
            columns += [_rounded_step(reach / scale_factor, 2**bits - 1), minimum]
    stored = np.stack(columns, axis=1)
    return stored if stored.dtype == np.uint8 else stored.astype("<f2").view(np.uint8)


def _rounded_step(reach: NDArray[np.float64], n_steps: int) -> NDArray[np.float16]:
    """The nearest float16 to ``reach / n_steps``, or the next one up where that many steps would fall short."""
    nearest = (reach / n_steps).astype(np.float16)
    falls_short = nearest.astype(np.float64) * (n_steps + COVERED) < reach
    return np.where(falls_short, np.nextafter(nearest, np.float16(np.inf)), nearest)


def _float16_below(values: NDArray[np.float64]) -> NDArray[np.float16]:
    """The largest float16 that is not above each value."""
    nearest = values.astype(np.float16)
    return np.where(nearest > values, np.nextafter(nearest, np.float16(-np.inf)), nearest)


def _round_to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


# ---- search and pooling --------------------------------------------------------------------------------------------


def search(
    queries: NDArray[np.floating],
    rows: NDArray[np.floating],
    k: int,
    metric: Literal["inner_product", "l2", "cosine"] = "inner_product",
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The best rows for each query, by looking at all of them; equal scores by lower id.

    Parameters
    ----------
    queries : array of shape (n_queries, d)
    rows : array of shape (n_rows, d), the decoded table
    k : results for each query, at most n_rows
    metric : "inner_product" and "cosine" (larger is better), or "l2" (squared distance, smaller is better)

    Returns
    -------
    float64 scores or squared distances and int64 ids, each of shape (n_queries, min(k, n_rows)), best first

    Examples
    --------
    >>> scores, ids = search(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 2.0]]), k=2)
    >>> scores, ids
    (array([[3., 1.]]), array([[1, 0]]))
    """
    scores = np.array(
        [_scores(query, np.asarray(rows, np.float64), metric) for query in np.asarray(queries, np.float64)]
    )
    order = np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def _scores(query: NDArray[np.float64], rows: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    if metric == "l2":
        return ((rows - query) ** 2).sum(axis=1)
    products = rows @ query
    if metric == "inner_product":
        return products
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def pool(
    rows: NDArray[np.floating],
    offsets: Sequence[int] | NDArray[np.integer],
    weights: NDArray[np.floating] | None = None,
    mode: Literal["sum", "mean", "max"] = "sum",
) -> NDArray[np.float32]:
    """Sums, means or maxima of bags of rows; an empty bag gives zeros.

    Parameters
    ----------
    rows : array of shape (n, d), the looked-up rows of all bags, one bag after the other
    offsets : where each bag starts in ``rows``; the last one reaches to the end
    weights : one factor a row, for mode "sum"
    mode : "sum", "mean" or "max"

    Returns
    -------
    float32 array of shape (n_bags, d)

    Examples
    --------
    >>> pool(np.array([[1.0], [2.0], [6.0]]), [0, 2], mode="mean")
    array([[1.5],
           [6. ]], dtype=float32)
    """
    values = np.asarray(rows, np.float64)
    if weights is not None:
        values = values * np.asarray(weights, np.float64)[:, None]
    combine: Any = {"sum": np.sum, "mean": np.mean, "max": np.max}[mode]
    bags = np.split(values, np.asarray(offsets)[1:])
    zeros = np.zeros(values.shape[1])
    return np.array([combine(bag, axis=0) if len(bag) else zeros for bag in bags], np.float32)


# ---- the file ------------------------------------------------------------------------------------------------------

BLOCK = 64 * 1024
"""Bytes that share a checksum."""

MAGIC = b"\x89vqrs\r\n\x1a"
"""What a footer starts with."""

STORED = {"U8": "u1", "I8": "i1", "U64": "<u8", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}
"""NumPy's names of the types of tensors; NumPy has no bfloat16."""

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""What XXH3 mixes data with."""

PRIMES_32 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
PRIMES_64 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
WORD = 2**64 - 1


class File(NamedTuple):
    """A table file, as :func:`read_table` finds it.

    Examples
    --------
    >>> description = {"decoder": {"form": "levels", "dim": 2, "dtype": "float16"}}
    >>> File(description, {}, {"codes": np.array([[1, 2]], np.float16).view(np.uint8)}).rows()
    array([[1., 2.]], dtype=float32)
    """

    description: dict[str, Any]
    """What the table says of itself."""
    metadata: dict[str, str]
    """The user's own strings."""
    tensors: dict[str, NDArray[Any]]
    """Every tensor by name, as stored (bfloat16 as uint16)."""

    def rows(self) -> NDArray[np.float32]:
        """All rows, decoded."""
        return decode(self.description["decoder"], self.tensors, self.tensors["codes"])


def read_table(path: str | os.PathLike[str]) -> File:
    """A table file, looked at byte by byte: its header, its layout, its checksums and its pads.

    Parameters
    ----------
    path : path-like
        A file of the profile ``vqrs-table/1``.

    Returns
    -------
    File
        What it holds.

    Raises
    ------
    ValueError
        It is no such file, or it is damaged; the message says where.

    Examples
    --------
    >>> import os, tempfile, vqrs
    >>> path = os.path.join(tempfile.mkdtemp(), "rows.safetensors")
    >>> n_bytes = vqrs.compress(np.eye(3), method="scalar", dtype="float16").save(path)
    >>> read_table(path).rows()
    array([[1., 0., 0.],
           [0., 1., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    content = Path(path).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    _require(4096 <= size <= min(len(content), 8 + 2**24) and size % 4096 == 0, "the header is cut or has a wrong size")
    text = content[8:size].rstrip(b" ")
    _require(text[:1] == b"{" and text[-1:] == b"}", "the header is not an object padded with spaces")
    header = _json(text.decode())
    metadata = header.pop("__metadata__", None)
    _require(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()), "no metadata")
    _require("vqrs" in metadata and metadata.pop("format", None) == "pt", "not the metadata of a table")
    description = _json(metadata.pop("vqrs"))
    _require(isinstance(description, dict), "the description is not an object")
    if description.get("profile") != "vqrs-table/1":
        raise ValueError(f"profile {description.get('profile')!r}, expected 'vqrs-table/1'")
    required = description.get("requires")
    _require(isinstance(required, list) and all(isinstance(name, str) for name in required), "no list of requirements")
    if required:
        raise ValueError(f"requires features that this reader does not know: {', '.join(required)}")
    _check_layout(header, size, len(content))
    _require(_same([description.get("rows"), description.get("row_bytes")], header["codes"]["shape"]), "other rows")
    places = {name: slice(*(size + at for at in info["data_offsets"])) for name, info in header.items()}
    tensors = {
        name: np.frombuffer(content[places[name]], STORED[info["dtype"]]).reshape(info["shape"])
        for name, info in header.items()
    }
    _check_content(content, size, places, tensors)
    decoder = description.get("decoder")
    _require(isinstance(decoder, dict) and isinstance(decoder.get("form"), str), "no decoder")
    if decoder["form"] not in FORMS:
        raise ValueError(f"unknown decoder form {decoder['form']!r}: expected one of {', '.join(sorted(FORMS))}")
    _require(_same(description.get("dim"), decoder.get("dim")), "another dim than the decoder's")
    for key in ("parameters", "errors"):
        _require(isinstance(description.get(key, {}), dict), f"{key} is no object")
    return File(description, metadata, tensors)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"not a table, or damaged: {what}")


def _same(found: Any, expected: Any) -> bool:
    """Equal, and of equal types: 1, 1.0 and true are three values."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_same, found, expected))
    return type(found) is type(expected) and bool(found == expected)


def _json(text: str) -> Any:
    """JSON without second meanings: no key twice, no number that is none, no text that is not Unicode."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for text in itertools.chain.from_iterable(items):
            if isinstance(text, str):
                text.encode()
        found = dict(items)
        _require(len(found) == len(items), "a key stands twice in an object")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def number(digits: str) -> float:
        _require(math.isfinite(float(digits)), f"the number {digits[:40]} is too large")
        return float(digits)

    def integer(digits: str) -> int | float:
        # What 64 bits do not hold is a float, and so is -0.
        whole = number(digits) if len(digits) > 20 else int(digits)
        return whole if -(2**63) <= whole < 2**64 and digits != "-0" else number(digits)

    try:
        found = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number, parse_int=integer
        )
    except RecursionError:
        raise ValueError("JSON that is too deep") from None
    return found


def _check_layout(header: dict[str, Any], size: int, length: int) -> None:
    """Places the tensors again, from their names, types and shapes; nothing may differ."""
    own = [name for name in header if not name.startswith("__pad.")]
    _require(len(own) >= 3 and (own[0], *own[-2:]) == ("codes", "vqrs.blocks", "vqrs.footer"), "other tensors")
    _require(len(header) <= 4096, "more than 4096 tensors")
    decoder = [name for name in own[1:-2] if not name.startswith("vqrs.")]
    _require(own[1 : 1 + len(decoder)] == decoder, "decoder tensors behind others")
    placed: dict[str, dict[str, Any]] = {}
    at = size

    def put(name: str, dtype: str, shape: list[int]) -> None:
        nonlocal at
        end = at + math.prod(shape) * np.dtype(STORED[dtype]).itemsize
        placed[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at - size, end - size]}
        at = end

    def align() -> None:
        if at % 64:
            pads = sum(name.startswith("__pad.") for name in placed)
            put(f"__pad.{pads}", "U8", [-at % 64])

    for name in own[:-2]:
        info = header[name]
        _require(isinstance(info, dict) and set(info) == {"dtype", "shape", "data_offsets"}, f"{name} is no tensor")
        dtype, shape = info["dtype"], info["shape"]
        _require(isinstance(dtype, str) and dtype in STORED and isinstance(shape, list), f"the type of {name}")
        _require(len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape), f"the shape of {name}")
        _require(
            name == "codes" or len(shape) <= 1 or 0 not in shape, f"{name} has no values and another shape than [0]"
        )
        _require(name != "" and (name == "codes" or not name.startswith("__")), f"the name {name!r}")
        _require(len(name.encode()) <= 512, "a name of more than 512 bytes")
        align()
        put(name, dtype, shape)
    shape = header["codes"]["shape"]
    _require(header["codes"]["dtype"] == "U8" and len(shape) == 2 and shape[1] <= 2**31, "the codes")
    align()
    put("vqrs.blocks", "U64", [-(-at // BLOCK)])
    align()
    put("vqrs.footer", "U8", [32])
    _require(list(placed) == list(header), "other tensors, or in another order")
    for name, info in placed.items():
        found = header[name]
        _require(isinstance(found, dict) and set(found) == set(info), f"{name} is no tensor")
        _require(all(_same(found[key], info[key]) for key in info), f"{name} stands elsewhere")
    _require(at == length, f"{length} bytes, expected {at}")


def _check_content(content: bytes, size: int, places: Mapping[str, slice], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Checksums of all bytes, pads of zeros, numbers that are finite."""
    blocks, footer = content[places["vqrs.blocks"]], content[places["vqrs.footer"]]
    _require(footer[:8] == MAGIC and footer[24:] == len(content).to_bytes(8, "little"), "the footer")
    _require(footer[8:24] == xxh3_128(content[:size] + blocks), "the header's checksum")
    body = content[: places["vqrs.blocks"].start]
    for number in range(len(blocks) // 8):
        found = xxh3_64(body[number * BLOCK : (number + 1) * BLOCK], number)
        _require(found == blocks[8 * number : 8 * number + 8], f"the checksum of block {number}")
    _require(not any(content[places["vqrs.blocks"].stop : places["vqrs.footer"].start]), "a pad that is not zero")
    for name, values in tensors.items():
        if name.startswith("__pad."):
            _require(not values.any(), f"{name} is not zero")
        elif values.dtype == np.uint16:
            _require(bool(np.all(values & 0x7F80 != 0x7F80)), f"{name} holds NaN or infinity")
        elif values.dtype.kind == "f":
            _require(bool(np.isfinite(values).all()), f"{name} holds NaN or infinity")


def xxh3_64(data: bytes, seed: int = 0) -> bytes:
    """The checksum XXH3-64 of Collet of more than 16 bytes, little-endian.

    Examples
    --------
    >>> xxh3_64(bytes(64)).hex(), xxh3_64(bytes(1000), seed=1).hex()
    ('6e252cc11869fb2f', '5b2b0b966c84ad55')
    """
    if len(data) > 240:
        secret = _words(SECRET).copy()
        secret[::2] += np.uint64(seed)
        secret[1::2] -= np.uint64(seed)
        return _merged(_accumulated(data, secret.tobytes()), secret.tobytes()[11:], len(data) * PRIMES_64[0])

    def mixed(at: int, secret: int) -> int:
        low, high = (int.from_bytes(data[at + shift : at + shift + 8], "little") for shift in (0, 8))
        first, second = (int.from_bytes(SECRET[secret + shift : secret + shift + 8], "little") for shift in (0, 8))
        return _folded(low ^ (first + seed) & WORD, high ^ (second - seed) & WORD)

    total, pairs = len(data) * PRIMES_64[0], (len(data) - 1) // 32
    if len(data) <= 128:
        total += sum(mixed(16 * i, 32 * i) + mixed(len(data) - 16 * (i + 1), 32 * i + 16) for i in range(pairs + 1))
        return _avalanche(total)
    total = int.from_bytes(_avalanche(total + sum(mixed(16 * i, 16 * i) for i in range(8))), "little")
    total += sum(mixed(16 * i, 16 * (i - 8) + 3) for i in range(8, len(data) // 16))
    return _avalanche(total + mixed(len(data) - 16, 136 - 17))


def xxh3_128(data: bytes) -> bytes:
    """The checksum XXH3-128 of Collet of more than 240 bytes, little-endian.

    Examples
    --------
    >>> xxh3_128(bytes(1000)).hex()
    '8c58dd7460eac12472b9096dea4ab93f'
    """
    sums = _accumulated(data, SECRET)
    low = _merged(sums, SECRET[11:], len(data) * PRIMES_64[0])
    return low + _merged(sums, SECRET[117:], ~(len(data) * PRIMES_64[1]))


def _words(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(data, "<u8")


def _accumulated(data: bytes, secret: bytes) -> list[int]:
    """The eight sums of XXH3: stripes of 64 bytes, sixteen of them between two scrambles."""
    low, shift, prime = np.uint64(2**32 - 1), np.uint64(47), np.uint64(PRIMES_32[0])
    keys = np.stack([_words(secret[8 * i : 8 * i + 64]) for i in range(16)])
    swap = np.arange(8) ^ 1

    def added(stripes: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mixed = stripes ^ keys
        return stripes[..., swap] + (mixed & low) * (mixed >> np.uint64(32))

    p, q = PRIMES_64, PRIMES_32
    sums = np.array([q[2], p[0], p[1], p[2], p[3], q[1], p[4], q[0]], np.uint64)
    whole = (len(data) - 1) // 1024
    stripes = _words(data[: whole * 1024]).reshape(whole, 16, 8)
    for part in added(stripes, keys).sum(axis=1, dtype=np.uint64):
        sums = sums + part
        sums = (sums ^ sums >> shift ^ _words(secret[128:192])) * prime
    count = (len(data) - 1 - whole * 1024) // 64
    rest = _words(data[whole * 1024 :][: count * 64]).reshape(count, 8)
    sums = sums + added(rest, keys[:count]).sum(axis=0, dtype=np.uint64)
    return (sums + added(_words(data[-64:]), _words(secret[121:185]))).tolist()


def _merged(sums: Sequence[int], secret: bytes, start: int) -> bytes:
    keys = _words(secret[:64]).tolist()
    return _avalanche(start + sum(_folded(sums[i] ^ keys[i], sums[i + 1] ^ keys[i + 1]) for i in range(0, 8, 2)))


def _folded(a: int, b: int) -> int:
    return (a * b & WORD) ^ a * b >> 64


def _avalanche(total: int) -> bytes:
    total &= WORD
    total = (total ^ total >> 37) * 0x165667919E3779F9 & WORD
    return (total ^ total >> 32).to_bytes(8, "little")
