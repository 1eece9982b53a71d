"""Tables and a plot of raw records."""

import json
from pathlib import Path
from typing import Any

BOUND_ERROR = 1.01
BOUND_INERTIA = 1.005


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mark(ratio: float, bound: float) -> str:
    """Whether a ratio keeps its bound."""
    return "ok" if ratio <= bound else "OVER"


def error_header() -> str:
    """Head of the table of errors."""
    return (
        f"{'pair':<22}{'bytes: ours':>13}{'theirs':>12}{'error: ours':>13}{'theirs':>12}{'ratio':>8}"
        f"  {'<= ' + str(BOUND_ERROR):<8}{'fit s: ours':>12}{'theirs':>8}{'encode s':>10}{'theirs':>8}"
    )


def error_line(record: dict[str, Any]) -> str:
    """One pair: bytes, errors, their ratio, seconds."""
    ours, theirs = record["ours"], record["theirs"]
    ratio = ours["relative_error"] / theirs["relative_error"]
    return (
        f"{record['pair']:<22}{ours['nbytes']:>13,}{theirs['nbytes']:>12,}{ours['relative_error']:>13.4g}"
        f"{theirs['relative_error']:>12.4g}{ratio:>8.4f}  {mark(ratio, BOUND_ERROR):<8}{ours['fit_s']:>12.2f}"
        f"{theirs['fit_s']:>8.2f}{ours['encode_s']:>10.3f}{theirs['encode_s']:>8.3f}   {record['note']}"
    )


def kmeans_header() -> str:
    """Head of the table of k-means."""
    return (
        f"{'data':<10}{'rows x columns':>15}{'k':>5}{'inertia: ours':>15}{'sklearn':>13}{'ratio':>9}"
        f"  {'<= ' + str(BOUND_INERTIA):<9}{'labels that differ: float32':>28}{'float64':>9}{'sklearn 32/64':>15}"
        f"{'fit s: ours':>13}{'sklearn':>9}"
    )


def kmeans_line(record: dict[str, Any]) -> str:
    """One data set: inertias, their ratio, labels that differ."""
    ours, theirs = record["ours"], record["theirs"]
    ratio = ours["inertia"] / theirs["inertia"]
    shape = f"{record['n_rows']:,} x {record['n_features']}"
    return (
        f"{record['dataset']:<10}{shape:>15}{record['n_clusters']:>5}{ours['inertia']:>15.6g}{theirs['inertia']:>13.6g}"
        f"{ratio:>9.5f}  {mark(ratio, BOUND_INERTIA):<9}{record['labels_differ']:>28}"
        f"{record['labels_differ_float64']:>9}{record['sklearn_float32_differs_from_float64']:>15}"
        f"{ours['fit_s']:>13.2f}{theirs['fit_s']:>9.2f}"
    )


def surroundings_line(record: dict[str, Any]) -> str:
    """Machine, path, threads and versions of a record."""
    simd, threads = record["hardware"]["simd"], record["threads"]
    return f"{record['machine']}, vqrs path {simd}, {threads} threads, commit {record['commit'] or 'unknown'}"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Bytes against error, ours and theirs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="MiB of the table", ylabel="relative squared error", xscale="log", yscale="log")
    for side, marker in (("ours", "o"), ("theirs", "x")):
        points = [(record[side]["nbytes"] / 2**20, record[side]["relative_error"]) for record in records]
        axes.plot(*zip(*points, strict=True), marker, label=records[0][side]["library"])
    for record in records:
        point = (record["ours"]["nbytes"] / 2**20, record["ours"]["relative_error"])
        axes.annotate(record["pair"], point, textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.set_title(f"{records[0]['dataset']}: {records[0]['n_rows']:,} x {records[0]['n_features']}")
    axes.legend()
    figure.savefig(path, dpi=150)
