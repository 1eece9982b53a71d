"""Memory of worker processes that serve one embedding table: mapped, or a ``torch.nn.Embedding`` in each.

``python -m benches.serving`` prints a table and appends raw lines to ``compare/results/serving.jsonl``. Every way of
serving runs in a process of its own with as many workers as asked for; each worker looks random rows up until all of
its pages were touched, then reads ``/proc/self/smaps_rollup`` while all the others are still there. Linux only.
"""

import argparse
import multiprocessing
import multiprocessing.synchronize
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from .compare.surroundings import keep, surroundings

BATCH = 4_096
MIB = 1 << 20
FIELDS = ("Rss", "Pss", "Private_Dirty", "Anonymous")


def main() -> None:
    """Writes the tables, runs every way of serving, prints what a worker took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        paths = _run(context, _write, options.rows, options.columns, folder)
        sizes = {name: Path(path).stat().st_size for name, path in paths.items()}
        mine = sizes["table"] / MIB
        print(f"{options.rows:,} x {options.columns}: float32 {sizes['weight'] / MIB:.1f} MiB, vqrs {mine:.1f} MiB")
        heads = ("anonymous", "of its own, written", "share of all (Pss)", "resident")
        print(f"\n| {options.workers} workers, MiB each | {' | '.join(heads)} | right rows |\n|{' --- |' * 6}")
        around = surroundings(1)
        for title, (start, make) in WAYS.items():
            found = _run(context, _serve, start, make, paths, options.workers)
            mean = {field: sum(worker[field] for worker in found) / len(found) / MIB for field in FIELDS}
            right = all(worker["right"] for worker in found)
            cells = [f"{mean[field]:.1f}" for field in ("Anonymous", "Private_Dirty", "Pss", "Rss")]
            print(f"| {title} | {' | '.join(cells)} | {'yes' if right else 'NO'} |", flush=True)
            keep(
                "serving", around | {"way": title, "shape": [options.rows, options.columns], "workers": found, **sizes}
            )


def _write(rows: int, columns: int, folder: str) -> dict[str, str]:
    """The table compressed, its decoded rows as a torch file (so that all ways must answer the same)."""
    import torch

    import vqrs

    paths = {"table": f"{folder}/table.safetensors", "weight": f"{folder}/weight.pt"}
    x = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    quantizer = vqrs.ProductQuantizer(n_subvectors=columns // 8, n_bits=8, max_iter=5, random_state=0)
    table = quantizer.fit(x[:20_000]).compress(x, path=paths["table"])
    torch.save({"weight": torch.from_numpy(table.to_numpy())}, paths["weight"])
    return paths


def _nothing(paths: dict[str, str]) -> Any:
    """What a worker takes before it has a table."""
    import torch

    import vqrs.torch  # noqa: F401

    return lambda ids: torch.empty(len(ids), 0)


def _loaded(paths: dict[str, str], mmap: bool = False) -> Any:
    import torch

    import vqrs.torch  # noqa: F401

    weight = torch.load(paths["weight"], mmap=mmap)["weight"]
    return torch.nn.Embedding.from_pretrained(weight)


def _mapped_weight(paths: dict[str, str]) -> Any:
    return _loaded(paths, mmap=True)


def _mapped(paths: dict[str, str]) -> Any:
    from vqrs.torch import Embedding

    return Embedding.from_table(paths["table"])


def _compiled(paths: dict[str, str]) -> Any:
    """Compiled in the parent, by inductor where there is a C++ compiler."""
    import torch

    model = torch.compile(_mapped(paths))
    with torch.inference_mode():
        model(torch.zeros(BATCH, dtype=torch.int64))
    return model


WAYS: dict[str, tuple[str, Callable[[dict[str, str]], Any]]] = {
    "no table: torch and vqrs imported": ("spawn", _nothing),
    "`nn.Embedding`, loaded by each worker": ("spawn", _loaded),
    "`nn.Embedding`, `torch.load(mmap=True)` by each worker": ("spawn", _mapped_weight),
    "`vqrs.torch.Embedding`, mapped by each worker": ("spawn", _mapped),
    "no table, forked": ("fork", _nothing),
    "`nn.Embedding`, preloaded, forked": ("fork", _loaded),
    "`vqrs.torch.Embedding`, preloaded, forked": ("fork", _mapped),
    "the same, compiled": ("fork", _compiled),
    "`vqrs.torch.Embedding`, workers of a DataLoader": ("loader", _mapped),
}


def _serve(
    start: str, make: Callable[[dict[str, str]], Any], paths: dict[str, str], n_workers: int
) -> list[dict[str, Any]]:
    """One way of serving: what each worker says of its memory."""
    import torch

    # One thread from the start: a fork leaves torch's own threads behind, and compiled code is made for their number.
    torch.set_num_threads(1)
    if start == "loader":
        return _loaders(make(paths), paths, n_workers)
    context = multiprocessing.get_context(start)
    everybody = context.Barrier(n_workers)
    given: Any = make
    if start == "fork":
        model = make(paths)
        with torch.inference_mode():
            model(torch.zeros(BATCH, dtype=torch.int64))  # use in the parent before the fork
        given = lambda _: model  # noqa: E731  a forked child takes it as it is
    children = []
    for seed in range(n_workers):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(given, paths, seed, everybody, theirs))
        child.start()
        theirs.close()
        children.append((child, ours))
    found = [receiver.recv() for _, receiver in children]
    for child, _ in children:
        child.join()
    return found


def _work(
    make: Any, paths: dict[str, str], seed: int, everybody: multiprocessing.synchronize.Barrier, answer: Connection
) -> None:
    import torch

    torch.set_num_threads(1)
    model = make(paths)
    checked = _look_up_all(model, seed)
    everybody.wait(600)  # shares are of all workers that are there
    memory = _memory()
    everybody.wait(600)
    answer.send(memory | {"right": _right(checked, paths)})


def _loaders(model: Any, paths: dict[str, str], n_workers: int) -> list[dict[str, Any]]:
    """Workers of a DataLoader, each of which looks all rows up and reads its memory."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    everybody = multiprocessing.get_context("fork").Barrier(n_workers)
    model(torch.zeros(BATCH, dtype=torch.int64))

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            checked = _look_up_all(model, torch.utils.data.get_worker_info().id)
            everybody.wait(600)
            memory = _memory()
            everybody.wait(600)
            yield memory | {"right": _right(checked, paths)}

    loader = DataLoader(Stream(), batch_size=None, num_workers=n_workers, multiprocessing_context="fork")
    return list(loader)


def _look_up_all(model: Any, seed: int) -> tuple[Any, Any]:
    """Every row once, by batches in random order (of neighbours, so that ids take no memory); the last one's rows."""
    import torch

    rng = np.random.default_rng(seed)
    n_rows = getattr(model, "num_embeddings", BATCH)
    with torch.inference_mode():
        for batch in rng.permutation(n_rows // BATCH):
            ids = torch.from_numpy(batch * BATCH + rng.permutation(BATCH))
            rows = model(ids)
    return ids.numpy(), rows.numpy()


def _right(checked: tuple[Any, Any], paths: dict[str, str]) -> bool:
    """Whether the rows are those of the table."""
    import vqrs

    ids, rows = checked
    return rows.shape[1] == 0 or bool(np.allclose(rows, vqrs.open(paths["table"])[ids], atol=1e-6))


def _memory() -> dict[str, int]:
    """Bytes of this process, from ``/proc/self/smaps_rollup``."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    found = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
    return {field: found[field] for field in FIELDS}


def _run(context: Any, job: Callable[..., Any], *arguments: Any) -> Any:
    """A job's result, from a process of its own."""
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, job, arguments))
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise SystemExit(f"{job.__name__}{arguments} failed: see above") from None
    finally:
        child.join()
    return found


def _send(sender: Connection, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(job(*arguments))


if __name__ == "__main__":
    main()
