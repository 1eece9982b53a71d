"""One process for each setting that libraries read when they load: threads, instruction set, BLAS."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import vqrs

from ..surroundings import keep, surroundings
from .measure import Job, WrongAnswer, measure

Family = Callable[[int], Iterator[Job]]

THREAD_COUNTS = ("VQRS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Setting:
    """``best_blas``: Faiss's OpenBLAS is told a core that it knows; otherwise everything is as pip installs it."""

    threads: int
    simd: str
    best_blas: bool

    def environment(self) -> dict[str, str]:
        """The variables of the process; what others set for OpenBLAS is taken out."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
        counts = dict.fromkeys(THREAD_COUNTS, str(self.threads))
        # The wheel's OpenBLAS is older than this generation of processors and would take plain SSE code.
        known = {"OPENBLAS_CORETYPE": best_core()} if self.best_blas else {}
        return clean | counts | known | {"VQRS_SIMD": self.simd}

    def __str__(self) -> str:
        blas = "" if self.best_blas else ", BLAS as installed"
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {self.simd}{blas}"


def best_core() -> str:
    """The OpenBLAS name of a core with what this processor has."""
    return "SkylakeX" if "avx512" in vqrs.hardware()["available"] else "Haswell"


def instruction_sets() -> list[str]:
    """The fastest of this machine, and AVX2 where that is another."""
    available = vqrs.hardware()["available"]
    return [available[-1]] + ["avx2"] * ("avx2" in available[:-1])


def families() -> dict[str, Family]:
    """The jobs by name, in the order of the document."""
    from . import clustering, coding, lookups

    listed = [
        lookups.product_lookup,
        lookups.small_lookup,
        lookups.residual_lookup,
        lookups.pool,
        lookups.scalar_lookup,
        lookups.mapped_lookup,
        lookups.opening,
        clustering.assignment,
        clustering.predict,
        clustering.kmeans,
        clustering.kmeans_narrow,
        clustering.mini_batch,
        coding.product_fit,
        coding.product_encode,
        coding.residual_encode,
        coding.product_beside_nanopq,
    ]
    return {family.__name__: family for family in listed}


# These call BLAS in Faiss, or are scikit-learn's, which is best as it is installed.
AS_INSTALLED = ("kmeans", "kmeans_narrow")


def run(options: Any) -> None:
    """The parent: starts a process a setting, one after the other."""
    if options.setting:
        return run_one(options)
    unknown = options.job and set(options.job) - set(families())
    if unknown:
        raise SystemExit(f"no job {', '.join(unknown)}; there are {', '.join(families())}")
    name = f"speed-{time.strftime('%Y-%m-%dT%H-%M-%S', time.gmtime())}{'-quick' * options.quick}"
    simds = options.simd or instruction_sets()
    settings = [Setting(threads, simd, True) for threads in options.threads for simd in simds]
    if not options.job or set(options.job) & set(AS_INSTALLED):
        settings += [Setting(threads, simds[0], False) for threads in options.threads]
    command = [sys.executable, "-m", "benches.compare", "speed", "--name", name]
    command += ["--seconds", str(options.seconds)] + ["--quick"] * options.quick
    command += ["--job", *options.job] if options.job else []
    begin = time.perf_counter()
    failed = []
    for setting in settings:
        print(f"-- {setting}", flush=True)
        child = subprocess.run([*command, "--setting", json.dumps(asdict(setting))], env=setting.environment())
        failed += [str(setting)] * (child.returncode != 0)
    print(f"{time.perf_counter() - begin:.0f} s; kept in benches/compare/results/{name}.jsonl")
    if failed:
        raise SystemExit(f"not everything ran with {'; '.join(failed)}: see above")


def run_one(options: Any) -> None:
    """The child: all jobs of one setting, a line each."""
    from . import document

    warnings.filterwarnings("ignore", category=UserWarning)
    setting = Setting(**json.loads(options.setting))
    set_threads(setting.threads)
    common = {**surroundings(setting.threads), "setting": asdict(setting), "quick": options.quick}
    wrongs = 0
    for name, family in families().items():
        if (options.job and name not in options.job) or (not setting.best_blas and name not in AS_INSTALLED):
            continue
        # A quick run shrinks tables and budgets tenfold: it shows that all works, not how fast.
        for job in family(10 if options.quick else 1):
            seconds = options.seconds / (10 if options.quick else 1)
            try:
                measured = measure(job, setting.threads, seconds)
            except WrongAnswer as wrong:
                print(f"WRONG: {name}: {job.case}: {wrong}", flush=True)
                wrongs += 1
                continue
            record = {**common, "job": name, "about": (family.__doc__ or "").strip(" ."), **measured}
            keep(options.name, record)
            print(document.line(record), flush=True)
    if wrongs:
        raise SystemExit(1)


def set_threads(threads: int) -> None:
    """Libraries that do not read a variable."""
    from .lookups import faiss, torch

    if torch:
        torch.set_num_threads(threads)
    if faiss:
        faiss.omp_set_num_threads(threads)
