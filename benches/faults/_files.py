"""Tables to damage, and their files taken apart and put together without any code of vqrs but the reference."""

import json
from pathlib import Path

import numpy as np

from vqrs import _core

GOLDEN = sorted((Path(__file__).parents[2] / "tests" / "data").glob("*.safetensors"))


def make_table(
    n_rows: int = 50, dim: int = 6, seed: int = 0, kind: str = "scalar", **parameters: object
) -> _core.Table:
    """A small table in memory; equal arguments give equal bytes."""
    x = np.random.default_rng(seed).normal(size=(n_rows, dim)).astype(np.float32)
    codec, codes = _core.fit(kind, parameters or {"dtype": "int8"}, x)
    return _core.Table.from_codec(codec, codes, errors={"relative": codec.relative_error})


def layout(content: bytes) -> tuple[int, dict[str, dict], dict[str, str]]:
    """Size of the header, then tensors and metadata, as the safetensors format describes them."""
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    metadata = header.pop("__metadata__")
    return size, header, metadata


def byte_range(content: bytes, tensor: str) -> range:
    """Where the bytes of a tensor stand in the file."""
    size, tensors, _ = layout(content)
    start, end = tensors[tensor]["data_offsets"]
    return range(size + start, size + end)


def decoder_names(content: bytes) -> list[str]:
    """The tensors of the decoder."""
    return [name for name in layout(content)[1] if not name.startswith(("vqrs.", "__pad.")) and name != "codes"]
