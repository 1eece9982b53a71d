"""Wrote the golden tables beside this file, once: they must open for ever, so they are never made again.

Each ``NAME.safetensors`` has a ``NAME.npy`` beside it with the rows that it decodes to. A new form or version of the
file adds a line to TABLES; ``python tests/data/make_golden.py`` then writes what is missing and touches nothing else.
"""

import json
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


def hashed_places() -> tuple[dict, dict, np.ndarray]:
    """Every kind of place, a sign, a weight, a product, and pieces that overlap."""
    rng = np.random.default_rng(2)

    def piece(array: int, stride: int, offset: int, **place) -> dict:
        return {"array": array, "place": place, "stride": stride, "offset": offset}

    scale = piece(1, 1, 0, kind="digit", divisor=1, size=N_ROWS)
    terms = [
        {"start": 0, "width": 3, "piece": piece(0, 1, 2, kind="hash", seed=2**64 - 1, size=9), "sign": 2**63},
        {"start": 3, "width": 2, "piece": piece(0, 2, 0, kind="stored", field=1, size=7), "weight": scale},
        {"start": 1, "width": 4, "piece": piece(2, 4, 0, kind="digit", divisor=3, size=7), "multiply": True},
    ]
    description = {"form": "hashed", "dim": DIM, "bits": 3, "first": 5, "terms": terms}
    tensors = {f"arrays.{n}": rng.normal(size=s).astype(np.float32) for n, s in enumerate([14, N_ROWS, (7, 4)])}
    return description, tensors, rng.integers(0, 64, size=(N_ROWS, 1)).astype(np.uint8)


def hashed_types() -> tuple[dict, dict, np.ndarray]:
    """Arrays of all other types, one behind the other."""
    rng = np.random.default_rng(3)
    halves, brain = rng.normal(size=N_ROWS), rng.normal(size=N_ROWS).astype(np.float32).view(np.uint32) >> 16
    integers = rng.integers(-128, 128, size=N_ROWS)
    arrays = [halves.astype(np.float16), brain.astype(np.uint16), integers.astype(np.int8), integers.astype(np.uint8)]
    place = {"kind": "digit", "divisor": 1, "size": N_ROWS}
    pieces = [{"array": n, "place": place, "stride": 1, "offset": 0} for n in (0, 1, 2, 3, 3)]
    terms = [{"start": column, "width": 1, "piece": piece} for column, piece in enumerate(pieces)]
    description = {"form": "hashed", "dim": DIM, "bits": 0, "first": 0, "terms": terms}
    return description, {f"arrays.{n}": a for n, a in enumerate(arrays)}, np.empty((N_ROWS, 0), np.uint8)


def switch_cases() -> tuple[dict, dict, np.ndarray]:
    """A list, rows from a start on, what is left over, and a shared array."""
    rng = np.random.default_rng(1)
    levels = {"form": "levels", "dim": DIM, "dtype": "int8", "granularity": "row", "block_size": 64,
              "symmetric": True, "scale_factor": 1.0, "offset_factor": 1.0}  # fmt: skip
    piece = {"array": 0, "place": {"kind": "hash", "seed": 7, "size": 3}, "stride": DIM, "offset": 0}
    terms = [{"start": 0, "width": DIM, "piece": piece}]
    hashed = {"form": "hashed", "dim": DIM, "bits": 0, "first": 4, "terms": terms}
    cases = [{"bits": 5, "rows": 3, "decoder": levels}, {"start": 4, "rows": 6, "decoder": hashed}]
    shared = {"otherwise.arrays.0": "cases.1.decoder.arrays.0"}
    description = {"form": "switch", "dim": DIM, "cases": cases, "otherwise": hashed, "shared": shared}
    tensors = {
        "cases.0.ids": reference.pack_bits(np.array([[3, 7, 19]]), 5)[0],
        "cases.0.codes": np.hstack(
            [rng.integers(0, 256, (3, DIM)).astype(np.uint8), np.full((3, 1), 0.0078125, np.float16).view(np.uint8)]
        ),
        "cases.1.decoder.arrays.0": rng.normal(size=(3, DIM)).astype(np.float32),
    }
    return description, tensors, np.empty((N_ROWS, 0), np.uint8)


def segments_map() -> tuple[dict, dict, np.ndarray]:
    """Three groups of rows of different lengths, in any order."""
    rng = np.random.default_rng(4)
    levels = {"form": "levels", "dim": DIM, "granularity": "row", "block_size": 64, "symmetric": True,
              "scale_factor": 1.0, "offset_factor": 1.0}  # fmt: skip
    books = {"form": "books", "dim": DIM, "bits": 3, "scale": 0.5, "dtype": "float16",
             "groups": [{"width": DIM, "entries": 8, "starts": [0, 0]}]}  # fmt: skip
    decoders = [levels | {"dtype": "float16"}, levels | {"dtype": "int8"}, books]
    group_of = rng.permutation([0] * 4 + [1] * 9 + [2] * 7)
    groups = [{"rows": int((group_of == at).sum()), "decoder": decoder} for at, decoder in enumerate(decoders)]
    parts = [
        rng.normal(size=(4, DIM)).astype(np.float16).view(np.uint8),
        np.hstack([rng.integers(0, 256, (9, DIM)).astype(np.uint8), np.full((9, 1), 0.02, np.float16).view(np.uint8)]),
        rng.integers(0, 64, (7, 1)).astype(np.uint8),
    ]
    codes = np.concatenate([part.reshape(-1) for part in parts])
    codes = np.pad(codes, (0, -len(codes) % N_ROWS)).reshape(N_ROWS, -1)
    tensors = {"groups.2.codebooks.0": rng.normal(size=(2, 8, DIM)).astype(np.float16)}
    tensors["map"] = reference.pack_bits(group_of[None], 2)[0]
    return {"form": "segments", "dim": DIM, "map": True, "groups": groups}, tensors, codes


PARTS = {
    "hashed-places-v1": hashed_places,
    "hashed-types-v1": hashed_types,
    "segments-map-v1": segments_map,
    "switch-cases-v1": switch_cases,
}


ABOUT = {"names": [f"row {i}" for i in range(N_ROWS)], "metadata": {"made by": "make_golden.py"}}


def write(name: str, kind: str, parameters: dict) -> None:
    """Writes a golden table and its rows, unless they exist."""
    path = HERE / f"{name}.safetensors"
    if path.exists():
        return
    x = np.random.default_rng(0).normal(size=(N_ROWS, DIM)).astype(np.float32)
    codec, codes = _core.fit(kind, parameters, x)
    errors = {"relative": codec.relative_error}
    save(_core.Table.from_codec(codec, codes, errors=errors, **ABOUT), path)
    np.save(path.with_suffix(".npy"), reference.decode(codec.description(), codec.tensors(), codes))


def write_parts(name: str, description: dict, tensors: dict, codes: np.ndarray) -> None:
    """Writes a golden table of a form that no quantizer makes, and its rows, unless they exist."""
    path = HERE / f"{name}.safetensors"
    if path.exists():
        return
    about = json.dumps({"kind": "made up", "parameters": {}, "decoder": description})
    save(_core.Table.from_parts(about, tensors, codes, errors={"relative": 0.0}, **ABOUT), path)
    np.save(path.with_suffix(".npy"), reference.decode(description, tensors, codes))


def save(table: _core.Table, path: Path) -> None:
    table.save(str(path))
    print(path.name)


if __name__ == "__main__":
    for name, (kind, parameters) in TABLES.items():
        write(name, kind, parameters)
    for name, make in PARTS.items():
        write_parts(name, *make())
