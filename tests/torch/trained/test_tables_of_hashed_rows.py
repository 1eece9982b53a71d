"""Tables of the hashed methods in all their settings: lookups are the rows of the module."""

import numpy as np
import pytest
import torch

from vqrs.torch.trained import methods

N, D = 700, 10
FREQUENCIES = np.random.default_rng(0).random(N)

CASES = [
    ("adaptive", {"num_rows": 20}),
    ("adaptive", {"num_rows": 400}),
    ("adaptive", {"num_rows": 20, "hot_share": 0}),
    ("adaptive", {"num_rows": N}),
    ("bloom", {"num_hashes": 3}),
    ("bloom", {"num_hashes": 1, "signs": True}),
    ("bloom", {"num_rows": N}),
    ("compositional", {"columns": 5}),
    ("compositional", {"num_rows": N}),
    ("full", {}),
    ("hash", {"num_rows": 30}),
    ("hash", {"num_rows": N}),
    ("hash-embedding", {"num_rows": 30}),
    ("hash-embedding", {"num_rows": 100, "num_hashes": 3}),
    ("hash-embedding", {"num_rows": N}),
    ("low-rank", {"rank": 3}),
    ("low-rank", {"rank": D}),
    ("memcom", {}),
    ("memcom", {"offsets": True}),
    ("memcom", {"num_rows": N}),
    ("quotient-remainder", {}),
    ("quotient-remainder", {"operation": "add"}),
    ("quotient-remainder", {"operation": "concatenate"}),
    ("quotient-remainder", {"num_remainders": N}),
    ("robe", {"chunk_size": 1, "signs": True}),
    ("robe", {"chunk_size": 3}),
    ("robe", {"size": N * D, "chunk_size": 4}),
    ("unified", {}),
    ("unified", {"lookups": 2, "num_rows": 2 * N}),
    ("weighted-robe", {}),
    ("weighted-robe", {"size": N * D}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_lookups_are_the_rows(name, settings):
    module = methods()[name](N, D, frequencies=FREQUENCIES, random_state=0, **settings).eval()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    table = module.to_table()
    np.testing.assert_allclose(table[:], module.to_dense(), rtol=1e-5, atol=1e-5)
    assert table.kind == name
