"""The Rust tests under tools that watch each access (R21), and threads under one that watches their order (R13).

The tests of the kernels put all slices before pages that cannot be read, on any machine and without a tool: see
``rust/core/src/kernels/fence.rs``. What is here needs a toolchain, and takes minutes: ``make sanitize``.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import Fault, Outcome

ROOT = Path(__file__).parents[2]
TARGET = "x86_64-unknown-linux-gnu"

SIGNALS = ["--skip", "table::map", "--skip", "kernels::fence"]
"""Tests that start themselves again to see which signal ends them: the tools catch those."""


def tests(command: list[str], environment: dict[str, str], outcome: Outcome, what: str) -> None:
    """Runs tests of Rust; each is one injection. A report of a tool ends them, and counts as one that did not hold."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    results = re.findall(r"^test result: \w+\. (\d+) passed; (\d+) failed", done.stdout, re.MULTILINE)
    passed = sum(int(good) for good, _ in results)
    outcome.tried, outcome.held = outcome.tried + passed, outcome.held + passed
    for name in re.findall(r"^test (\S+) \.\.\. FAILED", done.stdout, re.MULTILINE):
        outcome.add(False, f"{what}: {name}")
    if done.returncode != 0 or passed == 0:
        report = re.search(r"(==\d+==|WARNING: |ERROR: )[\s\S]{0,1500}", done.stderr)
        outcome.add(False, f"{what}: ended with {done.returncode}: {report[0] if report else done.stderr[-600:]}")


def test_programs(environment: dict[str, str], arguments: list[str]) -> list[str]:
    """Builds tests and tells where they are."""
    command = ["cargo", "test", *arguments, "--no-run", "--message-format=json"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the tests cannot be built: {done.stderr[-600:]}")
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [one["executable"] for one in said if one.get("executable")]


def address(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """All tests of the core with the address and leak sanitizers, each instruction set of this CPU among them."""
    outcome = Outcome(note="address and leak sanitizer of nightly Rust")
    environment = sanitized("address") | {"VQRS_TEST_FENCE": "0", "PROPTEST_CASES": str(count)}
    command = ["cargo", "+nightly", "test", "--target", TARGET, "-p", "vqrs-core", "--tests", "--no-fail-fast", "--"]
    tests([*command, *SIGNALS], environment, outcome, "address sanitizer")
    return outcome


def order(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """The test that threads share tables in, with the thread sanitizer; once for each time that is wanted."""
    outcome = Outcome(note="thread sanitizer of nightly Rust")
    environment = sanitized("thread") | {"TSAN_OPTIONS": "exitcode=66"}
    # With the standard library built for it as well: of a ready-made one it does not see the locks, and reports what
    # they order.
    command = ["cargo", "+nightly", "test", "-Zbuild-std", "--target", TARGET, "-p", "vqrs-core", "--test", "threads"]
    for _ in range(count):
        tests(command, environment, outcome, "thread sanitizer")
    return outcome


def sanitized(sanitizer: str) -> dict[str, str]:
    return {
        "RUSTFLAGS": f"-Zsanitizer={sanitizer}",
        "CARGO_TARGET_DIR": str(ROOT / "target" / f"{sanitizer}-sanitizer"),
        # Without some optimisation, vector instructions become calls.
        "CARGO_PROFILE_DEV_OPT_LEVEL": "1",
    }


def memcheck(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Kernels, decoders and tables under valgrind, which knows no AVX-512: the CPU that it shows has none either."""
    outcome = Outcome(note="valgrind memcheck, scalar and AVX2")
    environment = {"VQRS_TEST_FENCE": "0", "PROPTEST_CASES": str(count)}
    (program,) = test_programs({}, ["--release", "-p", "vqrs-core", "--lib"])
    valgrind = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full"]
    valgrind += ["--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]
    for simd in ["scalar", "avx2"]:
        command = [
            *valgrind,
            program,
            "--test-threads=1",
            *SIGNALS,
            "kernels::",
            "algo::levels",
            "algo::trellis",
            "bits::",
        ]
        tests(command, environment | {"VQRS_SIMD": simd}, outcome, f"valgrind, {simd}")
    return outcome


def miri(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """The scalar core in Rust's interpreter, which knows what is undefined."""
    outcome = Outcome(note="Miri, scalar path")
    command = ["cargo", "+nightly", "miri", "test", "-p", "vqrs-core", "--lib", "kernels::", "bits::"]
    tests(command, {"MIRIFLAGS": "-Zmiri-disable-isolation"}, outcome, "Miri")
    return outcome


def found(*programs: list[str]) -> Callable[[], str | None]:
    """A ``needs``: each of these commands must succeed."""

    def needs() -> str | None:
        if "PYTEST_CURRENT_TEST" in os.environ:
            return "takes minutes: make sanitize does"
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            return "runs on Linux on x86-64"
        for program in programs:
            started = shutil.which(program[0]) and subprocess.run(program, capture_output=True, check=False)
            if not started or started.returncode != 0:
                return f"{' '.join(program)} does not run here"
        return None

    return needs


def without_library() -> str | None:
    """The thread sanitizer needs the sources of Rust's library."""
    reason = found(NIGHTLY)()
    if reason:
        return reason
    asked = subprocess.run(["rustc", "+nightly", "--print", "sysroot"], capture_output=True, text=True, check=True)
    there = (Path(asked.stdout.strip()) / "lib/rustlib/src/rust/library/Cargo.toml").exists()
    return None if there else "needs the sources of Rust's library: rustup component add rust-src --toolchain nightly"


NIGHTLY = ["cargo", "+nightly", "--version"]
FAULTS = [
    Fault(
        "R13",
        "threads that share tables, under the thread sanitizer",
        "no race",
        order,
        1,
        5,
        part="sanitizer",
        needs=without_library,
    ),
    Fault(
        "R21",
        "all tests of the core under the address and leak sanitizers, with AVX-512 where the CPU has it",
        "clean",
        address,
        1,
        50,
        part="address",
        needs=found(NIGHTLY),
    ),
    Fault(
        "R21",
        "kernels, levels and trellis codes under valgrind",
        "clean",
        memcheck,
        1,
        4,
        part="valgrind",
        needs=found(["valgrind", "--version"], ["cargo", "--version"]),
    ),
    Fault(
        "R21",
        "the scalar core under Miri",
        "clean",
        miri,
        1,
        1,
        part="miri",
        needs=found(["cargo", "+nightly", "miri", "--version"]),
    ),
]
