"""Tables of clustered, sketched and few-bit embeddings: lookups are the module's rows, in every state it can be in."""

import numpy as np
import pytest
import torch

import vqrs
from vqrs.torch.trained import methods

N, D = 500, 8
FREQUENCIES = np.random.default_rng(0).permutation(1000.0 / np.arange(1, N + 1))

CASES = [
    ("cce", {"num_rows": 20}),
    ("cce", {"num_rows": 20, "num_columns": 8, "bits": 8}),
    ("cce", {"num_rows": 20, "num_columns": 1, "bits": 16}),
    ("cce", {"num_rows": 20, "hot_ids": 60}),
    ("cce", {"num_rows": 20, "hot_ids": 60, "bits": 8}),
    ("cce", {"num_rows": N}),
    ("cce-robe", {"size": 90}),
    ("cce-robe", {"size": 90, "bits": 8, "hot_ids": 100}),
    ("cce-robe", {"size": N * D}),
    ("low-rank-int", {"rank": 5, "bits": 3}),
    ("low-rank-int", {"rank": 8, "bits": 1}),
    ("low-rank-int", {"rank": 8, "bits": 32}),
    ("low-rank-int", {"rank": 4, "bits": 2, "num_rows": 100}),
    ("low-rank-int", {"rank": 4, "bits": 32, "num_rows": 100}),
    ("low-rank-int", {"rank": 4, "bits": 8, "num_rows": 100, "frequencies": None}),
    ("cafe", {"num_hashed": 20, "num_hot": 30, "threshold": 5.0}),
]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_lookups_are_the_rows_of_the_module(name, settings, steps, tmp_path):
    module = methods()[name](N, D, **({"frequencies": FREQUENCIES, "random_state": 0} | settings))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    training = type("Training", (), {"optimizer": optimizer, "epochs": 3, "steps_per_epoch": 1})()
    for training.step in range(1, steps + 1):
        ids = torch.randint(N, (256,), generator=torch.Generator().manual_seed(training.step)) ** 2 // N
        optimizer.zero_grad()
        (module(ids) - 0.1 * torch.arange(D)).square().sum().backward()
        optimizer.step()
        module.on_step(training)
        module.on_epoch(training)
    if name.startswith("cce"):
        module.weight.data += 0.01  # the hashed part counts too
        assert bool(len(module.pointers)) == (steps > 0 and not module._whole)
    table = module.to_table()
    assert table.kind == name
    table.save(tmp_path / "table.safetensors")
    with vqrs.open(tmp_path / "table.safetensors", verify="full") as opened:
        np.testing.assert_allclose(opened[:], module.eval().to_dense(), rtol=1e-5, atol=1e-6)
