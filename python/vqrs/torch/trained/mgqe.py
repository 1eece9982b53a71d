"""Product codes that spend more entries on frequent ids: Kang et al., "Multi-granular quantized embeddings", 2020."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqrs.torch.trained import export
from vqrs.torch.trained.base import FLOAT_BYTES, Size
from vqrs.torch.trained.dpq import _MAX_BITS, DPQEmbedding, _nearest_entries, _Seen
from vqrs.torch.trained.hot_ids import most_frequent, ones
from vqrs.torch.trained.packing import pack, packed_nbytes, unpack

if TYPE_CHECKING:
    import vqrs

_BLOCK = 128
"""Ids for which the number of frequent ids before them is kept."""


class MGQEEmbedding(DPQEmbedding):
    """DPQ-VQ in which rare ids may use the first entries of each codebook only, and so need fewer bits.

    Frequent ids are a bitmap with counts; their codes stand apart where they are wider than those of the rest.

    Parameters
    ----------
    n_subvectors : int, optional
        Parts of a row, a divisor of ``embedding_dim``.
    n_bits : int, optional
        Bits of a part's code for frequent ids; the rest get ``n_bits - fewer_bits``. Of what is not given, the pair
        with the most bits for rare ids that the budget allows is taken; without a budget in bytes 8 bits and, as in
        the paper, the largest divisor up to 4.
    fewer_bits : int, optional
        Bits that codes of rare ids lack; at least one bit stays. By default 2 as in the paper (256 and 64 entries), or
        1 if that leaves more to rare ids within the budget.
    head_share : float
        Share of the ids that are frequent.
    frequencies : array of shape (num_embeddings,), optional
        Lookups of each id in training; without them, ids of each field are taken to be in falling order.
    decay : float
        Share of the past in the moving averages of the entries.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than a bit a row and the bitmap, or less than the query table where it bounds trained floats.

    References
    ----------
    Kang et al., "Learning multi-granular quantized embeddings for large-vocab categorical features in recommender
    systems", 2020.

    Examples
    --------
    >>> import torch
    >>> module = MGQEEmbedding(10_000, 16, ratio=20, random_state=0)
    >>> module.n_subvectors, module.n_bits, module.inference_nbytes()
    (4, 6, 31162)
    """

    name: ClassVar[str] = "mgqe"
    about: ClassVar[str] = "product codes with fewer entries for rare ids (MGQE, Kang et al. 2020)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        n_subvectors: int | None = None,
        n_bits: int | None = None,
        fewer_bits: int | None = None,
        head_share: float = 0.1,
        decay: float = 0.99,
        **settings: Any,
    ) -> None:
        if not 0 < head_share <= 1:
            raise ValueError(f"head_share must be above 0 and at most 1, got {head_share}")
        if fewer_bits is not None and not 0 <= fewer_bits < _MAX_BITS:
            raise ValueError(f"fewer_bits must be from 0 to {_MAX_BITS - 1}, got {fewer_bits}")
        self._settings = (head_share, fewer_bits)
        settings.update(n_subvectors=n_subvectors, n_bits=n_bits, decay=decay, mode="vq")
        super().__init__(num_embeddings, embedding_dim, **settings)
        head = np.zeros(self.num_embeddings, bool)
        head[self._frequent()] = True
        padded = np.pad(head, (0, -len(head) % _BLOCK)).reshape(-1, _BLOCK)
        before = np.cumsum(padded.sum(1)) - padded.sum(1)
        device = self.codes.device
        self.register_buffer("bitmap", torch.from_numpy(np.packbits(head, bitorder="little")).to(device))
        self.register_buffer("before", torch.from_numpy(before.astype(np.int32)).to(device))
        high = packed_nbytes(self._n_head * self.n_subvectors, self._more_bits(self.n_bits))
        self.register_buffer("high_codes", torch.zeros(high, dtype=torch.uint8, device=device))

    # -- size ---------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        share, fewer_bits = self._settings
        self.fewer_bits = 2 if fewer_bits is None else fewer_bits
        self._n_head = max(1, round(share * self.num_embeddings))

    def _choose(self, n_subvectors: int | None, n_bits: int | None) -> tuple[int, int]:
        size = super()._choose(n_subvectors, n_bits)
        if self._settings[1] is None and n_bits is None and self.budget is not None:
            self.fewer_bits, bits = 1, self._code_bits(*size)
            other = super()._choose(n_subvectors, n_bits)
            if self._code_bits(*other) > bits:
                return other
            self.fewer_bits = 2
        return size

    def _more_bits(self, bits: int) -> int:
        """Bits that codes of frequent ids have beyond those of the rest."""
        return min(self.fewer_bits, bits - 1)

    def _cost(self, parts: int, bits: int) -> Size:
        more = self._more_bits(bits)
        rows, books = self.num_embeddings, self.embedding_dim << bits
        codes = packed_nbytes(rows * parts, bits - more) + packed_nbytes(self._n_head * parts, more)
        bitmap = packed_nbytes(rows, 1) + 4 * -(-rows // _BLOCK)
        return Size(rows * self.embedding_dim, codes + bitmap + FLOAT_BYTES * books)

    def _code_bits(self, parts: int, bits: int) -> int:
        return parts * (bits - self._more_bits(bits))

    def _default(self) -> tuple[int, int]:
        return 4, _MAX_BITS

    def _code_nbytes(self) -> int:
        return packed_nbytes(self.num_embeddings * self.n_subvectors, self.n_bits - self._more_bits(self.n_bits))

    def _frequent(self) -> np.ndarray:
        """The frequent ids."""
        frequencies = self._frequencies
        if frequencies is None:  # places within fields, as shares of them
            frequencies = -np.concatenate([np.arange(size) / size for size in self.field_sizes])
        return most_frequent(frequencies, self.num_embeddings, self._n_head).numpy()

    def inference_tensors(self) -> Iterable[Tensor]:
        """Packed codes, which ids are frequent, and codebooks."""
        yield from super().inference_tensors()
        yield self.high_codes
        yield self.bitmap
        yield self.before

    def to_table(self) -> vqrs.Table:
        """A table of packed codes of two widths, and codebooks."""
        self._encode()
        ids = torch.arange(self.num_embeddings, device=self.codes.device)
        more = self._more_bits(self.n_bits)
        if not more:
            return export.as_table(self, self._part(ids, self.n_bits))
        frequent = self.is_frequent(ids)
        head, rest = self._part(ids[frequent], self.n_bits), self._part(ids, self.n_bits - more)
        books = {"otherwise.arrays.0": "cases.0.decoder.arrays.0"}
        return export.as_table(
            self, export.switch_part(len(ids), [(ids[frequent].cpu(), head)], otherwise=rest, shared=books)
        )

    # -- reading ------------------------------------------------------------------------------------------------------

    def is_frequent(self, ids: Tensor) -> Tensor:
        """Which ids may use all entries: bool of the shape of ``ids``."""
        return unpack(self.bitmap, 1, ids).bool()

    def _nearest(self, ids: Tensor, queries: Tensor) -> Tensor:
        frequent = self.is_frequent(ids)
        low = self.codebooks[:, : 1 << (self.n_bits - self._more_bits(self.n_bits))]
        codes = queries.new_empty(queries.shape[:2], dtype=torch.int64)
        codes[frequent] = _nearest_entries(queries[frequent], self.codebooks)
        codes[~frequent] = _nearest_entries(queries[~frequent], low)
        return codes

    def _stored_codes(self, ids: Tensor) -> Tensor:
        more = self._more_bits(self.n_bits)
        places = torch.arange(self.n_subvectors, device=ids.device)
        codes = unpack(self.codes, self.n_bits - more, ids[:, None] * self.n_subvectors + places)
        frequent = self.is_frequent(ids)
        rank = self._rank(ids[frequent])
        high = unpack(self.high_codes, more, rank[:, None] * self.n_subvectors + places)
        codes[frequent] |= high << (self.n_bits - more)
        return codes

    def _rank(self, ids: Tensor) -> Tensor:
        """How many frequent ids stand before each of these."""
        byte = ids >> 3
        block_bytes = _BLOCK // 8
        places = (byte // block_bytes * block_bytes)[:, None] + torch.arange(block_bytes, device=ids.device)
        in_bytes = ones(self.bitmap[places.clamp(max=len(self.bitmap) - 1)].long()) * (places < byte[:, None])
        in_byte = ones(self.bitmap[byte] & ((1 << (ids & 7)) - 1))
        return self.before[ids // _BLOCK] + in_bytes.sum(1) + in_byte

    def _store(self, codes: Tensor) -> None:
        more = self._more_bits(self.n_bits)
        low_bits = self.n_bits - more
        frequent = self.is_frequent(torch.arange(len(codes), device=codes.device))
        self.codes.copy_(pack(codes.long() & ((1 << low_bits) - 1), low_bits))
        self.high_codes.copy_(pack(codes[frequent].long() >> low_bits, more))

    def _drawn(self, seen: _Seen) -> Tensor:
        drawn = super()._drawn(seen)
        frequent = self.is_frequent(seen.ids).nonzero().flatten()
        if len(frequent):  # rare ids cannot choose the entries behind the first ones
            low = 1 << (self.n_bits - self._more_bits(self.n_bits))
            drawn[:, low:] = frequent[drawn[:, low:] % len(frequent)]
        return drawn
