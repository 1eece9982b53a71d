"""Serve a torch model from several processes that map one table: DataLoader workers, and workers behind a preload.

The table is a file. Every process that opens it, and every worker that is forked from one that did, maps the same
pages: a worker more costs what it computes with, not another table.

Torch's own threads do not survive a fork: a worker that runs a large torch operator after its parent did waits for
ever. A DataLoader knows that and gives its workers one thread. Where you fork (gunicorn with ``preload_app``, uWSGI,
multiprocessing), say ``torch.set_num_threads(1)`` before the model is loaded, or first thing in the worker. The lookups
of vqrs have threads of their own, which are made anew after a fork.

Run it:  python examples/05_serve_torch.py    (Linux and macOS: it forks)
"""

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import vqrs
import vqrs.torch

N_ROWS, DIM, WORKERS, REQUESTS = 100_000, 64, 4, 20


class Scorer(nn.Module):
    """Answers a batch of texts, ids of shape (n_texts, n_words), by one number each."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.words = vqrs.torch.Embedding.from_table(path)  # mapped: nothing is read but the header
        self.score = nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.score(self.words(ids).mean(1)).squeeze(1)


class Rows(Dataset):
    """Texts whose rows are looked up by the workers of a DataLoader."""

    def __init__(self, words: vqrs.torch.Embedding, texts: torch.Tensor) -> None:
        self.words, self.texts = words, texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.words(self.texts[number])


def own_memory() -> int | None:
    """Bytes that this process shares with no other and has written; None where the system does not tell."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in rollup.read_text().splitlines() if "Private_Dirty" in line)


def work(model: nn.Module, requests: Connection) -> None:
    """A worker: it answers until the parent hangs up, then says what memory it has of its own."""
    torch.set_num_threads(1)  # what the parent's operators left of torch's threads is gone
    with torch.inference_mode():
        while (ids := requests.recv()) is not None:
            requests.send(model(ids))
    requests.send(own_memory())


def preload(title: str, model: nn.Module) -> None:
    """The parent has the model, and has used it; its workers are forked and answer over pipes."""
    texts = torch.randint(N_ROWS, (REQUESTS, 500, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = [model(ids) for ids in texts]  # use in the parent: threads are up, pages are read
    context = multiprocessing.get_context("fork")
    workers = []
    for _ in range(WORKERS):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(model, theirs), daemon=True)
        process.start()
        workers.append((process, ours))
    answers = []
    for number, ids in enumerate(texts):
        _, pipe = workers[number % WORKERS]
        pipe.send(ids)
        answers.append(pipe.recv())
    memory = []
    for process, pipe in workers:
        pipe.send(None)
        memory.append(pipe.recv())
        process.join()
    right = all(torch.allclose(found, wanted, atol=1e-6) for found, wanted in zip(answers, expected, strict=True))
    print(f"{title}: {len(answers)} answers, {'all right' if right else 'WRONG'}{told(memory)}")


def load_data(words: vqrs.torch.Embedding) -> None:
    """A DataLoader's forked workers look rows up, after the parent has."""
    texts = torch.randint(N_ROWS, (400, 20), generator=torch.Generator().manual_seed(2))
    expected = words(texts)
    loader = DataLoader(Rows(words, texts), batch_size=50, num_workers=WORKERS, multiprocessing_context="fork")
    right = torch.equal(torch.cat(list(loader)), expected)
    print(f"DataLoader: rows of {WORKERS} workers {'all right' if right else 'WRONG'}")


def compiled(model: nn.Module) -> nn.Module:
    """The model compiled; without a C++ compiler, which torch's default backend needs, by the backend "eager"."""
    ids = torch.zeros((500, 20), dtype=torch.int64)
    with torch.inference_mode():
        try:
            fast = torch.compile(model)
            fast(ids)
        except Exception as error:  # what a missing compiler raises differs between versions of torch
            print(f"torch.compile falls back to backend='eager': {str(error).splitlines()[0][:100]}")
            torch.compiler.reset()
            fast = torch.compile(model, backend="eager")
            fast(ids)
    return fast


def told(memory: list[int | None]) -> str:
    known = [value for value in memory if value is not None]
    return f", {max(known) / 2**20:.1f} MiB of its own in the largest worker" if known else ""


def main() -> None:
    torch.manual_seed(0)
    # Before the first operator: a compiled model is compiled for a number of threads, and workers have one.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "words.safetensors")
        table = vqrs.compress(torch.randn(N_ROWS, DIM), method="scalar", dtype="int4", path=path)
        print(f"table: {table.nbytes / 2**20:.1f} MiB, as float32 {4 * N_ROWS * DIM / 2**20:.1f} MiB")
        model = Scorer(path).eval()
        load_data(model.words)
        preload("preload", model)
        preload("preload, compiled", compiled(model))


if __name__ == "__main__":
    main()
