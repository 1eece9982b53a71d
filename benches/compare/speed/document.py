"""Records as lines, as the tables of docs/performance.md, and as a picture."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Place = tuple[int, str]
"""Threads and instruction set: a column."""

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "performance.md"
CLOSE = 1.2
"""A peer that we are less than this many times as fast as is named."""


def read(files: Sequence[Path]) -> list[Record]:
    """All records; of equal jobs the last."""
    latest: dict[Any, Record] = {}
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(text)
            latest[(record["job"], record["case"], *record["setting"].values())] = record
    return list(latest.values())


# -- figures of one record ------------------------------------------------------------------------------------------


def ours(record: Record) -> Record:
    """Our own entry: the first."""
    return record["contenders"][0]


def groups(record: Record) -> dict[str, Record]:
    """The fastest peer of each group."""
    fastest: dict[str, Record] = {}
    for peer in record["contenders"][1:]:
        if peer["group"] not in fastest or peer["median"] < fastest[peer["group"]]["median"]:
            fastest[peer["group"]] = peer
    return fastest


def ratio(record: Record, group: str | None) -> float | None:
    """How many times as fast as a group; for no group, seconds a unit; None where the group is not there."""
    if group is None:
        return ours(record)["median"] / record["units"]
    peer = groups(record).get(group)
    return peer and peer["median"] / ours(record)["median"]


def short_of(record: Record, demand: Record) -> float | None:
    """The figure where it falls short of the least that is wanted."""
    figure = ratio(record, demand["group"])
    if figure is None:
        return None
    enough = figure <= demand["least"] if demand["group"] is None else figure >= demand["least"]
    return None if enough else figure


def seconds(value: float, digits: int = 3) -> str:
    """A time with its unit."""
    unit, factor = next(
        (u, f) for u, f in (("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)) if value * f >= 1 or u == "ns"
    )
    return f"{value * factor:.{digits}g} {unit}" if value * factor < 1_000 else f"{value * factor:.0f} {unit}"


def show(figure: float | None, group: str | None) -> str:
    """A ratio, a share or a time."""
    if figure is None:
        return ""
    if group is None:
        return seconds(figure)
    return f"{figure:.0%}" if group == "peak" else f"{figure:.2f}x" if figure < 10 else f"{figure:.0f}x"


def time_of(record: Record, contender: Record, spread: bool = True) -> str:
    """Median and quartiles of a unit, and what they mean in operations."""
    middle, low, high = (contender[name] / record["units"] for name in ("median", "lower_quartile", "upper_quartile"))
    text = seconds(middle)
    if spread and len(contender["seconds"]) > 1:
        text += f" ({seconds(low).split()[0]}–{seconds(high)})"
    if "iterations" in contender:
        text += f", {contender['iterations']} iterations"
    if record["operations"]:
        text += f", {record['operations'] / contender['median'] / 1e9:.0f} GFLOP/s"
    return text


def error_of(contender: Record) -> str:
    """The error beside a time."""
    return next((f"{contender[name]:.3g}" for name in ("relative_error", "inertia") if name in contender), "")


def line(record: Record) -> str:
    """One job on one line, for the terminal."""
    wanted = {demand["group"]: demand for demand in record["demands"]}
    parts = [f"{record['job']}: {record['case']}: {time_of(record, ours(record))}"]
    for group, peer in groups(record).items():
        short = (
            "  <-- short of " + show(wanted[group]["least"], group)
            if (group in wanted and short_of(record, wanted[group]) is not None)
            else ""
        )
        parts.append(f"{show(ratio(record, group), group)} {peer['name']} {time_of(record, peer, False)}{short}")
    if None in wanted and short_of(record, wanted[None]) is not None:
        parts.append(f"short of {seconds(wanted[None]['least'])}")
    return "\n      ".join(parts)


# -- tables ---------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(entries) + " |" for entries in lines)


def places(records: list[Record]) -> list[Place]:
    """The columns: instruction sets as they come, threads within."""
    simds = list(dict.fromkeys(record["setting"]["simd"] for record in records))
    found = {place_of(record) for record in records}
    return sorted(found, key=lambda place: (simds.index(place[1]), place[0]))


def place_of(record: Record) -> Place:
    """The column of a record."""
    return record["setting"]["threads"], record["setting"]["simd"]


def place_head(place: Place) -> str:
    """Head of a column."""
    return f"{place[1]}, {place[0]} thread{'s' * (place[0] > 1)}"


def by_job(records: list[Record]) -> dict[str, list[Record]]:
    """Records of each job."""
    jobs: dict[str, list[Record]] = {}
    for record in records:
        jobs.setdefault(record["about"], []).append(record)
    return jobs


def job_table(records: list[Record], columns: list[Place]) -> str:
    """One line for each case and group of peers; a ratio for each place."""
    lines: dict[tuple[str, str | None], dict[Place, Record]] = {}
    for record in records:
        wanted = [demand["group"] for demand in record["demands"] if demand["group"] is None]
        for group in [*wanted, *groups(record)]:
            lines.setdefault((record["case"], group), {})[place_of(record)] = record
    rows = []
    for (case, group), found in lines.items():
        first = found[min(found, key=columns.index)]
        demand = next((d for d in first["demands"] if d["group"] == group), {"least": None, "aim": None})
        peer = groups(first).get(group or "")
        errors = [error_of(ours(first))] + ([error_of(peer)] if peer and group != "peak" else [])
        rows.append(
            [
                case,
                time_of(first, ours(first)),
                peer["name"].replace("_", "\\_") if peer else "",
                time_of(first, peer) if peer else "",
                *(show(ratio(found[place], group) if place in found else None, group) for place in columns),
                show(demand["least"], group),
                show(demand["aim"], group),
                " / ".join(error for error in errors if error),
            ]
        )
    head = ["case", "vqrs", "beside", "its time", *map(place_head, columns), "at least", "aim", "error: vqrs / it"]
    return markdown(head, rows)


def shared(cases: Sequence[str]) -> str:
    """What the cases of a line have in common."""
    parts = [case.split(", ") for case in cases]
    return ", ".join(part for part in parts[0] if all(part in other for other in parts))


def demand_lines(records: list[Record]) -> list[tuple[list[Any], dict[Place, float]]]:
    """Everything that is wanted: (job, cases, group, least, aim), and the lowest figure of its cases in each place."""
    lines: dict[tuple[Any, ...], list[tuple[Record, float]]] = {}
    for record in records:
        for demand in record["demands"]:
            figure = ratio(record, demand["group"])
            if figure is not None:
                key = (record["about"], demand["group"], demand["least"], demand["aim"])
                lines.setdefault(key, []).append((record, figure))
    found = []
    for (about, group, least, aim), figures in lines.items():
        worst: dict[Place, float] = {}
        for record, figure in figures:
            place = place_of(record)
            worst[place] = (max if group is None else min)(worst.get(place, figure), figure)
        found.append(([about, shared([record["case"] for record, _ in figures]), group, least, aim], worst))
    return found


def demand_table(records: list[Record], columns: list[Place]) -> str:
    """One line for each thing that is wanted."""
    rows = []
    for (about, cases, group, least, aim), worst in demand_lines(records):
        cells = [show(worst.get(place), group) for place in columns]
        rows.append([about, cases, group or "", show(least, group), show(aim, group), *cells])
    return markdown(["job", "cases", "beside", "at least", "aim", *map(place_head, columns)], rows)


def case_table(records: list[Record], columns: list[Place], say: Callable[[Record, str | None], str]) -> str:
    """The cases and peers that there is something to say of."""
    lines: dict[tuple[str, str, str | None], dict[Place, str]] = {}
    for record in records:
        for group in [None, *groups(record)]:
            said = say(record, group)
            if said:
                lines.setdefault((record["about"], record["case"], group), {})[place_of(record)] = said
    rows = [
        [about, case, group or "", *(said.get(place, "") for place in columns)]
        for (about, case, group), said in lines.items()
    ]
    return markdown(["job", "case", "beside", *map(place_head, columns)], rows) if rows else "Nothing."


def shortfall(record: Record, group: str | None) -> str:
    """A figure that falls short of the least that is wanted."""
    for demand in record["demands"]:
        figure = short_of(record, demand)
        if demand["group"] == group and figure is not None:
            return f"{show(figure, group)}, wanted {show(demand['least'], group)}"
    return ""


def close_peer(record: Record, group: str | None) -> str:
    """A peer that is as fast or nearly."""
    figure = ratio(record, group)
    if group is None or group == "peak" or group.startswith("vqrs") or figure is None or figure >= CLOSE:
        return ""
    return show(figure, group)


def surroundings(records: list[Record]) -> str:
    """Machine, versions, dates: everything that the records agree on, or all that they say."""

    def said(what: Any) -> str:
        return "; ".join(dict.fromkeys(what(record) for record in records))

    rows = [
        ["machine", said(lambda r: r["machine"])],
        ["caches", said(lambda r: ", ".join(f"{level} {size}" for level, size in r["caches"].items()))],
        ["versions", said(lambda r: ", ".join(f"{name} {version}" for name, version in r["versions"].items()))],
        ["commit", said(lambda r: r["commit"])],
        ["date", said(lambda r: r["date"][:10])],
    ]
    return markdown(["", ""], rows)


def tables(records: list[Record]) -> dict[str, str]:
    """The generated parts of the document by name."""
    columns = places(records)
    jobs = [f"### {about}\n\n{job_table(some, columns)}" for about, some in by_job(records).items()]
    return {
        "surroundings": surroundings(records),
        "wanted": f"{demand_table(records, columns)}\n\n![How many times as fast](performance.png)",
        "short": case_table(records, columns, shortfall),
        "close": case_table(records, columns, close_peer),
        "jobs": "\n\n".join(jobs),
    }


def write(records: list[Record], path: Path = DOCUMENT) -> None:
    """Puts the tables between their markers."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables(records).items():
        between = re.compile(rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)", re.DOTALL)
        text = between.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
    path.write_text(text, encoding="utf-8")


def plot(records: list[Record], path: Path) -> None:
    """How many times as fast in the first place: one bar for each thing that is wanted."""
    from matplotlib.figure import Figure

    first = places(records)[0]
    lines = [
        (f"{about}, {cases}, {group}".replace(", ,", ","), worst[first], least, aim)
        for (about, cases, group, least, aim), worst in demand_lines(records)
        if first in worst and group not in (None, "peak")
    ]
    labels, figures, least, aims = zip(*lines, strict=True)
    figure = Figure(figsize=(9, 1 + 0.2 * len(lines)), layout="constrained")
    axes = figure.add_subplot(xlabel=f"times as fast as the peer ({place_head(first)}, lowest case)", xscale="log")
    positions = range(len(lines))
    axes.barh(positions, figures, color="#9ecae1")
    axes.plot(least, positions, "k|", label="at least")
    axes.plot([aim or float("nan") for aim in aims], positions, "r|", label="aim")
    axes.axvline(1, color="k", linewidth=0.5)
    axes.set_yticks(positions, labels, fontsize=7)
    axes.invert_yaxis()
    ticks = [1, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, ticks)
    axes.legend()
    figure.savefig(path, dpi=70)
