"""Error against bytes at fixed rates: every kind of ours and every codec of the peers, all bytes counted.

Each run is one raw line in ``results/rates.jsonl`` and is not repeated while its line is there. A peer counts for a
rate if its bytes are at most 2.5 % above it, since not all of its settings hit one; ours may have no more bytes than
the rate, or than the best peer there. Codebooks and rotations of peers are counted in float16, two bytes a value,
though they keep four; ``nbytes_as_stored`` has those.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .methods import Method
from .run import measure
from .surroundings import RESULTS, processor, surroundings

FILE = RESULTS / "rates.jsonl"
RATES = (0.5, 1, 1.25, 1.5, 2, 2.25, 3, 4, 6, 8)
"""Bits a value, everything counted."""

SPEED_RATE = 2
SPEED_ROWS = 20_000
"""How fast kinds are is measured at this rate on so many rows."""

PEER_SLACK = 1.025
TRAIN_ROWS = 65_536
SECONDS = 600
"""A run that takes longer is given up, and its line says so."""


def peers(n_rows: int, dim: int) -> list[Method]:
    """Every setting of a peer that comes close below one of the rates; those that take minutes last."""
    from .methods import faiss_kinds as faiss
    from .methods.plain_kinds import Plain

    plans: list[list[Method]] = [
        [faiss.Scalar(dtype) for dtype in ("4bit", "6bit", "8bit", "fp16", "4bit_uniform", "8bit_uniform")],
        [Plain(dtype, block) for dtype in ("int4", "int8") for block in (None, 32, 64, 128)],
        [Plain("nf4", block) for block in (None, 32, 64, 128)],
        [faiss.RotatedLevels(n_bits) for n_bits in range(1, 9)],
        [faiss.RaBitQ(n_bits) for n_bits in range(1, 10)],
    ]
    for rate in RATES:
        budget = PEER_SLACK * rate * n_rows * dim / 8
        plans += _product_codes(n_rows, dim, budget) + (_sums(n_rows, dim, budget) if rate <= 2 else [])
    return [method for plan in plans for method in plan]


def _product_codes(n_rows: int, dim: int, budget: float) -> list[list[Method]]:
    """Product codes without and with a rotation, in the most parts that fit."""
    from .methods import faiss_kinds as faiss

    found: list[list[Method]] = []
    for n_bits in (8, 6, 7, 5):
        size = lambda m, b=n_bits: n_rows * -(-m * b // 8) + (2 * dim << b)  # noqa: E731
        if n_rows > 30 << n_bits and (parts := _largest(_divisors(dim), size, budget)):
            found.append([faiss.Product(parts, n_bits)])
        parts = _largest(_divisors(dim), size, budget - 2 * dim * (dim + 1))
        if n_rows > 30 << n_bits and parts and parts * 2 <= dim and (n_bits == 8 or (n_bits == 6 and n_rows < 10_000)):
            found.append([faiss.OptimizedProduct(parts, n_bits)])
    return found


def _sums(n_rows: int, dim: int, budget: float) -> list[list[Method]]:
    """Residual, product-residual and additive codes of the most stages that fit, as far as they take minutes."""
    from .methods import faiss_kinds as faiss

    found: list[list[Method]] = []
    for n_bits, most in ((8, 16), (6, 24), (4, 32)):
        stages = _largest(range(1, 128), lambda m, b=n_bits: n_rows * -(-m * b // 8) + (2 * m * dim << b), budget)
        if stages and stages <= most:
            found.append([faiss.Residual(stages, n_bits, 5)])
        if stages and stages <= 9 and n_bits >= 6:
            found.append([faiss.LocalSearch(stages, n_bits)])
    for n_bits in (8, 6):
        size = lambda m, b=n_bits: n_rows * -(-m * 2 * b // 8) + (4 * dim << b)  # noqa: E731
        if parts := _largest(_divisors(dim), size, budget):
            found.append([faiss.ProductResidual(parts, 2, n_bits)])
    return found


def _divisors(dim: int) -> list[int]:
    return [m for m in range(1, dim + 1) if dim % m == 0]


def _largest(values: Any, size: Any, budget: float) -> int | None:
    return max((m for m in values if size(m) <= budget), default=None)


def run_peers(dataset: str, x: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    """One record a setting that has none yet."""
    done = {key(record) for record in read()}
    for method in peers(*x.shape):
        record = {"dataset": dataset, "library": method.library, "settings": method.settings}
        if key(record) not in done:
            done.add(key(record))
            yield record | {"side": "peer", **_about(x), **_within_time(_try_peer, method, x)}


def run_ours(dataset: str, x: NDArray[np.float32], kinds: list[str]) -> Iterator[dict[str, Any]]:
    """One record a kind and rate that has none yet; the rates that matter most come first."""
    done = {key(record) for record in read()}
    for rate in sorted(RATES, key=lambda rate: (rate not in (0.5, 1, 2, 4, 8), rate)):
        for kind in kinds:
            record = {"dataset": dataset, "library": "vqrs", "settings": {"kind": kind, "rate": rate}}
            if key(record) not in done:
                bits = most_bits(dataset, rate)
                yield record | {"side": "ours", **_about(x), **_within_time(_try_ours, kind, rate, bits, x)}


def most_bits(dataset: str, rate: float) -> float:
    """What ours may have: the rate, or the bits of the best peer there."""
    found = best_of(read(), dataset, "peer", PEER_SLACK * rate)
    return rate if found is None else max(rate, found["bits_per_value"])


def best_of(records: Iterable[dict[str, Any]], dataset: str, side: str, most: float) -> dict[str, Any] | None:
    """The record of least error within so many bits."""
    of_side = (r for r in records if (r["dataset"], r["side"]) == (dataset, side) and "relative_error" in r)
    within = (record for record in of_side if record["bits_per_value"] <= most)
    return min(within, key=lambda record: record["relative_error"], default=None)


def _try_ours(kind: str, rate: float, bits: float, x: NDArray[np.float32]) -> dict[str, Any]:
    """The best of a kind within a rate, as ``vqrs.compress`` would find it, without what takes it too long."""
    from vqrs._encode import table_from_codes
    from vqrs._ladders import families_for
    from vqrs._search import EFFORTS, Search

    effort = EFFORTS["balanced"]._replace(finalists=1)
    families = [f for f in families_for(None, {}, *x.shape, effort.level) if f.ladders[0].kind == kind]
    fitted = Search(x, None, 0, None, None, effort).least_error(families, int(bits * x.size / 8)) if families else None
    if fitted is None:
        return {"refused": "nothing is as small"}
    table = table_from_codes(fitted.codec, x, fitted.codes)
    found = {
        "parameters": fitted.candidate.parameters,
        "nbytes": table.nbytes,
        "bits_per_value": 8 * table.nbytes / x.size,
        "relative_error": table.relative_error,
        "gaussian_bound": table.info()["errors"].get("gaussian_bound"),
    }
    return found


def run_speeds(dataset: str, x: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    """One record a kind, with the settings that fill the rate of speeds on some of the rows; one core."""
    from vqrs._ladders import default_parameters

    done = {key(record) for record in read()}
    for kind in default_parameters():
        record = {"dataset": dataset, "library": "vqrs speed", "settings": {"kind": kind, "rate": SPEED_RATE}}
        if key(record) not in done:
            rows = x[:SPEED_ROWS]
            yield record | {"side": "speed", **_about(rows), **_within_time(_time_ours, kind, rows)}


def _time_ours(kind: str, x: NDArray[np.float32]) -> dict[str, Any]:
    from vqrs import _core
    from vqrs._ladders import BALANCED, families_for

    ladders = [family.ladders[family.start] for family in families_for(None, {}, *x.shape, BALANCED)]
    fitting = [ladder for ladder in ladders if ladder.kind == kind and ladder.steps_within(SPEED_RATE * x.size // 8)]
    parameters: dict[str, Any] = {}
    if fitting and not fitting[0].measured:
        parameters = fitting[0][fitting[0].steps_within(SPEED_RATE * x.size // 8) - 1].parameters
    times = [time.process_time()]
    codec, codes = _core.fit(kind, parameters, x, n_jobs=1)
    times.append(time.process_time())
    codec.encode(x, n_jobs=1)
    times.append(time.process_time())
    codec.decode(codes, n_jobs=1)
    times.append(time.process_time())
    fit, encode, decode = np.diff(times).tolist()
    again = [time.process_time()]
    for _ in range(5):
        codec.decode(codes, n_jobs=1)
        again.append(time.process_time())
    return {
        "parameters": parameters,
        "relative_error": _core.reconstruction_errors(x, codes, codec)["relative"],
        "bits_per_value": 8 * _core.Table.from_codec(codec, codes, errors={"relative": 0.0}).nbytes / x.size,
        "fit_cpu_s": fit,
        "encode_cpu_s": encode,
        "decode_cpu_s": min(decode, *np.diff(again).tolist()),
    }


def key(record: dict[str, Any]) -> str:
    """What makes two records the same run."""
    return json.dumps([record[name] for name in ("dataset", "library", "settings")], sort_keys=True)


def read() -> list[dict[str, Any]]:
    """The raw lines kept so far."""
    return [json.loads(line) for line in FILE.read_text("utf-8").splitlines()] if FILE.exists() else []


def keep(record: dict[str, Any]) -> None:
    """Appends a raw line."""
    FILE.parent.mkdir(exist_ok=True)
    with open(FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def line(record: dict[str, Any]) -> str:
    """A record in one line."""
    name = " ".join(str(value) for value in record["settings"].values())
    if "relative_error" not in record:
        return f"{record['dataset']:<8}{record['library']:<14}{name:<44} none: {record['seconds']:.0f} s"
    return (
        f"{record['dataset']:<8}{record['library']:<14}{name:<44}{record['bits_per_value']:>8.4f} bits"
        f"{record['relative_error']:>12.4g}{record['seconds']:>9.1f} s"
    )


def _about(x: NDArray[np.float32]) -> dict[str, Any]:
    around = surroundings(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shared = {name: around[name] for name in ("date", "commit", "threads")}
    return shared | {"machine": processor(), "n_rows": len(x), "n_features": x.shape[1]}


def _within_time(job: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What was measured, by a child that is ended when it takes too long: the peers cannot be interrupted."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, job, arguments))
    begin = time.perf_counter()
    child.start()
    found = receiver.recv() if receiver.poll(SECONDS) else {"given_up_after_s": SECONDS}
    if "given_up_after_s" in found:
        child.terminate()
    child.join()
    return found | {"seconds": round(time.perf_counter() - begin, 3)}


def _send(sender: Any, job: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        found = job(*arguments)
    except Exception as error:  # What is refused is a result too.
        found = {"refused": f"{type(error).__name__}: {error}"[:200]}
    sender.send(found)


def _try_peer(method: Any, x: NDArray[np.float32]) -> dict[str, Any]:
    method.train_rows, method.value_bytes = TRAIN_ROWS, 2
    found = measure(method, x)
    method.value_bytes = 4
    stored = method.nbytes(len(x))
    return found | {"nbytes_as_stored": stored, "bits_per_value": 8 * found["nbytes"] / x.size}
