"""What ``compress_`` tells of a model: a row a module, and totals."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from vqrs._bytes import format_bytes

__all__ = ["CompressedModule", "CompressionReport"]


@dataclass(frozen=True)
class CompressedModule:
    """What became of one embedding weight: a row of a :class:`CompressionReport`.

    Attributes
    ----------
    name : str
        The first module that looks up in it.
    tied : tuple of str
        Other names of this module and other modules with the same weight: they read the same table.
    shape : tuple of int
        Rows and columns.
    kind : str or None
        The quantizer; None if skipped.
    parameters : dict
        Its parameters.
    nbytes_before, nbytes : int
        Bytes of the weight in its own dtype, and of the table with all that its file holds.
    ratio : float
        Bytes of the rows in float32 over ``nbytes``, as everywhere in vqrs; 1 if skipped.
    relative_error : float
        Squared error over squared norm, weighted by the frequencies if some were given; 0 if skipped.
    skipped : str or None
        Why it was left alone.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> model = torch.nn.ModuleDict({"words": torch.nn.Embedding(5000, 16), "places": torch.nn.Embedding(8, 16)})
    >>> words, places = vqrs.torch.compress_(model, method="scalar", dtype="int8", dry_run=True)
    >>> words.nbytes_before, words.kind, words.skipped
    (320000, 'scalar', None)
    >>> places.skipped
    '8 rows, fewer than min_rows=4,096'
    """

    name: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str | None
    parameters: dict[str, Any]
    nbytes_before: int
    nbytes: int
    ratio: float
    relative_error: float
    skipped: str | None = None


class CompressionReport(Sequence[CompressedModule]):
    """What :func:`compress_` did: a row for each embedding weight of the model, those left alone at the end.

    It prints as a table. A row is found by its number or by a name of its module.

    Attributes
    ----------
    rows : list of CompressedModule
    nbytes_before, nbytes : int
        Of all weights that were compressed, each counted once.
    ratio : float
        Their bytes in float32 over ``nbytes``.
    relative_error : float
        Their squared error over their squared norm, weighted by the frequencies if some were given.
    dry_run : bool
        Whether the model was left alone.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5000, 16), torch.nn.Linear(16, 2))
    >>> report = vqrs.torch.compress_(model, method="scalar", dtype="int8", dry_run=True)
    >>> report["0"].kind, report["0"].nbytes < 320_000 / 3, len(report)
    ('scalar', True, 1)
    """

    def __init__(self, rows: Sequence[CompressedModule], energies: Sequence[float], dry_run: bool) -> None:
        self.rows = list(rows)
        self.dry_run = dry_run
        done = [row for row in self.rows if row.skipped is None]
        self.nbytes_before = sum(row.nbytes_before for row in done)
        self.nbytes = sum(row.nbytes for row in done)
        values = sum(math.prod(row.shape) for row in done)
        self.ratio = 4 * values / self.nbytes if done else 1.0
        error = sum(row.relative_error * energy for row, energy in zip(done, energies, strict=True))
        self.relative_error = error / sum(energies) if error else 0.0

    @overload
    def __getitem__(self, index: int | str) -> CompressedModule: ...
    @overload
    def __getitem__(self, index: slice) -> list[CompressedModule]: ...
    def __getitem__(self, index: int | str | slice) -> CompressedModule | list[CompressedModule]:
        """A row by its number, or by a name of its module."""
        if not isinstance(index, str):
            return self.rows[index]
        for row in self.rows:
            if index == row.name or index in row.tied:
                return row
        raise KeyError(f"no embedding is named {index!r}: there are {', '.join(row.name for row in self.rows)}")

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON.

        Returns
        -------
        dict
            ``modules`` (one dict a row) and the totals.
        """
        totals = {name: getattr(self, name) for name in ("nbytes_before", "nbytes", "ratio", "relative_error")}
        modules = [asdict(row) | {"tied": list(row.tied), "shape": list(row.shape)} for row in self.rows]
        return {"modules": modules, **totals, "dry_run": self.dry_run}

    def lines(self) -> list[list[str]]:
        """Rows of texts below a head, as they are printed, and the total."""
        head = ["module", "shape", "kind", "before", "after", "ratio", "error", ""]
        found = [head, *map(_line, self.rows)]
        if self.nbytes:
            total = [format_bytes(self.nbytes_before), format_bytes(self.nbytes), f"{self.ratio:.2f}"]
            found.append(["total", "", "", *total, f"{self.relative_error:.4g}", ""])
        return found

    def __repr__(self) -> str:
        lines = self.lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([self._title(), *(text.rstrip() for text in texts)])

    def _repr_html_(self) -> str:
        head, *body = (
            "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line)
            for tag, line in zip(["th", *["td"] * len(self.lines())], self.lines(), strict=False)
        )
        rows = "".join(f"<tr>{line}</tr>" for line in [head, *body])
        return f"<table><caption>{html.escape(self._title())}</caption>{rows}</table>"

    def _title(self) -> str:
        done = sum(row.skipped is None for row in self.rows)
        return f"CompressionReport: {done} of {len(self.rows)} embeddings" + (" (dry run)" if self.dry_run else "")


def _line(row: CompressedModule) -> list[str]:
    shape, before = " x ".join(f"{size:,}" for size in row.shape), format_bytes(row.nbytes_before)
    if row.skipped is not None:
        return [row.name, shape, "", before, "", "", "", f"left alone: {row.skipped}"]
    tied = f"also {', '.join(row.tied)}" if row.tied else ""
    numbers = [format_bytes(row.nbytes), f"{row.ratio:.2f}", f"{row.relative_error:.4g}"]
    return [row.name, shape, row.kind or "", before, *numbers, tied]
