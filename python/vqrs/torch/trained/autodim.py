"""AutoDim: Zhao et al., "AutoDim: field-aware embedding dimension search in recommender systems", 2021."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.torch.trained.autosrh import normalised_step
from vqrs.torch.trained.base import FLOAT_BYTES, Size, Training
from vqrs.torch.trained.mixed_dimension import Block, FieldBlocks, rows_by_field

_LEAST_TEMPERATURE = 0.01
_NEVER = -1e9
# Those of batch normalisation in torch.
_MOMENTUM, _EPSILON = 0.1, 1e-5


def temperature_at(step: int, batch: float, steps: int) -> float:
    """Temperature after so many steps: ``max(0.01, 1 - 5e-5 · step · batch / 2000)``, or faster in a short search.

    Parameters
    ----------
    step : int
    batch : float
        Examples of a batch.
    steps : int
        Steps of the whole search: by its end the temperature is the least one.

    Returns
    -------
    float

    Examples
    --------
    >>> temperature_at(1000, 2000, 100_000), temperature_at(10, 2000, 20), temperature_at(20, 2000, 20)
    (0.95, 0.505, 0.01)
    """
    pace = max(5e-5 * batch / 2000, (1 - _LEAST_TEMPERATURE) / steps)
    return round(max(_LEAST_TEMPERATURE, 1 - pace * step), 12)


def soft_choice(alpha: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Weights of candidates by the Gumbel softmax: ``softmax((log_softmax(alpha) + noise) / temperature)``.

    Examples
    --------
    >>> soft_choice(torch.tensor([[0.0, 0.2]]), torch.tensor([[0.3, 0.0]]), 0.01)
    tensor([[9.9995e-01, 4.5398e-05]])
    """
    return ((alpha.log_softmax(-1) + noise) / temperature).softmax(-1)


def choose(scores: NDArray[np.float64], costs: NDArray[np.int64], limit: float, fill: bool = True) -> NDArray[np.int64]:
    """One candidate a field: the best ones, changed where that costs least score until they are within a limit.

    Parameters
    ----------
    scores, costs : ndarray of shape (fields, candidates)
    limit : float
        Of the sum of costs; the cheapest candidates are within it.
    fill : bool
        Whether what is then left of the limit is spent on dearer candidates.

    Returns
    -------
    int64 ndarray of shape (fields,)

    Examples
    --------
    >>> scores, costs = np.array([[0.0, 5.0], [0.0, 1.0]]), np.array([[1, 4], [1, 4]])
    >>> choose(scores, costs, 8), choose(scores, costs, 7), choose(scores, costs, 2)
    (array([1, 1]), array([1, 0]), array([0, 0]))
    """
    chosen = scores.argmax(1)
    fields = np.arange(len(chosen))
    while (excess := costs[fields, chosen].sum() - limit) > 0:
        # To save more than is needed is worth nothing.
        saved = np.minimum(costs[fields, chosen][:, None] - costs, excess)
        lost = scores[fields, chosen][:, None] - scores
        price = np.where(saved > 0, lost / np.where(saved > 0, saved, 1), np.inf)
        field, candidate = np.unravel_index(price.argmin(), price.shape)
        chosen[field] = candidate
    while fill:
        more = costs - costs[fields, chosen][:, None]
        lost = scores[fields, chosen][:, None] - scores
        fits = (more > 0) & (more <= limit - costs[fields, chosen].sum())
        if not fits.any():
            break
        price = np.where(fits, lost / np.maximum(more, 1), np.inf)
        field, candidate = np.unravel_index(price.argmin(), price.shape)
        chosen[field] = candidate
    return chosen


class AutoDimEmbedding(FieldBlocks):
    """Each field learns which of some dimensions it needs; then all is trained anew with those.

    In the search a field has a table and a linear map for each candidate; their outputs are normalised over the batch
    (and divided by the root of ``embedding_dim``, so that rows have a norm of about 1) and mixed by a Gumbel softmax of
    α, colder and colder. After each step α descends the loss of a validation batch (first order), by its gradient
    divided by its largest entry, times ``alpha_rate`` (or more, so that the length of the search suffices to move an
    entry by 1). Then each field takes its likeliest candidate; where that is more than the budget, or less, fields
    change their candidates in the order of probability lost for each float. The search trains about twice the floats
    of the full table.

    Parameters
    ----------
    candidates : sequence of int, optional
        Dimensions to choose from; else the powers of two from 1, and ``embedding_dim``. The paper begins at 2.
    alpha_rate : float
    search_epochs : float
        Most epochs of the search.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        The budget is less than the smallest candidates need, or a candidate is out of range.

    References
    ----------
    Zhao et al., "AutoDim: field-aware embedding dimension search in recommender systems", 2021.

    Examples
    --------
    >>> import torch
    >>> module = AutoDimEmbedding(10_100, 16, field_sizes=[100, 10_000], ratio=5, random_state=0)
    >>> module.enter_stage("retrain")
    >>> module.dims, module.inference_nbytes()
    ((16, 2), 86592)
    """

    name: ClassVar[str] = "autodim"
    about: ClassVar[str] = "fields learn their dimension by a Gumbel softmax (Zhao et al. 2021)"
    stages: ClassVar[tuple[str, ...]] = ("search", "retrain")
    restarts: ClassVar[frozenset[str]] = frozenset({"retrain"})
    searches: ClassVar[frozenset[str]] = frozenset({"search"})
    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        candidates: Sequence[int] | None = None,
        alpha_rate: float = 1e-3,
        search_epochs: float = 2,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if candidates is None:
            candidates = [1 << power for power in range((self.embedding_dim - 1).bit_length())] + [self.embedding_dim]
        self.candidates = tuple(sorted({int(candidate) for candidate in candidates}))
        if not self.candidates or not 1 <= self.candidates[0] <= self.candidates[-1] <= self.embedding_dim:
            raise ValueError(f"candidates must be from 1 to {self.embedding_dim}, got {tuple(candidates)}")
        self.alpha_rate, self.search_epochs = alpha_rate, search_epochs
        least = int(self._costs().min(1).sum())
        if self.budget is not None and not self.budget.allows(Size(least, FLOAT_BYTES * least)):
            raise self.budget.unreachable(Size(least, FLOAT_BYTES * least), f"autodim from {self.candidates[0]} on")
        self.dims: tuple[int, ...] | None = None
        """The dimension of each field, once it is chosen."""
        self.temperature = 1.0
        self._selecting = False
        self._batch = 1.0
        self._make_search(device)

    def _costs(self) -> NDArray[np.int64]:
        """Floats of each field with each candidate."""
        dims, rows = np.asarray(self.candidates), np.asarray(self.field_sizes)
        narrow = dims < self.embedding_dim
        return np.asarray(rows[:, None] * dims + np.where(narrow, (dims + 1) * self.embedding_dim, 0), np.int64)

    def _make_search(self, device: Any) -> None:
        """One table for all candidates, side by side, and their maps one above the other."""
        fields, total = len(self.field_sizes), sum(self.candidates)
        columns = [self.uniform(self.num_embeddings, dim, bound=dim**-0.5) for dim in self.candidates]
        self.weight = nn.Parameter(torch.cat(columns, 1).to(device))
        self.linear = nn.Parameter(self.normal(fields, total, self.embedding_dim).to(device))
        self.alpha = nn.Parameter(torch.zeros(fields, len(self.candidates), device=device))
        shape = (fields, len(self.candidates), self.embedding_dim)
        self.register_buffer("mean", torch.zeros(shape, device=device))
        self.register_buffer("variance", torch.ones(shape, device=device))

    def _make_retrain(self, dims: Sequence[int]) -> None:
        device = next(self.parameters()).device
        for name in [*self._parameters, *self._buffers]:
            delattr(self, name)
        self.dims = tuple(dims)
        self._make_blocks(self.dims, device, bias=True)

    # -- search -------------------------------------------------------------------------------------------------------

    def _chosen(self) -> NDArray[np.int64]:
        """The candidate of each field if the search ended now."""
        scores, costs = self.alpha.detach().log_softmax(1).double().cpu().numpy(), self._costs()
        # A few rows with a map can be more floats than the same rows whole.
        wider = np.minimum.accumulate(costs[:, ::-1], 1)[:, -2::-1]
        scores[:, :-1][costs[:, :-1] >= wider] = _NEVER
        if self.budget is None:
            return choose(scores, costs, np.inf, fill=False)
        unit = FLOAT_BYTES if self.budget.unit == "nbytes" else 1
        return choose(scores, costs, self.budget.limit // unit)

    def _columns(self, candidate: int) -> slice:
        start = sum(self.candidates[:candidate])
        return slice(start, start + self.candidates[candidate])

    def _noise(self) -> Tensor:
        """Draws from the Gumbel distribution."""
        return -torch.empty(self.alpha.shape).exponential_(generator=self._generator).log().to(self.alpha)

    def _mixed(self, ids: Tensor) -> Tensor:
        """Rows as the search trains them."""
        self._batch = len(ids) / len(self.field_sizes)
        # α learns from validation batches alone.
        alpha = self.alpha if self._selecting else self.alpha.detach()
        weights = soft_choice(alpha, self._noise(), self.temperature)
        owner = torch.tensor(self.candidates, device=ids.device)
        owner = torch.arange(len(owner), device=ids.device).repeat_interleave(owner)
        owned = F.one_hot(owner).to(self.linear)
        fields = self.field_of(ids)
        order = fields.argsort(stable=True)
        counts = torch.bincount(fields, minlength=len(self.field_sizes))
        parts = F.embedding(ids[order], self.weight).split(counts.tolist())
        # Outputs are linear in what the tables give, so that its mean and covariance have those of the outputs.
        means = torch.stack([part.sum(0) for part in parts]) / counts.clamp(min=1)[:, None]
        centred = [part - mean for part, mean in zip(parts, means.unbind(), strict=True)]
        covariances = torch.stack([part.T @ part for part in centred]) / counts.clamp(min=1)[:, None, None]
        mean = torch.einsum("ftd,tc->fcd", means[:, :, None] * self.linear, owned)
        spread = (covariances * (owned @ owned.T)) @ self.linear
        variance = torch.einsum("ftd,tc->fcd", spread * self.linear, owned)
        # One row has no variance; steps of α leave the running statistics alone.
        several = (counts > 1)[:, None, None]
        mean, variance = torch.where(several, mean, self.mean), torch.where(several, variance, self.variance)
        if not self._selecting:
            self.mean.lerp_(mean.detach(), _MOMENTUM)
            self.variance.lerp_(variance.detach(), _MOMENTUM)
        scale = (variance + _EPSILON).rsqrt() * weights[:, :, None] * self.embedding_dim**-0.5
        maps, shifts = (self.linear * scale[:, owner]).unbind(), (-mean * scale).sum(1).unbind()
        found = torch.cat([torch.addmm(b, part, a) for part, a, b in zip(parts, maps, shifts, strict=True)])
        return torch.empty_like(found).index_copy(0, order, found)

    def block(self, field: int) -> Block:
        """The present block of a field; in the search that of its likeliest candidate, normalisation and all."""
        return super().block(field) if self.dims is not None else self._search_block(field, int(self._chosen()[field]))

    def _search_block(self, field: int, candidate: int, fold: bool = True) -> Block:
        columns, dim = self._columns(candidate), self.embedding_dim
        start = sum(self.field_sizes[:field])
        table = self.weight[start : start + self.field_sizes[field], columns]
        scale = (self.variance[field, candidate] + _EPSILON).rsqrt() * dim**-0.5
        block = Block(table, self.linear[field, columns] * scale, -self.mean[field, candidate] * scale)
        if self.candidates[candidate] == dim and fold:
            return Block(block.rows(torch.arange(len(table), device=table.device)))
        return block

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the candidates, mixed in the search, else of the chosen ones."""
        if self.dims is not None:
            return super().rows(ids)
        if self.training:
            return self._mixed(ids)
        chosen = self._chosen()
        return rows_by_field(
            ids,
            self.field_sizes,
            lambda field, local: self._search_block(field, int(chosen[field]), fold=False).rows(local),
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All but α, which moves in :meth:`on_step` alone."""
        return [{"params": [p for name, p in self.named_parameters() if name != "alpha"]}]

    def on_step(self, training: Training) -> None:
        """A step of α on a validation batch; the choice gets harder."""
        if self.dims is not None or self.finished:
            return
        steps = max(round(min(self.search_epochs, training.epochs) * training.steps_per_epoch), 1)
        batch = self._batch
        self._selecting = True
        try:
            (gradient,) = torch.autograd.grad(training.validation_loss(), self.alpha)
        finally:
            self._selecting = False
        normalised_step(self.alpha, gradient, max(self.alpha_rate, 1 / steps))
        self.temperature = temperature_at(training.step, batch, steps)
        self.finished = training.step >= steps

    def enter_stage(self, stage: str) -> None:
        """Go to a stage; before the second one dimensions are chosen."""
        super().enter_stage(stage)
        if stage == "retrain" and self.dims is None:
            self._make_retrain([self.candidates[candidate] for candidate in self._chosen()])

    @torch.no_grad()
    def inference_tensors(self) -> Iterable[Tensor]:
        """The blocks of the fields."""
        for field in range(len(self.field_sizes)):
            yield from (tensor for tensor in self.block(field) if tensor is not None)

    # -- state --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The stage, the chosen dimensions and the temperature."""
        return {**super().get_extra_state(), "dims": self.dims, "temperature": self.temperature}

    def set_extra_state(self, state: Any) -> None:
        """The stage, and the temperature of a search."""
        super().set_extra_state(state)
        self.temperature = state["temperature"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        dims = state_dict.get(prefix + "_extra_state", {}).get("dims")
        if dims is not None and dims != self.dims:
            self._make_retrain(dims)
        elif dims is None and self.dims is not None:
            device = next(self.parameters()).device
            for name in [*self._parameters]:
                delattr(self, name)
            self.dims = None
            self._make_search(device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
