"""Saves that fail (R9), are killed (R7), are interrupted (R20), or that others read meanwhile (R11)."""

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import vqrs

from . import Fault, Outcome
from ._files import make_table
from ._trace import WRITES, Call, Failure, missing, trace, watched

NAME = "table.safetensors"
STALE = f".{NAME}.vqrs-tmp.1.stale"
"""A temporary file whose writer is gone."""


def apart(run: Callable) -> Callable:
    """``run`` in a fresh process: it forks, which a process that has threads should not."""

    def wrapped(count: int, random: np.random.Generator, folder: Path) -> Outcome:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(run, count, random, folder).result()

    return wrapped


def rows(n_rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_rows, 16)).astype(np.float32)


@dataclass(frozen=True)
class Save:
    """A way to save."""

    name: str
    to: Callable[[Path], object]
    over: bool
    """Whether an older table stands there."""


def ways() -> list[Save]:
    small, large = vqrs.Table(make_table(300, 16, seed=1)), vqrs.Table(make_table(300_000, 14, seed=1))
    quantizer, x = vqrs.ScalarQuantizer(dtype="int8", n_jobs=1).fit(rows(200, 2)), rows(200, 2)
    return [
        Save("over another, durable", small.save, True),
        Save("over another", lambda path: small.save(path, durable=False), True),
        Save("first, durable", small.save, False),
        Save("first", lambda path: small.save(path, durable=False), False),
        Save("of several writes", lambda path: large.save(path, durable=False), True),
        Save("streamed", lambda path: quantizer.compress(iter([x[:90], x[90:]]), path=path), True),
        Save("compress", lambda path: vqrs.compress(x, method="scalar", path=path, n_jobs=1), False),
    ]


def prepare(folder: Path, old: bytes | None) -> Path:
    """A folder with an older table, if any, and a stale temporary file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old is not None:
        (folder / NAME).write_bytes(old)
    (folder / STALE).write_bytes(b"x")
    return folder / NAME


def attempt(save: Save, path: Path, old: bytes | None, new: bytes) -> dict:
    """In the traced child: a save, what it left, and another one."""
    known = {content: name for name, content in (("old", old), ("new", new))}

    def state() -> list:
        content = path.read_bytes() if path.exists() else None
        return [known.get(content, "another"), sorted({*os.listdir(path.parent)} - {NAME})]

    error = None
    with watched():
        try:
            save.to(path)
        except BaseException as raised:
            error = raised
    first = state()
    told = None if error is None else [isinstance(error, OSError), getattr(error, "errno", None), str(error)]
    error = None
    save.to(path)
    return {"told": told, "first": first, "second": state()}


def attempt_with(save: Save, folder: Path, old: bytes | None, new: bytes, at: int, failure: Failure) -> tuple:
    path = prepare(folder, old)

    def fail(number: int, call: Call) -> Failure | None:
        # The system closes a file also where that fails.
        later = failure.lasting and number > at >= 0 and call.name != "close"
        return failure if number == at or later else None

    return trace(lambda: attempt(save, path, old, new), fail)


def fitting(call: Call) -> list[Failure]:
    """How a call may fail."""
    numbers = [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EDQUOT]
    if call.paths:
        numbers.append(errno.EACCES)
    if call.name in ("open", "openat", "fcntl", "dup"):
        numbers.append(errno.EMFILE)
    short = call.name in WRITES and call.arguments[2] > 1
    lasting = call.name != "close"
    return [*map(Failure, numbers), *[Failure()] * short, *[Failure(errno.EIO, lasting=True)] * lasting]


def judge(failure: Failure, at: int, calls: list[Call], answer: dict) -> str | None:
    """What did not hold."""
    if "raised" in answer:
        return answer["raised"]
    told, (content, left), second = answer["told"], answer["first"], answer["second"]
    renamed = any(call.name.startswith("rename") and call.result == 0 for call in calls)
    if content != ("new" if renamed else "old"):
        return f"the {content} table is there"
    if second != ["new", []]:
        return f"after the next save: {second}"
    if told is None:
        return None if renamed else "no error was raised"
    if failure.errno in (0, errno.EINTR):
        return f"was not tried again: {told}"
    if not told[0] or told[1] != failure.errno or NAME not in told[2]:
        return f"raised {told}"
    if calls[at].name == "fsync" and renamed and "in place" not in told[2]:
        return f"does not say that the new table is there: {told}"
    if not (failure.lasting or calls[at].name.startswith("unlink")) and set(left) - {STALE}:
        return f"left {left}"
    return None


def failing_calls(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Every call of every way to save, in an order of chance, until ``count`` were made to fail."""
    outcome = Outcome()
    older = folder / "older"
    vqrs.Table(make_table(100, 16, seed=0)).save(older)
    cases = []
    for save in ways():
        old = older.read_bytes() if save.over else None
        # Once before, so that what is imported or read on first use is there; once for the bytes; once for the calls.
        save.to(prepare(folder / "into", old))
        new = (folder / "into" / NAME).read_bytes()
        calls, answer = attempt_with(save, folder / "into", old, new, -1, Failure())
        fault = judge(Failure(), -1, calls, answer)
        if not outcome.add(fault is None, f"{save.name}, nothing fails: {fault}"):
            return outcome
        cases += [(save, old, new, at, failure) for at, call in enumerate(calls) for failure in fitting(call)]
    for number in range(count):
        if number % len(cases) == 0:
            order = random.permutation(len(cases))
        save, old, new, at, failure = cases[order[number % len(cases)]]
        calls, answer = attempt_with(save, folder / "into", old, new, at, failure)
        what = f"{save.name}, call {at} {calls[at] if at < len(calls) else '(not reached)'}: {failure}"
        fault = judge(failure, at, calls, answer) if at < len(calls) else f"ended before: {answer}"
        outcome.add(fault is None, f"{what}: {fault}")
    outcome.note = f"{len(cases)} ways to fail in {len(ways())} ways to save"
    return outcome


# ---- killed ----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """A child that does ``work`` and ends without cleaning up; returns once it has begun."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, b"x")
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return child


def repeatedly(saves: list[Save], path: Path) -> Callable[[], None]:
    """Until it is killed, or the process that would do that is gone."""
    parent = os.getpid()

    def work() -> None:
        while os.getppid() == parent:
            for save in saves:
                save.to(path)

    return work


def end(children: list[int], with_signal: int) -> list[int]:
    for child in children:
        os.kill(child, with_signal)
    return [os.waitpid(child, 0)[1] for child in children]


def contents(saves: list[Save], path: Path) -> dict[bytes, str]:
    """The file that each of these makes."""
    found = {}
    for save in saves:
        save.to(path)
        found[path.read_bytes()] = save.name
    return found


def whole(path: Path, known: dict[bytes, str]) -> bool:
    with vqrs.open(path, verify="full") as table:
        table.to_numpy()
    return path.read_bytes() in known


def kills(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """One writer or three, which save again and again, are killed; then one more save sweeps."""
    outcome, left, path = Outcome(), 0, folder / NAME
    saves = ways()
    begin = time.perf_counter()
    known = contents(saves, path)
    longest = 2 * (time.perf_counter() - begin) / len(saves)
    for number in range(count):
        first = number % 5 == 0
        if first:
            path.unlink()
        writers = 3 if number % 4 == 0 else 1
        chosen = [[saves[at] for at in random.permutation(len(saves))[:2]] for _ in range(writers)]
        what = f"round {number}, {[[save.name for save in several] for several in chosen]}"
        children = [fork(repeatedly(several, path)) for several in chosen]
        try:
            time.sleep(random.random() * longest)
            statuses = end(children[:1], signal.SIGKILL)
            sound = (first and not path.exists()) or whole(path, known)
            time.sleep(random.random() * longest)
        finally:
            statuses = end(children[1:], signal.SIGKILL) + statuses
        sound &= (first and not path.exists()) or whole(path, known)
        left += len(os.listdir(folder)) > path.exists()
        saves[1].to(path)
        others = sorted({*os.listdir(folder)} - {NAME})
        if any(status != signal.SIGKILL for status in statuses):
            outcome.add(False, f"{what}: a writer failed before it was killed: {statuses}")
        else:
            outcome.add(sound and not others, f"{what}: {'left ' + str(others) if sound else 'another table'}")
    outcome.note = f"{left:,} left temporary files, all swept by the next save"
    return outcome


# ---- interrupted -----------------------------------------------------------------------------------------------------


def interrupts(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Ctrl-C at a random moment of a save."""
    outcome, stopped, path = Outcome(), 0, folder / NAME
    saves = [save for save in ways() if save.name in ("of several writes", "streamed", "compress", "first")]
    x = rows(4000, 3)
    quantizer = vqrs.ScalarQuantizer(dtype="int8", n_jobs=1).fit(x)
    blocks = [x[at : at + 100] for at in range(0, 4000, 100)]
    saves.append(Save("streamed in many blocks", lambda path: quantizer.compress(iter(blocks), path=path), True))
    lasting = {}
    for save in saves:
        begin = time.perf_counter()
        save.to(path)
        lasting[save.name] = time.perf_counter() - begin
    known = contents(saves, path)
    for number in range(count):
        save = saves[number % len(saves)]
        # Waits until the child can answer it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child = fork(partial(interrupted, save, path))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        time.sleep(random.random() * 1.2 * lasting[save.name])
        status = os.waitstatus_to_exitcode(end([child], signal.SIGINT)[0])
        stopped += status == 2
        others = sorted({*os.listdir(folder)} - {NAME})
        what = f"round {number}, {save.name}: ended with {status}, left {others}"
        outcome.add(whole(path, known) and status in (0, 2) and not others, what)
    outcome.note = f"{stopped:,} stopped, the others had ended"
    return outcome


def interrupted(save: Save, path: Path) -> None:
    """Ends with 2 where Ctrl-C stopped the save. Nothing is cleaned up at the end: what is left the save left."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            save.to(path)
        except KeyboardInterrupt:
            os._exit(2)
        time.sleep(20)
    except KeyboardInterrupt:
        pass
    os._exit(0)


# ---- read meanwhile --------------------------------------------------------------------------------------------------

OPENED = [("header", "mmap"), ("full", "mmap"), ("lazy", "mmap"), ("full", "read"), ("header", "read")]


def version(number: int) -> vqrs.Table:
    """Every value of it is its number, which also decides its size."""
    x = np.full((500 + 300 * (number % 5), 16), number, np.float32)
    return vqrs.compress(x, method="scalar", dtype="float16", metadata={"number": str(number)}, n_jobs=1)


def torn(table: vqrs.Table, number: int) -> bool:
    rows = table.to_numpy()
    return table.metadata != {"number": str(number)} or len(rows) != 500 + 300 * (number % 5) or (rows != number).any()


def read(path: Path, stop: Path, least: int, report: Path, seed: int) -> None:
    """Opens and reads until ``stop`` is there; keeps some tables open and reads them again later."""
    random = np.random.default_rng(seed)
    failures, reads, last, kept = [], 0, 0, []
    while not failures and (reads < least or not stop.exists()):
        verify, mode = OPENED[int(random.integers(len(OPENED)))]
        try:
            table = vqrs.open(path, verify=verify, mode=mode)
            number = int(table.metadata["number"])
            if number < last:
                failures.append(f"version {number} after version {last}")
            last = number
            kept = [*kept[-4:], (table, number)]
            for table, number in kept:
                table.verify()
                reads += 1
                if torn(table, number):
                    failures.append(f"version {number}, {verify}, {mode}: torn")
        except Exception as error:
            failures.append(f"{verify}, {mode}: {type(error).__name__}: {error}")
    report.write_text(json.dumps([reads, failures]))


def readers(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Eight processes read while ``count`` versions of a table replace each other."""
    outcome = Outcome()
    path, stop, reports = folder / NAME, folder / "stop", [folder / f"report{number}" for number in range(8)]
    version(0).save(path)
    seeds = random.integers(1 << 30, size=len(reports)).tolist()
    children = [
        fork(lambda report=report, seed=seed: read(path, stop, count, report, seed))
        for report, seed in zip(reports, seeds, strict=True)
    ]
    for number in range(1, count + 1):
        version(number % 2048).save(path, durable=number % 10 == 0)
    stop.touch()
    statuses = end(children, 0)
    for report, status in zip(reports, statuses, strict=True):
        if not outcome.add(status == 0, f"a reader ended with {status}"):
            continue
        reads, failures = json.loads(report.read_text())
        outcome.tried += reads
        outcome.held += reads - len(failures)
        outcome.failures += failures
    outcome.note = f"{count:,} versions"
    return outcome


def no_fork() -> str | None:
    return None if sys.platform == "linux" else "processes are forked and killed on Linux only"


FAULTS = [
    Fault(
        "R9",
        "a system call of a save fails, each in turn: no space, I/O error, interrupted, quota, access, short write",
        "the old file intact, an OSError with that number, nothing left; interrupted and short ones are tried again",
        apart(failing_calls),
        80,
        2_000,
        slow=True,
        needs=missing,
    ),
    Fault(
        "R7",
        "`kill -9` at a random moment of a save, of one writer or of several",
        "the old or the new table; the next save sweeps what was left",
        apart(kills),
        40,
        1_000,
        slow=True,
        needs=no_fork,
    ),
    Fault(
        "R11",
        "8 processes read a table while another one replaces it",
        "no torn read, each way to open; tables that are kept open stay as they were",
        apart(readers),
        30,
        1_000,
        needs=no_fork,
    ),
    Fault(
        "R20",
        "Ctrl-C at a random moment of a save",
        "the old or the new table, nothing else left",
        apart(interrupts),
        50,
        1_000,
        slow=True,
        part="saving",
        needs=no_fork,
    ),
]
