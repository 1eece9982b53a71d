"""Calls with arguments of every sort (R19): no panic, no InternalError, no SystemError, no signal.

Calls are made in a process of its own, which tells the number of each before it makes it, so that the one that ends the
process is known. Each follows from the seed and its number alone.
"""

import contextlib
import copy
import inspect
import json
import mmap
import os
import random as python_random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import vqrs
from vqrs import _core

from . import Fault, Outcome
from ._files import make_table

PATIENCE = 120
"""Seconds without a new call after which the process counts as hanging."""

MEMORY = 6 << 30
"""Bytes that the process may map: an argument that asks for more must lead to a MemoryError."""

Pick = python_random.Random


class OnPurpose(Exception):
    """Raised by arguments."""


# ---- arguments -----------------------------------------------------------------------------------------------------


class Raising:
    """Whatever is asked of it, it raises."""

    def refuse(self, *arguments: Any, **named: Any) -> Any:
        raise OnPurpose

    __array__ = __len__ = __getitem__ = __index__ = __float__ = __iter__ = __int__ = __bool__ = __str__ = refuse
    __fspath__ = __eq__ = __hash__ = __call__ = __contains__ = __getattr__ = refuse  # type: ignore[assignment]


class Lying:
    """Says another length, shape and type at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        self.calls += 1
        return [3, 0, 2**40, 1][self.calls % 4]

    def __getitem__(self, index: Any) -> Any:
        return self.calls

    @property
    def shape(self) -> tuple[int, ...]:
        self.calls += 1
        return [(3, 4), (2**40, 2**40), (), (-1,)][self.calls % 4]

    @property
    def dtype(self) -> Any:
        return ["float32", None, 7][self.calls % 3]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.calls += 1
        return np.zeros([(3, 4), (0, 4), (2, 2), (5,)][self.calls % 4], dtype)

    def __index__(self) -> int:
        self.calls += 1
        return [1, -1, 2**63, 2**70][self.calls % 4]

    def __float__(self) -> float:
        return float("nan")


class Subclass(np.ndarray):
    """An array of a class of its own."""


def endless() -> dict:
    mapping: dict = {}
    mapping["a"] = mapping
    return mapping


def within_itself() -> list:
    inside: list = []
    inside.append(inside)
    return inside


def fleeting() -> Iterator[int]:
    yield 1
    raise OnPurpose


DTYPES = ["f4", "f8", "f2", ">f4", "i4", "i8", ">i8", "u1", "u2", "u8", "i1", "?", "O", "U2", "S2", "c8", "M8[s]", "V3"]
SHAPES = [(), (0,), (1,), (3,), (12,), (0, 4), (3, 0), (3, 4), (12, 4), (4, 3), (1, 1), (2, 3, 4), (1,) * 33, (12, 5)]
VALUES = [0.0, 1.0, -1.0, 7.0, 1e15, 1e38, -1e30, 1e-45, float("nan"), float("inf")]


def any_array(pick: Pick) -> np.ndarray:
    shape, dtype = pick.choice(SHAPES), pick.choice(DTYPES)
    with np.errstate(all="ignore"):
        try:
            array = np.full(shape, pick.choice(VALUES)).astype(dtype)
        except (ValueError, TypeError, OverflowError):
            array = np.zeros(shape, dtype)
    way = pick.randrange(8)
    if way == 0:
        array = array.T
    elif way == 1 and array.ndim:
        array = array[::-1]
    elif way == 2:
        array.setflags(write=False)
    elif way == 3 and array.ndim and array.size:
        array = np.broadcast_to(array[:1], array.shape)
    elif way == 4 and not array.dtype.hasobject and array.size:
        memory = np.zeros(array.nbytes + 1, np.uint8)
        inside = np.ndarray(array.shape, array.dtype, memory, 1)
        inside[...] = array
        array = inside
    elif way == 5:
        array = array.view(Subclass)
    elif way == 6:
        array = np.ma.array(array)
    return array


SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 5, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64),
    *(-(2**31), -(2**63), -(2**63) - 1, 2**70, 10**400, 10**5000, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        -float("inf"),
        1j,
        "",
        "a",
        "sum",
        "l2",
        "scalar",
        "\0",
        "\ud800",
        "é" * 300,
        b"",
        b"a",
        b"\xff",
        ...,
        slice(None),
    ),
    *(slice(None, None, 0), slice(2**70, -(2**70), -3), (), (1, 2), [], [[]], [1], [[1, 2], [3]], [None], ["a"], {}),
    *({"a": 1}, {1: 2}, {"kind": "scalar", "parameters": {}}, set(), range(3), range(2**70), int, np.float32, object()),
    *(
        np.int8(3),
        np.uint64(2**64 - 1),
        np.float32("nan"),
        np.bool_(True),
        np.datetime64("2020"),
        np.array(3),
        _core.Table,
    ),
]

MAKERS: list[Callable[[], Any]] = [Raising, Lying, endless, within_itself, fleeting, object, lambda: iter([1, 2])]


def anything(pick: Pick, world: "World") -> Any:
    way = pick.randrange(10)
    if way < 5:
        return pick.choice(SCALARS)
    if way < 8:
        return any_array(pick)
    return pick.choice(MAKERS)() if way == 8 else pick.choice(world.objects)


# ---- what is called ------------------------------------------------------------------------------------------------


class World:
    """The objects that calls are made on, and sensible arguments by their names."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng(0)
        self.folder = folder
        self.rows = random.normal(size=(12, 4)).astype(np.float32)
        self.weights = random.random(12)
        self.codecs: list[_core.Codec] = []
        self.tables: list[_core.Table] = [make_table(12, 4), make_table(300, 4)]
        self.tables[0] = self.tables[0].with_metadata([f"n{row}" for row in range(12)], {"a": "b"})
        self.codes: list[np.ndarray] = []
        for kind in _core.kinds():
            codec, codes = _core.fit(kind["name"], small(kind["parameters"]), self.rows)
            self.codecs.append(codec)
            self.codes.append(codes)
            self.tables.append(_core.Table.from_codec(codec, codes, errors={"relative": codec.relative_error}))
        fronted = _core.fit("product", {"n_subvectors": 2, "n_bits": 2, "center": True, "rotation": "pca"}, self.rows)
        groups = _core.Table.from_groups(
            self.codecs[:2],
            [self.codes[0][:6], self.codes[1][6:]],
            np.repeat(np.array([0, 1], np.uint8), 6),
            kind="mixed",
            parameters={},
            errors={},
        )
        self.codecs.append(fronted[0])
        self.codes.append(fronted[1])
        self.tables.append(groups)
        path = folder / "whole.safetensors"
        self.tables[0].save(str(path))
        self.tables.append(_core.Table.open(str(path), "lazy", "mmap"))
        self.closed = make_table(5, 4)
        self.closed.close()
        self.tables.append(self.closed)
        self.parts = [codec.to_parts() for codec in self.codecs]
        self.parts += [(table.info(), table.tensors()) for table in self.tables if not table.closed]
        self.estimators = list(self.fitted())
        self.objects = [
            *self.codecs,
            *self.tables,
            *self.estimators,
            self.rows,
            self.folder,
            vqrs.Table(self.tables[0]),
        ]
        self.targets = self.find_targets()
        self.sensible = self.find_sensible()

    def fitted(self) -> Iterator[Any]:
        try:
            from vqrs.quantizers import __all__ as quantizers
        except ImportError:
            return
        for name in [*quantizers, "KMeans", "MixedPrecisionQuantizer"]:
            if name == "MixedPrecisionQuantizer":
                own: Any = vqrs.MixedPrecisionQuantizer(
                    [vqrs.ScalarQuantizer("int4"), vqrs.VectorQuantizer(2)], n_bits=32
                )
            else:
                cls = getattr(vqrs, name)
                own = cls(**small(cls().get_params(deep=False)))
            yield own.fit(self.rows)

    def find_targets(self) -> list[tuple[int, str, Callable[[Pick], Callable[..., Any]]]]:
        """How often relative to others, the name, and what makes the function."""
        targets: list[tuple[int, str, Callable[[Pick], Callable[..., Any]]]] = []

        def add(often: int, name: str, make: Callable[[Pick], Callable[..., Any]]) -> None:
            targets.append((often, name, make))

        seldom = {"save": 1, "verify": 4, "codec": 4, "fit": 2, "fit_transform": 2, "compress": 2, "partial_fit": 2}
        special = ["__getitem__", "__len__", "__repr__", "_repr_html_", "__array__", "__iter__", "__contains__"]
        for name in [entry for entry in dir(vqrs.Table) if not entry.startswith("_")] + special:
            add(seldom.get(name, 12), f"Table.{name}", lambda pick, name=name: method(self.table(pick), name))
        hidden = {"lookup_at", "pool_at"}  # addresses: the caller answers for them
        for name in [entry for entry in dir(_core.Table) if not entry.startswith("_") and entry not in hidden]:
            static = isinstance(inspect.getattr_static(_core.Table, name), staticmethod)
            often = 12 if name in ("from_parts", "lookup", "pool", "decode") else seldom.get(name, 4)
            make = (lambda pick, name=name: getattr(_core.Table, name)) if static else None
            add(often, f"_core.Table.{name}", make or (lambda pick, name=name: method(self.core_table(pick), name)))
        for name in [entry for entry in dir(_core.Codec) if not entry.startswith("_")]:
            add(
                12 if name == "from_parts" else 4,
                f"_core.Codec.{name}",
                lambda pick, name=name: method(pick.choice(self.codecs), name),
            )
        for name in [
            "kinds",
            "hardware",
            "estimate",
            "fit",
            "check_rows",
            "reconstruction_errors",
            "kmeans_fit",
            "kmeans_predict",
            "kmeans_transform",
        ]:
            add(
                2 if name in ("fit", "kmeans_fit", "kinds") else 8,
                f"_core.{name}",
                lambda pick, name=name: getattr(_core, name),
            )
        add(1, "_core.TableWriter", lambda pick: _core.TableWriter)
        add(1, "written", lambda pick: self.written)
        for name in ["open", "estimate", "kinds", "hardware"]:
            add(6, f"vqrs.{name}", lambda pick, name=name: getattr(vqrs, name))
        for name in ["relative_error", "gaussian_bound", "above_bound_db"]:
            add(4, f"metrics.{name}", lambda pick, name=name: getattr(vqrs.metrics, name))
        add(2, "vqrs.compress", lambda pick: self.compress)
        if self.estimators:
            add(1, "vqrs.tune", lambda pick: self.tune)
            names = [
                "fit",
                "fit_transform",
                "transform",
                "inverse_transform",
                "score",
                "estimate",
                "compress",
                "predict",
                "partial_fit",
                "set_params",
                "get_params",
                "fit_predict",
                "get_feature_names_out",
                "__repr__",
            ]
            for name in names:
                add(
                    seldom.get(name, 8),
                    f"estimator.{name}",
                    lambda pick, name=name: method(copy.copy(pick.choice(self.estimators)), name),
                )
            add(4, "new estimator", lambda pick: self.new_estimator)
        return targets

    def table(self, pick: Pick) -> vqrs.Table:
        return vqrs.Table(self.core_table(pick))

    def core_table(self, pick: Pick) -> _core.Table:
        """One that may be closed without harm to others, most of the time."""
        table = pick.choice(self.tables)
        return table if table.closed else table.with_metadata(table.names(), table.metadata)

    def written(self, path: Any, codec: Any, blocks: Any, sample_weight: Any = None, errors: Any = None) -> None:
        writer = _core.TableWriter(path, codec, durable=False)
        try:
            for block in [blocks, self.rows]:
                writer.write(block, sample_weight=sample_weight)
            writer.finish(errors)
        finally:
            writer.abort()

    def compress(self, x: Any, method: Any = "scalar", ratio: Any = None, nbytes: Any = None, **named: Any) -> None:
        vqrs.compress(x, ratio, nbytes=nbytes, method=method, durable=False, **named)

    def tune(self, x: Any, ratio: Any = 1.0, method: Any = "scalar", **named: Any) -> None:
        vqrs.tune(x, ratio, method=method, effort="fast", n_jobs=1, **named)

    def new_estimator(self, pick: Pick) -> None:
        own = type(pick.choice(self.estimators))
        parameters = small(own().get_params(deep=False))
        for name in pick.sample(sorted(parameters), min(2, len(parameters))):
            parameters[name] = anything(pick, self)
        own(**parameters).fit(self.rows)

    def find_sensible(self) -> dict[str, list[Any]]:
        ids = np.array([0, 3, -1, 2])
        kinds = [entry["name"] for entry in _core.kinds()]
        callbacks = [None, lambda *state: None, Raising(), lambda *state: self.tables[0].lookup(ids), lambda: None]
        half = np.zeros((4, 4), np.float16)
        return {
            "ids": [ids, ids.astype(np.int32), [0, 1], 0, ids[::2], np.array([[0, 1], [2, 3]]), "n1", np.array([99])],
            "rows": [ids, slice(2, 5), [0, 1], 0, slice(None, None, -2), np.ones(12, bool), "n1", ...],
            "out": [
                None,
                np.zeros((4, 4), np.float32),
                half,
                np.zeros((2, 4), np.float32),
                np.zeros((4, 8), np.float32)[:, ::2],
            ],
            "n_jobs": [None, 1, 2, -1],
            "dtype": [None, "float32", "float16", "bfloat16", np.float32],
            "start": [0, 1, 12, -3],
            "stop": [None, 12, 5, 300],
            "offsets": [None, np.array([0, 2]), np.array([0]), np.array([], np.int64), [0, 9]],
            "weights": [None, np.ones(4, np.float32), np.full(4, np.nan, np.float32)],
            "mode": ["sum", "mean", "max", "mmap", "read"],
            "include_last_offset": [False, True],
            "queries": [self.rows, self.rows[:2], self.rows[0]],
            "k": [1, 3, 100],
            "metric": ["l2", "inner_product", "cosine", "euclidean"],
            "path": [str(self.folder / "whole.safetensors"), str(self.folder / "new.safetensors"), self.folder, None],
            "verify": ["header", "lazy", "full"],
            "durable": [False],
            "x": [
                self.rows,
                self.rows[:1],
                self.rows.astype(float),
                np.zeros((5, 4), np.float32),
                np.full((3, 4), 1e15, "f4"),
            ],
            "X": [self.rows, self.rows[:1], self.rows.astype(float), self.rows.tolist()],
            "blocks": [self.rows],
            "sample_weight": [None, self.weights, np.zeros(12), np.full(12, 1e250)],
            "codes": [*self.codes, np.zeros((3, 4), np.uint8), np.zeros((0, 4), np.uint8)],
            "codec": self.codecs,
            "codecs": [self.codecs[:2], self.codecs, []],
            "group_of": [np.zeros(12, np.uint8), np.repeat(np.array([0, 1], np.uint8), 6), np.full(12, 255, np.uint8)],
            "errors": [{}, {"relative": 0.5}, {"relative": float("nan")}],
            "names": [None, [f"n{row}" for row in range(12)], ["a"] * 12, iter(["a"])],
            "metadata": [None, {}, {"a": "b"}],
            "kind": kinds,
            "method": [None, *kinds, *self.estimators],
            "parameters": [
                {},
                {"n_bits": 2},
                {"n_clusters": 3},
                {"dtype": "int4"},
                {"residual": {"kind": "scalar", "parameters": {}}},
            ],
            "seed": [0, 2**64 - 1],
            "random_state": [None, 0],
            "progress": callbacks,
            "n_rows": [1, 1000, 2**40],
            "n_features": [1, 64, 2**14],
            "n_clusters": [1, 3, 12],
            "init": [None, "random", self.rows[:3]],
            "n_init": [1, 2],
            "max_iter": [1, 3],
            "batch_size": [None, 1, 5],
            "max_samples": [None, 1, 5],
            "tol": [0.0, 1e-4],
            "centers": [self.rows[:3], self.rows],
            "ratio": [None, 1.5, 4],
            "nbytes": [None, 9000, "9KiB"],
            "effort": ["fast"],
            "x_hat": [self.rows, self.rows + 1],
            "name": ["n1", "x"],
            "borrow": [False, True],
        }

    def argument(self, name: str, pick: Pick) -> Any:
        if name == "pick":
            return pick
        if name == "description" or name == "tensors":
            return self.part(pick, name == "tensors")
        known = self.sensible.get(name)
        return pick.choice(known) if known and pick.random() < 0.75 else anything(pick, self)

    def part(self, pick: Pick, tensors: bool) -> Any:
        """What a codec or a table is made from, with a change."""
        text, arrays = pick.choice(self.parts)
        if tensors:
            changed = dict(arrays)
            for name in changed:
                if pick.random() < 0.2:
                    changed[name] = any_array(pick) if pick.random() < 0.7 else anything(pick, self)
            return changed
        description = json.loads(text)
        for _ in range(pick.randrange(3)):
            change(description, pick)
        with contextlib.suppress(ValueError):
            return json.dumps(description)
        return text

    def call(self, number: int, seed: int) -> tuple[Callable[[], str], Callable[[], Any]]:
        """The call of a number, in words and ready to be made."""
        pick = Pick(seed * 1_000_003 + number)
        _, name, make = pick.choices(self.targets, self.often)[0]
        function = make(pick)
        if not callable(function):
            return lambda: name, lambda: function
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (ValueError, TypeError):
            parameters = []
        positional, named = [], {}
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.default is not parameter.empty and pick.random() < 0.5:
                continue
            value = self.argument(parameter.name, pick)
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(value)
            else:
                named[parameter.name] = value
        if pick.random() < 0.02:
            named[pick.choice(["nothing", "dtype", "x", "n_bits"])] = anything(pick, self)
        if {"description", "tensors"} <= named.keys() and pick.random() < 0.7:
            named["description"], named["tensors"] = self.pair(pick)

        def what() -> str:
            said = [*map(shown, positional), *(f"{key}={shown(value)}" for key, value in named.items())]
            return f"{name}({', '.join(said)})"

        return what, lambda: use(function(*positional, **named))

    def pair(self, pick: Pick) -> tuple[Any, Any]:
        """A description and tensors of one decoder, one of both changed a little."""
        text, arrays = pick.choice(self.parts)
        description, arrays = json.loads(text), dict(arrays)
        if pick.random() < 0.6:
            change(description, pick)
        elif arrays:
            name = pick.choice(sorted(arrays))
            arrays[name] = any_array(pick) if pick.random() < 0.5 else resized(arrays[name], pick)
        return json.dumps(description), arrays

    @property
    def often(self) -> list[int]:
        return [often for often, _, _ in self.targets]


def method(object_: Any, name: str) -> Any:
    """A method, or a property's value; a closed table has none."""
    try:
        return getattr(object_, name, None)
    except ValueError:
        return None


def small(parameters: dict[str, Any]) -> dict[str, Any]:
    """Defaults, made quick."""
    quick = {
        "max_iter": 2,
        "n_iter": 2,
        "n_bits": 2,
        "n_clusters": 3,
        "n_subvectors": 2,
        "n_refinements": 1,
        "n_rounds": 1,
    }
    quick |= {
        "n_codebooks": 2,
        "n_stages": 2,
        "state_bits": 5,
        "branching": 2,
        "depth": 2,
        "n_components": 2,
        "n_jobs": 1,
    }
    quick |= {"n_init": 1, "random_state": 0}
    return {name: quick.get(name, value) for name, value in parameters.items()}


def change(description: Any, pick: Pick) -> None:
    """One value somewhere in it becomes another."""
    here = description
    while isinstance(here, (dict, list)) and here:
        key = pick.choice(sorted(here)) if isinstance(here, dict) else pick.randrange(len(here))
        if not isinstance(here[key], (dict, list)) or not here[key] or pick.random() < 0.2:
            others = [
                None,
                True,
                0,
                1,
                -1,
                2,
                3,
                7,
                255,
                2**16,
                2**31,
                2**32,
                2**53,
                2**63,
                2**64 - 1,
                1e300,
                "",
                "books",
            ]
            others += ["linear", "scalar", [], {}, [1] * 5, [0, 2**40], {"form": "levels"}]
            value = pick.choice(others)
            if isinstance(here[key], int) and pick.random() < 0.5:
                value = here[key] + pick.choice([-1, 1, 2, 8])
            if pick.random() < 0.1 and isinstance(here, dict):
                del here[key]
            else:
                here[key] = value
            return
        here = here[key]


def resized(array: np.ndarray, pick: Pick) -> np.ndarray:
    way = pick.randrange(4)
    if way == 0:
        return np.ascontiguousarray(array[:-1])
    if way == 1:
        return np.concatenate([array, array])
    if way == 2:
        return array.reshape(-1)
    return np.frombuffer(pick.randbytes(array.nbytes), array.dtype).reshape(array.shape)


def use(result: Any) -> Any:
    """Reads what a call made, so that a fault that was let in is met."""
    if isinstance(result, _core.Codec):
        rows = np.ones((2, result.dim), np.float32) if result.dim < 1000 else None
        result.tensors(), result.description()
        if rows is not None:
            result.decode(result.encode(rows))
    elif isinstance(result, (_core.Table, vqrs.Table)):
        table = result if isinstance(result, vqrs.Table) else vqrs.Table(result)
        if len(table) and table.shape[1] < 10_000:
            table[[0, -1]], table.pool([0]), repr(table), table.info()
            if len(table) < 10_000:
                table.search(np.ones(table.shape[1], np.float32), 2)
    elif inspect.isgenerator(result):
        next(result, None)
    return None


def shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} {value.dtype} {value.shape} {value.strides}"
    try:
        return f"{str(value)[:300]!r}" if not isinstance(value, Raising) else "Raising()"
    except Exception:
        return type(value).__name__


FAULTY = (vqrs.InternalError, SystemError)


def calls_in_a_process(seed: int, first: int, count: int, folder: Path, say: bool) -> None:
    """Makes the calls from number ``first`` on; prints those that raised what they must not."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    world = World(folder)
    with open(folder / "number", "r+b") as file, mmap.mmap(file.fileno(), 8) as shared:
        for number in range(first, first + count):
            shared[:8] = number.to_bytes(8, "little")
            what, make = world.call(number, seed)
            if say:
                print(f"{number}: {what()}", flush=True)
            try:
                make()
            except FAULTY as error:
                print(f"FAULT {number}: {what()}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
            except Exception:  # any other is an answer
                continue
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                print(f"FAULT {number}: {what()}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
        shared[:8] = (first + count).to_bytes(8, "little")


def calls(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """In a process of its own, which is started anew behind a call that ended it."""
    outcome, seed, first, ended = Outcome(), int(random.integers(2**31)), 0, 0
    while first < count and ended < 20:
        reached, faults, end = one_process(seed, first, count - first, folder)
        for fault in faults:
            outcome.failures.append(fault)
        if end:
            ended += 1
            command = f"python -m benches.faults.calls {seed} {reached} 1"
            outcome.failures.append(f"{end} in call {reached}: {command}")
            reached += 1
        outcome.tried, first = outcome.tried + reached - first, reached
    outcome.held = outcome.tried - len(outcome.failures)
    outcome.failures = outcome.failures[:20]
    return outcome


def one_process(seed: int, first: int, count: int, folder: Path) -> tuple[int, list[str], str]:
    """How far it came, what it printed, and how it ended, if not well."""
    number, output = folder / "number", folder / "output"
    number.write_bytes(first.to_bytes(8, "little"))
    command = [sys.executable, "-m", "benches.faults.calls", str(seed), str(first), str(count), str(folder)]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, sys.path)])
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=root, env={**os.environ, "PYTHONPATH": path}
        )
        end, seen, since = "", first, time.monotonic()
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            reached = int.from_bytes(number.read_bytes(), "little")
            if reached != seen:
                seen, since = reached, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                process.kill()
                process.wait()
                end = f"nothing for {PATIENCE} s"
    text = output.read_text(errors="replace")
    reached = int.from_bytes(number.read_bytes(), "little")
    if not end and process.returncode < 0:
        end = signal.Signals(-process.returncode).name
    elif not end and process.returncode:
        end = f"ended with {process.returncode}: {text[-300:]}"
    elif reached != first + count:
        end = end or f"ended after call {reached}"
    return reached, [line for line in text.splitlines() if line.startswith("FAULT")], end


FAULTS = [
    Fault(
        "R19",
        "calls with arguments of every sort, public and private",
        "an answer or an exception; no panic, InternalError, SystemError or signal",
        calls,
        3_000,
        1_000_000,
        slow=True,
        needs=lambda: None if sys.platform == "linux" else "limits memory as Linux does",
    ),
]

if __name__ == "__main__":
    import tempfile

    where = Path(sys.argv[4]) if len(sys.argv) > 4 else Path(tempfile.mkdtemp())
    if len(sys.argv) <= 4:
        (where / "number").write_bytes(bytes(8))
    calls_in_a_process(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), where, say=len(sys.argv) <= 4)
