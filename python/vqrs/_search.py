"""The search for the kind and parameters of least error within a budget, or of least bytes within an error."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from vqrs import _core
from vqrs._ladders import Candidate, Ladder, default_parameters
from vqrs._validation import as_matrix

FIT_ROWS = 262_144
"""More rows than these are not fitted, only encoded: a random sample of so many stands for them."""

TRIAL_ROWS = 8_192
"""Rows that a trial fits, fewer where they are wide; half as many others judge it."""

TRIAL_VALUES = 1 << 22
"""Most values that a trial fits."""

OPTIMISM = 1.05
"""Trials end a little above real errors: one of up to so many times the largest error allowed is worth a full fit."""

CLOSE_ENOUGH = 0.97
"""A trial above this share of the error looked for ends the search for a smaller step."""

TRIAL_SETTINGS = {"max_iter": 5, "n_refinements": 1}
"""Parameters that make a trial cheap, for the kinds that have them: enough to rank, not to win."""

FINALISTS = 2
FINALIST_MARGIN = 1.04
"""Trials within this factor of the best error are fitted in full, the best few of them."""


class Fitted(NamedTuple):
    candidate: Candidate
    codec: _core.Codec
    codes: NDArray[np.uint8]
    error: float
    """Relative error of the fitted rows, weighted if they were."""


@dataclass(frozen=True)
class Sample:
    """Rows with their weights."""

    rows: NDArray[np.float32]
    weights: NDArray[np.float64] | None

    def take(self, numbers: NDArray[np.int64]) -> Sample:
        return Sample(self.rows[numbers], None if self.weights is None else self.weights[numbers])

    def error(self, codec: _core.Codec, codes: NDArray[np.uint8], n_jobs: int | None) -> float:
        errors = _core.reconstruction_errors(self.rows, codes, codec, self.weights, n_jobs)
        return errors["relative" if self.weights is None else "weighted"]


class Search:
    """Rows to compress, and what was learned about candidates for them."""

    def __init__(
        self,
        x: Any,
        weights: NDArray[np.float64] | None,
        seed: int,
        n_jobs: int | None,
        progress: _core.Progress | None,
    ) -> None:
        self.x, self.weights, self.seed, self.n_jobs, self.progress = x, weights, seed, n_jobs, progress
        generator = np.random.default_rng(seed)
        self.sample = _read_sample(x, weights, generator)
        self._train, self._judge = _split(self.sample, generator)
        self._trials: dict[str, float] = {}
        self._fits: dict[str, Fitted | None] = {}
        self._refusal: ValueError | None = None

    # ---- least error within a budget ----

    def least_error(self, ladders: list[Ladder], nbytes: int) -> Fitted | None:
        """The fit of least error of at most so many bytes; None if nothing is as small."""
        candidates = self._candidates_within(ladders, nbytes)
        if not candidates:
            return None
        if len(candidates) > 1:
            ranked = sorted(candidates, key=lambda candidate: (self._trial(candidate), candidate.nbytes))
            limit = FINALIST_MARGIN * self._trial(ranked[0])
            candidates = [candidate for candidate in ranked[:FINALISTS] if self._trial(candidate) <= limit]
        fits = [fitted for fitted in map(self._attempt, candidates) if fitted is not None]
        return min(fits or [self._refused()], key=lambda fitted: (fitted.error, fitted.candidate.nbytes))

    def _candidates_within(self, ladders: list[Ladder], nbytes: int) -> list[Candidate]:
        """The largest step of each ladder that is small enough, but for those that cannot win."""
        reachable = [(ladder, steps) for ladder in ladders if (steps := ladder.steps_within(nbytes)) > 0]
        if len(reachable) == 1 and reachable[0][1] == 1:
            return [reachable[0][0][0]]
        found: list[Candidate] = []
        for ladder, steps in reachable:
            least = min(map(self._trial, found), default=math.inf)
            if not self._hopeless(ladder, steps, least):
                found.append(ladder[self._usable_steps(ladder, steps) - 1])
        return found

    # ---- least bytes within an error ----

    def least_bytes(self, ladders: list[Ladder], max_error: float) -> Fitted:
        """The fit of least bytes with at most this error: trials tell where to start on a ladder, real fits decide."""
        queue = self._starts(ladders, OPTIMISM * max_error)
        least = math.inf
        while queue:
            _, order, step = heapq.heappop(queue)
            ladder = ladders[order]
            fitted = self._attempt(ladder[step])
            if fitted is not None and fitted.error <= max_error:
                return self._smaller(ladder, step, fitted, max_error)
            error = math.inf if fitted is None else fitted.error
            least = min(least, error)
            if step + 1 < len(ladder):
                step = min(len(ladder) - 1, max(step + 1, _extrapolate(step, error, max_error)))
                heapq.heappush(queue, (ladder[step].nbytes, order, step))
        if least == math.inf:
            self._refused()
        raise ValueError(f"max_error={max_error:g} cannot be reached: the least error found is {least:.3g}")

    def _starts(self, ladders: list[Ladder], max_error: float) -> list[tuple[int, int, int]]:
        """A heap of (bytes, number of the ladder, step) where trials meet the error with fewer bytes than those of the
        ladders before; where none does, of the step of least error.
        """
        starts: list[tuple[int, int, int]] = []
        fallback: list[tuple[float, int, int, int]] = []
        for order, ladder in enumerate(ladders):
            steps = ladder.steps_within(min(starts)[0] - 1 if starts else math.inf)
            if steps == 0 or self._hopeless(ladder, steps, max_error):
                continue
            steps = self._usable_steps(ladder, steps)
            top = ladder[steps - 1]
            fallback.append((self._trial(top), top.nbytes, order, steps - 1))
            if self._trial(top) <= max_error:
                step = self._first_within(ladder, steps, max_error)
                starts.append((ladder[step].nbytes, order, step))
        if not starts and fallback:
            starts = [min(fallback)[1:]]
        heapq.heapify(starts)
        return starts

    def _first_within(self, ladder: Ladder, steps: int, max_error: float) -> int:
        """The first step whose trial meets the error, or one close above it. The last of ``steps`` is known to."""
        low, high = -1, steps - 1
        error_low, error_high = 1.0, self._trial(ladder[high])
        interpolate = True
        while high - low > 1 and error_high < CLOSE_ENOUGH * max_error:
            middle = (low + high) // 2
            if interpolate and 0 < error_high < max_error < error_low:
                share = math.log(error_low / max_error) / math.log(error_low / error_high)
                middle = min(high - 1, low + max(1, math.ceil(share * (high - low))))
            error = self._trial(ladder[middle])
            if error <= max_error:
                high, error_high = middle, error
            else:
                low, error_low = middle, error
            interpolate = not interpolate
        return high

    def _smaller(self, ladder: Ladder, step: int, fitted: Fitted, max_error: float) -> Fitted:
        """A smaller step of the ladder, where the real error left room for one."""
        lower = _extrapolate(step, fitted.error, max_error)
        if not 0 <= lower < step:
            return fitted
        other = self._attempt(ladder[lower])
        return other if other is not None and other.error <= max_error else fitted

    # ---- fits ----

    def fit(self, candidate: Candidate) -> Fitted:
        """In full, on the whole sample."""
        codec, codes = _core.fit(
            candidate.kind,
            candidate.parameters,
            self.sample.rows,
            sample_weight=self.sample.weights,
            seed=self.seed,
            n_jobs=self.n_jobs,
            progress=_labelled(self.progress, candidate.kind),
            keep_better_codes=True,
        )
        return Fitted(candidate, codec, codes, self.sample.error(codec, codes, self.n_jobs))

    def _attempt(self, candidate: Candidate) -> Fitted | None:
        """The full fit, once; None where the kind refuses the rows, as float16 does large values."""
        key = repr(candidate)
        if key not in self._fits:
            try:
                self._fits[key] = self.fit(candidate)
            except ValueError as error:
                self._fits[key], self._refusal = None, error
        return self._fits[key]

    def _refused(self) -> NoReturn:
        raise self._refusal or ValueError("no kind accepts these rows")

    def _trial(self, candidate: Candidate) -> float:
        """The error that a full fit is expected to have; infinite where the kind refuses the rows."""
        key = repr(candidate)
        if key not in self._trials:
            try:
                self._trials[key] = self._expected_error(candidate)
            except ValueError as error:
                self._trials[key], self._refusal = math.inf, error
        return self._trials[key]

    def _expected_error(self, candidate: Candidate) -> float:
        known = default_parameters()[candidate.kind] | candidate.parameters
        cheap = {name: min(value, known[name]) for name, value in TRIAL_SETTINGS.items() if name in known}
        train, judge = self._train, self._judge
        codec, codes = _core.fit(
            candidate.kind,
            candidate.parameters | cheap,
            train.rows,
            sample_weight=train.weights,
            seed=self.seed,
            n_jobs=self.n_jobs,
            progress=_labelled(self.progress, f"trying {candidate.kind}"),
        )
        trained = train.error(codec, codes, self.n_jobs)
        if judge is None:
            return trained
        judged = judge.error(codec, codec.encode(judge.rows, n_jobs=self.n_jobs), self.n_jobs)
        # Centroids fitted on n rows lie nearer to these, and farther from others, by an error that falls as 1 / n. The
        # table's own rows are the ones fitted, so the small gap of the full fit is to be taken off the middle.
        middle, gap = (judged + trained) / 2, max(0.0, judged - trained) / 2
        return max(0.0, middle - gap * len(train.rows) / len(self.sample.rows))

    def _usable_steps(self, ladder: Ladder, steps: int) -> int:
        """``steps``, less the last ones that refuse the rows."""
        while steps > 1 and self._trial(ladder[steps - 1]) == math.inf:
            steps -= 1
        return steps

    def _hopeless(self, ladder: Ladder, steps: int, error: float) -> bool:
        """Whether a ladder of stages stays above an error: no stage takes off a larger share of it than those before,
        so that cheap trials of few stages bound what many can reach.
        """
        if not ladder.stagewise:
            return False
        before, stages = self._trial(ladder[0]), 2
        while stages < steps and 0 < before < math.inf:
            now = self._trial(ladder[stages - 1])
            share = (now / before) ** (2 / stages)
            if now * share ** (steps - stages) > error:
                return True
            before, stages = now, 2 * stages
        return False


def _read_sample(x: Any, weights: NDArray[np.float64] | None, generator: np.random.Generator) -> Sample:
    """The rows to fit: all, or so many at random."""
    if len(x) <= FIT_ROWS:
        sample, numbers = Sample(as_matrix(x, "x"), weights), None
    else:
        numbers = _draw(len(x), weights, FIT_ROWS, generator)
        sample = Sample(as_matrix(x[numbers], "x"), None if weights is None else weights[numbers])
    # Here and not in the core, where trials would name a row by its place in their sample.
    if not np.isfinite(sample.rows).all():
        row, column = np.argwhere(~np.isfinite(sample.rows))[0]
        value = "NaN" if np.isnan(sample.rows[row, column]) else "infinity"
        raise ValueError(
            f"Input x contains {value} at row {row if numbers is None else numbers[row]}, column {column}: "
            "clean the table first, for example with numpy.nan_to_num"
        )
    return sample


def _split(sample: Sample, generator: np.random.Generator) -> tuple[Sample, Sample | None]:
    """Rows that trials fit and rows that judge them; None where there are so few that all are fitted."""
    n_rows, dim = sample.rows.shape
    n_train = min(TRIAL_ROWS, max(TRIAL_ROWS // 4, TRIAL_VALUES // dim))
    if n_rows <= n_train + n_train // 2:
        return sample, None
    numbers = generator.permutation(_draw(n_rows, sample.weights, n_train + n_train // 2, generator))
    n_train = len(numbers) * 2 // 3
    return sample.take(np.sort(numbers[:n_train])), sample.take(np.sort(numbers[n_train:]))


def _draw(
    n_rows: int, weights: NDArray[np.float64] | None, size: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Numbers of rows at random, rising; rows without weight count for nothing, so they are left out."""
    numbers = np.arange(n_rows) if weights is None else np.flatnonzero(weights)
    return np.sort(generator.choice(numbers, min(size, len(numbers)), replace=False))


def _extrapolate(step: int, error: float, max_error: float) -> int:
    """The step expected to have ``max_error``, where the error falls by the same factor with each step from 1."""
    if not 0 < error < 1 or not 0 < max_error < 1:
        return step
    return math.ceil((step + 1) * math.log(max_error) / math.log(error)) - 1


def _labelled(progress: _core.Progress | None, label: str) -> _core.Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)
