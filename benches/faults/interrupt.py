"""Ctrl-C at a random moment of calls that last (R20): answered, the object usable, nothing left behind.

``python -m benches.faults.interrupt SCALE COUNT SEED FOLDER`` makes the calls, each in a forked child of its own, and
prints a line of JSON for each.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import vqrs
from vqrs import _core

from . import Fault, Outcome

WATCHDOG_SECONDS = 60
"""Of a call from its signal on, on a machine that others load."""

ANSWERED_SECONDS = 0.2
"""Promised on a machine of one's own."""

KINDS = {
    "kmeans": {"n_clusters": 4096},
    "product": {"n_subvectors": 16},
    "optimized-product": {"n_subvectors": 16},
    "residual": {"n_stages": 6},
    "product-residual": {"n_subvectors": 4},
    "additive": {"n_codebooks": 4},
    "tree": {"branching": 32, "depth": 2},
    "scalar": {"dtype": "int4", "granularity": "block"},
    "low-rank": {"n_components": 64},
    "trellis": {},
    "rotated": {},
    "sparse": {},
    "deduplicating": {"tolerance": 0.1},
}
VARIANTS = [
    ("scalar", {"dtype": "int2", "granularity": "column"}),
    ("scalar", {"dtype": "free4"}),
    ("kmeans", {"n_clusters": 20_000}),
    ("product", {"n_subvectors": 8, "n_bits": 12}),
    ("tree", {"branching": 256, "depth": 2, "beam_width": 32}),
    ("trellis", {"bit_allocation": "variance", "rotation": "pca"}),
    ("product", {"n_subvectors": 8, "rotation": "pca", "residual": {"kind": "scalar", "parameters": {}}}),
]

SHAPES = {"small": [(30_000, 64), (1_000, 512)], "large": [(200_000, 128), (3_000, 2_048), (1_500_000, 8)]}
SHAPES["middle"] = SHAPES["large"]
LOOKED_UP = {"small": 2_000_000, "middle": 20_000_000, "large": 100_000_000}


class Work:
    """Calls that last, made from rows of a scale."""

    def __init__(self, scale: str, folder: Path, random: np.random.Generator) -> None:
        self.folder, self.random = folder, random
        self.rows = [random.normal(size=shape).astype(np.float32) for shape in SHAPES[scale]]
        self.n_ids = LOOKED_UP[scale]
        self.tables: list[vqrs.Table] = []
        for kind, extra in [("scalar", {}), ("product", {"n_subvectors": 4}), ("trellis", {}), ("rotated", {})]:
            x = self.rows[0][:5000, :8]
            codec, codes = _core.fit(kind, extra, np.ascontiguousarray(x), n_jobs=1)
            codes = np.tile(codes, (self.n_ids // len(codes), 1))
            table = vqrs.Table(_core.Table.from_codec(codec, codes, errors={"relative": 0.1}))
            path = folder / f"{kind}.safetensors"
            table.save(path, durable=False)
            self.tables.append(vqrs.open(path))
            del table, codes
        self.ids = random.integers(0, len(self.tables[0]), self.n_ids)
        self.short = self.ids.astype(np.int32)

    def make(self, number: int) -> tuple[str, Callable[[], object], Callable[[], object]]:
        """What it is, the call, and a small one that shows that the object is usable."""
        makers = [
            self.fit,
            self.fit,
            self.fit,
            self.read,
            self.read,
            self.keep,
            self.compress,
            self.clusters,
            self.encode,
        ]
        return makers[number % len(makers)]()

    def some_rows(self) -> np.ndarray:
        return self.rows[int(self.random.integers(len(self.rows)))]

    def estimator(self) -> tuple[str, Any]:
        if self.random.random() < 0.3:
            kind, parameters = VARIANTS[int(self.random.integers(len(VARIANTS)))]
        else:
            kind = str(self.random.choice(list(KINDS)))
            parameters = KINDS[kind]
        parameters = dict(parameters)
        from vqrs import quantizers

        known = (getattr(quantizers, name) for name in quantizers.__all__)
        classes = {cls._kind: cls for cls in known if hasattr(cls, "_kind")}
        if "residual" in parameters:
            parameters["residual"] = vqrs.ScalarQuantizer()
        jobs = [None, 1, 2][int(self.random.integers(3))]
        return f"{kind} {parameters} n_jobs={jobs}", classes[kind](**parameters, n_jobs=jobs)

    def fit(self):
        what, estimator = self.estimator()
        x = self.some_rows()
        small = np.ascontiguousarray(self.rows[0][:600])
        return f"fit {what} {x.shape}", lambda: estimator.fit(x), lambda: estimator.fit(small).transform(small)

    def encode(self):
        what, estimator = self.estimator()
        x = self.some_rows()
        small = np.ascontiguousarray(x[:600])
        jobs = estimator.n_jobs
        estimator.set_params(n_jobs=1)
        for name in ("n_clusters", "branching", "n_bits"):
            if getattr(estimator, name, None) and name != "n_bits":
                estimator.set_params(**{name: min(16, getattr(estimator, name))})
        estimator.fit(small)
        estimator.set_params(n_jobs=jobs)
        x = np.tile(x, (4, 1))
        way = int(self.random.integers(3))
        if way == 0:
            return f"transform {what} {x.shape}", lambda: estimator.transform(x), lambda: estimator.transform(small)
        if way == 1:
            return f"score {what} {x.shape}", lambda: estimator.score(x), lambda: estimator.score(small)
        codes = np.tile(estimator.transform(small), (len(x) // len(small) * 4, 1))
        again = codes[:5]
        call = lambda: estimator.inverse_transform(codes)  # noqa: E731
        return f"inverse_transform {what} {codes.shape}", call, lambda: estimator.inverse_transform(again)

    def clusters(self):
        x = self.some_rows()
        parameters = [
            {"n_clusters": 1000},
            {"n_clusters": 100, "init": "random", "n_init": 5},
            {"n_clusters": 3000, "metric": "cosine"},
            {"n_clusters": 500, "batch_size": 4096},
        ][int(self.random.integers(4))]
        parameters["n_clusters"] = min(len(x), parameters["n_clusters"])
        estimator = vqrs.KMeans(**parameters, n_jobs=[None, 1][int(self.random.integers(2))], random_state=0)
        small, way = np.ascontiguousarray(x[:600]), int(self.random.integers(3))
        again = vqrs.KMeans(20, random_state=0)
        if way == 0:
            return f"KMeans fit {parameters} {x.shape}", lambda: estimator.fit(x), lambda: again.fit(small)
        again.set_params(n_clusters=500).fit(small)
        if way == 1:
            x = np.tile(x, (4, 1))
            return f"KMeans predict {x.shape}", lambda: again.predict(x), lambda: again.predict(small)
        part = x[: 400_000_000 // (4 * 500)]
        return f"KMeans transform {part.shape}", lambda: again.transform(part), lambda: again.transform(small)

    def read(self):
        table = self.tables[int(self.random.integers(len(self.tables)))]
        jobs = [None, 1][int(self.random.integers(2))]
        out = np.empty((self.n_ids, 8), np.float32)
        ways = {
            "lookup": lambda: table.lookup(self.ids, n_jobs=jobs),
            "lookup out": lambda: table.lookup(self.ids, out=out, n_jobs=jobs),
            "lookup int32": lambda: table.lookup(self.short, n_jobs=jobs, dtype="float16"),
            "lookup from the end": lambda: table.lookup(self.short, out=out, n_jobs=jobs),
            "lookup one by one": lambda: [table[int(row)] for row in self.ids],
            "pool": lambda: table.pool(self.ids, n_jobs=jobs),
            "bags": lambda: table.pool(self.ids.reshape(-1, 4), mode="max", n_jobs=jobs),
            "search": lambda: table.search(np.ones((64, 8), np.float32), k=100, n_jobs=jobs),
            "to_numpy": lambda: table.to_numpy(),
            "iterate": lambda: sum(1 for _ in table),
        }
        name = str(self.random.choice(list(ways)))
        if name == "lookup from the end":
            self.short -= len(table) * (self.short[0] >= 0)
        return f"{name} of {table.kind} n_jobs={jobs}", ways[name], lambda: table[[0, 5, -1]]

    def keep(self):
        table = self.tables[int(self.random.integers(len(self.tables)))]
        path, durable = self.folder / "left" / "saved.safetensors", bool(self.random.integers(2))
        ways = {
            "save": lambda: table.save(path, durable=durable),
            "verify": table.verify,
            "open full": lambda: vqrs.open(table.path, verify="full"),
            "open full read": lambda: vqrs.open(table.path, verify="full", mode="read"),
            "open read": lambda: vqrs.open(table.path, mode="read"),
        }
        name = str(self.random.choice(list(ways)))
        return f"{name} of {table.kind}", ways[name], lambda: table[[0, 5, -1]]

    def compress(self):
        x, path = self.some_rows(), self.folder / "left" / "compressed.safetensors"
        if self.random.random() < 0.2:
            x = x.astype(np.float64)
        small = np.ascontiguousarray(x[:600, :16])
        effort = str(self.random.choice(["fast", "balanced", "best"]))
        frequency = self.random.zipf(1.3, len(x)).astype(np.float64)
        ways = {
            "compress": lambda: vqrs.compress(x, 10, effort=effort, random_state=0),
            "compress to a path": lambda: vqrs.compress(x, 10, effort=effort, path=path, random_state=0),
            "compress a kind to a path": lambda: vqrs.compress(x, method="product", path=path, random_state=0),
            "compress within an error": lambda: vqrs.compress(x, max_error=0.05, effort=effort, random_state=0),
            "tune": lambda: vqrs.tune(x, [4, 8, 16], random_state=0),
            "compress in groups": lambda: vqrs.compress(
                x, 10, method=vqrs.MixedPrecisionQuantizer(), sample_weight=frequency, random_state=0, path=path
            ),
        }
        name = str(self.random.choice(list(ways)))
        return f"{name} {effort} {x.shape} {x.dtype}", ways[name], lambda: vqrs.compress(small, method="scalar")


def whole(path: Path) -> bool:
    """Whether it is a table that was finished before the signal came."""
    if path.suffix != ".safetensors":
        return False
    vqrs.open(path, verify="full").close()
    return True


# ---- children ------------------------------------------------------------------------------------------------------


def interrupted(call, again, left: Path, delay: float) -> dict:
    """Runs a call in a forked child that gets SIGINT after a delay; tells when the answer came and what was left."""
    left.mkdir(exist_ok=True)
    for path in left.iterdir():
        path.unlink()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(writer, b"ready\n")
        answer: dict = {}
        try:
            try:
                call()
            finally:
                answer |= {"at": time.monotonic(), "cpu": time.process_time()}
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            answer["outcome"] = "finished"
        except KeyboardInterrupt:
            answer["outcome"] = "interrupted"
        except BaseException as error:
            answer["outcome"] = f"{type(error).__name__}: {str(error)[:200]}"
        os.write(writer, json.dumps(answer | {"usable": "still at work"}).encode() + b"\n")
        try:
            again()
            answer["usable"] = True
        except BaseException as error:
            answer["usable"] = f"{type(error).__name__}: {str(error)[:200]}"
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        pipe.read(6)
        time.sleep(delay)
        cpu = time.clock_gettime(~child << 3 | 2)
        sent = time.monotonic()
        os.kill(child, signal.SIGINT)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(WATCHDOG_SECONDS)
        text = b""
        while part := pipe.read():
            text += part
        signal.alarm(0)
    _, status = os.waitpid(child, 0)
    if not text:
        return {"outcome": f"ended with {os.waitstatus_to_exitcode(status)} and no answer"}
    answer = json.loads(text.splitlines()[-1])
    if "at" not in answer:  # the signal came just before the call, or just behind it
        return {"outcome": "finished"}
    answer["seconds"] = answer.pop("at") - sent
    answer["cpu"] -= cpu
    answer["left"] = sorted(path.name for path in left.iterdir() if not whole(path))
    return answer


def serve(scale: str, count: int, seed: int, folder: Path) -> None:
    # Once here and not in every child.
    import vqrs.cluster
    import vqrs.mixed
    import vqrs.quantizers  # noqa: F401

    warnings.simplefilter("ignore")
    random = np.random.default_rng(seed)
    work = Work(scale, folder, random)
    most = 8.0 if scale != "small" else 1.0
    done = tries = 0
    while done < count and tries < 3 * count:
        what, call, again = work.make(tries)
        tries += 1
        delay = float(random.uniform(0, most))
        for _ in range(4):
            answer = interrupted(call, again, folder / "left", delay)
            if answer["outcome"] != "finished":
                break
            delay /= 3
        print(json.dumps({"what": what, "delay": round(delay, 3), **answer}), flush=True)
        done += answer["outcome"] != "finished"


def run_scale(scale: str, count: int, random: np.random.Generator, folder: Path, within: float) -> Outcome:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(vqrs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", __name__, scale, str(count), str(random.integers(2**31)), str(folder)]
    outcome, seconds = Outcome(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, text=True) as server:
        for line in server.stdout:
            answer = json.loads(line)
            if answer["outcome"] == "finished":
                continue
            seconds.append(answer.get("seconds", np.inf))
            held = answer["outcome"] == "interrupted" and seconds[-1] <= within
            held = held and answer["usable"] is True and answer["left"] == []
            outcome.add(held, json.dumps(answer))
    if server.returncode:
        outcome.add(False, f"the server of the calls ended with {server.returncode}")
    if seconds:
        outcome.note = f"median {np.median(seconds):.3f} s, largest {max(seconds):.3f} s until KeyboardInterrupt"
    return outcome


def anywhere(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    if count >= FULL:
        return run_scale("large", count, random, folder, ANSWERED_SECONDS)
    return run_scale("small", count, random, folder, WATCHDOG_SECONDS)


def needs() -> str | None:
    return None if hasattr(os, "fork") else "the calls run in forked children"


FULL = 300
FAULTS = [
    Fault(
        "R20",
        "Ctrl-C at a random moment of fit, encode, compress, a lookup of 10^8 rows x 8, search, save, verify, open",
        "answered within 0.2 s (the short form: at all); object usable; no partial file",
        anywhere,
        20,
        FULL,
        slow=True,
        needs=needs,
    )
]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
