"""Tables that would not fit: training steps of a table of billions of parameters, and the memory that they took."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

ZIPF = 1.1
"""Exponent of how often ids are drawn, the least id first, as in click logs."""


def run_scale(
    method: str,
    num_embeddings: int = 100_000_000,
    embedding_dim: int = 100,
    *,
    ratio: float = 1000,
    steps: int = 1000,
    batch_size: int = 4096,
    random_state: int = 0,
) -> dict[str, Any]:
    """Train a table in a process of its own, on labels that depend on the id, and tell the process's peak memory.

    Parameters
    ----------
    method : str
        A name of ``vqrs.torch.methods()``, with settings if wanted: ``"cce:hot_ids=100000"``.
    num_embeddings, embedding_dim : int
        Size of the table that the method stands for.
    ratio : float
        Its float32 bytes over those that inference may hold.
    steps, batch_size : int
    random_state : int

    Returns
    -------
    dict
        method, parameters (of the whole table), trained_floats, training_nbytes, inference_nbytes, exported_nbytes
        (None without a table form), first_loss and last_loss (means of a twentieth of the steps), seconds,
        peak_nbytes (resident memory of the process, with everything that it imports).

    Raises
    ------
    ValueError
        An unknown method or setting, or a budget that the method cannot reach.
    ChildProcessError
        The process failed otherwise, or was killed; its last line is told.
    """
    asked = {
        "method": method,
        "num_embeddings": num_embeddings,
        "embedding_dim": embedding_dim,
        "ratio": ratio,
        "steps": steps,
        "batch_size": batch_size,
        "random_state": random_state,
    }
    done = subprocess.run(
        [sys.executable, "-m", "vqrs.bench.scale", json.dumps(asked)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "it was killed, as happens where memory runs out").splitlines()[-1]
        kind, colon, text = last.partition(": ")
        raise ValueError(text) if colon and kind == "ValueError" else ChildProcessError(f"{method}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _train(
    method: str,
    num_embeddings: int,
    embedding_dim: int,
    ratio: float,
    steps: int,
    batch_size: int,
    random_state: int,
) -> dict[str, Any]:
    import resource

    import numpy as np
    import torch

    import vqrs.torch
    from vqrs.bench.ctr import check_names, parse_method
    from vqrs.torch.trained.base import TrainedEmbedding
    from vqrs.torch.trained.hashing import hash_signs

    check_names("method", [method], vqrs.torch.methods(), TrainedEmbedding)
    name, settings = parse_method(method)
    made = vqrs.torch.methods()[name]
    if made.per_id_state:
        # Methods with pointers for frequent ids must know which these are.
        settings["frequencies"] = np.arange(1, num_embeddings + 1, dtype=np.float64) ** -ZIPF
    torch.manual_seed(random_state)
    embedding = made(num_embeddings, embedding_dim, ratio=ratio, random_state=random_state, **settings)
    readout = torch.nn.Linear(embedding_dim, 1)
    optimizer = torch.optim.AdamW([{"params": list(readout.parameters())}, *embedding.parameter_groups()], fused=True)
    generator = np.random.default_rng(random_state)
    losses = []
    training = _Training(optimizer, steps)
    embedding.enter_stage(embedding.stages[0])
    embedding.train()
    start = time.perf_counter()
    for training.step in range(1, steps + 1):
        drawn = generator.zipf(ZIPF, 3 * batch_size)
        ids = torch.from_numpy(drawn[drawn <= num_embeddings][:batch_size] - 1)
        # Half of the ids are clicked three times in four, the others once.
        chance = 0.5 + 0.25 * hash_signs(ids, torch.tensor(1))
        labels = torch.bernoulli(chance)

        def batch_loss(ids: Any = ids, labels: Any = labels) -> Any:
            return torch.nn.functional.binary_cross_entropy_with_logits(readout(embedding(ids))[:, 0], labels)

        training.batch_loss = training.validation_loss = batch_loss
        loss, penalty = batch_loss(), embedding.penalty()
        losses.append(float(loss.detach()))
        optimizer.zero_grad(set_to_none=True)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        embedding.on_step(training)
    embedding.on_epoch(training)
    seconds = time.perf_counter() - start
    share = max(1, steps // 20)
    return {
        "method": method,
        "parameters": num_embeddings * embedding_dim,
        "trained_floats": embedding.trained_floats(),
        "training_nbytes": embedding.training_nbytes(),
        "inference_nbytes": embedding.inference_nbytes(),
        "exported_nbytes": embedding.to_table().nbytes if embedding.has_table else None,
        "first_loss": float(np.mean(losses[:share])),
        "last_loss": float(np.mean(losses[-share:])),
        "seconds": round(seconds, 2),
        # Linux counts in KiB, macOS in bytes.
        "peak_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


class _Training:
    """What the hooks of an embedding are told: one epoch, whose steps are all that there are."""

    def __init__(self, optimizer: Any, steps: int) -> None:
        self.optimizer, self.steps_per_epoch = optimizer, steps
        self.step, self.epoch, self.epochs = 0, 1, 1
        self.batch_loss: Any = None
        self.validation_loss: Any = None

    def validation_score(self) -> float:
        """The loss of a batch, the other way round."""
        return -float(self.validation_loss())


if __name__ == "__main__":
    print(json.dumps(_train(**json.loads(sys.argv[1]))))
