"""Threads that share tables (R13): everything at once, with tables closed and replaced under those who read them."""

import pickle
import sys
import threading
import time
from functools import reduce
from pathlib import Path

import numpy as np

import vqrs

from . import Fault, Outcome
from ._files import GOLDEN, make_table

THREADS = 32
QUIET = 60.0
"""Seconds without any answer after which the threads hang: a single one takes milliseconds."""


class Subject:
    """A table's file, and everything that is true of it, found out by one thread alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with vqrs.open(path, verify="full") as table:
            self.rows, self.names = table.to_numpy(), table.names
            self.queries = self.rows[[0, -1]] + np.float32(0.5)
            self.found = [table.search(self.queries, 5, metric) for metric in ("inner_product", "l2", "cosine")]
            self.codec = table._core.codec() if table._core.form not in ("switch", "hashed", "segments") else None
            self.codes = None if self.codec is None else self.codec.encode(self.rows)
            self.bytes = path.read_bytes()


class Shared:
    """What all threads have in common: for each subject the table that is open now."""

    def __init__(self, folder: Path) -> None:
        for number, source in enumerate(GOLDEN):
            (folder / f"{number}.safetensors").write_bytes(source.read_bytes())
        # Larger than a block of checksums, and than what one thread decodes alone.
        names = [f"row {row}" for row in range(40_000)]
        large = make_table(40_000, 40)
        large.with_metadata(names, {}).save(folder / "large.safetensors", durable=False)
        make_table(30_000, 32, kind="product", n_subvectors=8).save(folder / "product.safetensors", durable=False)
        self.subjects = [Subject(path) for path in sorted(folder.glob("*.safetensors"))]
        self.tables = [vqrs.open(subject.path, verify="lazy") for subject in self.subjects]
        self.rows = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
        self.compressed = vqrs.compress(self.rows, method="product", n_subvectors=2, n_bits=3, random_state=0)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def looked_up(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    ids = random.integers(-len(subject.rows), len(subject.rows), size=int(random.choice([0, 1, 30, 3000])))
    ids = ids.astype(random.choice([np.int32, np.int64]))
    expected = subject.rows[ids]
    if random.integers(2):
        return same(table.lookup(ids), expected)
    out = np.full(expected.shape, np.nan, random.choice([np.float32, np.float16]))
    return same(table.lookup(ids, out=out), expected.astype(out.dtype))


def pooled(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    ids = random.integers(len(subject.rows), size=(int(random.integers(1, 40)), int(random.integers(1, 9))))
    mode = str(random.choice(["sum", "max"]))
    step = {"sum": np.add, "max": np.maximum}[mode]
    expected = reduce(step, (subject.rows[column] for column in ids.T))
    return same(table.pool(ids, mode=mode), expected)


def searched(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    which = int(random.integers(3))
    metric = ["inner_product", "l2", "cosine"][which]
    scores, ids = table.search(subject.queries, 5, metric)
    return same(scores, subject.found[which][0]) and same(ids, subject.found[which][1])


def decoded(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    start, stop = sorted(int(bound) for bound in random.integers(len(subject.rows) + 1, size=2))
    return same(table[start:stop], subject.rows[start:stop])


def named(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    if subject.names is None:
        return table.names is None
    row = int(random.integers(len(subject.names)))
    return same(table[subject.names[row]], subject.rows[row]) and len(table.names) == len(subject.rows)


def described(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    whole = table.info()["nbytes"] == table.nbytes == len(subject.bytes)
    codes = table.codes
    table.verify()
    # The codes stay readable whoever closes the table.
    return whole and repr(table).startswith("Table(") and codes.shape == (len(subject.rows), codes.shape[1])


def pickled(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    with pickle.loads(pickle.dumps(table)) as copy:
        return same(copy[-1], subject.rows[-1])


def saved(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    """To a file of the thread's own, or over the one that all threads open: an equal one takes its place."""
    path = mine if random.integers(2) else subject.path
    table.save(path, durable=False)
    return path.read_bytes() == subject.bytes


def opened(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    """A new one takes the place of the one that all read; sometimes that is closed before they are done."""
    verify = str(random.choice(["header", "lazy", "full"]))
    fresh = vqrs.open(subject.path, verify=verify, mode=str(random.choice(["mmap", "read"])))
    right = same(fresh[0], subject.rows[0])
    # From here on, others may close it.
    shared.tables[shared.subjects.index(subject)] = fresh
    if random.integers(2):
        table.close()
        return right and repr(table) == "Table(closed)"
    return right


def encoded(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    return subject.codec is None or same(subject.codec.encode(subject.rows), subject.codes)


def compressed(shared: Shared, subject: Subject, table: vqrs.Table, random: np.random.Generator, mine: Path) -> bool:
    made = vqrs.compress(shared.rows, method="product", n_subvectors=2, n_bits=3, random_state=0)
    return same(made.codes, shared.compressed.codes) and same(made.to_numpy(), shared.compressed.to_numpy())


WORK = [
    *[looked_up, pooled] * 4,
    *[searched, decoded, named, opened] * 2,
    *[described, pickled, saved, encoded, compressed],
]


def one(shared: Shared, random: np.random.Generator, mine: Path) -> str:
    """One call; what was wrong with its answer."""
    work = WORK[int(random.integers(len(WORK)))]
    which = int(random.integers(len(shared.subjects)))
    subject, table = shared.subjects[which], shared.tables[which]
    what = f"{work.__name__} of {subject.path.name}"
    try:
        return "" if work(shared, subject, table, random, mine) else f"{what}: another answer"
    except ValueError as error:
        closed = table._core.closed and "closed" in str(error)
        return "" if closed else f"{what}: {type(error).__name__}: {error}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"


def together(count: int, random: np.random.Generator, folder: Path, work) -> Outcome:
    """``work(random, place)`` by all threads, ``count`` times in all; ``place`` is a file of the thread's own."""
    outcome, guard = Outcome(), threading.Lock()
    start = threading.Barrier(THREADS)

    def run(seed: int, mine: Path) -> None:
        own = np.random.default_rng(seed)
        start.wait()
        for _ in range(-(-count // THREADS)):
            try:
                wrong = work(own, mine)
            except BaseException as error:  # a panic among them
                wrong = f"{type(error).__name__}: {error}"
            with guard:
                outcome.add(not wrong, f"thread of seed {seed}: {wrong}")

    seeds = random.integers(2**63, size=THREADS).tolist()
    places = [folder / f"mine-{number}.table" for number in range(THREADS)]
    threads = [threading.Thread(target=run, args=each, daemon=True) for each in zip(seeds, places, strict=True)]
    for thread in threads:
        thread.start()
    last, seen = time.monotonic(), 0
    while any(thread.is_alive() for thread in threads):
        next(thread for thread in [*threads[1:], threads[0]] if thread.is_alive() or thread is threads[0]).join(0.1)
        if outcome.tried != seen:
            last, seen = time.monotonic(), outcome.tried
        elif time.monotonic() - last > QUIET:
            outcome.add(
                False, f"no answer for {QUIET:.0f} s: {sum(thread.is_alive() for thread in threads)} threads hang"
            )
            break
    return outcome


def everything(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    shared = Shared(folder)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns more often than they would
    try:
        outcome = together(count, random, folder, lambda own, mine: one(shared, own, mine))
    finally:
        sys.setswitchinterval(before)
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    outcome.note = f"{THREADS} threads, {len(shared.subjects)} tables, {'with' if locked else 'without'} the GIL"
    return outcome


def modules(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Modules of torch that all threads call, while others copy them, keep their state and make new ones."""
    import copy

    import torch

    from vqrs.torch import Embedding, EmbeddingBag

    def fresh(number: int) -> tuple[vqrs.Table, Embedding, EmbeddingBag]:
        table = vqrs.open(folder / f"{number}.safetensors", verify="lazy")
        return table, Embedding.from_table(table), EmbeddingBag.from_table(table, mode="sum")

    for number, source in enumerate(GOLDEN):
        (folder / f"{number}.safetensors").write_bytes(source.read_bytes())
    shared = [fresh(number) for number in range(len(GOLDEN))]
    rows = [torch.from_numpy(table.to_numpy()) for table, _, _ in shared]
    compiled = torch.ops.vqrs.lookup

    def call(own: np.random.Generator, mine: Path) -> str:
        number, what = int(own.integers(len(shared))), int(own.integers(8))
        table, embedding, bag = shared[number]
        ids = torch.from_numpy(own.integers(len(rows[number]), size=(int(own.integers(1, 200)), 3)))
        expected = rows[number][ids]
        if what < 2:
            right = torch.equal(embedding(ids), expected)
        elif what == 2:
            right = torch.equal(bag(ids), (0 + expected[:, 0]) + expected[:, 1] + expected[:, 2])
        elif what == 3:
            codes, tensors, decoder = embedding._reads()
            right = torch.equal(compiled(ids, codes, tensors, decoder, torch.float32, -1), expected)
        elif what == 4:
            right = torch.equal(copy.deepcopy(embedding)(ids), expected)
        elif what == 5:
            torch.save(embedding.state_dict(), mine)
            other = Embedding.from_table(table)
            other.load_state_dict(torch.load(mine))
            right = torch.equal(other(ids), expected)
        elif what == 6:
            right = same(embedding.to_table().lookup(ids), expected.numpy())
        else:
            shared[number] = fresh(number)
            right = torch.equal(shared[number][1](ids), expected)
        return "" if right else f"case {what} of table {number}: other rows"

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return together(count, random, folder, call)
    finally:
        torch.set_num_threads(n_threads)


FAULTS = [
    Fault(
        "R13",
        f"{THREADS} threads open, look up, pool, search, save, compress and close shared tables",
        "the right answer, or ValueError where another thread closed the table",
        everything,
        1_600,
        200_000,
    ),
    Fault(
        "R13",
        f"{THREADS} threads call, copy, save, load and replace shared modules of torch",
        "the right rows",
        modules,
        320,
        50_000,
        part="torch",
        torch=True,
        slow=True,
    ),
]
