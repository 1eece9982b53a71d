"""Power cuts (R8): what a disk may hold after one, from the recorded writes of saves."""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import vqrs

from . import Fault, Outcome
from ._trace import Call, missing, trace, watched
from .saving import NAME, apart, ways

SECTOR = 512


@dataclass
class Inode:
    """A file: what is surely on the disk, and what was written since."""

    content: bytes = b""
    """What is on the disk whatever happens."""
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Sizes that it had since it was last synchronised."""

    @property
    def size(self) -> int:
        return self.sizes[-1] if self.sizes else len(self.content)

    def write(self, at: int, data: bytes) -> None:
        self.writes.append((at, data))
        self.sizes.append(max(self.size, at + len(data)))

    def whole(self) -> bytes:
        """As every reader sees it while there is power."""
        content = bytearray(self.content.ljust(self.size, b"\0")[: self.size])
        for at, data in self.writes:
            content[at : at + len(data)] = data
        return bytes(content[: self.size])

    def synchronise(self) -> None:
        self.content, self.writes, self.sizes = self.whole(), [], []

    def after_cut(self, random: np.random.Generator) -> bytes:
        """Any of its sizes, and in each sector any state that was written to it, or what the disk held there before."""
        size = int(random.choice([len(self.content), *self.sizes]))
        # Sectors that were never written hold zeros, or what another file left there.
        filler = bytes(size) if random.random() < 0.5 else random.bytes(size)
        content = bytearray((self.content + filler[len(self.content) :])[:size])
        lost = random.random() ** 3
        for at, data in self.writes:
            first, last = at // SECTOR, -(-(at + len(data)) // SECTOR)
            kept = random.random(last - first) >= lost
            for sector in np.flatnonzero(kept):
                start = max(at, (first + int(sector)) * SECTOR)
                stop = min(at + len(data), (first + int(sector) + 1) * SECTOR, size)
                if start < stop:
                    content[start:stop] = data[start - at : stop - at]
        return bytes(content)


@dataclass
class Disk:
    """The files of one folder, as the calls of a process leave them."""

    folder: Path
    names: dict[str, list[Inode | None]]
    """For each name what it may stand for after a cut: its states since the folder was last synchronised."""
    positions: dict[int, int] = field(default_factory=dict)
    open: dict[int, Inode | str] = field(default_factory=dict)

    def put(self, name: str, inode: Inode | None) -> None:
        self.names.setdefault(name, [None]).append(inode)

    def apply(self, call: Call) -> None:
        """Does what a recorded call did. Calls that write in ways unknown here are refused rather than passed over."""
        if call.result < 0:
            return
        inside = [os.path.basename(path) for path in call.paths if os.path.dirname(path) == str(self.folder)]
        descriptor = call.arguments[0]
        if call.name in ("open", "openat"):
            flags = call.arguments[2] if call.name == "openat" else call.arguments[1]
            if call.paths[0] == str(self.folder):
                self.open[call.result] = "folder"
            elif inside:
                if flags & os.O_CREAT and self.now(inside[0]) is None:
                    self.put(inside[0], Inode())
                inode = self.now(inside[0])
                if flags & os.O_TRUNC and inode.size:
                    inode.sizes.append(0)
                self.open[call.result], self.positions[call.result] = inode, 0
        elif call.name in ("rename", "renameat", "renameat2") and inside:
            source, to = inside
            self.put(to, self.now(source))
            self.put(source, None)
        elif call.name in ("unlink", "unlinkat") and inside:
            self.put(inside[0], None)
        elif descriptor not in self.open or isinstance(self.open[descriptor], str):
            if call.name == "fsync" and descriptor in self.open:
                self.names = {name: states[-1:] for name, states in self.names.items()}
            elif call.name == "close":
                self.open.pop(descriptor, None)
        elif call.name == "lseek":
            self.positions[descriptor] = call.result
        elif call.name == "write":
            self.open[descriptor].write(self.positions[descriptor], call.data[: call.result])
            self.positions[descriptor] += call.result
        elif call.name == "pwrite64":
            self.open[descriptor].write(call.arguments[3], call.data[: call.result])
        elif call.name == "ftruncate":
            self.open[descriptor].sizes.append(call.arguments[1])
        elif call.name in ("fsync", "fdatasync"):
            self.open[descriptor].synchronise()
        elif call.name == "close":
            del self.open[descriptor]
        elif call.name in ("fcntl", "dup"):
            self.open[call.result], self.positions[call.result] = self.open[descriptor], self.positions[descriptor]
        elif call.name not in ("flock", "fchmod", "fstat", "newfstatat", "statx", "read", "pread64", "mmap"):
            raise NotImplementedError(f"{call.name} on a file of the folder")

    def now(self, name: str) -> Inode | None:
        return self.names.get(name, [None])[-1]

    def after_cut(self, name: str, random: np.random.Generator) -> bytes | None:
        """What a name stands for after a cut."""
        inode = self.names[name][int(random.integers(len(self.names[name])))] if name in self.names else None
        return None if inode is None else inode.after_cut(random)


def record(save: Callable[[Path], object], path: Path) -> list[Call]:
    """The calls of a save."""

    def work() -> None:
        with watched():
            save(path)

    calls, answer = trace(work, lambda number, call: None)
    if answer is not None:
        raise RuntimeError(answer["raised"])
    return calls


def found(path: Path, content: bytes | None, known: dict[bytes | None, str]) -> str:
    """What opening says of a file with this content."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    try:
        with vqrs.open(path, verify="full") as table:
            table.to_numpy()
    except FileNotFoundError:
        return "nothing"
    except vqrs.TableError:
        return "broken"
    return known.get(content, "another")


def cuts(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Saves of every way that waits for the disk, one after the other; the power is cut after any call, also after the
    last one: then only the last table may be there.
    """
    outcome, seen = Outcome(), defaultdict(int)
    into = folder / "into"
    into.mkdir()
    saves = [
        save for save in ways() if save.name in ("first, durable", "streamed", "over another, durable", "compress")
    ]
    # The first one finds nothing, each other one the table before it.
    tables: list[bytes | None] = [None]
    traces = []
    for save in saves:
        traces.append(record(save.to, into / NAME))
        tables.append((into / NAME).read_bytes())
    for number in range(count):
        turn = int(random.integers(len(traces)))
        calls = traces[turn]
        cut = len(calls) if random.random() < 0.1 else int(random.integers(len(calls) + 1))
        content = play(into, tables[turn], calls[:cut]).after_cut(NAME, random)
        known = {tables[turn]: "old", tables[turn + 1]: "new"}
        what = found(folder / "after.safetensors", content, known)
        what = "old" if what == "nothing" and tables[turn] is None else what
        allowed = ("new",) if cut == len(calls) else ("old", "new")
        seen[what] += 1
        outcome.add(
            what in allowed, f"{saves[turn].name}, after {cut} of {len(calls)} calls (history {number}): {what}"
        )
    # The same cuts find broken tables where nothing was synchronised; else they would prove nothing.
    broken = 0
    for _ in range(200):
        turn = int(random.integers(len(traces)))
        calls = [call for call in traces[turn] if call.name != "fsync"]
        content = play(into, tables[turn], calls).after_cut(NAME, random)
        broken += found(folder / "after.safetensors", content, {}) == "broken"
    if broken == 0:
        outcome.add(False, "cuts without any fsync break no table: the simulation is at fault")
    outcome.note = f"{seen['old']:,} old, {seen['new']:,} new; without fsync {broken} of 200 broken"
    return outcome


def play(folder: Path, old: bytes | None, calls: list[Call]) -> Disk:
    """The disk after these calls."""
    disk = Disk(folder, {} if old is None else {NAME: [Inode(old)]})
    for call in calls:
        disk.apply(call)
    return disk


FAULTS = [
    Fault(
        "R8",
        "power lost at any moment: any unsynchronised 512-byte sectors, sizes and names are lost",
        "the old or the new table, whole; after a save has returned the new one",
        apart(cuts),
        500,
        10_000,
        needs=missing,
    ),
]
