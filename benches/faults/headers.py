"""Headers that lie behind right checksums (R5): the reader's own checks, its time and its memory."""

import functools
import json
import time
from pathlib import Path

import numpy as np

import vqrs

from . import Fault, Outcome
from ._files import GOLDEN
from ._mutate import Mutator, Parts
from ._watched import forget_peak, watched

MEMORY = 64 << 20
"""Bytes above the baseline that opening and a few lookups of a small file may take."""


@functools.cache
def golden() -> list[bytes]:
    return [path.read_bytes() for path in GOLDEN]


def use(table: vqrs.Table, folder: Path, verify: str) -> None:
    """A little of everything that a table can do."""
    n, dim = table.shape
    few = max(1, min(3, (1 << 20) // dim))
    repr(table), table.metadata, table.codes, table.ratio
    table.info()
    if n == 0:
        return
    table[[0, n - 1, -1][:few]], table[n // 2], table[0 : min(n, few)]
    table.pool([0, n - 1][:few], offsets=[0])
    if n <= 10_000 and dim <= 4096:
        table.search(np.ones((1, dim), np.float32), k=1)
    if n <= 10_000 and table.names is not None:
        assert len(table.names) == n
    if table.nbytes < 1 << 20:
        table.save(folder / "again.safetensors", durable=False)
    if n * dim <= 1 << 20:
        table.verify()


def probe(path: Path, folder: Path) -> str:
    """``"refused"``, ``"opened"``, or what should not have come."""
    answers = set()
    for verify, mode in [("header", "mmap"), ("lazy", "mmap"), ("full", "read")]:
        try:
            with vqrs.open(path, verify=verify, mode=mode) as table:
                answers.add("opened")
                use(table, folder, verify)
        except (vqrs.TableCorruptError, vqrs.TableVersionError):
            answers.add("refused")
        except MemoryError:
            answers.add("no memory")
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
    return "opened" if "opened" in answers else "refused"


def listed() -> list:
    """What a header can say to hurt whoever believes it."""

    def text(json_text: str) -> bytes:
        size = -(-(len(json_text) + 8) // 4096) * 4096
        content = (size - 8).to_bytes(8, "little") + json_text.encode().ljust(size - 8)
        return content + bytes(8192)

    def described(description: str) -> bytes:
        quoted = description.replace("\\", "\\\\").replace('"', '\\"')
        return text('{"__metadata__":{"format":"pt","vqrs":"' + quoted + '"}}')

    def big(**changes: object) -> bytes:
        parts = Parts(golden()[0])
        parts.description |= changes
        return parts.content()

    def many(count: int) -> bytes:
        empty = '"dtype":"U8","shape":[0],"data_offsets":[0,0]'
        metadata = json.dumps({"format": "pt", "vqrs": json.dumps(Parts(golden()[0]).description)})
        return text('{"__metadata__":' + metadata + "".join(f',"t{i}":{{{empty}}}' for i in range(count)) + "}")

    sparse = {"form": "sparse", "dim": 1 << 24, "kept": 1, "dtype": "int8", "places": "columns", "scale_factor": 1.0}
    turned = {"kind": "hadamard", "seed": 1, "rounds": 4}
    deep: dict = sparse
    for _ in range(15):
        deep = {"form": "linear", "dim": 1 << 24, "mean": False, "rotation": turned, "inner": deep}
    return [
        lambda: many(3000),
        lambda: many(250_000),
        lambda: many(900_000),
        lambda: described("[" * 1_000_000),
        lambda: described('{"a":' * 200_000),
        lambda: described('{"profile":"vqrs-table/1","requires":[' + '"x",' * 900_000 + '"x"]}'),
        lambda: described('{"profile":"vqrs-table/1","requires":[' + "[]," * 4_000_000 + "1]}"),
        lambda: described('{"profile":"' + "\x7f" * 3_000_000 + '","requires":[]}'),
        lambda: text('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(1_000_000)) + "}}"),
        lambda: text('{"__metadata__":{"vqrs":"{}","x":"' + "\\u0001" * 2_700_000 + '"}}'),
        lambda: text('{"__metadata__":{"vqrs":"{}"},"a":{"dtype":"' + "\x7f" * 10_000_000 + '"}}'),
        lambda: text('{"a":{"shape":[' + "1," * 8_000_000 + "1]}}"),
        lambda: text("{" * 16_000_000),
        lambda: text('{"' + "a" * 16_000_000 + '":1,"' + '":1}'),
        lambda: big(extra="\x7f" * 900_000),
        lambda: big(decoder=deep, dim=1 << 24),
        lambda: big(decoder={"form": "join", "dim": 1 << 24, "mode": "sum", "parts": [sparse] * 4096}, dim=1 << 24),
        lambda: big(
            decoder={"form": "books", "dim": 1 << 24, "bits": 24, "scale": 1.0, "dtype": "float16", "groups": []}
        ),
    ]


def attempt(seed: int, index: int, folder: Path) -> dict:
    """One changed file, tried in every way."""
    path = folder / "try.safetensors"
    known = listed()
    if index < 0:
        path.write_bytes(golden()[0])
        probe(path, folder)
        return {}
    # The made file is a child's own affair: it must not count as the reader's memory.
    if index < len(known):
        content = known[index]()
    else:
        mutator = Mutator(np.random.default_rng([seed, index]))
        content = mutator.file(mutator.pick(golden()))
    path.write_bytes(content)
    del content
    forget_peak()
    begin = time.perf_counter()
    found = probe(path, folder)
    return {"found": found, "seconds": time.perf_counter() - begin}


def edited_headers(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """The time and the memory are held in the full count alone: a laden machine is no fault."""
    outcome, strict = Outcome(), count >= FAULTS[0].full
    seed, opened, slowest, largest = int(random.integers(1 << 30)), 0, 0.0, 0
    for record in watched("benches.faults.headers", "attempt", seed, count, folder):
        found = record.get("failed") or record["found"]
        held = found in ("refused", "opened")
        if held:
            opened += found == "opened"
            slowest, largest = max(slowest, record["seconds"]), max(largest, record["memory"])
            if strict and (record["seconds"] > 1 or record["memory"] > MEMORY):
                held, found = False, f"{record['seconds']:.2f} s, {record['memory'] >> 20} MiB"
        outcome.add(held, f"seed {seed}, try {record['index']}: {found}")
    outcome.note = f"{opened:,} opened; at most {slowest:.2f} s and {largest >> 20} MiB above baseline"
    return outcome


FAULTS = [
    Fault(
        "R5",
        "edited headers, checksums right: lying sizes, overflow, duplicate keys, overlaps, deep JSON, many tensors",
        "no crash, none over 1 s, under 64 MiB above baseline",
        edited_headers,
        300,
        10_000,
    )
]
