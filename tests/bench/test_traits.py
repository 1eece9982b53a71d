"""Traits of data sets whose traits are known."""

import json

import numpy as np
import pytest

from vqrs.bench import Dataset, Rows, datasets, open_dataset, save, traits
from vqrs.bench.datasets import SPLITS
from vqrs.bench.traits import cramers_v, format_traits, power_law, summary


def made(columns, labels, sizes, **options):
    """A data set whose rows are dealt to the splits by eighths: six, one and one."""
    ids = np.stack(columns, axis=1)
    place = np.arange(len(labels)) % 8
    chosen = {"train": place < 6, "validation": place == 6, "test": place == 7}
    rows = {
        split: Rows(ids[mask], np.zeros((mask.sum(), 0), np.float32), labels[mask]) for split, mask in chosen.items()
    }
    return Dataset("made", [f"f{place}" for place in range(len(columns))], sizes, rows, **options)


@pytest.mark.parametrize("exponent", [1.8, 2.5, 3.5])
def test_exponent_of_zeta_samples(exponent):
    counts = np.random.default_rng(0).zipf(exponent, size=30_000)
    found, least = power_law(counts)
    assert found == pytest.approx(exponent, abs=0.1)
    assert least <= 10


def test_exponent_of_a_tail():
    """Below 20 the counts follow no power law; above they are floors of a Pareto law's draws."""
    generator = np.random.default_rng(1)
    tail = np.floor(20 * generator.random(20_000) ** (-1 / 1.5) + 0.5).astype(int)
    found, least = power_law(np.r_[tail, generator.integers(1, 20, 10_000)])
    assert found == pytest.approx(2.5, abs=0.1)
    assert 15 <= least <= 40


def test_exponent_of_ranks():
    """Lookups whose frequency falls as rank^(-s) have counts with the exponent 1 + 1/s."""
    generator = np.random.default_rng(2)
    for s in (0.8, 1.2):
        weights = np.arange(1, 20_001) ** -s
        counts = np.bincount(generator.choice(20_000, size=2_000_000, p=weights / weights.sum()))
        assert power_law(counts)[0] == pytest.approx(1 + 1 / s, abs=0.15)


def test_likelihood_is_the_greatest():
    """Against the sum itself, cut where it no longer counts."""
    counts = np.random.default_rng(3).zipf(3.0, size=500)
    values, times = np.unique(counts, return_counts=True)
    found = traits._likeliest_exponent(values, times)

    def likelihood(exponent):
        return -len(counts) * np.log((np.arange(1, 10**6) ** -exponent).sum()) - exponent * np.log(counts).sum()

    assert likelihood(found) > max(likelihood(found - 0.01), likelihood(found + 0.01))
    assert traits._hurwitz_zeta(2.0, 1.0) == pytest.approx(np.pi**2 / 6, rel=1e-7)
    assert traits._hurwitz_zeta(4.0, 3.0) == pytest.approx(np.pi**4 / 90 - 1 - 1 / 16, rel=1e-7)
    assert traits._hurwitz_zeta(20.0, 5000.0) == pytest.approx((np.arange(5000.0, 50_000) ** -20.0).sum(), rel=1e-7)


def test_exponent_of_few_or_equal_counts():
    assert power_law(np.ones(49, dtype=int)) == (None, None)
    assert power_law(np.zeros(100, dtype=int)) == (None, None)
    assert power_law(np.full(100, 7))[0] == pytest.approx(20, abs=1e-4)


def test_association_of_fields():
    generator = np.random.default_rng(4)
    one, other = generator.integers(0, 300, (2, 5000))
    assert cramers_v(one, 1000 - 3 * one) == pytest.approx(1, abs=1e-9)
    assert cramers_v(one, other) < 0.05
    uncorrected = np.sqrt(299 / 5000)
    assert uncorrected > 0.2, "without the correction, independent fields seem associated"
    assert cramers_v(one, np.zeros(5000, dtype=int)) == 0
    assert cramers_v(np.arange(5000), np.arange(5000)) == 0, "ids that occur once tell nothing"


def test_association_is_bergsmas():
    """A 2 x 3 table, by the formulas of the paper with the sums over all cells."""
    table = np.array([[20, 5, 10], [4, 30, 11]])
    one, two = np.indices(table.shape).reshape(2, -1).repeat(table.ravel(), axis=1)
    n = table.sum()
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / n
    squared = ((table - expected) ** 2 / expected).sum() / n
    corrected = squared - 1 * 2 / (n - 1)
    rows, columns = 2 - 1 / (n - 1), 3 - 4 / (n - 1)
    assert cramers_v(one, two) == pytest.approx(np.sqrt(corrected / (min(rows, columns) - 1)), abs=1e-12)


def test_fields_with_known_traits():
    n_rows = 16_000
    generator = np.random.default_rng(5)
    labels = (generator.random(n_rows) < 0.25).astype(int)
    even = np.arange(n_rows) // 8 % 16
    columns = [even, labels, generator.integers(0, 8, n_rows), (even + 3) % 16]
    found = traits.traits(made(columns, labels, [16, 2, 8, 16]))
    assert json.loads(json.dumps(found)) == found
    assert found["rows"] == {"train": 12_000, "validation": 2_000, "test": 2_000}
    assert (found["ids"], found["numbers"]) == (42, 0)
    assert found["positive_share"] == pytest.approx(0.25, abs=0.02)
    even_field, label, independent = (found["fields"][name] for name in ("f0", "f1", "f2"))
    assert even_field["entropy"] == pytest.approx(4, abs=1e-3)
    assert even_field["top_10_percent_share"] == pytest.approx(2 / 16, abs=1e-3)
    assert even_field["top_1_percent_share"] == pytest.approx(1 / 16, abs=1e-3)
    assert (even_field["ids"], even_field["seen"], even_field["exponent"]) == (16, 16, None)
    rate = labels.mean()
    entropy = -rate * np.log2(rate) - (1 - rate) * np.log2(1 - rate)
    assert label["label_information"] == pytest.approx(entropy, abs=0.02)
    assert abs(independent["label_information"]) < 0.002
    assert found["correlations"]["f0, f3"] == pytest.approx(1, abs=1e-9)
    assert found["correlations"]["f0, f2"] < 0.05
    assert len(found["correlations"]) == 6


def test_rare_ids_do_not_flatter():
    """An id a row fits the training labels wholly, and tells nothing."""
    labels = np.random.default_rng(6).integers(0, 2, 8000)
    field = traits.traits(made([np.arange(8000)], labels, [8000]))["fields"]["f0"]
    assert field["seen_once_share"] == 1
    assert (field["seen"], field["unknown_share"]) == (6000, 1)
    assert abs(field["label_information"]) < 1e-6


def test_ids_seen_once_and_unknown_ids():
    """Eight rows thrice: ids 1 and 2 in training often, others once; the test rows hold ids 0, 9 and 1."""
    column = np.array([1, 1, 1, 2, 2, 3, 1, 0, 1, 1, 1, 2, 2, 4, 1, 9, 1, 1, 1, 2, 2, 0, 1, 1])
    labels = np.arange(24) % 2
    plain = traits.traits(made([column], labels, [10]))["fields"]["f0"]
    assert (plain["seen"], plain["seen_once_share"]) == (5, 3 / 5)
    assert plain["unknown_share"] == pytest.approx(1 / 3), "9"
    with_unknown = traits.traits(made([column], labels, [10], has_unknown_ids=True))["fields"]["f0"]
    assert (with_unknown["seen"], with_unknown["seen_once_share"]) == (4, 2 / 4)
    assert with_unknown["unknown_share"] == pytest.approx(2 / 3), "0 and 9"
    assert with_unknown["top_1_percent_share"] == 9 / 17


def test_mapped_sets_are_read_in_pieces(tmp_path, monkeypatch):
    dataset = open_dataset("synthetic-60x50x1200")
    whole = traits.traits(dataset)
    monkeypatch.setattr(traits, "WINDOW_ROWS", 37)
    monkeypatch.setattr(datasets, "WINDOW_ROWS", 41)
    mapped = traits.traits(open_dataset(save(dataset, tmp_path / "folder")))
    for name, field in whole["fields"].items():
        assert mapped["fields"][name] == pytest.approx(field)
    assert mapped["correlations"] == whole["correlations"]
    fresh = Dataset("fresh", "ab", dataset.field_sizes, {split: dataset.rows(split) for split in SPLITS})
    np.testing.assert_array_equal(fresh.frequencies(), dataset.frequencies())


def test_text_and_summary():
    found = traits.traits(open_dataset("synthetic-600x50x6000"))
    lines = format_traits(found).splitlines()
    assert lines[0].startswith("synthetic-600x50x6000: 4,800 training, 600 validation, 600 test rows; 650 ids; ")
    heading = "field ids seen exponent seen once top 1 % top 10 % entropy, bits unknown in test label, bits"
    assert " ".join(lines[2].split()) == heading
    assert [line.split()[0] for line in lines[3:5]] == ["user", "item"]
    assert len({len(line) for line in lines[2:5]}) == 1, "columns stand under each other"
    assert lines[-1].startswith("most correlated (Cramér's V): user, item 0.")
    row = summary(found)
    assert row["largest_field"] == "user"
    assert row["rows_per_id"] == pytest.approx(2 * 4800 / 650)
    assert row["exponent"] == found["fields"]["user"]["exponent"]
    assert row["label_information"] == max(field["label_information"] for field in found["fields"].values())
