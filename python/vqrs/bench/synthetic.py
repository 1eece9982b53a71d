"""Users and items with a known law: the synthetic ratings of Tsang and Ahle, "Clustering the sketch", 2023."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqrs.bench.datasets import Dataset, Rows

__all__ = ["NAMED", "SyntheticDataset", "area_under_curve", "synthetic"]

NAMED = {"synthetic-10m": (10_000, 10_000, 10_000_000), "synthetic-1m": (6_000, 6_000, 1_000_000)}
"""Users, items and pairs of the sets that have a name."""

_BLOCK_VALUES = 1 << 21


class SyntheticDataset(Dataset):
    """A data set whose true scores are known; made by :func:`synthetic`.

    Parameters
    ----------
    *arguments
        Those of :class:`~vqrs.bench.datasets.Dataset`.
    test_scores : ndarray of float32, shape (n_test_rows,)
        The inner products u·v of the test rows, in their order.
    """

    def __init__(self, *arguments: Any, test_scores: NDArray[np.float32]) -> None:
        super().__init__(*arguments)
        self._test_scores = test_scores

    def bayes_auc(self) -> float:
        """Area under the curve of the true scores on the test split: what no model can be expected to exceed."""
        return area_under_curve(self.rows("test").labels, self._test_scores)


def area_under_curve(labels: NDArray[Any], scores: NDArray[Any]) -> float:
    """Share of pairs of a positive and a negative row in which the positive has the greater score; ties count half.

    Parameters
    ----------
    labels : ndarray, shape (n_rows,)
        0 or 1.
    scores : ndarray, shape (n_rows,)
        Greater for rows that are more likely positive.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        The labels are all alike.

    Examples
    --------
    >>> import numpy as np
    >>> area_under_curve(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
    0.75
    """
    positive = np.asarray(labels) > 0.5
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        raise ValueError("the area under the curve needs rows of both labels.")
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    above = ranks[places][positive].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


def synthetic(
    n_users: int,
    n_items: int,
    n_pairs: int,
    *,
    n_dimensions: int = 8,
    random_state: int = 0,
    name: str | None = None,
) -> SyntheticDataset:
    """Pairs of a user and an item: who meets whom and who likes whom both follow from hidden vectors.

    Vectors u of users and v of items are drawn from N(0, I). A user meets ``n_pairs / n_users`` items (where that is
    not whole, the first users meet one more than the last), drawn without replacement from
    softmax(u·v / √n_dimensions), and likes one with the probability sigmoid(u·v) [1]_. A random tenth of the pairs is
    the test split, another tenth the validation split. There are two fields, user and item, with no id for unknown
    ones.

    The draws without replacement are exact: the items with the greatest u·v / √n_dimensions plus Gumbel noise are such
    a draw [2]_. They are made for some users at a time; memory is that of the pairs, 9 bytes each, times about three.

    Parameters
    ----------
    n_users, n_items : int
        Sizes of the two fields.
    n_pairs : int
        Rows of all splits.
    n_dimensions : int, default=8
        Dimension of the hidden vectors.
    random_state : int, default=0
        Seed of everything.
    name : str, optional
        Name of the set; by default made of the sizes.

    Returns
    -------
    SyntheticDataset

    Raises
    ------
    ValueError
        ``n_pairs`` is below 10 or below ``n_users``, or asks for more items a user than there are.

    References
    ----------
    .. [1] H. Tsang, T. Ahle, "Clustering the sketch: dynamic compression for embedding tables", 2023.
    .. [2] T. Vieira, "Gumbel-max trick and weighted reservoir sampling", 2014; W. Kool et al., "Stochastic beams and
       where to find them", 2019.

    Examples
    --------
    >>> dataset = synthetic(50, 40, 500, random_state=0)
    >>> dataset
    Dataset('synthetic-50x40x500': 400 train, 50 validation, 50 test; 2 fields, 90 ids)
    """
    if not 1 <= n_users <= n_pairs <= n_users * n_items or n_pairs < 10:
        raise ValueError(
            f"{n_pairs} pairs of {n_users} users and {n_items} items: expected at least 10 pairs, at least one a user, "
            "and no more a user than there are items."
        )
    generator = np.random.default_rng(random_state)
    users = generator.standard_normal((n_users, n_dimensions))
    items = generator.standard_normal((n_items, n_dimensions))
    n_least, n_more = divmod(n_pairs, n_users)
    n_most = n_least + (n_more > 0)
    ids = np.empty((n_pairs, 2), dtype=np.int32)
    scores, labels = np.empty(n_pairs, dtype=np.float32), np.empty(n_pairs, dtype=np.uint8)
    n_together, end = max(_BLOCK_VALUES // n_items, 1), 0
    for first in range(0, n_users, n_together):
        block = users[first : first + n_together] @ items.T
        # Gumbel noise is -log of an exponential draw, so the greatest sums are the smallest of these quotients.
        noise = generator.standard_exponential(block.shape)
        noise *= np.exp(block / -np.sqrt(n_dimensions))
        nearest = np.argpartition(noise, (n_least - 1, n_most - 1), axis=1)[:, :n_most]
        user, place = np.nonzero(
            np.arange(n_most) < np.where(first + np.arange(len(block)) < n_more, n_most, n_least)[:, None]
        )
        item = nearest[user, place]
        score = block[user, item]
        start, end = end, end + len(item)
        ids[start:end, 0], ids[start:end, 1] = first + user, item
        scores[start:end] = score
        labels[start:end] = generator.random(len(score)) < 1 / (1 + np.exp(-score))
    order = generator.permutation(n_pairs)
    n_tenth = n_pairs // 10
    places = {"test": order[:n_tenth], "validation": order[n_tenth : 2 * n_tenth], "train": order[2 * n_tenth :]}
    none = np.zeros((n_pairs, 0), dtype=np.float32)
    return SyntheticDataset(
        name or f"synthetic-{n_users}x{n_items}x{n_pairs}",
        ("user", "item"),
        (n_users, n_items),
        {split: Rows(ids[chosen], none[: len(chosen)], labels[chosen]) for split, chosen in places.items()},
        test_scores=scores[places["test"]],
    )


def named_sizes(name: str) -> tuple[int, int, int] | None:
    """Users, items and pairs of a name: one of :data:`NAMED`, or ``synthetic-USERSxITEMSxPAIRS``; else None.

    Examples
    --------
    >>> named_sizes("synthetic-50x40x500")
    (50, 40, 500)
    """
    written = re.fullmatch(r"synthetic-(\d+)x(\d+)x(\d+)", name)
    if written is None:
        return NAMED.get(name)
    n_users, n_items, n_pairs = (int(number) for number in written.groups())
    return n_users, n_items, n_pairs
