"""Files that are cut while they are mapped (R6), and faults of others while tables are mapped.

Cuts are made in child processes, a hundred in each: what ends the child counts against what it was asked for.
``python -m benches.faults.cut_while_mapped 100 --threads 8`` makes cuts in this process and says how each ended.
"""

import argparse
import contextlib
import faulthandler
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

import vqrs

from . import Fault, Outcome
from ._files import GOLDEN, byte_range, decoder_names, make_table

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0
"""Seconds after which a reader hangs."""
BATCH = 100
"""Cuts of one child."""


def linux() -> str | None:
    """Windows refuses to cut such a file, and only Linux was measured."""
    return None if sys.platform == "linux" else "the faults of a cut file are injected on Linux alone"


# ---- one cut ---------------------------------------------------------------------------------------------------------


def sources(folder: Path) -> list[Path]:
    """Tables of every form, and some whose codes take many pages, one with names."""
    made = [make_table(6000, 48), make_table(4000, 32, kind="product", n_subvectors=8)]
    made.append(make_table(300, 40).with_metadata([f"row {number}" for number in range(300)], {}))
    made.append(make_table(2000, 48, kind="rotated", n_bits=4))
    paths = [folder / f"whole{number}.safetensors" for number in range(len(made))]
    for path, table in zip(paths, made, strict=True):
        table.save(str(path), durable=False)
    return [*GOLDEN, *paths]


def lengths(content: bytes, random: np.random.Generator) -> int:
    """Where a file is cut: anywhere, on a page, at nothing, in the decoder's tensors, or in the last bytes."""
    kinds: list[Callable[[], int]] = [
        lambda: int(random.integers(len(content) - 8)),
        lambda: int(random.integers(len(content) // 4096 + 1)) * 4096 % len(content),
        lambda: 0,
        lambda: len(content) - 8 - int(random.integers(64)),
    ]
    if names := decoder_names(content):
        inside = byte_range(content, str(random.choice(names)))
        kinds.append(lambda: int(random.integers(inside.start, inside.stop + 1)) if len(inside) else 0)
    return min(kinds[random.integers(len(kinds))](), len(content) - 8)


def readers(table: vqrs.Table, everything: np.ndarray, folder: Path) -> dict[str, Callable[[], Any]]:
    """All that reads a table, and what a table must not do once it is damaged."""
    n_rows, dim = table.shape
    ids = np.arange(n_rows)
    few = ids[:: max(1, n_rows // 7)]
    out = threading.local()

    def filled() -> np.ndarray:
        if not hasattr(out, "rows"):
            out.rows = np.empty((n_rows, dim), np.float32)
        return table.lookup(ids, out=out.rows)

    def saved() -> bytes:
        path = folder / f"saved{threading.get_ident()}.safetensors"
        table.save(path, durable=False)
        return path.read_bytes()

    found = {
        "lookup": lambda: table[ids],
        "one row": lambda: table[int(few[-1])],
        "out": filled,
        "decode": table.to_numpy,
        "half": lambda: table.lookup(few, dtype="float16"),
        "pool": lambda: table.pool(ids, np.arange(0, n_rows, 5)),
        "search": lambda: table.search(everything[:2], 3),
        "verify": table.verify,
        "save": saved,
        "codes": lambda: table.codes.copy(),
    }
    if table.names is not None:
        found["names"] = lambda: (table.names, table._row_numbers(["row 7"]))
    return found


def torch_readers(table: vqrs.Table, dim: int) -> dict[str, Callable[[], Any]]:
    """Modules of torch over the same mapping."""
    import torch

    import vqrs.torch

    torch.set_num_threads(1)
    ids = torch.arange(len(table))
    bags, offsets = ids[: len(table) // 2], torch.tensor([0, 1])
    embedding = vqrs.torch.Embedding.from_table(table)
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode="sum")
    codes, tensors, text = embedding._reads()
    tied = vqrs.torch.TiedLinear(embedding)
    out = threading.local()

    def filled() -> torch.Tensor:
        if not hasattr(out, "rows"):
            out.rows = torch.empty(len(table), dim)
        return embedding(ids, out=out.rows)

    found: dict[str, Callable[[], torch.Tensor]] = {
        "Embedding": lambda: embedding(ids),
        "Embedding out": filled,
        "weight": lambda: embedding.weight,
        "EmbeddingBag": lambda: bag(bags, offsets),
        "TiedLinear": lambda: tied(torch.ones(1, dim)),
        # As compiled and exported programs do, the latter with tensors that no module knows.
        "operator": lambda: torch.ops.vqrs.lookup(ids, codes, tensors, text, torch.float32, -1),
        "operator on others": lambda: torch.ops.vqrs.lookup(
            ids, codes.view(codes.shape), tensors, text, torch.float32, -1
        ),
        "state": lambda: embedding.state_dict()["codes"].clone(),
    }
    with contextlib.suppress(ValueError):  # some tables have nothing to train
        trained = vqrs.torch.Embedding.from_table(table, trainable=True)
        found["trainable"] = lambda: trained(ids).detach()
        found["to_table"] = lambda: torch.from_numpy(trained.to_table().to_numpy())

    def quiet(read: Callable[[], torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return read().numpy().copy()

    return {name: functools.partial(quiet, read) for name, read in found.items()}


CHECKS = {"state", "codes", "save"}
"""What does not say that what it gave is whole: copies that others make, and files that were there before."""


def one_cut(number: int, seed: int, whole: list[Path], folder: Path, threads: int, torch: bool) -> str:
    """Cuts a file while threads read it; ``"ok"`` or what went wrong."""
    random = np.random.default_rng([seed, number])
    source = whole[number % len(whole)]
    content = source.read_bytes()
    path = folder / f"cut{number}.safetensors"
    path.write_bytes(content)
    sound = vqrs.open(whole[(number + 1) % len(whole)])
    right = sound.to_numpy()
    table = vqrs.open(path, verify=str(random.choice(["header", "lazy", "full"])))
    reads = torch_readers(table, table.shape[1]) if torch else readers(table, table.to_numpy(), folder)
    expected = {name: read() for name, read in reads.items()}
    names = random.permutation(list(reads))
    said: list[str] = []
    started = threading.Barrier(threads + 1)

    def work(name: str) -> None:
        read, wanted = reads[name], expected[name]
        started.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                found = read()
            except vqrs.TableCorruptError as error:
                said.append("" if path.name in str(error) or "mapped" in str(error) else f"{name}: {error}")
                return
            except BaseException as error:
                said.append(f"{name}: {type(error).__name__}: {error}")
                return
            if name not in CHECKS and not equal(found, wanted):
                said.append(f"{name}: other rows, no error")
                return
        said.append(f"{name}: no error")

    workers = [threading.Thread(target=work, args=(names[at % len(names)],), daemon=True) for at in range(threads)]
    for worker in workers:
        worker.start()
    started.wait(PATIENCE)
    time.sleep(float(random.choice([0, 0, 1e-4, 1e-3])))
    length = lengths(content, random)
    os.truncate(path, length)
    if random.integers(4) == 0:  # as one who writes a file anew
        os.truncate(path, len(content))
    for worker in workers:
        worker.join(PATIENCE + 5)
        if worker.is_alive():
            return f"{source.name} cut to {length}: a reader hangs"
    wrong = [text for text in said if text]
    for name, read in reads.items():
        try:
            read()
            wrong.append(f"{name}: no error later")
        except vqrs.TableCorruptError:
            pass
        except Exception as error:
            wrong.append(f"{name} later: {type(error).__name__}: {error}")
    if not np.array_equal(sound.to_numpy(), right):
        wrong.append("another table has other rows")
    path.write_bytes(content)
    if not equal(vqrs.open(path).to_numpy(), vqrs.open(source).to_numpy()):
        wrong.append("the repaired file has other rows")
    path.unlink()
    return f"{source.name} cut to {length} of {len(content)}: {'; '.join(wrong)}" if wrong else "ok"


def equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        return all(equal(one, other) for one, other in zip(found, wanted, strict=True))
    if isinstance(wanted, np.ndarray):
        return np.array_equal(found, wanted)
    return found == wanted


# ---- many cuts -------------------------------------------------------------------------------------------------------


def children(count: int, seed: int, threads: int, torch: bool) -> Iterator[tuple[int, str]]:
    """Numbers of cuts and how they ended; a child that ends early is followed by another."""
    next_number = 0
    while next_number < count:
        end = min(count, next_number + BATCH)
        command = [sys.executable, "-m", __name__, str(end), "--begin", str(next_number), "--seed", str(seed)]
        command += ["--threads", str(threads), *["--torch"] * torch]
        limit = PATIENCE + BATCH * PATIENCE / 4
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit)
            answers, last = done.stdout, f"the process ended ({done.returncode}): {done.stderr[-300:]}"
        except subprocess.TimeoutExpired as error:
            answers, last = (error.stdout or b"").decode(), f"no answer in {limit} s"
        for line in answers.splitlines():
            number, text = json.loads(line)
            next_number = number + 1
            yield number, text
        if next_number < end:
            yield next_number, last
            next_number += 1


def cuts(count: int, random: np.random.Generator, folder: Path, threads: int, torch: bool) -> Outcome:
    outcome, seed = Outcome(), int(random.integers(1 << 31))
    for number, text in children(count, seed, threads, torch):
        outcome.add(text == "ok", f"cut {number} --seed {seed} --threads {threads}: {text}")
    outcome.note = f"{len(GOLDEN) + 4} files of every form"
    return outcome


# ---- faults of others ------------------------------------------------------------------------------------------------


def a_mapped_file(folder: Path) -> np.memmap:
    """Bytes of a file that nobody of vqrs knows."""
    path = folder / f"foreign{os.getpid()}"
    path.write_bytes(bytes(3 * 4096))
    return np.memmap(path, np.uint8, "r")


def foreign_fault(folder: Path) -> None:
    """Ends the process: reads a page that its file has lost."""
    bytes_ = a_mapped_file(folder)
    os.truncate(bytes_.filename, 0)
    bytes_.sum()


def mended_often(folder: Path) -> None:
    """A handler of another library, which puts a page there, is asked each time, at the same address too."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
    libc.mmap.argtypes = [*libc.mmap.argtypes, ctypes.c_long]
    path = folder / f"mended{os.getpid()}"
    path.write_bytes(bytes(4096))
    calls, at = [0], [0]
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    @prototype
    def mend(number: int, info: int, context: int) -> None:
        calls[0] += 1
        libc.mmap(at[0], 4096, 3, 0x32, -1, 0)  # private, anonymous, fixed

    class Action(ctypes.Structure):
        _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int)]

    action = Action(ctypes.cast(mend, ctypes.c_void_p).value, (ctypes.c_ulong * 16)(), 4)
    libc.sigaction(signal.SIGBUS, ctypes.byref(action), None)
    table = vqrs.open(folder / "sound.safetensors")
    for turn in range(20):
        os.truncate(path, 4096)
        with open(path, "rb") as file:
            at[0] = libc.mmap(at[0], 4096, 1, 2 | (0x10 if turn else 0), file.fileno(), 0)
        os.truncate(path, 0)
        assert ctypes.string_at(at[0], 1) == b"\0"
        assert calls[0] == turn + 1, f"{calls[0]} calls after {turn + 1} faults"
        table.to_numpy()


def by_faulthandler() -> str:
    faulthandler.enable(2)  # not sys.stderr, which a test runner may hold
    return "Fatal Python error: Bus error"


def by_torch() -> str:
    """What torch installs in each worker of a DataLoader."""
    import torch

    torch._C._set_worker_signal_handlers()
    return "bus error encountered in worker"


def by_nobody() -> str:
    return ""


def scene(number: int, seed: int, folder: Path, handlers: list[Callable[[], str]]) -> str:
    """In a child: a handler before or after a table is opened, a cut table, then a fault of another."""
    random = np.random.default_rng([seed, number])
    handler, when = handlers[number % len(handlers)], int(random.integers(3))
    path = folder / f"scene{os.getpid()}.safetensors"
    shutil.copy(folder / "sound.safetensors", path)
    said = handler() if when == 0 else ""
    table = vqrs.open(path)
    if when == 1:
        said = handler()
    ids = np.arange(len(table))
    table[ids]
    if when == 2:
        said = handler()
    if random.integers(3):
        time.sleep(0.001 * (handler is by_torch))  # a worker of torch has the handler before its first read
        os.truncate(path, int(random.integers(4096, 3 * 4096)))
        for _ in range(2):
            try:
                table[ids]
            except vqrs.TableCorruptError:
                continue
            os._exit(3)
    os.write(1, said.encode())
    os.close(1)
    foreign_fault(folder)
    os._exit(4)


def ending(job: Callable[[], object], folder: Path) -> tuple[int, str, str]:
    """Runs a job in a forked child: how it ended (negative: a signal), what it said, and its errors."""
    files = [folder / f"said{os.getpid()}", folder / f"errors{os.getpid()}"]
    child = os.fork()
    if child == 0:
        for descriptor, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        try:
            job()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(5)
    descriptor = os.pidfd_open(child)
    if not connection.wait([descriptor], PATIENCE):
        os.kill(child, signal.SIGKILL)
    os.close(descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said, errors = (path.read_text() for path in files)
    return code, said, errors


def foreign(count: int, random: np.random.Generator, folder: Path, torch: bool) -> Outcome:
    outcome, seed = Outcome(), int(random.integers(1 << 31))
    make_table(4000, 32).save(str(folder / "sound.safetensors"), durable=False)
    handlers = [by_torch, by_faulthandler] if torch else [by_faulthandler, by_nobody]
    if torch:
        import torch as _  # noqa: F401 -- once, before the children
    for number in range(count):
        if not torch and number % 10 == 9:
            code, said, errors = ending(lambda: mended_often(folder), folder)
            outcome.add(code == 0, f"{number}, mended by a handler: ended by {code}: {errors[-300:]}")
            continue
        code, said, errors = ending(lambda number=number: scene(number, seed, folder, handlers), folder)
        held = code == -signal.SIGBUS and said in errors
        outcome.add(held, f"{number} --seed {seed}: ended by {code}, said {said!r}: {errors[-300:]}")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("end", type=int)
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--torch", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vqrs-cuts-"))
    try:
        whole = sources(folder)
        for number in range(arguments.begin, arguments.end):
            text = one_cut(number, arguments.seed, whole, folder, arguments.threads, arguments.torch)
            print(json.dumps([number, text]), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def has_torch() -> str | None:
    import importlib.util

    return linux() or (None if importlib.util.find_spec("torch") else "torch is not installed")


HOLDS = "TableCorruptError; other tables go on"
KEPT = "the handler that was there before, or came later, still gets it"
FAULTS = [
    Fault(
        "R6",
        "a file cut while mapped, one thread reads",
        HOLDS,
        functools.partial(cuts, threads=1, torch=False),
        40,
        1_000,
        part="1 thread",
        needs=linux,
    ),
    Fault(
        "R6",
        "a file cut while mapped, 8 threads read",
        HOLDS,
        functools.partial(cuts, threads=8, torch=False),
        40,
        1_000,
        part="8 threads",
        needs=linux,
    ),
    Fault(
        "R6",
        "a file cut while mapped, modules of torch read",
        HOLDS,
        functools.partial(cuts, threads=8, torch=True),
        28,
        1_000,
        part="torch",
        torch=True,
        slow=True,
        needs=has_torch,
    ),
    Fault(
        "R6",
        "a fault of others: faulthandler, a handler that mends, none",
        KEPT,
        functools.partial(foreign, torch=False),
        30,
        1_000,
        part="others",
        needs=linux,
    ),
    Fault(
        "R6",
        "a fault of others in workers of torch's DataLoader",
        KEPT,
        functools.partial(foreign, torch=True),
        30,
        1_000,
        part="others torch",
        torch=True,
        needs=has_torch,
    ),
]

if __name__ == "__main__":
    main()
