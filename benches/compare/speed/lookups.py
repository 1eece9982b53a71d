"""Rows by number, pooled rows, opening: vqrs beside torch, numpy and Faiss."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vqrs
from vqrs import _core

from .measure import Contender, Demand, Job, expect, optional

torch = optional("torch")
faiss = optional("faiss")
if torch:
    torch.set_grad_enabled(False)

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]

BAG = 20

# -- contenders -----------------------------------------------------------------------------------------------------


class VqrsLookup(Contender):
    group, name = "vqrs", "vqrs Table.lookup(out=)"

    def __init__(self, table: vqrs.Table, batch: int, dtype: str = "float32") -> None:
        self.table, self.out = table, np.empty((batch, table.shape[1]), dtype)
        if dtype != "float32":
            self.group = f"vqrs into {dtype}"
            self.name = f"{self.name} {dtype}"

    def run(self, batches: Sequence[Ids]) -> NDArray[Any]:
        lookup, out = self.table.lookup, self.out
        for ids in batches:
            lookup(ids, out)
        return out


class VqrsPool(VqrsLookup):
    name = "vqrs Table.pool(out=)"

    def run(self, batches: Sequence[Ids]) -> Rows:
        for ids in batches:
            self.table.pool(ids, out=self.out)
        return self.out


class NumpyTake(Contender):
    group = "numpy"

    def __init__(self, array: NDArray[Any], batch: int, kind: str = "array") -> None:
        self.array, self.out = array, np.empty((batch, array.shape[1]), array.dtype)
        self.name = f"numpy {kind}.take(out=)"

    def run(self, batches: Sequence[Ids]) -> NDArray[Any]:
        for ids in batches:
            self.array.take(ids, axis=0, out=self.out, mode="clip")  # other modes copy through a buffer
        return self.out


class NumpyIndex(Contender):
    group = "numpy"

    def __init__(self, array: NDArray[Any], kind: str = "array") -> None:
        self.array, self.name = array, f"numpy {kind}[ids]"

    def run(self, batches: Sequence[Ids]) -> NDArray[Any]:
        for ids in batches:
            answer = self.array[ids]
        return answer


class TorchContender(Contender):
    """A torch table of some type; ``group`` is the type."""

    call: str

    def __init__(self, weight: "torch.Tensor") -> None:
        self.weight = weight
        self.group = f"torch {str(weight.dtype).removeprefix('torch.')}"
        self.name = f"{self.group} {self.call}"

    def take(self, batch: Ids) -> "torch.Tensor":
        return torch.from_numpy(batch)


class TorchEmbedding(TorchContender):
    call = "F.embedding"

    def run(self, batches: Sequence["torch.Tensor"]) -> "torch.Tensor":
        embedding, weight = torch.nn.functional.embedding, self.weight
        for ids in batches:
            answer = embedding(ids, weight)
        return answer


class TorchIndexSelect(TorchContender):
    call = "index_select(out=)"

    def __init__(self, weight: "torch.Tensor", batch: int) -> None:
        super().__init__(weight)
        self.out = torch.empty((batch, weight.shape[1]), dtype=weight.dtype)

    def run(self, batches: Sequence["torch.Tensor"]) -> "torch.Tensor":
        index_select, weight, out = torch.index_select, self.weight, self.out
        for ids in batches:
            index_select(weight, 0, ids, out=out)
        return out


class TorchBag(TorchContender):
    call = "nn.EmbeddingBag"

    def __init__(self, weight: "torch.Tensor") -> None:
        super().__init__(weight)
        self.bag = torch.nn.EmbeddingBag.from_pretrained(weight, mode="sum")

    def run(self, batches: Sequence["torch.Tensor"]) -> "torch.Tensor":
        for ids in batches:
            answer = self.bag(ids)
        return answer


class TorchQuantizedBag(Contender):
    """FBGEMM's bags of rows in 8 or 4 bits, each row with its own scale and offset."""

    def __init__(self, weight: "torch.Tensor", bits: int) -> None:
        self.group = f"torch int{bits}"
        name = {8: "byte", 4: "4bit"}[bits]
        self.name = f"torch quantized.embedding_bag_{name}"
        self.weight = getattr(torch.ops.quantized, f"embedding_bag_{name}_prepack")(weight)
        self.bag = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")

    def take(self, batch: Ids) -> Any:
        starts = torch.arange(0, batch.size, batch.shape[1])
        return torch.from_numpy(batch.reshape(-1)), starts

    def run(self, batches: Sequence[Any]) -> "torch.Tensor":
        for ids, starts in batches:
            answer = self.bag(self.weight, ids, starts)
        return answer


class TorchQuantizedRows(Contender):
    """The operator of ``nn.quantized.Embedding``."""

    def __init__(self, weight: "torch.Tensor", bits: int) -> None:
        self.group = f"torch int{bits}"
        short, dtype = {8: ("byte", torch.quint8), 4: ("4bit", torch.quint4x2)}[bits]
        self.name = f"torch quantized.embedding_{short}"
        low, high = weight.aminmax(dim=1)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
        # Zero points are floats here: zero lies between two levels.
        settings = {"scales": scale, "zero_points": -low / scale, "axis": 0, "dtype": dtype}
        self.weight = torch.ops.quantized.embedding_bag_prepack(torch.quantize_per_channel(weight, **settings))
        self.rows = getattr(torch.ops.quantized, f"embedding_{short}")

    def take(self, batch: Ids) -> "torch.Tensor":
        return torch.from_numpy(batch)

    def run(self, batches: Sequence["torch.Tensor"]) -> "torch.Tensor":
        for ids in batches:
            answer = self.rows(self.weight, ids)
        return answer


class FaissDecode(Contender):
    """Codes are gathered by numpy, then decoded by ``sa_decode``."""

    group, name = "Faiss", "Faiss sa_decode"

    def __init__(self, table: vqrs.Table, books: Rows) -> None:
        parts, entries, width = books.shape
        self.index = faiss.IndexPQ(parts * width, parts, entries.bit_length() - 1)
        faiss.copy_array_to_vector(books.reshape(-1), self.index.pq.centroids)
        self.index.is_trained = True
        self.codes = np.ascontiguousarray(table.codes)

    def run(self, batches: Sequence[Ids]) -> Rows:
        for ids in batches:
            answer = self.index.sa_decode(self.codes[ids])
        return answer


class VqrsOpen(Contender):
    group, name = "vqrs", "vqrs.open(path)[row]"

    def run(self, batches: Sequence[tuple[Path, int]]) -> Rows:
        for path, row in batches:
            with vqrs.open(path) as table:
                answer = table[row]
        return answer


class NumpyOpen(Contender):
    group, name = "numpy", "numpy load(path, mmap_mode='r')[row]"

    def take(self, batch: tuple[Path, int]) -> tuple[Path, int]:
        return batch[0].with_suffix(".npy"), batch[1]

    def run(self, batches: Sequence[tuple[Path, int]]) -> Rows:
        for path, row in batches:
            answer = np.array(np.load(path, mmap_mode="r")[row])
        return answer


# -- data -----------------------------------------------------------------------------------------------------------


class Zipf:
    """Row numbers with probability proportional to rank^-1.05, the ranks scattered over the table."""

    def __init__(self, rows: int) -> None:
        weights = np.arange(1, rows + 1, dtype=np.float64) ** -1.05
        self.ends = np.cumsum(weights)

    def __call__(self, rng: np.random.Generator, count: int) -> Ids:
        # Sorted numbers are found quicker.
        ranks = self.ends.searchsorted(np.sort(rng.random(count)) * self.ends[-1])
        rng.shuffle(ranks)
        return np.minimum(ranks, len(self.ends) - 1) * 2_654_435_761 % len(self.ends)  # a prime: one to one


def uniform(rows: int) -> Any:
    """All rows alike."""
    return lambda rng, count: rng.integers(0, rows, count)


def laws(rows: int) -> dict[str, Any]:
    """Ways to draw ids."""
    return {"uniform": uniform(rows), "Zipf": Zipf(rows)}


def normal_rows(rows: int, dim: int) -> Rows:
    """Normal rows."""
    return np.random.default_rng(1).standard_normal((rows, dim), dtype=np.float32)


def random_table(quantizer: Any, rows: int, dim: int) -> tuple[vqrs.Table, float]:
    """A table of random codes with books learned from a few thousand rows, and the error of those."""
    sample = normal_rows(8_192, dim)
    quantizer.fit(sample)
    codes = np.random.default_rng(2).integers(0, 256, (rows, quantizer.row_bytes_), dtype=np.uint8)
    parts = quantizer.compress(sample[:1])._core.codec()
    table = vqrs.Table(_core.Table.from_codec(parts, codes, errors={"relative": quantizer.relative_error_}))
    return table, quantizer.relative_error_


def decoded(table: vqrs.Table) -> Rows:
    """All rows as a plain array."""
    return table.decode(out=np.empty(table.shape, np.float32))


def add_entries(books: list[Rows], codes: NDArray[np.uint8], side_by_side: bool) -> Rows:
    """Rows from codes of a byte a book, by numpy: what every lookup is checked with."""
    parts = [book[codes[:, m]] for m, book in enumerate(books)]
    return np.concatenate(parts, axis=1) if side_by_side else np.sum(parts, axis=0, dtype=np.float32)


def as_rows(answer: Any) -> Rows:
    """A tensor or an array, in float32."""
    return np.asarray(answer).astype(np.float32)


def squared_error(answer: Any, exact: NDArray[Any]) -> float:
    """Squared error over squared norm."""
    exact = exact.astype(np.float64)
    return float(np.square(as_rows(answer) - exact).sum() / np.square(exact).sum())


def torch_rows(rows: Rows, batch: int, halves: "torch.Tensor | None") -> list[Contender]:
    """Torch's ways to look rows up."""
    if not torch:
        return []
    weights = [torch.from_numpy(rows)] + ([] if halves is None else [halves])
    return [way for weight in weights for way in (TorchEmbedding(weight), TorchIndexSelect(weight, batch))]


def in_halves(rows: Rows) -> "torch.Tensor | None":
    """The same table in float16, in memory that numpy asks huge pages for, as it does for the float32 one."""
    return torch.from_numpy(np.empty(rows.shape, np.float16)).copy_(torch.from_numpy(rows)) if torch else None


# -- plan -----------------------------------------------------------------------------------------------------------


def lookup_jobs(
    table: vqrs.Table, error: float, books: list[Rows], batches: list[int], demands: list[Demand], name: str
) -> Iterator[Job]:
    """One table of books, several sizes of batch, both distributions."""
    rows, dim = table.shape
    plain = decoded(table)
    halves = in_halves(plain)
    product = len(books) * books[0].shape[1] == dim

    def check(contender: Contender, ids: Ids, answer: Any) -> dict[str, float]:
        exact = add_entries(books, table.codes[ids], product)
        bound = 1e-6 if "float16" in contender.group else 1e-13
        far = squared_error(answer, exact)
        expect(far < bound, contender, f"error {far:.2g}")
        return {"relative_error": error if contender.group == "vqrs" else far}

    for batch in batches:
        for law, ids in laws(rows).items():
            peers = [*torch_rows(plain, batch, halves), VqrsLookup(table, batch, "float16")]
            if batch == max(batches):
                peers += [NumpyTake(plain, batch), NumpyIndex(plain)]
                peers += [FaissDecode(table, np.stack(books))] if faiss and product else []
            yield Job(
                case=f"{name}, {rows:,} rows, batch {batch:,}, {law}",
                ours=VqrsLookup(table, batch),
                peers=peers,
                draw=lambda rng, ids=ids, batch=batch: ids(rng, batch),
                check=check,
                unit="row",
                units=batch,
                batches=max(2, 131_072 // batch),
                demands=demands,
            )


def product_lookup(shrink: int) -> Iterator[Job]:
    """product lookup."""
    shapes = [
        (1_000_000, 64, 8, [1_024, 65_536], (4.0, 3.0), 5.0),
        (10_000_000, 64, 8, [1_024, 65_536], (6.0, 4.5), 8.0),
        (10_000_000, 128, 16, [8_192], (6.0, 3.5), 8.0),
    ]
    for rows, dim, parts, batches, (single, half), aim in shapes:
        quantizer = vqrs.ProductQuantizer(n_subvectors=parts, max_iter=4, random_state=0)
        table, error = random_table(quantizer, rows // shrink, dim)
        demands = [Demand("torch float32", single, aim), Demand("torch float16", half)]
        yield from lookup_jobs(table, error, quantizer.codebooks_, batches, demands, f"d={dim} M={parts}")


def small_lookup(shrink: int) -> Iterator[Job]:
    """lookup of 64 rows."""
    for rows in (10_000, 1_000_000):
        quantizer = vqrs.ProductQuantizer(max_iter=4, random_state=0)
        table, error = random_table(quantizer, max(10_000, rows // shrink), 64)
        plain = decoded(table)
        ids = uniform(len(table))

        def check(contender: Contender, ids: Ids, answer: Any, plain: Rows = plain, error: float = error) -> Any:
            expect(bool((as_rows(answer) == plain[ids]).all()), contender, "rows differ")
            return {"relative_error": error if contender.group == "vqrs" else 0.0}

        yield Job(
            case=f"d=64 M=8, {len(table):,} rows, batch 64",
            ours=VqrsLookup(table, 64),
            peers=[*torch_rows(plain, 64, None), NumpyTake(plain, 64), NumpyIndex(plain)],
            draw=lambda rng, ids=ids: ids(rng, 64),
            check=check,
            unit="call",
            batches=2_000 // min(shrink, 4),
            demands=[Demand(None, 1.5e-6, 0.9e-6)],
        )


def residual_lookup(shrink: int) -> Iterator[Job]:
    """residual lookup."""
    for stages, least, aim in ((4, 4.0, 5.5), (8, 2.5, 3.0)):
        for dtype in ("bfloat16", "int8"):
            settings = {"n_refinements": 1, "beam_width": 1, "max_iter": 4, "random_state": 0}
            quantizer = vqrs.ResidualQuantizer(stages, codebook_dtype=dtype, **settings)
            for rows in (1_000_000, 10_000_000):
                try:
                    table, error = random_table(quantizer, rows // shrink, 64)
                except ValueError as refused:
                    print(f"skipped: {refused}")
                    break
                demands = [Demand("torch float32", least, aim)]
                name = f"d=64 M={stages} {dtype} books"
                yield from lookup_jobs(table, error, quantizer.codebooks_, [65_536], demands, name)


def pool(shrink: int) -> Iterator[Job]:
    """pooled bags of 20."""
    bags = 1_024
    for rows in (1_000_000, 10_000_000):
        table, error = random_table(vqrs.ProductQuantizer(max_iter=4, random_state=0), rows // shrink, 64)
        plain = decoded(table)

        def check(contender: Contender, ids: Ids, answer: Any, plain: Rows = plain, error: float = error) -> Any:
            exact = plain[ids].sum(axis=1, dtype=np.float64)
            far = squared_error(answer, exact)
            expect(far < {"torch int8": 1e-3, "torch int4": 3e-2}.get(contender.group, 1e-10), contender, f"{far:.2g}")
            return {"relative_error": error if contender.group == "vqrs" else far}

        weight = torch.from_numpy(plain) if torch else None
        quantized = [TorchQuantizedBag(weight, 8), TorchQuantizedBag(weight, 4)] if torch else []
        for law, ids in laws(len(table)).items():
            yield Job(
                case=f"d=64 M=8, {len(table):,} rows, {law}",
                ours=VqrsPool(table, bags),
                peers=[TorchBag(weight), *quantized] if torch else [],
                draw=lambda rng, ids=ids: ids(rng, bags * BAG).reshape(bags, BAG),
                check=check,
                unit="id",
                units=bags * BAG,
                batches=4,
                demands=[Demand("torch float32", 2.8, 3.0), Demand("torch int8", 1.7, 2.0)],
            )


def scalar_lookup(shrink: int) -> Iterator[Job]:
    """int8 and int4 row lookup."""
    rows, batch = 4_000_000 // shrink, 65_536
    x = normal_rows(rows, 64)
    for bits, least, aim in ((8, 1.5, 1.7), (4, 2.0, 2.3)):
        quantizer = vqrs.ScalarQuantizer(f"int{bits}", clip="minmax").fit(x[:8_192])
        table = quantizer.compress(x)
        weight = torch.from_numpy(x) if torch else None
        peers: list[Contender] = [TorchQuantizedRows(weight, bits)] if torch else []

        def check(contender: Contender, ids: Ids, answer: Any, bits: int = bits) -> dict[str, float]:
            far = squared_error(answer, x[ids])
            expect(far < {8: 2e-4, 4: 3e-2}[bits] or "float" in contender.group, contender, f"error {far:.2g}")
            return {"relative_error": far}

        for law, ids in laws(rows).items():
            yield Job(
                case=f"int{bits} by row, d=64, {rows:,} rows, batch {batch:,}, {law}",
                ours=VqrsLookup(table, batch),
                peers=[*peers, *torch_rows(x, batch, None)],
                draw=lambda rng, ids=ids: ids(rng, batch),
                check=check,
                unit="row",
                units=batch,
                batches=2,
                demands=[Demand(f"torch int{bits}", least, aim)],
            )


def mapped_lookup(shrink: int) -> Iterator[Job]:
    """lookup in a mapped file."""
    rows, batch = 1_000_000 // shrink, 8_192
    table, error = random_table(vqrs.ProductQuantizer(max_iter=4, random_state=0), rows, 64)
    plain = decoded(table)

    def check(contender: Contender, ids: Ids, answer: Any) -> dict[str, float]:
        expect(bool((as_rows(answer) == plain[ids]).all()), contender, "rows differ")
        return {"relative_error": error if contender.group == "vqrs" else 0.0}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        table.save(path, durable=False)
        np.save(path.with_suffix(".npy"), plain)
        memmap = np.load(path.with_suffix(".npy"), mmap_mode="r")
        for law, ids in laws(rows).items():
            yield Job(
                case=f"d=64 M=8, {rows:,} rows, batch {batch:,}, {law}",
                ours=VqrsLookup(vqrs.open(path), batch),
                peers=[NumpyTake(memmap, batch, "memmap"), NumpyIndex(memmap, "memmap")],
                draw=lambda rng, ids=ids: ids(rng, batch),
                check=check,
                unit="row",
                units=batch,
                batches=16,
            )


def opening(shrink: int) -> Iterator[Job]:
    """opening a table and its first row."""
    for rows in (10_000, 1_000_000, 10_000_000):
        table, error = random_table(vqrs.ProductQuantizer(max_iter=4, random_state=0), rows // shrink, 64)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.safetensors"
            table.save(path, durable=False)
            # Zeros that take no room on the disk: only the opening is compared.
            zeros = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.float32, table.shape)
            del zeros

            def check(contender: Contender, batch: Any, answer: Any, table: Any = table, error: float = error) -> Any:
                expected = table[batch[1]] if contender.group == "vqrs" else np.zeros(64)
                expect(bool((answer == expected).all()), contender, "the row differs")
                return {"relative_error": error if contender.group == "vqrs" else 0.0}

            yield Job(
                case=f"d=64 M=8, {len(table):,} rows",
                ours=VqrsOpen(),
                peers=[NumpyOpen()],
                draw=lambda rng, path=path: (path, int(rng.integers(0, 1_000))),
                check=check,
                unit="call",
                batches=20,
                wall=True,
                demands=[Demand(None, 1e-3, 2e-4)],
            )
