"""Three readers of one file (R26), and files of other versions (R23)."""

import copy
import importlib.util
import re
from pathlib import Path

import numpy as np

import vqrs
from vqrs import reference

from . import Fault, Outcome
from ._files import GOLDEN, layout
from ._mutate import Mutator, Parts
from ._watched import watched

REFUSED = vqrs.TableCorruptError, vqrs.TableVersionError


def stock(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the stock reader of safetensors finds: type, shape and bytes of each tensor; None where it refuses."""
    import safetensors

    try:
        found = safetensors.deserialize(content)
    except Exception:
        return None
    return {name: (info["dtype"], list(info["shape"]), bytes(info["data"])) for name, info in found}


def differ(path: Path) -> str | None:
    """How the readers differ on a file; ``""`` where all accept it, None where all that matters is refused by vqrs."""
    content = path.read_bytes()
    try:
        table = vqrs.open(path, verify="full")
        names = table.names
    except REFUSED as error:
        try:
            reference.read_table(path)
        except ValueError:
            return None
        # reference.py looks at the file and not at what the decoder's description says.
        about = re.search(
            r"code bytes|decoder|description|names|list of rows|map of rows|rows of|NaN|codes has|the error", str(error)
        )
        return None if about else f"reference.py opens what vqrs refuses: {error}"
    others = stock(content)
    if others is None:
        return "the stock reader refuses what vqrs opens"
    try:
        file = reference.read_table(path)
    except ValueError as error:
        return f"reference.py refuses what vqrs opens: {error}"
    size, tensors, _ = layout(content)
    own = {"codes": np.asarray(table.codes), **table._core.tensors()}
    for name, (_, shape, data) in others.items():
        start, end = tensors[name]["data_offsets"]
        if data != content[size + start : size + end] or data != file.tensors[name].tobytes():
            return f"the bytes of {name} differ"
        if name in own and (own[name].tobytes() != data or list(own[name].shape) != shape):
            return f"{name} differs in vqrs"
    if not set(own) <= set(others) or set(others) != set(file.tensors):
        return "the readers find other tensors"
    if len(table) * table.shape[1] > 1 << 16:
        return ""
    with np.errstate(all="ignore"):
        expected, found = file.rows(), table.to_numpy()
    # A file may name numbers whose products overflow: NaN has many bit patterns, all else has one.
    same = (expected.view(np.uint32) == found.view(np.uint32)) | (np.isnan(expected) & np.isnan(found))
    if expected.shape != found.shape or not same.all():
        return "reference.py decodes other rows"
    return "" if names is None or len(names) == len(table) else "as many names as rows"


def attempt(seed: int, index: int, folder: Path) -> dict:
    path, random = folder / "three.safetensors", np.random.default_rng([seed, max(index, 0)])
    content = GOLDEN[index % len(GOLDEN)].read_bytes()
    if index >= len(GOLDEN):
        content = Mutator(random).file(content)
    elif index >= 0:
        # Whole files, longer ones too: their last block may have any length.
        parts = Parts(content)
        rows, width = parts.tensors["codes"][1]
        if parts.description["decoder"]["form"] not in ("segments", "switch", "hashed"):
            more = int(random.integers(1, 200_000 // max(width, 1)))
            parts.tensors["codes"] = ["U8", [rows * more, width], parts.tensors["codes"][2] * more]
            parts.description["rows"] = rows * more
            for name in ("vqrs.names", "vqrs.names.ends"):
                parts.tensors.pop(name, None)
            content = parts.content()
    path.write_bytes(content)
    try:
        found = differ(path)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return {"found": found}


def three_readers(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    outcome, opened, seed = Outcome(), 0, int(random.integers(1 << 30))
    for record in watched("benches.faults.readers", "attempt", seed, count, folder):
        found = record["failed"] if "failed" in record else record["found"]
        opened += found == ""
        outcome.add(not found, f"seed {seed}, try {record['index']}: {found}")
    outcome.note = f"{opened:,} opened by all three, the others refused by vqrs"
    return outcome


def versions(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Golden tables as they are; with unknown keys and tensors that are optional; with features that are not known."""
    outcome, path = Outcome(), folder / "other.safetensors"

    def check(what: str, expected: np.ndarray, names: list[str] | None) -> None:
        for verify, mode in [("header", "mmap"), ("lazy", "mmap"), ("full", "read")]:
            try:
                with vqrs.open(path, verify=verify, mode=mode) as table:
                    table.verify(), table.info()
                    same = table.to_numpy().tobytes() == expected.tobytes() and table.names == names
                same &= reference.read_table(path).rows().tobytes() == expected.tobytes()
            except Exception as error:
                same, what = False, f"{what}: {type(error).__name__}: {error}"
            outcome.add(same, f"{what}, {verify}, {mode}")

    def refused(what: str, words: list[str]) -> None:
        found = []
        for read in (vqrs.open, reference.read_table):
            try:
                read(path)
                found.append("opened")
            except ValueError as error:
                wanted = read is reference.read_table or isinstance(error, vqrs.TableVersionError)
                found.append("" if wanted and all(word in str(error) for word in words) else str(error))
        outcome.add(not any(found), f"{what}: {found}")

    unknown = [1, -2.5, None, True, "words", ["a", 2], {"b": {"c": [None]}}]
    number = 0
    while outcome.tried < count:
        golden = GOLDEN[number % len(GOLDEN)]
        expected, content = np.load(golden.with_suffix(".npy")), golden.read_bytes()
        names = [f"row {i}" for i in range(len(expected))]
        path.write_bytes(content)
        check(golden.stem, expected, names)
        parts = Parts(content)
        value = copy.deepcopy(unknown[number % len(unknown)])
        key = f"later {random.integers(1000)}"
        parts.description[key] = parts.description["parameters"][key] = parts.description["errors"][key] = value
        parts.metadata[key] = "words"
        parts.tensors[f"vqrs.{key}"] = ["F32", [3], bytes(12)]
        path.write_bytes(parts.content())
        check(f"{golden.stem} with unknown optional keys ({value!r})", expected, names)
        feature = f"feature {random.integers(1000)}"
        parts.description["requires"] = [feature, "sonar"]
        path.write_bytes(parts.content())
        refused(f"{golden.stem} that requires features", [feature, "sonar"])
        parts.description |= {"requires": [], "profile": "vqrs-table/2"}
        path.write_bytes(parts.content())
        refused(f"{golden.stem} of a later profile", ["vqrs-table/2"])
        parts.description["profile"] = "vqrs-table/1"
        parts.description["decoder"] = {"form": "holograms", "dim": expected.shape[1], "waves": 3}
        path.write_bytes(parts.content())
        refused(f"{golden.stem} of an unknown form", ["holograms"])
        inner = {"form": "linear", "dim": expected.shape[1], "mean": False, "rotation": {"kind": "none"}}
        parts.description["decoder"] = {**inner, "inner": parts.description["decoder"]}
        path.write_bytes(parts.content())
        try:
            vqrs.open(path)
            found = "opened"
        except vqrs.TableVersionError as error:
            found = str(error)
        outcome.add("holograms" in found, f"{golden.stem} of an unknown inner form: {found}")
        number += 1
    forms = {path.stem.split("-")[0] for path in GOLDEN}
    known = {form for form in reference.FORMS if form in forms}
    if missing := set(reference.FORMS) - known:
        outcome.note = f"{len(GOLDEN)} golden tables; none of the forms {', '.join(sorted(missing))}"
    else:
        outcome.note = f"{len(GOLDEN)} golden tables of all {len(known)} forms"
    return outcome


def needs() -> str | None:
    return None if importlib.util.find_spec("safetensors") else "the package safetensors is not installed"


FAULTS = [
    Fault(
        "R23",
        "golden tables of each form; unknown optional keys; unknown required features, profiles and forms",
        "open for ever; ignored; refused by name",
        versions,
        300,
        1_000,
    ),
    Fault(
        "R26",
        "whole and edited files, read by vqrs, `reference.py` and the stock reader of safetensors",
        "vqrs opens a part of what the others open, and all three give the same bytes",
        three_readers,
        300,
        10_000,
        needs=needs,
    ),
]
