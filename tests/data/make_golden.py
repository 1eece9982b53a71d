"""Wrote the golden tables beside this file, once: they must open for ever, so they are never made again.

Each ``NAME.safetensors`` has a ``NAME.npy`` beside it with the rows that it decodes to. A new form or version of the
file adds a line to TABLES; ``python tests/data/make_golden.py`` then writes what is missing and touches nothing else.
"""

from pathlib import Path

import numpy as np

from vqrs import _core, reference

HERE = Path(__file__).parent

TABLES = {
    "books-two-widths-float16-v1": ("product", {"n_subvectors": 2, "n_bits": 3}),
    "books-overlapping-bfloat16-v1": ("residual", {"n_stages": 3, "n_bits": 2, "codebook_dtype": "bfloat16"}),
    "books-single-float32-v1": ("kmeans", {"n_clusters": 5, "codebook_dtype": "float32"}),
    "books-two-widths-int8-v1": ("product", {"n_subvectors": 2, "n_bits": 3, "codebook_dtype": "int8"}),
    "levels-row-int4-v1": ("scalar", {"dtype": "int4"}),
    "levels-block-int2-symmetric-v1": (
        "scalar",
        {"dtype": "int2", "granularity": "block", "block_size": 2, "symmetric": True},
    ),
    "levels-column-int8-v1": ("scalar", {"dtype": "int8", "granularity": "column"}),
    "levels-float16-v1": ("scalar", {"dtype": "float16"}),
    "levels-bfloat16-v1": ("scalar", {"dtype": "bfloat16"}),
    "levels-row-int6-v1": ("scalar", {"dtype": "int6"}),
    "levels-float8-v1": ("scalar", {"dtype": "float8"}),
    "levels-block-nf4-byte-scales-v1": (
        "scalar",
        {"dtype": "nf4", "granularity": "block", "block_size": 2, "scale_dtype": "float8"},
    ),
    "levels-free4-v1": ("scalar", {"dtype": "free4"}),
    "levels-table3-v1": ("rotated", {"n_bits": 3, "center": False, "rotation": None}),
    "linear-hadamard-table2-v1": ("rotated", {"n_bits": 2}),
    "linear-matrix-int8-v1": ("low-rank", {"n_components": 3, "rotation_dtype": "int8"}),
    "sparse-columns-float16-v1": ("sparse", {"density": 0.2}),
    "sparse-bitmap-int8-v1": ("sparse", {"density": 0.6, "dtype": "int8"}),
    "join-sum-v1": ("scalar", {"dtype": "int2", "residual": {"kind": "scalar", "parameters": {"dtype": "int4"}}}),
    "trellis-even-v1": ("trellis", {"n_bits": 3.5, "scale_bits": 2, "center": False, "rotation": None}),
    "trellis-variance-v1": (
        "trellis",
        {"n_bits": 1.6, "bit_allocation": "variance", "center": False, "rotation": None},
    ),
}
N_ROWS, DIM = 20, 5


def write(name: str, kind: str, parameters: dict) -> None:
    """Writes a golden table and its rows, unless they exist."""
    path = HERE / f"{name}.safetensors"
    if path.exists():
        return
    x = np.random.default_rng(0).normal(size=(N_ROWS, DIM)).astype(np.float32)
    codec, codes = _core.fit(kind, parameters, x)
    names = [f"row {i}" for i in range(N_ROWS)]
    errors = {"relative": codec.relative_error}
    table = _core.Table.from_codec(codec, codes, errors=errors, names=names, metadata={"made by": "make_golden.py"})
    table.save(str(path))
    np.save(path.with_suffix(".npy"), reference.decode(codec.description(), codec.tensors(), codes))
    print(path.name)


if __name__ == "__main__":
    for name, (kind, parameters) in TABLES.items():
        write(name, kind, parameters)
