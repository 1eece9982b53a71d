"""Faults that tables and the engine must survive, injected and counted.

Each module of this package has a list ``FAULTS``; :func:`faults` finds them all. ``python -m benches.faults`` (or
``make faults``) injects the full count, the tests (``tests/test_faults.py``) a short one. Everything is seeded.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Outcome:
    """How often a fault was injected, and what did not hold."""

    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    """The first twenty that did not hold: enough to repeat them."""
    note: str = ""
    """What else was measured, in a few words for the report."""

    def add(self, held: bool, what: object) -> bool:
        """Counts one injection; ``what`` tells which one it was."""
        self.tried += 1
        self.held += bool(held)
        if not held and len(self.failures) < 20:
            self.failures.append(str(what))
        return bool(held)


@dataclass(frozen=True)
class Fault:
    """A fault, what must hold under it, and how it is injected."""

    id: str
    """Its row in the table of promises, for example ``R6``."""
    fault: str
    """What goes wrong."""
    holds: str
    """What must hold."""
    run: Callable[[int, np.random.Generator, Path], Outcome]
    """``run(count, random, folder)`` injects it ``count`` times, with an empty folder of its own."""
    short: int
    """Injections of the tests: a few seconds."""
    full: int
    """Injections that are reported."""
    part: str = ""
    """Tells several faults of one row apart."""
    torch: bool = False
    """Needs torch: tested among the tests of torch."""
    slow: bool = False
    """The short form takes more than about five seconds."""
    needs: Callable[[], str | None] = lambda: None
    """Why this machine cannot inject it; None where it can."""

    @property
    def key(self) -> str:
        """``R6`` or ``R6 threads``."""
        return f"{self.id} {self.part}".strip()


def faults() -> list[Fault]:
    """Every fault, in order of the table."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    found = [fault for name in names for fault in getattr(importlib.import_module(f"{__name__}.{name}"), "FAULTS", [])]
    return sorted(found, key=lambda fault: (int(re.sub(r"\D", "", fault.id)), fault.part))
