"""Rows of 8 or 16 bits with a fixed step, trained as such.

Gupta et al., "Deep learning with limited numerical precision", 2015; for embeddings Xu et al., "Agile and accurate CTR
prediction model training for massive-scale online advertising systems", 2021.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vqrs.torch.trained import export
from vqrs.torch.trained.base import FLOAT_BYTES, Size, Training
from vqrs.torch.trained.integers import _BLOCK, IntegerEmbedding, stochastic_round

if TYPE_CHECKING:
    import vqrs


class Int8Embedding(IntegerEmbedding):
    """Rows of int8 times one fixed step; updates are rounded at random, up with the probability of the fraction.

    Rounding to the nearest would stall: most updates are less than half a step.

    Parameters
    ----------
    step : float, optional
        Value of a 1. By default 127 steps are five times the bound of the initial weights, ``5 / sqrt(embedding_dim)``;
        values beyond the 127 steps are clipped.
    rounding : {"stochastic", "nearest"}
        How updates are rounded; "nearest" is there to compare.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than the integers, or less than their number where it bounds trained floats.

    References
    ----------
    Gupta et al., "Deep learning with limited numerical precision", 2015. Xu et al., "Agile and accurate CTR prediction
    model training for massive-scale online advertising systems", 2021.

    Examples
    --------
    >>> import torch
    >>> module = Int8Embedding(1000, 16, random_state=0)
    >>> module.weight.dtype, module.inference_nbytes(), module.training_nbytes()
    (torch.int8, 16004, 24012)
    """

    name: ClassVar[str] = "int8"
    about: ClassVar[str] = "int8 rows of one step, stochastic rounding (Xu et al. 2021)"
    dtype: ClassVar[torch.dtype] = torch.int8
    headroom: ClassVar[float] = 5.0

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        step: float | None = None,
        rounding: str = "stochastic",
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if step is not None and not step > 0:
            raise ValueError(f"step must be positive, got {step}")
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f'rounding must be "stochastic" or "nearest", got {rounding!r}')
        self.rounding = rounding
        values, limits = self.num_embeddings * self.embedding_dim, torch.iinfo(self.dtype)
        size = Size(values, values * limits.bits // 8 + FLOAT_BYTES)
        if self.budget is not None and not self.budget.allows(size):
            raise self.budget.unreachable(size, self.name)
        step = self.headroom * self.embedding_dim**-0.5 / limits.max if step is None else step
        self.register_buffer("step", torch.tensor(float(step), device=device))
        weight = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=device)
        for block in weight.split(_BLOCK):
            initial = (self.uniform(*block.shape) / step).clamp(limits.min, limits.max)
            block.copy_(stochastic_round(initial, self._noise(initial)))
        self.register_buffer("weight", weight)
        self._prepare(device)

    def inference_tensors(self) -> Iterable[Tensor]:
        """The integers and their step."""
        yield self.weight
        yield self.step

    def to_table(self) -> vqrs.Table:
        """A table of the integers."""
        return export.as_table(self, export.levels_part(self.weight, self.step))

    def _load(self, ids: Tensor) -> Tensor:
        return self.weight.index_select(0, ids).to(self.step.dtype) * self.step

    def _move(self, ids: Tensor, change: Tensor, training: Training) -> None:
        steps = change / self.step
        steps = steps.round() if self.rounding == "nearest" else stochastic_round(steps, self._noise(steps))
        limits = torch.iinfo(self.dtype)
        moved = self.weight[ids] + steps
        self.weight[ids] = moved.clamp(limits.min, limits.max).to(self.dtype)


class Int16Embedding(Int8Embedding):
    """Rows of int16 times one fixed step: :class:`Int8Embedding` (Xu et al., 2021) with finer steps.

    Parameters are those of :class:`Int8Embedding`; by default 32,767 steps are twenty times the bound of the initial
    weights.

    Raises
    ------
    ValueError
        As of :class:`Int8Embedding`.

    Examples
    --------
    >>> import torch
    >>> module = Int16Embedding(1000, 16, random_state=0)
    >>> module.weight.dtype, module.inference_nbytes(), module.training_nbytes()
    (torch.int16, 32004, 40012)
    """

    name: ClassVar[str] = "int16"
    about: ClassVar[str] = "int16 rows of one step, stochastic rounding (Xu et al. 2021)"
    dtype: ClassVar[torch.dtype] = torch.int16
    headroom: ClassVar[float] = 20.0
