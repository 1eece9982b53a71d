"""Measures of how well a table was compressed, in plain numpy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["above_bound_db", "gaussian_bound", "relative_error"]


def relative_error(x: ArrayLike, x_hat: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Relative squared error ‖x − x̂‖² / ‖x‖², summed in float64.

    Parameters
    ----------
    x : array-like of shape (n_rows, n_features)
        The original rows.
    x_hat : array-like of shape (n_rows, n_features)
        What was decoded.
    sample_weight : array-like of shape (n_rows,), optional
        Weight of each row in both sums.

    Returns
    -------
    float
        0 for equal rows; infinity where ``x`` is zero and ``x_hat`` is not.

    Raises
    ------
    ValueError
        Different shapes.

    Examples
    --------
    >>> from vqrs.metrics import relative_error
    >>> relative_error([[3.0, 4.0]], [[3.0, 3.0]])
    0.04
    """
    x, x_hat = np.asarray(x, dtype=np.float64), np.asarray(x_hat, dtype=np.float64)
    if x.shape != x_hat.shape:
        raise ValueError(f"x has shape {x.shape}, x_hat has shape {x_hat.shape}: they must be equal.")
    weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    error = np.average(((x - x_hat) ** 2).sum(axis=1), weights=weights)
    energy = np.average((x**2).sum(axis=1), weights=weights)
    if energy == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / energy)


def gaussian_bound(x: ArrayLike, bits_per_value: float) -> float:
    """Least relative error that any code of this rate can reach on Gaussian rows with the covariance of ``x``.

    Rows are taken as draws from a Gaussian; reverse water-filling spreads the bits over the eigenvectors of the
    covariance: D = Σ min(θ, λⱼ) and R = Σ max(0, ½ log₂(λⱼ / θ)) [1]_. The mean row is taken as known. A table whose
    rows are not Gaussian can lie below it; it is a yardstick, not a law.

    Parameters
    ----------
    x : array-like of shape (n_rows, n_features)
        The rows, or a sample of them.
    bits_per_value : float
        Rate: all bytes of the table, times 8, over its number of values.

    Returns
    -------
    float
        The bound on ‖x − x̂‖² / ‖x‖².

    Raises
    ------
    ValueError
        ``bits_per_value`` is negative.

    References
    ----------
    .. [1] T. Cover, J. Thomas, "Elements of Information Theory", section 10.3.3, 2006.

    Examples
    --------
    White noise loses a factor of four in squared error with each bit:

    >>> import numpy as np
    >>> from vqrs.metrics import gaussian_bound
    >>> x = np.random.default_rng(0).standard_normal((100_000, 4))
    >>> round(gaussian_bound(x, 2), 4)
    0.0625
    """
    if not bits_per_value >= 0:
        raise ValueError(f"bits_per_value must not be negative, got {bits_per_value}.")
    return Spectrum(x).bound(bits_per_value)


def above_bound_db(relative_error: float, bound: float) -> float | None:
    """How far a relative error lies above a bound, in decibels: 10 log₁₀(error / bound); 6.02 dB are worth one bit.

    Parameters
    ----------
    relative_error : float
        What a code reached.
    bound : float
        What :func:`gaussian_bound` says for its rate.

    Returns
    -------
    float or None
        Negative below the bound, as for rows that are not Gaussian; None where either is zero or not finite.

    Examples
    --------
    >>> from vqrs.metrics import above_bound_db
    >>> round(above_bound_db(0.1175, 0.0625), 2)
    2.74
    """
    if not 0 < bound < math.inf or not 0 < relative_error < math.inf:
        return None
    return 10 * math.log10(relative_error / bound)


class Spectrum:
    """Variances of rows along the eigenvectors of their covariance: the bound at many rates."""

    def __init__(self, x: ArrayLike) -> None:
        x = np.asarray(x, dtype=np.float64)
        self.dim = x.shape[1]
        self.energy = np.mean(x**2) * self.dim
        centred = x - x.mean(axis=0)
        variances = np.linalg.eigvalsh(centred.T @ centred / len(x))[::-1]
        # Rounding leaves tiny values of either sign where the covariance is singular.
        self.variances = variances[variances > self.energy * np.finfo(np.float64).eps]

    def bound(self, bits_per_value: float) -> float:
        """See :func:`gaussian_bound`."""
        if len(self.variances) == 0:
            return 0.0
        levels = _water_levels(np.log2(self.variances), bits_per_value * self.dim)
        return float(np.minimum(levels, self.variances).sum() / self.energy)


def _water_levels(log_variances: np.ndarray, bits_per_row: float) -> float:
    """The level θ. With the k largest variances above it, log₂θ = (Σ log₂λⱼ − 2R) / k; the right k is the last one
    whose own variance is not below its θ.
    """
    levels = (np.cumsum(log_variances) - 2 * bits_per_row) / np.arange(1, len(log_variances) + 1)
    return 2.0 ** levels[np.count_nonzero(levels <= log_variances) - 1]
