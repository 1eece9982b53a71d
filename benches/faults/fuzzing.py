"""Fuzzing (R4): opening files and looking rows up, in Python by a mutator that knows the structure, and in Rust by
cargo-fuzz with the address sanitizer (``make fuzz`` builds its targets).
"""

import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np

from . import Fault, Outcome
from ._files import GOLDEN, layout
from ._mutate import Mutator, reseal
from ._watched import LIMIT, watched
from .headers import golden, probe

FUZZ = Path(__file__).parents[2] / "rust" / "fuzz"
TARGETS = ["raw", "header", "decoder"]


def scratched(content: bytes, random: np.random.Generator) -> bytes:
    """A file with bytes changed, cut out, doubled or put in; every other one sealed again."""
    size, tensors, _ = layout(content)
    data = bytearray(content)
    for _ in range(int(random.integers(1, 6))):
        end = int(random.choice([200, len(content[:size].rstrip()), len(data)]))
        start, length = int(random.integers(max(end, 1))), int(random.integers(1, 9))
        what = random.integers(4)
        if what == 0:
            data[start : start + length] = random.bytes(length)
        elif what == 1:
            data[start] = int(random.choice(np.frombuffer(b'0123456789{}[]",:-e.', np.uint8)))
        elif what == 2:
            del data[start : start + length]
        else:
            data[start:start] = data[start : start + length]
    if random.random() < 0.5 and len(data) > size:
        # What was taken out or put in is made up for in the padding, so that what follows keeps its place.
        room = len(content) - len(data)
        data[size - 8 : size - 8] = b" " * max(room, 0)
        if room < 0 and not bytes(data[size - 8 : size - room]).strip():
            del data[size - 8 : size - 8 - room]
        return reseal(bytes(data), tensors["vqrs.blocks"]["shape"][0])
    return bytes(data)


def attempt(seed: int, index: int, folder: Path) -> dict:
    path, random = folder / "fuzzed.safetensors", np.random.default_rng([seed, max(index, 0)])
    content = golden()[int(random.integers(len(GOLDEN)))]
    if index >= 0:
        content = scratched(content, random) if index % 3 == 0 else Mutator(random).file(content)
    path.write_bytes(content)
    begin = time.perf_counter()
    return {"found": probe(path, folder), "seconds": time.perf_counter() - begin}


def in_python(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Through ``vqrs.open``, in a process that is watched."""
    outcome, seed, opened, slowest = Outcome(), int(random.integers(1 << 30)), 0, 0.0
    for record in watched("benches.faults.fuzzing", "attempt", seed, count, folder):
        found = record.get("failed") or record["found"]
        opened += found == "opened"
        slowest = max(slowest, record.get("seconds", LIMIT))
        outcome.add(found in ("refused", "opened"), f"seed {seed}, try {record['index']}: {found}")
    outcome.note = f"{opened:,} opened; at most {slowest:.2f} s"
    return outcome


def built(target: str) -> Path | None:
    """The program of a fuzz target, where it was built."""
    folder = Path(os.environ.get("CARGO_TARGET_DIR", FUZZ / "target"))
    return next(iter(folder.glob(f"*/release/{target}")), None)


def in_rust(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Each target a third of the inputs, from the corpus that is kept; what is found on the way is not."""
    outcome = Outcome()
    for number, target in enumerate(TARGETS):
        runs = count // len(TARGETS) + (number < count % len(TARGETS))
        found = folder / target
        found.mkdir()
        command = [str(built(target)), f"-runs={runs}", f"-seed={random.integers(1, 1 << 30)}", "-timeout=20"]
        command += ["-rss_limit_mb=2048", "-print_final_stats=1", "-max_len=8192", f"-artifact_prefix={found}/failed-"]
        command += [f"-dict={FUZZ / 'words.dict'}", str(found), str(FUZZ / "corpus" / target)]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        done = re.search(r"stat::number_of_executed_units:\s*(\d+)", ended.stderr)
        tried = int(done[1]) if done else 0
        outcome.tried += tried
        outcome.held += tried
        if ended.returncode != 0 or tried < runs:
            outcome.add(False, f"{' '.join(command)}: {ended.stderr[-1500:]}")
    return outcome


def needs() -> str | None:
    """Programs that cargo-fuzz built."""
    if all(map(built, TARGETS)):
        return None
    return "the fuzz targets are not built: `make fuzz` does it, with cargo-fuzz and a nightly compiler"


FAULTS = [
    Fault(
        "R4",
        "files that a fuzzer makes, opened and used (cargo-fuzz, address sanitizer)",
        "no crash, no hang",
        in_rust,
        3_000,
        10_000_000,
        part="in Rust",
        needs=needs,
    ),
    Fault(
        "R4",
        "files that a mutator makes which knows their structure, opened and used through `vqrs.open`",
        "no crash, no hang, no other exception",
        in_python,
        300,
        50_000,
        part="in Python",
    ),
]
