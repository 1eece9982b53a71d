"""Processes that run for long (R28): what grows with lookups, with tables that are opened and closed, and with work.

Each soak runs in a process of its own: ``python -m benches.faults.soak opens 1000``. The first tenth warms up.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import vqrs

from . import Fault, Outcome

ROOT = Path(__file__).parents[2]
FLAT = 1 << 20
"""Bytes by which a process may differ after all of it."""
SLOTS = 4096
"""Tables that the guard of mapped files watches at a time."""


def linux() -> str | None:
    """Where a process can be asked for its mappings and descriptors."""
    return None if Path("/proc/self/smaps_rollup").exists() else "only Linux tells the memory of a process in /proc"


def has_torch() -> str | None:
    import importlib.util

    return linux() or (None if importlib.util.find_spec("torch") else "torch is not installed")


def held() -> dict[str, int]:
    """Bytes of memory that are this process's own, its mappings of tables, and its descriptors."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # what the C library keeps of freed memory is not held by anybody
        ctypes.CDLL(None).malloc_trim(0)
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    private = sum(int(line[1]) * 1024 for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    tables = sum("safetensors" in line for line in maps)
    return {"bytes": private, "tables": tables, "mappings": len(maps), "descriptors": len(os.listdir("/proc/self/fd"))}


# ---- soaks: each yields how many of what it counts were done, and what went wrong -----------------------------------

Steps = Iterator[tuple[int, str]]


def lookups(path: Path, other: Path) -> Steps:
    """Rows by lookups, pools and into memory that is used again, from one thread and from several."""
    table = vqrs.open(path)
    right, n_rows = table.to_numpy(), len(table)
    random = np.random.default_rng(0)
    ids = random.integers(0, n_rows, 100_000)
    out = np.empty((len(ids), table.shape[1]), np.float32)
    wanted, offsets = right[ids], np.arange(0, len(ids), 50)
    pooled = table.pool(ids, offsets)
    while True:
        yield len(ids), "" if np.array_equal(table[ids], wanted) else "lookup: other rows"
        yield len(ids), "" if np.array_equal(table.lookup(ids, out=out), wanted) else "out: other rows"
        yield len(ids), "" if np.array_equal(table.pool(ids, offsets), pooled) else "pool: other sums"
        yield n_rows, "" if np.array_equal(table.decode(out=out[:n_rows], n_jobs=2), right) else "decode: other rows"
        for at in range(200):
            if not np.array_equal(table[ids[at]], wanted[at]):
                yield 0, "one row: another"
        yield 200, ""
        for refused in ([n_rows], [0.5], ["no name"]):
            with contextlib.suppress(IndexError, KeyError):
                table.lookup(refused)
                yield 0, f"{refused} was not refused"


def opens(path: Path, other: Path) -> Steps:
    """Tables that are opened in every way, are damaged, are kept by views alone, or by other processes and threads."""
    right = vqrs.open(path, mode="read").to_numpy()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    flipped, short, text = (other / name for name in ("flipped", "short", "text"))
    flipped.write_bytes(content)
    short.write_bytes(content[: len(content) // 2])
    text.write_text("no table")

    def whole(**arguments: Any) -> str:
        with vqrs.open(path, **arguments) as table:
            return "" if np.array_equal(table[[5, -1]], right[[5, -1]]) else "other rows"

    def refused(bad: Path) -> str:
        try:
            vqrs.open(bad, verify="full")
        except (vqrs.TableError, OSError):
            return ""
        return f"{bad.name} was opened"

    def view() -> str:
        table = vqrs.open(path)
        codes = table.codes
        table.close()
        return "" if codes[0].tobytes() == content[4096 : 4096 + codes.shape[1]] else "other codes"

    def pickled() -> str:
        table = pickle.loads(pickle.dumps(vqrs.open(path)))
        return "" if table.shape == right.shape else "another table"

    def cut() -> str:
        copy = other / "cut.safetensors"
        shutil.copy(path, copy)
        table = vqrs.open(copy)
        os.truncate(copy, 5000)
        try:
            table[[5, -1]]
        except vqrs.TableCorruptError:
            return ""
        return "a cut was not noticed"

    def threads() -> str:
        said: list[str] = []
        all_ = [threading.Thread(target=lambda: said.append(whole())) for _ in range(4)]
        for thread in all_:
            thread.start()
        for thread in all_:
            thread.join()
        return "" if said == [""] * 4 else f"threads: {said}"

    def child() -> str:
        number = os.fork()
        if number == 0:
            os._exit(bool(whole()))
        return "" if os.waitpid(number, 0)[1] == 0 else "a child failed"

    ways: list[Callable[[], str]] = [whole] * 4
    ways += [functools.partial(whole, verify="full"), functools.partial(whole, verify="lazy")]
    ways += [functools.partial(whole, mode="read"), view, pickled]
    ways += [functools.partial(refused, bad) for bad in (flipped, short, text, other / "nowhere")]
    rare = {50: threads, 51: cut, 200: child}
    number = 0
    while True:
        number += 1
        yield 1, ways[number % len(ways)]()
        for every, way in rare.items():
            if number % every == 0:
                yield 4 if way is threads else 1, way()


def work(path: Path, other: Path) -> Steps:
    """Compressing, fitting, encoding, searching, saving, and calls that are refused."""
    x = np.random.default_rng(0).standard_normal((3000, 24), dtype=np.float32)
    parameters = {"scalar": {}, "product": {"n_subvectors": 4, "n_bits": 4}, "rotated": {"n_bits": 4}}
    saved, first = other / "saved.safetensors", {}
    while True:
        for kind, chosen in parameters.items():
            table = vqrs.compress(x, method=kind, random_state=0, n_jobs=2, **chosen)
            found = table.search(x[:3], 5)[1].tobytes() + table.codes.tobytes()
            table.save(saved, durable=False)
            with contextlib.suppress(ValueError):
                vqrs.compress(np.full((4, 4), np.nan), method=kind)
            yield 1, "" if found == first.setdefault(kind, found) else f"{kind}: other codes"
        fitted = vqrs.ProductQuantizer(n_subvectors=4, n_bits=4, max_iter=2, random_state=0).fit(x)
        yield 1, "" if fitted.inverse_transform(fitted.transform(x)).shape == x.shape else "another shape"


def modules(path: Path, other: Path) -> Steps:
    """Modules of torch over mapped tables: made, used, and let go."""
    import torch

    import vqrs.torch

    kept = vqrs.torch.Embedding.from_table(path)
    ids = torch.arange(kept.num_embeddings)
    right, offsets = kept(ids), torch.arange(0, len(ids), 10)
    out = torch.empty_like(right)
    bag = vqrs.torch.EmbeddingBag.from_table(path, mode="sum")
    sums = bag(ids, offsets)
    codes, tensors, said = kept._reads()
    while True:
        with torch.inference_mode():
            yield len(ids), "" if torch.equal(kept(ids), right) else "Embedding: other rows"
            yield len(ids), "" if torch.equal(kept(ids, out=out), right) else "out: other rows"
            yield len(ids), "" if torch.equal(bag(ids, offsets), sums) else "EmbeddingBag: other sums"
            rows = torch.ops.vqrs.lookup(ids, codes.view(codes.shape), tensors, said, torch.float32, -1)
            yield len(ids), "" if torch.equal(rows, right) else "operator: other rows"
        made = vqrs.torch.Embedding.from_table(path, trainable=True)
        made(ids[:100]).sum().backward()
        yield 100, ""


SOAKS = {"lookups": lookups, "opens": opens, "work": work, "modules": modules}


def soak(name: str, count: int, folder: Path) -> dict[str, Any]:
    """Goes on until so many were done; what was wrong, and what is held more than after the first tenth."""
    path, other = folder / "rows.safetensors", folder / "other"
    other.mkdir()
    x = np.random.default_rng(1).standard_normal((20_000, 16), dtype=np.float32)
    vqrs.compress(x, method="scalar", dtype="int8", path=path)
    steps, done, wrong = SOAKS[name](path, other), 0, []
    before = held()
    warm: dict[str, int] = {}
    while done < count or not warm:
        more, said = next(steps)
        done += more
        if said:
            wrong.append(said)
        if not warm and done >= count / 10:
            for _ in range(20):  # each sort of step at least once
                done += next(steps)[0]
            warm = held()
    after = held()
    steps.close()
    del steps
    left = held()
    grown = {key: after[key] - warm[key] for key in after}
    if grown["bytes"] > FLAT:
        wrong.append(f"{grown['bytes']} bytes more")
    if left["tables"] or left["descriptors"] > before["descriptors"]:
        wrong.append(f"left: {left}, before: {before}")
    # None is lost to the guard: as many as it can watch are mapped at once.
    tables = [vqrs.open(path) for _ in range(SLOTS)]
    if not all(table._core.mapped for table in tables):
        wrong.append(f"{sum(not table._core.mapped for table in tables)} places of the guard are lost")
    return {"done": done, "wrong": wrong, "grown": grown}


def soaked(count: int, random: np.random.Generator, folder: Path, name: str) -> Outcome:
    command = [sys.executable, "-m", __name__, name, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    outcome = Outcome()
    if done.returncode:
        outcome.add(False, f"ended with {done.returncode}: {done.stderr[-500:]}")
        return outcome
    found = json.loads(done.stdout)
    outcome.tried = found["done"]
    outcome.held = found["done"] - len(found["wrong"])
    outcome.failures = [f"{name}: {text}" for text in found["wrong"][:20]]
    outcome.note = f"{found['grown']['bytes'] / 1024:+.0f} KiB of private memory"
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SOAKS)
    parser.add_argument("count", type=int)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vqrs-soak-"))
    try:
        print(json.dumps(soak(arguments.name, arguments.count, folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


HOLDS = "memory flat within 1 MB, no descriptor or mapping left, the right rows"
FAULTS = [
    Fault(
        "R28",
        "rows looked up: lookup, `out=`, pool, decode, one at a time",
        HOLDS,
        functools.partial(soaked, name="lookups"),
        3_000_000,
        1_000_000_000,
        part="lookups",
        needs=linux,
    ),
    Fault(
        "R28",
        "tables opened and closed: every mode, damaged, cut, kept by views, in threads and children",
        HOLDS,
        functools.partial(soaked, name="opens"),
        1_000,
        100_000,
        part="opens",
        needs=linux,
    ),
    Fault(
        "R28",
        "rounds of compress, fit, encode, search and save",
        HOLDS,
        functools.partial(soaked, name="work"),
        24,
        5_000,
        part="work",
        slow=True,
        needs=linux,
    ),
    Fault(
        "R28",
        "rows looked up by modules of torch, which are made and let go",
        HOLDS,
        functools.partial(soaked, name="modules"),
        1_000_000,
        100_000_000,
        part="modules",
        slow=True,
        torch=True,
        needs=has_torch,
    ),
]

if __name__ == "__main__":
    main()
