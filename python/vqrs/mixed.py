"""More bits for the rows that matter: groups of rows, each with a quantizer of its own, under one budget."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqrs import _core
from vqrs._base import Quantizer
from vqrs._encode import LARGEST_BOUND_DIM, SAMPLE_ROWS
from vqrs._interrupt import interruptible
from vqrs._validation import as_jobs, as_seed, as_weights
from vqrs.metrics import gaussian_bound

try:
    from sklearn.base import clone
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError("The estimators of vqrs need scikit-learn 1.6 or newer: pip install 'vqrs[sklearn]'") from error

if TYPE_CHECKING:
    from vqrs.table import Table

__all__ = ["MixedPrecisionQuantizer"]

CLASSES = 48
"""Classes of rows of like importance, among which bytes are shared out."""

TRIAL_ROWS = 8_192
"""Rows that tell the error of each quantizer, drawn from all classes."""

HALVINGS = 100
"""Of the interval in which the price of a byte lies."""


OVERHEAD = 16_384
"""Bytes that a file has at most beside codes, tensors and checksums."""


class _Option(NamedTuple):
    """A quantizer that rows may get, and what a trial said of it."""

    quantizer: Quantizer
    row_bytes: int
    table_bytes: int
    """What its decoder takes, whatever the number of rows."""
    errors: NDArray[np.float64]
    """Of each class of rows."""


class _Budget(NamedTuple):
    """Bytes for codes and decoders of a table of so many rows."""

    nbytes: int
    n_rows: int

    def for_codes(self, options: Sequence[_Option]) -> int:
        """What these decoders leave for codes: all rows together take whole bytes a row."""
        left = self.nbytes - sum(option.table_bytes for option in options)
        return left // self.n_rows * self.n_rows


class MixedPrecisionQuantizer(Quantizer):
    """Groups of rows by their weight or norm, each with its own quantizer, so that one budget lowers the error most.

    Every quantizer is tried on a sample of the rows; each class of rows of like importance then takes the one with the
    least sum of error and price of bytes, at the price that meets the budget (Lagrange). Rows with the same quantizer
    are fitted together, with their weights.

    ``transform`` encodes with the quantizer of the most bytes a row, whatever the row; ``compress`` gives each row its
    own, by its weight or norm.

    Parameters
    ----------
    quantizers : list of quantizers or None, default=None
        What groups may get. None: one centroid of 256 a row, and trellis codes of 0.5 to 8 bits a value.
    n_bits : float, default=2.0
        Bits a value of the whole table, everything counted.
    by : {"auto", "sample_weight", "norm", "importance"}, default="auto"
        What rows are grouped by: their weight, their norm, or weight times squared norm, which is what the error hangs
        on but needs a map from rows to groups. "auto": the weight if there are weights, else the norm. Rows that are in
        the order of their weights need no map.
    random_state : int, RandomState, Generator or None, default=None
        Draws samples and the quantizers' own seeds; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    groups_ : list of (quantizer, n_rows)
        The fitted quantizers, from the most important rows on, with the number of fitted rows that got them.
    by_ : str
        What the rows were grouped by.
    thresholds_ : ndarray of shape (n_groups - 1,), float64
        Least importance of the rows of each group but the last.
    row_bytes_ : int
        Bytes of a row's code from ``transform``.
    n_iter_ : int
        Most iterations of a group's fit.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted, each in its group; weighted if they were.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    References
    ----------
    Y. Shoham, A. Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988.

    Examples
    --------
    Rows in the order of their frequency, which falls as Zipf says:

    >>> import numpy as np
    >>> from vqrs import MixedPrecisionQuantizer, ScalarQuantizer
    >>> x = np.random.default_rng(0).standard_normal((40_000, 32)).astype(np.float32)
    >>> weight = 1 / np.arange(1, 40_001)
    >>> mixed = MixedPrecisionQuantizer([ScalarQuantizer(t) for t in ("int2", "int4", "int8")], n_bits=5.0)
    >>> table = mixed.fit(x, sample_weight=weight).compress(x, sample_weight=weight)
    >>> plain = ScalarQuantizer("int4").fit(x).compress(x, sample_weight=weight)
    >>> table.nbytes < plain.nbytes
    True
    >>> bool(table.info()["errors"]["weighted"] < 0.7 * plain.info()["errors"]["weighted"])
    True
    """

    _kind = "mixed"

    def __init__(
        self,
        quantizers: Sequence[Quantizer] | None = None,
        *,
        n_bits: float = 2.0,
        by: str = "auto",
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.quantizers = quantizers
        self.n_bits = n_bits
        self.by = by
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

    def _fit(self, X: Any, sample_weight: ArrayLike | None, stacklevel: int) -> NDArray[np.uint8]:
        x = self._read_rows(X, reset=True)
        weights = as_weights(sample_weight, len(x))
        self._check_parameters()
        _core.check_rows(x, weights)
        self.by_ = self.by if self.by != "auto" else "norm" if weights is None else "sample_weight"
        order, importance = self._importance(x, weights)
        with self._progress(x, {"sample_weight": sample_weight}):
            classes = _classes(importance)
            options = self._trials(x, weights, order, classes)
            budget = self._budget(len(options), *x.shape)
            chosen = self._share_out(np.diff(classes), options, budget)
            if chosen is None:
                cheapest = min(
                    range(len(options)), key=lambda o: len(x) * options[o].row_bytes + options[o].table_bytes
                )
                warnings.warn(
                    f"MixedPrecisionQuantizer: no quantizer reaches n_bits={self.n_bits!r} on {len(x)} rows of "
                    f"{x.shape[1]}: all rows get the one of fewest bytes.",
                    ConvergenceWarning,
                    stacklevel=stacklevel,
                )
                row_options = np.full(len(x), cheapest)
            else:
                row_options = _fill(np.repeat(chosen, np.diff(classes)), options, importance, budget)
            self._fit_groups(x, weights, order, importance, [options[option] for option in row_options])
        return self._codec.encode(x, n_jobs=as_jobs(self.n_jobs))

    def _check_parameters(self) -> None:
        if not isinstance(self.n_bits, Real) or not 0 < self.n_bits <= 32:
            raise ValueError(f"n_bits={self.n_bits!r} must be a number above 0, at most 32")
        if self.by not in ("auto", "sample_weight", "norm", "importance"):
            raise ValueError(f"by={self.by!r} must be 'auto', 'sample_weight', 'norm' or 'importance'")
        if self.quantizers is None:
            return
        if not isinstance(self.quantizers, Sequence) or not all(isinstance(q, Quantizer) for q in self.quantizers):
            raise TypeError(f"quantizers must be a list of quantizers or None, not {self.quantizers!r}")
        if not self.quantizers:
            raise ValueError("quantizers is empty: pass at least one quantizer, or None for those of this version")

    def _importance(
        self, x: NDArray[np.float32], weights: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows from the most important one on (equals as they come), and the importance of each in this order."""
        by = self.by_
        weight = np.ones(len(x)) if weights is None else weights
        energy = np.einsum("ij,ij->i", x, x, dtype=np.float64) if by != "sample_weight" else np.ones(1)
        importance = {"sample_weight": weight, "norm": np.sqrt(energy), "importance": weight * energy}[by]
        order = np.argsort(-importance, kind="stable")
        return order, importance[order]

    def _budget(self, n_options: int, n_rows: int, dim: int) -> _Budget:
        """The file has a header, checksums and at worst a map beside codes and decoders."""
        map_bytes = n_rows * max(n_options - 1, 1).bit_length() / 8
        nbytes = (self.n_bits * n_rows * dim / 8 - map_bytes - OVERHEAD) / (1 + 8 / 65_536)
        return _Budget(int(nbytes), n_rows)

    def _trials(
        self,
        x: NDArray[np.float32],
        weights: NDArray[np.float64] | None,
        order: NDArray[np.int64],
        classes: NDArray[np.int64],
    ) -> list[_Option]:
        """The quantizers from the fewest bytes a row to the most, tried on a sample of every class."""
        seed = as_seed(self.random_state)
        generator = np.random.default_rng(seed)
        share = max(1, TRIAL_ROWS // (len(classes) - 1))
        drawn, stand_for = [], []
        for start, stop in itertools.pairwise(classes):
            some = generator.choice(stop - start, min(share, stop - start), replace=False)
            drawn.append(order[start + np.sort(some)])
            stand_for.append(np.full(len(some), (stop - start) / len(some)))
        rows, weight = np.concatenate(drawn), np.concatenate(stand_for)
        if weights is not None:
            weight *= weights[rows]
        sample = np.ascontiguousarray(x[rows])
        borders = np.cumsum([0, *map(len, drawn)])[:-1]
        found: dict[int, _Option] = {}
        for number, quantizer in enumerate(self.quantizers or _usual_quantizers()):
            own = clone(quantizer).set_params(random_state=(seed + number) % 2**32, n_jobs=self.n_jobs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a small class has few rows: no news
                fitted = clone(own).fit(sample)
            row_errors = weight * _squared_errors(sample, fitted.inverse_transform(fitted.transform(sample)))
            table_bytes = sum(tensor.nbytes for tensor in fitted._codec.tensors().values())
            errors = np.add.reduceat(row_errors, borders)
            option = _Option(own, fitted.row_bytes_, table_bytes, errors)
            # Of two that take as many bytes a row, the better one.
            if option.row_bytes not in found or errors.sum() < found[option.row_bytes].errors.sum():
                found[option.row_bytes] = option
        return [found[row_bytes] for row_bytes in sorted(found)]

    def _share_out(
        self, counts: NDArray[np.int64], options: list[_Option], budget: _Budget
    ) -> NDArray[np.int64] | None:
        """The option of each class: least error within the budget, decoders of the options in use counted."""
        use = list(range(len(options)))
        best = _at_best_price(counts, options, use, budget)
        # A decoder that few rows use may not be worth its bytes: leave out what lowers the error most.
        while len(use) > 1:
            fewer = [[other for other in use if other != option] for option in use]
            found = [(kept, _at_best_price(counts, options, kept, budget)) for kept in fewer]
            kept, candidate = min(found, key=lambda entry: entry[1][1])
            if candidate[1] >= best[1]:
                break
            use, best = kept, candidate
        return None if best[1] == np.inf else best[0]

    def _fit_groups(
        self,
        x: NDArray[np.float32],
        weights: NDArray[np.float64] | None,
        order: NDArray[np.int64],
        importance: NDArray[np.float64],
        row_options: list[_Option],
    ) -> None:
        """Fits each group's quantizer; ``row_options`` are those of the rows in the order of importance."""
        row_bytes = np.array([option.row_bytes for option in row_options])
        borders = np.flatnonzero(np.diff(row_bytes)) + 1
        groups, error, energy = [], 0.0, 0.0
        for start, rows in zip([0, *borders], np.split(order, borders), strict=True):
            rows = np.sort(rows)
            own, weight = np.ascontiguousarray(x[rows]), np.ones(len(rows)) if weights is None else weights[rows]
            quantizer = clone(row_options[start].quantizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                codes = quantizer.fit_transform(own, sample_weight=weight if weight.any() else None)
            error += float(weight @ _squared_errors(own, quantizer.inverse_transform(codes)))
            energy += float(weight @ _squared_errors(own, np.zeros(1)))
            groups.append((quantizer, len(rows)))
        self.groups_ = groups
        self.thresholds_ = importance[borders - 1]
        widest = max((quantizer for quantizer, _ in groups), key=lambda quantizer: quantizer.row_bytes_)
        self._set_codec(widest._codec)
        self.n_iter_ = max(quantizer.n_iter_ for quantizer, _ in groups)
        self.relative_error_ = _share(error, energy)

    def _compress_within(
        self,
        x: Any,
        nbytes: int | None,
        sample_weight: ArrayLike | None,
        random_state: Any,
        n_jobs: int | None,
        **table: Any,
    ) -> Table:
        """What ``vqrs.compress`` does with this quantizer: fits a copy to the budget, or as given."""
        own = clone(self)
        if nbytes is not None:
            own.set_params(n_bits=8 * nbytes / (x.shape[0] * x.shape[1]))
        if random_state is not None:
            own.set_params(random_state=random_state)
        if n_jobs is not None:
            own.set_params(n_jobs=n_jobs)
        made = own.fit(x, sample_weight=sample_weight).compress(x, sample_weight=sample_weight, **table)
        if nbytes is not None and made.nbytes > nbytes:
            raise ValueError(f"{nbytes} bytes are too few for any of the quantizers: the least is {made.nbytes} bytes")
        return made

    def estimate(self, n_rows: int, n_features: int) -> int:
        """Most bytes of the table's file for so many rows: the budget.

        Parameters
        ----------
        n_rows, n_features : int
            Shape of the table.

        Returns
        -------
        int
            Bytes, all counted.
        """
        return int(self.n_bits * n_rows * n_features / 8)

    def compress(
        self,
        X: Any,
        path: str | PathLike[str] | None = None,
        *,
        sample_weight: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> Table:
        """Encode rows into a table, each with the quantizer of its group; nothing is fitted again.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features_in_)
            The rows.
        path : path-like, optional
            File to write; the table is then mapped from it. None: the table stays in memory.
        sample_weight : array-like of shape (n_rows,), optional
            Weight of each row; needed if the groups are by weight.
        names : sequence of str, optional
            One name a row.
        metadata : mapping of str to str, optional
            What you want to keep with the table.
        durable : bool, default=True
            Whether the file is forced to the disk before it gets its name.

        Returns
        -------
        Table
            The compressed rows.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError
            Wrong rows, names or weights.
        """
        from vqrs.table import Table, open

        check_is_fitted(self)
        if isinstance(X, Iterator):
            raise TypeError("X is an iterator: the groups' rows are needed together, pass an array or a memory map")
        x = self._read_rows(X, reset=False)
        weights = as_weights(sample_weight, len(x))
        if weights is None and self.by_ != "norm":
            raise ValueError(f"sample_weight is needed: the groups were made by {self.by_!r} of the rows in fit")
        _core.check_rows(x, weights)
        order, importance = self._importance(x, weights)
        # Thresholds fall: a row belongs to the first group whose least importance it reaches.
        group_of = np.empty(len(x), np.uint8)
        group_of[order] = np.searchsorted(-self.thresholds_, -importance, "left")
        used = np.unique(group_of)
        group_of = np.searchsorted(used, group_of).astype(np.uint8)
        codecs, codes, decoded = [], [], np.empty_like(x)
        for number, group in enumerate(used):
            quantizer, rows = self.groups_[group][0], group_of == number
            own = quantizer.transform(np.ascontiguousarray(x[rows]))
            decoded[rows] = quantizer.inverse_transform(own)
            codecs.append(quantizer._codec)
            codes.append(own)
        tensors = sum(tensor.nbytes for codec in codecs for tensor in codec.tensors().values())
        nbytes = tensors + sum(own.nbytes for own in codes) + OVERHEAD // 2
        core = _core.Table.from_groups(
            codecs,
            codes,
            group_of,
            kind=self._kind,
            parameters={"n_bits": float(self.n_bits), "by": self.by},
            errors=_errors(x, decoded, weights, nbytes),
            names=names,
            metadata=metadata,
        )
        table = Table(core)
        if path is None:
            return table
        table.save(path, durable=durable)
        return open(path)


def _usual_quantizers() -> list[Quantizer]:
    from vqrs.quantizers import TrellisQuantizer, VectorQuantizer

    rates = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0]
    trellis = [TrellisQuantizer(n_bits, bit_allocation="variance", rotation_dtype="int8") for n_bits in rates]
    return [VectorQuantizer(256), *trellis]


def _squared_errors(x: NDArray[np.float32], decoded: NDArray[Any]) -> NDArray[np.float64]:
    """Of each row."""
    return ((x.astype(np.float64) - decoded) ** 2).sum(1)


def _share(error: float, energy: float) -> float:
    """The largest number where rows of zeros were decoded to something else."""
    return 0.0 if error == 0 else min(error / max(energy, sys.float_info.min), sys.float_info.max)


def _errors(
    x: NDArray[np.float32], decoded: NDArray[np.float32], weights: NDArray[np.float64] | None, nbytes: int
) -> dict[str, float]:
    """What a table's header says of its errors."""
    row_errors, energies = _squared_errors(x, decoded), _squared_errors(x, np.zeros(1))
    # From the first row on, so that rows far from zero but close together lose no digits.
    apart = x.astype(np.float64) - x[0]
    centred = float(((apart - apart.mean(0)) ** 2).sum())
    error = float(row_errors.sum())
    errors = {"relative": _share(error, float(energies.sum()))}
    if apart.any() or error == 0:
        errors["centred"] = _share(error, centred)
    if weights is not None:
        errors["weighted"] = _share(float(weights @ row_errors), float(weights @ energies))
    if x.shape[1] <= LARGEST_BOUND_DIM:
        bound = interruptible(gaussian_bound, x[:: max(1, len(x) // SAMPLE_ROWS)], 8 * nbytes / x.size)
        errors["gaussian_bound"] = float(f"{bound:.6g}")
    return errors


def _classes(importance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Borders of classes of like importance, in falling order; equals stay together."""
    positive = importance[importance > 0]
    if not len(positive):
        return np.array([0, len(importance)])
    least = max(positive[-1] / 2, np.finfo(np.float64).smallest_subnormal)
    logs = np.log2(np.maximum(importance, least))
    edges = np.linspace(logs[0], logs[-1], CLASSES + 1)[1:-1]
    return np.unique([0, *np.searchsorted(-logs, -edges, "right"), len(importance)])


def _at_best_price(
    counts: NDArray[np.int64], options: list[_Option], use: list[int], budget: _Budget
) -> tuple[NDArray[np.int64], float]:
    """The option of each class and their error, at the lowest price of a byte that keeps to the budget; the error is
    infinite if no price does.
    """
    costs = counts[:, None] * np.array([options[option].row_bytes for option in use])
    errors = np.stack([options[option].errors for option in use], 1)
    classes = np.arange(len(counts))

    def choose(price: float) -> tuple[NDArray[np.int64], bool]:
        chosen = np.argmin(errors + price * costs, axis=1)
        allowed = budget.for_codes([options[use[option]] for option in np.unique(chosen)])
        return chosen, costs[classes, chosen].sum() <= allowed

    # Prices over all magnitudes: the logarithm is halved.
    low, high = -1000.0, 1000.0
    chosen, fits = choose(2.0**high)
    if not fits:
        return chosen, np.inf
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried, fits = choose(2.0**middle)
        if fits:
            high, chosen = middle, tried
        else:
            low = middle
    return np.array(use)[chosen], float(errors[classes, chosen].sum())


def _fill(
    row_options: NDArray[np.int64], options: list[_Option], importance: NDArray[np.float64], budget: _Budget
) -> NDArray[np.int64]:
    """The option of each row: what is left of the budget lifts the first rows of groups to the group before them."""
    # A less important row never gets more bytes: that would break the order of the groups.
    row_options = np.minimum.accumulate(row_options)
    row_bytes = np.array([option.row_bytes for option in options])
    left = budget.for_codes([options[option] for option in np.unique(row_options)]) - row_bytes[row_options].sum()
    borders = [*(np.flatnonzero(np.diff(row_options)) + 1), len(row_options)]
    for border, end in itertools.pairwise(borders):
        above, below = row_options[border - 1], row_options[border]
        price = row_bytes[above] - row_bytes[below]
        reach = min(end - 1, border + int(left // price))
        # Rows of equal importance stay together.
        reach = int(np.searchsorted(-importance, -importance[reach], "left"))
        if reach > border:
            left -= (reach - border) * price
            row_options[border:reach] = above
    return row_options
