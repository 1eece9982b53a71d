"""One small module per decoder form: how torch reads the codes of a table.

A module gets the description and the tensors of a decoder and knows nothing of the kind that learned them: a new kind
never touches this file. Frozen, it holds the tensors as the table stores them; trainable, it holds their real values as
float32 parameters. Its gathers are plain torch, on any device, and give the values of the compiled core:
``float32(scale * entry)`` added in the order of the books, and ``level * scale + offset``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqrs.reference import groups_of_rows, random_sign, row_bytes, trellis_layout, trellis_levels
from vqrs.torch.trained.hashing import hash_ids, hash_signs

__all__ = [
    "BooksDecoder",
    "Decoder",
    "HashedDecoder",
    "JoinDecoder",
    "LevelsDecoder",
    "LinearDecoder",
    "SegmentsDecoder",
    "SwitchDecoder",
    "decoder_from_parts",
    "unpack_bits",
]

Tensors = Mapping[str, Tensor]
_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Values that stand in rows as they are."""


def unpack_bits(codes: Tensor, bits: int, n_fields: int) -> Tensor:
    """Unsigned integers of a fixed width out of bytes, least significant bit first.

    Parameters
    ----------
    codes : uint8 tensor of shape (n_rows, n_bytes)
    bits : int
        Width of a field.
    n_fields : int
        Fields to read of each row.

    Returns
    -------
    int64 tensor of shape (n_rows, n_fields); int32 where ONNX is exported

    Examples
    --------
    >>> unpack_bits(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, n_fields=3)
    tensor([[1, 2, 3]])
    """
    if torch.onnx.is_in_onnx_export():
        return _gather_bits(codes, bits, n_fields)
    if bits == 8:
        return codes[:, :n_fields].long()
    first_bit = torch.arange(n_fields, device=codes.device) * bits
    first_byte, shift = first_bit // 8, first_bit % 8
    # A field starts at any bit of its first byte, unless the width divides the byte.
    n_bytes = 1 if 8 % bits == 0 else (bits + 14) // 8
    # Behind the last byte of a row stand no bits of a field: any byte does there.
    window = codes[:, first_byte].long()
    for byte in range(1, n_bytes):
        window = window | codes[:, (first_byte + byte).clamp(max=codes.shape[1] - 1)].long() << (8 * byte)
    return (window >> shift) & ((1 << bits) - 1)


def _gather_bits(codes: Tensor, bits: int, n_fields: int) -> Tensor:
    """``unpack_bits`` without shifts, which ONNX has for few types: fields of a byte are looked up by its value."""
    if bits == 8:
        return codes[:, :n_fields].int()
    width = bits if 8 % bits == 0 else 1
    values = torch.arange(256, dtype=torch.int32, device=codes.device)[:, None]
    table = values // 2 ** torch.arange(0, 8, width, dtype=torch.int32, device=codes.device) % 2**width
    fields = F.embedding(codes.int(), table).flatten(1)[:, : n_fields * (bits // width)]
    return fields if width == bits else _sum_of_bits(fields.reshape(-1, n_fields, bits))


def _sum_of_bits(bits: Tensor) -> Tensor:
    """Integers from their bits, the least significant one first, which stand in the last axis."""
    return (bits * 2 ** torch.arange(bits.shape[-1], dtype=bits.dtype, device=bits.device)).sum(-1, dtype=bits.dtype)


class Decoder(nn.Module):
    """What the forms share: tensors held as buffers (frozen) or as parameters (trainable).

    Parameters
    ----------
    description : mapping
        The decoder's description, as in ``Table.info()["decoder"]``.
    tensors : mapping of str to Tensor
        Frozen: the stored tensors. Trainable: what :meth:`real_values` gives of them.
    trainable : bool
    """

    rows_apart: ClassVar[bool] = True
    """Whether the codes of a row stand by themselves; else ``forward`` takes those of the whole table."""
    sparse: bool = False
    """Whether codebooks and what each row trains of its own get sparse gradients."""

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__()
        self.dim: int = description["dim"]
        self.trainable = trainable
        for name, tensor in tensors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @staticmethod
    @abstractmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """The trainable values, float32, from the stored tensors and, where scales live in the rows, the codes."""

    def stored_values(self, codes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Tensors (by name, units and dtype as a table stores them) and codes that hold the present values."""
        return self.stored_tensors(), self.stored_codes(codes)

    @abstractmethod
    def stored_tensors(self) -> dict[str, Tensor]:
        """The present values, by name, units and dtype as a table stores them."""

    def stored_codes(self, codes: Tensor) -> Tensor:
        """The codes of all rows with the present values of what lives in the rows; the same tensor if nothing does."""
        return codes

    @abstractmethod
    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows.

        Parameters
        ----------
        codes : uint8 tensor of shape (n, row_bytes)
        ids : integer tensor of shape (n,)
            The rows that the codes stand for: a trainable scale per row is found by its id.

        Returns
        -------
        Tensor of shape (n, dim): float32, or the dtype of the parameters
        """

    def values_of_rows(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have an entry for each row, each with what these codes, (n, row_bytes), hold for it."""
        return []

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """The same decoder with the floats of all rows beside the codes: for programs that cannot read them there."""
        return self, codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Devices are followed; ``.half()`` and its kind change parameters, but not what a table stores."""
        if self.trainable:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing: the embedding loads its decoder together with the codes."""


class BooksDecoder(Decoder):
    """A row is a sum of codebook entries, each placed at its columns.

    The tensors are ``codebooks_0``, ``codebooks_1``, …: one per group of books of equal width, of shape
    (n_books, 2**bits, width). Books of integers have a scale each in ``scales``, which is not trained apart from them.
    """

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, tensors, trainable)
        self.description = dict(description)
        self.bits: int = description["bits"]
        self.stored_scale: float = description["scale"]
        self.stored_dtype: torch.dtype = getattr(torch, description["dtype"])
        self.groups = [(len(group["starts"]), group["width"]) for group in description["groups"]]
        self.runs = [_runs(group["starts"], group["width"]) for group in description["groups"]]

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """Codebooks with the scale applied."""
        scales = _scales_of_groups(description, stored)
        return {name: stored[name].float() * scale for name, scale in scales.items()}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Codebooks with the scale taken out."""
        books = [getattr(self, f"codebooks_{group}").detach() for group in range(len(self.runs))]
        scales = {"scales": self.scales} if hasattr(self, "scales") else {}
        if self.trainable and self.stored_dtype == torch.int8:
            _refuse_unstorable(*books)
            factors = [_scale_of_integers(book) for book in books]
            books = [
                (book / factor).round().clamp(-127, 127).to(torch.int8)
                for book, factor in zip(books, factors, strict=True)
            ]
            scales = {"scales": torch.cat([factor.flatten() for factor in factors])}
        elif self.trainable:
            books = [(book / self.stored_scale).to(self.stored_dtype) for book in books]
            _refuse_unstorable(*books)
        return {f"codebooks.{group}": book for group, book in enumerate(books)} | scales

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        fields = self.fields(codes)
        pieces = []
        held = dict(self.named_buffers())
        scales = {} if self.trainable else _scales_of_groups(self.description, held)
        for group, ((n_books, width), runs) in enumerate(zip(self.groups, self.runs, strict=True)):
            books = getattr(self, f"codebooks_{group}")
            if self.sparse and self.trainable:
                entries: Tensor = _EntriesOfBooks.apply(books, fields[:, :n_books])
            else:
                first_entry = torch.arange(n_books, dtype=fields.dtype, device=codes.device) * 2**self.bits
                entries = F.embedding(fields[:, :n_books] + first_entry, books.flatten(0, 1))
            fields = fields[:, n_books:]
            if not self.trainable:
                scale = scales[f"codebooks_{group}"]
                entries = entries.float() * (scale if isinstance(scale, float) else scale.flatten(1))
            for first, count, start in runs:
                piece = entries[:, first : first + count].flatten(1)
                rest = self.dim - start - count * width
                pieces.append(F.pad(piece, (start, rest)) if start or rest else piece)
        return functools.reduce(torch.add, pieces)

    def fields(self, codes: Tensor) -> Tensor:
        """The entries that rows pick, int64 (n, n_books of all groups)."""
        return unpack_bits(codes, self.bits, sum(n_books for n_books, _ in self.groups))

    def groups_of_books(self) -> list[tuple[Tensor, list[int]]]:
        """The codebooks of each group, (n_books, 2**bits, width), and the column at which each book starts."""
        groups = self.description["groups"]
        return [(getattr(self, f"codebooks_{number}"), group["starts"]) for number, group in enumerate(groups)]


class _EntriesOfBooks(torch.autograd.Function):
    """Entries (n, n_books, width) of books (n_books, n_entries, width), whose gradient is sparse in its first two axes:
    torch's own gathers have sparse gradients for matrices alone.
    """

    @staticmethod
    def forward(books: Tensor, fields: Tensor) -> Tensor:
        return books[torch.arange(len(books), device=books.device), fields]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        books, fields = inputs
        ctx.shape = books.shape
        ctx.save_for_backward(fields)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (fields,) = ctx.saved_tensors
        book = torch.arange(ctx.shape[0], device=fields.device).expand_as(fields)
        places = torch.stack([book.flatten(), fields.flatten()])
        return torch.sparse_coo_tensor(places, gradient.flatten(0, 1), ctx.shape, check_invariants=False), None


class LevelsDecoder(Decoder):
    """A value is a small integer times a scale plus an offset, a level of a table times a scale, or a float of 16 bits.

    The tensors are ``scale`` and ``offset``: of shape (dim,) by column. By row and block they live in the rows, as
    float16 or one byte; trainable ones are lifted out of them, of shape (n_rows, n_blocks). A symmetric decoder trains
    its scale alone. ``levels``, of shape (2**bits,), is the table; where rows have levels of their own, ``own``, of
    shape (n_rows, 16 * n_blocks), is what they train.
    """

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, tensors, trainable)
        self.description = dict(description)
        self.beside = trainable
        """Whether what rows hold behind their levels stands in tensors of its own."""

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """Scales and offsets: by column as stored, by row and block read from the rows."""
        if description["dtype"] in _FLOATS:
            raise ValueError(
                f"a {description['dtype']} table has no codebooks or scales to train: use a method that has "
                "(method='product'), or train a torch.nn.Embedding"
            )
        table = {"levels": stored["levels"].clone()} if _is_table(description) else {}
        if description["granularity"] == "column":
            return table | {name: stored[name].clone() for name in _trained(description)}
        return table | _values_in_rows(description, codes)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Tables, and by column the scales and offsets."""
        if not self.trainable:
            return dict(self.named_buffers())
        stored = {"levels": self.levels.detach().float()} if _is_table(self.description) else {}
        if self.description["granularity"] == "column":
            scale, offset = self._present_scales()
            stored |= {"scale": scale} if stored else {"scale": scale, "offset": offset}
        _refuse_unstorable(*stored.values())
        return stored

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Codes with the present scales and offsets in the rows, where they live there."""
        if not self.trainable or self.description["granularity"] == "column":
            return codes
        if self.description["dtype"] == "free4":
            own = (self.own.detach().float() / self.description["scale_factor"]).half()
            _refuse_unstorable(own)
            return torch.cat([codes[:, : _level_bytes(self.description)], own.contiguous().view(torch.uint8)], 1)
        return _rows_with_scales(self.description, codes, *self._present_scales())

    def _present_scales(self) -> tuple[Tensor, Tensor]:
        scale = self.scale.detach().float()
        return scale, self._symmetric_offset(scale) if self.description["symmetric"] else self.offset.detach().float()

    def values_of_rows(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scales and offsets, or levels of a row's own; none by column."""
        if not self.trainable or self.description["granularity"] == "column":
            return []
        values = _values_in_rows(self.description, codes)
        return [(getattr(self, name), value) for name, value in values.items()]

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        if self.description["dtype"] in _FLOATS:
            return (codes if codes.is_floating_point() else _floats_of(codes.contiguous(), self._float_type())).float()
        places = unpack_bits(codes, _level_bits(self.description), self.dim)
        if self.description["dtype"] == "free4":
            own = self._of_rows("own", "scale_factor", ids) if self.beside else _own_levels(self.description, codes)
            size = self.description["block_size"] if self.description["granularity"] == "block" else self.dim
            return own.gather(1, places.long() + 16 * (torch.arange(self.dim, device=codes.device) // size))
        scale, offset = self._scales(codes, ids)
        if _is_table(self.description):
            return F.embedding(places, self.levels[:, None]).squeeze(2) * scale
        levels = places.to(scale.dtype)
        # The product is exact for scales of float16, so that this is the one rounding of a fused multiply-add.
        return torch.addcmul(offset, levels, scale)

    def _scales(self, codes: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of every value: of shapes that broadcast to (n, dim)."""
        if self.description["granularity"] == "column":
            scale = self.scale
            offset = self._symmetric_offset(scale) if self.description["symmetric"] else self.offset
            return scale, offset
        if not self.beside:
            scale, offset = _scales_of_rows(self.description, codes)
        else:
            scale = self._of_rows("scale", "scale_factor", ids)
            symmetric = self.description["symmetric"]
            offset = self._symmetric_offset(scale) if symmetric else self._of_rows("offset", "offset_factor", ids)
        if self.description["granularity"] == "row":
            return scale, offset
        size = self.description["block_size"]
        return tuple(value[:, :, None].expand(-1, -1, size).flatten(1)[:, : self.dim] for value in (scale, offset))

    def _of_rows(self, name: str, factor: str, ids: Tensor) -> Tensor:
        """What stands beside the codes for these rows, by its real value."""
        values = F.embedding(ids, getattr(self, name), sparse=self.sparse)
        if self.trainable:
            return values
        if values.dtype == torch.uint8:
            values = F.embedding(values.int(), self.bytes_as_floats[:, None]).squeeze(-1)
        return values.float() * self.description[factor]

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """What stands behind the levels becomes tensors; rows of floats become floats."""
        description = self.description
        if description["dtype"] in _FLOATS:
            return self, codes.contiguous().view(self._float_type())
        if description["granularity"] == "column":
            return self, codes
        levels = codes[:, : _level_bytes(description)].contiguous()
        if self.trainable:
            return self, levels
        behind = _behind(description, codes)
        tensors = dict(self.named_buffers())
        if description["dtype"] == "free4":
            tensors["own"] = behind.view(torch.float16)
        elif _in_bytes(description):
            tensors["scale"] = behind
            tensors["bytes_as_floats"] = _bytes_as_floats(torch.arange(256)).float()
        elif description["symmetric"]:
            tensors["scale"] = behind.view(torch.float16)
        else:
            pairs = behind.view(torch.float16)
            tensors |= {"scale": pairs[:, 0::2].contiguous(), "offset": pairs[:, 1::2].contiguous()}
        decoder = LevelsDecoder(description, tensors, trainable=False)
        decoder.beside = True
        return decoder, levels

    def _float_type(self) -> torch.dtype:
        return _FLOATS[self.description["dtype"]]

    def _symmetric_offset(self, scale: Tensor) -> Tensor:
        return -scale * 2 ** (_level_bits(self.description) - 1)


class LinearDecoder(Decoder):
    """The rows of another decoder, turned back, plus a mean row.

    The tensors are ``mean`` of shape (dim,), ``rotation`` of shape (n_inner_columns, dim) where it is stored, and those
    of the module ``inner``.
    """

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, _own(tensors), trainable)
        self.rotation_kind: dict[str, Any] = description["rotation"]
        if self.rotation_kind["kind"] == "hadamard":
            signs = _signs(self.dim, self.rotation_kind["seed"], self.rotation_kind["rounds"])
            self.register_buffer("signs", signs, persistent=False)
        self.inner = FORMS[description["inner"]["form"]](description["inner"], _inner(tensors, "inner."), trainable)

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """Mean and rotation as float32, and what trains of the decoder inside, if it has any."""
        inner = description["inner"]
        values = FORMS[inner["form"]].real_values(inner, _inner(stored, "inner."), codes)
        own = {name: tensor.float() for name, tensor in _own(stored).items()}
        if "rotation_scale" in own:
            own["rotation"] = own["rotation"] * own.pop("rotation_scale")[:, None]
        return own | {f"inner.{name}": value for name, value in values.items()}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Tensors of the decoder inside, the mean, and the rotation in its stored type."""
        stored = {f"inner.{name}": value for name, value in self.inner.stored_tensors().items()}
        own = {name: tensor.detach() for name, tensor in self._own_tensors()}
        if self.trainable:
            own = {name: tensor.float() for name, tensor in own.items()}  # after half() and double() too
        if self.trainable and "rotation" in own:
            dtype = self.rotation_kind["dtype"]
            if dtype == "int8":
                scale = own["rotation"].abs().amax(1) / 127
                levels = own["rotation"] / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
                own |= {"rotation": levels.round().to(torch.int8), "rotation_scale": scale}
            else:
                own["rotation"] = own["rotation"].to(getattr(torch, dtype))
            _refuse_unstorable(*own.values())
        return stored | {name.replace("_", "."): tensor for name, tensor in own.items()}

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Codes of the decoder inside."""
        return self.inner.stored_codes(codes)

    def values_of_rows(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Those of the decoder inside."""
        return self.inner.values_of_rows(codes)

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        own = itertools.chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        return ((name, tensor) for name, tensor in own if name != "signs")

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        rows = self.inner(codes, ids)
        if self.rotation_kind["kind"] == "matrix":
            matrix = self.rotation.to(rows.dtype)
            if hasattr(self, "rotation_scale"):
                matrix = matrix * self.rotation_scale[:, None]
            rows = rows @ matrix
        elif self.rotation_kind["kind"] == "hadamard":
            rows = _turn_back(rows, self.signs, self.dim)
        return rows + self.mean if hasattr(self, "mean") else rows

    def inverse(self, rows: Tensor) -> Tensor:
        """What the decoder inside should give for these rows, (n, dim): (n, n_inner_columns), by least squares."""
        rows = (rows - self.mean if hasattr(self, "mean") else rows).double()
        if self.rotation_kind["kind"] == "matrix":
            matrix = self.rotation.double()
            if hasattr(self, "rotation_scale"):
                matrix = matrix * self.rotation_scale[:, None]
            return rows @ torch.linalg.pinv(matrix)
        if self.rotation_kind["kind"] == "hadamard":
            unit = torch.eye(self.dim, dtype=rows.dtype, device=rows.device)
            return rows @ _turn_back(unit, self.signs, self.dim).T
        return rows

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """That of the decoder inside."""
        inner, codes = self.inner.lifted(codes)
        return _with_children(self, inner=inner), codes


class JoinDecoder(Decoder):
    """The rows of several decoders, the modules ``parts``, side by side or added."""

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, {}, trainable)
        self.mode: str = description["mode"]
        self.sizes = [row_bytes(part) for part in description["parts"]]
        parts = enumerate(description["parts"])
        modules = [FORMS[part["form"]](part, _inner(tensors, f"parts.{n}."), trainable) for n, part in parts]
        self.parts = nn.ModuleList(modules)

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """What trains of the parts."""
        sizes = [row_bytes(part) for part in description["parts"]]
        values: dict[str, Tensor] = {}
        for number, (part, cut) in enumerate(zip(description["parts"], codes.split(sizes, 1), strict=True)):
            found = FORMS[part["form"]].real_values(part, _inner(stored, f"parts.{number}."), cut)
            values |= {f"parts.{number}.{name}": value for name, value in found.items()}
        return values

    def stored_tensors(self) -> dict[str, Tensor]:
        """Tensors of the parts."""
        return _stored_tensors_of("parts", self.parts)

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Codes of the parts, side by side."""
        cuts = codes.split(self.sizes, 1)
        pieces = [part.stored_codes(cut) for part, cut in zip(self.parts, cuts, strict=True)]
        return codes if all(piece is cut for piece, cut in zip(pieces, cuts, strict=True)) else torch.cat(pieces, 1)

    def values_of_rows(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Those of the parts."""
        cuts = zip(self.parts, codes.split(self.sizes, 1), strict=True)
        return [pair for part, cut in cuts for pair in part.values_of_rows(cut)]

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        cuts = codes.split(self.sizes, 1)
        rows = [part(cut, ids) for part, cut in zip(self.parts, cuts, strict=True)]
        return torch.cat(rows, 1) if self.mode == "columns" else functools.reduce(torch.add, rows)

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """Those of the parts."""
        pairs = [part.lifted(cut) for part, cut in zip(self.parts, codes.split(self.sizes, 1), strict=True)]
        parts = _with_children(self, parts=nn.ModuleList(part for part, _ in pairs))
        parts.sizes = [cut.shape[1] for _, cut in pairs]
        if not all(cut.dtype == torch.uint8 for _, cut in pairs):
            raise ValueError("rows of floats beside other codes cannot be exported to ONNX: use another residual=")
        return parts, torch.cat([cut for _, cut in pairs], 1)


class TrellisDecoder(Decoder):
    """A row is a circular stream of bits, and each column reads a window of it that picks a level.

    The tensors are ``columns``, the scale of each column, and ``scales``, from which rows choose. Levels are fixed.
    """

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, tensors, trainable)
        self.state_bits: int = description["state_bits"]
        self.scale_bits: int = description["scale_bits"]
        starts, tables, self.n_bits = trellis_layout(description)
        levels = [torch.from_numpy(trellis_levels(self.state_bits, n)) for n in range(int(tables.max()) + 1)]
        self.register_buffer("starts", torch.from_numpy(starts), persistent=False)
        self.register_buffer("first_levels", torch.from_numpy(tables << self.state_bits), persistent=False)
        self.register_buffer("levels", torch.cat(levels), persistent=False)

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """The scales as they are."""
        return {name: tensor.clone() for name, tensor in stored.items()}

    def stored_tensors(self) -> dict[str, Tensor]:
        """The scales as float32."""
        scales = {"columns": self.columns.detach().float(), "scales": self.scales.detach().float()}
        _refuse_unstorable(*scales.values())
        return scales

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        if torch.onnx.is_in_onnx_export():
            return self._decode_bits(_gather_bits(codes, 1, self.n_bits + self.scale_bits))
        places = self.starts % self.n_bits
        states = torch.zeros((codes.shape[0], self.dim), dtype=torch.int64, device=codes.device)
        for bit in range(self.state_bits):
            at = (places + bit) % self.n_bits
            states |= ((codes[:, at // 8] >> (at % 8)) & 1).long() << bit
        levels = F.embedding(self.first_levels + states, self.levels[:, None]).squeeze(2).to(self.columns.dtype)
        number = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)
        for bit in range(self.scale_bits):
            at = self.n_bits + bit
            number |= ((codes[:, at // 8] >> (at % 8)) & 1).long() << bit
        return levels * self.columns * F.embedding(number, self.scales[:, None])

    def _decode_bits(self, bits: Tensor) -> Tensor:
        """``forward``, of bits (n, n_bits + scale_bits)."""
        window = (self.starts[:, None] + torch.arange(self.state_bits, device=bits.device)) % self.n_bits
        states = _sum_of_bits(bits.index_select(1, window.flatten()).reshape(-1, self.dim, self.state_bits))
        levels = F.embedding(self.first_levels.int() + states, self.levels[:, None]).squeeze(2).to(self.columns.dtype)
        number = _sum_of_bits(bits[:, self.n_bits :]) if self.scale_bits else torch.zeros_like(bits[:, 0])
        return levels * self.columns * F.embedding(number, self.scales[:, None])


class SegmentsDecoder(Decoder):
    """Groups of rows with a decoder each, the modules ``groups``.

    It reads the codes of the whole table: those of one row are not beside its number.
    """

    rows_apart = False

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, {}, trainable)
        self.counts = [group["rows"] for group in description["groups"]]
        self.sizes = [row_bytes(group["decoder"]) for group in description["groups"]]
        packed = tensors.get("map")
        self.register_buffer("map", packed)
        group_of = torch.from_numpy(groups_of_rows(description, None if packed is None else packed.numpy()))
        # A row's number within its group: how many of that group stand before it.
        rank = torch.empty_like(group_of)
        for number, count in enumerate(self.counts):
            rank[group_of == number] = torch.arange(count)
        self.register_buffer("group_of", group_of, persistent=False)
        self.register_buffer("rank", rank, persistent=False)
        groups = [group["decoder"] for group in description["groups"]]
        inner = (_inner(tensors, f"groups.{number}.") for number in range(len(groups)))
        self.groups = nn.ModuleList(
            FORMS[group["form"]](group, held, trainable) for group, held in zip(groups, inner, strict=True)
        )

    def _cut(self, codes: Tensor) -> list[Tensor]:
        """The codes of each group."""
        return _codes_of_groups(codes, self.counts, self.sizes)

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """What trains of the groups, and the map."""
        groups = [group["decoder"] for group in description["groups"]]
        counts = [group["rows"] for group in description["groups"]]
        values = {"map": stored["map"]} if "map" in stored else {}
        cuts = _codes_of_groups(codes, counts, [row_bytes(group) for group in groups])
        for number, (group, cut) in enumerate(zip(groups, cuts, strict=True)):
            found = FORMS[group["form"]].real_values(group, _inner(stored, f"groups.{number}."), cut)
            values |= {f"groups.{number}.{name}": value for name, value in found.items()}
        return values

    def stored_tensors(self) -> dict[str, Tensor]:
        """Tensors of the groups, and the map."""
        return _stored_tensors_of("groups", self.groups) | ({} if self.map is None else {"map": self.map})

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Codes of the groups, one after the other."""
        cuts = self._cut(codes)
        pieces = [group.stored_codes(cut) for group, cut in zip(self.groups, cuts, strict=True)]
        if all(piece is cut for piece, cut in zip(pieces, cuts, strict=True)):
            return codes
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        return F.pad(flat, (0, codes.numel() - flat.numel())).reshape(codes.shape)

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`. ``codes`` are those of all rows of the table."""
        group_of, rank = self.group_of[ids], self.rank[ids]
        rows: Tensor | None = None
        for number, (group, cut) in enumerate(zip(self.groups, self._cut(codes), strict=True)):
            # Rows of other groups are read as row 0 and not taken: shapes then do not depend on values.
            own = group_of == number
            local = torch.where(own, rank, 0)
            part = group(F.embedding(local, cut), local) if len(cut) else None
            if part is not None:
                rows = part if rows is None else torch.where(own[:, None], part, rows)
        assert rows is not None
        return rows

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """Refused: a row's number would need tables of its own, larger than its code."""
        raise ValueError(
            "a table of groups of rows (MixedPrecisionQuantizer) cannot be exported to ONNX: make a module of one "
            "kind, with from_pretrained(module.weight, method=…)"
        )


class SparseDecoder(Decoder):
    """A row is a few values with their columns. Trainable, the values are the parameter ``values``, (n_rows, kept)."""

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, tensors, trainable)
        self.description = dict(description)

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """The values that rows keep."""
        return {"values": _kept_values(description, codes)}

    def stored_tensors(self) -> dict[str, Tensor]:
        """None: all lives in the rows."""
        return {}

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Codes with the present values in the rows."""
        if not self.trainable:
            return codes
        values = self.values.detach().float()
        factor, dtype = self.description["scale_factor"], self.description["dtype"]
        if dtype == "int8":
            scale = (values.abs().amax(1, keepdim=True) / 127 / factor).half()
            step = (scale.float() * factor).clamp(min=torch.finfo(torch.float32).tiny)
            levels = (values / step).round().clamp(-127, 127).to(torch.int8)
            stored = [levels.view(torch.uint8), scale.view(torch.uint8)]
            _refuse_unstorable(scale)
        else:
            kept = (values / factor).half() if dtype == "float16" else values
            stored = [kept.contiguous().view(torch.uint8)]
            _refuse_unstorable(kept)
        return torch.cat([codes[:, : _place_bytes(self.description)], *stored], 1)

    def values_of_rows(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The values that rows keep."""
        return [(self.values, _kept_values(self.description, codes))] if self.trainable else []

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        values = self._values(ids) if hasattr(self, "values") else _kept_values(self.description, codes)
        columns = self._columns(codes).long()
        # One column more takes what stands outside the row.
        rows = torch.zeros(codes.shape[0], self.dim + 1, dtype=values.dtype, device=codes.device)
        return rows.scatter_add(1, columns, values)[:, : self.dim]

    def _values(self, ids: Tensor) -> Tensor:
        """The values of rows where they stand beside the codes."""
        values = F.embedding(ids, self.values, sparse=self.sparse)
        if self.trainable:
            return values
        factor = self.description["scale_factor"] if self.description["dtype"] != "float32" else 1.0
        return values.float() * (F.embedding(ids, self.scale).float() * factor if hasattr(self, "scale") else factor)

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """The values, and scales of rows, become tensors."""
        n_bytes, dtype, kept = _place_bytes(self.description), self.description["dtype"], self.description["kept"]
        places, stored = (
            codes[:, :n_bytes].contiguous(),
            codes[:, n_bytes:].clone(memory_format=torch.contiguous_format),
        )
        if self.trainable:
            return self, places
        if dtype == "int8":
            scale = stored[:, kept:].clone(memory_format=torch.contiguous_format).view(torch.float16)
            tensors = {"values": stored[:, :kept].contiguous().view(torch.int8), "scale": scale}
        else:
            tensors = {"values": stored.view(getattr(torch, dtype))}
        return SparseDecoder(self.description, tensors, trainable=False), places

    def _columns(self, codes: Tensor) -> Tensor:
        """The column of each kept value, int64 (n, kept); ``dim`` where there is none."""
        kept, places = self.description["kept"], codes[:, : _place_bytes(self.description)]
        if self.description["places"] == "columns":
            return unpack_bits(places, _place_bits(self.dim), kept).clamp(max=self.dim)
        present = unpack_bits(places, 1, self.dim)
        rank = torch.where(present > 0, present.cumsum(1) - 1, kept).clamp(max=kept)
        numbers = torch.arange(self.dim, device=codes.device).expand_as(rank)
        columns = torch.full((codes.shape[0], kept + 1), self.dim, dtype=torch.int64, device=codes.device)
        return columns.scatter(1, rank, numbers)[:, :kept]


class HashedDecoder(Decoder):
    """A row is a sum of pieces of arrays, ``arrays_0``, ``arrays_1``, …, that the row's number (or its code) picks."""

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, tensors, trainable)
        self.bits: int = description["bits"]
        self.first = _signed(description["first"])
        self.terms: list[dict[str, Any]] = description["terms"]
        self.n_fields = 8 * row_bytes(description) // self.bits if self.bits else 0

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """The arrays themselves."""
        if wrong := {str(tensor.dtype) for tensor in stored.values()} - {"torch.float32"}:
            raise ValueError(f"arrays of {', '.join(sorted(wrong))} are not trained: train the module they came from")
        return {name: tensor.clone() for name, tensor in stored.items()}

    def stored_tensors(self) -> dict[str, Tensor]:
        """The arrays."""
        own = itertools.chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        stored = {name.replace("_", "."): tensor.detach() for name, tensor in own}
        if self.trainable:
            stored = {name: tensor.float() for name, tensor in stored.items()}  # after half() and double() too
            _refuse_unstorable(*stored.values())
        return stored

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        ids = ids.long() + self.first
        fields = unpack_bits(codes, self.bits, self.n_fields) if self.n_fields else codes
        rows: Tensor | None = None
        for terms in _layers(self.terms):
            pieces = [self._piece(term, ids, fields) for term in terms]
            start, end = terms[0]["start"], terms[-1]["start"] + terms[-1]["width"]
            multiply = terms[0].get("multiply", False)
            # Nothing changes by being added to this zero, a zero's sign neither.
            layer = F.pad(torch.cat(pieces, 1), (start, self.dim - end), value=1.0 if multiply else -0.0)
            rows = layer if rows is None else rows * layer if multiply else rows + layer
        assert rows is not None
        return rows

    def _piece(self, term: Mapping[str, Any], ids: Tensor, fields: Tensor) -> Tensor:
        """What a term adds, (n, width)."""
        piece = self._values(term["piece"], term["width"], ids, fields)
        if "sign" in term:
            piece = piece * hash_signs(ids, torch.tensor(_signed(term["sign"]), device=ids.device))[:, None]
        return piece * self._values(term["weight"], 1, ids, fields) if "weight" in term else piece

    def _values(self, piece: Mapping[str, Any], width: int, ids: Tensor, fields: Tensor) -> Tensor:
        """Pieces of an array, (n, width)."""
        place, array = piece["place"], getattr(self, f"arrays_{piece['array']}").reshape(-1)
        if place["kind"] == "hash":
            at = hash_ids(ids, torch.tensor(_signed(place["seed"]), device=ids.device), place["size"])
        elif place["kind"] == "digit":
            at = ids // place["divisor"] % place["size"]
        else:
            at = fields[:, place["field"]].clamp(max=place["size"] - 1)
        start = at * piece["stride"] + piece["offset"]
        if any(number % width for number in (piece["stride"], piece["offset"], array.numel())):
            values = F.embedding(start[:, None] + torch.arange(width, device=ids.device), array[:, None]).squeeze(2)
        else:
            values = F.embedding(start // width, array.reshape(-1, width))
        return values if self.trainable else values.float()

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """Refused: programs of ONNX have no 64-bit shifts and products to hash with."""
        raise _unexportable("hashed")


def _without_second_names(module: SwitchDecoder, state: dict[str, Any], prefix: str, _: Any) -> None:
    """States hold shared tensors once, by the name that torch gives them."""
    named = {name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())}
    for name in itertools.chain.from_iterable(module.shared):
        if name not in named:
            state.pop(prefix + name, None)


def _layers(terms: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Terms of columns that lie side by side."""
    layer = terms[:1]
    for last, term in itertools.pairwise(terms):
        beside = term["start"] == last["start"] + last["width"]
        if not (beside and term.get("multiply", False) == last.get("multiply", False)):
            yield layer
            layer = []
        layer.append(term)
    yield layer


def _signed(number: int) -> int:
    """64 bits as torch holds them."""
    return number - 2**64 if number >= 2**63 else number


def _unexportable(form: str) -> ValueError:
    return ValueError(
        f"rows of the form {form!r} are computed from their numbers, which ONNX cannot: export a module of the decoded "
        "rows, from_pretrained(module.weight, method=…)"
    )


class _Case(nn.Module):
    """Some rows of a switch: where they stand, their codes and what reads them."""

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__()
        inner = description["decoder"]
        self.start, self.rows = description.get("start"), description["rows"]
        self.decoder = FORMS[inner["form"]](inner, _inner(tensors, "decoder."), trainable)
        self.register_buffer("ids", tensors.get("ids"))
        self.register_buffer("codes", tensors.get("codes"))
        numbers = None
        if self.ids is not None:
            if self.ids.numel() != (self.rows * description["bits"] + 7) // 8:
                raise ValueError(f"{self.ids.numel()} bytes do not hold {self.rows} ids of {description['bits']} bits")
            numbers = unpack_bits(self.ids[None], description["bits"], self.rows)[0]
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids belong to the case, and rows, of which those of other ids are not to be taken."""
        if self.numbers is None:
            place = ids - self.start
            own = (place >= 0) & (place < self.rows)
        else:
            place = torch.searchsorted(self.numbers, ids).clamp(max=self.rows - 1)
            own = self.numbers[place] == ids
        place = torch.where(own, place, 0)
        codes = ids.new_empty((len(ids), 0), dtype=torch.uint8)
        return own, self.decoder(codes if self.codes is None else F.embedding(place, self.codes), place)


class SwitchDecoder(Decoder):
    """Rows that are read in different ways: the modules ``cases``, and ``otherwise`` for all other rows."""

    def __init__(self, description: Mapping[str, Any], tensors: Tensors, trainable: bool) -> None:
        super().__init__(description, {}, trainable)
        self.shared = [(_held_name(name), _held_name(held)) for name, held in description["shared"].items()]
        # torch names one of two modules that share a tensor, whichever comes first.
        pairs = [both for pair in self.shared for both in (pair, pair[::-1])]
        tensors = {**{name: tensors[held] for name, held in pairs if held in tensors}, **tensors}
        self.cases = nn.ModuleList(
            _Case(case, _inner(tensors, f"cases.{number}."), trainable)
            for number, case in enumerate(description["cases"])
        )
        otherwise = description["otherwise"]
        self.otherwise = otherwise and FORMS[otherwise["form"]](otherwise, _inner(tensors, "otherwise."), trainable)
        self._share()
        self._register_state_dict_hook(_without_second_names)

    def _share(self) -> None:
        """Tensors that are stored once are one tensor."""
        for name, held in self.shared:
            (module, own), (other, its) = (
                (self.get_submodule(path), leaf) for path, _, leaf in (name.rpartition("."), held.rpartition("."))
            )
            setattr(module, own, getattr(other, its))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """What is shared stays so."""
        super()._apply(fn, recurse)
        self._share()
        return self

    @staticmethod
    def real_values(description: Mapping[str, Any], stored: Tensors, codes: Tensor) -> dict[str, Tensor]:
        """What trains of the cases, their numbers and their codes."""
        shared = {_held_name(name): _held_name(held) for name, held in description["shared"].items()}
        stored = {**stored, **{name: stored[held] for name, held in shared.items()}}
        pairs = [(f"cases.{number}.", case["decoder"]) for number, case in enumerate(description["cases"])]
        values: dict[str, Tensor] = {}
        for prefix, inner in pairs:
            own = {prefix + name: stored[prefix + name] for name in ("ids", "codes") if prefix + name in stored}
            held = own.get(prefix + "codes", codes[:, :0])
            found = FORMS[inner["form"]].real_values(inner, _inner(stored, f"{prefix}decoder."), held)
            values |= own | {f"{prefix}decoder.{name}": value for name, value in found.items()}
        if (inner := description["otherwise"]) is not None:
            found = FORMS[inner["form"]].real_values(inner, _inner(stored, "otherwise."), codes)
            values |= {f"otherwise.{name}": value for name, value in found.items()}
        return {name: value for name, value in values.items() if name not in shared}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Tensors and codes of the cases."""
        stored = {}
        for number, case in enumerate(self.cases):
            if case.ids is not None:
                stored[f"cases.{number}.ids"] = case.ids
            if case.codes is not None:
                stored[f"cases.{number}.codes"] = case.decoder.stored_codes(case.codes)
            inner = case.decoder.stored_tensors()
            stored |= {f"cases.{number}.decoder.{name}": value for name, value in inner.items()}
        if self.otherwise is not None:
            stored |= {f"otherwise.{name}": value for name, value in self.otherwise.stored_tensors().items()}
        shared = {name for name, _ in self.shared}
        return {name: value for name, value in stored.items() if _held_name(name) not in shared}

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Codes of the rows that are in no case."""
        return codes if self.otherwise is None else self.otherwise.stored_codes(codes)

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Decode rows; see :meth:`Decoder.forward`."""
        rows: Tensor | None = None if self.otherwise is None else self.otherwise(codes, ids)
        # Every case reads all ids, so that shapes do not depend on values; the first one that has a row counts.
        for case in reversed(self.cases):
            own, part = case(ids.long())
            rows = torch.where(own[:, None], part, torch.zeros_like(part) if rows is None else rows)
        assert rows is not None
        return rows

    def lifted(self, codes: Tensor) -> tuple[Decoder, Tensor]:
        """Refused, as for the form ``hashed``."""
        raise _unexportable("switch")


def _place_bits(dim: int) -> int:
    """Bits of a column's number."""
    return max(math.ceil(math.log2(dim)), 1)


def _place_bytes(description: Mapping[str, Any]) -> int:
    """Bytes of a row that say which columns it keeps."""
    dim, kept = description["dim"], description["kept"]
    bits = dim if description["places"] == "bitmap" else kept * _place_bits(dim)
    return (bits + 7) // 8


def _kept_values(description: Mapping[str, Any], codes: Tensor) -> Tensor:
    """The values that rows keep, float32 (n_rows, kept)."""
    kept, factor = description["kept"], description["scale_factor"]
    # The clones start at even addresses, which a slice of bytes need not.
    stored = codes[:, _place_bytes(description) :].clone(memory_format=torch.contiguous_format)
    if description["dtype"] == "float32":
        return _floats_of(stored, torch.float32)
    if description["dtype"] == "float16":
        return _floats_of(stored, torch.float16).float() * factor
    scale = stored[:, kept:].clone(memory_format=torch.contiguous_format).view(torch.float16).float() * factor
    return stored[:, :kept].contiguous().view(torch.int8).float() * scale


def _scales_of_groups(description: Mapping[str, Any], stored: Tensors) -> dict[str, Any]:
    """What the entries of each group are multiplied by: one number, or one a book, of shape (n_books, 1, 1)."""
    groups = description["groups"]
    names = [f"codebooks_{group}" for group in range(len(groups))]
    if "scales" not in stored:
        return dict.fromkeys(names, float(description["scale"]))
    parts = stored["scales"].split([len(group["starts"]) for group in groups])
    return {name: part[:, None, None] for name, part in zip(names, parts, strict=True)}


def _scale_of_integers(books: Tensor) -> Tensor:
    """The scale of each book of integers, as the core rounds it: up, to 16 significant bits."""
    largest = books.float().abs().amax((1, 2), keepdim=True)
    bits = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny).view(torch.int32)
    return ((bits + 0xFF) & ~0xFF).view(torch.float32)


def _is_table(description: Mapping[str, Any]) -> bool:
    """Whether levels are places in the decoder's own table."""
    return str(description["dtype"]).startswith("table")


def _trained(description: Mapping[str, Any]) -> tuple[str, ...]:
    """What of scale and offset is trained."""
    return ("scale",) if description["symmetric"] else ("scale", "offset")


def _level_bits(description: Mapping[str, Any]) -> int:
    """Bits of a level: int4, table4, free4."""
    return int(description["dtype"][-1])


def _behind(description: Mapping[str, Any], codes: Tensor) -> Tensor:
    """What stands behind the levels of the rows."""
    # The clone starts at an even address, which a slice of bytes need not.
    return codes[:, _level_bytes(description) :].clone(memory_format=torch.contiguous_format)


def _own_levels(description: Mapping[str, Any], codes: Tensor) -> Tensor:
    """Levels of the rows' own, float32 (n_rows, 16 * n_blocks)."""
    return _floats_of(_behind(description, codes), torch.float16).float() * description["scale_factor"]


def _floats_of(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats that integers hold."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError("ONNX cannot see bytes as floats: export with vqrs.torch.onnx.export, or within exportable()")
    return stored.view(dtype)


def _values_in_rows(description: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
    """What rows hold behind their levels and train: levels of their own, or scales and offsets."""
    if description["dtype"] == "free4":
        return {"own": _own_levels(description, codes)}
    pairs = dict(zip(("scale", "offset"), _scales_of_rows(description, codes), strict=True))
    return {name: pairs[name] for name in _trained(description)}


def _bytes_as_floats(stored: Tensor) -> Tensor:
    """The float16 of the scales that take one byte."""
    return _floats_of(stored.short() << 6, torch.float16)


def _in_bytes(description: Mapping[str, Any]) -> bool:
    """Whether scales take one byte: the bits 6 to 13 of a float16."""
    return description.get("scale_dtype", "float16") == "float8"


FORMS: dict[str, type[Decoder]] = {
    "books": BooksDecoder,
    "levels": LevelsDecoder,
    "linear": LinearDecoder,
    "join": JoinDecoder,
    "trellis": TrellisDecoder,
    "segments": SegmentsDecoder,
    "sparse": SparseDecoder,
    "hashed": HashedDecoder,
    "switch": SwitchDecoder,
}


def _codes_of_groups(codes: Tensor, counts: list[int], sizes: list[int]) -> list[Tensor]:
    """The codes of each group, rows of their own length."""
    lengths = [count * size for count, size in zip(counts, sizes, strict=True)]
    cuts = codes.reshape(-1)[: sum(lengths)].split(lengths)
    return [cut.reshape(count, size) for cut, count, size in zip(cuts, counts, sizes, strict=True)]


def _stored_tensors_of(name: str, decoders: nn.ModuleList) -> dict[str, Tensor]:
    """The stored tensors of several decoders, under their numbers."""
    return {
        f"{name}.{number}.{key}": value
        for number, decoder in enumerate(decoders)
        for key, value in decoder.stored_tensors().items()
    }


def _own(tensors: Tensors) -> dict[str, Tensor]:
    """Those that belong to no decoder inside."""
    return {name: tensor for name, tensor in tensors.items() if "." not in name}


def _inner(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """Those whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _held_name(name: str) -> str:
    """A name that torch allows: dots only between modules."""
    modules = re.match(r"(?:inner\.|otherwise\.|(?:parts|groups)\.\d+\.|cases\.\d+\.(?:decoder\.)?)*", name)
    assert modules is not None
    return modules[0] + name[modules.end() :].replace(".", "_")


def _with_children(decoder: Decoder, **children: nn.Module) -> Decoder:
    """A copy that shares all but these children."""
    copied = copy.copy(decoder)
    copied._modules = decoder._modules | children
    return copied


@functools.lru_cache(maxsize=64)
def _signs_of(dim: int, seed: int, passes: int) -> Tensor:
    return torch.tensor([[random_sign(seed, turn * dim + place) for place in range(dim)] for turn in range(passes)])


def _signs(dim: int, seed: int, rounds: int) -> Tensor:
    """The signs of each pass: two passes a round, unless one reaches all columns."""
    is_power = dim & (dim - 1) == 0
    return _signs_of(dim, seed, rounds if is_power else 2 * rounds).float()


def _turn_back(rows: Tensor, signs: Tensor, dim: int) -> Tensor:
    """Signs, then Walsh-Hadamard, of the first and of the last 2**k columns in turns; undone from the last one on."""
    size = 2 ** math.floor(math.log2(dim))
    passes = list(enumerate(signs.unbind()))
    for number, signs_of_pass in reversed(passes):
        start = dim - size if number % 2 else 0
        turned = _hadamard(rows[:, start : start + size], size)
        if size < dim:
            turned = torch.cat([rows[:, :start], turned, rows[:, start + size :]], 1)
        rows = turned * signs_of_pass.to(rows.dtype)
    return rows


def _hadamard(rows: Tensor, size: int) -> Tensor:
    """Walsh-Hadamard transform of each row of this size, over its root."""
    n_rows = rows.shape[0]
    if torch.onnx.is_in_onnx_export():  # two small products are a shorter graph than all the sums
        low = 1 << (size.bit_length() // 2)
        squares = rows.reshape(-1, size // low, low)
        return (_hadamard_matrix(size // low) @ squares @ _hadamard_matrix(low)).reshape(-1, size) / math.sqrt(size)
    half = 1
    while half < size:
        low, high = rows.reshape(n_rows, -1, 2, half).unbind(2)
        rows = torch.stack([low + high, low - high], 2).reshape(n_rows, size)
        half *= 2
    return rows * (1.0 / math.sqrt(size))


def _hadamard_matrix(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def decoder_from_parts(
    description: Mapping[str, Any], tensors: Tensors, codes: Tensor, trainable: bool = False
) -> Decoder:
    """The module of a decoder's form.

    Parameters
    ----------
    description : mapping
        The decoder's description, as in ``Table.info()["decoder"]``.
    tensors : mapping of str to Tensor
        The decoder's tensors as stored.
    codes : uint8 tensor of shape (n_rows, row_bytes)
        All rows of the table. Only trainable scales that live in the rows are read from it.
    trainable : bool, default=False
        Whether the tensors become parameters: float32, in the units of the rows.

    Returns
    -------
    Decoder

    Raises
    ------
    ValueError
        If torch has no module of this form, or the form has nothing to train.

    Examples
    --------
    >>> description = {"form": "books", "dim": 2, "bits": 1, "scale": 0.5, "dtype": "float32",
    ...                "groups": [{"width": 1, "starts": [0, 1]}]}
    >>> books = {"codebooks.0": torch.tensor([[[2.0], [4.0]], [[6.0], [8.0]]])}
    >>> codes = torch.tensor([[0b00], [0b01], [0b10]], dtype=torch.uint8)
    >>> decoder_from_parts(description, books, codes)(codes, torch.arange(3))
    tensor([[1., 3.],
            [2., 3.],
            [1., 4.]])
    """
    form = FORMS.get(description["form"])
    if form is None:
        raise ValueError(f"torch cannot read the decoder form {description['form']!r}: it knows {sorted(FORMS)}")
    held = {_held_name(name): tensor for name, tensor in tensors.items()}
    if trainable:
        held = form.real_values(description, held, codes)
    return form(description, held, trainable)


def _runs(starts: list[int], width: int) -> list[tuple[int, int, int]]:
    """(first book, number of books, first column) of each stretch of books that lie side by side."""
    runs: list[tuple[int, int, int]] = []
    for book, start in enumerate(starts):
        first, count, column = runs[-1] if runs else (0, 0, -1)
        if runs and start == column + count * width:
            runs[-1] = (first, count + 1, column)
        else:
            runs.append((book, 1, start))
    return runs


def _level_bytes(description: Mapping[str, Any]) -> int:
    """Bytes of a row's levels: its scales stand behind them."""
    return (description["dim"] * _level_bits(description) + 7) // 8


def _scales_of_rows(description: Mapping[str, Any], codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of each block, float32 (n_rows, n_blocks), from behind the levels of the rows."""
    behind = _behind(description, codes)
    halves = _bytes_as_floats(behind) if _in_bytes(description) else _floats_of(behind, torch.float16)
    if description["symmetric"]:
        scale = halves.float() * description["scale_factor"]
        return scale, -scale * 2 ** (_level_bits(description) - 1)
    pairs = halves.float()
    return pairs[:, 0::2] * description["scale_factor"], pairs[:, 1::2] * description["offset_factor"]


def _rows_with_scales(description: Mapping[str, Any], codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Codes whose rows end in the given scales (and offsets), rounded to what rows store."""
    halves = (scale / description["scale_factor"]).half()
    if not description["symmetric"]:
        halves = torch.stack([halves, (offset / description["offset_factor"]).half()], -1).flatten(1)
    _refuse_unstorable(halves)
    stored = halves.contiguous().view(torch.uint8)
    if _in_bytes(description):
        if bool((halves < 0).any()) or bool((halves >= 2).any()):
            raise ValueError("a trained scale has left the range of one byte: lower the learning rate")
        stored = ((halves.view(torch.int16) + 32) >> 6).clamp(max=255).to(torch.uint8)
    return torch.cat([codes[:, : _level_bytes(description)], stored], 1)


def _refuse_unstorable(*stored: Tensor) -> None:
    """Trained values that became infinite or NaN, or do so when they are rounded to what a table stores."""
    if not all(bool(values.isfinite().all()) for values in stored):
        raise ValueError(
            "a trained value is not finite, or has left the range that the table can store: lower the learning rate, "
            "or make a new table with from_pretrained(module.weight, …)"
        )
