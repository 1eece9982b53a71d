"""What trained embeddings share: the contract, budgets, and the protocol by which any training loop drives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from vqrs._bytes import parse_bytes

if TYPE_CHECKING:
    import vqrs

FLOAT_BYTES = 4


class Size(NamedTuple):
    """What a method needs at some setting of its size."""

    floats: int
    """Trained floats."""
    nbytes: int
    """Bytes that inference holds: parameters, pointers, maps and hash seeds."""


class Budget(NamedTuple):
    """The most that a module may need: all bytes of inference, or (as most papers count) trained floats alone."""

    limit: int
    unit: str = "nbytes"
    """Field of :class:`Size` that the limit is for."""

    def allows(self, size: Size) -> bool:
        """Whether a module of that size is within the budget."""
        return bool(getattr(size, self.unit) <= self.limit)

    def largest(self, cost: Callable[[int], Size], least: int, most: int, what: str) -> int:
        """The largest setting from ``least`` to ``most`` whose cost, which must not fall as it grows, is allowed.

        Raises
        ------
        ValueError
            Not even ``least`` is allowed; names what the method can reach.
        """
        if not self.allows(cost(least)):
            raise self.unreachable(cost(least), what)
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self.allows(cost(middle)) else (least, middle - 1)
        return least

    def unreachable(self, minimum: Size, what: str) -> ValueError:
        """The error for a method that needs at least ``minimum``."""
        needed, unit = getattr(minimum, self.unit), {"nbytes": "bytes", "floats": "trained floats"}[self.unit]
        return ValueError(f"{what} needs at least {needed} {unit} here, the budget is {self.limit}")


class Training(Protocol):
    """What a training loop tells the hooks of a module, and does for them."""

    step: int
    """Optimizer steps done in this stage, the present one included."""
    epoch: int
    """The epoch of this stage that is being trained, or has just been where ``on_epoch`` is called; from 1."""
    epochs: int
    """Most epochs that this stage will last."""
    steps_per_epoch: int
    optimizer: torch.optim.Optimizer

    def batch_loss(self) -> Tensor:
        """The loss of the present batch once more, with the module as it now is."""

    def validation_loss(self) -> Tensor:
        """The loss of the next batch of the validation part."""

    def validation_score(self) -> float:
        """The score on the validation part, higher is better."""


class TrainedEmbedding(nn.Module):
    """An embedding table that is trained in its compressed form.

    Parameters
    ----------
    num_embeddings : int
        Rows of the table that it stands for.
    embedding_dim : int
        Values of a row.
    nbytes : int or str, optional
        Most bytes that inference may hold, for example ``"64MiB"``; bounds :meth:`inference_nbytes`.
    ratio : float, optional
        The same as a ratio to the float32 table. Without any budget a method takes its paper's default size.
    num_floats : int, optional
        Most trained floats, as the literature counts: pointers and maps are then free.
    field_sizes : sequence of int, optional
        Rows of each field, where the table holds several, one after the other; they add up to ``num_embeddings``.
    frequencies : array of shape (num_embeddings,), optional
        How often each row is looked up in the *training* part of the data.
    random_state : int, optional
        Seed of hashes and initial weights; torch's generator decides where it is missing.
    device : torch.device, optional
        Where parameters live; dtype is always float32.

    Raises
    ------
    ValueError
        More than one budget, one that the method cannot reach (the message names what it can), or wrong sizes.
    """

    name: ClassVar[str]
    """What :func:`vqrs.torch.methods` calls it."""
    about: ClassVar[str]
    """One line for tables: what it does, the paper and its year."""
    stages: ClassVar[tuple[str, ...]] = ("train",)
    """Stages of training in their order; a loop calls :meth:`enter_stage` before each."""
    restarts: ClassVar[frozenset[str]] = frozenset()
    """Stages before which the rest of the model goes back to its initial weights."""
    searches: ClassVar[frozenset[str]] = frozenset()
    """Stages that run to their end whatever the validation says; after others the best epoch is brought back."""
    per_id_state: ClassVar[bool] = False
    """Whether training keeps something for every row (a float, a pointer, a map)."""
    has_table: ClassVar[bool] = True
    """Whether :meth:`to_table` gives a table file."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        nbytes: int | str | None = None,
        ratio: float | None = None,
        num_floats: int | None = None,
        field_sizes: Sequence[int] | None = None,
        frequencies: ArrayLike | None = None,
        random_state: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for what, value in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        self.num_embeddings, self.embedding_dim = int(num_embeddings), int(embedding_dim)
        self.budget = self._as_budget(nbytes, ratio, num_floats)
        self.field_sizes = self._as_fields(field_sizes)
        self._frequencies = self._as_frequencies(frequencies)
        self._generator = torch.Generator()
        self._generator.manual_seed(int(torch.randint(2**62, ())) if random_state is None else int(random_state))
        self.stage = self.stages[0]
        self.finished = False
        """Set by a method whose present stage has reached its goal: the loop then goes on to the next one."""

    def _as_budget(self, nbytes: int | str | None, ratio: float | None, num_floats: int | None) -> Budget | None:
        given = {k: v for k, v in {"nbytes": nbytes, "ratio": ratio, "num_floats": num_floats}.items() if v is not None}
        if len(given) > 1:
            raise ValueError(f"give one of nbytes, ratio and num_floats, not {' and '.join(given)}")
        if nbytes is not None:
            return Budget(parse_bytes(nbytes))
        if ratio is not None:
            if not (math.isfinite(ratio) and ratio > 0):
                raise ValueError(f"ratio must be positive, got {ratio}")
            return Budget(int(self.full_nbytes / ratio))
        if num_floats is not None:
            if num_floats < 1:
                raise ValueError(f"num_floats must be at least 1, got {num_floats}")
            return Budget(int(num_floats), "floats")
        return None

    def _as_fields(self, field_sizes: Sequence[int] | None) -> tuple[int, ...]:
        sizes = (self.num_embeddings,) if field_sizes is None else tuple(int(size) for size in field_sizes)
        if any(size < 1 for size in sizes) or sum(sizes) != self.num_embeddings:
            raise ValueError(f"field_sizes must be positive and add up to {self.num_embeddings}, got {sizes}")
        return sizes

    def _as_frequencies(self, frequencies: ArrayLike | None) -> np.ndarray | None:
        if frequencies is None:
            return None
        found = np.asarray(frequencies, dtype=np.float64)
        if found.shape != (self.num_embeddings,):
            raise ValueError(f"frequencies must have the shape ({self.num_embeddings},), got {found.shape}")
        if not np.isfinite(found).all() or (found < 0).any():
            raise ValueError("frequencies must be finite and not negative")
        return found

    @property
    def full_nbytes(self) -> int:
        """Bytes of the float32 table that it stands for."""
        return FLOAT_BYTES * self.num_embeddings * self.embedding_dim

    # -- what a method writes ---------------------------------------------------------------------------------------

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of checked int64 ids of shape (n,): float32 of shape (n, embedding_dim)."""
        raise NotImplementedError

    def inference_tensors(self) -> Iterable[Tensor]:
        """What inference holds; by default all parameters and buffers."""
        yield from self.parameters()
        yield from self.buffers()

    def to_table(self) -> vqrs.Table:
        """A table whose lookups give the rows that the module gives in evaluation mode.

        Raises
        ------
        TypeError
            The method computes its rows by a network and has no table form: compress what :meth:`to_dense` gives.
        """
        raise TypeError(f"{self.name} has no table form: compress its rows, vqrs.compress(module.to_dense(), ...)")

    def penalty(self) -> Tensor | None:
        """A term that the loss of a training batch gets, None if there is none."""
        return None

    def enter_stage(self, stage: str) -> None:
        """Go to a stage of training. A loop makes its optimizer anew afterwards."""
        if stage not in self.stages:
            raise ValueError(f"{self.name} has the stages {self.stages}, not {stage!r}")
        self.stage, self.finished = stage, False

    def on_step(self, training: Training) -> None:
        """Called after each step of the optimizer."""

    def on_epoch(self, training: Training) -> None:
        """Called after each epoch, before its validation."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for the loop's optimizer, with their own settings where the method has some."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    # -- what all share ---------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table.

        Parameters
        ----------
        ids : int tensor of any shape

        Returns
        -------
        float32 tensor of shape (*ids.shape, embedding_dim)

        Raises
        ------
        IndexError
            An id is negative or not below ``num_embeddings``.
        TypeError
            The ids are no integers.
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        flat = ids.reshape(-1).long()
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= self.num_embeddings):
            wrong = flat[(flat < 0) | (flat >= self.num_embeddings)][0]
            raise IndexError(f"id {int(wrong)} is out of range for a table of {self.num_embeddings} rows")
        return self.rows(flat).reshape(*ids.shape, self.embedding_dim)

    def trained_floats(self) -> int:
        """Number of floats that the optimizer moves now."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def within_budget(self) -> bool:
        """Whether the module, as it now is, is within its budget; methods that prune are not from the beginning."""
        return self.budget is None or self.budget.allows(Size(self.trained_floats(), self.inference_nbytes()))

    def inference_nbytes(self) -> int:
        """Bytes that inference holds: parameters, packed pointers, maps and hash seeds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.inference_tensors())

    def training_nbytes(self, optimizer_slots: int = 2) -> int:
        """Bytes that training holds: parameters, gradients, the optimizer's slots, pointers and maps.

        Parameters
        ----------
        optimizer_slots : int
            Floats that the optimizer keeps for each trained one: SGD 0, Adagrad 1, Adam 2.
        """
        held = [*self.parameters(), *self.buffers()]
        return sum(t.numel() * t.element_size() for t in held) + (
            FLOAT_BYTES * (1 + optimizer_slots) * self.trained_floats()
        )

    @torch.no_grad()
    def to_dense(self, batch: int = 1 << 16) -> np.ndarray:
        """All rows as the module gives them in evaluation mode: float32 of shape (num_embeddings, embedding_dim)."""
        training = self.training
        self.eval()
        try:
            # Rows that are integers in training too are no parameters.
            device = next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))
            out = np.empty((self.num_embeddings, self.embedding_dim), np.float32)
            for start in range(0, len(out), batch):
                ids = torch.arange(start, min(start + batch, len(out)), device=device)
                out[start : start + len(ids)] = self.rows(ids).cpu().numpy()
            return out
        finally:
            self.train(training)

    def uniform(self, *shape: int, bound: float | None = None) -> Tensor:
        """Initial weights, uniform in ±bound; the default 1/√embedding_dim gives rows a norm of about 0.6."""
        bound = self.embedding_dim**-0.5 if bound is None else bound
        return (torch.rand(*shape, generator=self._generator) * 2 - 1) * bound

    def normal(self, *shape: int, std: float | None = None) -> Tensor:
        """Initial weights, normal; the default deviation 1/√embedding_dim gives rows a norm of about 1."""
        std = self.embedding_dim**-0.5 if std is None else std
        return torch.randn(*shape, generator=self._generator) * std

    def seeds(self, *shape: int) -> Tensor:
        """Seeds of independent hashes: int64, to be registered as a buffer."""
        return torch.randint(-(2**63), 2**63 - 1, shape, generator=self._generator)

    def field_of(self, ids: Tensor) -> Tensor:
        """The field that each id belongs to."""
        ends = torch.tensor(self.field_sizes, device=ids.device).cumsum(0)
        return torch.bucketize(ids, ends, right=True)

    def get_extra_state(self) -> dict[str, Any]:
        """The stage, for ``state_dict``."""
        return {"stage": self.stage}

    def set_extra_state(self, state: Any) -> None:
        """The stage, from ``load_state_dict``."""
        self.stage = state["stage"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Stages of training may have changed shapes: a fresh module takes those of the state.
        for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
            found = state_dict.get(prefix + name)
            if tensor is None or found is None or found.shape == tensor.shape:
                continue
            empty = torch.empty(found.shape, dtype=tensor.dtype, device=tensor.device)
            if name in self._parameters:
                setattr(self, name, nn.Parameter(empty, requires_grad=tensor.requires_grad))
            else:
                setattr(self, name, empty)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, inference_nbytes={self.inference_nbytes()}"


def reset_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Forget what an optimizer has gathered for parameters whose values were replaced in place."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
