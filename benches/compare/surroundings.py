"""What a number depends on beside the method: machine, versions, commit."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import vqrs

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("vqrs", "numpy", "torch", "faiss-cpu", "scikit-learn", "nanopq")


def processor() -> str:
    """Name, family and model of the processor, as the system tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    numbers = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({numbers}), {os.cpu_count()} cores"


def caches() -> dict[str, str]:
    """Sizes of the caches of the first core."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"vqrs": vqrs.__version__} | found


def surroundings(threads: int) -> dict[str, Any]:
    """The fields that every record has."""
    here = Path(__file__).parent
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=here)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "machine": processor(),
        "caches": caches(),
        "versions": versions(),
        "hardware": vqrs.hardware(),
        "threads": threads,
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
    }


def keep(name: str, record: dict[str, Any]) -> None:
    """Appends a raw record to a file of results."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
