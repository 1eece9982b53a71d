"""Folders of mapped arrays: whole or not there, and the same rows as before."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from vqrs.bench import Dataset, Rows, datasets, open_dataset, prepare, prepared, save
from vqrs.bench.datasets import SPLITS


@pytest.fixture
def dataset():
    generator = np.random.default_rng(0)

    def rows(n_rows):
        ids = np.stack([generator.integers(0, 50, n_rows), generator.integers(0, 9, n_rows)], axis=1)
        return Rows(ids, generator.random((n_rows, 3)).astype(np.float32), generator.integers(0, 2, n_rows))

    return Dataset("made", ["a", "b"], [50, 9], {"train": rows(1000), "validation": rows(100), "test": rows(50)})


def test_what_is_saved_is_read(dataset, tmp_path):
    again = open_dataset(save(dataset, tmp_path / "deep" / "folder"))
    assert repr(again) == repr(dataset)
    assert (again.field_names, again.n_numeric) == (dataset.field_names, 3)
    np.testing.assert_array_equal(again.frequencies(), dataset.frequencies())
    for split in SPLITS:
        for seed in (None, 3):
            for one, two in zip(
                dataset.batches(split, 64, seed=seed), again.batches(split, 64, seed=seed), strict=True
            ):
                for wanted, found in zip(one, two, strict=True):
                    np.testing.assert_array_equal(found, wanted)
                    assert (found.dtype, type(found)) == (wanted.dtype, np.ndarray)
                    assert found.flags.writeable
    assert isinstance(again.rows("train").ids, np.memmap)


def test_shuffled_windows_of_mapped_rows(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "BLOCK_ROWS", 16)
    monkeypatch.setattr(prepared, "WINDOW_ROWS", 64)
    mapped = open_dataset(save(dataset, tmp_path / "folder"))
    batches = list(mapped.batches("train", 50, seed=1))
    rows = np.concatenate([np.concatenate([batch.numeric, batch.ids], axis=1) for batch in batches])
    train = dataset.rows("train")
    wanted = np.concatenate([train.numeric, train.ids + np.array([0, 50])], axis=1)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], wanted[np.lexsort(wanted.T)])
    assert [len(batch.labels) for batch in batches] == [50] * 20


def test_a_shuffled_reading_holds_a_window_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "BLOCK_ROWS", 256)
    monkeypatch.setattr(prepared, "WINDOW_ROWS", 1024)

    def peak(n_rows):
        rows = Rows(np.zeros((n_rows, 2), int), np.zeros((n_rows, 3), np.float32), np.arange(n_rows) % 2)
        whole = Dataset("long", "ab", [1, 1], dict.fromkeys(SPLITS, rows))
        mapped = open_dataset(save(whole, tmp_path / "long", overwrite=True))
        del rows, whole
        tracemalloc.start()
        assert sum(len(batch.labels) for batch in mapped.batches("train", 100, seed=0)) == n_rows
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(5_000)  # what is made once
    assert peak(200_000) < peak(5_000) + 100_000, "the rows are 4.2 million bytes"


def test_a_folder_is_not_overwritten_unless_asked(dataset, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save(dataset, folder)  # an empty folder may be filled
    with pytest.raises(FileExistsError, match="choose another folder, or overwrite"):
        save(dataset, folder)
    other = Dataset("other", ["a", "b"], [50, 9], {split: dataset.rows("test") for split in SPLITS})
    save(other, folder, overwrite=True)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_text("meow")
    for place in (photos, photos / "cat.png"):
        with pytest.raises(FileExistsError, match="is there already and no prepared data set"):
            save(other, place, overwrite=True)
    assert (photos / "cat.png").read_text() == "meow"
    assert open_dataset(folder).name == "other"
    assert open_dataset(folder, name="mine").name == "mine"


def test_a_broken_run_leaves_nothing_that_is_read(dataset, tmp_path):
    folder = tmp_path / "folder"
    lines = [f"{row}\t1\t5\t{row}\n" for row in range(100)]
    (tmp_path / "u.data").write_text("".join(lines))

    def stop(stage, done):
        if stage == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "u.data", folder, progress=stop)
    assert not folder.exists()
    partial = tmp_path / "folder.partial"
    assert (partial / "train.ids.npy").exists()
    with pytest.raises(ValueError, match="not whole; prepare it again"):
        open_dataset(partial)
    (partial / "left-over").write_text("")
    prepare(tmp_path / "u.data", folder)
    assert not partial.exists()
    assert not (folder / "left-over").exists()
    assert open_dataset(folder).n_rows("train") == 80
    origin = json.loads((folder / "dataset.json").read_text())["origin"]
    assert origin == {"format": "movielens", "min_count": 1, "split": "time"}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "test.ids.npy").unlink(), "test.ids.npy cannot be read"),
        (lambda folder: np.save(folder / "test.labels.npy", np.zeros(3, np.uint8)), r"holds uint8 of shape \(3,\)"),
        (lambda folder: (folder / "train.ids.npy").write_bytes(b""), "train.ids.npy cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text('{"version": 9}'), "of version 9, this package reads 1"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "of version None, this package reads 1"),
        (lambda folder: (folder / "dataset.json").write_text('{"version'), "dataset.json cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text('{"version": 1}'), "not whole .*: prepare the folder"),
        (lambda folder: (folder / "frequencies.npy").unlink(), "frequencies.npy cannot be read"),
        (lambda folder: (folder / "frequencies.npy").write_bytes(b"xx"), "frequencies.npy cannot be read"),
        (lambda folder: np.save(folder / "frequencies.npy", np.zeros(3, int)), r"holds int64 of shape \(3,\)"),
        (lambda folder: os.truncate(folder / "train.ids.npy", 5000), "train.ids.npy cannot be read"),
    ],
)
def test_harmed_folders_are_refused(dataset, tmp_path, harm, message):
    folder = save(dataset, tmp_path / "folder")
    harm(folder)
    with pytest.raises(ValueError, match=message):
        open_dataset(folder)


def test_a_raw_text_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "u.data"
    path.write_text("".join(f"{row}\t1\t5\t{row}\n" for row in range(100)))
    dataset = open_dataset(path)
    assert dataset.n_rows("train") == 80
    assert len(list(tmp_path.iterdir())) == 2
    del dataset
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="split='user'"):
        open_dataset(path, split="user")
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_are_prepared_too(tmp_path):
    lists = [f"{user} {' '.join(str((user * 3 + item) % 20) for item in range(10))}\n" for user in range(6)]
    (tmp_path / "train.txt").write_text("".join(lists))
    (tmp_path / "test.txt").write_text("".join(f"{user} {(user * 3 + 12) % 20}\n" for user in range(6)))
    raw = open_dataset(tmp_path, random_state=5)
    assert raw.name == "lightgcn"
    assert [raw.n_rows(split) for split in SPLITS] == [108, 12, 12]
    mapped = open_dataset(prepare(tmp_path, tmp_path / "folder", random_state=5))
    for split in SPLITS:
        np.testing.assert_array_equal(raw.rows(split).ids, mapped.rows(split).ids)
    (tmp_path / "test.txt").write_text("1 x\n")
    with pytest.raises(ValueError, match=r"test.txt, line 1: expected a user and its items"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="is not of the format gowalla"):
        open_dataset(tmp_path, format="gowalla")
    with pytest.raises(ValueError, match="no file in it is named as those of avazu"):
        open_dataset(tmp_path / "folder", format="avazu")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        prepare(tmp_path / "nothing", tmp_path / "there")
