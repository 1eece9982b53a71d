"""Learning and encoding: vqrs beside Faiss and nanopq."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vqrs

from .clustering import ITERATIONS, embeddings
from .lookups import add_entries
from .measure import Contender, Demand, Job, expect, optional

faiss = optional("faiss")
nanopq = optional("nanopq")

Rows = NDArray[np.float32]
Codes = NDArray[np.uint8]

# -- contenders -----------------------------------------------------------------------------------------------------


class VqrsProduct(Contender):
    """A batch is the rows to learn from; the answer is the books, (parts, entries, width)."""

    group, name = "vqrs", "vqrs ProductQuantizer.fit"

    def __init__(self, parts: int) -> None:
        self.settings = {"n_subvectors": parts, "max_iter": ITERATIONS, "tol": 0.0, "random_state": 0}

    def run(self, batches: Sequence[Rows]) -> Rows:
        for x in batches:
            answer = vqrs.ProductQuantizer(**self.settings).fit(x)
        return np.stack(answer.codebooks_)


class FaissProduct(Contender):
    """A bare ProductQuantizer: no polysemous training, which only an index does; all rows."""

    group, name = "Faiss", "Faiss ProductQuantizer.train"

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def run(self, batches: Sequence[Rows]) -> Rows:
        for x in batches:
            answer = faiss.ProductQuantizer(x.shape[1], self.parts, 8)
            answer.cp.niter = ITERATIONS
            answer.cp.min_points_per_centroid, answer.cp.max_points_per_centroid = 1, len(x)
            answer.cp.check_input_data_for_NaNs = False
            answer.train(x)
        return faiss.vector_to_array(answer.centroids).reshape(self.parts, 256, -1)


class NanopqProduct(Contender):
    group, name = "nanopq", "nanopq PQ.fit"

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def run(self, batches: Sequence[Rows]) -> Rows:
        for x in batches:
            answer = nanopq.PQ(self.parts, Ks=256, verbose=False).fit(x, iter=ITERATIONS)
        return answer.codewords


class Encode(Contender):
    """A batch is rows; the answer is their codes. All have the books that vqrs learned."""

    def __init__(self, coder: Any) -> None:
        self.coder = coder


class VqrsEncode(Encode):
    group, name = "vqrs", "vqrs transform"

    def run(self, batches: Sequence[Rows]) -> Codes:
        for x in batches:
            answer = self.coder.transform(x)
        return answer


class FaissEncode(Encode):
    group, name = "Faiss", "Faiss compute_codes"

    def run(self, batches: Sequence[Rows]) -> Codes:
        for x in batches:
            answer = self.coder.compute_codes(x)
        return answer


class FaissEncodeByTables(FaissEncode):
    name = "Faiss compute_codes, use_beam_LUT"


class NanopqEncode(Encode):
    group, name = "nanopq", "nanopq encode"

    def run(self, batches: Sequence[Rows]) -> Codes:
        for x in batches:
            answer = self.coder.encode(x)
        return answer


def faiss_product(books: Rows) -> Any:
    """Faiss's quantizer with given books."""
    parts, _, width = books.shape
    quantizer = faiss.ProductQuantizer(parts * width, parts, 8)
    faiss.copy_array_to_vector(books.reshape(-1), quantizer.centroids)
    return quantizer


def faiss_residual(books: Rows, beam: int, tables: bool) -> Any:
    """Faiss's quantizer with given books, in one of its two modes."""
    stages, _, dim = books.shape
    quantizer = faiss.ResidualQuantizer(dim, stages, 8)
    faiss.copy_array_to_vector(books.reshape(-1), quantizer.codebooks)
    quantizer.is_trained, quantizer.max_beam_size, quantizer.use_beam_LUT = True, beam, int(tables)
    quantizer.compute_codebook_tables()
    return quantizer


def nanopq_product(books: Rows) -> Any:
    """nanopq's quantizer with given books."""
    quantizer = nanopq.PQ(len(books), Ks=256, verbose=False)
    quantizer.Ds, quantizer.codewords = books.shape[2], books
    return quantizer


# -- plan -----------------------------------------------------------------------------------------------------------

WIDTHS = {
    # rows, columns, parts: least for fit and for encode
    (65_536, 64, 16): (4.0, 6.0),
    (65_536, 64, 8): (4.0, 5.0),
    (65_536, 128, 8): (4.0, 12.0),
}


def relative_error(x: Rows, books: Rows, codes: Codes, side_by_side: bool = True) -> float:
    """Squared error over squared norm, decoded by numpy."""
    difference = x - add_entries(list(books), codes, side_by_side)
    return float(np.square(difference, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())


def product_fit(shrink: int) -> Iterator[Job]:
    """ProductQuantizer.fit."""
    for (rows, dim, parts), (least, _) in WIDTHS.items():
        rows //= shrink
        x = embeddings(rows, dim)
        some = x[:: rows // 4_096]
        errors: list[float] = []

        def check(contender: Contender, x: Rows, answer: Rows, some: Rows = some, errors: list = errors) -> Any:
            coder = vqrs.ProductQuantizer(len(answer), codebook_dtype="float32", max_iter=1).fit(some)
            coder = with_books(coder, answer)
            errors.append(relative_error(some, answer, coder.transform(some)))
            expect(max(errors) < 1.02 * min(errors), contender, f"errors {errors}")
            return {"relative_error": errors[-1]}

        yield Job(
            case=f"{rows:,} x {dim}, M={parts}, width {dim // parts}",
            ours=VqrsProduct(parts),
            peers=[FaissProduct(parts)] if faiss else [],
            draw=lambda rng, x=x: x,
            check=check,
            unit="fit",
            fresh=False,
            demands=[Demand("Faiss", least)],
        )


def with_books(quantizer: Any, books: Rows) -> Any:
    """A fitted quantizer with other books."""
    table = quantizer.compress(np.zeros((1, quantizer.n_features_in_), np.float32))
    quantizer._set_codec(table._core.with_tensors({"codebooks.0": np.ascontiguousarray(books)}).codec())
    return quantizer


def product_encode(shrink: int) -> Iterator[Job]:
    """ProductQuantizer encode."""
    for (rows, dim, parts), (_, least) in WIDTHS.items():
        rows //= shrink
        x = embeddings(rows, dim)
        settings = {"max_iter": 4, "codebook_dtype": "float32", "random_state": 0}
        ours = vqrs.ProductQuantizer(parts, **settings).fit(x[:8_192])
        books = np.stack(ours.codebooks_)
        peers: list[Contender] = [FaissEncode(faiss_product(books))] if faiss else []
        peers += [NanopqEncode(nanopq_product(books))] if nanopq and parts == 8 and dim == 64 else []
        yield Job(
            case=f"{rows:,} x {dim}, M={parts}, width {dim // parts}",
            ours=VqrsEncode(ours),
            peers=peers,
            draw=lambda rng, x=x: x,
            check=code_check(books, True),
            unit="row",
            units=rows,
            operations=2.0 * rows * 256 * dim,
            fresh=False,
            demands=[Demand("Faiss", least)],
        )


def code_check(books: Rows, side_by_side: bool) -> Any:
    """Codes are those of the first contender, near-ties aside, and their error is kept."""
    first: list[Codes] = []

    def check(contender: Contender, x: Rows, answer: Codes) -> dict[str, float]:
        first.append(answer[:4_096])
        differ = float((first[0] != first[-1]).any(axis=1).mean())
        expect(differ < 0.002, contender, f"{differ:.2%} of the rows have other codes")
        error = relative_error(x[:4_096], books, first[-1], side_by_side)
        return {"relative_error": error, "rows_that_differ": differ}

    return check


def residual_encode(shrink: int) -> Iterator[Job]:
    """residual encode, beam 5."""
    rows, dim, beam = 20_000 // shrink, 64, 5
    x = embeddings(rows, dim)
    for stages in (4, 8):
        settings = {"n_refinements": 1, "max_iter": 4, "codebook_dtype": "float32", "random_state": 0}
        ours = vqrs.ResidualQuantizer(stages, beam_width=beam, **settings).fit(embeddings(8_192, dim))
        books = np.stack(ours.codebooks_)
        peers: list[Contender] = []
        if faiss:
            peers = [
                FaissEncode(faiss_residual(books, beam, False)),
                FaissEncodeByTables(faiss_residual(books, beam, True)),
            ]
        yield Job(
            case=f"{rows:,} x {dim}, M={stages}",
            ours=VqrsEncode(ours),
            peers=peers,
            draw=lambda rng, x=x: x,
            check=code_check(books, False),
            unit="row",
            units=rows,
            fresh=False,
            demands=[Demand("Faiss", 3.0, 6.0)],
        )


def product_beside_nanopq(shrink: int) -> Iterator[Job]:
    """ProductQuantizer.fit beside nanopq."""
    rows, dim, parts = 10_000 // min(shrink, 4), 64, 8
    x = embeddings(rows, dim)

    def check(contender: Contender, x: Rows, answer: Rows) -> dict[str, float]:
        expect(answer.shape == (parts, 256, dim // parts), contender, f"books of shape {answer.shape}")
        coder = vqrs.ProductQuantizer(parts, codebook_dtype="float32", max_iter=1).fit(x)
        return {"relative_error": relative_error(x, answer, with_books(coder, answer).transform(x))}

    yield Job(
        case=f"{rows:,} x {dim}, M={parts}",
        ours=VqrsProduct(parts),
        peers=[NanopqProduct(parts)] if nanopq else [],
        draw=lambda rng: x,
        check=check,
        unit="fit",
        fresh=False,
    )
