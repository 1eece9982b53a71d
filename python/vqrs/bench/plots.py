"""Plots of the benchmark's runs; they need matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vqrs.bench.report import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot", "save_plot"]

NO_MATPLOTLIB = "plots need matplotlib: pip install 'vqrs[plot]'"

AXES = {
    "trained_floats": "trained floats",
    "training_nbytes": "bytes held in training: parameters, gradients, optimizer, maps",
    "inference_nbytes": "bytes held in inference: parameters, pointers, maps",
    "exported_nbytes": "bytes of the table file",
}

# Okabe & Ito 2008: distinct for all common kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*<>XphHd8"
QUIET = "#b0b0b0"


def plot(
    members: Sequence[Summary], counts: Sequence[str] = ("training_nbytes", "inference_nbytes"), measure: str = "auc"
) -> Figure:
    """A measure against sizes: a panel a count on a logarithmic axis, a line a method, the full table horizontal.

    The methods that are best at some size in some panel are in colour and named at their lines, the others in grey;
    markers tell all of them apart.

    Parameters
    ----------
    members : sequence of Summary
        Of one section.
    counts : sequence of str
        Keys of ``AXES``.
    measure : str
        The largest is best for ``"auc"``, the least for all else.

    Returns
    -------
    matplotlib Figure

    Raises
    ------
    ImportError
        There is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(NO_MATPLOTLIB) from error
    reached = [s for s in members if s.error is None and measure in s.means]
    methods = list(dict.fromkeys(s.method for s in reached if s.unit is not None))
    best = _best(reached, counts, measure)[: len(COLOURS)]
    colours = dict(zip(best, COLOURS, strict=False))
    figure = Figure(figsize=(7 * len(counts) + 2.5, 6.2), layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        ends = {}
        for number, method in enumerate(methods):
            points = sorted(
                (s.means[count], s.means[measure], s.intervals.get(measure, 0.0))
                for s in reached
                if s.method == method and count in s.means and s.unit
            )
            if not points:
                continue
            _line(axes, method, points, colours.get(method), number)
            if method in colours:
                ends[method] = points[-1][:2]
        _full(axes, reached, measure)
        axes.set(xscale="log", xlabel=AXES[count])
        axes.margins(x=0.12)
        _names(axes, ends, colours)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel({"auc": "AUC on the test part", "log_loss": "logarithmic loss"}.get(measure, measure))
    figure.suptitle(members[0].section.title)
    handles, labels = panels[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: labels[place] not in colours)
    figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside right upper",
        fontsize="small",
        frameon=False,
    )
    return figure


def save_plot(members: Sequence[Summary], path: str | os.PathLike[str], **settings: Any) -> None:
    """Write :func:`plot` to a picture; its ending says the format."""
    plot(members, **settings).savefig(os.fspath(path), dpi=110)


def _best(reached: Sequence[Summary], counts: Sequence[str], measure: str) -> list[str]:
    """Methods that no smaller one beats at some size, those that are so most often first."""
    sign = 1 if measure == "auc" else -1
    wins: dict[str, int] = {}
    for count in counts:
        known = sorted((s for s in reached if count in s.means and s.unit), key=lambda s: s.means[count])
        record = -float("inf")
        for summary in known:
            if sign * summary.means[measure] > record:
                record = sign * summary.means[measure]
                wins[summary.method] = wins.get(summary.method, 0) + 1
    return sorted(wins, key=lambda method: -wins[method])


def _line(
    axes: Axes, method: str, points: Sequence[tuple[float, float, float]], colour: str | None, number: int
) -> None:
    style: Mapping[str, Any] = (
        {"color": QUIET, "linewidth": 0.8, "markersize": 4, "zorder": 2}
        if colour is None
        else {"color": colour, "linewidth": 2, "markersize": 7, "zorder": 3}
    )
    sizes, values, intervals = zip(*points, strict=True)
    axes.errorbar(
        sizes,
        values,
        yerr=intervals,
        marker=MARKERS[number % len(MARKERS)],
        markerfacecolor=None if number < len(MARKERS) else "white",
        capsize=2,
        label=method,
        **style,
    )


def _names(axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Names at the right ends of the coloured lines, moved up where they would lie over each other."""
    low, high = axes.get_ylim()
    least = lowest = -float("inf")
    for method, (size, value) in sorted(ends.items(), key=lambda end: end[1][1]):
        lowest = max(value, least)
        least = lowest + 0.03 * (high - low)
        axes.annotate(
            method,
            (size, value),
            (size, lowest),
            ha="left",
            va="bottom",
            color=colours[method],
            fontsize="small",
            zorder=4,
        )


def _full(axes: Axes, reached: Sequence[Summary], measure: str) -> None:
    for summary in reached:
        if summary.unit is None:
            axes.axhline(summary.means[measure], color="k", linestyle="--", linewidth=1, label=summary.method)
