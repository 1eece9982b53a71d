"""Every system call of a piece of work that has to do with files: seen at entry and exit, and made to fail.

A child is forked that asks to be traced; its threads are followed. Plain ptrace, for Linux on x86-64. The functions
must be called from a process with one thread.
"""

import ctypes
import json
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NAMES = {
    0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 8: "lseek", 9: "mmap",
    17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev", 21: "access", 32: "dup", 33: "dup2", 40: "sendfile",
    72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 78: "getdents",
    79: "getcwd", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink", 88: "symlink",
    89: "readlink", 90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown", 137: "statfs", 138: "fstatfs", 162: "sync",
    217: "getdents64", 221: "fadvise64", 257: "openat", 258: "mkdirat", 260: "fchownat", 262: "newfstatat",
    263: "unlinkat", 264: "renameat", 265: "linkat", 266: "symlinkat", 267: "readlinkat", 268: "fchmodat",
    269: "faccessat", 277: "sync_file_range", 285: "fallocate", 292: "dup3", 295: "preadv", 296: "pwritev",
    306: "syncfs", 316: "renameat2", 326: "copy_file_range", 328: "pwritev2", 332: "statx", 425: "io_uring_setup",
    437: "openat2", 439: "faccessat2", 452: "fchmodat2",
}  # fmt: skip
"""Calls that have to do with files, by their number."""

PATHS = {
    "open": (0,), "creat": (0,), "stat": (0,), "lstat": (0,), "access": (0,), "truncate": (0,), "rename": (0, 1),
    "unlink": (0,), "link": (0, 1), "symlink": (0, 1), "mkdir": (0,), "rmdir": (0,), "readlink": (0,), "chmod": (0,),
    "openat": (1,), "newfstatat": (1,), "unlinkat": (1,), "renameat": (1, 3), "renameat2": (1, 3), "linkat": (1, 3),
    "symlinkat": (0, 2), "mkdirat": (1,), "readlinkat": (1,), "fchmodat": (1,), "faccessat": (1,), "statx": (1,),
    "openat2": (1,), "faccessat2": (1,),
}  # fmt: skip
"""Which arguments of a call are paths."""

WRITES = ("write", "pwrite64")

_CONTINUE, _GET_REGISTERS, _SET_REGISTERS, _SYSCALL, _SET_OPTIONS = 7, 12, 13, 24, 0x4200
# Stops at calls are told apart from signals; threads are followed; the child does not outlive its tracer.
_OPTIONS = 0x1 | 0x8 | 1 << 20
_WAIT_ALL = 0x40000000
_REGISTERS = struct.Struct("27Q")
_ARGUMENTS = (14, 13, 12, 7, 9, 8)
_RESULT, _NUMBER = 10, 15

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Call:
    """A system call."""

    name: str
    arguments: tuple[int, ...]
    paths: tuple[str, ...] = ()
    data: bytes = b""
    """What it writes."""
    result: int = 0
    """What it gave back; negative: an error's number."""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(os.path.basename(path) for path in self.paths) or self.arguments[0]})"


@dataclass(frozen=True)
class Failure:
    """What happens in place of a call."""

    errno: int = 0
    """Number of the error; 0: a write of fewer bytes than asked for."""
    lasting: bool = False
    """All later calls fail like it."""

    def __str__(self) -> str:
        return (os.strerror(self.errno) if self.errno else "short write") + " from here on" * self.lasting


def _ptrace(request: int, pid: int, address: int = 0, data: object = 0) -> None:
    if _libc.ptrace(request, pid, ctypes.c_void_p(address), data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


@contextmanager
def watched() -> Iterator[None]:
    """In the child: the calls inside are told to the tracer."""
    signal.raise_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        signal.raise_signal(signal.SIGSTOP)


def trace(work: Callable[[], object], fail: Callable[[int, Call], Failure | None]) -> tuple[list[Call], object]:
    """Runs ``work`` in a child. Returns its file calls while :func:`watched`, and what it returned (as JSON).

    ``fail(number, call)`` is asked before each of them. What it returns happens in place of the call.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _ptrace(0, 0)
            signal.raise_signal(signal.SIGSTOP)
            answer = json.dumps(work()).encode()
        except BaseException as error:
            answer = json.dumps({"raised": repr(error)}).encode()
        os.write(writing, answer)
        os._exit(0)
    os.close(writing)
    try:
        calls, status = _follow(child, fail)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    if status != 0 or not answer:
        return calls, {"raised": f"the process ended with status {status}"}
    return calls, json.loads(answer)


def _follow(child: int, fail: Callable[[int, Call], Failure | None]) -> tuple[list[Call], int]:
    calls: list[Call] = []
    # Calls that a thread is inside of, with the registers it entered them with and what happens in their place.
    inside: dict[int, tuple[Call | None, list[int], Failure | None]] = {}
    os.waitpid(child, _WAIT_ALL)
    _ptrace(_SET_OPTIONS, child, 0, ctypes.c_void_p(_OPTIONS))
    watching, resume = False, _CONTINUE
    _ptrace(_CONTINUE, child)
    with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
        while True:
            thread, status = os.waitpid(-1, _WAIT_ALL)
            if not os.WIFSTOPPED(status):
                inside.pop(thread, None)
                if thread == child:
                    return calls, status
                continue
            number, deliver = os.WSTOPSIG(status), 0
            if number == signal.SIGTRAP | 0x80:
                if thread in inside:
                    _leave(thread, *inside.pop(thread))
                else:
                    inside[thread] = _enter(thread, memory, calls, fail if watching else None)
            elif number == signal.SIGSTOP:
                # The marks of the child itself; a new thread starts with one too.
                if thread == child:
                    watching = not watching
                    resume = _SYSCALL if watching else _CONTINUE
                    inside.clear()
            elif number != signal.SIGTRAP:
                deliver = number
            _ptrace(resume, thread, 0, ctypes.c_void_p(deliver))


def _enter(thread, memory, calls, fail) -> tuple[Call | None, list[int], Failure | None]:
    registers = _registers(thread)
    name = NAMES.get(registers[_NUMBER])
    arguments = tuple(registers[at] for at in _ARGUMENTS)
    # Memory is mapped in the same way as files, with -1 for the file.
    if fail is None or name is None or (name == "mmap" and arguments[4] & 0xFFFFFFFF == 0xFFFFFFFF):
        return None, registers, None
    call = Call(name, arguments, tuple(_text(memory, arguments[at]) for at in PATHS.get(name, ())))
    if name in WRITES:
        call.data = os.pread(memory.fileno(), arguments[2], arguments[1])
    calls.append(call)
    failure = fail(len(calls) - 1, call)
    if failure is not None:
        changed = list(registers)
        if failure.errno:
            changed[_NUMBER] = 2**64 - 1
        else:
            changed[_ARGUMENTS[2]] = max(1, arguments[2] // 2)
        _set_registers(thread, changed)
    return call, registers, failure


def _leave(thread: int, call: Call | None, entered: list[int], failure: Failure | None) -> None:
    if call is None:
        return
    registers = _registers(thread)
    if failure is not None:
        if failure.errno:
            registers[_RESULT] = 2**64 - failure.errno
        # Programs count on their arguments as they were.
        registers[_ARGUMENTS[2]] = entered[_ARGUMENTS[2]]
        _set_registers(thread, registers)
    call.result = registers[_RESULT] - (registers[_RESULT] >> 63 << 64)


def _registers(thread: int) -> list[int]:
    buffer = ctypes.create_string_buffer(_REGISTERS.size)
    _ptrace(_GET_REGISTERS, thread, 0, buffer)
    return list(_REGISTERS.unpack(buffer.raw))


def _set_registers(thread: int, registers: list[int]) -> None:
    _ptrace(_SET_REGISTERS, thread, 0, ctypes.create_string_buffer(_REGISTERS.pack(*registers), _REGISTERS.size))


def _text(memory, address: int) -> str:
    """The text at an address, up to its zero; page by page, because what follows may not be mapped."""
    text = b""
    while address and b"\0" not in text and len(text) < 8192:
        more = os.pread(memory.fileno(), 4096 - (address + len(text)) % 4096, address + len(text))
        if not more:
            break
        text += more
    return os.fsdecode(text.split(b"\0")[0])


def missing() -> str | None:
    """Why nothing can be traced here; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are traced on Linux x86-64 only"
    child = os.fork()
    if child == 0:
        refused = _libc.ptrace(0, 0, None, None) < 0
        if not refused:
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(1 if refused else 0)
    _, status = os.waitpid(child, 0)
    if os.WIFSTOPPED(status):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None
    return "this system does not permit tracing (ptrace)"
