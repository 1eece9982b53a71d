"""AUCs that were published for the synthetic sets, beside ours.

From Tsang & Ahle, "Clustering the Sketch: Dynamic Compression for Embedding Tables" (arXiv 2210.05974, 2023) and the
results that its authors keep with their code: GMF of d = 32, a table for users and one for items, each of as many
trained floats as a hash table of "ppd" rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vqrs.bench.report import DASH, Summary, _rows, _text

__all__ = ["FULL", "PUBLISHED", "Comparison", "compare_published", "markdown_published"]

_PPD = (64, 256, 1024, 2048, 4096, 8192)

PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "synthetic-10m": {
        "hash": dict(zip(_PPD, (0.511, 0.521, 0.539, 0.567, 0.633, 0.741), strict=True)),
        "concatenated": dict(zip(_PPD, (0.523, 0.543, 0.581, 0.635, 0.736, 0.849), strict=True)),
        "cce": dict(zip(_PPD, (0.526, 0.564, 0.613, 0.678, 0.819, 0.880), strict=True)),
        "robe": dict(zip(_PPD, (0.540, 0.566, 0.602, 0.646, 0.753, 0.843), strict=True)),
        "low-dimensional": dict(zip(_PPD[2:], (0.625, 0.672, 0.843, 0.891), strict=True)),
    },
    "synthetic-1m": {
        "weighted-robe": {256: 0.622},
        "dhe": {256: 0.618},
        "hashed-net": {256: 0.607},
        "cce-robe": {256: 0.584},
        "cce": {256: 0.567, 8192: 0.691},
        "hash": {256: 0.535},
        "concatenated": {8192: 0.770},
        "low-dimensional": {8192: 0.766},
    },
}
"""Published AUC by data set, method and ppd."""

FULL = {"synthetic-10m": 0.895, "synthetic-1m": 0.821}
"""Published AUC of the full table."""

OURS: dict[str, str] = {
    "hash": "hash",
    "concatenated": "compositional",
    "cce": "cce",
    "robe": "robe",
    "weighted-robe": "weighted-robe",
    "low-dimensional": "low-rank",
    "dhe": "dhe",
    "cce-robe": "cce-robe",
}
"""Names of the published methods here; those missing have no counterpart."""


ALLOWED = 0.02
"""Difference from a published AUC that needs no explanation."""


class Comparison(NamedTuple):
    """A published AUC and ours."""

    ppd: int | None
    """None for the full table."""
    published_method: str
    published: float
    ours: Summary | None

    @property
    def difference(self) -> float | None:
        """Ours less the published."""
        return None if self.ours is None or "auc" not in self.ours.means else self.ours.means["auc"] - self.published


def compare_published(members: Sequence[Summary]) -> list[Comparison]:
    """Every published AUC of a section's data set with the measured one of the same method and ppd.

    Parameters
    ----------
    members : sequence of Summary
        Of one section. Where a method was run with several settings, those that the published runs had are found
        first: ``num_columns=4``, then the method without settings.

    Returns
    -------
    list of Comparison
        Empty for a data set of which nothing is published.
    """
    dataset = members[0].section.dataset
    if dataset not in PUBLISHED:
        return []
    full = next((s for s in members if s.unit is None and s.error is None), None)
    found = [Comparison(None, "full", FULL[dataset], full)]
    for method, values in PUBLISHED[dataset].items():
        for ppd, auc in values.items():
            at = [s for s in members if s.unit == "ppd" and s.value == ppd]
            found.append(Comparison(ppd, method, auc, _ours(at, OURS.get(method))))
    return sorted(found, key=lambda one: one.ppd or 0)


def _ours(at: Iterable[Summary], name: str | None) -> Summary | None:
    settings = {s.method.partition(":")[2]: s for s in at if s.method.partition(":")[0] == name}
    for wanted in ("num_columns=4", ""):
        if wanted in settings:
            return settings[wanted]
    return next(iter(settings.values()), None)


def markdown_published(members: Sequence[Summary]) -> str:
    """A line a published AUC with ours, then the best of each ppd; empty where nothing is published.

    Only the ppd that were run are told of, and a difference of more than ``ALLOWED`` is bold.
    """
    run = {s.value for s in members if s.unit == "ppd"}
    compared = [one for one in compare_published(members) if one.ppd is None or one.ppd in run]
    rows = []
    for one in compared:
        ours, difference = one.ours, one.difference
        reached = ours is not None and "auc" in ours.means
        rows.append(
            [
                "full" if one.ppd is None else str(one.ppd),
                one.published_method,
                f"{one.published:.3f}",
                ours.method if ours is not None else DASH,
                _text(ours, "auc") if ours is not None and reached else DASH,
                DASH if difference is None else _difference(difference),
            ]
        )
    if not rows:
        return ""
    head = ["ppd", "published as", "published AUC", "here", "AUC", "difference"]
    return _rows(head, rows) + "\n\n" + _best_table(members, compared)


def _difference(value: float) -> str:
    return f"**{value:+.4f}**" if abs(value) > ALLOWED else f"{value:+.4f}"


def _best_table(members: Sequence[Summary], compared: Sequence[Comparison]) -> str:
    rows: list[list[Any]] = []
    for ppd in dict.fromkeys(one.ppd for one in compared if one.ppd is not None):
        theirs = max((one for one in compared if one.ppd == ppd), key=lambda one: one.published)
        at = [s for s in members if s.unit == "ppd" and s.value == ppd and "auc" in s.means]
        ours = max(at, key=lambda s: s.means["auc"], default=None)
        best = [DASH] * 3
        if ours is not None:
            best = [ours.method, _text(ours, "auc"), f"{ours.means['auc'] - theirs.published:+.4f}"]
        rows.append([str(ppd), f"{theirs.published_method} {theirs.published:.3f}", *best])
    return _rows(["ppd", "best published", "best here", "AUC", "difference"], rows)
