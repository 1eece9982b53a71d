"""Sizes beyond any memory, from arguments and files (R10): MemoryError or ValueError, never the end of the process.

``python -m benches.faults.memory FAMILY COUNT SEED FOLDER`` makes the calls of one family, each in a forked child whose
address space is limited, and prints a line of JSON for each.
"""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

import vqrs
from vqrs import _core

from . import Fault, Outcome
from ._files import GOLDEN

WATCHDOG_SECONDS = 120
LIMIT = 1 << 30
"""Bytes that a call may take beside what the process has: far more than small calls need, far less than large ones."""

KINDS = {kind["name"]: kind["parameters"] for kind in _core.kinds()}
LOOPS = {"max_iter", "n_refinements", "n_rounds", "n_searches", "n_perturbations"}
"""Parameters that are counts of rounds: their price is time."""


def size(random: np.random.Generator, most_bits: int = 66) -> int:
    """Powers of two and of ten with their neighbours."""
    power = 2 ** int(random.integers(most_bits))
    if random.random() < 0.3:
        power = 10 ** int(random.integers(most_bits // 3))
    return power + int(random.integers(-1, 2))


def index(random: np.random.Generator) -> int:
    return size(random) * (-1 if random.random() < 0.1 else 1)


def broadcast(random: np.random.Generator, value: object, *inner: int) -> np.ndarray:
    """An array of very many rows that takes no memory."""
    return np.broadcast_to(np.asarray(value), (max(0, size(random, 45)), *inner))


# ---- calls of arguments --------------------------------------------------------------------------------------------


def small_rows(random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(int(random.integers(20, 200)), int(random.integers(1, 17)))).astype(np.float32)


def parameters_of(kind: str, random: np.random.Generator) -> dict:
    """One or two of a kind's integers, and of another's behind it."""
    names = [name for name, value in KINDS[kind].items() if isinstance(value, int | float) and name not in LOOPS]
    names = [name for name in names if not isinstance(KINDS[kind][name], bool) and name not in ("tol", "noise")]
    chosen = random.choice(names, min(len(names), 2), replace=False)[: int(random.integers(1, 3))] if names else []
    found = {str(name): size(random) for name in chosen}
    if "max_iter" in KINDS[kind]:
        found["max_iter"] = 2
    if random.random() < 0.2:
        other = str(random.choice(list(KINDS)))
        found["residual"] = {"kind": other, "parameters": parameters_of(other, random)}
    if random.random() < 0.2:
        found["rotation"] = str(random.choice(["random", "dense", "pca"]))
    return found


def call_fit(random):
    kind = str(random.choice(list(KINDS)))
    parameters, x = parameters_of(kind, random), small_rows(random)
    return f"fit {kind} {parameters} {x.shape}", lambda: _core.fit(kind, parameters, x)


def call_estimate(random):
    kind = str(random.choice(list(KINDS)))
    parameters = parameters_of(kind, random)
    shape = size(random), size(random, 30)
    return f"estimate {shape} {kind} {parameters}", lambda: vqrs.estimate(*shape, kind, **parameters)


def call_compress(random):
    dim = int(random.integers(1, 65))
    x, way = broadcast(random, np.float32(1), dim), int(random.integers(4))
    ways = [
        lambda: vqrs.compress(x, method="scalar"),
        lambda: vqrs.compress(x, 8, effort="fast"),
        lambda: vqrs.compress(x, method="scalar", sample_weight=np.broadcast_to(1.0, len(x))),
        lambda: vqrs.KMeans(3, max_iter=2).fit(x),
    ]
    # What fits is work, not memory.
    if 1 << 16 < len(x) * dim < 1 << 29:
        x = x[: (1 << 16) // dim]
    return f"compress {x.shape} way {way}", ways[way]


def call_kmeans(random):
    x = np.zeros((0, 4), np.float32)
    while len(x) < 2:
        x = small_rows(random)
    names = ["n_clusters", "batch_size", "max_samples", "n_jobs"]
    parameters = {str(name): max(1, size(random)) for name in random.choice(names, 2, replace=False)}
    parameters = {"max_iter": 2, "n_clusters": 2} | parameters
    weights = np.broadcast_to(1.0, size(random, 40)) if random.random() < 0.2 else None
    return f"KMeans {parameters} {x.shape}", lambda: vqrs.KMeans(**parameters).fit(x, sample_weight=weights)


def call_distances(random):
    """All distances of rows to centres."""
    rows, clusters = 1 << int(random.integers(10, 18)), 1 << int(random.integers(1, 15))
    x = np.zeros((rows, 1), np.float32)
    centers = np.arange(clusters, dtype=np.float32)[:, None]
    metric = str(random.choice(["euclidean", "cosine"]))
    # What fits is work, not memory.
    if rows * clusters < 1 << 28:
        centers = centers[:16]
    return f"distances {rows} x {len(centers)}", lambda: _core.kmeans_transform(x, centers, metric)


def call_lookup(random):
    table, way = TABLES[int(random.integers(len(TABLES)))], int(random.integers(10))
    ids, number = broadcast(random, random.choice([np.int64(0), np.int32(1)])), index(random)
    other, jobs = index(random), max(1, size(random, 70))
    ways = {
        "lookup": lambda: table.lookup(ids),
        "lookup float16": lambda: table.lookup(ids.reshape(-1, 1), dtype="float16", n_jobs=jobs),
        "one": lambda: table[number],
        "list": lambda: table[[0, number]],
        "slice": lambda: table[number::other],
        "decode": lambda: table.decode(number, other),
        "mask": lambda: table[np.broadcast_to(np.bool_(True), ids.shape)],
        "search": lambda: table.search(np.broadcast_to(np.float32(1), (2, table.shape[1])), k=number),
        "queries": lambda: table.search(np.broadcast_to(np.float32(1), (*ids.shape, table.shape[1]))),
        "threads": lambda: table.lookup(np.zeros(300_000, np.int64), n_jobs=number),
    }
    name = list(ways)[way]
    # What fits is work, not memory.
    if name == "queries" and len(ids) * table.shape[1] < 1 << 29:
        ids = ids[:10]
    return f"{name} {ids.shape} {number} {other} of {table.kind} {table.shape}", ways[name]


def call_pool(random):
    table, way = TABLES[int(random.integers(len(TABLES)))], int(random.integers(5))
    ids, starts = broadcast(random, np.int64(0)), broadcast(random, np.int64(0))
    ways = {
        "ids": lambda: table.pool(ids),
        "offsets": lambda: table.pool([0, 1], starts),
        "weights": lambda: table.pool([0, 1], weights=np.broadcast_to(np.float32(1), starts.shape)),
        "bags": lambda: table.pool(np.broadcast_to(np.int64(0), (len(ids), 2)), mode="max"),
        "far": lambda: table.pool([0, 1], [0, len(ids)]),
    }
    name = list(ways)[way]
    return f"pool {name} {ids.shape} {starts.shape} of {table.kind}", ways[name]


def call_codec(random):
    codec, way = CODECS[int(random.integers(len(CODECS)))], int(random.integers(4))
    codes = broadcast(random, np.uint8(0), codec.row_bytes)
    x = broadcast(random, np.float32(1), codec.dim)
    # What fits is work, not memory.
    if len(x) > 1 << 12 and x.size < 1 << 29:
        x = x[: 1 << 12]
    few = np.zeros((9, codec.dim), np.float32)
    ways = {
        "decode": lambda: codec.decode(np.ascontiguousarray(codes)),
        "encode": lambda: codec.encode(np.ascontiguousarray(x)),
        "errors": lambda: _core.reconstruction_errors(few, np.ascontiguousarray(codes), codec),
        "table": lambda: _core.Table.from_codec(codec, np.ascontiguousarray(codes), errors={}),
    }
    name = list(ways)[way]
    return f"codec {name} {codec.kind} codes {codes.shape} x {x.shape}", ways[name]


def call_command(random):
    kind = str(random.choice(list(KINDS)))
    settings = [f"{name}={value}" for name, value in parameters_of(kind, random).items() if name != "residual"]
    path = Path(FOLDER) / "rows.npy"
    out = Path(FOLDER) / "rows.safetensors"
    arguments = ["compress", str(path), str(out), "--method", kind]
    arguments += [part for setting in settings for part in ("--set", setting)]

    def run():
        from vqrs.cli import main

        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            if main(arguments) not in (0, 1, 2):
                raise RuntimeError("another exit code")

    return f"vqrs {' '.join(arguments)}", run


def call_threads(random):
    value = str(size(random, 70))

    def run():
        os.environ["VQRS_NUM_THREADS"] = value
        TABLES[0].lookup(np.zeros(300_000, np.int64))
        vqrs.compress(np.ones((600, 3)), method="product")

    return f"VQRS_NUM_THREADS={value}", run


def call_state(random):
    value, x = index(random), small_rows(random)
    names = ["a" * min(size(random, 24), 1 << 24)] * len(x)
    ways = {
        "random_state": lambda: vqrs.compress(x, method="kmeans", n_clusters=2, random_state=value),
        "n_jobs": lambda: vqrs.compress(x, method="kmeans", n_clusters=2, n_jobs=value),
        "ratio": lambda: vqrs.compress(x, float(value), effort="fast"),
        "nbytes": lambda: vqrs.compress(x, nbytes=value, effort="fast"),
        "names": lambda: vqrs.compress(x, method="scalar", names=names),
        "metadata": lambda: vqrs.compress(x, method="scalar", metadata={"a": "b" * max(0, min(value, 1 << 28))}),
        "dims": lambda: vqrs.estimate(value, value),
        "k": lambda: TABLES[0].search(np.zeros(TABLES[0].shape[1]), k=value),
    }
    name = list(ways)[int(random.integers(len(ways)))]
    return f"{name} {value}", ways[name]


# ---- files that claim much -----------------------------------------------------------------------------------------


CLAIMANTS = ("hashed", "switch", "sparse")
"""Forms whose rows may be many, or wide, with few bytes of a file."""


def claimed(random: np.random.Generator) -> tuple[str, vqrs.Table]:
    """A golden table of another shape: more rows than anyone has, or wider ones."""
    paths = [path for path in GOLDEN if path.name.startswith(CLAIMANTS)] if random.integers(4) else GOLDEN
    path = paths[int(random.integers(len(paths)))]
    with vqrs.open(path) as table:
        description, tensors, codes = json.loads(table._core.info()), table._core.tensors(), table.codes
    rows, width = len(codes), codes.shape[1]
    if width == 0:
        rows = max(1, size(random, 41))
    decoder = description["decoder"]
    if decoder["form"] == "sparse":
        decoder["dim"] = int(random.choice([2**8, 2**16, 2**24, 2**26]))
    core = _core.Table.from_parts(json.dumps(description), tensors, np.zeros((rows, width), np.uint8), errors={})
    return f"{path.name} {rows} rows", vqrs.Table(core)


def call_claimed(random):
    what, table = "", None
    while table is None:
        with contextlib.suppress(ValueError):  # refused: claims less
            what, table = claimed(random)
    number, other, way = index(random), index(random), int(random.integers(9))
    ids = broadcast(random, np.int64(0))

    def iterate():
        for _, _row in zip(range(3), table, strict=False):
            pass

    ways = {
        "decode": lambda: table.decode(number, other),
        "to_numpy": lambda: table.to_numpy(),
        "asarray": lambda: np.asarray(table),
        "iterate": iterate,
        "lookup": lambda: table.lookup(ids),
        "pool": lambda: table.pool(ids),
        "slice": lambda: table[number::other],
        "info": lambda: (table.info(), repr(table), table.nbytes, table.ratio, table.codes),
        "mask": lambda: table[np.broadcast_to(np.bool_(True), len(table))],
    }
    name = list(ways)[way]
    # What fits is work, not memory.
    if name == "pool" and len(ids) > 1 << 20:
        ids = np.broadcast_to(np.int64(0), 1 << 40)
    return f"{name} {number} {other} {ids.shape} of {what}", (ways[name] if table is not None else lambda: None)


FAMILIES = {
    "arguments": [
        call_fit, call_fit, call_estimate, call_compress, call_kmeans, call_distances, call_lookup, call_lookup,
        call_pool, call_codec, call_command, call_threads, call_state,
    ],
    "files": [call_claimed],
}  # fmt: skip

TABLES: list[vqrs.Table] = []
CODECS: list[_core.Codec] = []
FOLDER = ""


def prepare(folder: str) -> None:
    global FOLDER
    FOLDER = folder
    x = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)
    np.save(Path(folder) / "rows.npy", x)
    for kind, extra in [("scalar", {}), ("product", {"n_subvectors": 4}), ("trellis", {}), ("sparse", {})]:
        codec, codes = _core.fit(kind, extra, x, n_jobs=1)
        CODECS.append(codec)
        TABLES.append(vqrs.Table(_core.Table.from_codec(codec, codes, errors={"relative": 0.1})))
    TABLES.extend(vqrs.open(path) for path in GOLDEN if path.name.startswith(("hashed", "switch", "join")))


# ---- children ------------------------------------------------------------------------------------------------------


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limited(call, limit: int) -> str:
    """What came of a call in a forked child of so much memory more: the name of an exception, or of a signal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with open(os.devnull, "wb") as silent:
            os.dup2(silent.fileno(), 2)
        most = address_space() + limit
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        answer = "fine"
        try:
            call()
        except BaseException as error:
            answer = f"{type(error).__name__}: {str(error)[:150]}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGABRT))
    signal.alarm(WATCHDOG_SECONDS)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    late = signal.alarm(0) == 0
    if os.WIFSIGNALED(status):
        return f"ended by signal {os.WTERMSIG(status)}" + " of the watchdog" * late
    return answer or f"ended with {os.waitstatus_to_exitcode(status)} and no answer"


HELD = ("fine", "MemoryError", "ValueError", "IndexError", "TableError", "TableCorruptError")


def serve(family: str, count: int, seed: int, folder: str) -> None:
    # Once here and not in every child.
    import vqrs.cli
    import vqrs.cluster
    import vqrs.quantizers  # noqa: F401

    warnings.simplefilter("ignore")
    prepare(folder)
    random = np.random.default_rng(seed)
    for number in range(count):
        makers = FAMILIES[family]
        what, call = makers[number % len(makers)](random)
        start = time.monotonic()
        answer = limited(call, LIMIT)
        print(json.dumps({"what": what, "answer": answer, "seconds": time.monotonic() - start}), flush=True)


def run_family(family: str, count: int, random: np.random.Generator, folder: Path) -> Outcome:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(vqrs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", __name__, family, str(count), str(random.integers(2**31)), str(folder)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    outcome, slowest = Outcome(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
        for line in server.stdout:
            answer = json.loads(line)
            slowest = max(slowest, answer["seconds"])
            outcome.add(answer["answer"].split(":")[0] in HELD, f"{answer['what']}: {answer['answer']}")
    if server.returncode:
        outcome.add(False, f"the server of the calls ended with {server.returncode}")
    outcome.note = f"address space limited to {LIMIT >> 20} MiB above the process's own; slowest call {slowest:.1f} s"
    return outcome


def of_arguments(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    return run_family("arguments", count, random, folder)


def of_files(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    return run_family("files", count, random, folder)


def needs() -> str | None:
    if not sys.platform.startswith("linux"):
        return "limits of the address space are set as Linux has them"
    return None


HOLDS = "MemoryError, ValueError or IndexError, never the end of the process"
FAULTS = [
    Fault("R10", "sizes in arguments beyond any memory", HOLDS, of_arguments, 130, 20_000, "arguments", needs=needs),
    Fault("R10", "sizes claimed by a table beyond any memory", HOLDS, of_files, 60, 10_000, "files", needs=needs),
]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
