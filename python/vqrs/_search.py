"""The search for the kind and parameters of least error within a budget, or of least bytes within an error."""

from __future__ import annotations

import heapq
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from vqrs import _core
from vqrs._interrupt import interruptible
from vqrs._ladders import BALANCED, BEST, FAST, Candidate, Family, Ladder, default_parameters
from vqrs._validation import as_matrix

FIT_ROWS = 262_144
"""More rows than these are not fitted, only encoded: a random sample of so many stands for them."""

OPTIMISM = 1.05
"""Trials end a little above real errors: one of up to so many times the largest error allowed is worth a full fit."""

PESSIMISM = 1.3
"""What trials of kinds that refine their codebooks for long may end above the real errors."""

FEWER_BYTES = 0.93
"""A table found is compared with the best of so many of its bytes."""

CLOSE_ENOUGH = 0.97
"""A trial above this share of the error looked for ends the search for a smaller step."""

LEAST_GAIN = 0.01
"""Codebooks grow while each growth takes off at least this share of the error at equal bytes."""

TOO_FAR = 1.25
"""A codebook of another size does not bring a kind back that is so many times above the best error."""

LOOKUP_ROWS = 1024
"""Random rows of a lookup whose time is taken."""


class Effort(NamedTuple):
    """How much a search tries."""

    level: int
    trial_rows: int
    """Rows that a trial fits, fewer where they are wide; half as many others judge it."""
    trial_values: int
    """Most values that a trial fits."""
    trial_settings: Mapping[str, Any]
    """Parameters that make a trial cheap, for the kinds that have them: enough to rank, not to win."""
    finalists: int
    finalist_margin: float
    """Trials within this factor of the best error are fitted in full, the best few of them."""


EFFORTS = {
    "fast": Effort(
        FAST,
        4096,
        1 << 20,
        {"max_iter": 3, "n_refinements": 0, "state_bits": 8, "n_rounds": 2, "n_searches": 2},
        1,
        1.0,
    ),
    "balanced": Effort(
        BALANCED,
        8192,
        1 << 22,
        {"max_iter": 5, "n_refinements": 1, "state_bits": 10, "n_rounds": 4, "n_searches": 4},
        2,
        1.04,
    ),
    "best": Effort(
        BEST,
        16_384,
        1 << 23,
        {"max_iter": 10, "n_refinements": 2, "state_bits": 12, "n_rounds": 8, "n_searches": 8},
        4,
        1.15,
    ),
}


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


class Trial(NamedTuple):
    """What a cheap fit of a candidate on a sample tells of the full one."""

    candidate: Candidate
    error: float
    """Expected; infinite where the kind refuses the rows."""
    spread: float = 0.0
    """Standard deviation of the error over folds."""
    fit_seconds: float = math.nan
    """Of the cheap fit on the sample."""
    lookup_ns: float = math.nan
    """A row, one thread; NaN where it was not measured."""


class Search:
    """Rows to compress, and what was learned about candidates for them."""

    def __init__(
        self,
        x: Any,
        weights: NDArray[np.float64] | None,
        seed: int,
        n_jobs: int | None,
        progress: _core.Progress | None,
        effort: Effort = EFFORTS["balanced"],
        n_folds: int | None = None,
        timed: bool = False,
    ) -> None:
        self.x, self.weights, self.seed, self.n_jobs, self.progress = x, weights, seed, n_jobs, progress
        self.effort, self.rows_to_come, self.timed = effort, n_folds is not None, timed
        generator = np.random.default_rng(seed)
        self.sample = _read_sample(x, weights, generator)
        self.folds = _split(self.sample, effort, n_folds, generator)
        self._trials: dict[str, Trial] = {}
        self._fits: dict[str, Fitted | None] = {}
        self._refusal: ValueError | None = None

    # ---- least error within a budget ----

    def least_error(self, families: list[Family], nbytes: int) -> Fitted | None:
        """The fit of least error of at most so many bytes; None if nothing is as small."""
        exact = self._measured(families)
        if exact is not None and exact.candidate.nbytes <= nbytes and exact.error == 0:
            return exact
        candidates = self.candidates_within(families, nbytes)
        if not candidates:
            return None
        if len(candidates) > 1:
            ranked = sorted(candidates, key=lambda candidate: (self._error(candidate), candidate.nbytes))
            limit = self.effort.finalist_margin * self._error(ranked[0])
            candidates = [c for c in ranked[: self.effort.finalists] if self._error(c) <= limit]
        fits = [fitted for fitted in map(self._attempt, candidates) if fitted is not None]
        return min(fits or [self._refused()], key=lambda fitted: (fitted.error, fitted.candidate.nbytes))

    def candidates_within(self, families: list[Family], nbytes: float, alone: bool = True) -> list[Candidate]:
        """The best step of each family that is small enough, but for those that cannot win. With ``alone``, a candidate
        that has no other beside it is not tried.
        """
        families = _of_known_size(families)
        reachable = [ladder for family in families for ladder in family.ladders if ladder.steps_within(nbytes) > 0]
        if alone and len(reachable) == 1 and reachable[0].steps_within(nbytes) == 1:
            return [reachable[0][0]]
        found: list[Candidate] = []
        for family in families:
            least = min(map(self._error, found), default=math.inf)
            best = self._climb(family, nbytes, least)
            if best is not None:
                found.append(best)
        return found

    def _climb(self, family: Family, nbytes: float, least: float) -> Candidate | None:
        """The largest step within the bytes of the family's best ladder: from its start to both sides, as long as the
        codebook's new size brings something.
        """

        def top(ladder: Ladder) -> Candidate | None:
            steps = ladder.steps_within(nbytes)
            if steps == 0 or self._hopeless(ladder, steps, least):
                return None
            return ladder[self._usable_steps(ladder, steps) - 1]

        best = top(family.ladders[family.start])
        if best is not None and self._error(best) > TOO_FAR * least:
            return best
        for side in (family.ladders[: family.start][::-1], family.ladders[family.start + 1 :]):
            for ladder in side:
                other = top(ladder)
                if best is None:
                    best = other
                elif other is None or self._error(other) > (1 - LEAST_GAIN) * self._error(best):
                    break
                else:
                    best = other
        return best

    # ---- least bytes within an error ----

    def least_bytes(self, families: list[Family], max_error: float) -> Fitted:
        """The fit of least bytes with at most this error."""
        exact = self._measured(families)
        try:
            fitted = self._least_of_ladders(families, max_error)
        except ValueError:
            if exact is None or exact.error > max_error:
                raise
            return exact
        if exact is not None and exact.error <= max_error and exact.candidate.nbytes < fitted.candidate.nbytes:
            return exact
        return fitted

    def _least_of_ladders(self, families: list[Family], max_error: float) -> Fitted:
        """Trials tell where to start on a ladder, real fits decide."""
        ladders = [ladder for family in _of_known_size(families) for ladder in family.outward()]
        if not ladders:
            raise ValueError(f"max_error={max_error:g} cannot be reached: these rows have too few equals")
        queue = self._starts(ladders, OPTIMISM * max_error)
        least = math.inf
        while queue:
            _, order, step = heapq.heappop(queue)
            ladder = ladders[order]
            fitted = self._attempt(ladder[step])
            if fitted is not None and fitted.error <= max_error:
                return self._other_kinds(families, self._smaller(ladder, step, fitted, max_error), max_error)
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
            fallback.append((self._error(top), top.nbytes, order, steps - 1))
            if self._error(top) <= max_error:
                step = self._first_within(ladder, steps, max_error)
                starts.append((ladder[step].nbytes, order, step))
        if not starts and fallback:
            starts = [min(fallback)[1:]]
        heapq.heapify(starts)
        return starts

    def _first_within(self, ladder: Ladder, steps: int, max_error: float) -> int:
        """The first step whose trial meets the error, or one close above it. The last of ``steps`` is known to."""
        low, high = -1, steps - 1
        error_low, error_high = 1.0, self._error(ladder[high])
        interpolate = True
        while high - low > 1 and error_high < CLOSE_ENOUGH * max_error:
            middle = (low + high) // 2
            if interpolate and 0 < error_high < max_error < error_low:
                share = math.log(error_low / max_error) / math.log(error_low / error_high)
                middle = min(high - 1, low + max(1, math.ceil(share * (high - low))))
            error = self._error(ladder[middle])
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

    def _other_kinds(self, families: list[Family], fitted: Fitted, max_error: float) -> Fitted:
        """A smaller fit by another ladder, whose trials may have ended farther above the real error."""
        while True:
            nbytes = int(FEWER_BYTES * fitted.candidate.nbytes)
            candidates = self.candidates_within(families, nbytes, alone=False)
            if min(map(self._error, candidates), default=math.inf) > PESSIMISM * max_error:
                return fitted
            other = self.least_error(families, nbytes)
            if other is None or other.error > max_error:
                return fitted
            fitted = other

    # ---- fits ----

    def _measured(self, families: list[Family]) -> Fitted | None:
        """The fit of a kind whose bytes only a fit tells; None where it saves nothing."""
        ladders = [ladder for family in families for ladder in family.ladders if ladder.measured]
        fitted = self._attempt(ladders[0][0]) if ladders else None
        if fitted is None:
            return None
        table = _core.Table.from_codec(fitted.codec, fitted.codes, errors={"relative": fitted.error})
        # The codes of rows that were not in the sample have the same width.
        more = (len(self.x) - len(fitted.codes)) * fitted.codec.row_bytes
        nbytes = table.nbytes + more + more // 4096
        if nbytes >= fitted.candidate.nbytes:
            return None
        return fitted._replace(candidate=fitted.candidate._replace(nbytes=nbytes))

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

    def _error(self, candidate: Candidate) -> float:
        return self.trial(candidate).error

    def trial(self, candidate: Candidate) -> Trial:
        """What to expect of a full fit."""
        key = repr(candidate)
        if key not in self._trials:
            try:
                self._trials[key] = self._try(candidate)
            except ValueError as error:
                self._trials[key], self._refusal = Trial(candidate, math.inf), error
        return self._trials[key]

    def finished_trials(self) -> list[Trial]:
        """Those of kinds that took the rows, in the order they were made."""
        return [trial for trial in self._trials.values() if trial.error < math.inf]

    def _try(self, candidate: Candidate) -> Trial:
        errors, seconds = [], []
        for train, judge in self.folds:
            start = time.perf_counter()
            codec, codes = self._fit_cheaply(candidate, train)
            seconds.append(time.perf_counter() - start)
            errors.append(self._expected_error(codec, codes, train, judge))
        lookup_ns = _lookup_ns(codec, codes, self.seed) if self.timed else math.nan
        return Trial(candidate, statistics.fmean(errors), statistics.pstdev(errors), min(seconds), lookup_ns)

    def _fit_cheaply(self, candidate: Candidate, train: Sample) -> tuple[_core.Codec, NDArray[np.uint8]]:
        known = default_parameters()[candidate.kind] | candidate.parameters
        cheap = {name: min(value, known[name]) for name, value in self.effort.trial_settings.items() if name in known}
        return _core.fit(
            candidate.kind,
            candidate.parameters | cheap,
            train.rows,
            sample_weight=train.weights,
            seed=self.seed,
            n_jobs=self.n_jobs,
            progress=_labelled(self.progress, f"trying {candidate.kind}"),
        )

    def _expected_error(
        self, codec: _core.Codec, codes: NDArray[np.uint8], train: Sample, judge: Sample | None
    ) -> float:
        trained = train.error(codec, codes, self.n_jobs)
        if judge is None:
            return trained
        judged = judge.error(codec, codec.encode(judge.rows, n_jobs=self.n_jobs), self.n_jobs)
        # Centroids fitted on n rows lie nearer to these, and farther from others, by an error that falls as 1 / n. The
        # table's own rows are the ones fitted, so the small gap of the full fit is to be taken off the middle; it is to
        # be added for rows that come later.
        middle, gap = (judged + trained) / 2, max(0.0, judged - trained) / 2
        gap *= len(train.rows) / len(self.sample.rows)
        return middle + gap if self.rows_to_come else max(0.0, middle - gap)

    def _usable_steps(self, ladder: Ladder, steps: int) -> int:
        """``steps``, less the last ones that refuse the rows."""
        while steps > 1 and self._error(ladder[steps - 1]) == math.inf:
            steps -= 1
        return steps

    def _hopeless(self, ladder: Ladder, steps: int, error: float) -> bool:
        """Whether a ladder of stages stays above an error: no stage takes off a larger share of it than those before,
        so that cheap trials of few stages bound what many can reach.
        """
        if not ladder.stagewise:
            return False
        before, stages = self._error(ladder[0]), 2
        while stages < steps and 0 < before < math.inf:
            now = self._error(ladder[stages - 1])
            share = (now / before) ** (2 / stages)
            if now * share ** (steps - stages) > error:
                return True
            before, stages = now, 2 * stages
        return False


def _of_known_size(families: list[Family]) -> list[Family]:
    return [family for family in families if not family.ladders[0].measured]


def _read_sample(x: Any, weights: NDArray[np.float64] | None, generator: np.random.Generator) -> Sample:
    """The rows to fit: all, or so many at random."""
    if len(x) <= FIT_ROWS:
        sample, numbers = Sample(as_matrix(x, "x"), weights), None
    else:
        numbers = _draw(len(x), weights, FIT_ROWS, generator)
        sample = Sample(
            as_matrix(interruptible(x.__getitem__, numbers), "x"), None if weights is None else weights[numbers]
        )
    # Here and not in the core, where trials would name a row by its place in their sample.
    if not interruptible(_all_finite, sample.rows):
        row, column = np.argwhere(~np.isfinite(sample.rows))[0]
        value = "NaN" if np.isnan(sample.rows[row, column]) else "infinity"
        raise ValueError(
            f"Input x contains {value} at row {row if numbers is None else numbers[row]}, column {column}: "
            "clean the table first, for example with numpy.nan_to_num"
        )
    return sample


def _all_finite(rows: NDArray[np.float32]) -> bool:
    return bool(np.isfinite(rows).all())


def _split(
    sample: Sample, effort: Effort, n_folds: int | None, generator: np.random.Generator
) -> list[tuple[Sample, Sample | None]]:
    """Rows that trials fit, with rows that judge them; None where there are so few that all are fitted."""
    n_rows, dim = sample.rows.shape
    n_train = min(effort.trial_rows, max(effort.trial_rows // 4, effort.trial_values // dim))
    if n_folds is None and n_rows <= n_train + n_train // 2:
        return [(sample, None)]
    numbers = generator.permutation(_draw(n_rows, sample.weights, n_train + n_train // 2, generator))
    if n_folds is None:
        cut = len(numbers) * 2 // 3
        return [(sample.take(np.sort(numbers[:cut])), sample.take(np.sort(numbers[cut:])))]
    if len(numbers) < n_folds:
        raise ValueError(f"cross_validate={n_folds} needs as many rows; there are {len(numbers)}")
    folds = np.array_split(numbers, n_folds)
    return [
        (sample.take(np.sort(np.concatenate(folds[:i] + folds[i + 1 :]))), sample.take(np.sort(fold)))
        for i, fold in enumerate(folds)
    ]


def _draw(
    n_rows: int, weights: NDArray[np.float64] | None, size: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Numbers of rows at random, rising; rows without weight count for nothing, so they are left out."""
    numbers = np.arange(n_rows) if weights is None else np.flatnonzero(weights)
    return np.sort(generator.choice(numbers, min(size, len(numbers)), replace=False))


def _lookup_ns(codec: _core.Codec, codes: NDArray[np.uint8], seed: int) -> float:
    """Nanoseconds a row of lookups of random rows on one thread: the best of a few."""
    table = _core.Table.from_codec(codec, codes, errors={"relative": 0.0})
    ids = np.random.default_rng(seed).integers(0, len(codes), LOOKUP_ROWS)
    out = np.empty((LOOKUP_ROWS, codec.dim), np.float32)
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        table.lookup(ids, out, 1)
        taken.append(time.perf_counter() - start)
    return 1e9 * min(taken) / LOOKUP_ROWS


def _extrapolate(step: int, error: float, max_error: float) -> int:
    """The step expected to have ``max_error``, where the error falls by the same factor with each step from 1."""
    if not 0 < error < 1 or not 0 < max_error < 1:
        return step
    return math.ceil((step + 1) * math.log(max_error) / math.log(error)) - 1


def _labelled(progress: _core.Progress | None, label: str) -> _core.Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)
