"""k-means: whole fits from the same centres, and one assignment; vqrs beside Faiss and scikit-learn."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vqrs

from .measure import Clock, Contender, Demand, Job, expect, optional

faiss = optional("faiss")
cluster = optional("sklearn.cluster")

Rows = NDArray[np.float32]
Fitted = tuple[Rows, int]

ITERATIONS = 25

SHAPES = {
    # rows, clusters, columns: least and aim against Faiss with its best BLAS, then against scikit-learn
    (100_000, 256, 64): ((1.4, 1.7), (3.0, 6.0)),
    (200_000, 1_024, 128): ((1.4, 1.8), (3.0, 6.0)),
    (1_000_000, 256, 16): ((2.2, 2.8), (3.0, 6.0)),
    (30_000, 4_096, 384): ((1.0, 1.7), (3.0, 6.0)),
    (200_000, 256, 4): ((5.0, 6.0), (8.0, None)),
    (200_000, 256, 8): ((2.5, 3.5), (8.0, None)),
}

# -- contenders -----------------------------------------------------------------------------------------------------


class Fit(Contender):
    """A batch is the first centres; the answer is the last ones, and how many iterations it took."""

    def __init__(self, x: Rows, iterations: int = ITERATIONS) -> None:
        self.x, self.iterations = x, iterations

    def settings(self, centers: Rows) -> dict[str, Any]:
        """What vqrs and scikit-learn have in common."""
        return {"n_clusters": len(centers), "init": centers, "n_init": 1, "max_iter": self.iterations, "tol": 0.0}


class VqrsFit(Fit):
    group, name = "vqrs", "vqrs KMeans.fit"

    def run(self, batches: Sequence[Rows]) -> Fitted:
        for centers in batches:
            answer = vqrs.KMeans(**self.settings(centers)).fit(self.x)
        return answer.cluster_centers_, answer.n_iter_


class VqrsMiniBatch(Fit):
    group, name = "vqrs", "vqrs KMeans(batch_size=1024).fit"

    def run(self, batches: Sequence[Rows]) -> Fitted:
        for centers in batches:
            answer = vqrs.KMeans(batch_size=1_024, random_state=0, **self.settings(centers)).fit(self.x)
        return answer.cluster_centers_, answer.n_iter_


class SklearnFit(Fit):
    group, name = "scikit-learn", "scikit-learn KMeans.fit"

    def run(self, batches: Sequence[Rows]) -> Fitted:
        for centers in batches:
            answer = cluster.KMeans(**self.settings(centers)).fit(self.x)
        return answer.cluster_centers_, answer.n_iter_


class SklearnMiniBatch(Fit):
    group, name = "scikit-learn", "scikit-learn MiniBatchKMeans.fit"

    def run(self, batches: Sequence[Rows]) -> Fitted:
        for centers in batches:
            settings = self.settings(centers) | {"max_no_improvement": None, "reassignment_ratio": 0.0}
            answer = cluster.MiniBatchKMeans(batch_size=1_024, random_state=0, **settings).fit(self.x)
        return answer.cluster_centers_, answer.n_iter_


class FaissFit(Fit):
    """All rows, no look for NaN, no objective printed."""

    def __init__(self, x: Rows) -> None:
        super().__init__(x)
        known = "OPENBLAS_CORETYPE" in os.environ
        self.group = "Faiss" if known else "Faiss as installed"
        self.name = f"{self.group} Kmeans.train"

    def run(self, batches: Sequence[Rows]) -> Fitted:
        for centers in batches:
            settings = {"min_points_per_centroid": 1, "max_points_per_centroid": len(self.x)}
            answer = faiss.Kmeans(self.x.shape[1], len(centers), niter=self.iterations, **settings)
            answer.cp.check_input_data_for_NaNs = False
            answer.train(self.x, init_centroids=centers)
        return answer.centroids, len(answer.iteration_stats)


class Assignment(Contender):
    """A batch is the rows; the answer is a label for each."""

    def __init__(self, centers: Rows) -> None:
        self.centers = centers


class VqrsPredict(Assignment):
    group, name = "vqrs", "vqrs KMeans.predict"

    def __init__(self, centers: Rows) -> None:
        super().__init__(centers)
        self.model = vqrs.KMeans(len(centers), init=centers, n_init=1, max_iter=1).fit(centers)
        self.model.cluster_centers_ = centers

    def run(self, batches: Sequence[Rows]) -> NDArray[np.int32]:
        for x in batches:
            answer = self.model.predict(x)
        return answer


class SklearnPredict(Assignment):
    group, name = "scikit-learn", "scikit-learn KMeans.predict"

    def __init__(self, centers: Rows) -> None:
        super().__init__(centers)
        self.model = cluster.KMeans(len(centers), init=centers, n_init=1, max_iter=1).fit(centers)
        self.model.cluster_centers_ = centers

    def run(self, batches: Sequence[Rows]) -> NDArray[np.int32]:
        for x in batches:
            answer = self.model.predict(x)
        return answer


class FaissSearch(Assignment):
    group, name = "Faiss", "Faiss IndexFlatL2.search"

    def __init__(self, centers: Rows) -> None:
        super().__init__(centers)
        self.index = faiss.IndexFlatL2(centers.shape[1])
        self.index.add(centers)

    def run(self, batches: Sequence[Rows]) -> NDArray[np.int64]:
        for x in batches:
            answer = self.index.search(x, 1)[1]
        return answer.reshape(-1)


@cache
def yardstick() -> Path | None:
    """A program of the Rust core that prints what this processor can do; None where it cannot be built."""
    root = Path(__file__).resolve().parents[3]
    build = ["cargo", "build", "-q", "--release", "-p", "vqrs-core", "--example", "yardstick"]
    try:
        subprocess.run(build, cwd=root, check=True)
    except (OSError, subprocess.CalledProcessError):
        print("skipped: the share of the peak needs the Rust yardstick, which cannot be built", file=sys.stderr)
        return None
    return Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "release" / "examples" / "yardstick"


class Peak(Contender):
    """The seconds that the same operations take where the processor does nothing but multiply and add."""

    group, name = "peak", "fused multiply-adds in registers"
    line = 0

    def __init__(self, program: Path, shape: tuple[int, int, int], threads: int) -> None:
        rows, clusters, dim = shape
        self.command, self.operations = [str(program), *map(str, (threads, clusters, dim))], 2.0 * rows * clusters * dim

    def run(self, batches: Sequence[Any]) -> float:
        """Operations in a second, as the program measured them."""
        printed = subprocess.run(self.command, capture_output=True, text=True, check=True).stdout
        return float(printed.split()[self.line])

    def timed(self, batches: Sequence[Any], clock: Clock) -> tuple[float, float]:
        rate = self.run(batches)
        return len(batches) * self.operations / rate, rate


class CoreNearest(Peak):
    """The part of a fit that gives labels, without Python and without the second look that ``predict`` takes."""

    group, name, line = "vqrs", "vqrs Centroids::nearest (Rust)", 1


# -- data -----------------------------------------------------------------------------------------------------------


def embeddings(rows: int, dim: int) -> Rows:
    """Normal rows: without clusters, like embeddings, so that k-means does not converge early."""
    return np.random.default_rng(3).standard_normal((rows, dim), dtype=np.float32)


def nearest(x: Rows, centers: Rows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels and squared distances, by numpy."""
    scores = np.square(centers.astype(np.float64)).sum(axis=1) - 2 * x.astype(np.float64) @ centers.T.astype(np.float64)
    labels = scores.argmin(axis=1)
    return labels, np.square(x - centers[labels], dtype=np.float64).sum(axis=1)


# -- plan -----------------------------------------------------------------------------------------------------------


def shrunk(shape: tuple[int, int, int], shrink: int) -> tuple[int, int, int]:
    """A smaller problem of the same kind."""
    return shape[0] // shrink, shape[1] // min(shrink, 4), shape[2]


def fit_jobs(shapes: Sequence[tuple[int, int, int]], shrink: int) -> Iterator[Job]:
    """Whole fits. Where nothing is set for OpenBLAS, this is Faiss as pip installs it, and scikit-learn."""
    best = "OPENBLAS_CORETYPE" in os.environ
    for shape in shapes:
        (least, aim), (least_sklearn, aim_sklearn) = SHAPES[shape]
        rows, clusters, dim = shrunk(shape, shrink)
        x = embeddings(rows, dim)
        peers: list[Contender] = [FaissFit(x)] if faiss else []
        peers += [SklearnFit(x)] if cluster and not best else []
        installed = [Demand("Faiss as installed", 3.0, 6.0), Demand("scikit-learn", least_sklearn, aim_sklearn)]
        yield Job(
            case=f"{rows:,} x {dim}, k={clusters:,}",
            ours=VqrsFit(x),
            peers=peers,
            draw=lambda rng, x=x, k=clusters: x[rng.choice(len(x), k, replace=False)],
            check=inertia_check(x, 1.005),
            unit="fit",
            fresh=False,
            demands=[Demand("Faiss", least, aim)] if best else installed,
        )


def inertia_check(x: Rows, slack: float) -> Any:
    """Compares the inertia, on rows spread over all, with ours of the same first centres."""
    some = x[:: max(1, len(x) // 10_000)]
    ours: dict[bytes, float] = {}

    def check(contender: Contender, centers: Rows, answer: Fitted) -> dict[str, float]:
        inertia = float(nearest(some, answer[0])[1].mean())
        reference = ours.setdefault(centers.tobytes(), inertia)
        expect(max(inertia, reference) < slack * min(inertia, reference), contender, f"{inertia} beside {reference}")
        return {"inertia": inertia, "iterations": answer[1]}

    return check


def kmeans(shrink: int) -> Iterator[Job]:
    """KMeans.fit, 25 iterations."""
    yield from fit_jobs(list(SHAPES)[:4], shrink)


def kmeans_narrow(shrink: int) -> Iterator[Job]:
    """KMeans.fit at d = 4 and 8."""
    yield from fit_jobs(list(SHAPES)[4:], shrink)


def mini_batch(shrink: int) -> Iterator[Job]:
    """mini-batch k-means."""
    rows, clusters, dim = 200_000 // shrink, 256, 64
    x = embeddings(rows, dim)
    yield Job(
        case=f"{rows:,} x {dim}, k={clusters}, batches of 1,024, 4 times over",
        ours=VqrsMiniBatch(x, 4),
        peers=[SklearnMiniBatch(x, 4)] if cluster else [],
        draw=lambda rng: x[rng.choice(rows, clusters, replace=False)],
        check=inertia_check(x, 1.05),
        unit="fit",
        fresh=False,
    )


def assignment(shrink: int) -> Iterator[Job]:
    """k-means assignment."""
    program, threads = yardstick(), int(os.environ["VQRS_NUM_THREADS"])
    for shape in list(SHAPES)[:4] if program else ():
        rows, clusters, dim = shrunk(shape, shrink)
        yield Job(
            case=f"{rows:,} x {dim}, k={clusters:,}",
            ours=CoreNearest(program, (rows, clusters, dim), threads),
            peers=[Peak(program, (rows, clusters, dim), threads)],
            draw=lambda rng: None,
            check=lambda contender, batch, answer: {},
            unit="call",
            operations=2.0 * rows * clusters * dim,
            fresh=False,
            demands=[Demand("peak", 0.8, 0.9)],
        )


def predict(shrink: int) -> Iterator[Job]:
    """KMeans.predict, whose labels are exact."""
    program, threads = yardstick(), int(os.environ["VQRS_NUM_THREADS"])
    for shape in list(SHAPES)[:4]:
        rows, clusters, dim = shrunk(shape, shrink)
        x = embeddings(rows, dim)
        centers = x[np.random.default_rng(4).choice(rows, clusters, replace=False)]
        some = slice(None, None, max(1, rows // 2_000))
        peers: list[Contender] = [Peak(program, (rows, clusters, dim), threads)] if program else []
        peers += [FaissSearch(centers)] if faiss else []
        peers += [SklearnPredict(centers)] if cluster else []

        def check(contender: Contender, x: Rows, answer: Any, centers: Rows = centers, some: slice = some) -> Any:
            if contender.group == "peak":
                return {}
            best = nearest(x[some], centers)[1]
            chosen = np.square(x[some] - centers[answer[some]], dtype=np.float64).sum(axis=1)
            far = float(np.abs(chosen - best).max() / best.max())
            expect(far < 1e-5, contender, f"a centre that is {far:.2g} further away")
            return {"further_than_nearest": far}

        yield Job(
            case=f"{rows:,} x {dim}, k={clusters:,}",
            ours=VqrsPredict(centers),
            peers=peers,
            draw=lambda rng, x=x: x,
            check=check,
            unit="call",
            operations=2.0 * rows * clusters * dim,
            fresh=False,
        )
