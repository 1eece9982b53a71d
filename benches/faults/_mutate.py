"""Table files taken apart, changed at random with an eye to their structure, and sealed again with right checksums, so
that what stands behind the checksums is reached.
"""

import copy
import json
import math
from typing import Any

import numpy as np

from vqrs import reference

from ._files import layout

SIZES = {"U8": 1, "I8": 1, "U64": 8, "F16": 2, "BF16": 2, "F32": 4}

NUMBERS = [0, 1, 2, 3, 5, 7, 8, 16, 20, 31, 32, 33, 63, 64, 65, 127, 255, 256, 4095, 4096, 4097, 65535, 65536]
NUMBERS += [2**k + shift for k in (20, 24, 26, 31, 32, 40, 53, 62, 63, 64) for shift in (-1, 0, 1)]
NUMBERS += [-1, -(2**31), -(2**63), -(2**64), 10**30]
OTHERS = [
    None,
    True,
    False,
    "",
    "x",
    "0" * 5,
    "8" * 300,
    0.5,
    -0.0,
    1e-320,
    1e38,
    1e300,
    -1.5,
    [],
    {},
    [[]],
    [0],
    {"a": 1},
]
WORDS = ["books", "levels", "linear", "join", "sparse", "segments", "hashed", "switch", "trellis", "float16", "float32"]
WORDS += [
    "bfloat16",
    "int8",
    "int4",
    "int2",
    "table3",
    "free4",
    "float8",
    "row",
    "column",
    "block",
    "bitmap",
    "columns",
]
WORDS += ["sum", "matrix", "none", "hadamard", "hash", "digit", "stored", "holograms"]


class Parts:
    """A file taken apart: the description, the user's metadata, and tensors by name as [type, shape, bytes]."""

    def __init__(self, content: bytes) -> None:
        size, tensors, metadata = layout(content)
        self.description: dict[str, Any] = json.loads(metadata.pop("vqrs"))
        self.metadata = {key: value for key, value in metadata.items() if key != "format"}
        self.tensors: dict[str, list] = {}
        for name, info in tensors.items():
            if not name.startswith("__pad.") and name not in ("vqrs.blocks", "vqrs.footer"):
                start, end = (size + at for at in info["data_offsets"])
                self.tensors[name] = [info["dtype"], list(info["shape"]), content[start:end]]

    def content(self, change=None) -> bytes:
        """The file, sealed; ``change`` may edit the tensor list, whatever becomes of it."""
        placed, body = {}, bytearray()

        def put(name: str, dtype: str, shape: list[int], data: bytes) -> None:
            placed[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
            body.extend(data)

        def align() -> None:
            if missing := -len(body) % 64:
                pads = sum(name.startswith("__pad.") for name in placed)
                put(f"__pad.{pads}", "U8", [missing], bytes(missing))

        for name, tensor in self.tensors.items():
            align()
            put(name, *tensor)
        align()
        metadata = {**self.metadata, "format": "pt", "vqrs": json.dumps(self.description)}
        # Numbers of the places of what follows have a few digits at most.
        room = len(json.dumps({"__metadata__": metadata, **placed})) + 500
        size = -(-room // 4096) * 4096
        blocks = -(-(size + len(body)) // reference.BLOCK)
        put("vqrs.blocks", "U64", [blocks], bytes(8 * blocks))
        align()
        put("vqrs.footer", "U8", [32], bytes(32))
        pairs = [("__metadata__", metadata), *placed.items()]
        if change is not None:
            pairs = change(pairs)
        text = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in pairs)
        text = (text + "}").encode().ljust(size - 8)
        text = text.ljust(-(-(len(text) + 8) // 4096) * 4096 - 8)
        return reseal(len(text).to_bytes(8, "little") + text + bytes(body), blocks)


def reseal(content: bytes, blocks: int | None = None) -> bytes:
    """The same file with checksums that are right, where it has as much at its end as they take."""
    size = 8 + int.from_bytes(content[:8], "little")
    if blocks is None:
        blocks = layout(content)[1]["vqrs.blocks"]["shape"][0]
    start = len(content) - 32 - (-(-8 * blocks // 64) * 64)
    parts = [content[at : min(start, at + reference.BLOCK)] for at in range(0, start, reference.BLOCK)]
    sums = b"".join(reference.xxh3_64(part, number) for number, part in enumerate(parts))
    sums = sums[: 8 * blocks].ljust(8 * blocks, b"\0")
    end = reference.MAGIC + reference.xxh3_128(content[:size] + sums) + len(content).to_bytes(8, "little")
    return content[:start] + sums.ljust(-(-8 * blocks // 64) * 64, b"\0") + end


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(found for key, item in inside for found in nodes(item, (*path, key)))]


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


class Mutator:
    """Changes of everything that a file says, picked by a seeded generator."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random

    def pick(self, items: list) -> Any:
        return items[int(self.random.integers(len(items)))]

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def value(self, old: Any) -> Any:
        """Something else, most often of the same type."""
        if type(old) is int and self.chance(0.8):
            return self.pick([*NUMBERS, old + 1, old - 1, 2 * old, old // 2])
        if isinstance(old, str) and self.chance(0.8):
            return self.pick(WORDS)
        if isinstance(old, bool) and self.chance(0.8):
            return not old
        return copy.deepcopy(self.pick([*NUMBERS, *OTHERS, *WORDS]))

    def edit(self, tree: Any) -> None:
        """One change somewhere inside a JSON value."""
        places = nodes(tree)[1:]
        if not places:
            return
        path = self.pick(places)
        parent, key = at(tree, path[:-1]), path[-1]
        what = self.random.integers(10)
        if what < 6:
            parent[key] = self.value(parent[key])
        elif what == 6:
            del parent[key]
        elif what == 7:
            parent[key] = copy.deepcopy(at(tree, self.pick(places)))
        elif what == 8 and isinstance(parent, list):
            parent.extend(copy.deepcopy(parent[key]) for _ in range(int(self.pick([1, 2, 300, 5000]))))
        elif isinstance(parent, dict):
            parent[self.pick(["unknown", "rows", "dim", "bits", "sign", "weight", "multiply", "scale_dtype"])] = (
                self.value(1)
            )

    def wrap(self, parts: Parts) -> None:
        """Puts the decoder into another one, once or many times."""
        inner, dim = parts.description.get("decoder"), parts.description.get("dim")
        kind, times = (
            self.pick(["linear", "hadamard", "join", "columns", "switch", "segments"]),
            self.pick([1, 1, 2, 15, 16, 30]),
        )
        prefix = {"linear": "inner.", "hadamard": "inner.", "switch": "otherwise.", "segments": "groups.0."}.get(
            kind, "parts.0."
        )
        for _ in range(times):
            if kind in ("linear", "hadamard"):
                rotation = {"kind": "none"} if kind == "linear" else {"kind": "hadamard", "seed": 7, "rounds": 2}
                inner = {"form": "linear", "dim": dim, "mean": False, "rotation": rotation, "inner": inner}
            elif kind == "segments":
                groups = [{"rows": parts.tensors["codes"][1][0], "decoder": inner}]
                inner = {"form": "segments", "dim": dim, "map": False, "groups": groups}
            elif kind == "switch":
                case = {"start": 1, "rows": 3, "decoder": {"form": "linear"}}
                inner = {"form": "switch", "dim": dim, "cases": [case], "otherwise": inner, "shared": {}}
            else:
                inner = {"form": "join", "dim": dim, "mode": "sum" if kind == "join" else "columns", "parts": [inner]}
            parts.tensors = {
                name if name == "codes" or name.startswith("vqrs.") else prefix + name: tensor
                for name, tensor in parts.tensors.items()
            }
        parts.description["decoder"] = inner

    def tensor(self, parts: Parts) -> None:
        """One change of a tensor: type, shape, name, bytes; one less or one more."""
        name = self.pick(list(parts.tensors))
        dtype, shape, data = parts.tensors[name]
        what = self.random.integers(7)
        if what == 0:
            parts.tensors[name][0] = self.pick(list(SIZES))
        elif what == 1 and shape:
            shape = list(shape)
            shape[int(self.random.integers(len(shape)))] = int(self.pick([n for n in NUMBERS if 0 <= n <= 256]))
            parts.tensors[name][1] = shape
        elif what == 2 and len(parts.tensors) > 1:
            del parts.tensors[name]
            return
        elif what == 3:
            parts.tensors[self.pick([name + "x", "map", "scales", "vqrs.extra", "vqrs.names", "codebooks.0"])] = [
                dtype,
                shape,
                data,
            ]
        elif what == 4:
            parts.tensors[name][1] = self.pick([[len(data) // SIZES[dtype]], [1, *shape], [*shape, 1], [0]])
        else:
            parts.tensors[name][2] = self.random.bytes(len(data))
        dtype, shape, data = parts.tensors[name]
        wanted = min(math.prod(shape), 1 << 16) * SIZES[dtype]
        parts.tensors[name][2] = (data + self.random.bytes(max(0, wanted - len(data))))[:wanted]

    def repair(self, parts: Parts) -> None:
        """Makes sizes agree again that a change has set apart, so that more of the reader is reached."""
        description, codes = parts.description, parts.tensors.get("codes")
        try:
            decoder = description["decoder"]
            width = reference.row_bytes(decoder)
            if codes is not None and 0 <= width <= 4096:
                rows = codes[1][0] if isinstance(codes[1][0], int) and codes[1][0] <= 4096 else 20
                parts.tensors["codes"] = ["U8", [rows, width], (codes[2] + bytes(rows * width))[: rows * width]]
            description["dim"] = decoder["dim"]
        except Exception:
            pass
        if codes is not None and len(parts.tensors["codes"][1]) == 2:
            description["rows"], description["row_bytes"] = parts.tensors["codes"][1]

    def header(self, pairs: list) -> list:
        """One change of the tensor list itself."""
        pairs = copy.deepcopy(pairs)
        place = int(self.random.integers(len(pairs)))
        key, value = pairs[place]
        what = self.random.integers(9)
        if what < 4 and isinstance(value, dict) and value:
            self.edit(value)
        elif what == 4:
            pairs.insert(int(self.random.integers(len(pairs) + 1)), (key, copy.deepcopy(value)))
        elif what == 5:
            pairs[place] = (self.pick(["codes", "codes2", "__pad.9", "__x", "", "vqrs.footer", "é", "a" * 600]), value)
        elif what == 6:
            del pairs[place]
        elif what == 7:
            other = int(self.random.integers(len(pairs)))
            pairs[place], pairs[other] = pairs[other], pairs[place]
        else:
            pairs[place] = (key, self.value(value))
        return pairs

    def file(self, content: bytes) -> bytes:
        """A file that was changed in a few places and sealed."""
        parts = Parts(content)
        for _ in range(int(self.random.integers(1, 4))):
            what = self.random.integers(10)
            if what < 5:
                self.edit(parts.description.get("decoder", parts.description))
            elif what == 5:
                self.edit(parts.description)
            elif what == 6 and "codes" in parts.tensors:
                self.wrap(parts)
            elif what < 9 and parts.tensors:
                self.tensor(parts)
        if self.chance(0.7):
            self.repair(parts)
        return parts.content(self.header if self.chance(0.25) else None)
