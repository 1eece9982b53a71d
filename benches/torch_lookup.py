"""Eager forward passes of ``vqrs.torch`` beside torch's own modules and quantized operators, in one run.

``python -m benches.torch_lookup`` (about 8 minutes, 8 GB of memory) prints a table, writes it into
``docs/performance.md`` and appends one JSON line a measurement to ``benches/compare/results/torch_lookup.jsonl``.

Every call gets ids that no call before had, so that rows come from memory and not from a cache that the call before
filled. The contenders take turns within a round; a time is the median over rounds, and a ratio the median of the ratios
of rounds. With one id a call a time is taken over many calls.
"""

import argparse
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import vqrs
import vqrs.torch
from benches.compare.surroundings import keep, surroundings
from vqrs import _core

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
TABLES = (1_000_000, 128), (10_000_000, 64)
BATCHES = 1, 64, 1024, 8192, 32_768, 65_536
BAG = 20
ROUNDS = 9
SAMPLE = 20_000


def ids_of(n_rows: int, count: int, skew: str, seed: int) -> Tensor:
    """Uniform ids, or ids by Zipf's law with exponent 1.05 over rows in no order."""
    rng = np.random.default_rng(seed)
    if skew == "uniform":
        return torch.from_numpy(rng.integers(n_rows, size=count))
    ends = np.cumsum(np.arange(1, n_rows + 1) ** -1.05)
    ranks = np.searchsorted(ends / ends[-1], rng.random(count))
    return torch.from_numpy(np.random.default_rng(1).permutation(n_rows)[np.minimum(ranks, n_rows - 1)])


def table_of(quantizer: object, sample: np.ndarray, n_rows: int) -> vqrs.Table:
    """A table of many rows that holds the codes of a sample again and again, in no order."""
    small = vqrs.compress(sample, method=quantizer)
    order = np.random.default_rng(2).integers(len(small), size=n_rows)
    return vqrs.Table(_core.Table.from_codec(small._core.codec(), small.codes[order], errors={"relative": 0.0}))


class Contenders:
    """Everything that is timed on one table."""

    def __init__(self, n_rows: int, dim: int) -> None:
        weight = torch.randn(n_rows, dim, generator=torch.Generator().manual_seed(0))
        sample = weight[:SAMPLE].numpy()
        quantizers = {
            "product": vqrs.ProductQuantizer(n_subvectors=dim // 4, n_bits=8, max_iter=2, random_state=0),
            "int8": vqrs.ScalarQuantizer(dtype="int8"),
            "int4": vqrs.ScalarQuantizer(dtype="int4"),
        }
        tables = {name: table_of(quantizer, sample, n_rows) for name, quantizer in quantizers.items()}
        self.ratios = {name: table.ratio for name, table in tables.items()}
        ours = {name: vqrs.torch.Embedding.from_table(table) for name, table in tables.items()}
        our_bags = {name: vqrs.torch.EmbeddingBag.from_table(table, mode="sum") for name, table in tables.items()}
        full, half = nn.Embedding.from_pretrained(weight), nn.Embedding.from_pretrained(weight.half())
        full_bag = nn.EmbeddingBag.from_pretrained(weight, mode="sum")
        byte = torch.ops.quantized.embedding_bag_byte_prepack(weight)
        nibble = torch.ops.quantized.embedding_bag_4bit_prepack(weight)
        of_byte = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        of_nibble = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
        singles = {count: torch.arange(count) for count in BATCHES}
        starts = {count: torch.arange(0, count * BAG, BAG) for count in BATCHES}
        self.rows: dict[str, Callable[[Tensor], Tensor]] = {
            "torch float32": full,
            "torch float16": half,
            "torch int8": lambda ids: of_byte(byte, ids, singles[len(ids)]),
            "torch int4": lambda ids: of_nibble(nibble, ids, singles[len(ids)]),
            **ours,
        }
        self.bags: dict[str, Callable[[Tensor], Tensor]] = {
            "torch float32": full_bag,
            "torch int8": lambda ids: of_byte(byte, ids.reshape(-1), starts[len(ids)]),
            "torch int4": lambda ids: of_nibble(nibble, ids.reshape(-1), starts[len(ids)]),
            **our_bags,
        }
        buffer = torch.empty(BATCHES[-1], dim)
        self.reused: dict[str, Callable[[Tensor], Tensor]] = {
            "torch float32": lambda ids: torch.index_select(weight, 0, ids, out=buffer[: len(ids)]),
            **{name: lambda ids, module=module: module(ids, out=buffer[: len(ids)]) for name, module in ours.items()},
        }


PEERS = {"product": "torch float32", "int8": "torch int8", "int4": "torch int4"}
"""Whom each of ours is held against; with reused buffers it is torch's float32 for all."""


def measure(calls: dict[str, Callable[[Tensor], Tensor]], batches: Iterator[Tensor], n_calls: int) -> dict[str, list]:
    """Seconds a call, of each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            taken = list(itertools.islice(batches, n_calls))
            begin = time.perf_counter()
            for ids in taken:
                call(ids)
            times[name].append((time.perf_counter() - begin) / n_calls)
    return {name: all_rounds[1:] for name, all_rounds in times.items()}  # the first round warms up


def endless(n_rows: int, shape: tuple[int, ...], skew: str) -> Iterator[Tensor]:
    """Batches of ids; a pool of eight million is long gone from every cache when it begins again."""
    size = int(np.prod(shape))
    pool = ids_of(n_rows, max(8_000_000, 4 * size) // size * size, skew, seed=3).reshape(-1, *shape)
    return itertools.cycle(pool.unbind(0))


def main() -> None:
    """Measures, prints, keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="small tables, nothing kept: does it run?")
    arguments = parser.parse_args()
    lines = []
    for n_rows, dim in [(20_000, 16)] if arguments.dry else TABLES:
        contenders = Contenders(n_rows, dim)
        settings = itertools.product((1, 2), ("uniform", "Zipf"), ("rows", "bags", "reused"))
        for threads, skew, what in settings:
            torch.set_num_threads(threads)
            calls = getattr(contenders, what)
            chosen = {"rows": BATCHES, "bags": (64, 1024, 8192), "reused": BATCHES[-1:]}[what]
            for batch in chosen:
                shape = (batch, BAG) if what == "bags" else (batch,)
                values = int(np.prod(shape)) * dim
                batches = endless(n_rows, shape, skew)
                times = measure(calls, batches, max(1, min(2000, 30_000_000 // (values * 8))))
                for name, peer in PEERS.items():
                    peer = "torch float32" if what == "reused" else peer
                    ratio = statistics.median(a / b for a, b in zip(times[peer], times[name], strict=True))
                    record = {
                        "rows": n_rows,
                        "columns": dim,
                        "threads": threads,
                        "ids": skew,
                        "what": what,
                        "batch": batch,
                        "method": name,
                        "ratio": contenders.ratios[name],
                        "peer": peer,
                        "speedup": ratio,
                        "microseconds": {key: 1e6 * statistics.median(value) for key, value in times.items()},
                    }
                    lines.append(record)
                    print(
                        f"{n_rows}x{dim} {threads}t {skew:7} {what:6} {batch:6} {name:8} {ratio:5.2f}x of {peer}  "
                        f"{record['microseconds'][name]:9.1f} us",
                        flush=True,
                    )
                    if not arguments.dry:
                        keep("torch_lookup", record | surroundings(threads))
        del contenders
    if not arguments.dry:
        write(lines)


def write(records: list[dict]) -> None:
    """The tables, into the document."""
    text = [table_of_rows([r for r in records if r["columns"] == dim], n, dim) for n, dim in TABLES]
    document = DOCUMENT.read_text(encoding="utf-8")
    between = re.compile(r"(<!-- torch begin -->\n).*?(<!-- torch end -->)", re.DOTALL)
    DOCUMENT.write_text(between.sub(lambda found: f"{found[1]}{''.join(text)}{found[2]}", document), encoding="utf-8")


def table_of_rows(records: list[dict], n_rows: int, dim: int) -> str:
    """One table of documents: a line a batch, a column for each of ours, 1 and 2 threads, uniform and Zipf ids."""
    names = {"rows": "rows", "bags": f"bags of {BAG}", "reused": "rows, reused buffers"}
    head = [f"{n_rows:,} x {dim}", "ids", "threads", *(f"{name} / {peer}" for name, peer in PEERS.items())]
    lines = [head, ["---"] * len(head)]
    keys = sorted({(list(names).index(r["what"]), r["batch"], r["ids"] != "uniform", r["threads"]) for r in records})
    for what, batch, skewed, threads in keys:
        skew, key = "Zipf" if skewed else "uniform", list(names)[what]
        found = {
            r["method"]: r
            for r in records
            if (r["what"], r["batch"], r["ids"], r["threads"]) == (key, batch, skew, threads)
        }
        cells = [
            f"{found[name]['speedup']:.2f}x ({found[name]['microseconds'][name]:,.1f} us"
            f"{', of torch float32' if key == 'reused' and name != 'product' else ''})"
            for name in PEERS
        ]
        lines.append([f"{batch:,} {names[key]}", skew, str(threads), *cells])
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


if __name__ == "__main__":
    main()
