"""The benchmark of trained tables on click and rating data: methods, budgets, seeds and models, one JSON line a run.

Runs are independent of each other and go on where they were stopped: a run whose line is in the file is not repeated.
The learning rate of a method at a budget is chosen with the first seed, on the validation part, and then kept.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import vqrs
from vqrs.bench.datasets import Dataset, open_dataset

LOOKUP_SECONDS = 0.1
LOOKUP_IDS = 8192
FIRST_SEED_OFFSET = 0


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
        if self.unit == "ratio":
            return {"ratio": self.value}
        if self.unit == "ppd":
            return {"num_floats": int(self.value) * dim * len(field_sizes)}
        if self.unit in ("nbytes", "num_floats"):
            return {self.unit: int(self.value)}
        raise ValueError(f"a budget is a ratio, nbytes, num_floats or ppd, not {self.unit!r}")

    def nbytes(self, field_sizes: Sequence[int], dim: int) -> int:
        """The same in bytes; a trained float counts four."""
        settings = self.settings(field_sizes, dim)
        if "ratio" in settings:
            return int(4 * sum(field_sizes) * dim / self.value)
        return int(settings.get("nbytes", 4 * settings.get("num_floats", 0)))


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
        Names of ``vqrs.bench.models.models()``.
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
        Kinds of ``vqrs.compress`` that compress the trained full table at each budget; ``"auto"`` chooses one.
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
        for model in self.models:
            for method in self.methods:
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
    """Name and settings of a method.

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
    """Lines of a file of runs; of runs with equal keys the last one. A line that was cut off is left out."""
    found = {}
    path = Path(path)
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            found[line["key"]] = line
    return list(found.values())


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
    ValueError
        An unknown method, model or data set.
    """
    _check(plan)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(out)
    cells = plan.cells()
    lines: list[dict[str, Any]] = []
    done = 0
    if progress is not None:
        progress(0, len(cells), None)
    for found in _results(plan, cells, out, n_jobs):
        done += 1
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
    with ProcessPoolExecutor(n_jobs, mp_context=context, initializer=_start_worker, initargs=(plan, out)) as pool:
        pending = {pool.submit(_run_in_worker, cell) for cell in cells}
        try:
            while pending:
                ready, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check(plan: Plan) -> None:
    import vqrs.torch
    from vqrs.bench.models import models

    for what, asked, known in (
        ("method", [parse_method(method)[0] for method in plan.methods], vqrs.torch.methods()),
        ("model", plan.models, models()),
        ("kind to compress with", plan.compress, ["auto", *(kind["name"] for kind in vqrs.kinds())]),
    ):
        for name in asked:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}: there are {', '.join(known)}")
    for budget in plan.budgets:
        budget.settings([1], 1)


def _end_last_line(path: Path) -> None:
    """A process that was killed may have left half a line: what follows must start on a new one."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


_worker: _Worker | None = None


def _start_worker(plan: Plan, out: Path) -> None:
    global _worker
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
            self._dataset = open_dataset(self.plan.dataset, **self.plan.dataset_options)
            self._frequencies = self._dataset.frequencies()
        return self._dataset

    def run_cell(self, cell: Cell) -> list[dict[str, Any]]:
        """All seeds of a cell; the learning rate is chosen with the first one."""
        lines = [self._run(cell, 0, rate) for rate in self.plan.learning_rates]
        best = max(lines, key=lambda line: -1.0 if line["error"] else line["validation_auc"])
        if best["error"] is None:
            lines += [self._run(cell, seed, best["learning_rate"]) for seed in range(1, self.plan.seeds)]
        chosen = [line for line in lines if line["learning_rate"] == best["learning_rate"]]
        if cell.budget is None:
            for budget in self.plan.budgets:
                for kind in self.plan.compress:
                    for line in chosen:
                        chosen = [*chosen, *self._compressed(cell, budget, kind, line)]
        return chosen

    def _key(self, cell: Cell, seed: int, rate: float) -> str:
        plan = self.plan
        budget = None if cell.budget is None else [cell.budget.unit, cell.budget.value]
        what = [plan.dataset, plan.dataset_options, cell.model, cell.method, budget, seed, rate]
        return json.dumps([*what, plan.embedding_dim, plan.separate, plan.settings], sort_keys=True)
