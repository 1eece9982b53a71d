"""The commands of ``vqrs``, one function each."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

import vqrs
from vqrs import _core, demo
from vqrs._bytes import format_bytes, parse_bytes
from vqrs._encode import RowSample
from vqrs._readers import Rows, read_names, read_rows, read_weights
from vqrs._validation import as_matrix
from vqrs.bench._commands import app as bench_app
from vqrs.metrics import above_bound_db

app = typer.Typer(
    name="vqrs",
    help=(
        "Compressed embedding tables. IN is .npy, .npz[:KEY], .safetensors[:TENSOR], .pt[:KEY], "
        "or word2vec or GloVe text."
    ),
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")

TableFile = Annotated[Path, typer.Argument(metavar="T", help="A table file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Effort = Annotated[Literal["fast", "balanced", "best"], typer.Option(help="How much is tried.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads, all by default.", show_default=False)]

EVALUATED_BYTES = 64 << 20
"""Float32 bytes of rows that ``eval`` looks at at a time."""

WIDE = 180
"""Columns of a table with a head, where the output is no terminal."""


@app.callback()
def _no_options() -> None:
    """Without a callback typer would run a lone command under no name."""


_PARAMETERS = {entry["name"]: entry["parameters"] for entry in vqrs.kinds()}


@app.command(
    epilog="Parameters for --set: " + "; ".join(f"{kind}: {', '.join(of)}" for kind, of in _PARAMETERS.items())
)
def compress(
    source: Annotated[str, typer.Argument(metavar="IN", help="The rows.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The table file to write.", show_default=False)],
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(_PARAMETERS)}; chosen by default.", show_default=False)
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Least ratio to float32.", show_default=False)] = None,
    n_bytes: Annotated[
        str | None,
        typer.Option("--bytes", help="Most bytes, for example 64MiB.", show_default=False),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Largest relative squared error.", show_default=False),
    ] = None,
    effort: Effort = "balanced",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method.", show_default=False),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A weight a row: .npy, or text with one a line.", show_default=False),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A name a row: text with one a line.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal bytes.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compress the rows of IN into the table file OUT."""
    parameters = _read_settings(method, settings or [])
    budget = _read_budget(ratio, n_bytes, max_error, method)
    path_in = source if os.path.exists(source) else source.rpartition(":")[0]
    if out.exists() and os.path.exists(path_in) and os.path.samefile(path_in, out):
        raise typer.BadParameter(f"OUT is IN, {path_in}: the rows would be lost, name another file")
    rows = read_rows(source)
    start = time.perf_counter()
    with _progress_bar() as progress:
        table = vqrs.compress(
            rows.values,
            **budget,
            method=method,
            effort=effort,
            path=out,
            sample_weight=None if weights is None else read_weights(weights),
            names=rows.names if names is None else read_names(names),
            random_state=seed,
            n_jobs=threads,
            progress=progress or False,
            **parameters,
        )
    _show_table(table, as_json, {"seconds": round(time.perf_counter() - start, 3)})


@app.command()
def tune(
    source: Annotated[str, typer.Argument(metavar="IN", help="The rows.", show_default=False)],
    ratios: Annotated[
        list[float] | None, typer.Option("--ratio", help="A ratio to float32, repeatable.", show_default=False)
    ] = None,
    budgets: Annotated[
        list[str] | None, typer.Option("--bytes", help="Bytes, for example 64MiB; repeatable.", show_default=False)
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="A kind to try, repeatable; all by default.", show_default=False),
    ] = None,
    effort: Effort = "balanced",
    cross_validate: Annotated[
        int | None,
        typer.Option(min=2, help="Folds: judge by rows that were not fitted.", show_default=False),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A weight a row: .npy, or text with one a line.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw error beside bits.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal bytes and errors.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Try the kinds on a sample of the rows of IN: bytes, error, seconds to fit, nanoseconds a lookup."""
    for method in methods or []:
        _read_settings(method, [])
    rows = read_rows(source)
    with _progress_bar() as progress:
        result = vqrs.tune(
            rows.values,
            ratios or None,
            nbytes=budgets or None,
            method=methods or None,
            effort=effort,
            cross_validate=cross_validate,
            sample_weight=None if weights is None else read_weights(weights),
            random_state=seed,
            n_jobs=threads,
            progress=progress or False,
        )
    if plot is not None:
        result.save_plot(plot)
    if as_json:
        _print_json(result.to_dict())
        return
    head, *lines = result.lines()
    _print_rows(f"{source}: {result.title()}", lines, head)
    print("* less error than all of fewer bytes")


@app.command()
def info(table: TableFile, as_json: Json = False) -> None:
    """Print everything that is known about a table."""
    with vqrs.open(table) as opened:
        _show(opened.info(), as_json, str(table))


@app.command()
def verify(table: TableFile, as_json: Json = False) -> int:
    """Look at every byte of a table; exit code 1 if it is damaged."""
    try:
        with vqrs.open(table) as opened:
            opened.verify()
    except vqrs.TableError as error:
        if not as_json:
            raise
        _print_json({"path": str(table), "intact": False, "error": str(error)})
        return 1
    _show({"path": str(table), "intact": True}, as_json, str(table))
    return 0


@app.command()
def lookup(
    table: TableFile,
    ids: Annotated[
        list[str],
        typer.Argument(metavar="ID...", help="Row numbers or names; put -- before negative ones.", show_default=False),
    ],
    as_json: Json = False,
) -> None:
    """Print rows: a line each, the ID before its values."""
    with vqrs.open(table) as opened:
        rows = np.array([_row(opened, text) for text in ids])
    if as_json:
        _print_json({"ids": ids, "rows": rows.tolist()})
        return
    for text, row in zip(ids, rows, strict=True):
        print(text, *(f"{value:.7g}" for value in row))


@app.command("eval")
def evaluate(
    table: TableFile,
    source: Annotated[str, typer.Argument(metavar="IN", help="The rows it was made of.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare a table with the rows that it was made of."""
    rows = read_rows(source)
    with vqrs.open(table) as opened, _progress_bar() as progress:
        measured = _compare(opened, rows, progress)
    _show(measured, as_json, f"{table} beside {source}")


@app.command("demo")
def run_demo(
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("demo-tables"),
    as_json: Json = False,
) -> None:
    """Compress a real token table and look at what is left."""
    with _progress_bar() as progress:
        results = demo.run(out, progress)
    if as_json:
        _print_json(results)
        return
    for title, rows in demo.report(results):
        _print_rows(title, rows)


# ---- reading options -----------------------------------------------------------------------------------------------


def _read_settings(method: str | None, settings: list[str]) -> dict[str, Any]:
    """``name=value`` texts, checked against the parameters of the method."""
    if method is not None and method not in _PARAMETERS:
        raise typer.BadParameter(f"there is no method {method!r}; there are {', '.join(_PARAMETERS)}.")
    if method is None and settings:
        raise typer.BadParameter("--set needs --method.")
    parameters = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {setting}: expected NAME=VALUE.")
        if name not in _PARAMETERS[method]:
            raise typer.BadParameter(f"{method} has no parameter {name!r}; it has {', '.join(_PARAMETERS[method])}.")
        parameters[name] = _literal(value)
    return parameters


def _literal(text: str) -> Any:
    """A number, true or false; otherwise the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _read_budget(
    ratio: float | None, n_bytes: str | None, max_error: float | None, method: str | None
) -> dict[Literal["ratio", "nbytes", "max_error"], Any]:
    given = {"ratio": ratio, "nbytes": n_bytes, "max_error": max_error}
    budget: dict[Any, Any] = {name: value for name, value in given.items() if value is not None}
    if len(budget) > 1 or not (budget or method):
        raise typer.BadParameter("give one of --ratio, --bytes and --max-error, or a --method.")
    if n_bytes is not None:
        try:
            parse_bytes(n_bytes)
        except ValueError as error:
            raise typer.BadParameter(f"--bytes: {error}.") from None
    return budget


def _row(table: vqrs.Table, text: str) -> NDArray[np.float32]:
    """The row of that name; else of that number."""
    if table.names is not None:
        try:
            return table[text]
        except KeyError:
            pass
    try:
        return table[int(text)]
    except ValueError:
        raise KeyError(f"no row is named {text!r}, and it is no row number") from None


# ---- measuring -----------------------------------------------------------------------------------------------------


def _compare(table: vqrs.Table, source: Rows, progress: _core.Progress | None) -> dict[str, Any]:
    if tuple(source.values.shape) != table.shape:
        raise ValueError(f"the table has shape {table.shape}, the rows have {tuple(source.values.shape)}")
    n_rows, dim = table.shape
    errors, energies, cosines = np.empty(n_rows), np.empty(n_rows), np.empty(n_rows)
    largest, sample = 0.0, RowSample(dim)
    step = max(1, EVALUATED_BYTES // (4 * dim))
    for start in range(0, n_rows, step):
        stop = min(n_rows, start + step)
        block = as_matrix(source.values[start:stop])
        sample.add(block)
        x = block.astype(np.float64)
        decoded = table.decode(start, stop).astype(np.float64)
        errors[start:stop] = ((x - decoded) ** 2).sum(axis=1)
        energies[start:stop] = (x**2).sum(axis=1)
        cosines[start:stop] = _cosines(x, decoded, energies[start:stop])
        largest = max(largest, float(np.abs(x - decoded).max()))
        if progress is not None:
            progress("comparing", stop, n_rows)
    of_rows = np.divide(errors, energies, out=np.where(errors > 0, np.inf, 0.0), where=energies > 0)
    percentiles = (50, 90, 99, 100)
    relative = float(errors.sum() / energies.sum()) if energies.any() else float(of_rows.max())
    bound = sample.gaussian_bound(table._core.codec())
    return {
        "relative_error": relative,
        **bound,
        "above_bound_db": above_bound_db(relative, bound.get("gaussian_bound", 0)),
        "cosine": {"mean": float(cosines.mean()), "min": float(cosines.min())},
        "max_absolute_error": largest,
        "relative_error_of_rows": {
            f"percentile_{p}": float(value)
            for p, value in zip(percentiles, np.percentile(of_rows, percentiles, method="lower"), strict=True)
        },
        "nbytes": table.nbytes,
        "float32_nbytes": 4 * table.size,
        "ratio": table.ratio,
    }


def _cosines(
    x: NDArray[np.float64], decoded: NDArray[np.float64], energies: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of each row with its decoded one; 1 where both are zero, 0 where one is."""
    norms = np.sqrt(energies * (decoded**2).sum(axis=1))
    both_zero = (energies == 0) & ~decoded.any(axis=1)
    return np.divide((x * decoded).sum(axis=1), norms, out=both_zero.astype(np.float64), where=norms > 0)


# ---- showing -------------------------------------------------------------------------------------------------------


@contextmanager
def _progress_bar() -> Iterator[_core.Progress | None]:
    """A progress function that draws bars on stderr; None where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.speed:.3g}/s")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total, visible=True)

        yield show


def _show_table(table: vqrs.Table, as_json: bool, extra: Mapping[str, Any]) -> None:
    described = table.info()
    shown = {
        "path": described["path"],
        "kind": table.kind,
        "parameters": described["parameters"],
        "shape": list(table.shape),
        "float32_nbytes": described["float32_nbytes"],
        "nbytes": table.nbytes,
        "ratio": table.ratio,
        "bits_per_value": described["bits_per_value"],
        "errors": described["errors"],
        **extra,
    }
    _show(shown, as_json, str(table.path))


def _show(values: Mapping[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        _print_json(values)
    else:
        _print_rows(title, [[name, text] for name, text in _flat(values)])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts, the entries of inner mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif name.endswith("nbytes"):
            yield prefix + name, f"{value:,} ({format_bytes(value)})"
        elif isinstance(value, float):
            yield prefix + name, f"{value:.6g}"
        else:
            yield prefix + name, str(value)


def _print_rows(title: str, rows: list[list[str]], head: list[str] | None = None) -> None:
    """Rows of texts, in columns."""
    shown = RichTable(title=title, title_justify="left", show_header=head is not None)
    for text in head or [""] * len(rows[0]):
        shown.add_column(text, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console(markup=False, highlight=False)
    if head is not None and not console.is_terminal:
        # A wide table in a file or a pipe keeps its lines whole.
        console.width = max(console.width, WIDE)
    console.print(shown)


def _print_json(values: Mapping[str, Any]) -> None:
    json.dump(_finite(values), sys.stdout)
    print()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
