"""Which parameters of which kind are candidates for a budget."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vqrs import _core

FAST, BALANCED, BEST = range(3)
"""Efforts, each of which tries what the ones before it do."""


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
    measured: bool = False
    """The bytes depend on the rows: what a step says is about those of the rows themselves."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, step: int) -> Candidate:
        chosen = {} if self.rate is None else {self.rate: self.values[step]}
        parameters = self.fixed | chosen
        if self.measured:
            return Candidate(self.kind, parameters, 4 * self.shape[0] * self.shape[1])
        return Candidate(self.kind, parameters, estimated_bytes(self.kind, parameters, self.shape))

    def steps_within(self, nbytes: float) -> int:
        """How many steps take no more than so many bytes."""
        steps = bisect.bisect_right(range(len(self)), nbytes, key=lambda step: self[step].nbytes)
        # Padding can make a step a few bytes larger than the next.
        while steps > 0 and self[steps - 1].nbytes > nbytes:
            steps -= 1
        return steps


@dataclass(frozen=True)
class Family:
    """Ladders of one kind that differ in the size of a codebook alone, from small to large. The error of their steps of
    equal bytes falls up to some size and rises from there, so that a climb from the middle finds the best.
    """

    ladders: list[Ladder]
    start: int

    def outward(self) -> list[Ladder]:
        """All ladders, the nearest to the start first."""
        return sorted(self.ladders, key=lambda ladder: abs(self.ladders.index(ladder) - self.start))


class Variant(NamedTuple):
    """Parameters that start ladders of their own, and the least and greatest effort that try them."""

    parameters: dict[str, Any]
    effort: int = FAST
    until: int = BEST


class Rates(NamedTuple):
    """How the parameters of a kind are searched."""

    rate: str
    values: Callable[[int, int, Mapping[str, Any]], Sequence[Any]]
    """Of (n_rows, dim, the variant), from small to large tables."""
    variants: Callable[[int, int], list[Variant]] = lambda n_rows, dim: [Variant({})]
    """Other parameters. Those that the kind does not have or refuses are left out."""
    bits: Sequence[int] = ()
    """Values of ``n_bits``, the size of a codebook; empty where the kind has none or it is the rate."""
    stagewise: bool = False
    work: Callable[[int, int, Mapping[str, Any]], float] = lambda n_rows, dim, parameters: 0.0
    """About the seconds that a fit of (n_rows, dim) with all the parameters takes one core. A formula and no
    measurement, so that the choice repeats.
    """
    measured: bool = False
    """The bytes depend on the rows, and a fit is cheap enough to find out."""


ROWS_PER_CENTROID = 64
"""Codebooks of more than 256 entries are tried where each entry stands for so many rows."""

MOST_WORK = (10.0, 30.0, float("inf"))
"""Full fits that would take longer, by the formulas above, are left out; of each effort."""


def _divided(n_rows: int, dim: int, variant: Mapping[str, Any]) -> Sequence[int]:
    return range(1, dim + 1)


def _stages(n_rows: int, dim: int, variant: Mapping[str, Any]) -> Sequence[int]:
    return range(1, min(64, max(8, dim)) + 1)


def _listed(*values: Any) -> Callable[[int, int, Mapping[str, Any]], Sequence[Any]]:
    return lambda n_rows, dim, variant: values


def _variants(*variants: tuple[int, dict[str, Any]]) -> Callable[[int, int], list[Variant]]:
    return lambda n_rows, dim: [Variant(parameters, effort) for effort, parameters in variants]


def _scales(n_rows: int, dim: int) -> list[Variant]:
    sizes = [size for size in (32, 64, 128) if size < dim]
    blocks: list[dict[str, Any]] = [{"granularity": "block", "block_size": size} for size in sizes]
    in_one = [{"granularity": "row"}, *blocks]
    return [
        Variant({"granularity": "row"}),
        Variant({"granularity": "column"}),
        *map(Variant, blocks),
        Variant({"granularity": "row", "symmetric": True, "center": True, "rotation": "random"}, BALANCED),
        *(Variant({"dtype": dtype} | block, BALANCED) for dtype in ("nf4", "free4") for block in in_one),
        *(Variant({"symmetric": True, "scale_dtype": "float8"} | block, BALANCED) for block in blocks),
    ]


def _row_bits(n_rows: int, dim: int, variant: Mapping[str, Any]) -> Sequence[float]:
    """Bits a value, a byte more a row from step to step."""
    # Rounded down, so that no step is rounded up to the next byte.
    return [math.floor(8e4 * n_bytes / dim) / 1e4 for n_bytes in range(1, dim + 1)]


def _windows(n_rows: int, dim: int) -> list[Variant]:
    """Windows as long as each effort has time for, so that a search is tried once and not for each of them."""
    found = []
    for effort, longest in ((FAST, 10), (BALANCED, 14), (BEST, 16)):
        fitting = [
            b for b in range(8, longest + 1) if _window_work(n_rows, dim, {"state_bits": b}) <= MOST_WORK[effort]
        ]
        windows = {"state_bits": max(fitting, default=8)}
        found += [
            Variant(windows | {"bit_allocation": "variance", "rotation_dtype": "int8"}, effort, effort),
            Variant(windows | {"bit_allocation": "even"}, effort, effort),
        ]
    return found


def _window_work(n_rows: int, dim: int, p: Mapping[str, Any]) -> float:
    return 2.2e-10 * n_rows * dim * float(1 << p["state_bits"])


def _beam_work(n_rows: int, dim: int, p: Mapping[str, Any]) -> float:
    entries = p["n_stages"] << p["n_bits"]
    return 1.2e-10 * n_rows * entries * (p["beam_width"] + dim) * (1 + p["n_refinements"])


def _parts_work(n_rows: int, dim: int, p: Mapping[str, Any]) -> float:
    entries = p["n_stages"] << p["n_bits"]
    return 1.2e-10 * n_rows * entries * (p["beam_width"] * p["n_subvectors"] + dim) * (1 + p["n_refinements"])


def _descent_work(n_rows: int, dim: int, p: Mapping[str, Any]) -> float:
    per_row = (p["n_codebooks"] << p["n_bits"]) * (dim + p["n_searches"] * p["n_perturbations"] * p["n_codebooks"])
    return 6e-11 * n_rows * per_row * p["n_rounds"]


_ENTRIES = _variants((FAST, {}), (BALANCED, {"codebook_dtype": "int8"}))
_TURNED = _variants((BEST, {}), (BALANCED, {"codebook_dtype": "int8", "rotation_dtype": "int8"}))
# Sums of many codebooks, whose bytes count: in int8 from the effort that has time for a second try.
_SUMS = [Variant({}, FAST, FAST), Variant({"codebook_dtype": "int8"}, BALANCED), Variant({}, BEST)]

RATES = {
    "deduplicating": Rates("tolerance", _listed(0.0), measured=True),
    "scalar": Rates("dtype", _listed("int2", "int3", "int4", "int5", "int6", "int8", "float16"), _scales),
    "rotated": Rates("n_bits", _listed(*range(1, 9)), _variants((FAST, {}), (BALANCED, {"scale_dtype": "float8"}))),
    "trellis": Rates("n_bits", _row_bits, _windows, work=_window_work),
    "product": Rates("n_subvectors", _divided, _ENTRIES, (4, 5, 6, 7, 8, 10, 12)),
    "low-rank": Rates("n_components", _divided, _variants(*((FAST, {"dtype": f"int{b}"}) for b in (8, 6, 5, 4, 3)))),
    # Codebooks are padded to a power of two, so nothing between two of them is smaller than the larger.
    "kmeans": Rates("n_clusters", lambda n_rows, dim, _: [1 << b for b in range(1, 17) if 1 << b < 2 * n_rows]),
    "optimized-product": Rates("n_subvectors", _divided, _TURNED, (4, 6, 8, 10)),
    "sparse": Rates("density", lambda n_rows, dim, _: [k / 64 for k in range(1, 49)]),
    "tree": Rates("branching", _listed(2, 4, 8, 16, 32, 64, 128, 256), _variants((BEST, {"depth": 2}))),
    "product-residual": Rates(
        "n_subvectors",
        _divided,
        _variants(
            *((BALANCED, {"n_stages": stages, "codebook_dtype": "int8"}) for stages in (2, 3)),
            (BEST, {"n_stages": 2}),
            (BEST, {"n_stages": 4, "codebook_dtype": "int8"}),
        ),
        (4, 6, 8),
        work=_parts_work,
    ),
    "residual": Rates("n_stages", _stages, lambda n_rows, dim: _SUMS, (4, 6, 8, 10), stagewise=True, work=_beam_work),
    "additive": Rates(
        "n_codebooks",
        _stages,
        lambda n_rows, dim: _SUMS[1:],
        (4, 6, 8),
        stagewise=True,
        work=_descent_work,
    ),
}
"""How each kind is searched, from the cheapest to the dearest to try; :func:`_guessed` serves those without a line."""

_GUESSES: dict[str, Callable[[int, int, Mapping[str, Any]], Sequence[Any]]] = {
    "n_subvectors": _divided,
    "n_stages": _stages,
    "n_codebooks": _stages,
    "n_components": _divided,
    "n_bits": _listed(*range(1, 9)),
    "depth": _listed(1, 2, 3, 4),
    "dtype": _listed("int2", "int4", "int8", "float16"),
}
"""Parameters that are a rate wherever a kind has them, the likeliest first."""


def families_for(
    kind: str | None, parameters: dict[str, Any], n_rows: int, dim: int, effort: int = BALANCED
) -> list[Family]:
    """The ladders of a kind with some parameters fixed, or of all kinds, from the cheapest to the dearest to try."""
    known = default_parameters()
    kinds = [kind] if kind is not None else sorted(known, key=lambda k: list(RATES).index(k) if k in RATES else -1)
    most_work = float("inf") if kind is not None else MOST_WORK[effort]
    return [
        family for name in kinds for family in _families_of(name, parameters, (n_rows, dim), effort, most_work, known)
    ]


def ladders_for(kind: str | None, parameters: dict[str, Any], n_rows: int, dim: int) -> list[Ladder]:
    """The ladders of all families."""
    return [ladder for family in families_for(kind, parameters, n_rows, dim) for ladder in family.ladders]


def _families_of(
    kind: str,
    parameters: dict[str, Any],
    shape: tuple[int, int],
    effort: int,
    most_work: float,
    known: dict[str, dict[str, Any]],
) -> Iterator[Family]:
    rates = RATES.get(kind) or _guessed(known[kind])
    if rates is None:
        yield Family([Ladder(kind, parameters, None, [None], shape)], 0)
        return
    every = rates.variants(*shape)
    # A kind that was asked for is tried, if it has to be with what is for more effort.
    within = [v for v in every if v.effort <= effort <= v.until] or (every if most_work == float("inf") else [])
    variants = [v.parameters for v in within]
    agreeing = [v for v in variants if all(parameters.get(name, v[name]) == v[name] for name in v)]
    # What the user fixed may be in none of the variants; what the effort leaves out stays out.
    for variant in agreeing or ([{}] if parameters else []):
        fixed = variant | parameters
        if rates.rate in parameters:
            # What is wrong with the user's parameters comes to light when they are used.
            yield Family([Ladder(kind, fixed, None, [None], shape)], 0)
            continue
        bits = [] if "n_bits" in parameters else [b for b in rates.bits if b <= 8 or shape[0] >= ROWS_PER_CENTROID << b]
        ladders = [
            ladder
            for more in ([{"n_bits": b} for b in bits] or [{}])
            if len(ladder := _ladder(kind, rates, fixed | more, shape, most_work, known[kind]))
        ]
        if ladders:
            yield Family(ladders, next((i for i, one in enumerate(ladders) if one.fixed.get("n_bits") == 8), 0))


def _ladder(
    kind: str,
    rates: Rates,
    fixed: dict[str, Any],
    shape: tuple[int, int],
    most_work: float,
    defaults: dict[str, Any],
) -> Ladder:
    """The steps of a ladder that the kind accepts and that are not too much work."""
    values = [None] if rates.rate in fixed else rates.values(*shape, fixed)
    rate = None if rates.rate in fixed else rates.rate
    ladder = Ladder(kind, fixed, rate, values, shape, rates.stagewise, rates.measured)
    if not set(fixed) <= set(defaults):
        return Ladder(kind, fixed, rate, [], shape)

    def refused(step: int) -> bool:
        parameters = defaults | fixed | ({} if rate is None else {rate: values[step]})
        try:
            return rates.work(*shape, parameters) > most_work or ladder[step].nbytes <= 0
        except ValueError:
            return True

    if len(values) < 20:
        accepted = [value for step, value in enumerate(values) if not refused(step)]
    else:
        accepted = list(values[: bisect.bisect_left(range(len(values)), True, key=refused)])
    return Ladder(kind, fixed, rate, accepted, shape, rates.stagewise, rates.measured)


def _guessed(defaults: dict[str, Any]) -> Rates | None:
    """A ladder of a kind that has none here, by the names of its parameters."""
    rate = next((name for name in _GUESSES if name in defaults), None)
    return None if rate is None else Rates(rate, _GUESSES[rate])


def estimated_bytes(kind: str, parameters: Mapping[str, Any], shape: tuple[int, int]) -> int:
    """Bytes of a table, remembered: large codebooks take the compiled estimate milliseconds."""
    key = (kind, repr(sorted(parameters.items())), shape)
    if key not in _ESTIMATES:
        if len(_ESTIMATES) > 50_000:
            _ESTIMATES.clear()
        _ESTIMATES[key] = _core.estimate(kind, parameters, *shape)
    return _ESTIMATES[key]


_ESTIMATES: dict[tuple[str, str, tuple[int, int]], int] = {}


def default_parameters() -> dict[str, dict[str, Any]]:
    """Of each kind, by its name."""
    return {entry["name"]: entry["parameters"] for entry in _core.kinds()}
