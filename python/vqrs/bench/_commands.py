"""The commands of ``vqrs bench``, one function each; torch and matplotlib are imported when a command needs them."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqrs._bytes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from vqrs.bench.ctr import Budget
    from vqrs.bench.report import Section, Summary

app = typer.Typer(help="Compare tables that are trained in their compressed form.", rich_markup_mode=None)

RATIOS = (10.0, 100.0, 1000.0)
"""Budgets where none is given."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Files of `ctr`.", show_default=False)]
Options = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Of the data set's reader, repeatable.", show_default=False),
]

CtrProgress = Callable[[int, int, "dict[str, Any] | None"], None]


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def ctr(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="synthetic-1m, synthetic-10m, or a file or folder.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SETTING=VALUE,...]", help="Repeatable; all by default, also: all.", show_default=False
        ),
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Float32 bytes over bytes of inference, repeatable; 10, 100, 1000 by default."),
    ] = None,
    n_bytes: Annotated[
        list[str] | None, typer.Option("--bytes", help="Bytes of inference, for example 64KiB; repeatable.")
    ] = None,
    floats: Annotated[list[int] | None, typer.Option(min=1, help="Trained floats, repeatable.")] = None,
    ppd: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Trained floats of a hash table of so many rows a field, repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:SETTING=VALUE,...]", help="Repeatable; dlrm by default.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    dim: Annotated[int, typer.Option(min=1, help="Values of a row.")] = 16,
    separate: Annotated[bool, typer.Option("--separate", help="A table for each field.")] = False,
    compress: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Also compress the trained full table by this kind, or auto; repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Most epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Epochs without a better validation AUC.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0.0)] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Repeatable: the best on the validation part is kept; 0.001 by default.")
    ] = None,
    option: Options = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Raw results; runs found there are not repeated.")] = Path(
        "runs.jsonl"
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    as_json: Json = False,
) -> None:
    """Train methods at budgets on click or rating data: one JSON line a run, then a table of AUCs."""
    _need("torch", "torch")
    _need("sklearn", "sklearn")
    import vqrs.torch
    from vqrs.bench import report
    from vqrs.bench.ctr import Plan, run

    methods = [name for asked in method or ["all"] for name in (vqrs.torch.methods() if asked == "all" else [asked])]
    given = {"epochs": epochs, "batch_size": batch_size, "patience": patience, "weight_decay": weight_decay}
    plan = Plan(
        dataset,
        methods,
        _budgets(ratio, n_bytes, floats, ppd),
        models=model or ["dlrm"],
        seeds=seeds,
        embedding_dim=dim,
        separate=separate,
        learning_rates=learning_rate or [1e-3],
        settings={name: value for name, value in given.items() if value is not None},
        dataset_options=_options(option),
        compress=compress or [],
    )
    with _ctr_progress() as progress:
        lines = run(plan, out, n_jobs=jobs, progress=progress)
    summaries = report.summarise(lines)
    if as_json:
        print(json.dumps({"runs": str(out), "summaries": report.as_dicts(summaries)}))
        return
    for section, members in report.sections(summaries).items():
        _print_markdown(f"### {section.title}\n\n{report.markdown_table(members)}\n")
    print(f"{out}: {len(lines)} runs; all measures by: vqrs bench report {out}")


@app.command("report")
def write_report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write report.md there, and plots.", show_default=False)
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Put the tables into a Markdown file, between <!-- results begin --> and <!-- results end -->.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw AUC against bytes; needs --out or --into.")] = False,
    as_json: Json = False,
) -> None:
    """Tables and plots of raw results: AUC, loss, floats, bytes, times, with intervals over seeds."""
    from vqrs.bench import report

    if plot and out is None and into is None:
        raise typer.BadParameter("--plot needs --out FOLDER or --into FILE: where the pictures go.")
    summaries = report.summarise(_read(runs))
    if as_json:
        print(json.dumps({"summaries": report.as_dicts(summaries), "winners": report.winners_as_dicts(summaries)}))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        pictures = _draw(summaries, out, "") if plot else {}
        (out / "report.md").write_text(report.markdown_report(summaries, pictures), encoding="utf-8")
    if into is not None:
        pictures = _draw(summaries, into.parent, f"{into.stem}-") if plot else {}
        text = report.put_between(into.read_text(encoding="utf-8"), report.markdown_report(summaries, pictures))
        into.write_text(text, encoding="utf-8")
    if not (as_json or out or into):
        _print_markdown(report.markdown_report(summaries))


@app.command("prepare")
def prepare_data(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file or folder.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What DATASET is then.", show_default=False)],
    format: Annotated[str | None, typer.Option(help="Recognised by default.", show_default=False)] = None,
    option: Options = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FOLDER, if it is a prepared one.")] = False,
) -> None:
    """Read a data set once, also one that is larger than memory, into a folder of arrays that open at once."""
    from vqrs.bench import open_dataset, prepare

    with _rows_progress() as progress:
        prepare(source, folder, format=format, overwrite=overwrite, progress=progress, **_options(option))
    print(open_dataset(folder))


@app.command("traits")
def tell_traits(
    datasets: Annotated[
        list[str], typer.Argument(metavar="DATASET...", help="Names or files, as of `ctr`.", show_default=False)
    ],
    runs: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUNS", help="Files of `ctr`, repeatable: who won is told beside.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """What may predict the best method: cardinalities, power laws, ids seen once, correlations of fields."""
    from vqrs.bench import open_dataset, report
    from vqrs.bench import traits as of

    found = [of.traits(open_dataset(dataset)) for dataset in datasets]
    summaries = report.summarise(_read(runs)) if runs else []
    if as_json:
        print(json.dumps({"traits": found, "winners": report.winners_as_dicts(summaries)}))
        return
    for of_set in found:
        print(of.format_traits(of_set) + "\n")
    _print_markdown(report.markdown_traits(map(of.summary, found), summaries))


@app.command("theory")
def check_theory(
    runs: Annotated[int, typer.Option(min=1, help="Draws of the problem.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of clustering.")] = 30,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it; the ending says the format.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Least squares, the case of CCE that has a proof: the excess after each round beside the theorem's bound."""
    from vqrs.bench import theory

    if plot is not None:
        theory.plot_theory(plot, runs=runs, rounds=rounds)
    excess = theory.gaussian_excess(rounds=rounds, runs=runs)
    bounds = theory.bound(range(1, rounds + 1), *theory.SIZES[1:])
    if as_json:
        print(json.dumps({"sizes": theory.SIZES, "excess": excess.tolist(), "bound": bounds.tolist()}))
        return
    print("n = {}, d1 = {}, d2 = {}, k = {}; shares of ||X T*||²".format(*theory.SIZES))
    print(f"{'round':>5}  {'least':>8}  {'mean':>8}  {'most':>8}  {'bound':>8}")
    for number, (of_runs, limit) in enumerate(zip(excess.T, bounds, strict=True), start=1):
        figures = (of_runs.min(), of_runs.mean(), of_runs.max(), limit)
        print(f"{number:>5}  " + "  ".join(f"{figure:8.5f}" for figure in figures))


@app.command()
def scale(
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:SETTING=VALUE,...]", help="Repeatable; hash by default.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 100_000_000,
    dim: Annotated[int, typer.Option(min=1, help="Values of a row.")] = 100,
    ratio: Annotated[float, typer.Option(help="Float32 bytes over bytes of inference.")] = 1000.0,
    steps: Annotated[int, typer.Option(min=20, help="Training steps.")] = 1000,
    as_json: Json = False,
) -> None:
    """Train a table that would not fit, in a process of its own, and print the memory that this took."""
    _need("torch", "torch")
    from vqrs.bench import scale as scales

    found = [scales.run_scale(name, rows, dim, ratio=ratio, steps=steps) for name in method or ["hash"]]
    if as_json:
        print(json.dumps(found))
        return
    for of_method in found:
        print(of_method["method"])
        for name, value in of_method.items():
            text = f"{value:,} ({format_bytes(value)})" if name.endswith("nbytes") and value is not None else value
            print(f"  {name}: {text}")


# ---- reading options -----------------------------------------------------------------------------------------------


def _need(module: str, extra: str) -> None:
    if sys.modules.get(module, False) is None or find_spec(module) is None:
        raise ImportError(f"this benchmark needs {module}: pip install 'vqrs[{extra}]'")


def _options(texts: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--option {text}: expected NAME=VALUE.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _budgets(
    ratio: list[float] | None, n_bytes: list[str] | None, floats: list[int] | None, ppd: list[int] | None
) -> list[Budget]:
    from vqrs.bench.ctr import Budget

    found = [Budget("ratio", value) for value in ratio or []]
    try:
        found += [Budget("nbytes", parse_bytes(text)) for text in n_bytes or []]
    except ValueError as error:
        raise typer.BadParameter(f"--bytes: {error}.") from None
    found += [Budget("num_floats", value) for value in floats or []] + [Budget("ppd", value) for value in ppd or []]
    return found or [Budget("ratio", value) for value in RATIOS]


def _read(paths: list[Path]) -> list[dict[str, Any]]:
    from vqrs.bench.report import read_runs

    lines = []
    for path in paths:
        found, notes = read_runs(path)
        lines += found
        for note in notes:
            print("vqrs:", note, file=sys.stderr)
    if not lines:
        raise ValueError(f"no runs in {', '.join(map(str, paths))}")
    return lines


# ---- showing -------------------------------------------------------------------------------------------------------


@contextmanager
def _ctr_progress() -> Iterator[CtrProgress]:
    """A progress function that draws a bar on stderr; a line for each step where that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:

        def tell(done: int, total: int, line: dict[str, Any] | None) -> None:
            if line is not None:
                print(f"{done}/{total} {_told(line)}", file=sys.stderr, flush=True)

        yield tell
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def show(done: int, total: int, line: dict[str, Any] | None) -> None:
            bars.update(task, completed=done, total=total)
            if line is not None:
                bars.update(task, description=f"last: {_told(line)}")

        yield show


@contextmanager
def _rows_progress() -> Iterator[Callable[[str, int], None] | None]:
    """A progress function that tells rows read on stderr; None where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with console.status("reading") as status:
        yield lambda stage, rows: status.update(f"{stage}: {rows:,} rows")


def _told(line: dict[str, Any]) -> str:
    from vqrs.bench.report import _text, budget_text, summarise

    [summary] = summarise([line])
    text = summary.error or f"AUC {_text(summary, 'auc')}"
    return f"{summary.method}, {budget_text(summary.unit, summary.value, summary.ratio)}: {text}"


def _print_markdown(text: str) -> None:
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def _draw(summaries: list[Summary], folder: Path, prefix: str) -> dict[Section, str]:
    """A picture a section; their names."""
    from vqrs.bench import plots, report

    found: dict[Section, str] = {}
    for section, members in report.sections(summaries).items():
        name = prefix + re.sub(r"[^\w.-]+", "-", f"{section.dataset}-{section.model}")
        found[section] = name + (f"-{len(found)}.png" if f"{name}.png" in found.values() else ".png")
        plots.save_plot(members, folder / found[section])
    return found
