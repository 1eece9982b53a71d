"""Integers of a few bits, and sets of frequent ids."""

import math

import numpy as np
import pytest
import torch

from vqrs import reference
from vqrs.torch.forms import unpack_bits
from vqrs.torch.trained.hot_ids import HotIds, most_frequent, ones
from vqrs.torch.trained.packing import pack, pack_rows, packed_nbytes, unpack


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 8, 11, 17, 32])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_packed_integers_come_back(bits, count):
    values = torch.from_numpy(np.random.default_rng(bits).integers(0, 1 << bits, count))
    packed = pack(values, bits)
    assert len(packed) == packed_nbytes(count, bits)
    places = torch.randperm(count)
    assert torch.equal(unpack(packed, bits, places), values[places])


def test_blocks_of_packing_join():
    values = torch.arange((1 << 18) + 11) % 29
    assert torch.equal(unpack(pack(values, 5), 5, torch.arange(len(values))), values)


@pytest.mark.parametrize("bits", [1, 3, 8, 13, 20])
def test_rows_of_packed_integers_come_back(bits):
    fields = torch.randint(2**bits, (50, 7), generator=torch.Generator().manual_seed(0))
    packed = pack_rows(fields, bits)
    assert packed.shape == (50, math.ceil(7 * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, 7), fields)
    np.testing.assert_array_equal(packed, reference.pack_bits(fields.numpy(), bits))


def test_bits_are_counted():
    values = torch.tensor([0, 1, 3, 2**63 - 1, 0x5555555555555555, 2**62, 255 << 40, -1, -(2**63)])
    assert ones(values).tolist() == [(int(v) & 2**64 - 1).bit_count() for v in values]


@pytest.mark.parametrize("listed", [True, False])
def test_the_places_of_hot_ids(listed):
    generator = torch.Generator().manual_seed(0)
    n = 100_000 if listed else 3000
    ids = torch.randperm(n, generator=generator)[:1000].sort()[0]
    hot = HotIds(ids, n)
    assert hot.listed == listed
    assert hot.count == 1000
    assert torch.equal(hot.all(), ids)
    found, places = hot.find(torch.arange(n))
    assert torch.equal(found.nonzero()[:, 0], ids)
    assert torch.equal(places[ids], torch.arange(1000))
    assert not places[~found].any()
    assert sum(b.numel() * b.element_size() for b in hot.buffers()) == HotIds.nbytes(1000, n)


def test_ids_of_more_than_32_bits_are_refused():
    with pytest.raises(ValueError, match=f"ids are kept in 32 bits, for at most {2**31} rows, got {2**31 + 1}"):
        HotIds(torch.tensor([2**31]), 2**31 + 1)


@pytest.mark.parametrize("count", [0, 1, 7, 499, 500])
def test_the_most_frequent_ids_are_those_of_a_sort(count):
    frequencies = np.random.default_rng(count).integers(0, 9, 500).astype(float)
    expected = np.sort(np.argsort(-frequencies, kind="stable")[:count])
    np.testing.assert_array_equal(most_frequent(frequencies, 500, count), expected)
