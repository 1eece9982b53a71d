"""``python -m benches.compare error | kmeans | report``: vqrs beside Faiss and scikit-learn."""

import argparse
import os
from pathlib import Path


def use_best_blas() -> None:
    """Lets the OpenBLAS inside Faiss use AVX-512 where it would not know the CPU; read when it loads."""
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx512f" in flags.read_text():
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def set_threads(threads: int) -> None:
    """The same number for every library; read when they load."""
    for name in ("VQRS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def compare_errors(options: argparse.Namespace) -> None:
    """Prints and keeps one line a pair."""
    from . import datasets, report, run

    x = datasets.load(options.dataset)
    print(f"{options.dataset}: {x.shape[0]:,} x {x.shape[1]} float32, {x.nbytes:,} bytes")
    print(report.error_header())
    records = []
    for record in run.run_errors(options.dataset, x, options.threads, options.repeat):
        run.keep("error", record)
        records.append(record)
        print(report.error_line(record), flush=True)
    print(report.surroundings_line(records[0]))


def compare_kmeans(options: argparse.Namespace) -> None:
    """Prints and keeps one line a data set."""
    from . import datasets, report, run

    print(report.kmeans_header())
    for name, x in datasets.at_hand(3).items():
        for record in run.run_kmeans(name, x, options.threads):
            run.keep("kmeans", record)
            print(report.kmeans_line(record), flush=True)
    print(report.surroundings_line(record))


def show(options: argparse.Namespace) -> None:
    """Prints the records of a file again, and plots the errors."""
    from . import report

    records = report.read(options.file)
    errors = "pair" in records[0]
    print(report.error_header() if errors else report.kmeans_header())
    for record in records:
        print(report.error_line(record) if errors else report.kmeans_line(record))
    if errors:
        picture = options.file.with_suffix(".png")
        report.plot(records, picture)
        print(f"plot: {picture}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.compare", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every library")
    commands = parser.add_subparsers(required=True)
    error = commands.add_parser("error", help="relative errors beside Faiss's")
    error.add_argument("--dataset", default="minilm")
    error.add_argument("--repeat", type=int, default=1, help="times that each pair runs, interleaved")
    error.set_defaults(do=compare_errors)
    kmeans = commands.add_parser("kmeans", help="inertia and labels beside scikit-learn's")
    kmeans.set_defaults(do=compare_kmeans)
    again = commands.add_parser("report", help="print and plot a file of results")
    again.add_argument("file", type=Path)
    again.set_defaults(do=show)
    options = parser.parse_args()
    use_best_blas()
    set_threads(options.threads)
    options.do(options)


main()
