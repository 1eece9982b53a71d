"""Small, fast embedding tables.

>>> import numpy as np, vqrs
>>> x = np.random.default_rng(0).standard_normal((5000, 32)).astype(np.float32)
>>> table = vqrs.compress(x, ratio=8, random_state=0)
>>> table[[3, 1, 4]].shape
(3, 32)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vqrs._compress import compress, estimate
from vqrs._core import (
    InternalError,
    TableCorruptError,
    TableError,
    TableVersionError,
    __version__,
    hardware,
    kinds,
)
from vqrs._tune import TuneResult, TuneTrial, tune
from vqrs.table import Table, open

if TYPE_CHECKING:
    from vqrs.cluster import KMeans
    from vqrs.mixed import MixedPrecisionQuantizer
    from vqrs.quantizers import (
        AdditiveQuantizer,
        DeduplicatingQuantizer,
        LowRankQuantizer,
        OptimizedProductQuantizer,
        ProductQuantizer,
        ProductResidualQuantizer,
        ResidualQuantizer,
        RotatedQuantizer,
        ScalarQuantizer,
        SparseQuantizer,
        TreeQuantizer,
        TrellisQuantizer,
        VectorQuantizer,
    )

_LAZY = {
    "AdditiveQuantizer": "quantizers",
    "DeduplicatingQuantizer": "quantizers",
    "KMeans": "cluster",
    "LowRankQuantizer": "quantizers",
    "MixedPrecisionQuantizer": "mixed",
    "OptimizedProductQuantizer": "quantizers",
    "ProductQuantizer": "quantizers",
    "ProductResidualQuantizer": "quantizers",
    "ResidualQuantizer": "quantizers",
    "RotatedQuantizer": "quantizers",
    "ScalarQuantizer": "quantizers",
    "SparseQuantizer": "quantizers",
    "TrellisQuantizer": "quantizers",
    "TreeQuantizer": "quantizers",
    "VectorQuantizer": "quantizers",
}
"""Names whose modules need scikit-learn: imported when they are first used, so that the rest needs numpy alone."""

__all__ = [
    "AdditiveQuantizer",
    "DeduplicatingQuantizer",
    "InternalError",
    "KMeans",
    "LowRankQuantizer",
    "MixedPrecisionQuantizer",
    "OptimizedProductQuantizer",
    "ProductQuantizer",
    "ProductResidualQuantizer",
    "ResidualQuantizer",
    "RotatedQuantizer",
    "ScalarQuantizer",
    "SparseQuantizer",
    "Table",
    "TableCorruptError",
    "TableError",
    "TableVersionError",
    "TreeQuantizer",
    "TrellisQuantizer",
    "TuneResult",
    "TuneTrial",
    "VectorQuantizer",
    "__version__",
    "compress",
    "estimate",
    "hardware",
    "kinds",
    "open",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
