"""Processes that are forked or started anew while tables are open and threads at work (R12).

A server process forks, as a preloading web server does; its children answer over pipes. Whatever does not answer within
20 seconds hangs. ``python -m benches.faults.processes fork 100`` is one such server.
"""

import argparse
import functools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

import vqrs

from . import Fault, Outcome

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0
"""Seconds after which a process hangs."""
N_ROWS, DIM = 40_000, 32
"""Enough rows for all of them to be read by several threads."""
STARTS = ["fork", "spawn", "forkserver"]


def forks() -> str | None:
    """Where there is nothing to fork, nothing can hang in a fork."""
    return None if hasattr(os, "fork") else "this system does not fork"


def has_torch() -> str | None:
    import importlib.util

    return forks() or (None if importlib.util.find_spec("torch") else "torch is not installed")


# ---- what processes do -----------------------------------------------------------------------------------------------


def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1500, 16), dtype=np.float32)


@functools.cache
def table_of(path: str) -> vqrs.Table:
    """As in a program that is loaded before it forks."""
    return vqrs.open(path)


@functools.cache
def quantizer() -> Any:
    return vqrs.ProductQuantizer(n_subvectors=4, n_bits=4, max_iter=3, random_state=0, n_jobs=2).fit(rows())


def fit() -> np.ndarray:
    made = vqrs.ProductQuantizer(n_subvectors=4, n_bits=4, max_iter=3, random_state=0, n_jobs=2).fit(rows())
    return made.transform(rows())


JOBS: dict[str, Callable[[str], Any]] = {
    "open": lambda path: vqrs.open(path, verify="full").to_numpy(),
    "lookup": lambda path: table_of(path)[np.arange(500)],
    "large lookup": lambda path: table_of(path).decode(n_jobs=2),
    "encode": lambda path: quantizer().transform(rows()),
    "fit": lambda path: fit(),
    "pool": lambda path: table_of(path).pool(np.arange(N_ROWS), np.arange(0, N_ROWS, 7), n_jobs=2),
    "search": lambda path: table_of(path).search(rows()[:2].repeat(2, axis=1), 5, n_jobs=2)[1],
    "compress": lambda path: vqrs.compress(rows(), method="scalar", n_jobs=2).codes,
}


def answer(name: str, path: str) -> bytes:
    """What a job gives, the same in every process."""
    return np.ascontiguousarray(JOBS[name](path)).tobytes()


def work(pipe: connection.Connection, name: str, path: str) -> None:
    pipe.send_bytes(answer(name, path))


# ---- children --------------------------------------------------------------------------------------------------------


def heard(pipe: connection.Connection, wanted: bytes) -> str:
    try:
        if not pipe.poll(PATIENCE):
            return "hangs"
        return "ok" if pipe.recv_bytes() == wanted else "other values"
    except EOFError:
        return "ended without an answer"


def finished(child: int) -> str:
    """Waits for a child that was forked here."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return "ok" if code == 0 else f"ended with {code}"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def forked(job: Callable[[], bool]) -> int:
    """A child that does a job and ends without ceremony."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = int(not job())
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return child


def by_multiprocessing(start: str, name: str, path: str, wanted: bytes) -> str:
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, name, path), daemon=True)
    process.start()
    theirs.close()
    said = heard(ours, wanted)
    process.join(PATIENCE if said != "hangs" else 0)
    if process.exitcode != 0 and said == "ok":
        said = f"ended with {process.exitcode}"
    process.kill()
    process.join()
    ours.close()
    return said


def by_pool(start: str, name: str, path: str, wanted: bytes) -> str:
    with multiprocessing.get_context(start).Pool(2) as pool:
        found = pool.starmap_async(answer, [(name, path)] * 4)
        try:
            return "ok" if found.get(3 * PATIENCE) == [wanted] * 4 else "other values"
        except multiprocessing.TimeoutError:
            return "hangs"


def from_a_thread(name: str, path: str, wanted: bytes) -> str:
    """Forked by another thread than the first."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(finished(forked(lambda: answer(name, path) == wanted))))
    thread.start()
    thread.join(2 * PATIENCE)
    return said[0] if said else "the forking thread hangs"


def while_busy(name: str, path: str, wanted: bytes) -> str:
    """Forked again and again while other threads are inside calls, and make pools of sizes that were not there."""
    stop = threading.Event()
    sizes = iter(range(2, 100))

    def busy(job: str) -> None:
        while not stop.is_set():
            answer(job, path)
            if (size := next(sizes, 0)) and job == "large lookup":
                table_of(path).decode(n_jobs=2 + size % 5)

    threads = [threading.Thread(target=busy, args=(job,)) for job in ("large lookup", "fit", "open")]
    for thread in threads:
        thread.start()
    try:
        found = [finished(forked(lambda: answer(name, path) == wanted)) for _ in range(3)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return next((said for said in found if said != "ok"), "ok")


def nested(name: str, path: str, wanted: bytes) -> str:
    """A child's child, each with threads of its own."""

    def job(depth: int) -> bool:
        if answer(name, path) != wanted:
            return False
        return depth == 0 or finished(forked(lambda: job(depth - 1))) == "ok"

    return finished(forked(lambda: job(2)))


def preload(name: str, path: str, wanted: bytes) -> str:
    """As gunicorn --preload: four workers that serve; one is killed and replaced."""

    def serve(pipe: connection.Connection) -> bool:
        while pipe.recv_bytes():
            pipe.send_bytes(answer(name, path))
        return True

    def worker() -> tuple[int, connection.Connection]:
        ours, theirs = multiprocessing.Pipe()
        child = forked(lambda: serve(theirs))
        theirs.close()
        return child, ours

    workers = [worker() for _ in range(4)]
    said = []
    for turn in range(2):
        for _, pipe in workers:
            pipe.send_bytes(b"go")
        said += [heard(pipe, wanted) for _, pipe in workers]
        if turn == 0:
            os.kill(workers[0][0], signal.SIGKILL)
            os.waitpid(workers[0][0], 0)
            workers[0] = worker()
    for child, pipe in workers:
        pipe.send_bytes(b"")
        said.append(finished(child))
    return next((text for text in said if text != "ok"), "ok")


def few_threads(name: str, path: str, wanted: bytes) -> str:
    """Where the system starts no more threads, the work is done by those that there are."""

    def job() -> bool:
        # Of an ordinary user: the superuser may have as many as it wants.
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        return answer(name, path) == wanted

    return finished(forked(job))


WAYS: dict[str, Callable[[str, str, bytes], str]] = {
    "from a thread": from_a_thread,
    "while busy": while_busy,
    "nested": nested,
    "preload": preload,
    "no more threads": few_threads,
}


# ---- servers ---------------------------------------------------------------------------------------------------------


def expected(path: str) -> dict[str, bytes]:
    """Right answers, from a process of its own, so that the asking one has not used anything."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return dict(zip(JOBS, pool.starmap(answer, [(name, path) for name in JOBS]), strict=True))


def serve_starts(path: str, count: int, used: bool, start: str) -> None:
    """Each job in processes of one kind, before or after this process has done all of them itself."""
    wanted = expected(path)
    if used:
        for name in JOBS:
            assert answer(name, path) == wanted[name]
    first = count * (2 * STARTS.index(start) + used)  # so that few for each still do every job
    for number in range(first, first + count):
        name = list(JOBS)[number % len(JOBS)]
        way = by_pool if number // len(JOBS) % 8 == 7 else by_multiprocessing
        print(json.dumps([f"{start}, {name}", way(start, name, path, wanted[name])]), flush=True)


def serve_ways(path: str, count: int, used: bool, start: str) -> None:
    """Each job in children that were forked in each way."""
    wanted = expected(path)
    if used:
        for name in JOBS:
            assert answer(name, path) == wanted[name]
    for number in range(count):
        name = list(JOBS)[number % len(JOBS)]
        way = list(WAYS)[(number + number // len(JOBS)) % len(WAYS)]
        print(json.dumps([f"{way}, {name}", WAYS[way](name, path, wanted[name])]), flush=True)


class Ids:
    """A dataset of rows, which are looked up in the worker."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> Any:
        import torch

        ids = (torch.arange(5000) * 7 + number) % N_ROWS
        return torch.from_numpy(self.held[ids.numpy()]) if isinstance(self.held, vqrs.Table) else self.held(ids)


def serve_loaders(path: str, count: int, used: bool, start: str) -> None:
    """DataLoaders of four workers over a table or a module, forked and started anew."""
    import torch
    from torch.utils.data import DataLoader

    import vqrs.torch

    held = [vqrs.open(path), vqrs.torch.Embedding.from_table(path)]
    if used:
        for one in held:
            Ids(one)[0]
        held[0].decode(n_jobs=2)
    right = torch.stack([Ids(vqrs.open(path, mode="read"))[number] for number in range(16)])
    for number in range(count):
        one, start = held[number % 2], STARTS[number // 2 % len(STARTS)]
        loader = DataLoader(Ids(one), 2, num_workers=4, multiprocessing_context=start, timeout=PATIENCE * 3)
        try:
            said = "ok" if torch.equal(torch.cat(list(loader)), right) else "other rows"
        except RuntimeError as error:
            said = str(error)
        print(json.dumps([f"{start}, {type(one).__name__}", said]), flush=True)


SERVERS = {"starts": serve_starts, "ways": serve_ways, "loaders": serve_loaders}
ALLOWED = (
    "DeprecationWarning: This process",
    "self.pid = os.fork()",
    "child = os.fork()",
)
"""Python's own note that there are threads in a process that forks, which it makes of any thread."""


def injected(count: int, random: np.random.Generator, folder: Path, server: str, starts: list[str]) -> Outcome:
    """Runs servers; each answer is an injection, and whatever stands on their stderr is a failure."""
    # Not in the folder of this run, which may be private: some children belong to another user.
    with tempfile.TemporaryDirectory(prefix="vqrs-faults-") as public:
        Path(public).chmod(0o755)
        return of_servers(count, random, Path(public), server, starts)


def of_servers(count: int, random: np.random.Generator, folder: Path, server: str, starts: list[str]) -> Outcome:
    outcome, path = Outcome(), folder / "rows.safetensors"
    x = random.standard_normal((N_ROWS, DIM), dtype=np.float32)
    vqrs.compress(x, method="scalar", dtype="int8", path=path)
    path.chmod(0o644)
    parts = [(start, used) for start in starts for used in (False, True)]
    for place, (start, used) in enumerate(parts):
        share = count // len(parts) + (place < count % len(parts))
        if not share:
            continue
        command = [sys.executable, "-m", __name__, server, str(share), "--path", str(path), "--start", start]
        process = subprocess.Popen(
            command + ["--used"] * used, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        watch = threading.Timer(PATIENCE * (6 + share), process.kill)
        watch.start()
        text, errors = process.communicate()
        watch.cancel()
        answers = [json.loads(line) for line in text.splitlines()]
        for what, said in answers:
            outcome.add(said == "ok", f"{what}, {'after' if used else 'before'} use in the parent: {said}")
        for _ in range(share - len(answers)):
            outcome.add(False, f"{start}: the server ended with {process.returncode}: {errors[-300:]}")
        lines = [line for line in errors.splitlines() if line.strip() and not any(text in line for text in ALLOWED)]
        if lines:
            outcome.add(False, f"{start}: {server} said {lines[:5]}")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("count", type=int)
    parser.add_argument("--path", required=True)
    parser.add_argument("--start", default="fork")
    parser.add_argument("--used", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "This DataLoader will create")  # torch's note of machines with few cores
    SERVERS[arguments.server](arguments.path, arguments.count, arguments.used, arguments.start)


HOLDS = "no hang (20 s), the right values, nothing printed"
FAULTS = [
    Fault(
        "R12",
        "processes by fork, spawn and forkserver, before and after use in the parent: open, lookup, encode, fit, pool, "
        "search, compress",
        HOLDS,
        functools.partial(injected, server="starts", starts=STARTS),
        12,
        600,
        part="starts",
        slow=True,
        needs=forks,
    ),
    Fault(
        "R12",
        "children of a preloading server, of other threads, of busy processes, of children; no more threads to be had",
        HOLDS,
        functools.partial(injected, server="ways", starts=["fork"]),
        20,
        1_000,
        part="preload",
        slow=True,
        needs=forks,
    ),
    Fault(
        "R12",
        "DataLoader with 4 workers: fork, spawn, forkserver; a table and a module",
        HOLDS,
        functools.partial(injected, server="loaders", starts=["each"]),
        6,
        60,
        part="loader",
        torch=True,
        slow=True,
        needs=has_torch,
    ),
]

if __name__ == "__main__":
    main()
