"""Training beyond gradients: codes that are chosen anew, and codebooks that follow moving averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrs import _core
from vqrs.torch.forms import BooksDecoder, LinearDecoder

if TYPE_CHECKING:
    from vqrs.torch.embedding import _TableModule

__all__ = ["EMACodebooks", "Reassignment"]

BLOCK = 65_536
"""Rows that are encoded at once: bounds the memory that the comparison of old and new rows takes."""


@dataclasses.dataclass(frozen=True)
class Reassignment:
    """What ``reassign`` did.

    Parameters
    ----------
    n_rows : int
        Rows that codes were chosen for.
    n_changed : int
        Those whose code changed.
    error_before, error_after : float
        Squared distance of these rows to their targets over the squared norm of the targets, in float64.

    Examples
    --------
    >>> Reassignment(n_rows=10, n_changed=2, error_before=0.5, error_after=0.25)
    Reassignment(n_rows=10, n_changed=2, error_before=0.5, error_after=0.25)
    """

    n_rows: int
    n_changed: int
    error_before: float
    error_after: float


@torch.no_grad()
def reassign(module: _TableModule, codec: _core.Codec, ids: Tensor, target: Tensor, n_jobs: int | None) -> Reassignment:
    """Give the rows ``ids``, int64 (m,), the codes that ``codec`` finds for ``target``, (m, d), where those are nearer.

    Both tensors are on the CPU, finite and of the right shapes.
    """
    codes = module._own_codes()
    n_changed, before, after, norm = 0, 0.0, 0.0, 0.0
    for block, wanted in zip(ids.split(BLOCK), target.split(BLOCK), strict=True):
        found = torch.from_numpy(codec.encode(wanted.float().contiguous().numpy(), n_jobs=n_jobs))
        held = [(codes, block, found)]  # tensor, rows of it, what they become
        device = module.codes.device
        if not module.codes.is_cpu:
            held.append((module.codes, block.to(device), found.to(device)))
        for parameter, values in module.decoder.values_of_rows(found.to(device)):
            held.append((parameter, block.to(device), values.to(parameter)))
        old_values = [tensor[rows] for tensor, rows, _ in held]
        old_error = _squared_errors(module, block, wanted)
        for tensor, rows, values in held:
            tensor[rows] = values
        new_error = _squared_errors(module, block, wanted)
        better = new_error < old_error
        for (tensor, rows, _), old in zip(held, old_values, strict=True):
            tensor[rows[~better.to(rows.device)]] = old[~better.to(rows.device)]
        n_changed += int(better.sum())
        before += float(old_error.sum())
        after += float(torch.minimum(old_error, new_error).sum())
        norm += float(wanted.double().square().sum())
    return Reassignment(len(ids), n_changed, before / norm if norm else before, after / norm if norm else after)


def relative_error(module: _TableModule, ids: Tensor, target: Tensor) -> float:
    """Squared distance of the module's present rows to the target over the squared norm of the target."""
    norm = float(target.double().square().sum())
    error = float(_squared_errors(module, ids, target).sum())
    return error / norm if norm else error


def _squared_errors(module: _TableModule, ids: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the module's present rows to the target, float64 (m,)."""
    if module.trainable:
        rows = module._gather(ids.to(module.codes.device)).cpu()
    else:
        rows = torch.from_numpy(module._table.lookup(ids.numpy()))
    return (rows.double() - target.double()).square().sum(1)


class EMACodebooks(nn.Module):
    """Codebooks as moving averages of what is assigned to their entries: they learn without gradients.

    This is how vector-quantized autoencoders learn theirs [1]_ [2]_. Each entry keeps the count of what picks it,
    ``N = decay * N + (1 - decay) * n``, and moves to the mean: ``(decay * N * entry + (1 - decay) * sum) / N'``. Where
    books add up (residual and additive codes) the members of an entry are the targets less the other books, one book
    after the other. The averages begin as if the codebooks of the table had been those of all batches before.

    Parameters
    ----------
    module : Embedding or EmbeddingBag
        With ``trainable=True``, over a table of codebooks (behind a rotation or not). Its codebooks take no gradients
        from now on; whatever else it trains still does. It is not registered as a child.
    decay : float, default=0.99
        Share of the past in each average, from 0 (the present batch alone, one step of Lloyd's where that is the whole
        table) to less than 1.
    restart_every : int, optional
        After how many updates the table is searched for entries that none of its rows picks any more. Such an entry
        moves to the target of a random row of the batch, so that rows can pick it from then on. None: never.
    random_state : int, default=0
        Seed of these random rows.

    Attributes
    ----------
    counts_0, counts_1, … : float64 tensors of shape (n_books, n_entries)
        Averages of the counts, one for each parameter ``codebooks_…`` of the decoder.
    n_updates : int64 tensor of shape ()
        Updates so far. With the counts it is what ``state_dict`` holds.

    Raises
    ------
    ValueError
        If the decay is out of range, the module is frozen or its table has no codebooks.

    See Also
    --------
    Embedding.reassign : Chooses the codes that these averages take as given.

    References
    ----------
    .. [1] A. van den Oord, O. Vinyals, K. Kavukcuoglu. Neural discrete representation learning. NIPS 2017, appendix A.
    .. [2] A. Razavi, A. van den Oord, O. Vinyals. Generating diverse high-fidelity images with VQ-VAE-2. NeurIPS 2019.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> weight = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    >>> embedding = vqrs.torch.Embedding.from_pretrained(
    ...     weight, method="product", n_subvectors=4, n_bits=4, trainable=True, random_state=0
    ... )
    >>> averages = vqrs.torch.EMACodebooks(embedding, decay=0.9)
    >>> drifted = weight + 0.5
    >>> for _ in range(50):
    ...     outcome = averages.update(torch.arange(500), drifted)
    >>> bool(outcome.error_after < 0.02 < torch.dist(weight, drifted) ** 2 / drifted.norm() ** 2)
    True
    """

    def __init__(
        self,
        module: _TableModule,
        decay: float = 0.99,
        *,
        restart_every: int | None = 100,
        random_state: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is not allowed: must be from 0 to less than 1")
        if restart_every is not None and restart_every < 1:
            raise ValueError(f"restart_every={restart_every} is not allowed: must be at least 1, or None for never")
        if not module.trainable:
            raise ValueError("averages need a module with trainable=True: the codebooks of a frozen one do not move")
        self.decay = decay
        self.restart_every = restart_every
        self.random_state = random_state
        self._held = (module,)  # in a tuple, it is no child
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))
        for group, (codebooks, _) in enumerate(self._books().groups_of_books()):
            codebooks.requires_grad_(False)
            counts = torch.zeros(codebooks.shape[:2], dtype=torch.float64, device=codebooks.device)
            self.register_buffer(f"counts_{group}", counts)

    @torch.no_grad()
    def update(self, ids: Tensor, target: Tensor, *, reassign: bool = True) -> Reassignment:
        """Take a batch into the averages and move the codebooks there.

        Parameters
        ----------
        ids : integer tensor of shape (m,)
            Rows, each once.
        target : float tensor of shape (m, d)
            What these rows should be.
        reassign : bool, default=True
            Whether the rows first choose their codes anew; see :meth:`Embedding.reassign`.

        Returns
        -------
        Reassignment
            How many rows changed their code, and the error of the batch before and after the whole update.

        Raises
        ------
        ValueError, IndexError
            As :meth:`Embedding.reassign`.
        """
        (module,) = self._held
        if len(ids) == 0:
            return Reassignment(0, 0, 0.0, 0.0)
        module._check_targets(ids, target)
        ids, target = ids.cpu().long(), target.detach().cpu()
        if not bool(target.isfinite().all()):
            raise ValueError("the target has NaN or infinity")
        before = relative_error(module, ids, target)
        n_changed = module.reassign(ids, target).n_changed if reassign else 0
        if self.n_updates == 0:
            usage = self._usage()
            for group, counts in enumerate(usage):
                self._counts(group).copy_(counts * (len(ids) / module.num_embeddings))
        self.n_updates += 1
        wanted = target.to(module.codes.device)
        self._average(ids.to(module.codes.device), wanted)
        if self.restart_every is not None and self.n_updates % self.restart_every == 0:
            self._restart(ids.to(module.codes.device), wanted)
        return Reassignment(len(ids), n_changed, before, relative_error(module, ids, target))

    def _average(self, ids: Tensor, target: Tensor) -> None:
        for group, book, fields, columns, members in self._members(ids, target):
            entries, _ = self._books().groups_of_books()[group]
            entries, counts = entries[book], self._counts(group)[book]
            past = self.decay * counts
            sums = past[:, None] * entries
            sums.index_add_(0, fields, (1 - self.decay) * members)
            counts.copy_(past + (1 - self.decay) * torch.bincount(fields, minlength=len(counts)))
            there = counts > 0
            moved = torch.where(there[:, None], sums / counts.clamp(min=1e-300)[:, None], entries)
            columns += (moved - entries)[fields]  # what the books after this one see
            entries.copy_(moved)

    def _restart(self, ids: Tensor, target: Tensor) -> None:
        usage = self._usage()
        generator = torch.Generator().manual_seed(self.random_state + int(self.n_updates))
        for group, book, _, _, members in self._members(ids, target):
            dead = (usage[group][book] == 0).nonzero()[:, 0]
            chosen = torch.randperm(len(ids), generator=generator)[: len(dead)].to(ids.device)
            dead = dead[: len(chosen)]
            entries, _ = self._books().groups_of_books()[group]
            entries[book][dead] = members[chosen].to(entries)
            self._counts(group)[book][dead] = len(ids) / entries.shape[1]

    def _members(self, ids: Tensor, target: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        """For each book: its group, its number there, the entries that rows pick, int64 (m,), the present values of its
        columns, a view of float64 (m, width) to be kept up to date, and what the rows want of its entries, (m, width).
        """
        (module,) = self._held
        decoder, books = module.decoder, self._books()
        codes = F.embedding(ids, module.codes)
        wanted = (decoder.inverse(target) if isinstance(decoder, LinearDecoder) else target).double()
        present = books(codes, ids).double()
        module._notice_cuts()
        fields, first = books.fields(codes), 0
        for group, (codebooks, starts) in enumerate(books.groups_of_books()):
            for book, start in enumerate(starts):
                own = fields[:, first + book]
                at = slice(start, start + codebooks.shape[2])
                yield group, book, own, present[:, at], wanted[:, at] - present[:, at] + codebooks[book][own]
            first += len(starts)

    def _usage(self) -> list[Tensor]:
        """How many rows of the table pick each entry: a float64 tensor (n_books, n_entries) a group."""
        (module,) = self._held
        books = self._books()
        totals = [torch.zeros_like(self._counts(group)) for group in range(len(books.groups_of_books()))]
        for block in module.codes.split(BLOCK):
            fields, first = books.fields(block), 0
            for total in totals:
                for book in range(len(total)):
                    total[book] += torch.bincount(fields[:, first + book], minlength=total.shape[1])
                first += len(total)
        module._notice_cuts()
        return totals

    def _counts(self, group: int) -> Tensor:
        return self.get_buffer(f"counts_{group}")

    def _books(self) -> BooksDecoder:
        """The present codebooks: loading a state makes new modules."""
        (module,) = self._held
        decoder = module.decoder
        books = decoder.inner if isinstance(decoder, LinearDecoder) else decoder
        if not isinstance(books, BooksDecoder):
            raise ValueError(f"a table of kind {module._table.kind!r} has no codebooks of its own to average")
        return books

    def extra_repr(self) -> str:
        """What printing shows: the parameters."""
        return f"decay={self.decay}, restart_every={self.restart_every}"
