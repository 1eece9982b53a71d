"""Files of other sorts, however large (R24): the reader looks at their ends and says what they are."""

import contextlib
import functools
import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import vqrs
from vqrs import reference

from . import Fault, Outcome
from ._files import GOLDEN, layout
from ._watched import forget_peak, memory, watched

TIB, GIB = 1 << 40, 1 << 30
SECONDS, MEMORY = 0.1, 50 * 10**6
WAYS = [(mode, verify) for mode in ("mmap", "read") for verify in ("header", "lazy", "full")]


def truthful(length: int, name: str = "levels-float16-v1") -> tuple[int, bytes]:
    """A length near this one, and the header of a golden table that claims as many rows as take it."""
    content = next(path for path in GOLDEN if path.stem == name).read_bytes()
    size, _, metadata = layout(content)
    description = json.loads(metadata["vqrs"])
    width = description["row_bytes"]
    rows = (length - size - length // 8192 - 4096) // width // 64 * 64
    end, placed = rows * width, {"codes": {"dtype": "U8", "shape": [rows, width], "data_offsets": [0, rows * width]}}
    blocks = -(-(size + end) // reference.BLOCK)
    placed["vqrs.blocks"] = {"dtype": "U64", "shape": [blocks], "data_offsets": [end, end + 8 * blocks]}
    end += 8 * blocks
    if end % 64:
        placed["__pad.0"] = {"dtype": "U8", "shape": [-end % 64], "data_offsets": [end, end + -end % 64]}
        end += -end % 64
    placed["vqrs.footer"] = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
    metadata["vqrs"] = json.dumps({**description, "rows": rows})
    text = json.dumps({"__metadata__": metadata, **placed}, separators=(",", ":")).encode()
    return size + end + 32, (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


@functools.cache
def sorts() -> dict[str, tuple[int, bytes, bytes]]:
    """Length, first and last bytes of sparse files."""
    room = (16 << 20) - 8
    length = room.to_bytes(8, "little")
    tib, head = truthful(TIB)
    gib, short = truthful(4 * GIB)
    sealed = reference.MAGIC + bytes(16)
    return {
        "zeros, 1 TiB": (TIB, b"", b""),
        "zeros, 4 GiB": (4 * GIB, b"", b""),
        "NumPy": (4 * GIB, b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4'", b""),
        "zip": (4 * GIB, b"PK\x03\x04" + bytes(range(200)), b"PK\x05\x06"),
        "text": (4 * GIB, b"the quick brown fox jumps over the lazy dog\n" * 99, b""),
        "header of zeros": (TIB, length, b""),
        "header of spaces": (TIB, length + b" " * room, b""),
        "header of an object and spaces": (TIB, length + b"{}".ljust(room), b""),
        "header of one string": (TIB, length + b'{"a":"' + b"x" * (room - 8) + b'"}', b""),
        "header of lists": (TIB, length + b'{"a":[' + b"[]," * ((room - 10) // 3), b""),
        "header of metadata": (TIB, length + b'{"__metadata__":{' + b'"a":"",' * ((room - 20) // 7), b""),
        "safetensors of others": (4 * GIB, (100).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}}'.ljust(100), b""),
        "a golden header": (TIB, head[:8] + GOLDEN[0].read_bytes()[8:4096], b""),
        "a header that claims all": (tib, head, b""),
        "a header and a footer that claim all": (tib, head, sealed + tib.to_bytes(8, "little")),
        "the same, 4 GiB": (gib, short, sealed + gib.to_bytes(8, "little")),
    }


def attempt(_: int, index: int, folder: Path) -> dict:
    """One way to open one file, in the library and on the command line."""
    from vqrs import cli

    path, names = folder / "foreign.safetensors", list(sorts())
    name = names[index // (len(WAYS) + 1) % len(names)]
    length, start, end = sorts()[name]
    with open(path, "wb") as file:
        file.truncate(length)
        file.write(start)
        file.seek(length - len(end))
        file.write(end)
    way = index % (len(WAYS) + 1)
    output, base = io.StringIO(), memory("VmRSS")
    forget_peak()
    begin = time.perf_counter()
    try:
        if way == len(WAYS):
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                code = cli.main(["info", str(path)])
            found = "refused" if code == 1 and "foreign.safetensors" in output.getvalue() else f"exit code {code}"
        else:
            mode, verify = WAYS[way]
            vqrs.open(path, verify=verify, mode=mode).close()
            found = "opened"
    except (vqrs.TableCorruptError, MemoryError):
        found = "refused"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    seconds, peak = time.perf_counter() - begin, memory("VmHWM") - base
    return {"found": found, "seconds": seconds, "peak": peak, "file": name, "way": way}


def foreign(count: int, _: np.random.Generator, folder: Path) -> Outcome:
    """The time is held in the full count alone: a laden machine is no fault."""
    outcome, slowest, largest = Outcome(), 0.0, 0
    for record in watched("benches.faults.foreign", "attempt", 0, count, folder):
        found = record.get("failed") or record["found"]
        held = found == "refused"
        if held:
            slowest, largest = max(slowest, record["seconds"]), max(largest, record["peak"])
            if record["peak"] > MEMORY or (count >= FAULTS[0].full and record["seconds"] > SECONDS):
                held, found = False, f"{1000 * record['seconds']:.0f} ms, {record['peak'] >> 20} MiB"
        outcome.add(held, f"try {record['index']}, {record.get('file')}, way {record.get('way')}: {found}")
    outcome.note = f"at most {1000 * slowest:.0f} ms and {largest / 1e6:.0f} MB"
    return outcome


def needs() -> str | None:
    """Sparse files of a terabyte."""
    try:
        with tempfile.TemporaryFile() as file:
            file.truncate(TIB)
            few = os.fstat(file.fileno()).st_blocks * 512 < 1 << 20
    except OSError as error:
        return f"no sparse files of 1 TiB here: {error}"
    return None if few else "files are not sparse here"


FAULTS = [
    Fault(
        "R24",
        "a sparse file of 1 TiB with a small header, a file of 4 GiB of another sort, opened in every way",
        "answered in 100 ms, under 50 MB",
        foreign,
        112,
        1_120,
        needs=needs,
    )
]
