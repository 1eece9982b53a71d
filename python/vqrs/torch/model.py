"""A whole model at once: ``compress_`` puts compressed tables where its embeddings are, ``decompress_`` takes them out.

A model is surveyed first: which weights are looked up, by which modules, and who else holds them. Then every table is
made. Only then, with nothing left that can fail, are modules exchanged.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vqrs
from vqrs import _core
from vqrs._bytes import parse_bytes
from vqrs._compress import read_effort, read_method
from vqrs._ladders import FAST, families_for
from vqrs._progress import printed_progress
from vqrs._search import EFFORTS, Search
from vqrs._validation import RandomState, as_jobs, as_seed, as_weights
from vqrs.torch.budget import lower_hull, share_out
from vqrs.torch.embedding import Embedding, EmbeddingBag, _TableModule
from vqrs.torch.report import CompressedModule, CompressionReport
from vqrs.torch.tied import ScaledEmbedding, TiedLinear

__all__ = ["compress_", "decompress_"]

M = TypeVar("M", bound=nn.Module)

MIN_ROWS = 4096
"""Smaller tables (positions, token types) are a small share of a model, and their codebooks a large one of theirs."""

CURVE_POINTS = 7
"""Sizes at which the error of a table is estimated before bytes are shared out."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


# ---- the two doors -------------------------------------------------------------------------------------------------


def compress_(
    model: nn.Module,
    method: Any = None,
    *,
    ratio: float | None = None,
    nbytes: int | str | None = None,
    max_error: float | None = None,
    per_table: bool = True,
    relative: bool = False,
    min_rows: int = MIN_ROWS,
    frequencies: Mapping[str, ArrayLike] | None = None,
    trainable: bool = False,
    keep_original: bool = False,
    dry_run: bool = False,
    effort: Literal["fast", "balanced", "best"] = "balanced",
    random_state: RandomState = None,
    n_jobs: int | None = None,
    progress: bool | _core.Progress = False,
    **parameters: Any,
) -> CompressionReport:
    """Compress the embedding tables of a model in place.

    Each ``torch.nn.Embedding`` and ``EmbeddingBag`` becomes one of :mod:`vqrs.torch`. A module that stands at several
    places, and modules that share one weight, get one table. An output layer (``torch.nn.Linear``) with the weight of
    an embedding becomes a :class:`TiedLinear`, which reads the same table. What cannot be kept as it is stays as it is,
    and the report says why: nothing is untied. Either all is done or, where something fails, nothing.

    Parameters
    ----------
    model : torch.nn.Module
        The model. Make its optimizer, and wrap it for several devices, afterwards.
    method : str, quantizer or mapping, optional
        A kind (see :func:`vqrs.kinds`) with its ``parameters``, or a quantizer, for all tables; by default the best one
        is looked for. A mapping takes names of modules or patterns (``"*.item_*"``) to what is to be done with them: a
        kind, a quantizer, a number (a ratio), a dict of arguments of :func:`vqrs.compress`, or None to leave it alone.
        The name itself goes before patterns, and of these the first counts. Modules that none matches are treated as
        if there were no mapping, and left alone where no other argument says what to do.
    ratio : float, optional
        Budget of each table: its bytes in float32 over those of its file.
    nbytes : int or str, optional
        Budget of all tables together, for example ``"64MiB"``. Bytes go where they lower the squared error most.
    max_error : float, optional
        Largest relative error of each table.
    per_table : bool, default=True
        False: ``ratio`` is a budget of all tables together, shared out as ``nbytes`` is.
    relative : bool, default=False
        How errors of different tables count against each other where they share a budget. False: as they are, so that a
        table of small values gets few bytes. True: relative to the squared norm of each table, which suits tables whose
        scale does not matter, for example before a normalization.
    min_rows : int, default=4096
        Tables of fewer rows are left alone, unless ``method`` has their very name.
    frequencies : mapping of str to array-like of shape (n_rows,), optional
        How often each row of a module is looked up: counts that weight rows, and tables among each other where they
        share a budget. A table without counts gets equal ones that add up to the mean of those given. Rows never seen
        count for nothing: add one where they may still come.
    trainable : bool, default=False
        Whether codebooks, scales and offsets become parameters. Otherwise the tables are frozen.
    keep_original : bool, default=False
        Whether the original weights stay in memory, so that :func:`decompress_` gives them back to the bit.
    dry_run : bool, default=False
        Make all tables, but leave the model alone. The report is that of a real run with the same ``random_state``.
    effort : {"fast", "balanced", "best"}, default="balanced"
        How much is tried, as in :func:`vqrs.compress`. Above "fast", tables with frequencies are also tried with
        :class:`vqrs.MixedPrecisionQuantizer`, if scikit-learn is there.
    random_state : int, RandomState, Generator or None, default=None
        Draws samples and first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    progress : bool or callable, default=False
        True prints a line; a callable gets (stage, done, total).
    **parameters
        Parameters of ``method``.

    Returns
    -------
    CompressionReport
        Bytes and error of each table, and the reason for each that was left alone.

    Raises
    ------
    ValueError
        No budget and no method, or two budgets; a budget that cannot be reached (the message names the least); a name
        or pattern that no embedding has; a model without an embedding to compress; wrong rows or parameters. The model
        is as it was.
    TypeError
        ``model`` is no module, or an embedding itself, which nothing holds in which it could be exchanged.

    See Also
    --------
    decompress_ : The way back.
    save_pretrained : A folder from which the tables are mapped.

    Notes
    -----
    Ties are found by the parameters that registered modules hold. A weight that is used in another way, such as
    ``F.linear(x, self.embedding.weight)``, goes on to work: ``weight`` decodes the whole table at every read.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> model = torch.nn.ModuleDict({"words": torch.nn.Embedding(5000, 16), "head": torch.nn.Linear(16, 5000)})
    >>> model["head"].weight = model["words"].weight
    >>> report = vqrs.torch.compress_(model, ratio=3, effort="fast", random_state=0)
    >>> report["words"].tied, report.ratio >= 3
    (('head',), True)
    >>> type(model["head"]).__name__
    'TiedLinear'
    >>> _ = vqrs.torch.decompress_(model)
    >>> model["head"].weight is model["words"].weight
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.Embedding | nn.EmbeddingBag):
        raise TypeError(
            f"the model is a {type(model).__name__} itself, which cannot be exchanged in place: use "
            f"vqrs.torch.{'Embedding' if isinstance(model, nn.Embedding) else 'EmbeddingBag'}.from_pretrained(model, …)"
        )
    read_effort(effort)
    weights = _survey(model, trainable)
    if not weights:
        raise ValueError("the model has no torch.nn.Embedding or EmbeddingBag")
    plan = _Plan(method, parameters, ratio, nbytes, max_error, per_table, min_rows)
    plan.assign(weights)
    _read_frequencies(frequencies, weights)
    jobs = [weight for weight in weights if weight.skipped is None]
    if not jobs:
        found = "; ".join(f"{weight.name}: {weight.skipped}" for weight in weights)
        raise ValueError(f"there is no embedding to compress: {found}")
    seed = as_seed(random_state)
    with printed_progress("vqrs.torch.compress_", int(progress is True)) as line:
        maker = _Maker(effort, seed, as_jobs(n_jobs), progress if callable(progress) else line, relative)
        plan.make_tables(jobs, maker)
    # Built before the first exchange: what can fail, fails here.
    exchanges = [exchange for weight in jobs for exchange in weight.replacements(trainable, keep_original)]
    energies = [weight.energy() for weight in jobs]
    rows = [weight.row() for weight in [*jobs, *(weight for weight in weights if weight.skipped is not None)]]
    if not dry_run:
        _exchange(model, exchanges)
        _tell_transformers(model)
    return CompressionReport(rows, energies, dry_run)


def decompress_(model: M) -> M:
    """Put torch's own modules back, in place: the reverse of :func:`compress_`.

    Weights hold the decoded values (the original ones with ``keep_original=True``), in the dtype and on the device that
    the modules have now. Modules are of their original classes, ties are ties of one parameter again, and the keys of
    ``state_dict`` are those from before. Modules that were made in other ways (``Embedding.from_table``) become
    ``torch.nn.Embedding`` and ``EmbeddingBag``.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        The model has no compressed module.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5000, 16))
    >>> _ = vqrs.torch.compress_(model, method="scalar", dtype="int4", keep_original=True)
    >>> model[0].weight.unique().numel() < 80_000
    True
    >>> vqrs.torch.decompress_(model)
    Sequential(
      (0): Embedding(5000, 16)
    )
    """
    tables = [module for module in model.modules() if isinstance(module, _TableModule)]
    if not tables:
        raise ValueError("the model has no compressed embedding")
    if isinstance(model, _TableModule):
        raise TypeError(f"the model is a {type(model).__name__} itself: make a torch module of its weight")
    parameters: dict[int, nn.Parameter] = {}
    exchanges: list[tuple[nn.Module, nn.Module]] = []
    for module in tables:
        origin: _Origin = module.__dict__.get("_origin") or _Origin()
        if id(origin) not in parameters:
            values = module.weight.detach() if origin.weight is None else origin.weight
            values = values.detach().to(module.codes.device, module.dtype)
            parameters[id(origin)] = nn.Parameter(values, requires_grad=origin.requires_grad or module.trainable)
        parameter = parameters[id(origin)]
        exchanges.append((module, _restored(module, parameter)))
        for head in model.modules():
            if isinstance(head, TiedLinear) and head.embedding is module:
                exchanges.append((head, _restored_head(head, parameter)))
    _exchange(model, exchanges)
    _tell_transformers(model)
    return model


# ---- the survey ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Origin:
    """What a table was made of: modules with the same origin shared one weight. Copies and pickles keep that."""

    requires_grad: bool = True
    weight: nn.Parameter | None = None
    """Kept on request."""
    modules: list[_TableModule] = field(default_factory=list)
    """Those modules: what changes the table of one changes it for all."""

    def add(self, module: _TableModule) -> None:
        module.__dict__["_origin"] = self
        self.modules.append(module)


@dataclass(eq=False)
class _Weight:
    """A weight of a model, with all that holds it."""

    parameter: Tensor
    modules: list[nn.Module]
    """Embeddings that look up in it."""
    names: dict[int, list[str]]
    """Of each module, by its id."""
    heads: list[nn.Linear] = field(default_factory=list)
    skipped: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of vqrs.compress."""
    frequencies: NDArray[np.float64] | None = None
    table: vqrs.Table | None = None

    @property
    def name(self) -> str:
        return self.names[id(self.modules[0])][0]

    @property
    def all_names(self) -> list[str]:
        """Of the embeddings, by which a user may call them."""
        return [name for module in self.modules for name in self.names[id(module)]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def rows(self) -> Tensor:
        return self.parameter.detach().cpu()

    def energy(self) -> float:
        """Squared norm of the rows, weighted by their frequencies."""
        squares = (self.rows().double() ** 2).sum(1).numpy()
        return float(squares.sum() if self.frequencies is None else self.frequencies @ squares)

    def error(self, table: vqrs.Table) -> float:
        errors = table.info()["errors"]
        return float(errors["relative" if self.frequencies is None else "weighted"])

    def row(self) -> CompressedModule:
        heads = [name for head in self.heads for name in self.names[id(head)]]
        nbytes = self.parameter.numel() * self.parameter.element_size()
        about: dict[str, Any] = {"name": self.name, "tied": (*self.all_names[1:], *heads), "shape": self.shape}
        about["nbytes_before"] = nbytes
        if self.table is None:
            return CompressedModule(
                **about, kind=None, parameters={}, nbytes=nbytes, ratio=1.0, relative_error=0.0, skipped=self.skipped
            )
        return CompressedModule(
            **about,
            kind=self.table.kind,
            parameters=self.table.parameters,
            nbytes=self.table.nbytes,
            ratio=self.table.ratio,
            relative_error=self.error(self.table),
        )

    def replacements(self, trainable: bool, keep_original: bool) -> list[tuple[nn.Module, nn.Module]]:
        """Old modules with what comes in their place."""
        assert self.table is not None
        kept = self.parameter if keep_original and isinstance(self.parameter, nn.Parameter) else None
        origin = _Origin(self.parameter.requires_grad, kept)
        found: list[tuple[nn.Module, nn.Module]] = []
        try:
            for module in self.modules:
                alike = next((new for old, new in found if _alike(old, module)), None)
                if alike is not None:  # one module in both places: nothing can part what it reads
                    found.append((module, alike))
                    continue
                new = _compressed(module, self.table, trainable)
                if trainable and found:
                    new.decoder = found[0][1].decoder  # type: ignore[assignment]  # one set of parameters
                origin.add(new)
                found.append((module, new))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        first: Any = found[0][1]
        for head in self.heads:
            tied = TiedLinear(first, head.bias)
            _take_over(head, tied)
            found.append((head, tied))
        return found


def _survey(model: nn.Module, trainable: bool) -> list[_Weight]:
    """The embedding weights of a model, with the reason of each that cannot be compressed."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owners: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
    sharing: dict[tuple[str, int], set[int]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append((module, attribute, tensor))
                    if (memory := _memory(tensor)) is not None:
                        sharing.setdefault(memory, set()).add(id(tensor))
    found: dict[int, _Weight] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            reason = _reason(module, trainable)
            parameter = module._parameters.get("weight")
            if parameter is None:  # parametrized, pruned: computed at every read
                parameter = module.weight.detach()
            weight = found.setdefault(id(parameter), _Weight(parameter, [], names))
            weight.modules.append(module)
            if reason is not None and weight.skipped is None:
                other = "" if weight.modules[0] is module else f"tied to {names[id(module)][0]}, for which: "
                weight.skipped = other + reason
    for weight in found.values():
        for module, attribute, _ in owners.get(id(weight.parameter), []):
            if module in weight.modules:
                continue
            if type(module) is nn.Linear and attribute == "weight" and "forward" not in module.__dict__:
                weight.heads.append(module)
            elif weight.skipped is None:
                where = f"{names[id(module)][0]}.{attribute}"
                weight.skipped = (
                    f"its weight is also {where} of a {type(module).__name__}, which cannot read a compressed table"
                )
        others = sharing.get(_memory(weight.parameter) or ("", 0), set()) - {id(weight.parameter)}
        if others and weight.skipped is None:
            module, attribute, _ = owners[min(others, key=lambda one: names[id(owners[one][0][0])][0])][0]
            where = f"{names[id(module)][0]}.{attribute}".lstrip(".")
            weight.skipped = f"it shares its memory with another parameter, {where}"
    return list(found.values())


def _memory(tensor: Tensor) -> tuple[str, int] | None:
    """The memory behind a tensor; None where there is none, or none to be asked for."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    address = tensor.untyped_storage().data_ptr()
    return (str(tensor.device), address) if address else None


def _reason(module: nn.Embedding | nn.EmbeddingBag, trainable: bool) -> str | None:
    """Why an embedding cannot be compressed by itself, or None."""
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module):
        return "it is parametrized: remove the parametrizations first"
    if weight is None:
        return "its weight is not a parameter but computed, for example by pruning"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor: it may be distributed or quantized"
    if weight.dim() != 2 or not weight.is_floating_point():
        return f"its weight is {weight.dtype} of shape {tuple(weight.shape)}"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} rescales rows as they are looked up"
    if trainable and module.scale_grad_by_freq:
        return "scale_grad_by_freq=True cannot be kept in training, where rows share their codebooks"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if _plain_forward(module) or _scale_of(module) is not None:
        return None
    return f"{type(module).__name__} changes what is looked up"


def _plain_forward(module: nn.Module) -> bool:
    """Whether a module looks up as torch's own class does."""
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    return type(module).forward is base.forward and _holds_only_weight(module)


def _holds_only_weight(module: nn.Module) -> bool:
    return list(module._parameters) == ["weight"] and not module._modules


def _scale_of(module: nn.Module) -> float | Tensor | None:
    """The factor of a subclass that multiplies the rows by its ``embed_scale`` and does nothing else: a lookup of some
    rows tells.
    """
    scale = getattr(module, "embed_scale", None)
    if not isinstance(module, nn.Embedding) or not isinstance(scale, int | float | Tensor):
        return None
    if not _holds_only_weight(module) or (isinstance(scale, Tensor) and scale.numel() != 1):
        return None
    weight = module.weight.detach()
    # Neither in order nor each once, so that places do not pass for ids.
    ids = torch.linspace(0, len(weight) - 1, 60, device=weight.device).long().flip(0).reshape(3, 20)
    ids[0, :10] = ids[1, :10]
    factor = scale.to(weight.dtype) if isinstance(scale, Tensor) else scale
    try:
        with torch.no_grad():
            rows = type(module).forward(module, ids)
            return scale if torch.equal(rows, F.embedding(ids, weight) * factor) else None
    except Exception:  # another signature, another result: any way in which it is not a lookup
        return None


# ---- what to do with each ------------------------------------------------------------------------------------------


class _Plan:
    """What the user asks for, for each weight."""

    def __init__(
        self,
        method: Any,
        parameters: dict[str, Any],
        ratio: float | None,
        nbytes: int | str | None,
        max_error: float | None,
        per_table: bool,
        min_rows: int,
    ) -> None:
        self.mapping: dict[str, Any] = dict(method) if isinstance(method, Mapping) else {}
        if self.mapping and parameters:
            raise TypeError(f"{', '.join(map(repr, parameters))}: with a mapping, parameters stand in its values")
        budgets = {"ratio": ratio, "nbytes": nbytes, "max_error": max_error}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given: pass one of them")
        if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio < math.inf):
            raise ValueError(f"ratio={ratio!r} must be a positive number")
        if not per_table and ratio is None:
            raise ValueError("per_table=False is about ratio=, which is not given")
        self.nbytes = None if nbytes is None else parse_bytes(nbytes)
        self.total_ratio = None if per_table else ratio
        self.budget = given if per_table and nbytes is None else {}
        self.shared = nbytes is not None or not per_table
        self.method = {} if isinstance(method, Mapping) or method is None else {"method": method, **parameters}
        if method is None and parameters:
            raise TypeError(f"compress_() got {', '.join(map(repr, parameters))}: parameters of a kind need method=")
        if not given and method is None:
            raise ValueError("pass one of ratio=, nbytes= and max_error=, or a method= with its parameters")
        self.min_rows = min_rows

    def assign(self, weights: list[_Weight]) -> None:
        """Arguments, or the reason to leave it alone, for each weight; those of wrong methods are refused here."""
        self._check_patterns(weights)
        for weight in weights:
            pattern = self._pattern(weight)
            spec = self.mapping.get(pattern) if pattern is not None else self.method
            if weight.skipped is not None:
                continue
            if pattern is not None and spec is None:
                weight.skipped = f"method has None for {pattern!r}"
            elif weight.shape[0] < self.min_rows and pattern not in weight.all_names:
                weight.skipped = f"{weight.shape[0]:,} rows, fewer than min_rows={self.min_rows:,}"
            elif pattern is None and not self.method and not self.budget and not self.shared:
                weight.skipped = "no name or pattern of method matches it"
            else:
                weight.arguments = self._arguments(weight.name, spec)

    def _check_patterns(self, weights: list[_Weight]) -> None:
        names = [name for weight in weights for name in weight.all_names]
        for pattern in self.mapping:
            if not any(_matches(pattern, name) for name in names):
                raise ValueError(f"{pattern!r} matches no embedding of the model: they are {', '.join(names)}")

    def _pattern(self, weight: _Weight) -> str | None:
        exact = [name for name in weight.all_names if name in self.mapping]
        found = (key for key in self.mapping if any(_matches(key, name) for name in weight.all_names))
        return exact[0] if exact else next(found, None)

    def _arguments(self, name: str, spec: Any) -> dict[str, Any]:
        if isinstance(spec, bool) or (isinstance(spec, int | float) and not 0 < spec < math.inf):
            raise ValueError(f"{name}: {spec!r} is no ratio: it must be a positive number")
        own = {"ratio": spec} if isinstance(spec, int | float) else dict(spec) if isinstance(spec, Mapping) else {}
        if isinstance(spec, str) or hasattr(spec, "get_params"):
            own = {"method": spec}
        elif not isinstance(spec, int | float | Mapping):
            raise TypeError(f"{name}: expected a kind, a quantizer, a ratio, a dict or None, not {spec!r}")
        for taken in ("sample_weight", "path", "progress"):
            if taken in own:
                raise ValueError(f"{name}: {taken} cannot be given for a module of a model")
        _check_method(name, own)
        has_goal = any(own.get(goal) is not None for goal in ("ratio", "nbytes", "max_error"))
        return own if has_goal else self.budget | own

    def make_tables(self, weights: list[_Weight], maker: _Maker) -> None:
        """The table of each weight; all are made, or an error is raised."""
        goals = ("ratio", "nbytes", "max_error")
        open_ones = [w for w in weights if self.shared and not any(w.arguments.get(goal) for goal in goals)]
        fixed = [weight for weight in weights if weight not in open_ones]
        for weight in fixed:
            weight.table = maker.table(weight, {})
        if not open_ones:
            if self.nbytes is not None and sum(weight.table.nbytes for weight in fixed if weight.table) > self.nbytes:
                raise ValueError(f"the tables with budgets of their own take more than nbytes={self.nbytes}")
            return
        budget = self.nbytes
        if budget is None:
            assert self.total_ratio is not None
            budget = int(4 * sum(math.prod(weight.shape) for weight in weights) / self.total_ratio)
        taken = sum(weight.table.nbytes for weight in fixed if weight.table)
        least = [maker.least_bytes(weight) for weight in open_ones]
        if taken + sum(least) > budget:
            values = sum(math.prod(weight.shape) for weight in weights)
            raise ValueError(
                f"{budget} bytes are too few for the {len(weights)} tables together: the least is {taken + sum(least)} "
                f"bytes (ratio {4 * values / (taken + sum(least)):.4g})"
            )
        left = budget - taken
        if len(open_ones) == 1:
            shares = [left]
        else:
            most = [left - sum(least) + own for own in least]
            curves = [maker.curve(*one) for one in zip(open_ones, least, most, strict=True)]
            shares = share_out(curves, left)
        spare = left - sum(shares)
        for place in np.argsort(shares, kind="stable"):
            weight, share = open_ones[place], shares[place] + spare
            weight.table = maker.table(weight, {"nbytes": share})
            spare = share - weight.table.nbytes


def _matches(pattern: str, name: str) -> bool:
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def _check_method(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse an unknown kind or parameter before anything is fitted."""
    known = ("ratio", "nbytes", "max_error", "effort", "names", "metadata", "random_state", "n_jobs", "durable")
    parameters = {key: value for key, value in arguments.items() if key not in (*known, "method")}
    method = arguments.get("method")
    if hasattr(method, "_compress_within") and not parameters:
        return
    try:
        read_method(method, parameters, None)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error


def _read_frequencies(frequencies: Mapping[str, ArrayLike] | None, weights: list[_Weight]) -> None:
    """Counts of the rows of each weight; those of modules that share it are added."""
    if not frequencies:
        return
    by_name = {name: weight for weight in weights for name in weight.all_names}
    given: dict[int, NDArray[np.float64]] = {}
    for name, counts in frequencies.items():
        if name not in by_name:
            raise ValueError(f"frequencies has {name!r}, which is no embedding of the model: {', '.join(by_name)} are")
        weight = by_name[name]
        try:
            read = as_weights(counts, weight.shape[0])
        except ValueError as error:
            raise ValueError(f"frequencies of {name!r}: {error}") from error
        assert read is not None
        if not np.isfinite(read).all() or (read < 0).any() or not read.any():
            raise ValueError(f"frequencies of {name!r} must be finite, not negative, and not all zero")
        given[id(weight)] = given[id(weight)] + read if id(weight) in given else read
    mean = float(np.mean([counts.sum() for counts in given.values()]))
    for weight in weights:
        n_rows = weight.shape[0]
        weight.frequencies = given.get(id(weight), np.full(n_rows, mean / n_rows))


# ---- tables --------------------------------------------------------------------------------------------------------


class _Maker:
    """How tables are made."""

    def __init__(
        self, effort: Any, seed: int, n_jobs: int | None, progress: _core.Progress | None, relative: bool
    ) -> None:
        self.effort, self.seed, self.n_jobs, self.progress, self.relative = effort, seed, n_jobs, progress, relative

    def table(self, weight: _Weight, budget: dict[str, Any]) -> vqrs.Table:
        """The table of a weight, within a budget where its arguments have none."""
        arguments: dict[str, Any] = {
            "effort": self.effort,
            "random_state": self.seed,
            "n_jobs": self.n_jobs,
            "sample_weight": weight.frequencies,
            "progress": self._progress(weight.name) or False,
        }
        arguments |= budget | weight.arguments
        try:
            table = vqrs.compress(weight.rows(), **arguments)
            goal = arguments.get("nbytes") or arguments.get("ratio")
            if goal and arguments.get("method") is None and weight.frequencies is not None and self.effort != "fast":
                table = self._mixed(weight, arguments, table)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{weight.name}: {error}") from error
        return table

    def _mixed(self, weight: _Weight, arguments: dict[str, Any], table: vqrs.Table) -> vqrs.Table:
        """The better of a table and one that gives more bits to the rows that are looked up more often."""
        assert weight.frequencies is not None
        if (weight.frequencies == weight.frequencies[0]).all():
            return table
        try:
            mixed = vqrs.compress(weight.rows(), **arguments | {"method": vqrs.MixedPrecisionQuantizer()})
        except (ImportError, ValueError):  # no scikit-learn; a budget or rows that are too small for groups
            return table
        return min(table, mixed, key=lambda one: (weight.error(one), one.nbytes))

    def least_bytes(self, weight: _Weight) -> int:
        """Of the smallest table that any kind which is tried makes."""
        families = self._families(weight, read_effort(self.effort).level)
        return min(ladder[0].nbytes for family in families for ladder in family.ladders if not ladder.measured)

    def curve(self, weight: _Weight, least: int, most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bytes and squared errors to expect of them, by cheap fits on a sample: only the slopes count."""
        n_rows, dim = weight.shape
        most = max(least, min(most, 4 * n_rows * dim))
        progress = self._progress(weight.name)
        search = Search(weight.rows(), weight.frequencies, self.seed, self.n_jobs, progress, EFFORTS["fast"])
        families = self._families(weight, FAST)
        for budget in np.geomspace(least, most, CURVE_POINTS)[::-1]:
            search.candidates_within(families, float(budget) * (1 + 1e-9), alone=False)
        found = sorted((trial.candidate.nbytes, trial.error) for trial in search.finished_trials())
        # Where no cheap fit is as small as the smallest table, all of the error is left.
        points = [(least, 1.0), *((size, error) for size, error in found if size >= least)]
        sizes, errors = (np.array(column, np.float64) for column in zip(*points, strict=True))
        counts = weight.shape[0] if weight.frequencies is None else weight.frequencies.sum()
        return lower_hull(sizes, np.maximum(errors, 1e-12) * (counts if self.relative else weight.energy()))

    def _families(self, weight: _Weight, level: int) -> Any:
        arguments = dict(weight.arguments)
        method = arguments.pop("method", None)
        for name in ("effort", "names", "metadata", "random_state", "n_jobs", "durable"):
            arguments.pop(name, None)
        if hasattr(method, "_compress_within"):  # groups of rows: the slopes of single kinds stand for theirs
            method, arguments = None, {}
        kind, parameters, _ = read_method(method, arguments, None)
        n_rows, dim = weight.shape
        return families_for(kind, parameters, n_rows, dim, level)

    def _progress(self, name: str) -> _core.Progress | None:
        report = self.progress
        return None if report is None else lambda stage, done, total: report(f"{name}: {stage}", done, total)


# ---- the exchange --------------------------------------------------------------------------------------------------


def _compressed(module: nn.Module, table: vqrs.Table, trainable: bool) -> _TableModule:
    """What takes the place of an embedding."""
    held: Any = module
    arguments: dict[str, Any] = {
        "padding_idx": held.padding_idx,
        "trainable": trainable,
        "device": held.weight.device,
        "dtype": held.weight.dtype,
        "sparse": held.sparse and trainable,
    }
    new: _TableModule
    if isinstance(module, nn.EmbeddingBag):
        own = {"mode": module.mode, "include_last_offset": module.include_last_offset}
        new = EmbeddingBag.from_table(table, **arguments, **own)
    elif _plain_forward(module):
        new = Embedding.from_table(table, **arguments)
    else:
        new = ScaledEmbedding.from_table(table, embed_scale=_scale_of(module), **arguments)
    _take_over(module, new)
    return new


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two embeddings of one weight do the same, so that one can stand for both."""

    def about(module: nn.Module) -> dict[str, Any]:
        own = {name: value for name, value in module.__dict__.items() if not name.startswith("_") or name in _HOOKS}
        return own | {name: buffer.tolist() for name, buffer in module._buffers.items() if buffer is not None}

    if type(one) is not type(other) or any(getattr(module, hooks, None) for module in (one, other) for hooks in _HOOKS):
        return False
    try:
        return about(one) == about(other)
    except (ValueError, RuntimeError):  # an attribute that is an array says neither yes nor no
        return False


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Hooks and mode of the module before, and a shell of it without its weight for the way back."""
    for hooks in _HOOKS:
        if hooks in old.__dict__:
            new.__dict__[hooks] = old.__dict__[hooks]  # the same dict, so that handles still remove them
    new.training = old.training
    shell = copy.copy(old)
    shell._parameters = type(old._parameters)((name, None) for name in old._parameters)
    new.__dict__["_shell"] = (shell,)


def _restored(module: _TableModule, parameter: nn.Parameter) -> nn.Module:
    """Torch's module of a compressed one."""
    held: Any = module
    if "_shell" in module.__dict__:
        restored = copy.copy(module.__dict__["_shell"][0])
        restored._parameters = type(restored._parameters)(weight=parameter)
    elif isinstance(module, EmbeddingBag):
        own = {"mode": module.mode, "include_last_offset": module.include_last_offset}
        restored = nn.EmbeddingBag.from_pretrained(parameter, padding_idx=module.padding_idx, **own)
        restored.weight = parameter
    elif hasattr(module, "embed_scale"):
        raise ValueError(
            "torch has no scaled embedding, and the module's original class is not known: replace it by hand"
        )
    else:
        restored = nn.Embedding.from_pretrained(parameter, padding_idx=held.padding_idx)
        restored.weight = parameter
    restored.training = module.training
    for name, buffer in restored._buffers.items():
        if buffer is not None:
            restored._buffers[name] = buffer.to(parameter.device)
    return restored


def _restored_head(head: TiedLinear, parameter: nn.Parameter) -> nn.Module:
    if "_shell" in head.__dict__:
        restored = copy.copy(head.__dict__["_shell"][0])
    else:
        restored = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
    restored._parameters = type(restored._parameters)(weight=parameter, bias=head.bias)
    restored.training = head.training
    return restored


def _exchange(model: nn.Module, exchanges: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Put new modules wherever the old ones stand."""
    new_of = {id(old): new for old, new in exchanges}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new_of:
                parent._modules[name] = new_of[id(child)]


def _tell_transformers(model: nn.Module) -> None:
    """Models of transformers tie weights by their names: tell them of the tables, if any model can be one of theirs."""
    if "transformers" in sys.modules:
        from vqrs.torch.pretrained import update_transformers_models

        update_transformers_models(model)


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, _TableModule]]:
    """The compressed modules of a model, each once, with their first names."""
    for name, module in model.named_modules():
        if isinstance(module, _TableModule):
            yield name, module
