"""What stands in a compressed model beside tables: embeddings with a factor, and output layers that read a table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqrs.torch.embedding import Embedding, EmbeddingBag

__all__ = ["ScaledEmbedding", "TiedLinear"]

BLOCK_VALUES = 1 << 24
"""Values of a tied weight that are decoded at once."""


class ScaledEmbedding(Embedding):
    """An embedding whose rows are multiplied by a factor after the lookup, as the word embeddings of some language
    models are (BART, Gemma). The table holds the rows without it, as an output layer tied to them needs.

    Parameters
    ----------
    *arguments, **keywords
        Those of :class:`Embedding`.
    embed_scale : float or tensor, default=1.0
        The factor. A tensor is a buffer that ``state_dict`` leaves out.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> weight = torch.eye(4)
    >>> table = vqrs.compress(weight, method="scalar", dtype="float16")
    >>> vqrs.torch.ScaledEmbedding.from_table(table, embed_scale=3.0)(torch.tensor([1]))
    tensor([[0., 3., 0., 0.]])
    """

    def __init__(self, *arguments: Any, embed_scale: float | Tensor = 1.0, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale.detach().clone(), persistent=False)
        else:
            self.embed_scale = embed_scale

    def forward(self, input: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Look rows up and scale them; see :meth:`Embedding.forward`."""
        rows = super().forward(input, out=out)
        scale = self.embed_scale.to(rows.dtype) if isinstance(self.embed_scale, Tensor) else self.embed_scale
        return rows * scale if out is None else rows.mul_(scale)

    def extra_repr(self) -> str:
        """What printing an :class:`Embedding` shows, and the factor."""
        return f"{super().extra_repr()}, embed_scale={float(self.embed_scale):g}"


class TiedLinear(nn.Module):
    """An output layer that reads the table of an embedding: ``input @ embedding.weight.T + bias``.

    It takes the place of a ``torch.nn.Linear`` whose weight is that of an embedding, and keeps no rows of its own: they
    are decoded in blocks of at most 64 MiB (in float32), and again for gradients. The embedding is not one of its
    submodules, so that ``state_dict`` holds the table once.

    Parameters
    ----------
    embedding : Embedding or EmbeddingBag
        Whose table to read, without the factor that a :class:`ScaledEmbedding` has.
    bias : torch.nn.Parameter of shape (num_embeddings,), optional

    Attributes
    ----------
    weight : tensor of shape (num_embeddings, embedding_dim)
        The decoded table, made anew at every read.
    in_features, out_features : int
        As of ``torch.nn.Linear``: columns and rows of the table.
    keep_decoded : bool
        False. Set it to keep the decoded rows of a frozen table in memory from the first call on: with few inputs at a
        time, as in generation, the layer is then as fast as torch's own, and as large.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> embedding = vqrs.torch.Embedding.from_pretrained(torch.eye(4), method="scalar", dtype="float16")
    >>> vqrs.torch.TiedLinear(embedding)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    tensor([[1., 2., 3., 4.]])
    """

    def __init__(self, embedding: Embedding | EmbeddingBag, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._held = (embedding,)  # in a tuple torch does not take it for a submodule
        self.keep_decoded = False
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> Embedding | EmbeddingBag:
        """The embedding whose table this layer reads."""
        return self._held[0]

    @property
    def weight(self) -> Tensor:
        """The decoded table, of shape (num_embeddings, embedding_dim)."""
        return self.embedding.weight

    @property
    def in_features(self) -> int:
        """Columns of the table."""
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        """Rows of the table."""
        return self.embedding.num_embeddings

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by all rows.

        Parameters
        ----------
        input : tensor of shape (*, in_features)

        Returns
        -------
        Tensor of shape (*, out_features)
        """
        if self.keep_decoded and not self.embedding.trainable and not torch.compiler.is_compiling():
            return F.linear(input, self._kept_weight(), self.bias)
        differentiable = torch.is_grad_enabled() and (input.requires_grad or self.embedding.trainable)
        # Autograd would keep every decoded block; a compiler decides by itself what it computes twice.
        if not differentiable or torch.compiler.is_compiling():
            blocks = [self._block(input, *block) for block in self._blocks()]
        else:
            blocks = [
                checkpoint(self._block, input, *block, use_reentrant=False, preserve_rng_state=False)
                for block in self._blocks()
            ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)

    def _kept_weight(self) -> Tensor:
        """The decoded rows, made again where the embedding has another table, dtype or device than before."""
        embedding = self.embedding
        made_of = embedding._table, embedding.dtype, embedding.codes.device
        kept: tuple[Any, Tensor] | None = self.__dict__.get("_kept")
        if kept is None or kept[0] != made_of:
            kept = self.__dict__["_kept"] = made_of, embedding.weight
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """All but the decoded rows."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _blocks(self) -> list[tuple[int, int]]:
        n_rows, size = self.out_features, max(1, BLOCK_VALUES // self.in_features)
        return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]

    def _block(self, input: Tensor, start: int, stop: int) -> Tensor:
        rows = _decoded_rows(self.embedding, start, stop)
        return F.linear(input, rows, None if self.bias is None else self.bias[start:stop])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """The bias alone: the weight of a plain model's state is the embedding's to load."""
        own = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
        super()._load_from_state_dict(own, prefix, *arguments)

    def extra_repr(self) -> str:
        """Sizes, as ``torch.nn.Linear`` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _decoded_rows(module: Any, start: int, stop: int) -> Tensor:
    """Rows from ``start`` up to ``stop`` of a module's table, as ``weight`` has them."""
    ids = torch.arange(start, stop, device=module.codes.device)
    if not module.trainable:
        return Embedding.forward(module, ids)  # of bags and scaled rows too
    module._notice_cuts()
    # Not by forward: a row that lookups treat as padding is an output like the others.
    codes = F.embedding(ids, module.codes) if module.decoder.rows_apart else module.codes
    rows: Tensor = module.decoder(codes, ids)
    module._notice_cuts()
    return rows.to(module.dtype)
