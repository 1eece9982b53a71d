"""Rows of few bits with learned steps: Li et al., "Adaptive low-precision training for embeddings in click-through rate
prediction", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqrs.torch.forms import unpack_bits
from vqrs.torch.trained import export
from vqrs.torch.trained.base import FLOAT_BYTES, Size, Training
from vqrs.torch.trained.integers import _BLOCK, IntegerEmbedding, stochastic_round

if TYPE_CHECKING:
    import vqrs

_BITS = (8, 4, 2)
_LEAST_STEP = 1e-6


class _Trial(NamedTuple):
    """Rows of a batch after their own update, while their steps are learned."""

    ids: Tensor
    rows: Tensor
    steps: Tensor
    noise: Tensor


class ALPTEmbedding(IntegerEmbedding):
    """A row is integers of 8, 4 or 2 bits times a step of its own, which is learned.

    Each batch has two phases: the rows move by their gradients, as floats; then the loss of the batch is computed again
    with these rows rounded at random, and moves their steps. They are stored rounded at random by the new steps.

    The paper multiplies gradients of steps by 1/sqrt(batch * d * (2^(bits-1) - 1)): a factor that falls out where, as
    here and in Adam, a step is a gradient over the root of its second moment.

    Parameters
    ----------
    n_bits : {8, 4, 2}, optional
        Bits of a value; else the most that the budget allows, 8 without one.
    step_rate : float
        Learning rate of the steps.
    initial_step : float, optional
        By default 0.01, or for short integers ``n_bits / 2`` times the bound of the initial weights over the largest
        level, if that is more.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than 2 bits a value and a float a row, or less than all values where it bounds trained
        floats.

    References
    ----------
    Li et al., "Adaptive low-precision training for embeddings in click-through rate prediction", 2023.

    Examples
    --------
    >>> import torch
    >>> module = ALPTEmbedding(1000, 16, ratio=5, random_state=0)
    >>> module.n_bits, module.inference_nbytes(), module.training_nbytes()
    (4, 12000, 24008)
    """

    name: ClassVar[str] = "alpt"
    about: ClassVar[str] = "integers of 8, 4 or 2 bits with a learned step each row (ALPT, Li et al. 2023)"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        n_bits: int | None = None,
        step_rate: float = 2e-5,
        initial_step: float | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if n_bits is not None and n_bits not in _BITS:
            raise ValueError(f"n_bits must be one of {_BITS}, got {n_bits}")
        if initial_step is not None and not initial_step >= _LEAST_STEP:
            raise ValueError(f"initial_step must be at least {_LEAST_STEP}, got {initial_step}")
        self.step_rate = step_rate
        self.n_bits = self._affordable_bits() if n_bits is None else n_bits
        bound = self.embedding_dim**-0.5
        step = max(0.01, self.n_bits / 2 * bound / self.highest) if initial_step is None else initial_step
        self.register_buffer("step", torch.full((self.num_embeddings,), step, device=device))
        width = -(-self.embedding_dim * self.n_bits // 8)
        codes = torch.empty(self.num_embeddings, width, dtype=torch.uint8, device=device)
        for block in codes.split(_BLOCK):
            initial = self.uniform(len(block), self.embedding_dim) / step
            block.copy_(self._packed(stochastic_round(initial, self._noise(initial))))
        self.register_buffer("codes", codes)
        self.register_buffer("step_moment", torch.zeros(self.num_embeddings, device=device))
        self._prepare(device)
        self._trial: _Trial | None = None

    def _affordable_bits(self) -> int:
        if self.budget is None:
            return _BITS[0]
        costs = {bits: self._cost(bits) for bits in _BITS}
        allowed = [bits for bits, cost in costs.items() if self.budget.allows(cost)]
        if not allowed:
            raise self.budget.unreachable(costs[_BITS[-1]], self.name)
        return max(allowed)

    def _cost(self, bits: int) -> Size:
        width = -(-self.embedding_dim * bits // 8)
        return Size(self.num_embeddings * (self.embedding_dim + 1), self.num_embeddings * (width + FLOAT_BYTES))

    @property
    def lowest(self) -> int:
        """The lowest level."""
        return -(1 << (self.n_bits - 1))

    @property
    def highest(self) -> int:
        """The highest level."""
        return (1 << (self.n_bits - 1)) - 1

    def trained_floats(self) -> int:
        """Numbers that training moves: values, and steps, which alone are floats."""
        return super().trained_floats() + self.num_embeddings

    def inference_tensors(self) -> Iterable[Tensor]:
        """The integers and their steps."""
        yield self.codes
        yield self.step

    def to_table(self) -> vqrs.Table:
        """A table of the integers and their steps."""
        levels = torch.cat([self._levels(block) for block in torch.arange(self.num_embeddings).split(_BLOCK)])
        return export.as_table(self, export.levels_part(levels.to(torch.int8), self.step))

    # -- reading ------------------------------------------------------------------------------------------------------

    def rows(self, ids: Tensor) -> Tensor:
        """Levels times steps; while steps are learned, the moved rows at these steps."""
        trial = self._trial
        if trial is None:
            return super().rows(ids)
        rounded = _Rounded.apply(trial.steps, trial.rows, trial.noise, self.lowest, self.highest)
        return rounded.index_select(0, torch.searchsorted(trial.ids, ids))

    def enter_stage(self, stage: str) -> None:
        """Go to a stage: what the updates have gathered is forgotten, as the loop's optimizer is made anew."""
        super().enter_stage(stage)
        self.step_moment.zero_()

    def _levels(self, ids: Tensor) -> Tensor:
        return unpack_bits(self.codes.index_select(0, ids), self.n_bits, self.embedding_dim) + self.lowest

    def _load(self, ids: Tensor) -> Tensor:
        return self._levels(ids).to(self.step.dtype) * self.step[ids, None]

    # -- learning -----------------------------------------------------------------------------------------------------

    def _move(self, ids: Tensor, change: Tensor, training: Training) -> None:
        rows = self._load(ids) + change
        step = self.step[ids]
        with torch.enable_grad():
            trial = _Trial(ids, rows, step.clone().requires_grad_(), self._noise(rows))
            self._trial = trial
            try:
                (gradient,) = torch.autograd.grad(training.batch_loss(), trial.steps)
            finally:
                self._trial = None
        moment = self._updated_moment(self.step_moment, ids, gradient.square())
        # Gradients of steps are sums over a mean loss and tiny: nothing but their own size may damp them.
        step = step - self.step_rate * gradient / moment.sqrt().clamp_min(torch.finfo(moment.dtype).tiny)
        step = step.clamp_min(_LEAST_STEP)
        scaled = rows / step[:, None]
        self.codes[ids] = self._packed(stochastic_round(scaled, self._noise(scaled)))
        self.step[ids] = step

    def _packed(self, levels: Tensor) -> Tensor:
        """Levels as bytes of rows, least significant bits first."""
        fields = (levels.clamp(self.lowest, self.highest) - self.lowest).to(torch.uint8)
        each = 8 // self.n_bits
        fields = F.pad(fields, (0, -fields.shape[1] % each)).view(len(fields), -1, each)
        shifts = torch.arange(each, dtype=torch.uint8, device=fields.device) * self.n_bits
        return (fields << shifts).sum(2, dtype=torch.uint8)


class _Rounded(torch.autograd.Function):
    """Rows rounded at random to levels of a step, with the gradient of the step: in expectation that of the rows."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, rows: Tensor, noise: Tensor, lowest: int, highest: int) -> Tensor:
        scaled = rows / steps[:, None]
        levels = stochastic_round(scaled, noise).clamp(lowest, highest)
        inside = (scaled > lowest) & (scaled < highest)
        ctx.save_for_backward(torch.where(inside, levels - scaled, levels))
        return levels * steps[:, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = ctx.saved_tensors
        return (gradient * factors).sum(1), None, None, None, None
