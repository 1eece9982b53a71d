"""Serve one mapped table from several processes, which share its pages: ``python examples/02_serve_mapped.py``."""

import multiprocessing
import tempfile
from pathlib import Path

import numpy as np

import vqrs


def pool_bags(path: str, seed: int) -> float:
    """A worker: opens the table (no copy) and averages 1,000 bags of ten rows."""
    with vqrs.open(path) as table:
        ids = np.random.default_rng(seed).integers(0, len(table), 10_000)
        means = table.pool(ids, np.arange(0, len(ids), 10), mode="mean")
        return float(np.abs(means).mean())


def main() -> None:
    """Writes a table, then lets two workers use it."""
    x = np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.safetensors")
        vqrs.compress(x, method="scalar", dtype="int8", path=path)
        with multiprocessing.get_context("spawn").Pool(2) as workers:
            answers = workers.starmap(pool_bags, [(path, 1), (path, 2)])
        print(f"mean of the absolute values of the bags, in each process: {answers[0]:.4f}, {answers[1]:.4f}")


if __name__ == "__main__":
    main()
