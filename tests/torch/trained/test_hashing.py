"""Hashes of ids: fixed values, uniformity, and independence of seeds."""

import pytest
import torch

from vqrs.torch.trained.hashing import derived_seeds, hash_bits, hash_ids, hash_signs

MASK = 2**64 - 1
IDS = torch.tensor([0, 1, 2, 12_345, 10**8, 2**40, 2**62 + 7, -1])
SEEDS = torch.tensor([0, 1, -1, 42, 2**62, -(2**63)])


def splitmix(number: int, seed: int) -> int:
    """SplitMix64 in the integers of Python: one step from ``number XOR seed``."""
    z = ((number ^ seed) + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix():
    found = hash_bits(IDS[:, None], SEEDS)
    for i, number in enumerate(IDS.tolist()):
        for j, seed in enumerate(SEEDS.tolist()):
            assert int(found[i, j]) & MASK == splitmix(number & MASK, seed & MASK)
    # The first output of the published generator of state 0.
    assert int(hash_bits(torch.tensor(0), torch.tensor(0))) & MASK == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 2**20 + 3, 2**31])
def test_places_are_the_high_half_of_the_product(size):
    found = hash_ids(IDS[:, None], SEEDS, size)
    for i, number in enumerate(IDS.tolist()):
        for j, seed in enumerate(SEEDS.tolist()):
            assert int(found[i, j]) == splitmix(number & MASK, seed & MASK) * size >> 64


@pytest.mark.parametrize("ids", [torch.arange(100_000), torch.arange(100_000) * 4096], ids=["dense", "strided"])
def test_places_are_uniform(ids):
    counts = torch.bincount(hash_ids(ids, torch.tensor(9), 100), minlength=100).double()
    chi_square = float((counts - 1000).square().sum() / 1000)
    assert 99 - 5 * 14 < chi_square < 99 + 5 * 14  # mean and five deviations, √(2 * 99), of 99 degrees of freedom


def test_pairs_collide_as_often_as_random_ones():
    places = hash_ids(torch.arange(3000), torch.tensor(5), 1000)
    counts = torch.bincount(places, minlength=1000).double()
    pairs = float((counts * (counts - 1)).sum()) / (3000 * 2999)
    assert pairs == pytest.approx(1 / 1000, rel=0.05)


def test_seeds_agree_by_chance():
    seeds = derived_seeds(torch.tensor(77), 8)
    places = hash_ids(torch.arange(50_000)[:, None], seeds, 50)
    for one in range(8):
        for other in range(one):
            same = (places[:, one] == places[:, other]).double().mean()
            assert float(same) == pytest.approx(1 / 50, rel=0.2)


def test_signs_are_balanced_and_tell_nothing_of_the_place():
    ids, seed = torch.arange(100_000), torch.tensor(3)
    signs, places = hash_signs(ids, seed), hash_ids(ids, seed, 10)
    assert set(signs.tolist()) == {-1.0, 1.0}
    for place in range(10):
        assert abs(float(signs[places == place].mean())) < 0.05
