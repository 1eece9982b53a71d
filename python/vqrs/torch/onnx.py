"""Export to ONNX: tables become gathers of their codes and codebooks.

    vqrs.torch.onnx.export(model, (ids,), "model.onnx")

The codes stay bytes in the file, which is about as large as the tables and the rest of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrs.torch.embedding import Embedding, EmbeddingBag, _TableModule
from vqrs.torch.tied import ScaledEmbedding

__all__ = ["export", "exportable"]


def export(model: nn.Module, args: Any, f: Any = None, **arguments: Any) -> Any:
    """Export a model that holds compressed embeddings, as ``torch.onnx.export`` does.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; those of its modules that are an :class:`Embedding` or :class:`EmbeddingBag` are exported as gathers.
    args : tuple
        Inputs of ``model``, as an example.
    f : path-like, optional
        Where the model is written.
    **arguments
        Further ones of ``torch.onnx.export``: ``dynamic_shapes``, ``dynamo``, ``opset_version``, ….

    Returns
    -------
    What ``torch.onnx.export`` returns

    Raises
    ------
    ValueError
        If a table's form cannot be exported, or a bag is called with offsets.

    Notes
    -----
    Ids are int64 or int32, as in ``args``. The runtime checks them: it refuses those beyond the last row, and counts
    negative ones from the end. Results equal the module's to the last bit but where a rotation adds in another order
    (about 1e-6 of a row's norm), and a sum or mean of a bag.

    A fused lookup operator is not part of ONNX, so that a frozen module costs more there than on torch: the memory of
    the file is what is gained.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> model = vqrs.torch.Embedding(1000, 16, method="product", n_subvectors=4, n_bits=8)
    >>> vqrs.torch.onnx.export(model, (torch.tensor([1, 2]),), "model.onnx")  # doctest: +SKIP
    """
    with exportable(model):
        return torch.onnx.export(model, args, f, **arguments)


@contextlib.contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """Make all compressed embeddings of a model read by gathers that ONNX has, within a ``with`` block.

    For exporters other than ``torch.onnx.export``, such as those of model libraries, which trace the model themselves.
    The model must not be trained or changed meanwhile.

    Parameters
    ----------
    model : torch.nn.Module

    Yields
    ------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        If a table's form cannot be exported.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> model = vqrs.torch.Embedding(1000, 16, method="product", n_subvectors=4, n_bits=8)
    >>> with vqrs.torch.onnx.exportable(model):
    ...     program = torch.export.export(model, (torch.tensor([1, 2]),))
    >>> sum("embedding" in str(node.target) for node in program.graph.nodes)  # codes, then codebooks
    2
    """
    modules = [module for module in model.modules() if isinstance(module, _TableModule)]
    for module in modules:
        if type(module).forward not in _GATHERED:
            raise ValueError(f"{type(module).__name__} has a forward of its own, which cannot be exported to ONNX")
    lifted = [module.decoder.lifted(module.codes) for module in modules]
    held = [(module, type(module), module.decoder, module.codes) for module in modules]
    try:
        for module, (decoder, codes) in zip(modules, lifted, strict=True):
            module.decoder, module.codes = decoder.to(codes.device), codes
            module.__class__ = _GATHERED[type(module).forward]
        yield model
    finally:
        for module, kind, old_decoder, old_codes in held:
            module.decoder, module.codes = old_decoder, old_codes
            module.__class__ = kind


def _rows(module: _TableModule, ids: Tensor) -> Tensor:
    """Rows of one-dimensional ids."""
    rows: Tensor = module.decoder(F.embedding(ids, module.codes), ids)
    return rows


class _Gathered(Embedding):
    """An embedding while it is exported."""

    # No out=: torch's older exporter gives all arguments of a forward by position.
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """As that of ``Embedding``."""
        rows = _rows(self, input.reshape(-1)).to(self.dtype)
        return rows.reshape(*input.shape, self.embedding_dim)


class _GatheredScaled(_Gathered):
    """A scaled embedding while it is exported."""

    embed_scale: float | Tensor

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """As that of ``ScaledEmbedding``."""
        rows, scale = super().forward(input), self.embed_scale
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


class _GatheredBag(EmbeddingBag):
    """A bag while it is exported."""

    def forward(  # type: ignore[override]
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """As that of ``EmbeddingBag``, of two-dimensional ids."""
        if input.dim() != 2 or offsets is not None:
            raise ValueError(
                "bags of one-dimensional ids with offsets cannot be exported to ONNX: give ids of shape (n_bags, "
                "n_ids_of_a_bag), filled up with padding_idx"
            )
        weights = self._flat_weights(input, per_sample_weights)
        rows = _rows(self, input.reshape(-1)).reshape(*input.shape, self.embedding_dim)
        if weights is not None:
            rows = rows * weights.to(rows.dtype).reshape(*input.shape, 1)
        kept = None if self.padding_idx is None else (input != self.padding_idx)[:, :, None]
        if self.mode == "max":
            if kept is None:
                return rows.amax(1).to(self.dtype)
            largest = rows.masked_fill(~kept, float("-inf")).amax(1)
            return torch.where(kept.any(1), largest, 0.0).to(self.dtype)
        total = (rows if kept is None else rows * kept).sum(1)
        if self.mode == "mean":
            total = total / (input.shape[1] if kept is None else kept.sum(1).clamp(min=1))
        return total.to(self.dtype)


_GATHERED: dict[Any, type[_TableModule]] = {
    Embedding.forward: _Gathered,
    ScaledEmbedding.forward: _GatheredScaled,
    EmbeddingBag.forward: _GatheredBag,
}
"""By the way in which a module looks up."""
