"""Compress a table in several ways and compare what each costs: ``python examples/01_compress.py``."""

import numpy as np

import vqrs

rng = np.random.default_rng(0)
x = rng.standard_normal((5_000, 12), dtype=np.float32) @ rng.standard_normal((12, 64), dtype=np.float32)

methods = [
    vqrs.ScalarQuantizer(dtype="int8"),
    vqrs.ScalarQuantizer(dtype="int4"),
    vqrs.ProductQuantizer(n_subvectors=16, n_bits=8, random_state=0),
    vqrs.ResidualQuantizer(n_stages=8, n_bits=8, beam_width=4, random_state=0),
]

print(f"{'kind':<10}{'bytes a row':>12}{'bytes of all':>14}{'ratio':>8}{'relative error':>16}")
for method in methods:
    table = method.fit(x).compress(x)
    print(f"{table.kind:<10}{method.row_bytes_:>12}{table.nbytes:>14,}{table.ratio:>8.1f}{table.relative_error:>16.6f}")

# Or say what it may cost, and let vqrs choose.
table = vqrs.compress(x, ratio=10, random_state=0)
print(f"ratio 10: {table.kind}, {table.nbytes:,} bytes, relative error {table.relative_error:.6f}")
