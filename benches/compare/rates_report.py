"""Tables and a plot of the raw lines of ``rates``, written into docs/quantizers.md between their markers."""

import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .datasets import DATASETS
from .rates import PEER_SLACK, RATES, best_of, most_bits, read

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "quantizers.md"
COMMAND = (
    "`python -m benches.compare rates` (and `--side peers`) measures, `python -m benches.compare report rates` writes"
)
PEER_NAMES = {
    "Product": "PQ {n_subvectors} x {n_bits}",
    "OptimizedProduct": "OPQ {n_subvectors} x {n_bits}",
    "Residual": "RQ {n_stages} x {n_bits}",
    "ProductResidual": "PRQ {n_subvectors} x {n_stages} x {n_bits}",
    "LocalSearch": "LSQ {n_codebooks} x {n_bits}",
    "RotatedLevels": "rotated levels, {n_bits} bits",
    "RaBitQ": "RaBitQ, {n_bits} bits",
    "Scalar": "SQ {dtype}",
}
COMPLETE = 20
"""Data sets with fewer records of a side are left out: what is missing there would look like a result."""

FILLED = 0.8
"""A record of less than this share of a rate says nothing about it."""

Record = dict[str, Any]


def write() -> None:
    """The tables into the document, the plot beside it."""
    records = [record for record in read() if "relative_error" in record]
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, made in tables(records).items():
        between = re.compile(rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)", re.DOTALL)
        if not between.search(text):
            raise SystemExit(f"{DOCUMENT} lacks the markers of {name}")
        text = between.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    DOCUMENT.write_text(text, encoding="utf-8")
    plot(records, DOCUMENT.with_suffix(".png"))


def tables(records: list[Record]) -> dict[str, str]:
    """The texts between the markers."""
    return {
        "errors": "\n\n".join(of_dataset(records, name) for name in datasets(records)),
        "kinds-errors": "\n\n".join(of_kinds(records, name) for name in datasets(records)[:2]),
        "speeds": speeds(records),
    }


def datasets(records: list[Record]) -> list[str]:
    """Those that were run to the end, in the order of the list of data sets."""
    count = Counter((record["dataset"], record["side"]) for record in records)
    return [name for name in DATASETS if min(count[name, "ours"], count[name, "peer"]) >= COMPLETE]


def pair(records: list[Record], dataset: str, rate: float) -> tuple[Record | None, Record | None]:
    """The best peer at a rate, and the best of ours with no more bytes."""
    peer = best_of(records, dataset, "peer", PEER_SLACK * rate)
    return peer, best_of(records, dataset, "ours", most_bits(dataset, rate))


def of_dataset(records: list[Record], dataset: str) -> str:
    """At each rate the best of the peers and ours."""
    shape = next((r["n_rows"], r["n_features"]) for r in records if r["dataset"] == dataset)
    head = ["bits a value", "best peer", "its error", "ours", "our error", "ours / peer", "Gaussian bound", "to bound"]
    lines = []
    for rate in RATES:
        peer, ours = pair(records, dataset, rate)
        if ours is None or ours["bits_per_value"] < FILLED * rate:
            continue
        bound = ours.get("gaussian_bound")
        lines.append(
            [
                f"{rate:g}",
                "none" if peer is None else f"{peer_name(peer)} ({peer['bits_per_value']:.2f})",
                "" if peer is None else number(peer["relative_error"]),
                f"`{ours['settings']['kind']}` ({ours['bits_per_value']:.2f})",
                number(ours["relative_error"]),
                "" if peer is None else f"**{ours['relative_error'] / peer['relative_error']:.2f}**",
                number(bound) if bound else "",
                f"{decibels(ours['relative_error'], bound):+.1f} dB" if bound else "",
            ]
        )
    about = DATASETS[dataset].about
    about = about[0].upper() + about[1:]
    return f"{about}, {shape[0]:,} x {shape[1]}:\n\n{markdown(head, lines)}"


def of_kinds(records: list[Record], dataset: str) -> str:
    """The error of each kind at each rate."""
    ours = [r for r in records if r["dataset"] == dataset and r["side"] == "ours"]
    kinds = list(dict.fromkeys(record["settings"]["kind"] for record in ours))
    lines = []
    for kind in kinds:
        of_kind = [record for record in ours if record["settings"]["kind"] == kind]
        cells = [cell_of(best_of(of_kind, dataset, "ours", most_bits(dataset, rate)), rate) for rate in RATES]
        lines.append([f"`{kind}`", *cells])
    name = f"{dataset} at bits a value of"
    return markdown([name, *(f"{rate:g}" for rate in RATES)], lines)


def cell_of(record: Record | None, rate: float) -> str:
    """The error at a rate; nothing where the bits are far below it."""
    return number(record["relative_error"]) if record and record["bits_per_value"] >= FILLED * rate else ""


def speeds(records: list[Record]) -> str:
    """Of each kind at one rate on one table: megabytes of float32 and rows a second and a core."""
    timed = [record for record in records if record["side"] == "speed"]
    if not timed:
        return ""
    lines = []
    for record in timed:
        n_rows, amount = record["n_rows"], 4e-6 * record["n_rows"] * record["n_features"]
        parameters = {name: value for name, value in record["parameters"].items() if value is not None}
        lines.append(
            [
                f"`{record['settings']['kind']}`",
                ", ".join(f"{name}={value}" for name, value in parameters.items()) or "the defaults",
                f"{record['bits_per_value']:.2f}",
                f"{record['fit_cpu_s']:.1f}",
                f"{amount / record['encode_cpu_s']:,.1f}",
                f"{n_rows / record['encode_cpu_s']:,.0f}",
                f"{amount / record['decode_cpu_s']:,.0f}",
                f"{n_rows / record['decode_cpu_s']:,.0f}",
            ]
        )
    head = ["kind", "parameters", "bits a value", "fit, s", "encode, MB/s", "rows/s", "decode, MB/s", "rows/s"]
    first = timed[0]
    rows = f"The first {first['n_rows']:,} rows of {DATASETS[first['dataset']].about}, {first['machine']}"
    return f"{rows}:\n\n{markdown(head, lines)}"


def peer_name(record: Record) -> str:
    """A short name of a peer's setting."""
    settings = record["settings"]
    if "class" in settings:
        return PEER_NAMES[settings["class"]].format(**settings)
    return f"{settings['dtype']} by {'row' if settings['block'] is None else 'blocks of ' + str(settings['block'])}"


def plot(records: list[Record], path: Path) -> None:
    """Bits against error for the first tables: our kinds, the peers, the bound."""
    from matplotlib.figure import Figure

    names = datasets(records)[:2]
    figure = Figure(figsize=(6 * len(names), 5), layout="constrained")
    for dataset, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        ours = [r for r in records if r["dataset"] == dataset and r["side"] == "ours"]
        for kind in sorted({record["settings"]["kind"] for record in ours}):
            draw(axes, [r for r in ours if r["settings"]["kind"] == kind], ".-", label=kind, linewidth=0.8)
        peers = [r for r in records if r["dataset"] == dataset and r["side"] == "peer" and r["bits_per_value"] < 9]
        for marker, wanted, label in (
            ("x", lambda name: name.startswith("faiss"), "Faiss"),
            ("+", lambda name: not name.startswith("faiss"), "int4, int8, NF4"),
        ):
            draw(axes, [r for r in peers if wanted(r["library"])], f"k{marker}", label=label, markersize=5)
        bounds = [record | {"relative_error": record["gaussian_bound"]} for record in ours if record["gaussian_bound"]]
        draw(axes, bounds, "k:", label="Gaussian bound")
        axes.set(xscale="log", yscale="log", xlabel="bits a value, all bytes counted", title=dataset)
        axes.set_ylabel("relative squared error")
        axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=110)


def draw(axes: Any, records: list[Record], style: str, **settings: Any) -> None:
    """Points of records in the order of their bits."""
    points = sorted((record["bits_per_value"], record["relative_error"]) for record in records)
    if points:
        axes.plot(*zip(*points, strict=True), style, **settings)


def summary(records: list[Record]) -> str:
    """How much less error ours have, as a geometric mean over rates, of each table."""
    lines = []
    for name in datasets(records):
        pairs = [pair(records, name, rate) for rate in RATES]
        filled = [
            (peer, ours)
            for (peer, ours), rate in zip(pairs, RATES, strict=True)
            if ours and cell_of(ours, rate) and peer
        ]
        ratios = [ours["relative_error"] / peer["relative_error"] for peer, ours in filled]
        lines.append(f"{name}: {statistics.geometric_mean(ratios):.2f}")
    return ", ".join(lines)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def decibels(error: float, bound: float) -> float:
    """How far an error lies above a bound."""
    from vqrs.metrics import above_bound_db

    return above_bound_db(error, bound) or 0.0


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    row: Callable[[list[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join([row(head), row(["---"] * len(head)), *map(row, lines)])
