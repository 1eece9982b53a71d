"""Each instruction set that the kernels are written for, forced (R18), and CPUs that lack the newer ones, emulated."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import vqrs

from . import Fault, Outcome
from ._files import GOLDEN

ROOT = Path(__file__).parents[2]
QUIET = 600.0
"""Seconds after which a child hangs: an emulated one takes a minute on a slow machine."""

EMULATOR = "qemu-x86_64-static"
CPUS = {"Nehalem": "scalar", "SandyBridge": "scalar", "Haswell-noTSX": "avx2"}
"""CPUs of the emulator, and what must run there: without AVX, without AVX2, without AVX-512."""


def workload() -> dict[str, object]:
    """What every path must answer alike, as short texts: codes, decoded rows and files of every kind, lookups in all
    types, pools, and searches, whose order of addition is that of the scalar path.
    """

    def digest(*arrays: np.ndarray) -> str:
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]

    random = np.random.default_rng(0)
    x = random.normal(size=(150, 24)).astype(np.float32)
    ids = random.integers(-150, 150, size=70)
    small = {
        "product": {"n_subvectors": 6, "n_bits": 4},
        "optimized-product": {"n_subvectors": 4, "n_bits": 3},
        "residual": {"n_stages": 2, "n_bits": 4},
        "product-residual": {"n_bits": 3},
        "additive": {"n_codebooks": 2, "n_bits": 3, "n_rounds": 2},
        "tree": {"branching": 4},
        "low-rank": {"n_components": 9},
        "trellis": {"state_bits": 6},
        "kmeans": {"n_clusters": 20},
    }
    found: dict[str, object] = {}
    for kind in vqrs.kinds():
        name = kind["name"]
        table = vqrs.compress(x, method=name, random_state=3, **small.get(name, {}))
        table.save(path := Path("table.safetensors"), durable=False)
        rows, half = table.to_numpy(), table.lookup(ids, dtype="float16")
        pools = [table.pool(ids.reshape(10, 7), mode=mode) for mode in ("sum", "mean", "max")]
        scores, best = table.search(x[:3], 5)
        found[name] = [digest(table.codes), digest(rows), path.stat().st_size, digest(table[ids], half, *pools)]
        found[f"{name} search"] = [digest(scores), best.tolist()]
        with vqrs.open(path, verify="full") as again:
            found[f"{name} opened"] = digest(again.to_numpy())
        found[f"{name} file"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for path in GOLDEN:
        with vqrs.open(path, verify="full") as table:
            found[path.name] = digest(table.to_numpy())
    return found


def child(prefix: list[str], folder: Path, simd: str | None, program: str = "answer") -> subprocess.CompletedProcess:
    """This module again in a process of its own, on another path or under an emulator."""
    environment = {name: value for name, value in os.environ.items() if name != "VQRS_SIMD"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(vqrs.__file__).parents[1]), str(ROOT)])}
    environment |= {} if simd is None else {"VQRS_SIMD": simd}
    # The linear algebra inside numpy takes CPUs by their names: an emulated one has not all that its name promises.
    environment |= {"OPENBLAS_CORETYPE": "Nehalem"} if prefix else {}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "VQRS_NUM_THREADS": "2"}
    command = [*prefix, sys.executable, "-m", "benches.faults.instruction_sets", program]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=QUIET, check=False
    )


def compare(outcome: Outcome, done: subprocess.CompletedProcess, simd: str, expected: dict, where: str) -> None:
    """Counts each answer of a child against those of this process."""
    if done.returncode != 0:
        outcome.add(False, f"{where}: ended with {done.returncode}: {done.stderr[-300:]}")
        return
    ran, answers = json.loads(done.stdout.splitlines()[-1])
    outcome.add(ran == simd, f"{where}: ran {ran}, expected {simd}")
    outcome.add(answers.keys() == expected.keys(), f"{where}: other tables")
    for name, answer in answers.items():
        outcome.add(answer == expected.get(name), f"{where}, {name}: {answer}, expected {expected.get(name)}")


def reference(folder: Path) -> dict:
    done = child([], folder, "scalar")
    if done.returncode != 0:
        raise RuntimeError(f"the scalar path ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])[1]


def forced(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Every path that this CPU has, and names that it has not: those say so and run the best one."""
    outcome, expected = Outcome(), reference(folder)
    available = vqrs.hardware()["available"]
    for simd in available:
        compare(outcome, child([], folder, simd), simd, expected, f"VQRS_SIMD={simd}")
    for simd in ["avx2", "avx512", "neon", "abacus", "SCALAR"]:
        if simd in available:
            continue
        done = child([], folder, simd)
        outcome.add(f"VQRS_SIMD={simd} is not available here" in done.stderr, f"VQRS_SIMD={simd}: {done.stderr[-200:]}")
        compare(outcome, done, available[-1], expected, f"VQRS_SIMD={simd}")
    outcome.note = f"{', '.join(available)}: {len(expected)} answers each"
    return outcome


def emulated(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """CPUs without AVX and without AVX-512: an instruction that they lack ends the child."""
    outcome, expected = Outcome(), reference(folder)
    for cpu, simd in list(CPUS.items())[:count]:
        prefix = [EMULATOR, "-cpu", cpu]
        compare(outcome, child(prefix, folder, None), simd, expected, f"CPU {cpu}")
        # The newest instructions asked for by name all the same.
        asked = child(prefix, folder, "avx512", "start")
        outcome.add(
            asked.returncode == 0 and simd in asked.stdout, f"CPU {cpu}, VQRS_SIMD=avx512: {asked.stderr[-200:]}"
        )
    outcome.note = f"{EMULATOR}: {', '.join(list(CPUS)[:count])}"
    return outcome


def suites(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """The whole suites, Rust and Python, with each path forced; each test is one injection."""
    outcome, notes = Outcome(), []
    python = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests"]
    python += ["--ignore=tests/torch", "--deselect=tests/test_faults.py"]
    for simd in vqrs.hardware()["available"]:
        for what, command, pattern in [
            (
                "Rust",
                ["cargo", "test", "--release", "-p", "vqrs-core"],
                r"^test result: \w+\. (\d+) passed; (\d+) failed",
            ),
            ("Python", python, r"(\d+) (passed|failed|error)"),
        ]:
            environment = os.environ | {"VQRS_SIMD": simd}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if what == "Rust":
                passed = sum(int(found[1]) for found in re.finditer(pattern, done.stdout, re.MULTILINE))
            else:
                passed = sum(
                    int(number) for number, word in re.findall(pattern, done.stdout[-400:]) if word == "passed"
                )
            outcome.tried, outcome.held = outcome.tried + passed, outcome.held + passed
            if done.returncode != 0 or passed == 0:
                outcome.add(False, f"{what}, {simd}: {(done.stdout + done.stderr)[-600:]}")
            notes.append(f"{what} {simd} {passed}")
    outcome.note = "tests: " + ", ".join(notes)
    return outcome


def without_emulator() -> str | None:
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "emulates x86-64 CPUs on an x86-64 Linux"
    return None if shutil.which(EMULATOR) else f"{EMULATOR} is not installed (package qemu-user-static)"


def without_sources() -> str | None:
    if "PYTEST_CURRENT_TEST" in os.environ:
        return "runs the suites: make faults does"
    return None if shutil.which("cargo") else "cargo is not installed"


FAULTS = [
    Fault(
        "R18", "each instruction set forced by VQRS_SIMD", "the same bytes as the scalar one", forced, 60, 60, slow=True
    ),
    Fault(
        "R18",
        "a CPU without AVX, and one without AVX-512, emulated",
        "the same bytes, no instruction that it lacks",
        emulated,
        1,
        len(CPUS),
        part="emulated",
        slow=True,
        needs=without_emulator,
    ),
    Fault(
        "R18",
        "each instruction set forced by VQRS_SIMD, the whole suites",
        "green",
        suites,
        1,
        1,
        part="suites",
        needs=without_sources,
    ),
]

if __name__ == "__main__":
    answers = workload() if sys.argv[1] == "answer" else {}
    print(json.dumps([vqrs.hardware()["simd"], answers]))
