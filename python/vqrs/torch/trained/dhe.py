"""Rows computed by a network from many hashes of the id: deep hash embeddings."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqrs.torch.trained.base import FLOAT_BYTES, Size, TrainedEmbedding
from vqrs.torch.trained.hashing import derived_seeds, hash_bits

_SEED_BYTES = 8
_HASHES = 1024
_WIDTH = 1024
_NARROW = 256
"""Below this width of the paper's network, a shallow one takes its place."""
_HIDDEN = {"deep": 5, "shallow": 2}


class DeepHashEmbedding(TrainedEmbedding):
    """A network computes the row of an id from its encoding, many hashes of it scaled to ±1. No table at all.

    Kang et al., "Learning to embed categorical features without embedding tables for recommendation", 2021 (DHE). The
    paper's network, ``"deep"``, has 1024 hashes and five hidden layers with batch normalization and Mish. Under a small
    budget ``"shallow"`` does better (Tsang and Ahle, 2023): two hidden layers with ReLU, as wide as there are hashes.
    All hashes of an id are made of 64 random bits of it by multiplications modulo 2^32 (the paper has 10^6 buckets).

    Parameters
    ----------
    architecture : {"deep", "shallow"}, optional
        By default deep, but shallow where the budget would make the deep one narrower than 256.
    num_hashes : int, optional
        Hashes of an id; by default 1024, or the width of a shallow network.
    width : int, optional
        Units of each hidden layer; else as many as the budget allows, 1024 without one.
    **settings
        Those of :class:`TrainedEmbedding`.

    Raises
    ------
    ValueError
        An unknown architecture, or a budget below a network of one unit.

    Examples
    --------
    >>> import torch
    >>> module = DeepHashEmbedding(100_000, 16, ratio=100, random_state=0)
    >>> module.num_hashes, [layer.out_features for layer in module.layers], module.inference_nbytes()
    (85, [85, 85, 16], 63992)
    """

    name: ClassVar[str] = "dhe"
    about: ClassVar[str] = "a network computes rows from hashes (Kang et al. 2021)"
    has_table: ClassVar[bool] = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        architecture: str | None = None,
        num_hashes: int | None = None,
        width: int | None = None,
        **settings: Any,
    ) -> None:
        device = settings.pop("device", None)
        super().__init__(num_embeddings, embedding_dim, **settings)
        if architecture not in (None, *_HIDDEN):
            raise ValueError(f"architecture must be deep or shallow, got {architecture!r}")
        for what, value in (("num_hashes", num_hashes), ("width", width)):
            if value is not None and value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        self.architecture, width = self._sized(architecture, num_hashes, width)
        self.num_hashes = self._hashes(self.architecture, num_hashes, width)
        sizes = [self.num_hashes, *[width] * _HIDDEN[self.architecture], self.embedding_dim]
        self.layers = nn.ModuleList(nn.Linear(*ends, device=device) for ends in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, device=device) for _ in range(_HIDDEN["deep"] if self.architecture == "deep" else 0)
        )
        self._reset_parameters()
        self.register_buffer("seed", self.seeds().to(device))

    @staticmethod
    def _hashes(architecture: str, num_hashes: int | None, width: int) -> int:
        return num_hashes or (_HASHES if architecture == "deep" else width)

    def _sized(self, architecture: str | None, num_hashes: int | None, width: int | None) -> tuple[str, int]:
        if width is not None or self.budget is None:
            return architecture or "deep", width or _WIDTH
        if architecture is None:
            wide_enough = self.budget.allows(self._cost("deep", num_hashes, _NARROW))
            architecture = "deep" if wide_enough else "shallow"
        # No network is larger than the table that it stands for, unless the paper's own is.
        full = Size(self.num_embeddings * self.embedding_dim, self.full_nbytes)
        sizes = (getattr(size, self.budget.unit) for size in (full, self._cost(architecture, num_hashes, _WIDTH)))
        budget = self.budget._replace(limit=min(self.budget.limit, max(sizes)))
        most = math.isqrt(budget.limit) + 1
        return architecture, budget.largest(lambda w: self._cost(architecture, num_hashes, w), 1, most, self.name)

    def _cost(self, architecture: str, num_hashes: int | None, width: int) -> Size:
        hashes, hidden = self._hashes(architecture, num_hashes, width), _HIDDEN[architecture]
        floats = (hashes + 1) * width + (hidden - 1) * (width + 1) * width + (width + 1) * self.embedding_dim
        if architecture == "shallow":
            return Size(floats, FLOAT_BYTES * floats + _SEED_BYTES)
        norms = 2 * hidden * width
        # Means and variances of batches are held as well, and an int64 of each layer counts them.
        return Size(floats + norms, FLOAT_BYTES * (floats + 2 * norms) + 8 * hidden + _SEED_BYTES)

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """Units of variance about 1, and rows of that of the full table."""
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            # Mean squares of what comes in: 1/3 of encodings, half of the units' behind ReLU.
            square = 1 / 3 if number == 0 else 1 / 2
            variance = 1 / (3 * self.embedding_dim) if number == last else 1
            bound = math.sqrt(3 * variance / (square * layer.in_features))
            layer.weight.copy_(self.uniform(*layer.weight.shape, bound=bound))
            layer.bias.zero_()

    def encode(self, ids: Tensor) -> Tensor:
        """Encodings of ids: shape (n, num_hashes), uniform in ±1."""
        bits = hash_bits(ids, self.seed)[:, None]
        # Seeds of another family than that of the ids' bits. Odd factors lose nothing.
        factors = derived_seeds(~self.seed, self.num_hashes)
        mixed = (bits >> 32).int() * ((factors >> 32).int() | 1)
        mixed += bits.int() * (factors.int() | 1)
        return mixed.to(self.layers[0].weight.dtype) * 2.0**-31

    def rows(self, ids: Tensor) -> Tensor:
        """Outputs of the network."""
        if not (self.training and len(self.norms)):
            # Each id is computed once; statistics of batches would notice.
            ids, back = ids.unique(return_inverse=True)
            return self._outputs(ids).index_select(0, back)
        return self._outputs(ids)

    def _outputs(self, ids: Tensor) -> Tensor:
        x = self.encode(ids)
        for number, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            x = F.mish(self._normalized(x, self.norms[number])) if len(self.norms) else F.relu(x)
        return self.layers[-1](x)

    def _normalized(self, x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        if len(x) > 1 or not norm.training:
            return norm(x)
        # One row has no variance.
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
