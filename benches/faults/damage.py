"""Bytes that a disk or a download changed or lost: flipped bits (R1, R2) and cuts (R3)."""

import os
from pathlib import Path

import numpy as np

import vqrs

from . import Fault, Outcome
from ._files import GOLDEN, byte_range, decoder_names, layout, make_table


def sources() -> list[bytes]:
    """Files of every form, and larger ones whose codes take several blocks."""
    return [path.read_bytes() for path in GOLDEN]


def larger(folder: Path) -> list[bytes]:
    made = [make_table(6000, 48), make_table(4000, 32, kind="product", n_subvectors=8), make_table(3, 5)]
    found = []
    for table in made:
        path = folder / "whole.safetensors"
        table.save(str(path))
        found.append(path.read_bytes())
    return found


def answer(path: Path, verify: str) -> str:
    """``"refused"``, ``"opened"``, or what else came."""
    try:
        vqrs.open(path, verify=verify).close()
    except (vqrs.TableCorruptError, vqrs.TableVersionError):
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def flip(path: Path, position: int, value: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes([value]), position)


def flips(count: int, random: np.random.Generator, folder: Path, verify: str, places) -> Outcome:
    """Single bits, each in a file that is whole otherwise; each opened mapped and restored."""
    outcome, contents = Outcome(), sources() + larger(folder)
    paths = [folder / f"{number}.safetensors" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    allowed = [places(content) for content in contents]
    for _ in range(count):
        which = int(random.integers(len(paths)))
        position, bit = int(random.choice(allowed[which])), int(random.integers(8))
        value = contents[which][position]
        flip(paths[which], position, value ^ 1 << bit)
        found = answer(paths[which], verify)
        outcome.add(found == "refused", f"file {which}, bit {bit} of byte {position}: {found}")
        flip(paths[which], position, value)
    whole = [answer(path, "full") for path in paths]
    outcome.note = f"{len(paths)} files of every form"
    if whole != ["opened"] * len(paths):
        outcome.add(False, f"a whole file was not opened: {whole}")
    return outcome


def anywhere(content: bytes) -> np.ndarray:
    return np.arange(len(content))


def strict(content: bytes) -> np.ndarray:
    """Header, decoder tensors and footer."""
    names = [*decoder_names(content), "vqrs.footer"]
    ranges = [range(layout(content)[0]), *(byte_range(content, name) for name in names)]
    return np.concatenate([np.arange(part.start, part.stop) for part in ranges])


def flips_anywhere(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    return flips(count, random, folder, "full", anywhere)


def flips_at_default_open(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    return flips(count, random, folder, "header", strict)


def cuts(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Every way to open, at random lengths and at the borders of tensors and pages."""
    outcome, contents = Outcome(), sources() + larger(folder)
    path = folder / "cut.safetensors"
    for number in range(count):
        content = contents[number % len(contents)]
        size, tensors, _ = layout(content)
        borders = [size + end + shift for info in tensors.values() for end in info["data_offsets"] for shift in (-1, 0)]
        borders = [at for at in {*borders, 0, 7, 8, 4096, len(content) - 1} if at < len(content)]
        border = number // len(contents) % 2 == 0
        length = int(random.choice(sorted(borders))) if border else int(random.integers(len(content)))
        path.write_bytes(content[:length])
        for verify, mode in [("header", "mmap"), ("lazy", "read")]:
            try:
                vqrs.open(path, verify=verify, mode=mode)
                found = "opened"
            except vqrs.TableCorruptError:
                continue
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            outcome.add(False, f"{length} of {len(content)} bytes, mode {mode}: {found}")
            break
        else:
            outcome.add(True, "")
    return outcome


FAULTS = [
    Fault("R1", 'a single bit flipped anywhere, `verify="full"`', "refused", flips_anywhere, 500, 10_000),
    Fault(
        "R2",
        "a bit flipped in header, decoder tensors or footer, default open",
        "refused",
        flips_at_default_open,
        500,
        10_000,
    ),
    Fault("R3", "a file cut at any length", "refused at open", cuts, 200, 1_000),
]
