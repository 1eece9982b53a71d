"""Tables in worker processes: no hang after a fork, the right rows, no memory for a second copy."""

import contextlib
import ctypes
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vqrs
import vqrs.torch

ROOT = Path(__file__).parents[2]
N_ROWS, DIM, WORKERS = 100_000, 32, 4
PATIENCE = 180
"""Seconds after which a worker that says nothing counts as hanging."""

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
tells_memory = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells the memory of a process in /proc"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "rows.safetensors"
    rows = np.random.default_rng(0).standard_normal((N_ROWS, DIM), dtype=np.float32)
    vqrs.compress(rows, method="scalar", dtype="int4", path=path)
    return path


@pytest.fixture
def used(path: Path) -> Iterator[vqrs.torch.Embedding]:
    """A mapped module whose process has used its threads, those of the core and those of torch."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    square = torch.randn(600, 600)
    (square @ square).exp().sum()
    embedding = vqrs.torch.Embedding.from_table(path)
    embedding(torch.arange(N_ROWS))
    yield embedding
    torch.set_num_threads(n_threads)


class Model(nn.Module):
    """A mean of rows, and a layer that is large enough for threads of torch."""

    def __init__(self, words: vqrs.torch.Embedding) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = words
        self.layers = nn.Sequential(nn.Linear(DIM, 512), nn.ReLU(), nn.Linear(512, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.words(ids).mean(1))


@contextlib.contextmanager
def workers(job: Callable[..., None], *arguments: Any, start: str = "fork") -> Iterator[list[Connection]]:
    """Worker processes, each at the other end of a pipe; none outlives the test."""
    context = multiprocessing.get_context(start)
    pipes, processes = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while there are threads: what is tested here
        for _ in range(WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=job, args=(theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
    try:
        yield pipes
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def heard(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE), "the worker hangs"
    return pipe.recv()


# ---- no hang, right rows --------------------------------------------------------------------------------------------


class Rows(Dataset[Tensor]):
    """Rows that are looked up in the worker, many at a time, so that threads of the core take part."""

    def __init__(self, embedding: nn.Module, ids: Tensor) -> None:
        self.embedding, self.ids = embedding, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Tensor:
        return self.embedding(self.ids[number])


@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_of_a_loader_after_use_in_the_parent(used: vqrs.torch.Embedding) -> None:
    ids = torch.randint(N_ROWS, (12, 20_000), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(
        Rows(used, ids), batch_size=2, num_workers=WORKERS, multiprocessing_context="fork", timeout=PATIENCE
    )
    rows = torch.cat(list(loader))
    assert torch.equal(rows, used(ids))
    assert torch.equal(rows, torch.cat(list(loader)))  # new workers, after these have gone


def look_up(pipe: Connection, embedding: nn.Module) -> None:
    """Lookups alone: nothing is said about threads."""
    while (ids := pipe.recv()) is not None:
        pipe.send(embedding(torch.from_numpy(ids)).numpy())


@forks
def test_preloaded_workers_look_up_after_use_in_the_parent(used: vqrs.torch.Embedding) -> None:
    rng = np.random.default_rng(2)
    with workers(look_up, used) as pipes:
        asked = [rng.integers(0, N_ROWS, size) for size in (1, 50_000, 3, 100_000)]
        for pipe, ids in zip(pipes, asked, strict=True):
            pipe.send(ids)
        used(torch.arange(N_ROWS))  # the parent goes on at the same time
        for pipe, ids in zip(pipes, asked, strict=True):
            assert np.array_equal(heard(pipe), used(torch.from_numpy(ids)).numpy())
            pipe.send(None)


def answer(pipe: Connection, model: nn.Module) -> None:
    """The whole model, with the one line that torch's own operators need after a fork."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        while (ids := pipe.recv()) is not None:
            pipe.send(model(torch.from_numpy(ids)).numpy())


@forks
@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_preloaded_models_answer_as_the_parent_does(used: vqrs.torch.Embedding, backend: str | None) -> None:
    ids = np.random.default_rng(3).integers(0, N_ROWS, (WORKERS, 500, 20))
    model: Any = Model(used).eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids[0]))
        if backend is not None:
            torch.set_num_threads(1)  # a compiled model is compiled for a number of threads
            model = torch.compile(model, backend=backend)
            try:
                model(torch.from_numpy(ids[0]))
            except Exception as error:
                if backend == "inductor":
                    pytest.skip(f"inductor does not work here: {type(error).__name__}")
                raise
        asked = torch.from_numpy(ids)
        expected = torch.stack([Model(used).eval()(one) for one in asked])
        with workers(answer, model) as pipes:
            for pipe, one in zip(pipes, ids, strict=True):
                pipe.send(one)
            for pipe, wanted in zip(pipes, expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(heard(pipe)), wanted)
                pipe.send(None)


# ---- memory ---------------------------------------------------------------------------------------------------------

WIDE = 128
N_WIDE = 262_144
BATCH = 4_096


def memory(field: str) -> int:
    """Bytes, as ``/proc/self/smaps_rollup`` tells them, without what the C library keeps of freed results."""
    with contextlib.suppress(AttributeError):  # other C libraries keep none, or give none back
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def look_all_up(embedding: nn.Module, n_rows: int = N_WIDE) -> None:
    with torch.inference_mode():
        for ids in torch.arange(N_WIDE).split(BATCH):
            embedding(ids % n_rows)


def grow(pipe: Connection, made: nn.Module | None, path: str, mapped: bool) -> None:
    """Says by how much this process grew as it took the table and looked every row up."""
    torch.set_num_threads(1)
    vqrs.hardware()
    field = "Anonymous" if made is None else "Private_Dirty"  # a forked child begins with its parent's anonymous pages
    look_all_up(nn.Embedding(BATCH, WIDE), BATCH)  # what the allocator keeps for results is not the table's
    before = memory(field)
    if made is None:
        table = vqrs.torch.Embedding.from_table(path)
        made = table if mapped else nn.Embedding.from_pretrained(table.weight)
    look_all_up(made)
    pipe.send(memory(field) - before)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 MiB of codes, 128 MiB of rows."""
    path = tmp_path_factory.mktemp("wide") / "rows.safetensors"
    rows = np.random.default_rng(0).standard_normal((N_WIDE, WIDE), dtype=np.float32)
    vqrs.compress(rows, method="scalar", dtype="int8", granularity="column", path=path)
    return path


@tells_memory
def test_workers_that_map_a_table_own_no_copy(wide: Path) -> None:
    with workers(grow, None, str(wide), True, start="spawn") as pipes:
        grown = [heard(pipe) for pipe in pipes]
    assert max(grown) < wide.stat().st_size / 2


@tells_memory
def test_a_copy_would_be_seen(wide: Path) -> None:
    with workers(grow, None, str(wide), False, start="spawn") as pipes:
        grown = [heard(pipe) for pipe in pipes]
    assert min(grown) > 0.9 * 4 * N_WIDE * WIDE


@tells_memory
@forks
def test_workers_of_a_preload_own_no_copy(wide: Path) -> None:
    embedding = vqrs.torch.Embedding.from_table(wide)
    look_all_up(embedding)
    with workers(grow, embedding, str(wide), True) as pipes:
        grown = [heard(pipe) for pipe in pipes]
    assert max(grown) < wide.stat().st_size / 2


@forks
def test_the_example_runs(tmp_path: Path) -> None:
    example = ROOT / "examples" / "05_serve_torch.py"
    run = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("all right") == 3
    assert "WRONG" not in run.stdout
