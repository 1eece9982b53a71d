"""One budget of bytes for several tables: it is shared out where bytes lower the squared error most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["lower_hull", "share_out"]

STEPS = 512
"""Of a curve, between which bytes are shared out."""


def lower_hull(
    sizes: NDArray[np.float64], errors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points below whose lines of size and log(error) no other lies: each byte brings less than the one before.

    Parameters
    ----------
    sizes, errors : ndarray of shape (n,)
        Sizes do not fall; errors are positive.

    Returns
    -------
    tuple of two ndarrays
        Rising sizes, falling errors.

    Examples
    --------
    >>> import numpy as np
    >>> lower_hull(np.array([1.0, 2, 3, 4]), np.array([1.0, 0.9, 0.1, 0.2]))
    (array([1., 3.]), array([1. , 0.1]))
    """
    hull: list[tuple[float, float]] = []
    for size, value in zip(sizes.tolist(), np.log(errors).tolist(), strict=True):
        if hull and value >= hull[-1][1]:
            continue
        if hull and size == hull[-1][0]:
            hull.pop()
        while len(hull) > 1 and (
            (hull[-1][1] - hull[-2][1]) * (size - hull[-2][0]) >= (value - hull[-2][1]) * (hull[-1][0] - hull[-2][0])
        ):
            hull.pop()
        hull.append((size, value))
    kept = np.array(hull)
    return kept[:, 0], np.exp(kept[:, 1])


def share_out(curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], nbytes: int) -> list[int]:
    """Bytes of each table, so that the errors add up to the least: the next bytes go where they take off most.

    Parameters
    ----------
    curves : sequence of (sizes, errors)
        Of each table, as from ``lower_hull``.
    nbytes : int
        Of all together, at least the sum of the first sizes.

    Returns
    -------
    list of int
        One number a table, at most ``nbytes`` together.

    Examples
    --------
    >>> import numpy as np
    >>> sizes = np.array([100.0, 1100.0])
    >>> share_out([(sizes, np.array([8.0, 1.0])), (sizes, np.array([800.0, 100.0]))], 1200)
    [100, 1100]
    """
    owners, costs, gains = [], [], []
    for number, (sizes, errors) in enumerate(curves):
        grid = np.linspace(sizes[0], sizes[-1], STEPS + 1)
        cost = np.diff(grid)
        if not cost.any():
            continue
        gain = -np.diff(np.exp(np.interp(grid, sizes, np.log(errors)))) / cost
        owners.append(np.full(STEPS, number))
        costs.append(cost)
        gains.append(np.minimum.accumulate(gain))  # rounding aside they fall
    shares = np.array([sizes[0] for sizes, _ in curves])
    left = nbytes - shares.sum()
    if owners:
        order = np.argsort(-np.concatenate(gains), kind="stable")
        cost = np.concatenate(costs)[order]
        # The last step is taken in part.
        part = np.clip(left - (np.cumsum(cost) - cost), 0, cost)
        np.add.at(shares, np.concatenate(owners)[order], part)
    return [int(share) for share in shares]
