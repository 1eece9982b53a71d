"""The benchmark of trained tables on click and rating data: methods, budgets, seeds and models, one JSON line a run.

Runs are independent of each other and go on where they were stopped: a run whose line is in the file is not repeated.
The learning rate of a method at a budget is chosen with the first seed, on the validation part, and then kept.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vqrs
from vqrs.bench import report
from vqrs.bench.datasets import Dataset, open_dataset
from vqrs.bench.training import Settings, score, train

LOOKUP_SECONDS = 0.2
LOOKUP_ROWS = 1024
"""Rows of the data set whose ids a timed lookup asks for."""
FILE_NBYTES = 4096
"""Header of a table file, which a table in memory does not have."""


@dataclass(frozen=True)
class Budget:
    """A budget of the embedding.

    Parameters
    ----------
    unit : str
        ``"ratio"`` (float32 bytes of the table over bytes that inference holds), ``"nbytes"`` (those bytes),
        ``"num_floats"`` (trained floats) or ``"ppd"`` (trained floats of a hash table with so many rows in each field:
        how the paper on clustered compositional embeddings counts).
    value : float
    """

    unit: str
    value: float

    def settings(self, field_sizes: Sequence[int], dim: int) -> dict[str, Any]:
        """The arguments of an embedding."""
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"a budget must be positive, got {self.unit}={self.value:g}")
        if self.unit == "ratio":
            return {"ratio": self.value}
        if self.unit == "ppd":
            return {"num_floats": int(self.value) * dim * len(field_sizes)}
        if self.unit in ("nbytes", "num_floats"):
            return {self.unit: int(self.value)}
        raise ValueError(f"a budget is a ratio, nbytes, num_floats or ppd, not {self.unit!r}")

    def nbytes(self, field_sizes: Sequence[int], dim: int) -> int:
        """The same in bytes, at least one; a trained float counts four."""
        settings = self.settings(field_sizes, dim)
        if "ratio" in settings:
            return max(1, int(4 * sum(field_sizes) * dim / self.value))
        return max(1, int(settings.get("nbytes", 4 * settings.get("num_floats", 0))))


@dataclass(frozen=True)
class Plan:
    """What to run.

    Parameters
    ----------
    dataset : str
        What ``vqrs.bench.datasets.open_dataset`` takes.
    dataset_options : dict
        Its options.
    methods : sequence of str
        Names of ``vqrs.torch.methods()``, each with settings if wanted: ``"cce:n_columns=16"``.
    budgets : sequence of Budget
    models : sequence of str
        Names of ``vqrs.bench.models.models()``, each with settings if wanted: ``"gmf:weights=False"``.
    seeds : int
        Number of runs with different hashes, initial weights and orders.
    embedding_dim : int
    separate : bool
        A table for each field instead of one for all.
    learning_rates : sequence of float
        The best on the validation part, with the first seed, is used.
    settings : Settings, optional
        How a model is trained.
    compress : sequence of str
        Kinds of ``vqrs.compress`` that compress the trained full table at each budget; ``"auto"`` chooses one. The
        full table is then trained even where it is not among the methods.
    """

    dataset: str
    methods: Sequence[str]
    budgets: Sequence[Budget]
    models: Sequence[str] = ("dlrm",)
    seeds: int = 3
    embedding_dim: int = 16
    separate: bool = False
    learning_rates: Sequence[float] = (1e-3,)
    settings: dict[str, Any] = field(default_factory=dict)
    dataset_options: dict[str, Any] = field(default_factory=dict)
    compress: Sequence[str] = ()

    def cells(self) -> list[Cell]:
        """What workers do one at a time: all seeds of a method at a budget."""
        found = []
        names = {parse_method(method)[0] for method in self.methods}
        methods = ["full", *self.methods] if self.compress and "full" not in names else self.methods
        for model in self.models:
            for method in methods:
                if parse_method(method)[0] == "full":
                    found.append(Cell(model, method, None))
                else:
                    found += [Cell(model, method, budget) for budget in self.budgets]
        return found


@dataclass(frozen=True)
class Cell:
    """A method at a budget in a model; the full table has none."""

    model: str
    method: str
    budget: Budget | None


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of a method or a model.

    Raises
    ------
    ValueError
        A setting is not of the form NAME=VALUE.

    Examples
    --------
    >>> parse_method("cce:n_columns=16,hot_ids=None")
    ('cce', {'n_columns': 16, 'hot_ids': None})
    """
    name, _, rest = text.partition(":")
    settings = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"settings of a method are written NAME=VALUE, got {part!r} in {text!r}")
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            settings[key.strip()] = value.strip()
    return name, settings


def read_runs(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a file of runs; of runs with equal keys the last one. What is damaged or has no key is left out."""
    return [line for line in report.read_runs(path)[0] if "key" in line] if Path(path).exists() else []


def run(
    plan: Plan,
    out: str | Path,
    *,
    n_jobs: int = 1,
    progress: Callable[[int, int, dict[str, Any] | None], None] | None = None,
) -> list[dict[str, Any]]:
    """Do the runs of a plan that are not in the file yet.

    Parameters
    ----------
    plan : Plan
    out : path
        File of raw results, one JSON line a run; appended to.
    n_jobs : int
        Processes, of one thread each.
    progress : callable, optional
        Called with cells done, cells in all, and the last line of a cell that has just been done (None at the start).

    Returns
    -------
    list of dict
        The lines of this plan's cells.

    Raises
    ------
    FileNotFoundError
        There is no such data set.
    ValueError
        A method, model, setting, budget or learning rate that there is not, or a data set that cannot be scored.
    ChildProcessError
        A process was killed; what it had written stays.
    """
    _check(plan)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(out)
    cells = plan.cells()
    lines: list[dict[str, Any]] = []
    if progress is not None:
        progress(0, len(cells), None)
    for done, found in enumerate(_results(plan, cells, out, n_jobs), start=1):
        lines += found
        if progress is not None:
            progress(done, len(cells), found[-1] if found else None)
    return lines


def _results(plan: Plan, cells: list[Cell], out: Path, n_jobs: int) -> Iterator[list[dict[str, Any]]]:
    if n_jobs == 1:
        worker = _Worker(plan, out)
        yield from map(worker.run_cell, cells)
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(n_jobs, mp_context=context, initializer=_start_worker, initargs=(plan, out)) as pool:
        try:
            pending = {pool.submit(_run_in_worker, cell) for cell in cells}
            while pending:
                ready, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        except BaseException as error:
            # Workers would go on with the cells that they have been given: minutes. What is written is whole.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    f"one of {n_jobs} processes was killed, as happens where memory runs out; what {out} holds stays: "
                    "run the same again, with fewer processes"
                ) from error
            raise


def _check(plan: Plan) -> None:
    import vqrs.torch
    from vqrs.bench.models import Model, models
    from vqrs.torch.trained.base import TrainedEmbedding

    check_names("method", plan.methods, vqrs.torch.methods(), TrainedEmbedding)
    check_names("model", plan.models, models(), Model)
    kinds = ["auto", *(kind["name"] for kind in vqrs.kinds())]
    for kind in plan.compress:
        if kind not in kinds:
            raise ValueError(f"unknown kind to compress with {kind!r}: there are {', '.join(kinds)}")
    for budget in plan.budgets:
        budget.settings([1], 1)
    for rate in plan.learning_rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"a learning rate must be positive, got {rate:g}")


def check_names(what: str, asked: Sequence[str], known: dict[str, Any], base: type) -> None:
    """Refuse names that there are not, and settings that are not the class's own but unknown or the runner's.

    Raises
    ------
    ValueError
        With what there is.
    """
    for text in asked:
        name, settings = parse_method(text)
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: there are {', '.join(known)}")
        kind = known[name]
        inits = [part.__init__ for part in kind.__mro__[: kind.__mro__.index(base)] if "__init__" in vars(part)]
        found = {p.name: p.kind for init in inits for p in inspect.signature(init).parameters.values()}
        given = inspect.signature(base).parameters.keys() | {"self"}
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        own = [key for key in found if key not in given and found[key] in named]
        for key in settings:
            if key not in own:
                raise ValueError(f"{what} {name} has no setting {key!r}: it has {', '.join(own) or 'none'}")


def _end_last_line(path: Path) -> None:
    """A process that was killed may have left half a line: what follows must start on a new one."""
    # Opened for appending: what another process writes meanwhile is not written over, and a place that cannot be
    # written to is told of before anything is trained.
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


_worker: _Worker | None = None


def _start_worker(plan: Plan, out: Path) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _worker = _Worker(plan, out)


def _run_in_worker(cell: Cell) -> list[dict[str, Any]]:
    assert _worker is not None
    return _worker.run_cell(cell)


class _Worker:
    """Runs cells one after another in a process of its own."""

    def __init__(self, plan: Plan, out: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self.plan, self.out = plan, out
        self.done = {line["key"]: line for line in read_runs(out)}
        self._dataset: Dataset | None = None
        self._frequencies: Any = None

    @property
    def dataset(self) -> Dataset:
        """Opened when the first run that is not done needs it."""
        if self._dataset is None:
            dataset = open_dataset(self.plan.dataset, **self.plan.dataset_options)
            self._check(dataset)
            self._frequencies = dataset.frequencies()
            self._dataset = dataset
        return self._dataset

    def _check(self, dataset: Dataset) -> None:
        """What would be wrong of every run is an error, and no dash in the tables."""
        import torch

        from vqrs.bench.models import models

        for split in ("validation", "test"):
            if len(np.unique(dataset.rows(split).labels)) < 2:
                raise ValueError(
                    f"{dataset.name}: the {split} part has {dataset.n_rows(split)} rows of one label or none: "
                    "an AUC needs rows of both"
                )
        for text in self.plan.models:
            name, widths = parse_method(text)
            dim = self.plan.embedding_dim
            models()[name](torch.nn.Identity(), dataset.field_sizes, dim, dataset.n_numeric, random_state=0, **widths)

    def run_cell(self, cell: Cell) -> list[dict[str, Any]]:
        """All seeds of a cell; the learning rate is chosen with the first one, on the validation part."""
        rates = self.plan.learning_rates
        runs = [self._run(cell, 0, rate) for rate in rates]
        best = max(range(len(rates)), key=lambda i: -1.0 if runs[i][0]["error"] else runs[i][0]["validation_auc"])
        lines = self._chosen(cell, 0, rates[best], *runs[best])
        if lines[0]["error"] is None:
            for seed in range(1, self.plan.seeds):
                lines += self._chosen(cell, seed, rates[best], *self._run(cell, seed, rates[best]))
        return lines

    def _chosen(self, cell: Cell, seed: int, rate: float, line: dict[str, Any], model: Any) -> list[dict[str, Any]]:
        """Marks a run as one that counts; behind one of the full table come the runs that compress it."""
        if not line["chosen"]:
            line = self._write(line | {"chosen": True})
        lines = [line]
        if cell.budget is not None or line["error"] is not None:
            return lines
        for budget in self.plan.budgets:
            for kind in self.plan.compress:
                key = self._key(Cell(cell.model, f"compress-{kind}", budget), seed, rate)
                if key not in self.done:
                    # The weights of an earlier call are gone.
                    model = model or self._train(cell, seed, rate)[1]
                    self._write(line | {"key": key} | self._compressed(model, budget, kind))
                lines.append(self.done[key])
        return lines

    def _key(self, cell: Cell, seed: int, rate: float) -> str:
        plan = self.plan
        # 10 and 10.0 are one budget: a run is not repeated because a caller wrote it the other way.
        budget = None if cell.budget is None else [cell.budget.unit, float(cell.budget.value)]
        what = [plan.dataset, plan.dataset_options, cell.model, cell.method, budget, seed, float(rate)]
        return json.dumps([*what, plan.embedding_dim, plan.separate, plan.settings], sort_keys=True)

    def _write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append a line in one write, so that lines of several processes do not mix."""
        with open(self.out, "ab", buffering=1 << 20) as file:
            file.write((json.dumps(line) + "\n").encode())
        self.done[line["key"]] = line
        return line

    def _run(self, cell: Cell, seed: int, rate: float) -> tuple[dict[str, Any], Any]:
        """The line of a run and, if it was not done before, its model."""
        key = self._key(cell, seed, rate)
        if key in self.done:
            return self.done[key], None
        line, model = self._train(cell, seed, rate)
        return self._write({"key": key, "chosen": False} | line), model

    def _train(self, cell: Cell, seed: int, rate: float) -> tuple[dict[str, Any], Any]:
        plan, dataset = self.plan, self.dataset
        name, variant = parse_method(cell.method)
        dim, sizes = plan.embedding_dim, dataset.field_sizes
        line: dict[str, Any] = {
            "dataset": dataset.name,
            "model": cell.model,
            "method": name,
            "variant": variant,
            "budget": None if cell.budget is None else asdict(cell.budget),
            "ratio": 1.0 if cell.budget is None else 4 * sum(sizes) * dim / cell.budget.nbytes(sizes, dim),
            "ppd": int(cell.budget.value) if cell.budget is not None and cell.budget.unit == "ppd" else None,
            "seed": seed,
            "learning_rate": rate,
            "embedding_dim": dim,
            "full_nbytes": 4 * sum(sizes) * dim,
            "version": vqrs.__version__,
            "error": None,
        }
        try:
            model = self._model(cell, name, variant, seed)
            outcome = train(model, dataset, Settings(**plan.settings, learning_rate=rate), random_state=seed)
        except (ValueError, FloatingPointError) as error:
            # Out of reach of the method, or diverged: a dash in the tables, with what it says.
            unknown = ["auc", "log_loss", "validation_auc", "trained_floats", "inference_nbytes", "exported_nbytes"]
            reached = isinstance(error, FloatingPointError)
            least = None if reached else self._least_training_nbytes(cell, name, variant)
            return line | dict.fromkeys(unknown) | {"error": str(error), "training_nbytes": least}, None
        return line | self._measured(model, outcome), model

    def _model(self, cell: Cell, name: str, variant: dict[str, Any], seed: int) -> Any:
        import vqrs.torch
        from vqrs.bench.models import models
        from vqrs.torch.trained.fields import FieldEmbeddings

        plan, dataset = self.plan, self.dataset
        budget = {} if cell.budget is None else cell.budget.settings(dataset.field_sizes, plan.embedding_dim)

        embedding = FieldEmbeddings(
            vqrs.torch.methods()[name],
            dataset.field_sizes,
            plan.embedding_dim,
            separate=plan.separate,
            frequencies=self._frequencies,
            random_state=1_000 * seed + 17,
            **budget,
            **variant,
        )
        model, widths = parse_method(cell.model)
        return models()[model](
            embedding, dataset.field_sizes, plan.embedding_dim, dataset.n_numeric, random_state=seed, **widths
        )

    def _least_training_nbytes(self, cell: Cell, name: str, variant: dict[str, Any]) -> int | None:
        """Training bytes of a method that cannot reach the budget, at the size that it takes by itself."""
        try:
            embedding = self._model(Cell(cell.model, cell.method, None), name, variant, 0).embedding
        except ValueError:
            return None
        return int(embedding.training_nbytes())

    def _measured(self, model: Any, outcome: Any) -> dict[str, Any]:
        embedding = model.embedding
        tables = [part.to_table() for part in embedding.parts] if all(p.has_table for p in embedding.parts) else None
        ids = next(iter(self.dataset.batches("test", LOOKUP_ROWS))).ids
        return {
            "auc": outcome.auc,
            "log_loss": outcome.log_loss,
            "validation_auc": outcome.validation_auc,
            "epochs": outcome.epochs,
            "best_epoch": outcome.best_epoch,
            "seconds": round(outcome.seconds, 3),
            "seconds_per_step": outcome.seconds / max(1, outcome.steps),
            "trained_floats": outcome.trained_floats,
            "training_nbytes": outcome.training_nbytes,
            "inference_nbytes": embedding.inference_nbytes(),
            "exported_nbytes": None if tables is None else sum(table.nbytes for table in tables),
            "lookups_per_second": _lookups_per_second(embedding, ids),
            "history": outcome.history,
        }

    def _compressed(self, model: Any, budget: Budget, kind: str) -> dict[str, Any]:
        """The full table of a trained model after ``vqrs.compress``: what differs from the line of the full table."""
        import torch

        import vqrs.torch

        dataset, dim = self.dataset, self.plan.embedding_dim
        limit = budget.nbytes(dataset.field_sizes, dim)
        line: dict[str, Any] = {
            "method": f"compress-{kind}",
            "variant": {},
            "budget": asdict(budget),
            "ratio": 4 * sum(dataset.field_sizes) * dim / limit,
            "ppd": int(budget.value) if budget.unit == "ppd" else None,
            "chosen": True,
        }
        dense = np.concatenate([part.to_dense() for part in model.embedding.parts])
        try:
            table, held = self._compressed_table(dense, kind, limit)
        except ValueError as error:
            unknown = ["auc", "log_loss", "inference_nbytes", "exported_nbytes", "lookups_per_second"]
            return line | dict.fromkeys(unknown) | {"error": str(error)}
        whole = model.embedding
        try:
            model.embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(table.to_numpy()))
            auc, log_loss = score(model, dataset, "test")
        finally:
            model.embedding = whole
        ids = next(iter(dataset.batches("test", LOOKUP_ROWS))).ids
        return line | {
            "auc": auc,
            "log_loss": log_loss,
            "inference_nbytes": held,
            "exported_nbytes": table.nbytes,
            "lookups_per_second": _lookups_per_second(vqrs.torch.Embedding.from_table(table), ids),
        }

    def _compressed_table(self, dense: NDArray[np.float32], kind: str, limit: int) -> tuple[vqrs.Table, int]:
        """A table that holds at most so many bytes beside the header of its file, and how many it holds."""
        header = FILE_NBYTES
        while True:
            table = vqrs.compress(
                dense,
                nbytes=limit + header,
                method=None if kind == "auto" else kind,
                effort="fast",
                sample_weight=np.maximum(self._frequencies, 0.01),
                random_state=0,
                n_jobs=1,
            )
            held = table.codes.nbytes + sum(t.nbytes for t in table._core.tensors().values())
            if held <= limit:
                return table, held
            header -= held - limit  # smaller than it was taken for


def _lookups_per_second(embedding: Any, ids: Any) -> float:
    """Rows that a module gives in a second, on this process's threads, with ids of the test part."""
    import torch

    asked = torch.from_numpy(ids)
    embedding.eval()
    with torch.no_grad():
        embedding(asked)
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < LOOKUP_SECONDS:
            embedding(asked)
            calls += 1
        return calls * ids.size / (time.perf_counter() - start)
