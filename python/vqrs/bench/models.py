"""Click models over one embedding table: DLRM, Wide & Deep, DCN-v2, DeepFM and GMF, each as its paper has it.

Every float that belongs to an id is in the embedding, so that a compressed table compresses all of them and a
count of the table's bytes leaves none out. Models with first-order weights (Wide & Deep, DeepFM) read them from the
first column: the row of an id is (w, v), as in a factorization machine, w of one float and v of embedding_dim - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["DLRM", "GMF", "DCNv2", "DeepFM", "Model", "WideAndDeep", "models"]


class Model(nn.Module):
    """What the models share: checked inputs, and initial weights that can be had again.

    Parameters
    ----------
    embedding : Module
        Gives rows of shape (b, n_fields, embedding_dim) for global ids of shape (b, n_fields).
    field_sizes : sequence of int
        Rows of each field of the table.
    embedding_dim : int
        Values of a row.
    n_numeric : int
        Numeric features of an example; they should be near the unit interval or standardised.
    random_state : int, optional
        Seed of the initial weights; torch's generator decides where it is missing.

    Raises
    ------
    ValueError
        The embedding has another number of rows or columns, or a number is too small for the model.
    """

    name: ClassVar[str]
    """What :func:`models` calls it."""
    about: ClassVar[str]
    """One line for tables, with the paper and its year."""
    least_dim: ClassVar[int] = 1
    """Columns that a row must have."""

    def __init__(
        self,
        embedding: nn.Module,
        field_sizes: Sequence[int],
        embedding_dim: int,
        n_numeric: int = 0,
        *,
        random_state: int | None = None,
    ) -> None:
        super().__init__()
        self.n_fields, self.embedding_dim, self.n_numeric = len(field_sizes), int(embedding_dim), int(n_numeric)
        if self.n_fields < 1:
            raise ValueError("field_sizes is empty: a model needs at least one field of ids")
        if self.embedding_dim < self.least_dim:
            raise ValueError(f"embedding_dim must be at least {self.least_dim} for {self.name}, got {embedding_dim}")
        if self.n_numeric < 0:
            raise ValueError(f"n_numeric must not be negative, got {n_numeric}")
        for what, expected in (("num_embeddings", sum(field_sizes)), ("embedding_dim", self.embedding_dim)):
            found = getattr(embedding, what, expected)
            if found != expected:
                raise ValueError(f"the embedding has {what}={found}, the model expects {expected}")
        self.embedding = embedding
        self.seed = int(torch.randint(2**62, ())) if random_state is None else int(random_state)
        self.build()
        self.reset_parameters()

    def build(self) -> None:
        """Make the layers; their weights are set afterwards."""
        raise NotImplementedError

    def logits(self, vectors: Tensor, numeric: Tensor) -> Tensor:
        """Logits (b,) of rows (b, n_fields, embedding_dim) and numeric features (b, n_numeric)."""
        raise NotImplementedError

    def forward(self, ids: Tensor, numeric: Tensor | None = None) -> Tensor:
        """Logits of examples.

        Parameters
        ----------
        ids : int64 tensor of shape (b, n_fields)
            Global ids: those of field 1 begin where those of field 0 end.
        numeric : float32 tensor of shape (b, n_numeric), optional
            May be missing where there are none.

        Returns
        -------
        float32 tensor of shape (b,)

        Raises
        ------
        ValueError
            A shape is another.
        """
        if ids.ndim != 2 or ids.shape[1] != self.n_fields:
            raise ValueError(f"ids must have the shape (b, {self.n_fields}), got {tuple(ids.shape)}")
        if numeric is None:
            numeric = torch.zeros(len(ids), 0, device=ids.device)
        if numeric.shape != (len(ids), self.n_numeric):
            raise ValueError(f"numeric must have the shape ({len(ids)}, {self.n_numeric}), got {tuple(numeric.shape)}")
        return self.logits(self.embedding(ids), numeric)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters of all but the embedding."""
        return [value for name, value in self.named_parameters() if not name.startswith("embedding.")]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give all but the embedding its initial weights: Glorot normal matrices and zeros elsewhere."""
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in self.dense_parameters():
            if parameter.ndim == 2:
                std = (2 / sum(parameter.shape)) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.zero_()


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer whose weights are not set: torch's generator is left alone."""
    return nn.utils.skip_init(nn.Linear, n_in, n_out)


def mlp(*widths: int, last: int | None = None) -> nn.Sequential:
    """Linear layers from each width to the next, with ReLU after each; then one to ``last`` without."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [linear(n_in, n_out), nn.ReLU()]
    if last is not None:
        layers.append(linear(widths[-1], last))
    return nn.Sequential(*layers)


class DLRM(Model):
    """Dot products of all pairs of vectors, then an MLP (Naumov et al. 2019, arXiv 1906.00091).

    A bottom MLP turns the numeric features into one more vector z; the top MLP sees z and the products of all pairs
    of the n_fields + 1 vectors. Without numeric features z is a learned constant, all that an MLP of no inputs can be.

    Parameters
    ----------
    embedding, field_sizes, embedding_dim, n_numeric, random_state
        Those of :class:`Model`.
    bottom : sequence of int
        Hidden widths of the bottom MLP; its last layer, of ``embedding_dim``, is added.
    top : sequence of int
        Hidden widths of the top MLP; its last layer, of one logit, is added.

    Examples
    --------
    >>> import torch
    >>> model = DLRM(torch.nn.Embedding(30, 8), [20, 10], 8, 2, random_state=0)
    >>> model(torch.tensor([[3, 25], [4, 20]]), torch.rand(2, 2)).shape
    torch.Size([2])
    """

    name: ClassVar[str] = "dlrm"
    about: ClassVar[str] = "products of all pairs of vectors, then an MLP (Naumov et al. 2019)"

    def __init__(
        self, *args: Any, bottom: Sequence[int] = (64,), top: Sequence[int] = (128, 64), **kwargs: Any
    ) -> None:
        self.widths = tuple(bottom), tuple(top)
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Make the layers."""
        bottom, top = self.widths
        if self.n_numeric:
            self.bottom = mlp(self.n_numeric, *bottom, self.embedding_dim)
        else:
            self.constant = nn.Parameter(torch.empty(self.embedding_dim))
        vectors = self.n_fields + 1
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)
        self.top = mlp(self.embedding_dim + vectors * (vectors - 1) // 2, *top, last=1)

    def logits(self, vectors: Tensor, numeric: Tensor) -> Tensor:
        """Logits of rows and numeric features."""
        z = self.bottom(numeric) if self.n_numeric else self.constant.expand(len(vectors), -1)
        found: Tensor = self.top(torch.cat([z, self.interactions(z, vectors)], 1))
        return found.squeeze(1)

    def interactions(self, z: Tensor, vectors: Tensor) -> Tensor:
        """Products of all pairs of the vectors, z among them: (b, (n_fields + 1) n_fields / 2)."""
        stacked = torch.cat([z.unsqueeze(1), vectors], 1)
        rows, columns = self.pairs
        return (stacked @ stacked.transpose(1, 2))[:, rows, columns]


class WideAndDeep(Model):
    """A linear model beside an MLP (Cheng et al. 2016, arXiv 1606.07792).

    The wide part adds up a weight an id (the first column) and a weight a numeric feature; the deep part is an MLP
    over all else of the rows and the numeric features, one after the other. The paper's hand-made cross products of
    fields are ids of further fields: make them where the data are made, and they are compressed as all ids are.

    Parameters
    ----------
    embedding, field_sizes, embedding_dim, n_numeric, random_state
        Those of :class:`Model`.
    deep : sequence of int
        Hidden widths of the MLP.

    Examples
    --------
    >>> import torch
    >>> model = WideAndDeep(torch.nn.Embedding(30, 8), [20, 10], 8, 2, random_state=0)
    >>> model(torch.tensor([[3, 25], [4, 20]]), torch.rand(2, 2)).shape
    torch.Size([2])
    """

    name: ClassVar[str] = "wide-and-deep"
    about: ClassVar[str] = "a linear model beside an MLP (Cheng et al. 2016)"
    least_dim: ClassVar[int] = 2

    def __init__(self, *args: Any, deep: Sequence[int] = (128, 64), **kwargs: Any) -> None:
        self.widths = tuple(deep)
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Make the layers."""
        self.wide = nn.Parameter(torch.empty(self.n_numeric))
        self.bias = nn.Parameter(torch.empty(()))
        self.deep = mlp(self.n_fields * (self.embedding_dim - 1) + self.n_numeric, *self.widths, last=1)

    def logits(self, vectors: Tensor, numeric: Tensor) -> Tensor:
        """Logits of rows and numeric features."""
        wide = vectors[:, :, 0].sum(1) + numeric @ self.wide + self.bias
        return wide + self.deep(torch.cat([vectors[:, :, 1:].flatten(1), numeric], 1)).squeeze(1)


class DCNv2(Model):
    """Explicit crosses of features, then an MLP (Wang et al. 2021, arXiv 2008.13535).

    A cross layer is x' = x₀ ⊙ (W x + b) + x with a full matrix W, x₀ all rows and numeric features one after the
    other. The MLP stands on the crosses ("stacked") or beside them ("parallel").

    Parameters
    ----------
    embedding, field_sizes, embedding_dim, n_numeric, random_state
        Those of :class:`Model`.
    n_crosses : int
        Cross layers.
    deep : sequence of int
        Hidden widths of the MLP.
    structure : {"stacked", "parallel"}

    Examples
    --------
    >>> import torch
    >>> model = DCNv2(torch.nn.Embedding(30, 8), [20, 10], 8, 2, random_state=0)
    >>> model(torch.tensor([[3, 25], [4, 20]]), torch.rand(2, 2)).shape
    torch.Size([2])
    """

    name: ClassVar[str] = "dcn-v2"
    about: ClassVar[str] = "explicit crosses of features, then an MLP (Wang et al. 2021)"

    def __init__(
        self,
        *args: Any,
        n_crosses: int = 2,
        deep: Sequence[int] = (128, 64),
        structure: str = "stacked",
        **kwargs: Any,
    ) -> None:
        if structure not in ("stacked", "parallel"):
            raise ValueError(f"structure must be 'stacked' or 'parallel', got {structure!r}")
        if n_crosses < 1:
            raise ValueError(f"n_crosses must be at least 1, got {n_crosses}")
        self.n_crosses, self.widths, self.structure = n_crosses, tuple(deep), structure
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Make the layers."""
        width = self.n_fields * self.embedding_dim + self.n_numeric
        self.crosses = nn.ModuleList(linear(width, width) for _ in range(self.n_crosses))
        self.deep = mlp(width, *self.widths)
        widest = (width, *self.widths)[-1]
        self.last = linear(widest + width * (self.structure == "parallel"), 1)

    def logits(self, vectors: Tensor, numeric: Tensor) -> Tensor:
        """Logits of rows and numeric features."""
        x0 = torch.cat([vectors.flatten(1), numeric], 1)
        crossed = self.cross(x0)
        found: Tensor = self.last(
            self.deep(crossed) if self.structure == "stacked" else torch.cat([crossed, self.deep(x0)], 1)
        )
        return found.squeeze(1)

    def cross(self, x0: Tensor) -> Tensor:
        """What the cross layers make of inputs of shape (b, width)."""
        x = x0
        for layer in self.crosses:
            x = x0 * layer(x) + x
        return x


class DeepFM(Model):
    """A factorization machine and an MLP over the same vectors (Guo et al. 2017, arXiv 1703.04247).

    A field is an id with its weight (the first column) and its vector (the others), or a numeric feature x_j with
    the weight w_j x_j and the vector v_j x_j; the machine adds weights and products of all pairs of vectors.

    Parameters
    ----------
    embedding, field_sizes, embedding_dim, n_numeric, random_state
        Those of :class:`Model`.
    deep : sequence of int
        Hidden widths of the MLP.

    Examples
    --------
    >>> import torch
    >>> model = DeepFM(torch.nn.Embedding(30, 8), [20, 10], 8, 2, random_state=0)
    >>> model(torch.tensor([[3, 25], [4, 20]]), torch.rand(2, 2)).shape
    torch.Size([2])
    """

    name: ClassVar[str] = "deepfm"
    about: ClassVar[str] = "a factorization machine and an MLP over the same vectors (Guo et al. 2017)"
    least_dim: ClassVar[int] = 2

    def __init__(self, *args: Any, deep: Sequence[int] = (128, 64), **kwargs: Any) -> None:
        self.widths = tuple(deep)
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Make the layers."""
        self.weights = nn.Parameter(torch.empty(self.n_numeric))
        self.factors = nn.Parameter(torch.empty(self.n_numeric, self.embedding_dim - 1))
        self.bias = nn.Parameter(torch.empty(()))
        self.deep = mlp((self.n_fields + self.n_numeric) * (self.embedding_dim - 1), *self.widths, last=1)

    def logits(self, vectors: Tensor, numeric: Tensor) -> Tensor:
        """Logits of rows and numeric features."""
        factors = torch.cat([vectors[:, :, 1:], numeric.unsqueeze(2) * self.factors], 1)
        first = vectors[:, :, 0].sum(1) + numeric @ self.weights + self.bias
        return first + self.second_order(factors) + self.deep(factors.flatten(1)).squeeze(1)

    @staticmethod
    def second_order(factors: Tensor) -> Tensor:
        """Sum of the products of all pairs of vectors: (b,) of (b, n, k), by (‖Σv‖² - Σ‖v‖²) / 2."""
        return (factors.sum(1).square().sum(1) - factors.square().sum((1, 2))) / 2


class GMF(Model):
    """Weighted product of a user's and an item's vector (He et al. 2017, "Neural collaborative filtering").

    The logit is hᵀ(p ⊙ q) + bias; h begins at 1, where the model is plain matrix factorization, and stays there
    without ``weights``. A numeric feature adds its weight times its value, as in a linear model.

    Parameters
    ----------
    embedding, field_sizes, embedding_dim, n_numeric, random_state
        Those of :class:`Model`; there are two fields.
    weights : bool
        Whether h and the bias are trained; the runs of Tsang & Ahle 2023 are without.

    Raises
    ------
    ValueError
        There are not two fields.

    Examples
    --------
    >>> import torch
    >>> model = GMF(torch.nn.Embedding(30, 8), [20, 10], 8, random_state=0)
    >>> model(torch.tensor([[3, 25], [4, 20]])).shape
    torch.Size([2])
    """

    name: ClassVar[str] = "gmf"
    about: ClassVar[str] = "weighted product of a user's and an item's vector (He et al. 2017)"

    def __init__(self, *args: Any, weights: bool = True, **kwargs: Any) -> None:
        self.weights = weights
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Make the layers."""
        if self.n_fields != 2:
            raise ValueError(f"gmf takes two fields, users and items, got {self.n_fields}")
        self.numeric = nn.Parameter(torch.empty(self.n_numeric))
        if self.weights:
            self.h = nn.Parameter(torch.empty(self.embedding_dim))
            self.bias = nn.Parameter(torch.empty(()))

    def reset_parameters(self) -> None:
        """Give all but the embedding its initial weights: h is 1, all else 0."""
        super().reset_parameters()
        if self.weights:
            nn.init.ones_(self.h)

    def logits(self, vectors: Tensor, numeric: Tensor) -> Tensor:
        """Logits of rows and numeric features."""
        products = vectors[:, 0] * vectors[:, 1]
        found = products @ self.h + self.bias if self.weights else products.sum(1)
        return found + numeric @ self.numeric


def models() -> dict[str, type[Model]]:
    """The click models, by name.

    Returns
    -------
    dict of str to class
        Each takes ``(embedding, field_sizes, embedding_dim, n_numeric, *, random_state=None, ...)``.

    Examples
    --------
    >>> sorted(models())
    ['dcn-v2', 'deepfm', 'dlrm', 'gmf', 'wide-and-deep']
    """
    return {model.name: model for model in (DLRM, WideAndDeep, DCNv2, DeepFM, GMF)}
