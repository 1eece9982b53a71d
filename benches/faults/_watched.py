"""Tries in a child process, so that a crash, a hang or a leak of one is seen, counted and survived."""

import contextlib
import ctypes
import importlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 20.0
"""Seconds after which a try counts as hung."""


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since :func:`forget_peak`; 0 where nobody knows."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def forget_peak() -> None:
    """From here on ``VmHWM`` counts anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def child() -> None:
    """Runs ``function(seed, index, folder)`` for many indices; a line a try tells what it answered."""
    module, function, seed, start, count, folder = sys.argv[1:]
    run = getattr(importlib.import_module(module), function)
    run(int(seed), -1, Path(folder))  # what is imported or made once belongs to the baseline
    for index in range(int(start), int(count)):
        if index % 100 == 0 or index == int(start):  # what the allocator keeps of earlier tries is not this one's
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            base = memory("VmRSS")
        forget_peak()
        begin = time.perf_counter()
        record = run(int(seed), index, Path(folder))
        record.setdefault("seconds", time.perf_counter() - begin)
        print(json.dumps({"index": index, **record, "memory": memory("VmHWM") - base}), flush=True)


def watched(module: str, function: str, seed: int, count: int, folder: Path) -> Iterator[dict]:
    """The records of all tries; one that ended its process, or took too long, has ``"failed"``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    start, root = 0, str(Path(__file__).parents[2])
    while start < count:
        code = f"import sys; sys.path.insert(0, {root!r}); from benches.faults._watched import child; child()"
        command = [sys.executable, "-c", code, module, function, str(seed), str(start), str(count), str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as process:
            lines = process.stdout
            while select.select([lines], [], [], LIMIT if start else 6 * LIMIT)[0]:
                line = lines.readline()
                if not line.endswith(b"\n"):
                    break
                yield json.loads(line)
                start += 1
            else:
                process.kill()
            ended = process.wait()
        if start < count:
            yield {"index": start, "failed": f"the process ended with {ended}" if ended != -9 else "hung"}
            start += 1
