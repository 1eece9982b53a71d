"""Equal input, parameters and seed (R17): the same bytes for any number of threads, every time."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import vqrs
from vqrs import _core

from . import Fault, Outcome

THREADS = [1, 8, 2, 4]
QUICK = {"max_iter": 4, "n_iter": 2, "n_rounds": 1, "n_refinements": 1, "n_searches": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "product": {"center": True, "rotation": "learned", "n_subvectors": 6, "n_bits": 5},
    "scalar": {"dtype": "int2", "center": True, "residual": {"kind": "kmeans", "parameters": {"n_clusters": 32}}},
    "trellis": {"n_bits": 2, "state_bits": 6, "bit_allocation": "variance"},
    "low-rank": {"n_components": 9, "dtype": "int4"},
}
"""Parameters in the place of defaults, so that what stands before and behind a kind takes part."""


def rows() -> np.ndarray:
    """Several chunks of rows like those of a trained table: clusters, falling variances, a mean, equal rows."""
    random = np.random.default_rng(17)
    centres = random.normal(size=(60, 24)) * 3
    x = centres[random.integers(0, 60, 5_000)] + random.normal(size=(5_000, 24)) * 0.97 ** np.arange(24) + 0.5
    x[1_000:1_100] = x[0]
    return x.astype(np.float32)


def digest(parts: Iterator[Any]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()


def of_a_kind(kind: str) -> Callable[[np.ndarray, int, Path], Iterator[Any]]:
    """Codes, the decoder, the file, and what is read from it."""

    def parts(x: np.ndarray, n_jobs: int, folder: Path) -> Iterator[Any]:
        known = next(entry["parameters"] for entry in _core.kinds() if entry["name"] == kind)
        small = {name: value for name, value in QUICK.items() if name in known} | {
            name: 5 for name in ("n_bits",) if name in known and kind in ("residual", "product-residual", "additive")
        }
        parameters = small | OTHERS.get(kind, {})
        codec, codes = _core.fit(kind, parameters, x, seed=5, n_jobs=n_jobs, sample_weight=weights(x))
        yield codes.tobytes()
        yield codec.description()
        yield from (tensor.tobytes() for tensor in codec.tensors().values())
        yield codec.relative_error
        yield codec.encode(x[::-1].copy(), n_jobs=n_jobs).tobytes()
        errors = _core.reconstruction_errors(x, codes, codec, weights(x), n_jobs)
        yield errors
        table = _core.Table.from_codec(codec, codes, errors=errors)
        path = folder / f"{kind}-{n_jobs}.safetensors"
        table.save(str(path), durable=False, n_jobs=n_jobs)
        yield path.read_bytes()
        yield table.lookup(np.arange(len(x)), n_jobs=n_jobs).tobytes()
        bags = np.arange(0, len(x), 7)
        yield table.pool(np.arange(len(x)), bags, None, "mean", n_jobs=n_jobs).tobytes()
        for metric in ("l2", "inner_product", "cosine"):
            yield from (found.tobytes() for found in table.search(x[:9], 10, metric, n_jobs))

    return parts


def weights(x: np.ndarray) -> np.ndarray:
    return 1 / np.arange(1, len(x) + 1)


def clusters(x: np.ndarray, n_jobs: int, folder: Path) -> Iterator[Any]:
    for options in (
        {},
        {"metric": "cosine"},
        {"batch_size": 500},
        {"init": "random", "n_init": 2},
        {"max_samples": 900},
    ):
        kmeans = vqrs.KMeans(40, max_iter=6, random_state=1, n_jobs=n_jobs, **options).fit(x)
        yield kmeans.cluster_centers_.tobytes()
        yield kmeans.labels_.tobytes()
        yield kmeans.inertia_
        yield kmeans.transform(x[:50]).tobytes()
        yield kmeans.partial_fit(x[:700]).cluster_centers_.tobytes()


def mixed(x: np.ndarray, n_jobs: int, folder: Path) -> Iterator[Any]:
    own = [vqrs.ScalarQuantizer("int2"), vqrs.ScalarQuantizer("int6"), vqrs.VectorQuantizer(32, max_iter=3)]
    quantizer = vqrs.MixedPrecisionQuantizer(own, n_bits=16.0, random_state=2, n_jobs=n_jobs)
    path = folder / f"mixed-{n_jobs}.safetensors"
    quantizer.fit(x, sample_weight=weights(x)).compress(x, path, sample_weight=weights(x), durable=False)
    yield path.read_bytes()


def chosen(x: np.ndarray, n_jobs: int, folder: Path) -> Iterator[Any]:
    """What ``compress`` chooses within a budget, streamed to a file."""
    path = folder / f"chosen-{n_jobs}.safetensors"
    vqrs.compress(x, ratio=6, effort="fast", path=path, random_state=3, n_jobs=n_jobs, durable=False)
    yield path.read_bytes()


def tuned(x: np.ndarray, n_jobs: int, folder: Path) -> Iterator[Any]:
    result = vqrs.tune(x[:2_000], ratio=[4, 8], method="product", effort="fast", random_state=4, n_jobs=n_jobs)
    yield [(trial.kind, trial.parameters, trial.nbytes, trial.error) for trial in result.curve]


def jobs() -> dict[str, Callable[[np.ndarray, int, Path], Iterator[Any]]]:
    found = {entry["name"]: of_a_kind(entry["name"]) for entry in _core.kinds()}
    return {**found, "KMeans": clusters, "mixed": mixed, "compress": chosen, "tune": tuned}


def same_bytes(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Each job in turn, in every number of threads, as often as ``count`` allows; at least twice in all."""
    outcome, x = Outcome(), rows()
    each = max(2, count // len(jobs()))
    for name, job in jobs().items():
        wanted = None
        for run in range(each):
            n_jobs = THREADS[run % len(THREADS)]
            found = digest(job(x, n_jobs, folder))
            wanted = wanted or found
            outcome.add(found == wanted, f"{name} with {n_jobs} threads, run {run}: other bytes than with {THREADS[0]}")
    outcome.note = f"{len(jobs())} jobs, {each} runs each, {min(each, len(THREADS))} numbers of threads"
    return outcome


FAULTS = [
    Fault(
        "R17",
        "the same seed with 1, 2, 4 and 8 threads, every kind, k-means, compress and tune, 20 runs of each",
        "the same bytes of codes, decoders, files, lookups, pools and searches",
        same_bytes,
        34,
        17 * 80,
        slow=True,
        needs=lambda: None if importlib.util.find_spec("sklearn") else "scikit-learn is not installed",
    ),
]
