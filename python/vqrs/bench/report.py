"""What the raw runs of ``vqrs bench ctr`` tell: means and intervals over seeds, tables, and who wins by which count.

Runs are read back from one JSON line each. Of several learning rates that a method was tried with at a budget, the one
that the runner marked counts; where none is marked yet, the best on the validation part with the first seed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vqrs._bytes import format_bytes

__all__ = [
    "Section",
    "Summary",
    "Winner",
    "as_dicts",
    "budget_text",
    "interval",
    "markdown_details",
    "markdown_report",
    "markdown_table",
    "markdown_traits",
    "markdown_winners",
    "put_between",
    "read_runs",
    "sections",
    "student_quantile",
    "summarise",
    "winners",
    "winners_as_dicts",
]

MEASURES = (
    "auc",
    "log_loss",
    "validation_auc",
    "trained_floats",
    "training_nbytes",
    "inference_nbytes",
    "exported_nbytes",
    "full_nbytes",
    "seconds",
    "seconds_per_step",
    "lookups_per_second",
    "learning_rate",
    "epochs",
    "best_epoch",
)
"""Numbers of a run that are averaged over seeds."""

COUNTS = {"trained_floats": 1 / 4, "training_nbytes": 4.0, "inference_nbytes": 1.0}
"""What a size can be counted by, and what the full table has of it for each byte of its own: a float is four bytes;
training holds parameter, gradient and the two slots of Adam."""

TIE, DASH = " ≈", "–"

_WITH_INTERVALS = ("auc", "log_loss", "validation_auc")
"""Measures that are told with their intervals; others are sizes, or depend on the machine."""


SLACK = 1.01
"""A run is within a limit up to a hundredth: the few bytes of hash seeds shall not decide who takes part."""


class Section(NamedTuple):
    """Runs that can be compared: of one data set, model and way of training."""

    dataset: str
    model: str
    embedding_dim: int | None
    rest: str
    """Source and options of the data, whether fields have tables of their own, settings of training, as JSON."""

    @property
    def title(self) -> str:
        """A heading."""
        return f"{self.dataset}, {self.model}" + (f", d = {self.embedding_dim}" if self.embedding_dim else "")

    @property
    def training(self) -> str:
        """How its runs were trained, where that differs from what is usual; empty where nothing does."""
        if not self.rest:
            return ""
        _, options, separate, settings = json.loads(self.rest)
        told = [f"{name.replace('_', ' ')} {value}" for name, value in [*options.items(), *settings.items()]]
        return ", ".join([*told, *(["a table for each field"] if separate else [])])


@dataclass(frozen=True)
class Summary:
    """A method at a budget, over its seeds."""

    section: Section
    method: str
    """Name, then its settings if it was given some: ``"cce:num_columns=16"``."""
    unit: str | None
    """What the budget counts; None for the full table, which has none."""
    value: float | None
    ratio: float
    """The full table over the budget."""
    n_seeds: int
    """Seeds that ended without an error."""
    means: Mapping[str, float]
    intervals: Mapping[str, float]
    """Half the 95 % confidence interval of each mean; empty for a single seed."""
    error: str | None
    """Why there is nothing, usually a budget that the method cannot reach."""


# ---- reading -------------------------------------------------------------------------------------------------------


def read_runs(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs of a file of JSON lines, and notes on what was left out.

    Parameters
    ----------
    path : path

    Returns
    -------
    tuple of list of dict and list of str
        Of runs with equal keys the last one. A line that is no JSON object, as a killed process may leave, is noted.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    """
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or not {"dataset", "model", "method"} <= line.keys() or not _whole_key(line):
            notes.append(f"line {number} of {path} is damaged, it was left out")
            continue
        found[line.get("key") or json.dumps([*_cell(line), line.get("seed"), line.get("learning_rate")])] = line
    return list(found.values()), notes


def _whole_key(line: Mapping[str, Any]) -> bool:
    try:
        return not line.get("key") or len(json.loads(line["key"])) == 10
    except (TypeError, ValueError):
        return False


def _section(line: Mapping[str, Any]) -> Section:
    rest = ""
    if line.get("key"):
        source, options, _, _, _, _, _, _, separate, settings = json.loads(line["key"])
        rest = json.dumps([source, options, separate, settings], sort_keys=True)
    return Section(line["dataset"], line["model"], line.get("embedding_dim"), rest)


def _method(line: Mapping[str, Any]) -> str:
    variant = line.get("variant") or {}
    return ":".join(filter(None, [line["method"], ",".join(f"{name}={value}" for name, value in variant.items())]))


Cell = tuple[Section, str, str | None, float | None]
"""What runs share that differ in seed and learning rate: section, method, and unit and value of the budget."""


def _cell(line: Mapping[str, Any]) -> Cell:
    budget = line.get("budget") or {}
    return _section(line), _method(line), budget.get("unit"), budget.get("value")


# ---- over seeds ----------------------------------------------------------------------------------------------------


def student_quantile(degrees: int, level: float = 0.95) -> float:
    """Half the width, in standard errors, of the two-sided interval of Student's t distribution.

    Parameters
    ----------
    degrees : int
        Degrees of freedom, at least 1.
    level : float
        Probability inside.

    Examples
    --------
    >>> [round(student_quantile(n), 3) for n in (1, 2, 9)]
    [12.706, 4.303, 2.262]
    """
    low, high = 0.0, 1e6
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_inside(middle, degrees) < level else (low, middle)
    return high


def _student_inside(t: float, degrees: int) -> float:
    """Probability of ±t: a finite sum for whole degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(theta)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * (total if degrees > 1 else 0.0))
    return math.sin(theta) * total


def interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the confidence interval of the mean of some values by Student's t; None for fewer than two.

    Examples
    --------
    >>> round(interval([1.0, 2.0, 3.0]), 4)
    2.4841
    """
    if len(values) < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return student_quantile(len(values) - 1, level) * error


def summarise(lines: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Means and intervals over the seeds of each method at each budget, in the order of the lines.

    Parameters
    ----------
    lines : iterable of dict
        Runs as in the file of raw results; numbers may be missing.

    Returns
    -------
    list of Summary

    Examples
    --------
    >>> run = {"dataset": "movies", "model": "gmf", "method": "full"}
    >>> [summary] = summarise([run | {"seed": 0, "auc": 0.7}, run | {"seed": 1, "auc": 0.8}])
    >>> summary.n_seeds, round(summary.means["auc"], 3), round(summary.intervals["auc"], 3)
    (2, 0.75, 0.635)
    """
    cells: dict[Cell, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        cells[_cell(line)].append(line)
    return [_summary(cell, _counting(found)) for cell, found in cells.items()]


def _counting(lines: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of lines of several learning rates those of the chosen one; later calls may have tried more and chosen anew.

    A run that stands in several files, or with 256 and 256.0 in its key, is one run.
    """
    lines = [line for line in lines if line.get("chosen")] or lines
    first = min(line.get("seed") or 0 for line in lines)
    best = max((line for line in lines if (line.get("seed") or 0) == first), key=_validation)
    same = [line for line in lines if line.get("learning_rate") == best.get("learning_rate")]
    return list({line.get("seed"): line for line in same}.values())


def _validation(line: Mapping[str, Any]) -> float:
    value = line.get("validation_auc")
    return -1.0 if line.get("error") or value is None else float(value)


def _summary(cell: Cell, lines: Sequence[Mapping[str, Any]]) -> Summary:
    good = [line for line in lines if not line.get("error")]
    means, intervals = {}, {}
    for measure in MEASURES:
        # What a method out of reach would need for training is known all the same.
        values = [float(line[measure]) for line in good or lines if line.get(measure) is not None]
        if values:
            means[measure] = float(np.mean(values))
        half = interval(values)
        if good and half is not None:
            intervals[measure] = half
    ratio = next((float(line["ratio"]) for line in lines if line.get("ratio")), 1.0)
    error = None if good else next((line["error"] for line in lines if line.get("error")), None)
    return Summary(*cell, ratio, len(good), means, intervals, error)


def sections(summaries: Iterable[Summary]) -> dict[Section, list[Summary]]:
    """Summaries that can be compared with each other, in the order of their first."""
    found: dict[Section, list[Summary]] = defaultdict(list)
    for summary in summaries:
        found[summary.section].append(summary)
    return dict(found)


# ---- who wins ------------------------------------------------------------------------------------------------------


class Winner(NamedTuple):
    """The best AUC of a section among all runs that a limit allows."""

    section: Section
    ratio: float
    counted: str
    """What the limit counts: a key of ``COUNTS``."""
    limit: float
    best: Summary | None
    """None where no method reached it."""
    ties: list[Summary]
    """Others whose intervals touch the best one's."""


def winners(summaries: Iterable[Summary]) -> list[Winner]:
    """Who wins in each section, at each ratio that was asked for, by each count.

    The limit of a count is what the full table has of it, over the ratio; whatever budget a run was made with, it takes
    part where it is within the limit, or over it by no more than a hundredth.
    """
    found = []
    for section, members in sections(summaries).items():
        full = max((s.means["full_nbytes"] for s in members if "full_nbytes" in s.means), default=math.nan)
        for ratio in _ratios(members):
            for count, of_a_byte in COUNTS.items():
                limit = full * of_a_byte / ratio
                within = [
                    s
                    for s in members
                    if s.unit is not None and "auc" in s.means and s.means.get(count, math.inf) <= limit * SLACK
                ]
                best = max(within, key=lambda s: s.means["auc"], default=None)
                ties = [s for s in within if best is not None and s.method != best.method and _ties(s, best, "auc")]
                found.append(Winner(section, ratio, count, limit, best, ties))
    return found


def _ratios(members: Iterable[Summary]) -> list[float]:
    # What was asked for; bytes are whole, so that the ratio of a budget differs a little.
    return sorted({s.value if s.unit == "ratio" and s.value else s.ratio for s in members if s.unit is not None})


def _ties(one: Summary, best: Summary, measure: str) -> bool:
    distance = abs(one.means[measure] - best.means[measure])
    return distance <= one.intervals.get(measure, 0.0) + best.intervals.get(measure, 0.0)


# ---- tables --------------------------------------------------------------------------------------------------------


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _text(summary: Summary, measure: str) -> str:
    """A mean as it is read, with its interval where that is told of."""
    value = summary.means.get(measure)
    if value is None:
        return DASH
    if measure.endswith("nbytes"):
        return format_bytes(value)
    if measure == "trained_floats":
        return f"{value:,.0f}"
    if measure in ("seconds", "learning_rate"):
        return _short(value)
    if measure == "lookups_per_second":
        return f"{value / 1e6:.3g} M"
    half = summary.intervals.get(measure) if measure in _WITH_INTERVALS else None
    return f"{value:.4f}" + ("" if half is None else f" ± {half:.4f}")


def _short(value: float) -> str:
    """Three figures, and all of a number of four and more."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def budget_text(unit: str | None, value: float | None, ratio: float) -> str:
    """A budget as it is read; the full table has none."""
    if unit is None:
        return "no budget"
    if unit == "ratio":
        return _times(value or ratio)
    names = {"nbytes": "bytes", "num_floats": "floats", "ppd": "rows a field"}
    amount = format_bytes(value or 0) if unit == "nbytes" else f"{value:,.0f} {names.get(unit, unit)}"
    return f"{amount} ({_times(ratio)})"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.3g}×"


def _budgets(members: Iterable[Summary]) -> list[tuple[str, float]]:
    found = {(s.unit, s.value): s.ratio for s in members if s.unit is not None and s.value is not None}
    return [(unit, value) for unit, value in sorted(found, key=lambda budget: found[budget])]


def _at(members: Iterable[Summary], budget: tuple[str, float]) -> dict[str, Summary]:
    return {s.method: s for s in members if (s.unit, s.value) == budget}


def _marked(texts: Mapping[str, str], column: Mapping[str, Summary], measure: str, largest: bool) -> dict[str, str]:
    """The texts of a column, the best in bold and what ties with it marked."""
    known = [s for s in column.values() if measure in s.means and s.error is None]
    if not known:
        return dict(texts)
    best = (max if largest else min)(known, key=lambda s: s.means[measure])
    shown = dict(texts)
    for s in known:
        if s.means[measure] == best.means[measure]:
            shown[s.method] = f"**{texts[s.method]}**"
        elif measure in _WITH_INTERVALS and _ties(s, best, measure):
            shown[s.method] = texts[s.method] + TIE
    return shown


def markdown_table(members: Sequence[Summary], measure: str = "auc") -> str:
    """One measure, methods down by their names and budgets across; the full table first.

    Parameters
    ----------
    members : sequence of Summary
        Of one section.
    measure : str
        ``"auc"`` (the largest is best) or another of ``MEASURES`` (the least is).

    Returns
    -------
    str
        Markdown. The best of a column is bold, ≈ marks those whose interval touches its own, and a dash stands where
        the method cannot reach the budget, with the bytes that its training would hold.
    """
    budgets = _budgets(members)
    if not budgets:
        return _rows(["method", "no budget"], [[s.method, _text(s, measure)] for s in members])
    columns = []
    for budget in budgets:
        column = _at(members, budget)
        texts = {s.method: _text(s, measure) if s.error is None else _unreachable(s) for s in column.values()}
        columns.append(_marked(texts, column, measure, measure == "auc"))
    full = {s.method: _text(s, measure) for s in members if s.unit is None}
    rows = [[method, *[text] * len(columns)] for method, text in full.items()]
    methods = sorted({s.method for s in members if s.unit is not None})
    rows += [[method, *(column.get(method, "") for column in columns)] for method in methods]
    ratios = {(s.unit, s.value): s.ratio for s in members}
    return _rows(["method", *(budget_text(*budget, ratios[budget]) for budget in budgets)], rows)


def _unreachable(summary: Summary) -> str:
    nbytes = summary.means.get("training_nbytes")
    return DASH if nbytes is None else f"{DASH} (trains in {format_bytes(nbytes)})"


_DETAILS = {
    "auc": ("AUC", True),
    "log_loss": ("log-loss", False),
    "trained_floats": ("trained floats", False),
    "training_nbytes": ("training", False),
    "inference_nbytes": ("inference", False),
    "exported_nbytes": ("table file", False),
    "seconds": ("seconds", False),
    "lookups_per_second": ("lookups/s", True),
}
"""Heads of the columns, and whether the largest is best."""


def markdown_details(members: Sequence[Summary], budget: tuple[str, float]) -> str:
    """Everything at one budget, a method a line, the best AUC first; above all the full table, out of the contest."""
    column = _at(sorted(members, key=lambda s: (-s.means.get("auc", -1.0), s.method)), budget)
    columns = {
        measure: _marked({s.method: _text(s, measure) for s in column.values()}, column, measure, largest)
        for measure, (_, largest) in _DETAILS.items()
    }
    full = [s for s in members if s.unit is None]
    rows = [[s.method, *(_text(s, measure) for measure in _DETAILS)] for s in full]
    rows += [[method, *(columns[measure][method] for measure in _DETAILS)] for method in column]
    return _rows(["method", *(head for head, _ in _DETAILS.values())], rows)


_WINNER_HEADS = {
    "trained_floats": "trained floats",
    "training_nbytes": "training bytes",
    "inference_nbytes": "all bytes",
}


def markdown_winners(summaries: Iterable[Summary]) -> str:
    """Who wins by trained floats, by training bytes and by inference bytes, at each ratio of each section."""
    by_line: dict[Any, dict[str, Winner]] = defaultdict(dict)
    for winner in winners(summaries):
        by_line[winner.section, winner.ratio][winner.counted] = winner
    rows = [
        [section.title, _times(ratio), *(_winner_text(found[count]) for count in _WINNER_HEADS)]
        for (section, ratio), found in by_line.items()
    ]
    return _rows(["data", "smaller by", *(f"best by {head}" for head in _WINNER_HEADS.values())], rows)


def _winner_text(winner: Winner) -> str:
    if winner.best is None:
        return DASH
    ties = f", ≈ {', '.join(dict.fromkeys(s.method for s in winner.ties))}" if winner.ties else ""
    return f"{winner.best.method} {_text(winner.best, 'auc')}{ties}"


_TRAITS = {
    "rows": "training rows",
    "fields": "fields",
    "ids": "ids",
    "rows_per_id": "lookups an id",
    "largest_field": "largest field",
    "exponent": "its exponent",
    "seen_once_share": "seen once",
    "top_1_percent_share": "to the top 1 %",
    "unknown_share": "unknown in test",
    "label_information": "bits on the label",
    "correlation": "correlation",
}


def markdown_traits(found: Iterable[Mapping[str, Any]], summaries: Iterable[Summary] = ()) -> str:
    """Traits of data sets beside who won on each: a line a set, and a model where there are runs.

    Parameters
    ----------
    found : iterable of dict
        What :func:`vqrs.bench.traits.summary` gives, a dict a set.
    summaries : iterable of Summary, optional
        Runs on these sets.
    """
    by_set: dict[str, dict[Section, list[Winner]]] = defaultdict(lambda: defaultdict(list))
    for winner in winners(summaries):
        by_set[winner.section.dataset][winner.section].append(winner)
    rows = []
    for of_set in found:
        told = [_trait(name, of_set[name]) for name in _TRAITS]
        of_models: list[tuple[str, list[Winner]]] = [(s.model, won) for s, won in by_set[of_set["name"]].items()]
        for model, won in of_models or [(DASH, [])]:
            rows.append([of_set["name"], *told, model, *(_winners_of(won, count) for count in _WINNER_HEADS)])
    heads = [f"best by {head}" for head in _WINNER_HEADS.values()]
    return _rows(["data", *_TRAITS.values(), "model", *heads], rows)


def _winners_of(won: Iterable[Winner], count: str) -> str:
    texts = [f"{_times(w.ratio)}: {w.best.method}" for w in won if w.counted == count and w.best is not None]
    return ", ".join(texts) or DASH


def _trait(name: str, value: Any) -> str:
    if value is None:
        return DASH
    if name.endswith("_share"):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else _short(value) if isinstance(value, float) else str(value)


def markdown_report(summaries: Sequence[Summary], pictures: Mapping[Section, str] | None = None) -> str:
    """All tables of all sections.

    Parameters
    ----------
    summaries : sequence of Summary
    pictures : mapping of Section to str, optional
        Addresses of plots, as the document links them.

    Returns
    -------
    str
        Markdown, headings from the third level on.
    """
    from vqrs.bench.published import markdown_published

    blocks = ["### Winners", markdown_winners(summaries)] if any(s.unit for s in summaries) else []
    for section, members in sections(summaries).items():
        blocks += [f"### {section.title}", _seeds(members)]
        if pictures and section in pictures:
            blocks.append(f"![AUC against bytes: {section.title}]({pictures[section]})")
        if not _budgets(members):
            blocks.append(_rows(["method", *(head for head, _ in _DETAILS.values())], _full_rows(members)))
            continue
        blocks += ["AUC:", markdown_table(members), "Logarithmic loss:", markdown_table(members, "log_loss")]
        published = markdown_published(members)
        if published:
            blocks += ["Beside the published AUCs:", published]
        ratios = {(s.unit, s.value): s.ratio for s in members}
        for budget in _budgets(members):
            blocks += [f"All measures at {budget_text(*budget, ratios[budget])}:", markdown_details(members, budget)]
    return "\n\n".join(blocks) + "\n"


def _full_rows(members: Iterable[Summary]) -> Iterator[list[str]]:
    for summary in members:
        yield [summary.method, *(_text(summary, measure) for measure in _DETAILS)]


def _seeds(members: Sequence[Summary]) -> str:
    numbers = sorted({s.n_seeds for s in members if s.n_seeds})
    if not numbers:
        return "No run ended."
    seeds = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    told = f"Means over {seeds} seeds with 95 % confidence intervals (Student's t)."
    if numbers == [1]:
        told = "One seed a line: no intervals."
    training = members[0].section.training
    return told + (f" Settings: {training}." if training else "")


def put_between(document: str, tables: str) -> str:
    r"""The document with tables in place of what is between ``<!-- results begin -->`` and ``<!-- results end -->``.

    Raises
    ------
    ValueError
        The document has no such marks.

    Examples
    --------
    >>> put_between("<!-- results begin --><!-- results end --> See above.", "tables")
    '<!-- results begin -->\ntables\n<!-- results end --> See above.'
    """
    begin, end = "<!-- results begin -->", "<!-- results end -->"
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the document has no {begin} before {end}: put them where the tables shall be")
    return f"{before}{begin}\n{tables.rstrip()}\n{end}{after}"


def as_dicts(summaries: Iterable[Summary]) -> list[dict[str, Any]]:
    """Summaries ready for JSON."""
    return [asdict(s) | {"section": s.section._asdict()} for s in summaries]


def winners_as_dicts(summaries: Iterable[Summary]) -> list[dict[str, Any]]:
    """:func:`winners` ready for JSON, methods by their names."""
    return [
        winner._asdict()
        | {
            "section": winner.section._asdict(),
            "best": None if winner.best is None else winner.best.method,
            "ties": [s.method for s in winner.ties],
        }
        for winner in winners(summaries)
    ]
