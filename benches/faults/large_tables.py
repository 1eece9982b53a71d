"""Tables, ids and offsets around 2^31 and 2^32 (R14): files with holes, of 5 and 20 GiB, and tables without codes."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

import vqrs
from vqrs import _core, reference

from . import Fault, Outcome
from ._sparse import grow

GIB = 1 << 30
BORDERS = [0, 2**31, 2**32, 3 * 2**31]


def missing() -> str | None:
    """Holes are needed, and room for what is not a hole."""
    with tempfile.TemporaryFile() as file:
        file.truncate(64 << 20)
        if os.fstat(file.fileno()).st_blocks * 512 > 1 << 20:
            return "the file system writes holes as zeros"
    return None if shutil.disk_usage(tempfile.gettempdir()).free > GIB else "less than 1 GiB of room on the disk"


def near(random: np.random.Generator, n_rows: int, count: int) -> np.ndarray:
    """Rows close to the borders, to either end, and anywhere."""
    borders = np.array([border for border in [*BORDERS, n_rows] if border <= n_rows])
    close = random.choice(borders, count) + random.integers(-4, 5, count)
    anywhere = random.integers(0, n_rows, count)
    return np.clip(np.where(random.random(count) < 0.8, close, anywhere), 0, n_rows - 1)


def sparse_file(
    folder: Path, nbytes: int, n_subvectors: int, random: np.random.Generator
) -> tuple[Path, dict, _core.Codec]:
    """A table with codes of that many bytes: zeros, but for rows close to the borders."""
    x = random.normal(size=(600, 4)).astype(np.float32)
    codec, codes = _core.fit("product", {"n_subvectors": n_subvectors, "n_bits": 8, "max_iter": 2}, x)
    small, path = folder / "small.safetensors", folder / f"{nbytes}-{n_subvectors}.safetensors"
    _core.Table.from_codec(codec, codes, errors={}).save(str(small))
    n_rows = nbytes // n_subvectors
    known = {int(row): random.bytes(n_subvectors) for row in near(random, n_rows, 60)}
    grow(path, small.read_bytes(), n_rows, known)
    return path, known, codec


def wanted(rows: np.ndarray, known: dict[int, bytes], codec: _core.Codec) -> np.ndarray:
    zeros = bytes(codec.row_bytes)
    codes = b"".join(known.get(int(row), zeros) for row in rows)
    return codec.decode(np.frombuffer(codes, np.uint8).reshape(len(rows), codec.row_bytes))


def one_read(table: vqrs.Table, random: np.random.Generator, known: dict, codec: _core.Codec) -> tuple[str, bool]:
    """One way to read rows, and whether they were the right ones."""
    n_rows = len(table)
    rows = near(random, n_rows, int(random.integers(1, 40)))
    way = int(random.integers(7))
    if way == 0:
        dtype = str(random.choice(["i8", "u8", "u4", "i4", ">i8"]))
        rows = rows[rows <= np.iinfo(dtype).max]
        return f"ids {dtype} {rows}", np.array_equal(table[rows.astype(dtype)], wanted(rows, known, codec))
    if way == 1:
        return f"ids from the end {rows}", np.array_equal(table[rows - n_rows], wanted(rows, known, codec))
    start = max(0, int(rows[0]) - 3)
    if way == 2:
        between = np.arange(start, min(n_rows, start + 9))
        return f"slice from {start}", np.array_equal(table[start : start + 9], wanted(between, known, codec))
    if way == 3:
        step = int(random.choice([2**29 + 1, 2**31, 2**32 + 3, -(2**30) - 1]))
        between = np.arange(n_rows)[start::step] if n_rows < 2**20 else np.array(range(n_rows)[start::step])
        return f"slice from {start} by {step}", np.array_equal(table[start::step], wanted(between, known, codec))
    if way == 4:
        offsets = np.unique(np.concatenate([[0], random.integers(0, len(rows), 3)]))
        bags = np.maximum.reduceat(wanted(rows, known, codec), offsets)
        return f"bags of {rows} from {offsets}", np.array_equal(table.pool(rows, offsets, mode="max"), bags)
    if way == 5:
        stored = table.codes[rows]
        return f"codes of {rows}", stored.tobytes() == b"".join(
            known.get(int(row), bytes(len(stored[0]))) for row in rows
        )
    beyond = int(random.choice([n_rows, n_rows + 2**31, n_rows + 2**32, -n_rows - 1, 2**63 - 1]))
    place = int(random.integers(len(rows)))
    rows[place] = beyond
    try:
        table[rows]
    except IndexError as error:
        return f"id {beyond}", f"id {beyond} at position {place}" in str(error)
    return f"id {beyond}", False


def large_files(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """5 GiB in a short run, 20 GiB too in a full one, whose checksums are all compared as well."""
    outcome, full = Outcome(), count >= 5_000
    files = [(5 * GIB, 1)] + [(20 * GIB, 1), (20 * GIB, 4)] * full
    for nbytes, n_subvectors in files:
        path, known, codec = sparse_file(folder, nbytes, n_subvectors, random)
        for verify in ("header", "lazy", "full")[: 2 + full]:
            with vqrs.open(path, verify=verify) as table:  # type: ignore[arg-type]
                right = table.shape == (nbytes // n_subvectors, 4)
                outcome.add(right, f"{path.name} with verify={verify!r} has shape {table.shape}")
                for _ in range(count // len(files) // (2 + full)):
                    what, held = one_read(table, random, known, codec)
                    outcome.add(held, f"{path.name}, verify={verify!r}, {what}")
        room = path.stat().st_blocks * 512
        path.unlink()
        outcome.note = f"files of {', '.join(f'{size // GIB} GiB' for size, _ in files)}; {room >> 10} KiB on the disk"
    return outcome


def rows_without_codes(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """A table of 2^40 rows that keeps nothing for each."""
    outcome, n_rows = Outcome(), 2**40
    weight = random.normal(size=(1000, 4)).astype(np.float32)
    piece = {"array": 0, "place": {"kind": "hash", "seed": 1, "size": 1000}, "stride": 4, "offset": 0}
    terms = [{"start": 0, "width": 4, "piece": piece}]
    decoder = {"form": "hashed", "dim": 4, "bits": 0, "first": 0, "terms": terms}
    description = json.dumps({"kind": "hash", "parameters": {}, "decoder": decoder})
    codes = np.empty((n_rows, 0), np.uint8)
    table = vqrs.Table(_core.Table.from_parts(description, {"arrays.0": weight.reshape(-1)}, codes, errors={}))
    for number in range(count):
        ids = near(random, n_rows, 20)
        places = (reference.hash_bits(ids, 1).astype(object) * 1000) >> 64
        found = [table[ids], table[ids - n_rows], table.lookup(ids.astype(np.uint64)), table.pool(ids[:, None])][
            number % 4
        ]
        outcome.add(np.array_equal(found, weight[places.astype(int)]), f"way {number % 4} of ids {ids}")
    outcome.note = "2^40 rows"
    return outcome


def many_ids(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Bags of more than 2^31 ids, from a file with holes, and of more than 2^31 values decoded."""
    outcome = Outcome()
    n_ids = 2**31 + 4_096
    x = random.normal(size=(300, 1)).astype(np.float32)
    codec, codes = _core.fit("scalar", {"dtype": "int8"}, x)
    table = vqrs.Table(_core.Table.from_codec(codec, codes, errors={}))
    decoded = table.to_numpy()
    for _ in range(count):
        path = folder / "ids"
        ids = np.memmap(path, np.int32, "w+", shape=(n_ids,))
        places = np.array([2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, n_ids - 1])
        ids[places] = random.integers(1, 300, len(places))
        offsets = np.array([0, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 2])
        found = table.pool(ids, offsets, mode="max")
        bags = [np.maximum(decoded[0], decoded[ids[at]]) if at == n_ids - 1 else decoded[ids[at]] for at in places]
        outcome.add(np.array_equal(found, [decoded[0], *bags]), f"bags of {n_ids} ids with {ids[places]} at {places}")
        del ids
        path.unlink()
    return outcome


def room_in_memory() -> str | None:
    reason = missing()
    if reason or not hasattr(os, "sysconf"):
        return reason or "memory is not counted"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None if free > 12 * GIB else "less than 12 GiB of free memory"


FAULTS = [
    Fault(
        "R14",
        "rows around 2^31 and 2^32 in files of 5 and 20 GiB that are mostly holes",
        "exact rows, by ids, slices, bags and codes; ids beyond refused by their place",
        large_files,
        200,
        9_000,
        slow=True,
        needs=missing,
    ),
    Fault(
        "R14",
        "rows around 2^31, 2^32 and 2^40 of tables without codes",
        "exact rows",
        rows_without_codes,
        200,
        10_000,
        part="hashed",
    ),
    Fault(
        "R14",
        "offsets around 2^31, bags of 2^31 ids",
        "exact bags",
        many_ids,
        1,
        3,
        part="offsets",
        slow=True,
        needs=room_in_memory,
    ),
]
