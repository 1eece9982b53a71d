"""What a job is, and how it is timed."""

import gc
import importlib
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

Clock = Callable[[], float]


def optional(name: str) -> ModuleType | None:
    """A peer's module, or None and a line that says so."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"skipped: {name} is not installed (pip install 'vqrs[bench]')", file=sys.stderr)
        return None


class Contender(ABC):
    """One way to do a job. A subclass gives ``run``, which is timed; everything else happens outside the clock."""

    group: str
    """What it is counted as: of several ways in a group, the fastest is compared with."""

    name: str
    """Shown beside its times: the function that is called, and with what."""

    def take(self, batch: Any) -> Any:
        """A batch as this library wants it."""
        return batch

    @abstractmethod
    def run(self, batches: Sequence[Any]) -> Any:
        """Does the job once for each batch and returns the last answer."""

    def timed(self, batches: Sequence[Any], clock: Clock) -> tuple[float, Any]:
        """Seconds of ``run``, and its answer."""
        begin = clock()
        answer = self.run(batches)
        return clock() - begin, answer


@dataclass(frozen=True)
class Demand:
    """How many times the speed of a group we want; with ``group`` None, at most how many seconds a unit."""

    group: str | None
    least: float
    aim: float | None = None


@dataclass
class Job:
    """Contenders for one piece of work."""

    case: str
    """Shape, batch, distribution of the ids."""

    ours: Contender
    peers: list[Contender]
    draw: Callable[[np.random.Generator], Any]
    """A new batch."""

    check: Callable[[Contender, Any, Any], dict[str, float]]
    """``check(contender, batch, answer)`` raises if the answer is wrong; its figures are kept beside the time."""

    unit: str
    """What a time is divided by: "row", "id", "call", "fit"."""

    units: int = 1
    """How many of them are in a batch."""

    batches: int = 1
    """Batches that are timed at a time."""

    operations: float | None = None
    """Floating point operations of a batch, where they say something."""

    fresh: bool = True
    """Each contender gets batches of its own, and runs one that is not timed first. False: all get the same."""

    wall: bool = False
    """Wall clock even on one thread: the work waits for something else than the processor."""

    demands: list[Demand] = field(default_factory=list)


class WrongAnswer(RuntimeError):
    """A contender that does not do the job."""


def expect(fine: bool, contender: Contender, what: str) -> None:
    """Raises where an answer is not what it should be."""
    if not fine:
        raise WrongAnswer(f"{contender.name}: {what}")


def measure(job: Job, threads: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Times all contenders in turn until ``seconds`` are spent or 31 repetitions done; every time is kept.

    One thread is timed by the processor time of the whole process, which other programs on the machine disturb least
    and which hides no helper thread; more threads by the wall clock.
    """
    clock = time.perf_counter if job.wall or threads > 1 else time.process_time
    contenders = [job.ours, *job.peers]
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    notes: dict[str, dict[str, float]] = {}
    begin = time.perf_counter()
    gc.disable()
    for repetition in range(32):
        for index, contender in enumerate(contenders):
            rng = np.random.default_rng([seed, repetition, index if job.fresh else 0])
            batches = [job.draw(rng) for _ in range(job.batches + job.fresh)]
            taken = [contender.take(batch) for batch in batches]
            if job.fresh:
                contender.run(taken[:1])
            spent, answer = contender.timed(taken[job.fresh :], clock)
            if repetition == 0:
                notes[contender.name] = job.check(contender, batches[-1], answer)
            # The first repetition of quick work pays for memory that is touched for the first time.
            if repetition or not job.fresh:
                times[contender.name].append(spent / job.batches)
            del batches, taken, answer
        gc.collect()
        if time.perf_counter() - begin > seconds and times[job.ours.name]:
            break
    gc.enable()
    return {
        "case": job.case,
        "unit": job.unit,
        "units": job.units,
        "operations": job.operations,
        "clock": clock.__name__,
        "contenders": [
            {
                "name": contender.name,
                "group": contender.group,
                **spread(times[contender.name]),
                **notes[contender.name],
                "seconds": times[contender.name],
            }
            for contender in contenders
        ],
        "demands": [vars(demand) for demand in job.demands],
    }


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, method="inclusive") if len(times) > 1 else times * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}
