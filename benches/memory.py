"""A table larger than memory should hold: streamed from a memmap, opened, looked up, shared by two processes.

``python -m benches.memory --rows 10000000`` prints what each step took, in seconds and in bytes of memory, and one JSON
line. Each step runs in a process of its own, so that one does not hide the memory of another. Linux only: it reads
``/proc``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import vqrs

CHUNK = 100_000
SAMPLE = 65_536
LOOKUPS = 1_000
PAGE = 4_096


def status(field: str) -> int:
    """A figure of ``/proc/self/status`` in bytes: ``RssAnon``, ``VmRSS``, ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def anonymous() -> int:
    """Bytes of anonymous memory of this process, from ``/proc/self/smaps_rollup``."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise KeyError("Anonymous")


def mapping_of(path: str) -> dict[str, int]:
    """Bytes of a file's mapping in this process: resident, and its share of them (a page that k processes map: 1/k)."""
    sums = {"Rss": 0, "Pss": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, rest = line.partition(":")
        if "-" in field.split(" ")[0]:
            inside = line.endswith(path)
        elif inside and field in sums:
            sums[field] += int(rest.split()[0]) * 1024
    return sums


class AnonymousPeak:
    """Samples the anonymous memory of this process every 20 ms."""

    def __enter__(self) -> "AnonymousPeak":
        self.before = self.peak = status("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def make_rows(options: argparse.Namespace) -> dict[str, Any]:
    """Writes normal rows around 1,000 centres as a float16 ``.npy`` file, chunk by chunk."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((1_000, options.columns), dtype=np.float32)
    shape = (options.rows, options.columns)
    rows = np.lib.format.open_memmap(options.folder / "rows.npy", mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, options.rows, CHUNK):
        stop = min(start + CHUNK, options.rows)
        noise = rng.standard_normal((stop - start, options.columns), dtype=np.float32)
        rows[start:stop] = centers[rng.integers(0, len(centers), stop - start)] + 0.5 * noise
    rows.flush()
    return {"bytes": rows.nbytes}


def write_table(options: argparse.Namespace) -> dict[str, Any]:
    """Fits on a sample, then streams all rows from the memmap to the file."""
    rows = np.load(options.folder / "rows.npy", mmap_mode="r")
    sample = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE].astype(np.float32)
    quantizer = vqrs.ProductQuantizer(n_subvectors=options.columns // 8, n_bits=8, max_iter=10, random_state=0)
    begin = time.perf_counter()
    quantizer.fit(sample)
    fitted = time.perf_counter()
    with AnonymousPeak() as memory:
        table = quantizer.compress(rows, path=options.folder / "table.safetensors")
    return {
        "fit_s": fitted - begin,
        "compress_s": time.perf_counter() - fitted,
        "anonymous_added_peak": memory.peak - memory.before,
        "resident_peak_with_the_file_mapped": status("VmHWM"),
        "nbytes": table.nbytes,
        "ratio": table.ratio,
        "relative_error": table.relative_error,
    }


def open_table(options: argparse.Namespace) -> dict[str, Any]:
    """Opens the table and looks rows up, one call a row."""
    path = options.folder / "table.safetensors"
    vqrs.hardware()  # what loads once a process is not the table's
    before = anonymous()
    begin = time.perf_counter()
    table = vqrs.open(path)
    first = time.perf_counter() - begin
    ids = np.random.default_rng(1).integers(0, len(table), LOOKUPS)
    for row in ids:
        table[int(row)]
    added = anonymous() - before
    again = min(timed(lambda: vqrs.open(path).close()) for _ in range(20))
    return {"open_first_s": first, "open_s": again, "lookups": LOOKUPS, "anonymous_added": added}


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def hold_table(options: argparse.Namespace) -> dict[str, Any]:
    """Touches every page of the codes, waits until told that the other process has too, then counts."""
    path = str(options.folder / "table.safetensors")
    table = vqrs.open(path)
    rows_a_page = max(1, PAGE * len(table) // table.nbytes)
    table[np.arange(0, len(table), rows_a_page)[: len(table)]].sum()
    print("ready", flush=True)
    sys.stdin.readline()
    return mapping_of(path)


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "rows": make_rows,
    "write": write_table,
    "open": open_table,
    "hold": hold_table,
}


def start(step: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A step in a process of its own."""
    settings = ["--rows", str(options.rows), "--columns", str(options.columns), "--folder", str(options.folder)]
    command = [sys.executable, "-m", "benches.memory", "--step", step, *settings]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a step printed last."""
    answer, _ = process.communicate("go\n")
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(answer.splitlines()[-1])


def share(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two processes with the same table, both having touched all of it."""
    processes = [start("hold", options) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # ready
    # Both must stay alive until both have counted, else the pages of the last one are no longer shared.
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for process in processes if process.stdout]
    for process in processes:
        process.communicate("bye\n")
    return answers


def show(record: dict[str, Any]) -> None:
    """The figures beside their bounds."""
    write, opened, shared = record["write"], record["open"], record["shared"]
    mib = 1 / 2**20
    lines = [
        ("rows as float16", f"{record['rows']['bytes'] * mib:,.0f} MiB"),
        ("table", f"{write['nbytes'] * mib:,.0f} MiB, {write['ratio']:.1f}x, error {write['relative_error']:.4f}"),
        ("fit on a sample", f"{write['fit_s']:.1f} s"),
        ("stream all rows to the file", f"{write['compress_s']:.1f} s"),
        ("  anonymous memory that it added, at most", f"{write['anonymous_added_peak'] * mib:.1f} MiB"),
        (
            "open: first, best of 20 (bound 1 ms)",
            f"{opened['open_first_s'] * 1e3:.3f}, {opened['open_s'] * 1e3:.3f} ms",
        ),
        (f"open and {LOOKUPS:,} lookups, anonymous (bound 5 MB)", f"{opened['anonymous_added'] / 1e6:.2f} MB"),
        *(
            (f"process {i + 1} of 2: resident, its share", f"{part['Rss'] * mib:.1f}, {part['Pss'] * mib:.1f} MiB")
            for i, part in enumerate(shared)
        ),
    ]
    for label, value in lines:
        print(f"{label:<50}{value}")
    print(json.dumps(record))


def main() -> None:
    """Runs one step, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benches.memory", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options)), flush=True)
        if options.step == "hold":
            sys.stdin.readline()
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        record: dict[str, Any] = {"n_rows": options.rows, "n_features": options.columns}
        for step in ("rows", "write", "open"):
            record[step] = finish(start(step, options))
        record["shared"] = share(options)
    show(record)


if __name__ == "__main__":
    main()
