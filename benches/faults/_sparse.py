"""Table files of any size that take no room on the disk: rows of zeros are holes. Checksums are XXH3, in numpy.

Y. Collet, "xxHash", https://github.com/Cyan4973/xxHash: only what inputs of more than 240 bytes need.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ._files import layout

BLOCK = 65_536
MAGIC = bytes.fromhex("89767172730d0a1a")
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32 = [0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D]
PRIME64 = [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5]
START = np.array([PRIME32[2], *PRIME64[:4], PRIME32[1], PRIME64[4], PRIME32[0]], np.uint64)
MASK, U32 = 2**64 - 1, np.uint64(0xFFFFFFFF)
LINE, STRIPE = 1024, 64
"""Bytes between two scramblings, and of a step."""

Words = np.ndarray[Any, np.dtype[np.uint64]]


def secrets(seeds: Words) -> np.ndarray:
    """The secret of each seed, as bytes (n_seeds, 192)."""
    words = np.tile(np.frombuffer(SECRET, "<u8"), (len(seeds), 1))
    words[:, ::2] += seeds[:, None]
    words[:, 1::2] -= seeds[:, None]
    return words.view(np.uint8)


def words_at(secret: np.ndarray, start: int) -> Words:
    return np.ascontiguousarray(secret[:, start : start + 64]).view("<u8")


def added(state: Words, data: Words, key: Words) -> Words:
    """A stripe taken in."""
    mixed = data ^ key
    swapped = data.reshape(-1, 4, 2)[:, :, ::-1].reshape(data.shape)
    return state + swapped + (mixed & U32) * (mixed >> np.uint64(32))


def scrambled(state: Words, key: Words) -> Words:
    return (state ^ (state >> np.uint64(47)) ^ key) * np.uint64(PRIME32[0])


def merged(state: list[int], secret: bytes, start: int) -> int:
    for pair in range(4):
        key = [int.from_bytes(secret[16 * pair + 8 * half : 16 * pair + 8 * half + 8], "little") for half in (0, 1)]
        product = (state[2 * pair] ^ key[0]) * (state[2 * pair + 1] ^ key[1])
        start += (product & MASK) ^ (product >> 64)
    start &= MASK
    start ^= start >> 37
    start = start * 0x165667919E3779F9 & MASK
    return start ^ start >> 32


def state_of(content: bytes, seed: int) -> tuple[list[int], bytes]:
    """The state after all of the content, and the secret."""
    if len(content) <= 240:
        raise ValueError(f"{len(content)} bytes are hashed in another way, which is not here")
    secret = secrets(np.array([seed], np.uint64))
    keys = [words_at(secret, 8 * stripe) for stripe in range(16)]
    state = START[None].copy()
    whole, rest = divmod(len(content) - 1, LINE)
    stripes = np.frombuffer(content[: whole * LINE + rest // STRIPE * STRIPE], "<u8").reshape(-1, 1, 8)
    with np.errstate(over="ignore"):
        for number, stripe in enumerate(stripes):
            state = added(state, stripe, keys[number % 16])
            if number % 16 == 15:
                state = scrambled(state, words_at(secret, 128))
        state = added(state, np.frombuffer(content[-STRIPE:], "<u8")[None], words_at(secret, 121))
    return [int(word) for word in state[0]], secret.tobytes()


def xxh3_64(content: bytes, seed: int) -> int:
    state, secret = state_of(content, seed)
    return merged(state, secret[11:], len(content) * PRIME64[0] & MASK)


def xxh3_128(content: bytes) -> bytes:
    state, secret = state_of(content, 0)
    low = merged(state, secret[11:], len(content) * PRIME64[0] & MASK)
    high = merged(state, secret[192 - 64 - 11 :], ~(len(content) * PRIME64[1]) & MASK)
    return low.to_bytes(8, "little") + high.to_bytes(8, "little")


def zeros_64(seeds: Words) -> Words:
    """The checksum of a block of zeros under each seed."""
    secret = secrets(seeds)
    state = np.tile(START, (len(seeds), 1))
    nothing = np.zeros((1, 8), np.uint64)
    with np.errstate(over="ignore"):
        shares = [added(nothing, nothing, words_at(secret, 8 * stripe)) for stripe in range(16)]
        line, last = sum(shares[1:], shares[0]), sum(shares[1:15], shares[0])
        key = words_at(secret, 128)
        for _ in range((BLOCK - 1) // LINE):
            state = scrambled(state + line, key)
        state = state + last + added(nothing, nothing, words_at(secret, 121))
        keys = np.ascontiguousarray(secret[:, 11:75]).view("<u8")
        total = np.uint64(BLOCK * PRIME64[0] & MASK)
        total = total + folded(state[:, ::2] ^ keys[:, ::2], state[:, 1::2] ^ keys[:, 1::2])
        total ^= total >> np.uint64(37)
        total *= np.uint64(0x165667919E3779F9)
    return total ^ total >> np.uint64(32)


def folded(a: Words, b: Words) -> Words:
    """The halves of the products of 128 bits, combined and summed by rows."""
    half = np.uint64(32)
    low, high = [x & U32 for x in (a, b)], [x >> half for x in (a, b)]
    first, second = high[0] * low[1], low[0] * high[1]
    carry = (low[0] * low[1] >> half) + (first & U32) + (second & U32)
    upper = high[0] * high[1] + (first >> half) + (second >> half) + (carry >> half)
    return ((a * b) ^ upper).sum(1, dtype=np.uint64)


def grow(path: Path, content: bytes, n_rows: int, known: dict[int, bytes]) -> None:
    """Writes the table of ``content`` with ``n_rows`` rows of zeros in place of its own, but for the ``known`` ones."""
    size, tensors, metadata = layout(content)
    described = json.loads(metadata["vqrs"]) | {"rows": n_rows}
    row_bytes = tensors["codes"]["shape"][1]
    entries: dict[str, dict[str, Any]] = {}
    pieces: list[tuple[int, bytes]] = []
    end = 0

    def place(name: str, dtype: str, shape: list[int], nbytes: int, data: bytes | None) -> int:
        nonlocal end
        if end % 64:
            pad = -end % 64
            entries[f"__pad.{sum(entry.startswith('__pad') for entry in entries)}"] = info("U8", [pad], end, end + pad)
            end += pad
        entries[name] = info(dtype, shape, end, end + nbytes)
        if data is not None:
            pieces.append((end, data))
        end += nbytes
        return end - nbytes

    place("codes", "U8", [n_rows, row_bytes], n_rows * row_bytes, None)
    for name, own in tensors.items():
        if not name.startswith(("codes", "__pad.", "vqrs.")):
            start, stop = own["data_offsets"]
            place(name, own["dtype"], own["shape"], stop - start, content[size + start : size + stop])
    header_size = size
    n_blocks = -(-(header_size + end + -end % 64) // BLOCK)
    blocks_at = place("vqrs.blocks", "U64", [n_blocks], 8 * n_blocks, None)
    footer_at = place("vqrs.footer", "U8", [32], 32, None)
    text = json.dumps(
        {"__metadata__": metadata | {"vqrs": json.dumps(described, separators=(",", ":"), sort_keys=True)}, **entries},
        separators=(",", ":"),
    ).encode()
    header = (header_size - 8).to_bytes(8, "little") + text.ljust(header_size - 8)
    if len(header) != header_size:
        raise ValueError("the header has no room for the numbers")
    with open(path, "wb") as file:
        file.truncate(header_size + end)
        written = [(0, header), *((header_size + at, data) for at, data in pieces)]
        written += [(header_size + row * row_bytes, code) for row, code in known.items()]
        for at, data in written:
            os.pwrite(file.fileno(), data, at)
        hashes = zeros_64(np.arange(n_blocks, dtype=np.uint64))
        touched = {number for at, data in written for number in range(at // BLOCK, (at + len(data) - 1) // BLOCK + 1)}
        touched.add(n_blocks - 1)
        with open(path, "rb") as reader:
            for number in touched:
                stop = min((number + 1) * BLOCK, header_size + blocks_at)
                block = os.pread(reader.fileno(), stop - number * BLOCK, number * BLOCK)
                hashes[number] = xxh3_64(block, number)
        os.pwrite(file.fileno(), hashes.tobytes(), header_size + blocks_at)
        whole = (header_size + end).to_bytes(8, "little")
        os.pwrite(file.fileno(), MAGIC + xxh3_128(header + hashes.tobytes()) + whole, header_size + footer_at)


def info(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
