"""Product codes that are trained end to end: DPQ by Chen, Li and Sun, "Differentiable product quantization", 2020."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vqrs.reference import pack_bits
from vqrs.torch.trained import export
from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding, Training
from vqrs.torch.trained.packing import pack, packed_nbytes, unpack

if TYPE_CHECKING:
    import vqrs

_MAX_BITS = 8
_MOMENTUM, _EPSILON = 0.1, 1e-5  # torch.nn.BatchNorm1d's
_DEAD = 0.01
"""Share of the mean use of an entry below which an entry moves to where rows are."""


class _Seen(NamedTuple):
    """What a backward pass has reached, for the moving averages of the codebooks."""

    ids: Tensor
    counts: Tensor
    queries: Tensor
    codes: Tensor


class DPQEmbedding(TrainedEmbedding):
    """A row is a codebook entry for each of its parts; a full table of queries, kept in training only, chooses them.

    ``mode="vq"`` takes the entries nearest to the query and hands gradients straight to it; the entries follow as
    moving averages of the queries that chose them, and entries that no row uses move to the query of some row of the
    batch. (The paper trains them by a term of the loss, and batch-normalises distances to keep them in use.)
    ``mode="sx"`` takes the entry whose key has the largest inner product with the query, batch-normalised, and hands
    gradients to queries and keys through the softmax.

    Parameters
    ----------
    mode : {"vq", "sx"}
        How entries are chosen; ``dpq-sx`` is the same class with the other default.
    n_subvectors : int, optional
        Parts of a row, a divisor of ``embedding_dim``.
    n_bits : int, optional
        Bits of a part's code, 1 to 8. Of what is not given, the pair with the most bits a row that the budget allows is
        taken, "sx" going no further than 5 bits by itself: it costs a softmax over the entries. Without a budget in
        bytes, 5 bits and the largest divisor up to 16.
    decay : float
        Share of the past in the moving averages of "vq".
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than a bit a row, or less than the query table where it bounds trained floats.

    References
    ----------
    Chen, Li and Sun, "Differentiable product quantization for end-to-end embedding compression", 2020.

    Examples
    --------
    >>> import torch
    >>> module = DPQEmbedding(1000, 16, ratio=20, random_state=0)
    >>> module.n_subvectors, module.n_bits, module.inference_nbytes()
    (4, 4, 3024)
    """

    name: ClassVar[str] = "dpq"
    about: ClassVar[str] = "product codes by straight-through nearest entries (DPQ-VQ, Chen et al. 2020)"
    per_id_state: ClassVar[bool] = True
    default_mode: ClassVar[str] = "vq"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: str | None = None,
        n_subvectors: int | None = None,
        n_bits: int | None = None,
        decay: float = 0.99,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        self.mode = self.default_mode if mode is None else mode
        if self.mode not in ("vq", "sx"):
            raise ValueError(f'mode must be "vq" or "sx", got {mode!r}')
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 to less than 1, got {decay}")
        self.decay = decay
        self._prepare()
        self.n_subvectors, self.n_bits = self._choose(n_subvectors, n_bits)
        rows, parts, entries = self.num_embeddings, self.n_subvectors, 1 << self.n_bits
        width = self.embedding_dim // parts
        self.queries = nn.Parameter(self.uniform(rows, self.embedding_dim).to(device))
        # Entries begin as parts of queries do.
        codebooks = self.uniform(parts, entries, width).to(device)
        if self.mode == "vq":
            self.register_buffer("codebooks", codebooks)
            self.register_buffer("counts", torch.zeros(parts, entries, device=device))
        else:
            self.codebooks = nn.Parameter(codebooks)
            self.keys = nn.Parameter(self.uniform(parts, entries, width).to(device))
            self.register_buffer("running_mean", torch.zeros(parts, entries, device=device))
            self.register_buffer("running_var", torch.ones(parts, entries, device=device))
        self.register_buffer("codes", torch.zeros(self._code_nbytes(), dtype=torch.uint8, device=device))
        self._seen: list[_Seen] = []
        self._encoded_at: tuple[int, ...] | None = None

    # -- size ---------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """What sizes depend on, before they are chosen."""

    def _cost(self, parts: int, bits: int) -> Size:
        books = self.embedding_dim << bits
        floats = self.num_embeddings * self.embedding_dim + (0 if self.mode == "vq" else 2 * books)
        return Size(floats, packed_nbytes(self.num_embeddings * parts, bits) + FLOAT_BYTES * books)

    def _default(self) -> tuple[int, int]:
        """Subvectors and bits without a budget in bytes."""
        return 16, 5

    def _choose(self, n_subvectors: int | None, n_bits: int | None) -> tuple[int, int]:
        dim = self.embedding_dim
        if n_subvectors is not None and (n_subvectors < 1 or dim % n_subvectors):
            raise ValueError(f"n_subvectors must divide embedding_dim = {dim}, got {n_subvectors}")
        if n_bits is not None and not 1 <= n_bits <= _MAX_BITS:
            raise ValueError(f"n_bits must be from 1 to {_MAX_BITS}, got {n_bits}")
        divisors = [part for part in range(1, dim + 1) if dim % part == 0]
        # More entries than rows are of no use.
        most = min(_MAX_BITS if self.mode == "vq" else 5, max(1, (self.num_embeddings - 1).bit_length()))
        parts, bits = self._default()
        default = (n_subvectors or max(part for part in divisors if part <= parts), n_bits or min(bits, most))
        if (n_subvectors and n_bits) or self.budget is None:
            return default
        sizes = [
            (part, bit)
            for part in ([n_subvectors] if n_subvectors else divisors)
            for bit in ([n_bits] if n_bits else range(1, most + 1))
        ]
        allowed = [size for size in sizes if self.budget.allows(self._cost(*size))]
        if not allowed:
            raise self.budget.unreachable(min((self._cost(*size) for size in sizes), key=lambda s: s.nbytes), self.name)
        if self.budget.unit == "floats" and default in allowed:
            return default
        return max(allowed, key=lambda size: (self._code_bits(*size), size[1] if self.mode == "vq" else -size[1]))

    def _code_bits(self, parts: int, bits: int) -> int:
        """Bits of a row (of most rows, where they differ): what a budget is spent on."""
        return parts * bits

    def _code_nbytes(self) -> int:
        return packed_nbytes(self.num_embeddings * self.n_subvectors, self.n_bits)

    def inference_tensors(self) -> Iterable[Tensor]:
        """Packed codes and codebooks: the queries are left behind."""
        yield self.codes
        yield self.codebooks

    def to_table(self) -> vqrs.Table:
        """A table of packed codes and codebooks."""
        self._encode()
        ids = torch.arange(self.num_embeddings, device=self.codes.device)
        return export.as_table(self, self._part(ids, self.n_bits))

    def _part(self, ids: Tensor, bits: int) -> export.Part:
        """Some rows by codes of ``bits`` bits."""
        parts, entries, width = self.codebooks.shape
        terms = [
            export.Term(
                self.codebooks, export.stored(part, 1 << bits), part * width, width, offset=part * entries * width
            )
            for part in range(parts)
        ]
        codes = np.concatenate(
            [pack_bits(self._stored_codes(block).cpu().numpy(), bits) for block in ids.split(1 << 16)]
        )
        return export.hashed_part(self.embedding_dim, terms, codes=codes, bits=bits)

    # -- reading ------------------------------------------------------------------------------------------------------

    def rows(self, ids: Tensor) -> Tensor:
        """Entries of the codes: found anew from the queries in training, the packed ones in evaluation."""
        if not self.training:
            return self._decode(self._packed_codes(ids))
        found, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
        width = self.embedding_dim // self.n_subvectors
        queries = self.queries.index_select(0, found).view(len(found), self.n_subvectors, width)
        rows = self._nearest_rows(found, counts, queries) if self.mode == "vq" else self._softmax_rows(queries)
        return rows.reshape(len(found), self.embedding_dim).index_select(0, inverse)

    def _nearest_rows(self, ids: Tensor, counts: Tensor, queries: Tensor) -> Tensor:
        codes = self._nearest(ids, queries.detach())
        # Exactly the entry, with the gradient of the query.
        rows = self._decode(codes).view_as(queries) + (queries - queries.detach())
        if rows.requires_grad:
            seen = _Seen(ids, counts, queries.detach(), codes)
            rows.register_hook(lambda gradient: self._seen.append(seen))
        return rows

    def _softmax_rows(self, queries: Tensor) -> Tensor:
        logits = self._logits(queries, *self._moments(queries))
        soft = torch.bmm(logits.softmax(-1), self.codebooks.detach()).transpose(0, 1)
        return self._decode(logits.detach().argmax(-1).T).view_as(queries) + (soft - soft.detach())

    def _moments(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the inner products of keys with a batch of queries, each (parts, entries)."""
        if len(queries) < 2:
            return self.running_mean, self.running_var
        middle = queries.mean(0)
        centred = (queries - middle).transpose(0, 1)
        covariance = torch.bmm(centred.transpose(1, 2), centred) / len(queries)
        mean = torch.einsum("pw,pkw->pk", middle, self.keys)
        variance = torch.einsum("pkv,pvw,pkw->pk", self.keys, covariance, self.keys)
        with torch.no_grad():
            self.running_mean.lerp_(mean, _MOMENTUM)
            self.running_var.lerp_(variance * len(queries) / (len(queries) - 1), _MOMENTUM)
        return mean, variance

    def _logits(self, queries: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Batch-normalised inner products with the keys, (parts, n, entries)."""
        scale = (variance + _EPSILON).rsqrt()
        keys = (self.keys * scale[..., None]).transpose(1, 2)
        return torch.baddbmm((mean * scale)[:, None], queries.transpose(0, 1), keys, beta=-1)

    def _nearest(self, ids: Tensor, queries: Tensor) -> Tensor:
        """Codes of the entries nearest to queries (n, parts, width): int64 (n, parts)."""
        return _nearest_entries(queries, self.codebooks)

    def _decode(self, codes: Tensor) -> Tensor:
        """Rows of codes (n, parts): (n, embedding_dim)."""
        first = torch.arange(self.n_subvectors, device=codes.device) << self.n_bits
        entries = self.codebooks.flatten(0, 1).index_select(0, (codes + first).flatten())
        return entries.view(len(codes), self.embedding_dim)

    def _packed_codes(self, ids: Tensor) -> Tensor:
        """The codes that inference reads, brought up to date where queries or entries moved."""
        self._encode()
        return self._stored_codes(ids)

    def _stored_codes(self, ids: Tensor) -> Tensor:
        places = ids[:, None] * self.n_subvectors + torch.arange(self.n_subvectors, device=ids.device)
        return unpack(self.codes, self.n_bits, places)

    @torch.no_grad()
    def _encode(self) -> None:
        if self._encoded_at == self._version():
            return
        self._store(torch.cat(list(self._all_codes())))
        self._encoded_at = self._version()

    def _store(self, codes: Tensor) -> None:
        """Pack the codes of all rows, (num_embeddings, parts)."""
        self.codes.copy_(pack(codes.long(), self.n_bits))

    def _all_codes(self) -> Iterator[Tensor]:
        # Fixed blocks, so that the codes do not depend on which rows are asked for.
        block = max(1, (1 << 22) // (self.n_subvectors << self.n_bits))
        for start in range(0, self.num_embeddings, block):
            queries = self.queries[start : start + block]
            ids = torch.arange(start, start + len(queries), device=queries.device)
            queries = queries.view(len(ids), self.n_subvectors, -1)
            if self.mode == "vq":
                codes = self._nearest(ids, queries)
            else:
                codes = self._logits(queries, self.running_mean, self.running_var).argmax(-1).T
            yield codes.to(torch.uint8)

    def _version(self) -> tuple[int, ...]:
        """Changes with each change of what codes depend on."""
        tensors = [self.queries, self.codebooks]
        if self.mode == "sx":
            tensors = [self.queries, self.keys, self.running_mean, self.running_var]
        return tuple(number for tensor in tensors for number in (tensor.data_ptr(), tensor._version))

    # -- learning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        """Move the entries towards the queries that chose them, and those that none chooses to some query."""
        self._encoded_at = None
        batches, self._seen = self._seen, []
        if not any(len(batch.ids) for batch in batches):
            return
        seen = _Seen(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
        parts, entries, width = self.codebooks.shape
        places = (seen.codes + torch.arange(parts, device=seen.codes.device) * entries).flatten()
        weights = seen.counts.to(self.counts.dtype)
        queries = seen.queries * weights[:, None, None]
        sums = torch.zeros_like(self.codebooks).view(-1, width).index_add_(0, places, queries.reshape(-1, width))
        uses = torch.zeros_like(self.counts).view(-1)
        uses.index_add_(0, places, weights[:, None].expand(-1, parts).flatten())
        uses = uses.view(parts, entries)
        counts = self.decay * self.counts + (1 - self.decay) * uses
        # Entries that nothing chose stay where they are, to the last bit.
        towards = sums.view_as(self.codebooks) - uses[..., None] * self.codebooks
        moved = self.codebooks + (1 - self.decay) * towards / counts.clamp_min(_EPSILON)[..., None]
        mean = counts.mean(1, keepdim=True)
        dead = counts < _DEAD * mean
        revived = seen.queries[self._drawn(seen), torch.arange(parts, device=dead.device)[:, None]]
        self.codebooks.copy_(torch.where(dead[..., None], revived, moved))
        self.counts.copy_(torch.where(dead, mean, counts))

    def _drawn(self, seen: _Seen) -> Tensor:
        """For each entry the place of a row of the batch that it may move to, (parts, entries)."""
        drawn = torch.randint(len(seen.ids), self.counts.shape, generator=self._generator)
        return drawn.to(self.counts.device)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, whose parameters are others: its codes are found anew."""
        return {**super().__getstate__(), "_encoded_at": None}

    def _save_to_state_dict(self, *args: Any) -> None:
        self._encode()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._encoded_at = self._version()


class DPQSXEmbedding(DPQEmbedding):
    """:class:`DPQEmbedding` with ``mode="sx"``: keys choose entries, through a softmax (Chen et al., 2020).

    Parameters are those of :class:`DPQEmbedding`.

    Raises
    ------
    ValueError
        As of :class:`DPQEmbedding`.

    Examples
    --------
    >>> import torch
    >>> module = DPQSXEmbedding(1000, 16, ratio=20, random_state=0)
    >>> module(torch.tensor([1, 2])).shape, module.inference_nbytes()
    (torch.Size([2, 16]), 2128)
    """

    name: ClassVar[str] = "dpq-sx"
    about: ClassVar[str] = "product codes by a straight-through softmax (DPQ-SX, Chen et al. 2020)"
    default_mode: ClassVar[str] = "sx"


def _nearest_entries(queries: Tensor, codebooks: Tensor) -> Tensor:
    """Codes of the nearest of ``codebooks`` (parts, entries, width): int64 (n, parts)."""
    half_norms = codebooks.square().sum(-1)[:, None] / 2
    scores = torch.baddbmm(half_norms, queries.transpose(0, 1), codebooks.transpose(1, 2), beta=-1)
    return scores.argmax(-1).T
