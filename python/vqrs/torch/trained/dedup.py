"""Blocks of rows that are nearly equal become one: Zhou et al., "Serving deep learning models with deduplication from
relational databases", 2022, and then trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.reference import pack_bits
from vqrs.torch.trained import export
from vqrs.torch.trained.base import FLOAT_BYTES, Budget, Size, TrainedEmbedding
from vqrs.torch.trained.hashing import hash_bits
from vqrs.torch.trained.packing import pack, packed_nbytes, unpack

if TYPE_CHECKING:
    import vqrs

_HASHES = (1, 2, 4, 8, 12)
"""Numbers of hashes in which blocks must agree: many for many blocks, few for few."""
_ROUNDS = 16


class DedupEmbedding(TrainedEmbedding):
    """The full table is trained; then blocks of rows that are nearly equal are shared, and trained on.

    Blocks are taken for equal if they agree to the last bit, or, where that leaves more than the budget allows, in some
    hashes ``floor((a·x + b) / width)``: of up to twelve hashes, each with the smallest width that leaves few enough
    blocks, those with the smallest error are taken. A shared block begins as the mean of those that share it, weighted
    with their lookups. The paper asks for a given similarity instead, keeps one of the blocks, and stops at a target
    size.

    Parameters
    ----------
    rows_per_block : int, optional
        Rows of a block; else the least power of two for which blocks, not their map, take at least half of the budget.
    n_blocks : int, optional
        Most blocks that are left; else as many as the budget allows, a quarter of the table's bytes without one.
    **settings
        Those of :class:`TrainedEmbedding`. The budget holds from the stage ``"tune"`` on.

    Raises
    ------
    ValueError
        The budget is less than a block, or less than the full table where it bounds trained floats.

    References
    ----------
    Zhou et al., "Serving deep learning models with deduplication from relational databases", 2022.

    Examples
    --------
    >>> import torch
    >>> module = DedupEmbedding(1000, 8, ratio=8, random_state=0)
    >>> module.enter_stage("tune")
    >>> module.weight.shape, module.inference_nbytes() <= 4000
    (torch.Size([97, 8]), True)
    """

    name: ClassVar[str] = "dedup"
    about: ClassVar[str] = "the trained table with nearly equal blocks shared and tuned (Zhou et al. 2022)"
    stages: ClassVar[tuple[str, ...]] = ("train", "tune")
    per_id_state: ClassVar[bool] = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rows_per_block: int | None = None,
        n_blocks: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        for what, value in (("rows_per_block", rows_per_block), ("n_blocks", n_blocks)):
            if value is not None and value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        self.rows_per_block, self.n_blocks = self._choose(rows_per_block, n_blocks)
        self.weight = nn.Parameter(self.uniform(self.num_embeddings, self.embedding_dim).to(device))
        self.register_buffer("pointers", torch.empty(0, dtype=torch.uint8, device=device))

    # -- size ---------------------------------------------------------------------------------------------------------

    def _places(self, rows_per_block: int) -> int:
        """Blocks of the full table."""
        return -(-self.num_embeddings // rows_per_block)

    def _cost(self, rows_per_block: int, n_blocks: int) -> Size:
        """What so many blocks need after they are shared; the floats are those of the full table that comes before."""
        places, full = self._places(rows_per_block), self.num_embeddings * self.embedding_dim
        if n_blocks >= places:
            return Size(full, FLOAT_BYTES * full)
        pointers = packed_nbytes(places, (n_blocks - 1).bit_length())
        return Size(full, FLOAT_BYTES * n_blocks * rows_per_block * self.embedding_dim + pointers)

    def _choose(self, rows_per_block: int | None, n_blocks: int | None) -> tuple[int, int]:
        row_bytes = FLOAT_BYTES * self.embedding_dim
        budget = self.budget or Budget(max(self.full_nbytes // 4, row_bytes))
        if n_blocks is not None:
            chosen = 1 if rows_per_block is None else min(rows_per_block, self.num_embeddings)
            return chosen, min(n_blocks, self._places(chosen))
        if budget.unit == "floats":
            if not budget.allows(self._cost(1, 1)):
                raise budget.unreachable(self._cost(1, 1), self.name)
            budget = Budget(max(self.full_nbytes // 4, row_bytes))
        if rows_per_block is None and budget.allows(self._cost(1, self.num_embeddings)):
            return 1, self.num_embeddings
        sizes = [1 << power for power in range(self.num_embeddings.bit_length())]
        found = []
        for rows in sizes if rows_per_block is None else [min(rows_per_block, self.num_embeddings)]:
            if not budget.allows(self._cost(rows, 1)):
                continue
            most = max(1, self._places(rows) - 1)  # as many blocks as places need no map
            blocks = budget.largest(partial(self._cost, rows), 1, most, self.name)
            found.append((rows, blocks))
            if 2 * blocks * rows * row_bytes >= budget.limit:
                return rows, blocks
        if not found:
            raise budget.unreachable(self._cost(rows_per_block or 1, 1), self.name)
        return max(found, key=lambda size: size[0] * size[1])

    def inference_tensors(self) -> Iterable[Tensor]:
        """Rows of blocks, and which block stands where; before they are shared, the table."""
        yield self.weight
        yield self.pointers

    # -- sharing ------------------------------------------------------------------------------------------------------

    def enter_stage(self, stage: str) -> None:
        """Go to a stage: for ``"tune"`` equal blocks are found, once."""
        shares = self.stage == "train" and stage == "tune"
        super().enter_stage(stage)
        if shares and self.n_blocks < self._places(self.rows_per_block):
            self._share()

    @torch.no_grad()
    def _share(self) -> None:
        places, width = self._places(self.rows_per_block), self.rows_per_block * self.embedding_dim
        missing = places * self.rows_per_block - self.num_embeddings
        blocks = F.pad(self.weight, (0, 0, 0, missing)).view(places, width)
        uses = self._uses().to(blocks)[:, None]
        pointers = self._equal_blocks(blocks, uses)
        self.weight = nn.Parameter(_means(blocks, uses, pointers).view(-1, self.embedding_dim))
        self.pointers = pack(pointers, self._bits())

    def _uses(self) -> Tensor:
        """Lookups of each block, none of them 0."""
        if self._frequencies is None:
            return torch.ones(self._places(self.rows_per_block))
        starts = np.arange(0, self.num_embeddings, self.rows_per_block)
        return torch.from_numpy(np.add.reduceat(self._frequencies, starts) + 1e-3)

    def _equal_blocks(self, blocks: Tensor, uses: Tensor) -> Tensor:
        """The number of the shared block of each block: at most ``n_blocks`` different ones."""
        same = _numbers(blocks.view(torch.int32 if blocks.dtype == torch.float32 else torch.int64))
        if int(same.max()) < self.n_blocks:
            return same
        directions = self.normal(blocks.shape[1], max(_HASHES), std=1.0).to(blocks)
        shifts = torch.rand(max(_HASHES), generator=self._generator).to(blocks)
        products = blocks @ directions
        # Fewer hashes would have to cut finer than fits many blocks.
        numbers = [hashes for hashes in _HASHES if 4**hashes >= min(self.n_blocks, 4 ** _HASHES[-1])]
        found = [self._narrowest(products[:, :hashes], shifts[:hashes]) for hashes in numbers]
        errors = [float(((blocks - _means(blocks, uses, one)[one]).square() * uses).sum()) for one in found]
        return found[int(np.argmin(errors))]

    def _narrowest(self, products: Tensor, shifts: Tensor) -> Tensor:
        """Numbers of blocks that agree in all hashes, of the width that leaves the most blocks."""
        narrow, wide = 1e-4 * float(products.abs().max()), 4 * float(products.abs().max())
        numbers = torch.zeros(len(products), dtype=torch.int64, device=products.device)  # one block for all
        for _ in range(_ROUNDS):
            middle = (narrow * wide) ** 0.5
            found = _numbers((products / middle + shifts).floor().long())
            if int(found.max()) < self.n_blocks:
                wide = middle
                numbers = max(numbers, found, key=lambda numbers: int(numbers.max()))
            else:
                narrow = middle
        return numbers

    # -- reading ------------------------------------------------------------------------------------------------------

    def _bits(self) -> int:
        """Bits of a pointer."""
        return (len(self.weight) // self.rows_per_block - 1).bit_length()

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, or of the shared blocks."""
        return self.weight.index_select(0, self._rows_of(ids) if self._is_shared() else ids)

    def _is_shared(self) -> bool:
        # The whole table has as many rows as ids.
        return len(self.weight) < self.num_embeddings

    def _rows_of(self, ids: Tensor) -> Tensor:
        blocks = unpack(self.pointers, self._bits(), ids // self.rows_per_block)
        return blocks * self.rows_per_block + ids % self.rows_per_block

    def to_table(self) -> vqrs.Table:
        """A table of the rows of blocks, with a pointer for each row."""
        if not self._is_shared():
            return export.as_table(self, export.rows_part(self.weight))
        return export.as_table(self, self._part())

    def _part(self) -> export.Part:
        bits = max(1, (len(self.weight) - 1).bit_length())
        ids = torch.arange(self.num_embeddings, device=self.weight.device)
        codes = [pack_bits(self._rows_of(block)[:, None].cpu().numpy(), bits) for block in ids.split(1 << 16)]
        return export.books_part(self.weight[None], np.concatenate(codes), bits)


def _means(blocks: Tensor, uses: Tensor, numbers: Tensor) -> Tensor:
    """Means of the blocks of each number, weighted with ``uses`` (n, 1)."""
    count = int(numbers.max()) + 1
    sums = blocks.new_zeros(count, blocks.shape[1]).index_add_(0, numbers, blocks * uses)
    return sums / uses.new_zeros(count, 1).index_add_(0, numbers, uses)


def _numbers(keys: Tensor) -> Tensor:
    """Numbers from 0 of distinct rows of integers, by a hash of 64 bits."""
    hashes = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
    for column in keys.long().unbind(1):
        hashes = hash_bits(column, hashes)
    return hashes.unique(return_inverse=True)[1]
