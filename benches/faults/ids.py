"""Row numbers, offsets and factors of every sort and container (R15): rows as numpy's, or the first bad position."""

import decimal
import importlib.util
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import vqrs

from . import Fault, Outcome
from ._files import make_table

INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i2", ">i4", ">i8", ">u2", ">u4", ">u8"]
FLOATS = ["f2", "f4", "f8", ">f8", "g", "c8", "m8[s]", "M8[s]", "V4"]
READERS = ["[]", "lookup", "out", "pool"]


class Case(NamedTuple):
    """Ids as a caller has them, and what must come of them."""

    what: str
    ids: Any
    rows: Any = None
    """Row numbers that numpy understands, or None where the ids must be refused."""
    position: int | None = None
    """The first bad one of refused ids; None where there is none, as of a mask of the wrong length."""
    errors: tuple[type[Exception], ...] = (IndexError, TypeError)


class Number:
    """An integer of a type of its own."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def draw_shape(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(size) for size in random.integers(0, 5, int(random.integers(1, 4))))


def draw_numbers(random: np.random.Generator, n_rows: int, count: int, low: int, high: int) -> list[int]:
    """Rows from either end, now and then one beyond, all between ``low`` and ``high``."""
    inside = random.integers(max(-n_rows, low), min(n_rows - 1, high), count, endpoint=True).tolist()
    if count and random.random() < 0.4:
        for _ in range(int(random.integers(1, 3))):
            beyond = [n_rows, n_rows + 1, -n_rows - 1, 2**31, 2**32, -(2**31), 2**63 - 1, -(2**63), 2**63, 2**64 - 1]
            allowed = [number for number in beyond if low <= number <= high]
            if allowed:
                inside[int(random.integers(count))] = allowed[int(random.integers(len(allowed)))]
    return inside


def expected(what: str, ids: Any, numbers: list[int], shape: tuple[int, ...], n_rows: int) -> Case:
    bad = next((position for position, number in enumerate(numbers) if not -n_rows <= number < n_rows), None)
    if bad is not None:
        return Case(what, ids, position=bad)
    return Case(what, ids, np.array(numbers, np.int64).reshape(shape))


def laid_out(array: np.ndarray, random: np.random.Generator) -> tuple[str, np.ndarray]:
    """The same values, otherwise in memory."""
    layout = str(random.choice(["plain", "transposed", "strided", "reversed", "unaligned", "read-only"]))
    if layout == "transposed":
        array = np.ascontiguousarray(array.T).T
    elif layout == "strided":
        spaced = np.zeros((*array.shape, 3), array.dtype)
        spaced[..., 1] = array
        array = spaced[..., 1]
    elif layout == "reversed":
        array = np.ascontiguousarray(array[::-1])[::-1]
    elif layout == "unaligned":
        memory = np.zeros(array.nbytes + 1, np.uint8)
        inside = memory[1:].view(array.dtype).reshape(array.shape)
        inside[...] = array
        array = inside
    elif layout == "read-only":
        array = array.copy()
        array.setflags(write=False)
    return layout, array


def arrays(random: np.random.Generator, n_rows: int) -> Case:
    dtype = np.dtype(str(random.choice(INTEGERS)))
    shape, limits = draw_shape(random), np.iinfo(dtype)
    numbers = draw_numbers(random, n_rows, int(np.prod(shape)), int(limits.min), int(limits.max))
    layout, ids = laid_out(np.array(numbers, dtype=dtype).reshape(shape), random)
    return expected(f"{layout} array of {dtype.str}", ids, numbers, shape, n_rows)


def repeated(random: np.random.Generator, n_rows: int) -> Case:
    number = draw_numbers(random, n_rows, 1, -(2**63), 2**63 - 1)
    shape = (int(random.integers(1, 9)), 3)
    ids = np.broadcast_to(np.array(number[0]), shape)
    return expected("array of stride zero", ids, number * (3 * shape[0]), shape, n_rows)


def lists(random: np.random.Generator, n_rows: int) -> Case:
    shape = draw_shape(random)
    numbers = draw_numbers(random, n_rows, int(np.prod(shape)), -(2**63), 2**64 - 1)
    if numbers and random.random() < 0.1:
        numbers[int(random.integers(len(numbers)))] = int(random.choice([-1, 1])) * 10 ** int(random.integers(20, 6000))
    objects = np.array(numbers, dtype=object).reshape(shape)
    forms: list[tuple[str, Callable[[], Any]]] = [
        ("list", objects.tolist),
        ("array of objects", lambda: objects),
        ("list of numpy's", lambda: [np.int64(number) for number in numbers] if fits(numbers) else objects),
        ("array of own numbers", lambda: own_numbers(objects)),
    ]
    name, make = forms[int(random.integers(len(forms)))]
    ids = make()
    return expected(name, ids, numbers, np.shape(ids) if isinstance(ids, list) else ids.shape, n_rows)


def fits(numbers: list[int]) -> bool:
    return all(-(2**63) <= number < 2**63 for number in numbers)


def own_numbers(objects: np.ndarray) -> np.ndarray:
    own = np.empty(objects.shape, object)
    own.flat[:] = [Number(number) for number in objects.flat]
    return own


def single(random: np.random.Generator, n_rows: int) -> Case:
    numbers = draw_numbers(random, n_rows, 1, -(2**63), 2**63 - 1)
    of = [int, np.int64, np.array, Number, lambda number: np.array(number, dtype=object)]
    ids = of[int(random.integers(len(of)))](numbers[0])
    return expected(f"one {type(ids).__name__}", ids, numbers, (), n_rows)


def ranges(random: np.random.Generator, n_rows: int) -> Case:
    start, stop = (int(value) for value in random.integers(-n_rows - 1, n_rows + 2, 2))
    ids = range(start, stop, int(random.choice([-3, -1, 1, 2])))
    if random.random() < 0.02:
        return Case("endless range", range(2**70), errors=(IndexError, MemoryError))
    return expected("range", ids, list(ids), (len(ids),), n_rows)


def masks(random: np.random.Generator, n_rows: int) -> Case:
    shape = [(n_rows,)] * 4 + [(n_rows + 1,), (n_rows - 1,), (n_rows, 8), (1, n_rows)]
    shape = shape[int(random.integers(len(shape)))]
    mask = random.random(shape) < 0.5
    layout, ids = laid_out(mask, random)
    if random.random() < 0.3 and mask.size:
        layout, ids = "listed", mask.tolist()
    rows = np.flatnonzero(mask) if shape == (n_rows,) else None
    if isinstance(ids, list) and not mask.size:
        rows = np.zeros(shape, int)
    return Case(f"{layout} mask of shape {shape}", ids, rows)


def wrong_types(random: np.random.Generator, n_rows: int) -> Case:
    shape = tuple(int(size) for size in random.integers(1, 5, int(random.integers(1, 3))))
    if random.random() < 0.5:
        dtype = np.dtype(str(random.choice(FLOATS)))
        layout, ids = laid_out(np.zeros(shape, dtype), random)
        return Case(f"{layout} array of {dtype.str}", ids, position=0)
    count = int(random.integers(1, 9))
    values: list[Any] = random.integers(0, n_rows, count).tolist()
    position = int(random.integers(count))
    wrongs = [1.5, float("nan"), 1j, None, b"a", object(), decimal.Decimal(1), {}, np.float32(1), slice(1)]
    values[position] = wrongs[int(random.integers(len(wrongs)))]
    as_array = random.random() < 0.5
    objects = np.empty(count, object)
    objects[:] = values
    return Case(
        f"{'array' if as_array else 'list'} with {values[position]!r}", objects if as_array else values, None, position
    )


def refused(random: np.random.Generator, n_rows: int) -> Case:
    position = int(random.integers(3))
    masked = np.ma.array([0, 1, 2], mask=[number == position for number in range(3)])
    mixed: list[Any] = ["a", "a", "a"]
    mixed[position] = 0
    ragged: list[Any] = [[0, 1], [1, 2], [2, 0]]
    ragged[position] = [0]
    cases = [
        Case("masked array", masked, None, position),
        Case("names and numbers", mixed, None, max(position, 1) if position == 0 else position),
        Case("ragged list", ragged, None, position or 1),
        Case("True", True),
        Case("numpy's True", np.True_),
        Case("None", None),
        Case("generator", (number for number in range(3)), None, 0),
        Case("set", {0, 1}, None, 0),
        Case("dict", {0: 1}, None, 0),
        Case("bytes", b"abc", None, 0),
        Case("float", 0.0, None, 0),
        Case("empty floats", np.empty(0)),
        Case("structures", np.zeros(2, [("a", "i4")]), None, 0),
    ]
    return cases[int(random.integers(len(cases)))]


def empty(random: np.random.Generator, n_rows: int) -> Case:
    shapes = [(0,), (0, 3), (2, 0, 1)]
    shape = shapes[int(random.integers(len(shapes)))]
    dtype = np.dtype(str(random.choice(INTEGERS)))
    cases = [
        Case("empty list", [], np.empty(0, int)),
        Case("list of an empty list", [[]], np.empty((1, 0), int)),
        Case(f"empty array of {dtype.str}", np.empty(shape, dtype), np.empty(shape, int)),
    ]
    return cases[int(random.integers(len(cases)))]


def frames(random: np.random.Generator, n_rows: int) -> Case:
    import pandas

    count = int(random.integers(1, 9))
    numbers = draw_numbers(random, n_rows, count, -(2**63), 2**63 - 1)
    place = int(random.integers(count))
    missing = pandas.array(numbers, dtype="Int64")
    missing[place] = pandas.NA
    cases = [
        expected("Series", pandas.Series(numbers, dtype="int64"), numbers, (count,), n_rows),
        expected("Index", pandas.Index(numbers), numbers, (count,), n_rows),
        expected("nullable Series", pandas.Series(numbers, dtype="Int64"), numbers, (count,), n_rows),
        expected("DataFrame", pandas.DataFrame({"a": numbers}), numbers, (count, 1), n_rows),
    ]
    if all(-n_rows <= number < n_rows for number in numbers):
        cases.append(Case("Series with a missing value", pandas.Series(missing), None, place))
    return cases[int(random.integers(len(cases)))]


def tensors(random: np.random.Generator, n_rows: int) -> Case:
    import torch

    dtype = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8][int(random.integers(5))]
    limits, shape = torch.iinfo(dtype), draw_shape(random)
    numbers = draw_numbers(random, n_rows, int(np.prod(shape)), limits.min, limits.max)
    ids = torch.tensor(numbers, dtype=dtype).reshape(shape)
    if random.random() < 0.3 and len(shape) > 1:
        ids = ids.transpose(0, 1).contiguous().transpose(0, 1)
    if random.random() < 0.1:
        return Case("tensor of floats", torch.zeros(3, dtype=torch.float64), None, 0)
    return expected(f"tensor of {dtype}", ids, numbers, shape, n_rows)


SORTS: list[Callable[[np.random.Generator, int], Case]] = [
    arrays,
    repeated,
    lists,
    single,
    ranges,
    masks,
    wrong_types,
    refused,
    empty,
]


def sorts() -> list[Callable[[np.random.Generator, int], Case]]:
    optional = [(frames, "pandas"), (tensors, "torch")]
    return SORTS + [sort for sort, module in optional if importlib.util.find_spec(module)]


def shown(ids: Any) -> str:
    try:
        return str(ids)[:200]
    except ValueError:
        return "a number that Python does not print"


def read(reader: str, table: vqrs.Table, case: Case, decoded: np.ndarray) -> str:
    """Reads rows in one of the ways; what is wrong with the answer, or nothing."""
    ids, out = case.ids, None
    if reader == "[]" and isinstance(ids, tuple):
        reader = "lookup"
    if reader == "pool" and case.rows is not None and np.ndim(case.rows) not in (1, 2):
        reader = "lookup"
    if reader == "out":
        shape = (2, decoded.shape[1]) if case.rows is None else decoded[case.rows].shape
        out = np.full(shape, 7, np.float32)
    try:
        found = {
            "[]": lambda: table[ids],
            "lookup": lambda: table.lookup(ids),
            "out": lambda: table.lookup(ids, out=out),
            "pool": lambda: table.pool(ids),
        }[reader]()
    except (IndexError, TypeError, MemoryError, ValueError) as error:
        if case.rows is None and re.match("out has shape|ids to pool must have", str(error)):
            return ""  # which of two mistakes is told is open
        if case.rows is not None or not isinstance(error, case.errors):
            return f"{type(error).__name__}: {error}"
        if case.position is not None and not re.search(rf"position {case.position}\b", str(error)):
            return f"not position {case.position}: {error}"
        return "" if out is None or (out == 7).all() else "written to in spite of an error"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if case.rows is None:
        return f"rows of shape {found.shape}"
    wanted = decoded[case.rows]
    if reader == "pool":
        axis = 1 if np.ndim(case.rows) == 2 else 0
        sums = wanted.sum(axis=axis, dtype=np.float64)
        return "" if np.allclose(found, sums, atol=1e-4) else "another sum"
    same = found.shape == wanted.shape and found.dtype == np.float32 and np.array_equal(found, wanted)
    return "" if same else "other rows"


def ids_of_every_sort(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Each drawn anew and read in one of the ways."""
    outcome, known = Outcome(), sorts()
    whole = [vqrs.Table(make_table(n_rows, 4, seed=n_rows)) for n_rows in (3, 50, 300)]
    tables = [(table, table.to_numpy()) for table in whole]
    for number in range(count):
        table, decoded = tables[int(random.integers(len(tables)))]
        case = known[number % len(known)](random, len(table))
        reader = READERS[int(random.integers(len(READERS)))]
        why = read(reader, table, case, decoded)
        outcome.add(not why, f"{reader} of {case.what} in {len(table)} rows, {shown(case.ids)}: {why}")
    outcome.note = f"{len(known)} sorts of ids, {len(READERS)} ways to read"
    return outcome


# ---- bags ----------------------------------------------------------------------------------------------------------


def pooled(rows: np.ndarray, borders: list[int], weights: np.ndarray | None, mode: str) -> np.ndarray:
    result = np.zeros((len(borders) - 1, rows.shape[1]))
    for bag, (start, end) in enumerate(itertools.pairwise(borders)):
        part = rows[start:end].astype(np.float64)
        if weights is not None:
            part = part * weights[start:end, None]
        if end > start:
            result[bag] = getattr(part, mode)(axis=0)
    return result


def draw_offsets(random: np.random.Generator, n_ids: int) -> tuple[Any, int | None, list[int]]:
    """Offsets, the position of the first bad one, and where bags begin."""
    starts = [0, *sorted(random.integers(0, n_ids + 1, int(random.integers(0, 6))).tolist())]
    bad, offsets = None, list(starts)
    if random.random() < 0.5:
        bad = int(random.integers(len(offsets)))
        before = offsets[bad - 1] if bad else 0
        wrong: list[Any] = [-1, n_ids + 1, 2**31, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 10**30, 1.5, None, "a"]
        offsets[bad] = wrong[int(random.integers(len(wrong)))]
        if isinstance(offsets[bad], int) and n_ids < offsets[bad] < 2**63 and bad + 1 < len(offsets):
            # It is the fall after it that is seen first.
            offsets[bad] = max(before, 0) - 1
    if bad is None:
        dtype = np.dtype(str(random.choice([dtype for dtype in INTEGERS if dtype[-1] != "1"])))
        return laid_out(np.array(offsets, dtype), random)[1], bad, starts
    if random.random() < 0.5 and isinstance(offsets[bad], int) and -(2**63) <= offsets[bad] < 2**63:
        return laid_out(np.array(offsets, np.int64), random)[1], bad, starts
    return offsets, bad, starts


def draw_weights(random: np.random.Generator, n_ids: int) -> tuple[Any, int | None, np.ndarray]:
    """Factors, the position of the first that float32 cannot hold, and their values."""
    values = random.normal(size=n_ids)
    if random.random() < 0.3 and n_ids:
        bad = int(random.integers(n_ids))
        values[bad] = random.choice([1e300, -1e39])
        return laid_out(values, random)[1], bad, values
    dtype = str(random.choice(["f2", "f4", "f8", ">f4", "i2", "g"]))
    weights = (values * 3).astype(dtype)
    return laid_out(weights, random)[1], None, weights.astype(np.float64)


def bags_of_every_sort(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """Offsets and factors with one bad value at a known place, or none."""
    outcome, table = Outcome(), vqrs.Table(make_table(60, 5))
    decoded = table.to_numpy()
    for _ in range(count):
        ids = random.integers(-60, 60, int(random.integers(0, 12)))
        offsets, bad_offset, starts = draw_offsets(random, len(ids))
        weights, bad_weight, factors = draw_weights(random, len(ids)) if random.random() < 0.5 else (None, None, None)
        mode = str(random.choice(["sum", "mean", "max"] if weights is None else ["sum", "mean"]))
        what = f"{len(ids)} ids, offsets {offsets!r}, weights {weights!r}, {mode}"
        bad = {position for position in (bad_offset, bad_weight) if position is not None}
        try:
            found = table.pool(ids, offsets, weights, mode)
        except ValueError as error:
            named = any(re.search(rf"position {position}\b", str(error)) for position in bad)
            outcome.add(named, f"{what}: {error}")
        except Exception as error:
            outcome.add(False, f"{what}: {type(error).__name__}: {error}")
        else:
            wanted = pooled(decoded[ids], [*starts, len(ids)], factors, mode)
            outcome.add(
                not bad and np.allclose(found, wanted, atol=1e-3), f"{what}: {'refused' if bad else 'other sums'}"
            )
    return outcome


def ids_of_torch_modules(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """torch's own modules refuse negative ids; ours do, too, and name the place."""
    import torch

    import vqrs.torch

    outcome, table = Outcome(), vqrs.Table(make_table(60, 5))
    embedding = vqrs.torch.Embedding.from_table(table)
    bag = vqrs.torch.EmbeddingBag.from_table(table, mode="sum")
    decoded = table.to_numpy()
    for number in range(count):
        dtype = [torch.int32, torch.int64, torch.int64, torch.int16, torch.uint8, torch.float32, torch.bool][
            int(random.integers(7))
        ]
        shape = tuple(int(size) for size in random.integers(1, 5, 1 + number % 2))
        wide = dtype in (torch.int32, torch.int64)
        numbers = random.integers(0, 60, int(np.prod(shape))).tolist()
        bad = None
        if wide and random.random() < 0.5:
            bad = int(random.integers(len(numbers)))
            numbers[bad] = int(random.choice([-1, -60, 60, 2**31 - 1, -(2**31)]))
        ids = torch.tensor(numbers).to(dtype).reshape(shape)
        if len(shape) == 2 and random.random() < 0.3:
            ids = ids.t().contiguous().t()
        module = [embedding, bag][int(random.integers(2))]
        offsets = torch.tensor([0]) if module is bag and len(shape) == 1 else None
        what = f"{type(module).__name__} of {ids}"
        try:
            found = module(ids) if offsets is None else module(ids, offsets)
        except TypeError:
            outcome.add(not wide, f"{what}: TypeError")
        except IndexError as error:
            outcome.add(bad is not None and re.search(rf"position {bad}\b", str(error)) is not None, f"{what}: {error}")
        except Exception as error:
            outcome.add(False, f"{what}: {type(error).__name__}: {error}")
        else:
            rows = decoded[ids.long().numpy()]
            wanted = rows if module is embedding else rows.sum(axis=1) if offsets is None else rows.sum(axis=0)[None]
            outcome.add(wide and bad is None and np.allclose(found.detach().numpy(), wanted, atol=1e-4), what)
    return outcome


FAULTS = [
    Fault(
        "R15",
        "ids of every sort: negative, beyond, float, bool, uint64 above 2^63, empty, 0-d, strided, big-endian, objects",
        "rows as numpy's, or IndexError or TypeError that names the first bad position",
        ids_of_every_sort,
        1_500,
        100_000,
    ),
    Fault(
        "R15",
        "offsets and factors of every sort",
        "sums as numpy's, or ValueError that names the first bad position",
        bags_of_every_sort,
        1_000,
        100_000,
        part="bags",
    ),
    Fault(
        "R15",
        "ids of every sort in torch modules, which refuse negative ones",
        "rows as numpy's, or IndexError or TypeError that names the first bad position",
        ids_of_torch_modules,
        500,
        50_000,
        part="torch",
        torch=True,
    ),
]
