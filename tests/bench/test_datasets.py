"""Batches of a data set, and the sets that come as arrays."""

import subprocess
import sys

import numpy as np
import pytest

from vqrs.bench import Dataset, Rows, datasets, open_dataset
from vqrs.bench.datasets import SPLITS


def numbered(n_rows, window_rows=None):
    """Rows whose ids, numbers and labels tell their place."""
    places = np.arange(n_rows)
    rows = Rows(np.stack([places, places % 7], axis=1), places[:, None].astype(np.float32), places % 2)
    return Dataset("numbered", ["row", "seven"], [n_rows, 7], dict.fromkeys(SPLITS, rows), window_rows=window_rows)


def read(dataset, batch_size, seed=None):
    batches = list(dataset.batches("train", batch_size, seed=seed))
    assert all(len(batch.labels) == batch_size for batch in batches[:-1])
    assert 0 < len(batches[-1].labels) <= batch_size
    for batch in batches:
        assert (batch.ids.dtype, batch.numeric.dtype, batch.labels.dtype) == (np.int64, np.float32, np.float32)
        places = batch.ids[:, 0]
        np.testing.assert_array_equal(batch.ids[:, 1], dataset.field_sizes[0] + places % 7)
        np.testing.assert_array_equal(batch.numeric[:, 0], places)
        np.testing.assert_array_equal(batch.labels, places % 2)
    return np.concatenate([batch.ids[:, 0] for batch in batches])


def test_batches_in_order():
    np.testing.assert_array_equal(read(numbered(23), 5), np.arange(23))


@pytest.mark.parametrize("window_rows", [None, 40, 1000])
def test_shuffled_batches_hold_each_row_once(monkeypatch, window_rows):
    monkeypatch.setattr(datasets, "BLOCK_ROWS", 10)
    dataset = numbered(237, window_rows)
    first, again, other = read(dataset, 16, seed=1), read(dataset, 16, seed=1), read(dataset, 16, seed=2)
    np.testing.assert_array_equal(np.sort(first), np.arange(237))
    np.testing.assert_array_equal(np.sort(other), np.arange(237))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != np.arange(237)).any()
    if window_rows == 40:
        assert len(np.unique(first[:32] // 10)) <= 4, "a window holds rows of more than its blocks"
    else:
        assert len(np.unique(first[:48] // 10)) > 10, "a whole split is shuffled as one"


def test_frequencies_count_training_rows_alone():
    none = np.zeros((3, 0), dtype=np.float32)
    train = Rows(np.array([[0, 1], [1, 1], [1, 0]]), none, np.zeros(3))
    other = Rows(np.array([[2, 2]] * 3), none, np.ones(3))
    dataset = Dataset("few", "ab", [3, 3], {"train": train, "validation": other, "test": other})
    np.testing.assert_array_equal(dataset.frequencies(), [1, 2, 0, 1, 2, 0])
    assert dataset.frequencies().dtype == np.int64


def test_wrong_use_is_told():
    dataset = numbered(5)
    with pytest.raises(ValueError, match="split='tests': expected one of train, validation, test"):
        dataset.batches("tests", 2)
    with pytest.raises(ValueError, match="batch_size=0"):
        dataset.batches("train", 0)
    rows = dataset.rows("train")
    with pytest.raises(ValueError, match="no rows for test"):
        Dataset("x", ["a", "b"], [5, 7], {"train": rows, "validation": rows})
    with pytest.raises(ValueError, match="1 field names for 2"):
        Dataset("x", ["a"], [5, 7], dict.fromkeys(SPLITS, rows))
    with pytest.raises(ValueError, match="validation split has ids of shape"):
        Dataset("x", ["a", "b"], [5, 7], {"train": rows, "validation": rows._replace(labels=[1]), "test": rows})
    with pytest.raises(FileNotFoundError, match="no name of a synthetic data set"):
        open_dataset("no-such-set")


def test_import_needs_no_torch():
    code = "import sys, vqrs.bench.synthetic, vqrs.bench.formats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def feedback_file(folder):
    """Three users of eight items, as index lists: items 6 and 7 are never in training."""
    lists = {"train": [[0, 1, 2], [2, 3], [0, 4, 5, 1, 3]], "test": [[3, 6], [0, 7], [2]]}
    arrays = {}
    for split, items in lists.items():
        arrays[f"{split}_indptr"] = np.cumsum([0, *map(len, items)])
        arrays[f"{split}_items"] = np.concatenate(items).astype(np.uint16)
    np.savez(folder / "feedback.npz", **arrays, n_users=[3], n_items=[8])
    return folder / "feedback.npz", lists


def test_feedback_gets_a_negative_for_each_positive(monkeypatch, tmp_path):
    from vqrs.bench import formats

    path, lists = feedback_file(tmp_path)
    kept = {}

    def keep(name, field_names, rows, min_count=1):
        kept.update(rows)
        return original(name, field_names, rows, min_count)

    original = formats.vocabulary_dataset
    monkeypatch.setattr(formats, "vocabulary_dataset", keep)
    positives, negatives = {split: set() for split in SPLITS}, {split: set() for split in SPLITS}
    for random_state in range(30):
        dataset = open_dataset(path, random_state=random_state)
        assert [dataset.n_rows(split) for split in SPLITS] == [18, 2, 10]
        for split in SPLITS:
            labels, pairs = kept[split].labels, kept[split].ids
            assert labels.sum() * 2 == len(labels)
            np.testing.assert_array_equal(pairs[labels == 1][:, 0], pairs[labels == 0][:, 0])
            positives[split] |= set(map(tuple, pairs[labels == 1].tolist()))
            negatives[split] |= set(map(tuple, pairs[labels == 0].tolist()))
    train = {(user, item) for user, items in enumerate(lists["train"]) for item in items}
    test = {(user, item) for user, items in enumerate(lists["test"]) for item in items}
    everything = {(user, item) for user in range(3) for item in range(8)}
    assert positives == {"train": train, "validation": train, "test": test}
    assert negatives["train"] == everything - train, "training must not know the test list"
    assert negatives["test"] == everything - train - test


def test_feedback_repeats_with_its_seed(tmp_path):
    path, _ = feedback_file(tmp_path)
    first, again = (open_dataset(path, random_state=7) for _ in range(2))
    for split in SPLITS:
        np.testing.assert_array_equal(first.rows(split).ids, again.rows(split).ids)


def test_feedback_of_a_user_with_all_items(tmp_path):
    np.savez(
        tmp_path / "all.npz", train_indptr=[0, 2], train_items=[0, 1], test_indptr=[0, 0], test_items=np.zeros(0, int)
    )
    with pytest.raises(ValueError, match="user 0 has all 2 items"):
        open_dataset(tmp_path / "all.npz")


def test_flights(tmp_path):
    np.savez(
        tmp_path / "flights.npz",
        X=np.array([[4, 0], [2, 1], [4, 1], [9, 0], [2, 1]], dtype=np.uint16),
        y=np.array([0, 1, 1, 0, 1], dtype=np.uint8),
        split=np.array([0, 0, 0, 1, 2], dtype=np.uint8),
        card=[10, 2],
        fields=["carrier", "late"],
    )
    dataset = open_dataset(tmp_path / "flights.npz")
    assert dataset.field_names == ("carrier", "late")
    assert dataset.field_sizes == (3, 3)
    np.testing.assert_array_equal(dataset.rows("train").ids, [[2, 1], [1, 2], [2, 2]])
    np.testing.assert_array_equal(dataset.rows("validation").ids, [[0, 1]], "9 is not among the training ids")
    np.testing.assert_array_equal(dataset.rows("test").ids, [[1, 2]])
    np.testing.assert_array_equal(dataset.rows("test").labels, [1])
    rare = open_dataset(tmp_path / "flights.npz", min_count=2)
    assert rare.field_sizes == (2, 2)
    np.testing.assert_array_equal(rare.rows("train").ids, [[1, 0], [0, 1], [1, 1]])
    np.testing.assert_array_equal(rare.frequencies(), [1, 2, 1, 2])


def test_cut_arrays_are_told(tmp_path):
    path, _ = feedback_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"feedback.npz is no whole file of numpy arrays"):
        open_dataset(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"feedback.npz is no whole file of numpy arrays"):
        open_dataset(path)


def test_unknown_format(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    with pytest.raises(ValueError, match=r"format not recognised; the known formats are .*gowalla"):
        open_dataset(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"format foo; the known formats are .*flights"):
        open_dataset(tmp_path / "a.txt", format="foo")
