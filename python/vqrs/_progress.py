"""Where the progress of the compiled module goes: a printed line, scikit-learn's callbacks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sklearn.callback import CallbackContext


@contextmanager
def printed_progress(title: str, verbose: int) -> Iterator[PrintedLine | None]:
    """A progress function that prints one line, or None if ``verbose`` is 0."""
    if not verbose:
        yield None
        return
    line = PrintedLine(title)
    try:
        yield line
    finally:
        line.close()


class PrintedLine:
    """Progress on one line that is written over, at most ten times a second."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.line = ""
        self.next_time = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() < self.next_time and done < total:
            return
        self.next_time = time.monotonic() + 0.1
        line = f"[{self.title}] {stage} {done}/{total}"
        print(f"\r{line:<{len(self.line)}}", end="", flush=True)
        self.line = line

    def close(self) -> None:
        """Ends the line, if there is one."""
        if self.line:
            print()


class CallbackSteps:
    """Progress as scikit-learn's tree of tasks: one task a stage, with at most a hundred steps.

    Callbacks are told, not asked: what they return does not stop the fit.
    """

    most_steps = 100

    def __init__(self, estimator: Any, root: CallbackContext) -> None:
        self.estimator = estimator
        self.root = root
        self.stage: CallbackContext | None = None
        self.steps_done = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        n_steps = min(total, self.most_steps)
        if self.stage is None or self.stage.task_name != stage:
            self.close()
            self.stage = self._begin(self.root, stage, n_steps)
            self.steps_done = 0
        while self.steps_done < done * n_steps // max(total, 1) and self.steps_done < self.stage.max_subtasks:
            self._begin(self.stage, "step", 0).call_on_fit_task_end(estimator=self.estimator)
            self.steps_done += 1

    def _begin(self, parent: CallbackContext, name: str, n_subtasks: int) -> CallbackContext:
        task = parent.subcontext(task_name=name, max_subtasks=n_subtasks)
        return task.call_on_fit_task_begin(estimator=self.estimator)

    def close(self) -> None:
        """Ends the stage, if there is one."""
        if self.stage is not None:
            self.stage.call_on_fit_task_end(estimator=self.estimator)
