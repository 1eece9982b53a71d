"""The synthetic ratings follow their law."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from vqrs.bench import open_dataset
from vqrs.bench.datasets import SPLITS
from vqrs.bench.synthetic import area_under_curve, synthetic


def all_rows(dataset):
    ids = np.concatenate([dataset.rows(split).ids for split in SPLITS])
    labels = np.concatenate([dataset.rows(split).labels for split in SPLITS])
    return ids, labels


@pytest.mark.parametrize("n_pairs", [1200, 1230])
def test_each_user_meets_its_number_of_items_once(n_pairs):
    dataset = synthetic(60, 45, n_pairs, random_state=3)
    ids, labels = all_rows(dataset)
    assert [dataset.n_rows(split) for split in SPLITS] == [n_pairs - 2 * (n_pairs // 10), n_pairs // 10, n_pairs // 10]
    assert len(np.unique(ids, axis=0)) == n_pairs
    wanted = np.full(60, 20)
    wanted[: n_pairs - 1200] += 1
    np.testing.assert_array_equal(np.bincount(ids[:, 0], minlength=60), wanted)
    assert ids[:, 1].min() >= 0
    assert ids[:, 1].max() < 45
    assert set(np.unique(labels)) == {0, 1}


def test_same_seed_same_rows():
    first, second, other = (synthetic(20, 30, 200, random_state=seed) for seed in (1, 1, 2))
    for one, two in zip(all_rows(first), all_rows(second), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(all_rows(first)[0], all_rows(other)[0])


def hidden_vectors(n_users, n_items, random_state):
    """The vectors are the first draws of the seed."""
    generator = np.random.default_rng(random_state)
    return generator.standard_normal((n_users, 8)), generator.standard_normal((n_items, 8))


def test_first_draw_follows_the_softmax():
    """With one item a user the draw is one of softmax(u·v / √8); 5 items, and each user's chances summed."""
    n_users, n_items = 200_000, 5
    ids, _ = all_rows(synthetic(n_users, n_items, n_users, random_state=4))
    users, items = hidden_vectors(n_users, n_items, 4)
    chances = np.exp(users @ items.T / np.sqrt(8))
    chances /= chances.sum(axis=1, keepdims=True)
    counts = np.bincount(ids[:, 1], minlength=n_items)
    spread = np.sqrt((chances * (1 - chances)).sum(axis=0))
    assert (np.abs(counts - chances.sum(axis=0)) < 5 * spread).all()
    met = np.empty(n_users, dtype=int)
    met[ids[:, 0]] = ids[:, 1]
    mean_chance = chances[np.arange(n_users), met].mean()
    assert mean_chance == pytest.approx((chances**2).sum(axis=1).mean(), abs=0.003)
    assert mean_chance > chances.mean() + 0.05


def test_second_draw_is_without_replacement():
    """Two of three items: an item is left out as successive draws without replacement leave it out."""
    n_users = 100_000
    ids, _ = all_rows(synthetic(n_users, 3, 2 * n_users, random_state=5))
    users, items = hidden_vectors(n_users, 3, 5)
    chances = np.exp(users @ items.T / np.sqrt(8))
    chances /= chances.sum(axis=1, keepdims=True)
    left_out = np.zeros(n_users, dtype=int) + 3
    np.subtract.at(left_out, ids[:, 0], ids[:, 1])
    for item in range(3):
        one, two = (other for other in range(3) if other != item)
        first = chances[:, one] * chances[:, two] / (1 - chances[:, one])
        wanted = first + chances[:, two] * chances[:, one] / (1 - chances[:, two])
        spread = np.sqrt((wanted * (1 - wanted)).sum())
        assert abs((left_out == item).sum() - wanted.sum()) < 5 * spread


def test_labels_follow_the_sigmoid():
    dataset = synthetic(300, 400, 60_000, random_state=6)
    ids, labels = all_rows(dataset)
    users, items = hidden_vectors(300, 400, 6)
    chances = 1 / (1 + np.exp(-(users[ids[:, 0]] * items[ids[:, 1]]).sum(axis=1)))
    for low, high in [(0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)]:
        inside = (chances >= low) & (chances < high)
        spread = np.sqrt((chances * (1 - chances))[inside].sum())
        assert abs(labels[inside].sum() - chances[inside].sum()) < 5 * spread
    test = dataset.rows("test")
    scores = (users[test.ids[:, 0]] * items[test.ids[:, 1]]).sum(axis=1)
    assert dataset.bayes_auc() == pytest.approx(roc_auc_score(test.labels, scores), abs=1e-4)
    assert 0.85 < dataset.bayes_auc() < 0.95


def test_area_under_curve_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 500), generator.integers(0, 20, 500) / 7
    assert area_under_curve(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    with pytest.raises(ValueError, match="both labels"):
        area_under_curve(np.ones(3), np.arange(3))


def test_names():
    dataset = open_dataset("synthetic-20x30x200", random_state=1)
    assert dataset.name == "synthetic-20x30x200"
    assert dataset.field_names == ("user", "item")
    assert dataset.field_sizes == (20, 30)
    np.testing.assert_array_equal(dataset.rows("train").ids, synthetic(20, 30, 200, random_state=1).rows("train").ids)


@pytest.mark.parametrize("sizes", [(20, 30, 601), (20, 30, 19), (0, 30, 100), (3, 3, 9)])
def test_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="expected at least 10 pairs"):
        synthetic(*sizes)
