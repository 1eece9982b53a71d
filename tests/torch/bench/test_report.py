"""Reports of the benchmark: intervals, chosen runs, winners, tables, published values, plots."""

import json
import math
import sys

import numpy as np
import pytest

from vqrs.bench import plots, published, report

FULL_NBYTES = 64_000


def run(method="hash", ratio=10.0, seed=0, auc=0.75, **fields):
    """A line as the runner writes it; no ratio for the full table."""
    budget = None if ratio is None else {"unit": "ratio", "value": ratio}
    options = fields.pop("options", {})
    line = {
        "dataset": "movies",
        "model": "gmf",
        "method": method,
        "variant": {},
        "budget": budget,
        "ratio": ratio or 1.0,
        "seed": seed,
        "learning_rate": 1e-3,
        "embedding_dim": 16,
        "chosen": True,
        "auc": auc,
        "log_loss": None if auc is None else 1.3 - auc,
        "validation_auc": None if auc is None else auc + 0.01,
        "trained_floats": FULL_NBYTES // 4 // (ratio or 1),
        "training_nbytes": 4 * FULL_NBYTES // (ratio or 1),
        "inference_nbytes": FULL_NBYTES // (ratio or 1),
        "exported_nbytes": None,
        "full_nbytes": FULL_NBYTES,
        "seconds": 12.0,
        "lookups_per_second": 2.5e6,
        "error": None,
    } | fields
    source = fields.pop("source", line["dataset"])
    line.pop("source", None)
    key = [source, options, "gmf", line["method"], budget, seed, line["learning_rate"], 16, False, {}]
    return {"key": json.dumps(key)} | line


def summary(method, ratio, *aucs, **fields):
    (found,) = report.summarise([run(method, ratio, seed, auc, **fields) for seed, auc in enumerate(aucs)])
    return found


def cells(markdown):
    """Rows of a Markdown table as dicts by their first cell and head."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


# ---- reading and averaging -----------------------------------------------------------------------------------------


def test_last_of_equal_runs_and_no_damaged_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    lines = [json.dumps(run(seed=0, auc=0.6)), json.dumps(run(seed=1)), "[1, 2]", "", json.dumps(run(seed=0, auc=0.7))]
    path.write_text("\n".join(lines) + "\n" + json.dumps(run(seed=2))[:40], encoding="utf-8")
    found, notes = report.read_runs(path)
    assert sorted((line["seed"], line["auc"]) for line in found) == [(0, 0.7), (1, 0.75)]
    assert [note.split(" of ")[0] for note in notes] == ["line 3", "line 6"]
    assert all(note.endswith("is damaged, it was left out") for note in notes)


def test_runs_without_keys_are_told_apart_by_what_they_are(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = [run(seed=0, auc=0.6), run(seed=1), run(seed=0, auc=0.7), run("robe", auc=0.8)]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "key"}) + "\n" for r in runs))
    found, notes = report.read_runs(path)
    assert sorted(line["auc"] for line in found) == [0.7, 0.75, 0.8]
    assert notes == []


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        report.read_runs(tmp_path / "runs.jsonl")


# From the usual tables of Student's t, two-sided 95 %.
@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_student(degrees, expected):
    assert report.student_quantile(degrees) == pytest.approx(expected, abs=6e-5)


def test_student_99_percent_and_many_degrees():
    assert report.student_quantile(4, 0.99) == pytest.approx(4.6041, abs=6e-5)
    assert report.student_quantile(2000) == pytest.approx(1.9612, abs=6e-5)


def test_mean_and_interval_over_seeds():
    found = summary("hash", 10, 0.70, 0.72, 0.77)
    assert found.n_seeds == 3
    assert found.means["auc"] == pytest.approx(0.73)
    # s = 0.036056, s / √3 = 0.020817, times t(2) = 4.3027
    assert found.intervals["auc"] == pytest.approx(0.089567, abs=1e-5)
    assert found.means["trained_floats"] == 1600
    assert "exported_nbytes" not in found.means


def test_one_seed_has_no_interval():
    found = summary("hash", 10, 0.7)
    assert found.intervals == {}
    assert cells(report.markdown_table([found]))["hash"]["10×"] == "**0.7000**"


def test_only_the_chosen_learning_rate_counts():
    lines = [run(seed=0, auc=0.9, learning_rate=1e-2, chosen=False), *(run(seed=s, auc=0.7) for s in range(2))]
    (found,) = report.summarise(lines)
    assert (found.n_seeds, found.means["learning_rate"], found.means["auc"]) == (2, 1e-3, pytest.approx(0.7))


def test_without_a_choice_the_first_seed_of_the_best_on_validation_counts():
    lines = [
        run(seed=0, auc=0.9, validation_auc=0.6, learning_rate=1e-2, chosen=False),
        run(seed=0, auc=0.7, validation_auc=0.8, chosen=False),
        run(seed=1, auc=0.7, validation_auc=0.5, chosen=False),
        run(seed=0, auc=None, validation_auc=None, learning_rate=1.0, error="diverged", chosen=False),
    ]
    (found,) = report.summarise(lines)
    assert (found.n_seeds, found.means["learning_rate"], found.means["auc"]) == (2, 1e-3, pytest.approx(0.7))


def test_settings_are_part_of_the_method():
    lines = [run("cce", variant={"num_columns": 4}), run("cce", variant={"num_columns": 16}), run("cce")]
    assert [s.method for s in report.summarise(lines)] == ["cce:num_columns=4", "cce:num_columns=16", "cce"]


def test_runs_of_other_options_are_not_mixed():
    found = report.summarise([run(seed=0), run(seed=1, options={"limit": 100})])
    assert [s.n_seeds for s in found] == [1, 1]
    assert len(report.sections(found)) == 2


def test_a_run_in_two_files_is_one_run():
    lines = [run(seed=0, auc=0.7), run(seed=1, auc=0.8)]
    assert report.summarise(lines + lines) == report.summarise(lines)
    # The same budget as an integer and as a float, as the command and a script write it.
    whole = [at_ppd("hash", 2048, 0.57), at_ppd("hash", 2048.0, 0.57)]
    assert [s.n_seeds for s in report.summarise(whole)] == [1]


def test_sets_of_one_name_from_other_files_are_not_mixed():
    found = report.summarise([run(seed=0), run(seed=0, source="other/movies")])
    assert len(report.sections(found)) == 2


def test_keys_that_are_none_are_damaged_lines(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run() | {"key": key}) + "\n" for key in ("half", "[1]", "7", 7)))
    found, notes = report.read_runs(path)
    assert (found, len(notes)) == ([], 4)


def test_how_runs_were_trained_is_told():
    line = run()
    key = json.loads(line["key"])
    key[1], key[8], key[9] = {"min_count": 2}, True, {"batch_size": 512}
    text = report.markdown_report(report.summarise([line | {"key": json.dumps(key)}]))
    assert "Settings: min count 2, batch size 512, a table for each field.\n" in text


def test_the_full_table_alone():
    assert cells(report.markdown_table([summary("full", None, 0.9)])) == {"full": {"no budget": "0.9000"}}


def test_long_times_are_read_as_numbers():
    (row,) = cells(report.markdown_details([summary("hash", 10, 0.7, seconds=12345.6)], ("ratio", 10))).values()
    assert row["seconds"] == "**12,346**"
    (row,) = cells(report.markdown_details([summary("hash", 10, 0.7, seconds=0.01234)], ("ratio", 10))).values()
    assert row["seconds"] == "**0.0123**"


def test_few_fields_are_enough():
    (found,) = report.summarise([{"dataset": "d", "model": "m", "method": "full"}])
    assert (found.n_seeds, found.means, found.unit, found.ratio) == (1, {}, None, 1.0)
    assert "full" in report.markdown_report([found])


# ---- who wins ------------------------------------------------------------------------------------------------------


def found_winners(summaries) -> dict[tuple[float, str], report.Winner]:
    return {(winner.ratio, winner.counted): winner for winner in report.winners(summaries)}


def test_winner_by_each_count():
    # Pointers are no floats: by trained floats the clustered method wins at 100×, by bytes it is out of the contest.
    pointers = summary("cce", 10, 0.80, trained_floats=160, training_nbytes=9_000, inference_nbytes=6_400)
    hashed = summary("hash", 100, 0.70)
    found = found_winners([summary("full", None, 0.9), pointers, hashed, summary("hash", 10, 0.75)])
    assert found[100, "trained_floats"].best.method == "cce"
    assert found[100, "trained_floats"].limit == 160
    assert found[100, "inference_nbytes"].best is hashed
    assert found[100, "training_nbytes"].best is hashed
    assert found[10, "inference_nbytes"].best is pointers
    assert found[10, "training_nbytes"].limit == 4 * FULL_NBYTES / 10
    table = report.markdown_winners([summary("full", None, 0.9), pointers, hashed])
    assert "| 100× | cce 0.8000 | hash 0.7000 | hash 0.7000 |" in table


def test_seeds_of_hashes_do_not_decide_who_takes_part():
    seeded = summary("hash", 100, 0.7, inference_nbytes=646)
    found = found_winners([seeded, summary("cce", 100, 0.8, inference_nbytes=660)])
    assert found[100, "inference_nbytes"].best is seeded


def test_nobody_reaches_it():
    lost = summary(
        "cce", 1000, None, error="cce needs at least 900 bytes here, the budget is 64", training_nbytes=5_000
    )
    assert {winner.best for winner in report.winners([lost])} == {None}
    assert "| 1,000× | – | – | – |" in report.markdown_winners([lost])


def test_ties():
    near = summary("robe", 10, 0.78, 0.80, 0.82)
    best = summary("cce", 10, 0.81, 0.82, 0.83)
    far = summary("hash", 10, 0.50, 0.51, 0.52)
    found = found_winners([far, near, best])[10, "inference_nbytes"]
    assert (found.best, found.ties) == (best, [near])
    table = cells(report.markdown_table([far, near, best]))
    assert table["cce"]["10×"].startswith("**0.8200 ± ")
    assert table["robe"]["10×"].endswith(" ≈")
    assert not table["hash"]["10×"].endswith("≈")


def test_one_seed_shares_with_an_equal_only():
    table = cells(report.markdown_table([summary("a", 10, 0.8), summary("b", 10, 0.7999), summary("c", 10, 0.8)]))
    assert [table[name]["10×"] for name in "abc"] == ["**0.8000**", "0.7999", "**0.8000**"]


# ---- tables --------------------------------------------------------------------------------------------------------


def members():
    lost = {
        "error": "needs at least 900 bytes here, the budget is 64",
        "trained_floats": None,
        "training_nbytes": 2048,
        "inference_nbytes": None,
        "seconds": None,
        "lookups_per_second": None,
    }
    return [
        summary("full", None, 0.90),
        summary("hash", 100, 0.60),
        summary("hash", 10, 0.70, seconds=3.0, lookups_per_second=9e6),
        summary("cce", 10, 0.80, exported_nbytes=6_000),
        summary("cce", 100, None, **lost),
    ]


def test_table():
    table = cells(report.markdown_table(members()))
    assert list(table) == ["full", "cce", "hash"]
    assert table["full"] == {"10×": "0.9000", "100×": "0.9000"}  # out of the contest
    assert table["hash"] == {"10×": "0.7000", "100×": "**0.6000**"}
    assert table["cce"] == {"10×": "**0.8000**", "100×": "– (trains in 2.0 KiB)"}


def test_of_the_loss_the_least_is_best():
    table = cells(report.markdown_table(members(), "log_loss"))
    assert (table["cce"]["10×"], table["hash"]["10×"]) == ("**0.5000**", "0.6000")


def test_a_method_that_was_not_run_has_an_empty_cell():
    table = cells(report.markdown_table([summary("hash", 100, 0.6), summary("cce", 10, 0.8)]))
    assert table["hash"] == {"10×": "", "100×": "**0.6000**"}


def test_details():
    table = cells(report.markdown_details([*members(), summary("aaa", 10, 0.6, seconds=20.0)], ("ratio", 10)))
    assert list(table) == ["full", "cce", "hash", "aaa"]
    assert table["full"]["training"] == "250.0 KiB"
    assert table["hash"] == {
        "AUC": "0.7000",
        "log-loss": "0.6000",
        "trained floats": "**1,600**",
        "training": "**25.0 KiB**",
        "inference": "**6.2 KiB**",
        "table file": "–",
        "seconds": "**3**",
        "lookups/s": "**9 M**",
    }
    assert table["cce"]["AUC"] == "**0.8000**"
    assert table["cce"]["training"] == "**25.0 KiB**"
    assert table["cce"]["table file"] == "**5.9 KiB**"
    lost = cells(report.markdown_details(members(), ("ratio", 100)))["cce"]
    assert lost["training"] == "2.0 KiB"
    assert {value for name, value in lost.items() if name != "training"} == {"–"}


def test_whole_report():
    found = members()
    text = report.markdown_report(found, {found[0].section: "movies.png"})
    assert "### movies, gmf, d = 16" in text
    assert "![AUC against bytes: movies, gmf, d = 16](movies.png)" in text
    assert "One seed a line: no intervals." in text
    assert text.count("All measures at ") == 2
    assert "published" not in text
    assert "Means over 3 seeds with 95 % confidence intervals" in report.markdown_report([summary("a", 10, 1, 2, 3)])


def test_for_json():
    found = json.loads(json.dumps(report.as_dicts(members())))
    assert found[2]["section"]["dataset"] == "movies"
    assert found[2]["means"]["auc"] == 0.70


# ---- beside the published ------------------------------------------------------------------------------------------


def at_ppd(method, ppd, auc, **fields):
    line = run(method, 10, 0, auc, dataset="synthetic-10m", **fields)
    return line | {"budget": {"unit": "ppd", "value": ppd}, "ppd": ppd}


def test_published_values_are_those_of_the_paper():
    clustered = published.PUBLISHED["synthetic-10m"]["cce"]
    assert clustered == {64: 0.526, 256: 0.564, 1024: 0.613, 2048: 0.678, 4096: 0.819, 8192: 0.880}
    best = {ppd: max(of.get(ppd, 0) for of in published.PUBLISHED["synthetic-10m"].values()) for ppd in clustered}
    assert best == {64: 0.540, 256: 0.566, 1024: 0.625, 2048: 0.678, 4096: 0.843, 8192: 0.891}
    assert {method: of.get(2048) for method, of in published.PUBLISHED["synthetic-10m"].items()} == {
        "hash": 0.567, "concatenated": 0.635, "cce": 0.678, "robe": 0.646, "low-dimensional": 0.672
    }  # fmt: skip
    small = [(name, ppd, auc) for name, of in published.PUBLISHED["synthetic-1m"].items() for ppd, auc in of.items()]
    assert [(name, auc) for name, ppd, auc in sorted(small, key=lambda one: -one[2]) if ppd == 256] == [
        ("weighted-robe", 0.622), ("dhe", 0.618), ("hashed-net", 0.607), ("cce-robe", 0.584), ("cce", 0.567),
        ("hash", 0.535),
    ]  # fmt: skip
    assert {name: auc for name, ppd, auc in small if ppd == 8192} == {
        "concatenated": 0.770, "low-dimensional": 0.766, "cce": 0.691
    }  # fmt: skip
    assert published.FULL == {"synthetic-10m": 0.895, "synthetic-1m": 0.821}
    assert set(published.OURS) <= {name for of in published.PUBLISHED.values() for name in of}


def test_beside_published():
    lines = [
        run("full", None, 0, 0.897, dataset="synthetic-10m"),
        at_ppd("hash", 2048, 0.57),
        at_ppd("cce", 2048, 0.70, variant={"num_columns": 16}),
        at_ppd("cce", 2048, 0.68, variant={"num_columns": 4}),
    ]
    compared = {(one.ppd, one.published_method): one for one in published.compare_published(report.summarise(lines))}
    assert compared[2048, "cce"].ours.method == "cce:num_columns=4"
    assert compared[2048, "cce"].difference == pytest.approx(0.002)
    assert compared[None, "full"].difference == pytest.approx(0.002)
    assert compared[256, "cce"].difference is None
    text = published.markdown_published(report.summarise(lines))
    assert "| 2048 | hash | 0.567 | hash | 0.5700 | +0.0030 |" in text
    assert "| 2048 | robe | 0.646 | – | – | – |" in text
    assert "| 8192 |" not in text  # not run
    assert "| 2048 | cce 0.678 | cce:num_columns=16 | 0.7000 | +0.0220 |" in text
    assert text in report.markdown_report(report.summarise(lines))


def test_a_large_difference_from_the_published_stands_out():
    lines = [at_ppd("hash", 2048, 0.5875), at_ppd("robe", 2048, 0.62)]
    text = published.markdown_published(report.summarise(lines))
    assert "| hash | 0.5875 | **+0.0205** |" in text
    assert "| robe | 0.6200 | **-0.0260** |" in text
    assert "| 2048 | cce 0.678 | robe | 0.6200 | -0.0580 |" in text


def test_ratios_are_those_that_were_asked_for():
    (one,) = report.summarise([run(ratio=1000.0) | {"ratio": 1000.24}])
    assert "1,000×" in report.markdown_table([one])
    assert {winner.ratio for winner in report.winners([one])} == {1000}
    assert report.budget_text("ppd", 2048, 4.883) == "2,048 rows a field (4.88×)"


def test_nothing_is_published_of_other_sets():
    assert published.markdown_published(members()) == ""


# ---- plots ---------------------------------------------------------------------------------------------------------


def many_methods(n=26):
    draw = np.random.default_rng(0)
    found = [summary("full", None, 0.80, 0.801, 0.802)]
    for number in range(n):
        for ratio in (10, 100, 1000):
            auc = 0.8 - 0.02 * math.log10(ratio) * draw.uniform(0.2, 2)
            found.append(summary(f"method-{number}", ratio, auc, auc + 0.003, auc - 0.004))
    return found


def test_plot():
    found = many_methods()
    figure = plots.plot(found)
    panels = figure.axes
    assert len(panels) == 2
    assert all(axes.get_xscale() == "log" for axes in panels)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted({s.method for s in found})
    best = max((s for s in found if s.unit), key=lambda s: s.means["auc"])
    for axes in panels:
        assert best.method in {text.get_text() for text in axes.texts}
        drawn = {container.get_label(): container for container in axes.containers}
        line = drawn[best.method].lines[0]
        at = max(range(3), key=lambda place: line.get_xdata()[place])
        assert line.get_ydata()[at] == pytest.approx(best.means["auc"])
        assert line.get_color() in plots.COLOURS
        assert len(axes.texts) <= len(plots.COLOURS)
        (level,) = (line for line in axes.lines if line.get_label() == "full")
        assert level.get_ydata()[0] == pytest.approx(0.801)
    lines = [container.lines[0] for container in panels[0].containers]
    assert len({(line.get_marker(), line.get_markerfacecolor() == "white") for line in lines}) == 26


def test_plot_leaves_out_what_is_not_reached(tmp_path):
    figure = plots.plot(members(), counts=["trained_floats", "exported_nbytes"])
    assert [container.get_label() for container in figure.axes[1].containers] == ["cce"]
    path = tmp_path / "plot.png"
    plots.save_plot(members(), path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'vqrs\[plot\]'"):
        plots.plot(members())
