"""``python -m benches.compare error | kmeans | speed | report``: vqrs beside its peers."""

import argparse
import os
from functools import partial
from pathlib import Path


def use_best_blas() -> None:
    """Lets the OpenBLAS inside Faiss use AVX-512 where it would not know the CPU; read when it loads."""
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx512f" in flags.read_text():
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def set_up(threads: int) -> None:
    """The same number for every library; read when they load."""
    use_best_blas()
    for name in ("VQRS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def compare_errors(options: argparse.Namespace) -> None:
    """Prints and keeps one line a pair."""
    set_up(options.threads)
    from . import datasets, report, run
    from .surroundings import keep

    x = datasets.load(options.dataset)
    print(f"{options.dataset}: {x.shape[0]:,} x {x.shape[1]} float32, {x.nbytes:,} bytes")
    print(report.error_header())
    records = []
    for record in run.run_errors(options.dataset, x, options.threads, options.repeat):
        keep(f"error-{record['date'][:10]}", record)
        records.append(record)
        print(report.error_line(record), flush=True)
    print(report.surroundings_line(records[0]))


def compare_kmeans(options: argparse.Namespace) -> None:
    """Prints and keeps one line a data set."""
    set_up(options.threads)
    from . import datasets, report, run
    from .surroundings import keep

    print(report.kmeans_header())
    for name, x in datasets.at_hand(3).items():
        for record in run.run_kmeans(name, x, options.threads):
            keep(f"kmeans-{record['date'][:10]}", record)
            print(report.kmeans_line(record), flush=True)
    print(report.surroundings_line(record))


def compare_rates(options: argparse.Namespace) -> None:
    """Runs what has no raw line yet."""
    set_up(options.threads)
    import vqrs

    from . import datasets, rates

    for name in options.dataset:
        x = datasets.DATASETS[name].load()
        if x is None:
            print(f"{name}: not at hand in {datasets.folder()}")
            continue
        kinds = options.kind if options.kind != ["all"] else [kind["name"] for kind in vqrs.kinds()]
        runs = {"peers": rates.run_peers, "ours": partial(rates.run_ours, kinds=kinds), "speeds": rates.run_speeds}
        for record in runs[options.side](name, x):
            rates.keep(record)
            print(rates.line(record), flush=True)


def measure_speed(options: argparse.Namespace) -> None:
    """Runs the jobs in a process for each setting."""
    from .speed import settings

    settings.run(options)


def show(options: argparse.Namespace) -> None:
    """Prints records again, and plots them; those of a whole run of speed go into docs/performance.md."""
    from . import report
    from .speed import document
    from .surroundings import RESULTS

    if [str(file) for file in options.file] == ["rates"]:
        from . import rates_report

        rates_report.write()
        print(rates_report.summary([record for record in rates_report.read() if "relative_error" in record]))
        return
    files = options.file or sorted(RESULTS.glob("speed-*[0-9].jsonl"))[-1:]
    if not files:
        raise SystemExit(f"nothing in {RESULTS}: run python -m benches.compare speed first")
    if files[0].name.startswith("speed"):
        records = document.read(files)
        print("\n\n".join(document.tables(records).values()))
        if not any(record["quick"] for record in records):
            document.write(records)
            document.plot(records, document.DOCUMENT.with_suffix(".png"))
        return
    options.file = files[0]
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
    commands = parser.add_subparsers(required=True)
    error = commands.add_parser("error", help="relative errors beside Faiss's")
    error.add_argument("--dataset", default="minilm")
    error.add_argument("--repeat", type=int, default=1, help="times that each pair runs, interleaved")
    error.set_defaults(do=compare_errors)
    kmeans = commands.add_parser("kmeans", help="inertia and labels beside scikit-learn's")
    kmeans.set_defaults(do=compare_kmeans)
    for command in (error, kmeans):
        command.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every library")
    rates = commands.add_parser("rates", help="error against bytes of all kinds and peers, 0.5 to 8 bits a value")
    rates.add_argument("--dataset", nargs="+", default=["glove", "minilm", "sift", "scifact", "gowalla"])
    rates.add_argument("--side", choices=["ours", "peers", "speeds"], default="ours")
    rates.add_argument("--kind", nargs="+", default=["all"], help="of ours")
    rates.add_argument("--threads", type=int, default=1, help="threads of every library")
    rates.set_defaults(do=compare_rates)
    speed = commands.add_parser("speed", help="times beside those of torch, numpy, Faiss, scikit-learn, nanopq")
    speed.add_argument("--job", nargs="+", help="only these; an unknown name lists them")
    speed.add_argument("--quick", action="store_true", help="a tenth of the rows and of the time: shows that all works")
    speed.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="a process each")
    speed.add_argument("--simd", nargs="+", help="a process each; the fastest and avx2 by default")
    speed.add_argument("--seconds", type=float, default=1.2, help="after which a job is repeated no more")
    speed.add_argument("--setting", help=argparse.SUPPRESS)
    speed.add_argument("--name", help=argparse.SUPPRESS)
    speed.set_defaults(do=measure_speed)
    again = commands.add_parser("report", help="print and plot results")
    again.add_argument("file", type=Path, nargs="*", help="by default the newest whole run of speed; or: rates")
    again.set_defaults(do=show)
    options = parser.parse_args()
    options.do(options)


main()
