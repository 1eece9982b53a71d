"""CCE's theorem: dense least squares comes as near as it says."""

import numpy as np
import pytest

from vqrs.bench.theory import bound, dense_cce, gaussian_excess, plot_theory


def test_the_reference_run():
    excess = gaussian_excess(2000, 100, 5, 25, rounds=30, runs=8)
    rounds = np.array([1, 5, 10, 20, 30])
    reference = np.array([0.795, 0.314, 0.0955, 0.0098, 0.0010])
    found = excess[:, rounds - 1]
    assert (found.min(0) < reference).all()
    assert (reference < found.max(0)).all()
    assert (abs(found.mean(0) - reference) < 2 * found.std(0)).all()
    assert (found.mean(0) < bound(rounds, 100, 5, 25)).all()
    assert (np.diff(excess, axis=1) < 0).all()


@pytest.mark.parametrize("aligned", [True, False])
def test_the_bound_holds_for_uneven_columns_if_the_noise_is_aligned(aligned):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 30)) * np.geomspace(1, 0.01, 30)
    y = generator.normal(size=(300, 3))
    excess = np.mean([dense_cce(x, y, 9, 12, aligned=aligned, random_state=seed) for seed in range(20)], axis=0)
    assert (excess <= bound(np.arange(1, 13), 30, 3, 9)).all() == aligned


def test_a_sketch_of_all_columns_is_exact_in_one_round():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 2))
    first, second = dense_cce(x, y, 6, 2)
    assert second < 1e-12 < first  # 4 of 6 columns are noise in the first, T in the second
    assert dense_cce(x, y[:, :1], 6, 2)[1] < 1e-20


@pytest.mark.parametrize(("k", "rows"), [(2, 40), (7, 40), (4, 39)])
def test_errors(k, rows):
    with pytest.raises(ValueError, match=r"k must be more than d2=2 and at most d1=6|as many rows"):
        dense_cce(np.ones((40, 6)), np.ones((rows, 2)), k, 1)


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot_theory(tmp_path / "theory.svg", runs=1, rounds=5)
    assert b"<svg" in (tmp_path / "theory.svg").read_bytes()[:1000]
