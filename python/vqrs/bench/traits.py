"""Traits of a data set that may tell which way of training a small table suits it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqrs.bench.datasets import SPLITS, WINDOW_ROWS, Dataset, Rows

__all__ = ["cramers_v", "format_traits", "power_law", "summary", "traits"]

SAMPLE_ROWS = 1 << 16
LEAST_TAIL = 50
_CANDIDATES = 60
_PRIOR_ROWS = 10.0


def traits(dataset: Dataset) -> dict[str, Any]:
    """What can be told of a data set without training anything.

    Parameters
    ----------
    dataset : Dataset
        Any; mapped ones are read in pieces.

    Returns
    -------
    dict
        Plain numbers, strings, lists and dicts, as JSON takes them:

        ``name``, ``rows`` (of each split), ``ids`` (rows of the table), ``numbers`` (in a row),
        ``positive_share`` (of the training labels);

        ``fields``, a dict of a dict for each field, all of the training split but ``unknown_share``:

        - ``ids``: rows of the field in the table; ``seen``: those that occur in training (the id for unknown ones is
          not counted here, nor in the figures below);
        - ``exponent``, ``exponent_from``: α of p(count) ∝ count^(-α) among the ids that occur at least
          ``exponent_from`` times, by maximum likelihood (see :func:`power_law`); None for fewer than 50 ids;
        - ``seen_once_share``: share of the seen ids that occur once;
        - ``top_1_percent_share``, ``top_10_percent_share``: share of the lookups that go to the most frequent
          hundredth and tenth of the seen ids;
        - ``entropy``: of the id of a row, in bits;
        - ``unknown_share``: share of the test rows whose id is not, or too rarely, in training;
        - ``label_information``: bits a row by which the id tells the label: the code length of the validation labels
          at the training share of positives, minus that at each id's own share, which is drawn towards the
          former as if by 10 more rows. As it is measured on rows that were not counted, it is not flattered by rare
          ids, and can be a little below 0.

        ``correlations``, a dict of (``"a, b"``) to Cramér's V between two fields (see :func:`cramers_v`), on at most
        65,536 training rows spread evenly.

    Examples
    --------
    >>> from vqrs.bench import open_dataset
    >>> found = traits(open_dataset("synthetic-100x80x2000"))
    >>> found["fields"]["item"]["seen"], found["fields"]["user"]["seen_once_share"]
    (80, 0.0)
    """
    train = dataset.rows("train")
    base_rate = _positive_share(train)
    frequencies = np.split(dataset.frequencies(), np.cumsum(dataset.field_sizes)[:-1])
    places = np.linspace(0, len(train.labels) - 1, min(SAMPLE_ROWS, len(train.labels))).astype(np.int64)
    sample = np.asarray(train.ids[places])
    names = dataset.field_names
    return {
        "name": dataset.name,
        "rows": {split: dataset.n_rows(split) for split in SPLITS},
        "ids": sum(dataset.field_sizes),
        "numbers": dataset.n_numeric,
        "positive_share": base_rate,
        "fields": {
            name: _field_traits(dataset, field, frequencies[field], base_rate) for field, name in enumerate(names)
        },
        "correlations": {
            f"{names[one]}, {names[two]}": cramers_v(sample[:, one], sample[:, two])
            for two in range(len(names))
            for one in range(two)
        },
    }


def _field_traits(dataset: Dataset, field: int, frequencies: NDArray[np.int64], base_rate: float) -> dict[str, Any]:
    known = frequencies.copy()
    if dataset.has_unknown_ids:
        known[0] = 0
    counts = np.sort(known[known > 0])[::-1]
    exponent, exponent_from = power_law(counts)
    return {
        "ids": dataset.field_sizes[field],
        "seen": len(counts),
        "exponent": exponent,
        "exponent_from": exponent_from,
        "seen_once_share": float((counts == 1).mean()) if len(counts) else 0.0,
        "top_1_percent_share": _top_share(counts, 0.01),
        "top_10_percent_share": _top_share(counts, 0.1),
        "entropy": _entropy(frequencies),
        "unknown_share": _unknown_share(dataset.rows("test"), field, known),
        "label_information": _label_information(dataset, field, frequencies, base_rate),
    }


def _pieces(rows: Rows) -> Iterator[Rows]:
    for start in range(0, len(rows.labels), WINDOW_ROWS):
        yield Rows(*(np.asarray(array[start : start + WINDOW_ROWS]) for array in rows))


def _positive_share(rows: Rows) -> float:
    return float(sum(piece.labels.sum(dtype=np.float64) for piece in _pieces(rows)) / len(rows.labels))


def _top_share(counts: NDArray[np.int64], share: float) -> float:
    """Of the lookups, those of the most frequent ids; ``counts`` descend."""
    if not len(counts):
        return 0.0
    return float(counts[: math.ceil(share * len(counts))].sum() / counts.sum())


def _entropy(frequencies: NDArray[np.int64]) -> float:
    shares = frequencies[frequencies > 0] / frequencies.sum()
    return float(abs((shares * np.log2(shares)).sum()))


def _unknown_share(rows: Rows, field: int, known: NDArray[np.int64]) -> float:
    unknown = sum(int((known[piece.ids[:, field]] == 0).sum()) for piece in _pieces(rows))
    return unknown / max(len(rows.labels), 1)


def _label_information(dataset: Dataset, field: int, frequencies: NDArray[np.int64], base_rate: float) -> float:
    if not 0 < base_rate < 1:
        return 0.0
    positives = np.zeros(len(frequencies))
    for piece in _pieces(dataset.rows("train")):
        positives += np.bincount(piece.ids[:, field], weights=piece.labels, minlength=len(positives))
    rates = (positives + _PRIOR_ROWS * base_rate) / (frequencies + _PRIOR_ROWS)
    gain = 0.0
    for piece in _pieces(dataset.rows("validation")):
        rate, label = rates[piece.ids[:, field]], np.asarray(piece.labels, dtype=np.float64)
        gain += (label * np.log2(rate / base_rate) + (1 - label) * np.log2((1 - rate) / (1 - base_rate))).sum()
    return float(gain / max(dataset.n_rows("validation"), 1))


def power_law(counts: NDArray[Any]) -> tuple[float | None, int | None]:
    """Exponent α of p(count) ∝ count^(-α), and the least count from which it holds.

    Both are those of Clauset, Shalizi and Newman [1]_: for each possible least count, α is the exact maximum of the
    likelihood of whole numbers (with Hurwitz's zeta function, not the approximation by continuous ones), and of these
    the one is taken whose distribution lies nearest to the counts (Kolmogorov and Smirnov's distance). Other
    than there, at least a tenth of the counts must be described, so that the exponent is not that of a few; and at
    least 50. A great exponent says that frequencies hardly differ. If frequencies fall with the rank as rank^(-s)
    (Zipf), then α = 1 + 1/s.

    Parameters
    ----------
    counts : ndarray of integers
        How often each thing was seen; zeros are left out.

    Returns
    -------
    exponent : float or None
        α, at most 20; None for fewer than 50 counts.
    least : int or None
        Counts below it are not described.

    References
    ----------
    .. [1] A. Clauset, C. Shalizi, M. Newman, "Power-law distributions in empirical data", 2009.

    Examples
    --------
    >>> import numpy as np
    >>> exponent, least = power_law(np.random.default_rng(0).zipf(2.5, size=20_000))
    >>> round(exponent, 1)
    2.5
    """
    counts = np.asarray(counts)
    values, times = np.unique(counts[counts > 0], return_counts=True)
    n_from = times[::-1].cumsum()[::-1]
    candidates = np.flatnonzero(n_from >= max(LEAST_TAIL, times.sum() / 10))
    if not len(candidates):
        return None, None
    # Small least counts lie close together and are tried densely; of many, some are tried.
    spread = np.linspace(0, 1, _CANDIDATES) ** 2 * (len(candidates) - 1)
    candidates = candidates[np.unique(spread.astype(int))]
    best = (math.inf, 0.0, 0)
    for place in candidates:
        least = int(values[place])
        exponent = _likeliest_exponent(values[place:], times[place:])
        beyond = _hurwitz_zeta(exponent, values[place:] + 1.0) / _hurwitz_zeta(exponent, float(least))
        distance = np.abs(times[place:].cumsum() / n_from[place] - (1 - beyond)).max()
        best = min(best, (float(distance), exponent, least))
    return best[1], best[2]


def _likeliest_exponent(values: NDArray[Any], times: NDArray[Any]) -> float:
    """Where n ln ζ(α, least) + α Σ ln(value) is least: a convex function, by golden sections."""
    mean_log = float((times * np.log(values)).sum() / times.sum())

    def cost(exponent: float) -> float:
        return math.log(_hurwitz_zeta(exponent, float(values[0]))) + exponent * mean_log

    low, high, ratio = 1.0001, 20.0, (math.sqrt(5) - 1) / 2
    inner, outer = high - ratio * (high - low), low + ratio * (high - low)
    cost_inner, cost_outer = cost(inner), cost(outer)
    while high - low > 1e-6:
        if cost_inner < cost_outer:
            high, outer, cost_outer = outer, inner, cost_inner
            inner = high - ratio * (high - low)
            cost_inner = cost(inner)
        else:
            low, inner, cost_inner = inner, outer, cost_outer
            outer = low + ratio * (high - low)
            cost_outer = cost(outer)
    return (low + high) / 2


def _hurwitz_zeta(exponent: float, start: Any) -> Any:
    """Sum of (start + k)^(-exponent) over k ≥ 0: ten terms, and Euler and Maclaurin's formula for the rest."""
    scaled = [(1 + k / start) ** -exponent for k in range(10)]
    x = 1 + 10 / start
    rest = x ** (1 - exponent) * start / (exponent - 1) + x**-exponent / 2
    rest += exponent * x ** (-exponent - 1) / (12 * start)
    rest -= exponent * (exponent + 1) * (exponent + 2) * x ** (-exponent - 3) / (720 * start**3)
    return start**-exponent * (sum(scaled) + rest)


def cramers_v(one: NDArray[Any], two: NDArray[Any]) -> float:
    """Association of two fields: 0 for independent ones, 1 where each id of one goes with one id of the other.

    Cramér's V with the correction for the bias of small samples of Bergsma [1]_, without which two fields of many ids
    seem associated.

    Parameters
    ----------
    one, two : ndarray of integers, shape (n_rows,)
        Ids of the two fields in the same rows.

    Returns
    -------
    float
        In [0, 1]; 0 where a field has one id only.

    References
    ----------
    .. [1] W. Bergsma, "A bias-correction for Cramér's V and Tschuprow's T", 2013.

    Examples
    --------
    >>> import numpy as np
    >>> cramers_v(np.array([0, 1, 2, 0, 1, 2]), np.array([5, 7, 6, 5, 7, 6]))
    1.0
    """
    n_rows = len(one)
    _, one, one_counts = np.unique(one, return_inverse=True, return_counts=True)
    _, two, two_counts = np.unique(two, return_inverse=True, return_counts=True)
    pairs, counts = np.unique(one.astype(np.int64) * len(two_counts) + two, return_counts=True)
    expected = one_counts[pairs // len(two_counts)] * two_counts[pairs % len(two_counts)].astype(np.float64)
    free_one, free_two = len(one_counts) - 1, len(two_counts) - 1
    if not free_one or not free_two:
        return 0.0
    # The sum over all cells of (observed - expected)² / expected needs the cells that occur alone.
    squared = float((counts.astype(np.float64) ** 2 / expected).sum()) - 1
    corrected = max(squared - free_one * free_two / (n_rows - 1), 0.0)
    most = min(free - free**2 / (n_rows - 1) for free in (free_one, free_two))
    return min(math.sqrt(corrected / most), 1.0) if most > 1e-9 else 0.0


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """One row for a table of data sets: figures of all fields, or those of the field with the most ids.

    Parameters
    ----------
    found : dict
        What :func:`traits` returns.

    Returns
    -------
    dict
        ``name``, ``rows`` (training), ``fields``, ``ids``, ``rows_per_id``, ``positive_share``; ``largest_field``
        with its ``exponent``, ``seen_once_share``, ``top_1_percent_share`` and ``unknown_share``; the greatest
        ``label_information`` of a field and the greatest ``correlation`` of two.

    Examples
    --------
    >>> from vqrs.bench import open_dataset
    >>> summary(traits(open_dataset("synthetic-100x80x2000")))["largest_field"]
    'user'
    """
    fields = found["fields"]
    largest = max(fields, key=lambda name: fields[name]["ids"])
    return {
        "name": found["name"],
        "rows": found["rows"]["train"],
        "fields": len(fields),
        "ids": found["ids"],
        "rows_per_id": found["rows"]["train"] * len(fields) / found["ids"],
        "positive_share": found["positive_share"],
        "largest_field": largest,
        **{
            key: fields[largest][key] for key in ("exponent", "seen_once_share", "top_1_percent_share", "unknown_share")
        },
        "label_information": max(field["label_information"] for field in fields.values()),
        "correlation": max(found["correlations"].values(), default=0.0),
    }


_HEADINGS = {
    "ids": "ids",
    "seen": "seen",
    "exponent": "exponent",
    "seen_once_share": "seen once",
    "top_1_percent_share": "top 1 %",
    "top_10_percent_share": "top 10 %",
    "entropy": "entropy, bits",
    "unknown_share": "unknown in test",
    "label_information": "label, bits",
}


def format_traits(found: dict[str, Any], *, correlations: int = 5) -> str:
    """The traits as text: a line on the set, a table of its fields, and its most correlated fields.

    Parameters
    ----------
    found : dict
        What :func:`traits` returns.
    correlations : int, default=5
        Most pairs of fields that are told.

    Returns
    -------
    str

    Examples
    --------
    >>> from vqrs.bench import open_dataset
    >>> print(format_traits(traits(open_dataset("synthetic-100x80x2000"))).splitlines()[0])
    synthetic-100x80x2000: 1,600 training, 200 validation, 200 test rows; 180 ids; 72.6 % positive
    """
    rows = found["rows"]
    lines = [
        f"{found['name']}: {rows['train']:,} training, {rows['validation']:,} validation, {rows['test']:,} test rows; "
        f"{found['ids']:,} ids; {found['positive_share']:.1%} positive".replace("%", " %"),
        "",
    ]
    table = [["field", *_HEADINGS.values()]]
    table += [[name, *(_cell(key, field[key]) for key in _HEADINGS)] for name, field in found["fields"].items()]
    lines += _aligned(table)
    nearest = sorted(found["correlations"].items(), key=lambda item: -item[1])[:correlations]
    if nearest:
        lines += ["", "most correlated (Cramér's V): " + "; ".join(f"{names} {value:.2f}" for names, value in nearest)]
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if key.endswith("_share"):
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if key == "label_information" else f"{value:.2f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
