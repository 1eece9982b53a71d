"""Lookups of books and levels by Triton, for codes on a CUDA device: one kernel a lookup, unpacking included.

The other forms, and trainable values, are gathered by torch's own operators. Sums run in the order of the books and in
float32, as on the CPU.
"""

# ruff: noqa: SIM108 -- a branch on a constant is taken by the compiler, a conditional expression is not

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["lookup"]

_ROWS, _COLUMNS = 16, 128
"""What one program decodes."""


def lookup(
    ids: Tensor, codes: Tensor, description: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor | None:
    """Rows of ids of any shape.

    Parameters
    ----------
    ids : int32 or int64 tensor of any shape
    codes : uint8 tensor of shape (n_rows, row_bytes)
    description : mapping
        The decoder's description, as in ``Table.info()["decoder"]``.
    tensors : mapping of str to Tensor
        The decoder's tensors as stored.
    dtype : torch.dtype
        Of the rows.

    Returns
    -------
    Tensor of shape (*ids.shape, dim), or None for a decoder that has no kernel here

    Raises
    ------
    RuntimeError
        If an id is negative or beyond the last row: on CUDA when the device is next waited for.
    """
    launch = {"books": _launch_books, "levels": _launch_levels}.get(description["form"])
    if launch is None or not _has_kernel(description):
        return None
    flat = ids.reshape(-1).contiguous()
    torch._assert_async(((flat >= 0) & (flat < len(codes))).all(), f"an id is outside a table of {len(codes)} rows")
    rows = torch.empty((len(flat), description["dim"]), dtype=dtype, device=codes.device)
    if rows.numel():
        launch(flat, codes.contiguous(), description, tensors, rows)
    return rows.reshape(*ids.shape, description["dim"])


def _has_kernel(description: Mapping[str, Any]) -> bool:
    return description["dtype"] not in ("free4",) and (
        description["form"] == "books" or description["dtype"] not in ("float16", "bfloat16")
    )


def _grid(rows: Tensor) -> tuple[int, int]:
    return triton.cdiv(rows.shape[0], _ROWS), triton.cdiv(rows.shape[1], _COLUMNS)


# ---- books ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _layers(groups: tuple[tuple[int, tuple[int, ...]], ...], bits: int, dim: int, device: torch.device) -> Tensor:
    """For the l-th book over each column, int64 (4, n_layers, dim): number, entry 0 at this column, width, first bit.

    Where a column has fewer books than others the number is -1.
    """
    over: list[list[tuple[int, int, int, int]]] = [[] for _ in range(dim)]
    book = memory = 0
    for width, starts in groups:
        for start in starts:
            for column in range(width):
                over[start + column].append((book, memory + column, width, book * bits))
            book, memory = book + 1, memory + (width << bits)
    depth = max(len(books) for books in over)
    table = [books + [(-1, 0, 0, 0)] * (depth - len(books)) for books in over]
    return torch.tensor(table, dtype=torch.int64).permute(2, 1, 0).contiguous().to(device)


def _launch_books(
    ids: Tensor, codes: Tensor, description: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: Tensor
) -> None:
    groups = tuple((group["width"], tuple(group["starts"])) for group in description["groups"])
    layers = _layers(groups, description["bits"], description["dim"], codes.device)
    books = [tensors[f"codebooks_{number}"].reshape(-1) for number in range(len(groups))]
    n_books = sum(len(starts) for _, starts in groups)
    scales = tensors.get("scales")
    if scales is None:
        scales = torch.full((n_books,), float(description["scale"]), device=codes.device)
    _books[_grid(rows)](
        ids,
        codes,
        books[0] if len(books) == 1 else torch.cat(books),
        scales,
        layers,
        rows,
        len(ids),
        codes.shape[1],
        rows.shape[1],
        layers.shape[1],
        BITS=description["bits"],
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )


@triton.jit
def _field(row, first_bit, row_bytes, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unsigned integers of BITS bits out of the bytes of rows."""
    byte = first_bit // 8
    window = tl.load(row + byte, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a field may reach into the next byte
        window |= tl.load(row + byte + 1, mask=mask & (byte + 1 < row_bytes), other=0).to(tl.int32) << 8
    if BITS > 9:
        window |= tl.load(row + byte + 2, mask=mask & (byte + 2 < row_bytes), other=0).to(tl.int32) << 16
    return (window >> (first_bit % 8).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _books(  # type: ignore[no-untyped-def]
    ids,
    codes,
    books,
    scales,
    layers,
    out,
    n_rows,
    row_bytes,
    dim,
    n_layers,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < dim)[None, :]
    begin = codes + tl.load(ids + row, mask=row < n_rows, other=0).to(tl.int64)[:, None] * row_bytes
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    size = n_layers * dim
    for layer in range(n_layers):
        at = layer * dim + column
        there = column < dim
        book = tl.load(layers + at, mask=there, other=-1)
        first = tl.load(layers + size + at, mask=there, other=0)
        width = tl.load(layers + 2 * size + at, mask=there, other=0)
        bit = tl.load(layers + 3 * size + at, mask=there, other=0)
        used = inside & (book >= 0)[None, :]
        code = _field(begin, bit[None, :], row_bytes, used, BITS)
        entry = tl.load(books + first[None, :] + code.to(tl.int64) * width[None, :], mask=used, other=0)
        scale = tl.load(scales + book, mask=there & (book >= 0), other=0)
        total += entry.to(tl.float32) * scale[None, :]
    at = row.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


# ---- levels ---------------------------------------------------------------------------------------------------------


def _launch_levels(
    ids: Tensor, codes: Tensor, description: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: Tensor
) -> None:
    dim, bits = description["dim"], int(description["dtype"][-1])
    by_column = description["granularity"] == "column"
    table = description["dtype"].startswith("table")
    symmetric = bool(description["symmetric"])
    # What a decoder lacks is never read: the codes stand in for its address.
    _levels[_grid(rows)](
        ids,
        codes,
        tensors["levels"] if table else codes,
        tensors["scale"] if by_column else codes,
        tensors["offset"] if by_column and not symmetric else codes,
        rows,
        len(ids),
        codes.shape[1],
        dim,
        (dim * bits + 7) // 8,
        description["block_size"] if description["granularity"] == "block" else dim,
        float(description.get("scale_factor", 1.0)),
        float(description.get("offset_factor", 1.0)),
        BITS=bits,
        BY_COLUMN=by_column,
        SYMMETRIC=symmetric,
        SCALE_BYTES=1 if description.get("scale_dtype", "float16") == "float8" else 2,
        TABLE=table,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )


@triton.jit
def _half(row, number, mask, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float16 numbers at any address, or the middle bits of them in one byte."""
    low = tl.load(row + number * BYTES, mask=mask, other=0).to(tl.int32)
    if BYTES == 1:
        bits = low << 6
    else:
        bits = low | (tl.load(row + number * 2 + 1, mask=mask, other=0).to(tl.int32) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _levels(  # type: ignore[no-untyped-def]
    ids,
    codes,
    levels,
    scales,
    offsets,
    out,
    n_rows,
    row_bytes,
    dim,
    level_bytes,
    block_size,
    scale_factor,
    offset_factor,
    BITS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < dim
    inside = (row < n_rows)[:, None] & there[None, :]
    begin = codes + tl.load(ids + row, mask=row < n_rows, other=0).to(tl.int64)[:, None] * row_bytes
    place = _field(begin, (column * BITS)[None, :], level_bytes, inside, BITS)
    if BY_COLUMN:
        scale = tl.load(scales + column, mask=there, other=0)[None, :]
        if SYMMETRIC:
            offset = scale * -(2 ** (BITS - 1))
        else:
            offset = tl.load(offsets + column, mask=there, other=0)[None, :]
    else:
        behind, block = begin + level_bytes, (column // block_size)[None, :]
        if SYMMETRIC:
            scale = _half(behind, block, inside, SCALE_BYTES) * scale_factor
            offset = scale * -(2 ** (BITS - 1))
        else:
            scale = _half(behind, 2 * block, inside, SCALE_BYTES) * scale_factor
            offset = _half(behind, 2 * block + 1, inside, SCALE_BYTES) * offset_factor
    if TABLE:
        value = tl.load(levels + place, mask=inside, other=0) * scale
    else:
        value = place.to(tl.float32) * scale + offset
    at = row.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
