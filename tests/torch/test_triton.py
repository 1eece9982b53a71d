"""The Triton kernels against the compiled core: on a CUDA device where there is one, and in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vqrs
import vqrs.torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = np.random.default_rng(7).standard_normal((200, 13), dtype=np.float32)

CASES = [
    {"method": "kmeans", "n_clusters": 40},
    {"method": "product", "n_subvectors": 5, "n_bits": 3},
    {"method": "product", "n_subvectors": 2, "n_bits": 8},
    {"method": "product", "n_subvectors": 3, "n_bits": 5, "codebook_dtype": "float32"},
    {"method": "product", "n_subvectors": 3, "n_bits": 5, "codebook_dtype": "bfloat16"},
    {"method": "product", "n_subvectors": 5, "n_bits": 3, "codebook_dtype": "int8"},
    {"method": "product", "n_subvectors": 13, "n_bits": 1},
    {"method": "residual", "n_stages": 3, "n_bits": 7},
    {"method": "additive", "n_codebooks": 3, "n_bits": 4},
    {"method": "product-residual", "n_subvectors": 2, "n_stages": 2, "n_bits": 3},
    {"method": "deduplicating"},
    *(
        {"method": "scalar", "dtype": dtype, "granularity": granularity, "block_size": 4, "symmetric": symmetric}
        for dtype in ("int8", "int5", "int2")
        for granularity in ("row", "block", "column")
        for symmetric in (False, True)
    ),
    {"method": "scalar", "dtype": "nf4"},
    {"method": "scalar", "dtype": "nf4", "granularity": "column"},
    {"method": "scalar", "dtype": "float8", "granularity": "block", "block_size": 4, "scale_dtype": "float8"},
]


@pytest.fixture(params=["interpreter", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        if INTERPRETED or not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda"
    if not INTERPRETED:
        pytest.skip("run by test_in_the_interpreter in a process of its own")
    return "cpu"


@pytest.mark.parametrize("compression", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_rows_are_those_of_the_core(compression: dict, device: str) -> None:
    from vqrs.torch import triton_kernels

    embedding = vqrs.torch.Embedding.from_pretrained(torch.from_numpy(ROWS), random_state=0, **compression)
    ids = torch.tensor([[0, 199, 5], [5, 17, 100]])
    expected = embedding(ids)
    moved = embedding.to(device)
    tensors = dict(moved.decoder.named_buffers())
    for dtype in (torch.float32, torch.float16):
        for given in (ids, ids.int(), ids[:0]):
            rows = triton_kernels.lookup(
                given.to(device), moved.codes, moved.to_table().info()["decoder"], tensors, dtype
            )
            assert rows is not None
            assert rows.dtype == dtype
            # By column a scale is float32, whose product with a level may be rounded by itself.
            close = {"rtol": 2e-7, "atol": 5e-7} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(rows.cpu().float(), expected[: len(given)], **close)


def test_ids_outside_are_refused(device: str) -> None:
    if device == "cuda":
        pytest.skip("a failed assertion on the device ends its context")
    from vqrs.torch import triton_kernels

    embedding = vqrs.torch.Embedding.from_pretrained(torch.from_numpy(ROWS), method="scalar")
    description = embedding.to_table().info()["decoder"]
    for bad in (-1, 200):
        with pytest.raises(RuntimeError, match="outside a table of 200 rows"):
            triton_kernels.lookup(torch.tensor([0, bad]), embedding.codes, description, {}, torch.float32)


@pytest.mark.parametrize("compression", [CASES[1], {"method": "trellis"}], ids=["with a kernel", "without"])
def test_the_operator_runs_on_the_device(compression: dict) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    embedding = vqrs.torch.Embedding.from_pretrained(torch.from_numpy(ROWS), random_state=0, **compression)
    ids = torch.tensor([3, 1, 199])
    expected = embedding(ids)
    moved = embedding.cuda()
    rows = torch.ops.vqrs.lookup(ids.cuda(), *moved._reads(), torch.float32, -1)
    torch.testing.assert_close(rows.cpu(), expected, rtol=2e-7, atol=2e-6)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "interpreter"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert f"{len(CASES) + 1} passed" in run.stdout
