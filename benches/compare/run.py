"""Runs a plan: pairs of ours and a peer's, interleaved, every measurement one JSON line with the error beside it."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vqrs

from .methods import Method
from .methods.faiss_kinds import Product, Residual, Scalar
from .methods.vqrs_kinds import Vqrs
from .surroundings import surroundings

# label, ours, theirs, what differs beyond the names
Pair = tuple[str, Method, Method, str]


def error_plan() -> list[Pair]:
    """Ours beside Faiss's with the same settings."""
    residual = {"n_stages": 16, "n_bits": 8, "beam_width": 8}
    return (
        [
            (
                f"product {parts} x 8 bits",
                Vqrs("ProductQuantizer", n_subvectors=parts, n_bits=8, max_iter=25, random_state=0),
                Product(parts, 8),
                "25 iterations on all rows",
            )
            for parts in (48, 96)
        ]
        + [
            (
                "residual 16 x 8 bits",
                Vqrs("ResidualQuantizer", **residual, random_state=0),
                Residual(**residual),
                "beam 8 in both, else the defaults: ours refines its codebooks jointly, Faiss's does not",
            )
        ]
        + [
            (
                f"{dtype} by {granularity}",
                Vqrs("ScalarQuantizer", dtype=dtype, granularity=granularity, **clip),
                peer,
                note,
            )
            for dtype, peer in (("int8", Scalar("8bit")), ("int4", Scalar("4bit")))
            for granularity, clip, note in (
                ("column", {"clip": "minmax"}, "extremes of each column in both"),
                ("column", {}, "our default range beside extremes"),
                ("row", {}, "our default, by row, beside extremes of columns"),
            )
        ]
        + [("float16", Vqrs("ScalarQuantizer", dtype="float16"), Scalar("fp16"), "a cast in both")]
    )


def relative_error(x: NDArray[np.float32], decoded: NDArray[np.float32]) -> float:
    """Squared error over squared norm, added in float64."""
    difference = (x - decoded).astype(np.float64)
    return float(np.vdot(difference, difference) / np.vdot(x.astype(np.float64), x))


def measure(method: Method, x: NDArray[np.float32]) -> dict[str, Any]:
    """Fits, encodes and decodes once; seconds of each, and those of all cores together, which other work on the machine
    changes less.
    """
    times = [_now()]
    method.fit(x)
    times.append(_now())
    codes = method.encode(x)
    times.append(_now())
    decoded = method.decode(codes)
    times.append(_now())
    (fit_s, fit_cpu_s), (encode_s, encode_cpu_s), (decode_s, decode_cpu_s) = np.diff(times, axis=0).tolist()
    return {
        "library": method.library,
        "settings": method.settings,
        "nbytes": method.nbytes(len(x)),
        "relative_error": relative_error(x, decoded),
        "fit_s": fit_s,
        "encode_s": encode_s,
        "decode_s": decode_s,
        "fit_cpu_s": fit_cpu_s,
        "encode_cpu_s": encode_cpu_s,
        "decode_cpu_s": decode_cpu_s,
    }


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run_errors(dataset: str, x: NDArray[np.float32], threads: int, repeat: int) -> Iterator[dict[str, Any]]:
    """One record a pair and repeat: ours, then theirs."""
    common = {**surroundings(threads), "dataset": dataset, "n_rows": len(x), "n_features": x.shape[1]}
    for label, ours, theirs, note in error_plan():
        for turn in range(repeat):
            record = {**common, "pair": label, "note": note, "repeat": turn}
            yield {**record, "ours": measure(ours, x), "theirs": measure(theirs, x)}


def run_kmeans(
    dataset: str, x: NDArray[np.float32], threads: int, n_clusters: int = 256, max_iter: int = 25
) -> Iterator[dict[str, Any]]:
    """Inertia from the same initial centres and iterations, and labels of the same centres."""
    from sklearn.cluster import KMeans

    start = x[np.random.default_rng(0).choice(len(x), n_clusters, replace=False)]
    settings: dict[str, Any] = {"n_clusters": n_clusters, "init": start, "n_init": 1, "max_iter": max_iter, "tol": 0}
    begin = time.perf_counter()
    ours = vqrs.KMeans(**settings, random_state=0).fit(x)
    middle = time.perf_counter()
    theirs = KMeans(**settings, random_state=0).fit(x)
    end = time.perf_counter()
    # Labels of equal centres: sklearn's in float32 and, since its float32 distances are rounded, in float64 as well.
    exact = KMeans(**{**settings, "init": theirs.cluster_centers_.astype(np.float64), "max_iter": 1})
    exact = exact.fit(x.astype(np.float64))
    exact.cluster_centers_ = theirs.cluster_centers_.astype(np.float64)
    ours.cluster_centers_ = theirs.cluster_centers_
    labels = ours.predict(x)
    yield {
        **surroundings(threads),
        "dataset": dataset,
        "n_rows": len(x),
        "n_features": x.shape[1],
        "n_clusters": n_clusters,
        "max_iter": max_iter,
        "ours": {"inertia": float(ours.inertia_), "fit_s": middle - begin, "n_iter": int(ours.n_iter_)},
        "theirs": {"inertia": float(theirs.inertia_), "fit_s": end - middle, "n_iter": int(theirs.n_iter_)},
        "labels_differ": int((labels != theirs.predict(x)).sum()),
        "labels_differ_float64": int((labels != exact.predict(x.astype(np.float64))).sum()),
        "sklearn_float32_differs_from_float64": int((theirs.predict(x) != exact.predict(x.astype(np.float64))).sum()),
    }
