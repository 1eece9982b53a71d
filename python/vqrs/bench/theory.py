"""The case of CCE that has a proof: least squares, where clusters are dense and each round must come nearer.

Tsang and Ahle, "Clustering the sketch: dynamic compression for embedding tables", 2023: a matrix T of shape (d1, d2)
that minimises ||X T − Y||² is found through sketches H of only k columns. In each round H is the last solution beside
k − d2 columns of fresh noise, and the solution is ``H argmin_M ||X H M − Y||²``. The expected excess over the least
squares after i rounds is at most ``(1 − 1/d1)^(i (k − d2)) ||X T*||²``, if X has orthogonal columns of one length
(long normal ones nearly are) or the noise is aligned with X: ``V Σ⁻¹ G`` for ``X = U Σ Vᵀ`` and normal G.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqrs.bench.plots import COLOURS, NO_MATPLOTLIB

__all__ = ["bound", "dense_cce", "gaussian_excess", "plot_theory"]

SIZES = (2000, 100, 5, 25)
"""n, d1, d2 and k of the run that is shown."""


def dense_cce(
    x: ArrayLike, y: ArrayLike, k: int, rounds: int, *, aligned: bool = False, random_state: int = 0
) -> NDArray[np.float64]:
    """Excess of each round over the least squares, as a share of ``||X T*||²``.

    Parameters
    ----------
    x : array of shape (n, d1)
    y : array of shape (n, d2)
    k : int
        Columns of the sketch, more than d2 and at most d1.
    rounds : int
    aligned : bool
        Whether the noise is such that X times it is alike in all directions.
    random_state : int

    Returns
    -------
    float64 array of shape (rounds,)
        ``(||X T_i - Y||² - ||X T* - Y||²) / ||X T*||²``.

    Raises
    ------
    ValueError
        The sketch has too few or too many columns, or x and y have not the same number of rows.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 10))
    >>> excess = dense_cce(x, x[:, :2], k=6, rounds=8)
    >>> bool((np.diff(excess) <= 0).all())
    True
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be matrices of as many rows, got the shapes {x.shape} and {y.shape}")
    (_, d1), d2 = x.shape, y.shape[1]
    if not d2 < k <= d1:
        raise ValueError(f"k must be more than d2={d2} and at most d1={d1}, got {k}")
    generator = np.random.default_rng(random_state)
    best = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    align = np.linalg.pinv(np.linalg.qr(x, mode="r")) if aligned else np.eye(d1)
    solution, excess = np.zeros((d1, d2)), np.empty(rounds)
    for i in range(rounds):
        sketch = np.hstack([solution, align @ generator.normal(size=(d1, k - d2))])
        solution = sketch @ np.linalg.lstsq(x @ sketch, y, rcond=None)[0]
        # The residual of the least squares is orthogonal to all that X can reach: Pythagoras.
        excess[i] = np.square(x @ solution - best).sum()
    return excess / np.square(best).sum()


def bound(rounds: ArrayLike, d1: int, d2: int, k: int) -> NDArray[np.float64]:
    """What the theorem allows the expected excess to be after some rounds, as a share of ``||X T*||²``.

    Examples
    --------
    >>> bound([0, 1, 10], d1=100, d2=5, k=25).round(4)
    array([1.    , 0.8179, 0.134 ])
    """
    return (1 - 1 / d1) ** (np.asarray(rounds, np.float64) * (k - d2))


def gaussian_excess(
    n: int = SIZES[0],
    d1: int = SIZES[1],
    d2: int = SIZES[2],
    k: int = SIZES[3],
    rounds: int = 30,
    *,
    runs: int = 1,
    random_state: int = 0,
) -> NDArray[np.float64]:
    """:func:`dense_cce` on normal X and Y, some times: shape (runs, rounds)."""
    generator = np.random.default_rng(random_state)
    return np.stack(
        [
            dense_cce(
                generator.normal(size=(n, d1)),
                generator.normal(size=(n, d2)),
                k,
                rounds,
                random_state=random_state + run,
            )
            for run in range(runs)
        ]
    )


def plot_theory(path: str | os.PathLike[str], *, runs: int = 5, rounds: int = 30, random_state: int = 0) -> None:
    """The measured excess and the bound over rounds, the excess on a logarithmic axis, as a file.

    Parameters
    ----------
    path : str or PathLike
        Its ending decides the format: svg, png, pdf.
    runs, rounds, random_state : int
        Those of :func:`gaussian_excess`.

    Raises
    ------
    ImportError
        There is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(NO_MATPLOTLIB) from error
    n, d1, d2, k = SIZES
    excess = gaussian_excess(rounds=rounds, runs=runs, random_state=random_state)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    after = np.arange(rounds + 1)
    axes.plot(after, bound(after, d1, d2, k), "--", color=COLOURS[1], label="bound on the expectation")
    for number, run in enumerate(excess):
        label = f"measured, {runs} runs" if number == 0 else None
        axes.plot(after, np.r_[1.0, run], color=COLOURS[0], alpha=0.7, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("rounds of clustering")
    axes.set_ylabel("excess over least squares / ||X T*||²")
    axes.set_title(f"Dense CCE, n = {n}, d1 = {d1}, d2 = {d2}, k = {k}")
    axes.legend()
    figure.savefig(path)
