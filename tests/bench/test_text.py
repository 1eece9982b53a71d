"""Published formats of text, on a few lines of each that check its rules."""

import gzip
import tracemalloc

import numpy as np
import pytest

from vqrs.bench import open_dataset, prepare, text
from vqrs.bench.datasets import SPLITS
from vqrs.bench.text import Counts, keys_of, row_hash


def criteo_line(label=0, numbers=None, categories=None):
    numbers = {} if numbers is None else numbers
    categories = {} if categories is None else categories
    row = [label, *(numbers.get(place, "") for place in range(1, 14))]
    return "\t".join(map(str, [*row, *(categories.get(place, "68fd1e64") for place in range(1, 27))])) + "\n"


def write_lines(path, lines):
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("file", ["train.txt", "train.txt.gz", "sample.tsv"])
def test_criteo_kaggle(tmp_path, file):
    lines = [
        criteo_line(row % 2, {1: row, 2: -2, 13: 1.5}, {1: f"{row:08x}", 2: "", 26: "a" * 12}) for row in range(28)
    ]
    lines[25] = criteo_line(1, {}, {1: "00000003", 26: "b"})
    dataset = open_dataset(write_lines(tmp_path / file, lines))
    assert dataset.name == "criteo-kaggle"
    assert dataset.field_names == tuple(f"C{place}" for place in range(1, 27))
    assert [dataset.n_rows(split) for split in SPLITS] == [24, 2, 2]
    assert dataset.field_sizes == (25, *[2] * 25)
    train, validation, test = (dataset.rows(split) for split in SPLITS)
    np.testing.assert_array_equal(train.ids[:, 0], np.arange(1, 25))
    np.testing.assert_array_equal(train.ids[:, 1:], 1)
    np.testing.assert_array_equal(validation.ids[:, 0], [0, 4], "ids of the last day are unknown, but that of row 3")
    np.testing.assert_array_equal(validation.ids[1, 1:], [0, *[1] * 23, 0], "not empty in field 2, and b in field 26")
    np.testing.assert_array_equal(test.ids[:, 0], [0, 0])
    np.testing.assert_allclose(train.numeric[:, 0], np.log1p(np.arange(24)), rtol=1e-6)
    np.testing.assert_allclose(train.numeric[:, 12], np.log(2.5), rtol=1e-6)
    assert (train.numeric[:, 1:12] == 0).all(), "negative and missing numbers are 0"
    np.testing.assert_array_equal(test.labels, [0, 1])
    np.testing.assert_array_equal(dataset.frequencies()[:26], [0, *[1] * 24, 0])
    batch = next(dataset.batches("test", 5))
    assert batch.numeric.shape == (2, 13)
    assert batch.ids[0, 1] == 25 + 1


def test_criteo_terabyte(tmp_path):
    for day, file in enumerate(["day_0", "day_1.gz", "day_2", "day_10"]):
        write_lines(tmp_path / file, [criteo_line(day // 3, {}, {1: f"{day:08x}"}) for _ in range(4)])
    write_lines(tmp_path / "notes.txt", ["not a day\n"])
    dataset = open_dataset(tmp_path, name="days")
    assert dataset.name == "days"
    assert [dataset.n_rows(split) for split in SPLITS] == [12, 2, 2]
    np.testing.assert_array_equal(dataset.rows("train").ids[:, 0], np.repeat([1, 2, 3], 4), "day_10 is after day_2")
    assert dataset.rows("test").labels.all()
    with pytest.raises(ValueError, match="at least two"):
        open_dataset(tmp_path / "day_0")


AVAZU = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
AVAZU += "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21\n"


def test_avazu(tmp_path):
    hours = [14102100] * 4 + [14102205, 14102223, 14102300, 14102301, 14102301, 14102302]
    lines = [
        f"1{row},{row % 2},{hour},1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,a99f214a,ddd2926{row},"
        "44956a24,1,2,15706,320,50,1722,0,35,-1,79\n"
        for row, hour in enumerate(hours)
    ]
    dataset = open_dataset(write_lines(tmp_path / "train.csv.gz", [AVAZU, *lines]))
    assert (dataset.name, dataset.n_numeric) == ("avazu", 0)
    assert dataset.field_names == ("hour", "weekday", *AVAZU.strip().split(",")[3:])
    assert [dataset.n_rows(split) for split in SPLITS] == [6, 1, 3], "the last day, halved between hours"
    hour, weekday, ip = (dataset.field_names.index(name) for name in ("hour", "weekday", "device_ip"))
    assert [dataset.field_sizes[place] for place in (hour, weekday, ip)] == [4, 3, 7]
    np.testing.assert_array_equal(dataset.rows("train").ids[:, hour], [1, 1, 1, 1, 2, 3])
    np.testing.assert_array_equal(dataset.rows("train").ids[:, weekday], [1, 1, 1, 1, 2, 2], "Tuesday, Wednesday")
    np.testing.assert_array_equal(dataset.rows("validation").ids[:, [hour, weekday, ip]], [[1, 0, 0]])
    assert dataset.frequencies()[: 4 + 3].tolist() == [0, 4, 1, 1, 0, 4, 2]
    with pytest.raises(ValueError, match="one day only"):
        open_dataset(write_lines(tmp_path / "one.csv", [AVAZU, *lines[:4]]))
    with pytest.raises(ValueError, match="line 3: click is 7, expected 0 or 1"):
        open_dataset(write_lines(tmp_path / "seven.csv", [AVAZU, lines[0], lines[1].replace(",1,", ",7,", 1)]))
    with pytest.raises(ValueError, match="hour is not YYMMDDHH"):
        open_dataset(write_lines(tmp_path / "hour.csv", [AVAZU, lines[0].replace("14102100", "141021")]))


RATINGS = [(user % 3, 10 + user % 4, 1 + user % 5, 1000 - user) for user in range(20)]


def check_movielens(dataset):
    """Rows stand in reverse of time: the last 16 are for training; the first two for testing."""
    assert dataset.field_names == ("user", "item")
    assert dataset.field_sizes == (4, 5)
    assert [dataset.n_rows(split) for split in SPLITS] == [16, 2, 2]
    wanted = RATINGS[4:], RATINGS[2:4], RATINGS[:2]
    for split, rows in zip(SPLITS, wanted, strict=True):
        np.testing.assert_array_equal(dataset.rows(split).labels, [rating >= 4 for _, _, rating, _ in rows])
        np.testing.assert_array_equal(dataset.rows(split).ids, [(1 + user, 1 + item - 10) for user, item, _, _ in rows])


@pytest.mark.parametrize(
    ("file", "header", "delimiter"),
    [("u.data", "", "\t"), ("ratings.dat", "", "::"), ("ratings.csv", "userId,movieId,rating,timestamp\n", ",")],
)
def test_movielens(tmp_path, file, header, delimiter):
    lines = [delimiter.join(map(str, row)) + "\n" for row in RATINGS]
    check_movielens(open_dataset(write_lines(tmp_path / file, [header, *lines])))
    write_lines(tmp_path / "README", ["about\n"])
    check_movielens(open_dataset(tmp_path))


def test_movielens_with_titles(tmp_path):
    header = "rownames,movieId,title,year,genres,userId,rating,timestamp\n"
    lines = [
        f'{place},{item},"Amélie, or {place}",2001,Comedy|Romance,{user},{rating}.0,{time}\n'
        for place, (user, item, rating, time) in enumerate(RATINGS)
    ]
    check_movielens(open_dataset(write_lines(tmp_path / "movielens.csv", [header, *lines])))


def test_equal_times_stay_together(tmp_path):
    lines = [f"1\t{row}\t5\t{[5, 7, 9][(row >= 15) + (row >= 18)]}\n" for row in range(20)]
    dataset = open_dataset(write_lines(tmp_path / "u.data", lines))
    assert [dataset.n_rows(split) for split in SPLITS] == [15, 3, 2]
    with pytest.raises(ValueError, match="validation split would have no rows"):
        open_dataset(write_lines(tmp_path / "u.data", [line.replace("\t7", "\t9") for line in lines]))


def test_split_by_a_hash_of_the_row(tmp_path):
    lines = [f"{row},{row % 50},{row % 9},2,1,0,5,{1 + row % 5}\n" for row in range(3000)]
    dataset = open_dataset(
        write_lines(tmp_path / "inst.csv", ["rownames,s,d,studage,lectage,service,dept,y\n", *lines])
    )
    assert (dataset.name, dataset.field_names) == ("insteval", ("s", "d", "studage", "lectage", "service", "dept"))
    places = row_hash(np.arange(3000, dtype=np.uint64)) % 10
    for split, chosen in zip(SPLITS, (places < 8, places == 8, places == 9), strict=True):
        assert dataset.n_rows(split) == chosen.sum()
        assert dataset.n_rows(split) / 3000 == pytest.approx({"train": 0.8}.get(split, 0.1), abs=0.02)
        np.testing.assert_array_equal(dataset.rows(split).labels, (np.arange(3000) % 5 >= 3)[chosen])
    path = write_lines(tmp_path / "u.data", ["\t".join(map(str, row)) + "\n" for row in RATINGS])
    dealt = open_dataset(path, split="hash")
    assert dealt.n_rows("train") == (row_hash(np.arange(20, dtype=np.uint64)) % 10 < 8).sum()


def test_rare_ids_are_one_id(tmp_path):
    lines = [f"{user}\t1\t5\t{time}\n" for time, user in enumerate([7, 7, 8, 9, 9, 6, 7, 7, 8, 9])]
    dataset = open_dataset(write_lines(tmp_path / "u.data", lines), min_count=2)
    assert dataset.field_sizes == (3, 2)
    np.testing.assert_array_equal(dataset.rows("train").ids[:, 0], [1, 1, 0, 2, 2, 0, 1, 1])
    np.testing.assert_array_equal(dataset.frequencies(), [2, 4, 2, 0, 8])
    np.testing.assert_array_equal(dataset.rows("validation").ids, [[0, 1]], "8 is rare in training")


def test_wrong_lines_are_named(tmp_path):
    lines = [criteo_line() for _ in range(5)]
    lines[3] = lines[3].replace("\t", " ", 2)
    with pytest.raises(ValueError, match=r"train.txt, line 4: 38 columns, expected 40"):
        open_dataset(write_lines(tmp_path / "train.txt", lines))
    lines[3] = criteo_line(0, {5: "many"})
    with pytest.raises(ValueError, match=r"train.txt, line 4: I5 is 'many', expected a number"):
        open_dataset(write_lines(tmp_path / "train.txt", lines))
    lines[3] = criteo_line(2)
    with pytest.raises(ValueError, match=r"train.txt, line 4: label is 2, expected 0 or 1"):
        open_dataset(write_lines(tmp_path / "train.txt", lines))
    ratings = write_lines(tmp_path / "u.data", ["1\t2\t3\t4\n", "1\t2\t3\t4.5\n"])
    with pytest.raises(ValueError, match=r"u.data, line 2: timestamp is '4.5', expected an integer"):
        open_dataset(ratings)
    with pytest.raises(ValueError, match="line 1: not of the format avazu, whose 23 columns are click, hour, C1"):
        open_dataset(ratings, format="avazu")
    with pytest.raises(ValueError, match="split='user'"):
        open_dataset(ratings, split="user")


def test_a_cut_file_is_told(tmp_path):
    path = write_lines(tmp_path / "train.txt.gz", [criteo_line(0, {}, {1: f"{row:08x}"}) for row in range(9000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"train.txt.gz.*cannot be read"):
        open_dataset(path)


def test_chunks_do_not_show(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 40, (500, 2))
    path = write_lines(tmp_path / "u.data", [f"{user}\t{item}\t3\t{time}\n" for time, (user, item) in enumerate(rows)])
    whole = open_dataset(path)
    monkeypatch.setattr(text, "CHUNK_ROWS", 7)
    monkeypatch.setattr(text, "_MERGED_KEYS", 3)
    stages = []
    parts = open_dataset(prepare(path, tmp_path / "parts", progress=lambda stage, done: stages.append((stage, done))))
    assert stages[-1] == ("writing", 500)
    assert {stage for stage, _ in stages} == {"placing the cuts", "counting ids", "writing"}
    np.testing.assert_array_equal(whole.frequencies(), parts.frequencies())
    for split in SPLITS:
        np.testing.assert_array_equal(whole.rows(split).ids, parts.rows(split).ids)
    train = whole.rows("train").ids + np.array([0, whole.field_sizes[0]])
    np.testing.assert_array_equal(whole.frequencies(), np.bincount(train.ravel(), minlength=sum(whole.field_sizes)))


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_ROWS", 256)
    monkeypatch.setattr(text, "_MERGED_CHUNKS", 4)

    def peak(n_rows):
        path = write_lines(
            tmp_path / f"{n_rows}.dat", (f"{row % 97}::{row % 89}::4::{row * 10 // n_rows}\n" for row in range(n_rows))
        )
        tracemalloc.start()
        prepare(path, tmp_path / "prepared", overwrite=True)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(2_000)  # what is made once
    small, large = peak(2_000), peak(20_000)
    assert large < 1.1 * small, "the keys and times alone are 432,000 bytes more"
    assert small < 432_000


def test_keys_are_the_bytes_or_a_hash_of_long_ones():
    short = keys_of(np.array([b"", b"a", b"ab", b"b", b"12345678"]))
    assert len(set(short.tolist())) == 5
    np.testing.assert_array_equal(np.argsort(short), [0, 4, 1, 2, 3], "in the order of the bytes")
    mixed = keys_of(np.array([b"a", b"123456789", b"12345678", b"123456780", b"123456789"]))
    assert mixed[0] == short[1]
    assert mixed[2] == short[4]
    assert len(set(mixed.tolist())) == 4
    assert mixed[1] == mixed[4]


def test_counts_of_many_merges():
    generator = np.random.default_rng(1)
    keys = generator.integers(0, 5000, 30_000).astype(np.uint64)
    counts = Counts()
    for part in np.array_split(keys, 70):
        counts.add(part)
    wanted = np.unique(keys, return_counts=True)
    for _ in range(2):
        for found, right in zip(counts.settled(), wanted, strict=True):
            np.testing.assert_array_equal(found, right)
