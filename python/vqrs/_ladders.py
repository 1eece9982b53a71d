"""Which parameters of which kind are candidates for a budget."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vqrs import _core


class Candidate(NamedTuple):
    kind: str
    parameters: dict[str, Any]
    nbytes: int


@dataclass(frozen=True)
class Ladder:
    """Parameters of one kind, where each step takes more bytes than the one before and has less error."""

    kind: str
    fixed: dict[str, Any]
    rate: str | None
    """The parameter that grows; None where all are fixed."""
    values: Sequence[Any]
    shape: tuple[int, int]
    stagewise: bool = False
    """No step takes off a larger share of the error than those before it did."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, step: int) -> Candidate:
        chosen = {} if self.rate is None else {self.rate: self.values[step]}
        parameters = self.fixed | chosen
        return Candidate(self.kind, parameters, _core.estimate(self.kind, parameters, *self.shape))

    def steps_within(self, nbytes: float) -> int:
        """How many steps take no more than so many bytes."""
        return bisect.bisect_right(range(len(self)), nbytes, key=lambda step: self[step].nbytes)


class Rates(NamedTuple):
    """How the parameters of a kind are searched."""

    rate: str
    values: Callable[[int, int], Sequence[Any]]
    """Of (n_rows, dim), from small to large tables."""
    variants: Callable[[int, int], list[dict[str, Any]]] = lambda n_rows, dim: [{}]
    """Other parameters, each of which starts a ladder of its own."""
    stagewise: bool = False
    steps_unasked: int | None = None
    """Steps that are tried where the kind was not asked for by name; None for all."""


ROWS_PER_CENTROID = 64
"""Codebooks of 1,024 entries are tried where each entry stands for so many rows."""

RATES = {
    "scalar": Rates(
        "dtype",
        lambda n_rows, dim: ["int2", "int4", "int8", "float16"],
        lambda n_rows, dim: [
            {"granularity": "row"},
            {"granularity": "column"},
            *({"granularity": "block", "block_size": size} for size in (32, 64, 128) if size < dim),
        ],
    ),
    "product": Rates(
        "n_subvectors",
        lambda n_rows, dim: range(1, dim + 1),
        lambda n_rows, dim: [{"n_bits": b} for b in (8, 6, 4, 10) if b <= 8 or n_rows >= ROWS_PER_CENTROID << b],
    ),
    # Codebooks are padded to a power of two, so nothing between two of them is smaller than the larger.
    "kmeans": Rates("n_clusters", lambda n_rows, dim: [1 << b for b in range(1, 17) if 1 << b < 2 * n_rows]),
    # Fits of many stages take minutes, which is for those who ask for them.
    "residual": Rates("n_stages", lambda n_rows, dim: range(1, 33), stagewise=True, steps_unasked=8),
}
"""The kinds whose parameters are searched, from the cheapest to the dearest to try. Others are tried as they are."""


def ladders_for(kind: str | None, parameters: dict[str, Any], n_rows: int, dim: int) -> list[Ladder]:
    """The ladders of a kind with some parameters fixed, or of all kinds, from the cheapest to the dearest to try."""
    known = [entry["name"] for entry in _core.kinds()]
    kinds = [kind] if kind is not None else sorted(known, key=lambda k: list(RATES).index(k) if k in RATES else -1)
    return [ladder for name in kinds for ladder in _ladders_of(name, parameters, (n_rows, dim), kind is not None)]


def _ladders_of(kind: str, parameters: dict[str, Any], shape: tuple[int, int], asked: bool) -> Iterator[Ladder]:
    rates = RATES.get(kind)
    if rates is None:
        yield Ladder(kind, parameters, None, [None], shape)
        return
    agreeing = [v for v in rates.variants(*shape) if all(parameters.get(name, v[name]) == v[name] for name in v)]
    for variant in agreeing or [{}]:
        fixed = variant | parameters
        if rates.rate in parameters:
            yield Ladder(kind, fixed, None, [None], shape)
        else:
            values = rates.values(*shape)[: None if asked else rates.steps_unasked]
            yield Ladder(kind, fixed, rates.rate, values, shape, rates.stagewise)


def default_parameters() -> dict[str, dict[str, Any]]:
    """Of each kind, by its name."""
    return {entry["name"]: entry["parameters"] for entry in _core.kinds()}
