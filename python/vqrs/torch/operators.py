"""The operators ``torch.ops.vqrs.lookup`` and ``torch.ops.vqrs.pool``: what compiled and exported programs call.

An operator gets everything that it reads as tensors (ids, codes, the decoder's tensors) and the decoder's description
as text, so that a program that was exported with it can be loaded where no table is. On the CPU the compiled core reads
the codes where they are and writes into the output's memory. On other devices and for trainable values the rows are
gathered by torch, which ``torch.compile`` fuses; on CUDA, Triton kernels read books and levels.

Eager modules call the core directly: the way through torch's dispatcher costs as long as a small lookup.

A process that loads an exported program must ``import vqrs.torch`` first, which registers the operators.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqrs import _core
from vqrs.torch.forms import FORMS, Decoder

__all__ = ["describe", "gather", "pool_gathered", "read_bags", "read_rows", "remember"]

ID_DTYPES = torch.int32, torch.int64
_DIRECT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""What the compiled core writes; float64 is a cast of float32."""

Mode = Literal["sum", "mean", "max"]

# ---- rows of a table, between addresses -----------------------------------------------------------------------------


def read_rows(
    table: _core.Table,
    dim: int,
    ids: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    """Rows by the compiled core, straight into a tensor.

    Parameters
    ----------
    table : vqrs._core.Table
    dim : int
        Columns of the table.
    ids : int32 or int64 CPU tensor of any shape
    dtype : torch.dtype
        Of the rows: float16, bfloat16, float32 or float64.
    out : contiguous CPU tensor of shape (*ids.shape, dim), optional
        Filled and returned. Its dtype counts.
    codes : uint8 CPU tensor, optional
        Those of the table, which ``out`` must not overlap.

    Returns
    -------
    Tensor of shape (*ids.shape, dim)

    Raises
    ------
    IndexError
        If an id is negative or beyond the last row.

    Notes
    -----
    No more threads work at it than torch uses here: one in a worker of a DataLoader.
    """
    ids_dtype = ids.dtype
    if ids_dtype is not torch.int64 and ids_dtype is not torch.int32:
        raise TypeError(f"ids must be a tensor of int32 or int64, not {ids_dtype}")
    if not ids.is_contiguous():
        ids = ids.contiguous()
    if out is None:
        name = _DIRECT.get(dtype)
        if name is None:
            return read_rows(table, dim, ids, torch.float32).to(dtype)
        out = _fresh(ids, (*ids.shape, dim), dtype)
    else:
        name = _checked_out(out, (*ids.shape, dim), ids, codes)
    count = ids.numel()
    table.lookup_at(ids.data_ptr(), count, ids_dtype is torch.int64, out.data_ptr(), name, _threads(count * dim))
    return out


def read_bags(
    table: _core.Table,
    dim: int,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    mode: Mode,
    dtype: torch.dtype,
    out: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    """Bags of rows by the compiled core, straight into a tensor.

    Parameters
    ----------
    table : vqrs._core.Table
    dim : int
        Columns of the table.
    ids : int32 or int64 CPU tensor of shape (n_ids,), or (n_bags, n_ids_of_a_bag) without offsets
    offsets : int64 CPU tensor of shape (n_bags,), optional
        Where each bag begins.
    weights : float CPU tensor of the shape of ids, optional
        Of ``mode="sum"`` or ``"mean"``.
    mode : {"sum", "mean", "max"}
    dtype : torch.dtype
        Of the result: float16, bfloat16, float32 or float64. Sums are float32.
    out : contiguous CPU tensor of shape (n_bags, dim), optional
        Filled and returned. Its dtype counts.
    codes : uint8 CPU tensor, optional
        Those of the table, which ``out`` must not overlap.

    Returns
    -------
    Tensor of shape (n_bags, dim)

    Raises
    ------
    IndexError
        If an id is negative or beyond the last row.
    ValueError
        If offsets do not begin at 0 or fall.
    """
    ids_dtype = ids.dtype
    if ids_dtype is not torch.int64 and ids_dtype is not torch.int32:
        raise TypeError(f"ids must be a tensor of int32 or int64, not {ids_dtype}")
    if not ids.is_contiguous():
        ids = ids.contiguous()
    count, n_bags = ids.numel(), len(ids) if offsets is None else len(offsets)
    if offsets is not None:
        offsets = offsets.to(torch.int64).contiguous()
    if weights is not None:
        if weights.numel() != count:
            raise ValueError(f"there are {weights.numel()} weights for {count} ids: give one for each")
        weights = weights.detach().to(torch.float32).contiguous()
    if out is None:
        name = _DIRECT.get(dtype)
        if name is None:
            return read_bags(table, dim, ids, offsets, weights, mode, torch.float32).to(dtype)
        out = _fresh(ids, (n_bags, dim), dtype)
    else:
        name = _checked_out(out, (n_bags, dim), ids, offsets, weights, codes)
    table.pool_at(
        ids.data_ptr(),
        count,
        ids_dtype is torch.int64,
        None if offsets is None else offsets.data_ptr(),
        n_bags,
        None if weights is None else weights.data_ptr(),
        mode,
        out.data_ptr(),
        name,
        _threads(count * dim),
    )
    return out


_LARGE = 32 << 20
"""Bytes from which the C library maps fresh pages for each result: then in large pages, which numpy asks for."""


def _fresh(ids: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for rows, on 64 bytes, so that they can be written past the cache."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < _LARGE:
        return ids.new_empty(shape, dtype=dtype)
    memory = np.empty(n_bytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return torch.from_numpy(memory[begin : begin + n_bytes]).view(dtype).view(shape)


_ALONE = 1 << 22
"""Values up to which the calling thread works alone, for half a millisecond or so."""


def _threads(values: int) -> int:
    """Threads for a call. torch's spin for some milliseconds after each of its operators, and ours have to wait for the
    cores that those hold: a short call ends sooner without them.
    """
    return 1 if values <= _ALONE else torch.get_num_threads()


def _checked_out(out: Tensor, shape: tuple[int, ...], *inputs: Tensor | None) -> str:
    """The name of the dtype of a tensor to fill, once it is one that can be filled, and is marked as changed."""
    name = _DIRECT.get(out.dtype)
    if name is None or out.shape != shape or not out.is_cpu or not out.is_contiguous() or out.requires_grad:
        found = f"{out.dtype} of shape {tuple(out.shape)} and strides {out.stride()} on {out.device}"
        raise ValueError(
            f"out is {found}{', which requires a gradient' if out.requires_grad else ''}; expected a contiguous CPU "
            f"tensor of shape {tuple(shape)} and float32, float16 or bfloat16, without a gradient"
        )
    first, last = out.data_ptr(), out.data_ptr() + out.nbytes
    for tensor in inputs:
        if tensor is not None and tensor.data_ptr() < last and first < tensor.data_ptr() + tensor.nbytes:
            raise ValueError("out shares memory with the ids, offsets, weights or codes: give it memory of its own")
    if not out.is_inference():  # autograd must not take the new values for those that it has saved
        torch.autograd.graph.increment_version(out)
    return name


# ---- decoders as text and tensors ----------------------------------------------------------------------------------


class _Plan:
    """What the text of a decoder says."""

    def __init__(self, text: str) -> None:
        said = json.loads(text)
        self.text = text
        self.description: dict[str, Any] = said["decoder"]
        self.dim: int = self.description["dim"]
        self.trainable: bool = said["trainable"]
        self.stored: list[str] = said["stored"]
        """Names of the first tensors: what the decoder is made from."""
        self.derived: list[str] = said["derived"]
        """Names of the others: what it computes from those once."""


_plan = functools.lru_cache(maxsize=256)(_Plan)
_local = threading.local()


def describe(description: Mapping[str, Any], decoder: Decoder) -> tuple[str, list[str]]:
    """The text that operators take for a decoder, and the names of its tensors in the order that they take them.

    Parameters
    ----------
    description : mapping
        The decoder's description, as in ``Table.info()["decoder"]``.
    decoder : Decoder
        Its module.

    Returns
    -------
    text : str
    names : list of str
    """
    tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    stored = [name for name in decoder.state_dict() if name in tensors]
    derived = [name for name in tensors if name not in stored]
    said = {"decoder": description, "trainable": decoder.trainable, "stored": stored, "derived": derived}
    return json.dumps(said, sort_keys=True), stored + derived


def _skeleton(plan: _Plan, tensors: Sequence[Tensor]) -> Decoder:
    """The module of a decoder without values of its own: one a thread, since a call puts its tensors into it."""
    made: dict[str, Decoder] = _local.__dict__.setdefault("skeletons", {})
    if plan.text not in made:
        if len(made) >= 64:
            made.clear()
        values = dict(zip(plan.stored, (tensor.detach().cpu() for tensor in tensors), strict=False))
        made[plan.text] = FORMS[plan.description["form"]](plan.description, values, plan.trainable).to("meta")
    return made[plan.text]


def gather(ids: Tensor, codes: Tensor, tensors: Sequence[Tensor], decoder: str) -> Tensor:
    """Rows of ids of any shape by torch's own operators, on any device: float32, or the dtype of trainable values."""
    plan = _plan(decoder)
    module = _skeleton(plan, tensors)
    flat = ids.reshape(-1)
    read = F.embedding(flat, codes) if module.rows_apart else codes
    values = dict(zip(plan.stored + plan.derived, tensors, strict=True))
    rows: Tensor = torch.func.functional_call(module, values, (read, flat))
    return rows.reshape(*ids.shape, plan.dim).contiguous()


def pool_gathered(
    rows: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None, mode: str, padding_idx: int | None
) -> Tensor:
    """Bags by torch's own operators: its embedding bag over decoded rows, each of which is used once."""
    if weights is not None:  # torch 2.4's embedding bag fails where the weights have a gradient and the rows none
        rows = rows * weights.to(rows.dtype)[:, None]
    places = torch.arange(len(ids), device=ids.device)
    padding = None
    if padding_idx is not None:  # one row of zeros in front stands for all padding
        rows, padding = F.pad(rows, (0, 0, 1, 0)), 0
        places = torch.where(ids == padding_idx, 0, places + 1)
    return F.embedding_bag(places, rows, offsets, mode=mode, padding_idx=padding)


# ---- tables of codes and tensors -----------------------------------------------------------------------------------


class _Known(NamedTuple):
    """A table that reads codes, and what it was made of."""

    codes: weakref.ref[Tensor]
    decoder: str
    stamp: list[int]
    table: _core.Table
    held: list[Tensor]
    """The decoder's tensors: as long as their memory is theirs, no others have the same stamp."""


_TABLES: dict[int, _Known] = {}
"""By the identity of the codes; gone with them. torch's own dictionary of the kind costs as much as a small lookup."""


def remember(codes: Tensor, tensors: Sequence[Tensor], decoder: str, table: _core.Table) -> None:
    """Let operators on these tensors read the table that they came from, with its checks of the file."""
    key = id(codes)
    gone = weakref.ref(codes, lambda reference: _forget(key, reference))
    _TABLES[key] = _Known(gone, decoder, _stamp(codes, tensors), table, [tensor.detach() for tensor in tensors])


def _forget(key: int, reference: weakref.ref[Tensor]) -> None:
    known = _TABLES.get(key)
    if known is not None and known.codes is reference:
        _TABLES.pop(key, None)  # another thread may have forgotten it meanwhile


def _stamp(codes: Tensor, tensors: Sequence[Tensor]) -> list[int]:
    """Tells whether tensors are those of before, with the values of before."""
    stamp: list[int] = []
    for tensor in (codes, *tensors):
        stamp += tensor.data_ptr(), tensor.numel(), *tensor.stride()
        stamp.append(-1 if tensor.is_inference() else tensor._version)
    return stamp


def _table(codes: Tensor, tensors: Sequence[Tensor], decoder: str) -> _core.Table:
    """The table that reads these codes: the one that they belong to, or one that borrows them."""
    known = _TABLES.get(id(codes))
    if (
        known is not None
        and known.codes() is codes
        and (known.decoder, known.stamp) == (decoder, _stamp(codes, tensors))
    ):
        return known.table
    plan = _plan(decoder)
    values = dict(zip(plan.stored, tensors, strict=False))
    described = json.dumps({"kind": "", "parameters": {}, "decoder": plan.description})
    # A view of the same memory, which keeps no reference to the tensor that is the key.
    read = codes.detach().contiguous().numpy()
    # Tensors that come from a mapped file are zeros where it was cut.
    places = [tensor.data_ptr() for tensor in (codes, *tensors)]
    _core.intact_at(places)
    try:
        module = FORMS[plan.description["form"]](plan.description, values, False)
        table = _core.Table.from_parts(
            described, as_arrays(module.stored_tensors()), read, errors={"relative": math.nan}, borrow=True
        )
    finally:
        _core.intact_at(places)
    remember(codes, tensors, decoder, table)
    return table


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arrays as the compiled core takes them; numpy has no bfloat16, which stands as uint16 there."""
    arrays = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        is_bfloat16 = plain.dtype == torch.bfloat16
        arrays[name] = plain.view(torch.int16).numpy().view("uint16") if is_bfloat16 else plain.numpy()
    return arrays


# ---- the operators -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("vqrs", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_READS = "Tensor codes, Tensor[] tensors, str decoder"
for _schema in (
    f"lookup(Tensor ids, {_READS}, ScalarType dtype, int padding_idx) -> Tensor",
    f"pool(Tensor ids, Tensor offsets, Tensor? per_sample_weights, {_READS}, str mode, ScalarType dtype, "
    "int padding_idx) -> Tensor",
    f"lookup_backward(Tensor grad, Tensor ids, {_READS}, int padding_idx) -> Tensor[]",
    f"pool_backward(Tensor grad, Tensor ids, Tensor offsets, Tensor? per_sample_weights, {_READS}, str mode, "
    "int padding_idx) -> Tensor[]",
):
    _LIBRARY.define(_schema, tags=_TAGS)


def _lookup_cpu(
    ids: Tensor, codes: Tensor, tensors: list[Tensor], decoder: str, dtype: torch.dtype, padding_idx: int
) -> Tensor:
    plan = _plan(decoder)
    if plan.trainable:
        return gather(ids, codes, tensors, decoder).to(dtype)
    return read_rows(_table(codes, tensors, decoder), plan.dim, ids, dtype)


def _lookup_fake(
    ids: Tensor, codes: Tensor, tensors: list[Tensor], decoder: str, dtype: torch.dtype, padding_idx: int
) -> Tensor:
    return ids.new_empty((*ids.shape, _plan(decoder).dim), dtype=dtype)


def _pool_cpu(
    ids: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    codes: Tensor,
    tensors: list[Tensor],
    decoder: str,
    mode: Mode,
    dtype: torch.dtype,
    padding_idx: int,
) -> Tensor:
    plan = _plan(decoder)
    if plan.trainable:
        check_offsets(offsets, len(ids))
        pool = _pool_by(gather)
        return pool(ids, offsets, per_sample_weights, codes, tensors, decoder, mode, dtype, padding_idx)
    if padding_idx >= 0:
        ids, offsets, per_sample_weights = without_padding(ids, offsets, per_sample_weights, padding_idx)
    return read_bags(_table(codes, tensors, decoder), plan.dim, ids, offsets, per_sample_weights, mode, dtype)


def check_offsets(offsets: Tensor, n_ids: int) -> None:
    """Refuse what the core refuses: with some of it torch's own embedding bag reads memory that is not its own."""
    if len(offsets) == 0 and n_ids == 0:
        return
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] > n_ids or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must be numbers from 0, one for each bag, not falling, at most {n_ids}")


def without_padding(
    ids: Tensor, offsets: Tensor, weights: Tensor | None, padding_idx: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, offsets and weights of the same bags with the padding left out."""
    check_offsets(offsets, len(ids))
    kept = ids != padding_idx
    offsets = F.pad(kept.cumsum(0), (1, 0))[offsets]
    return ids[kept], offsets, None if weights is None else weights[kept]


@functools.cache
def _triton() -> Any:
    """The Triton kernels; None where Triton is not installed."""
    try:
        from vqrs.torch import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _gather_cuda(
    ids: Tensor, codes: Tensor, tensors: Sequence[Tensor], decoder: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """As :func:`gather`, but where the form has a Triton kernel, rows of this dtype by that."""
    plan = _plan(decoder)
    if not plan.trainable and _triton() is not None:
        values = dict(zip(plan.stored, tensors, strict=False))
        rows: Tensor | None = _triton().lookup(ids, codes, plan.description, values, dtype)
        if rows is not None:
            return rows
    return gather(ids, codes, tensors, decoder)


def _lookup_cuda(
    ids: Tensor, codes: Tensor, tensors: list[Tensor], decoder: str, dtype: torch.dtype, padding_idx: int
) -> Tensor:
    return _gather_cuda(ids, codes, tensors, decoder, dtype).to(dtype)


def _lookup_gathered(
    ids: Tensor, codes: Tensor, tensors: list[Tensor], decoder: str, dtype: torch.dtype, padding_idx: int
) -> Tensor:
    return gather(ids, codes, tensors, decoder).to(dtype)


def _pool_by(read: Callable[[Tensor, Tensor, list[Tensor], str], Tensor]) -> Callable[..., Tensor]:
    """The operator ``pool`` over what reads rows."""

    def pool(
        ids: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        codes: Tensor,
        tensors: list[Tensor],
        decoder: str,
        mode: str,
        dtype: torch.dtype,
        padding_idx: int,
    ) -> Tensor:
        rows = read(ids, codes, tensors, decoder)
        padding = padding_idx if padding_idx >= 0 else None
        return pool_gathered(rows, ids, offsets, per_sample_weights, mode, padding).to(dtype)

    return pool


def _pool_fake(
    ids: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    codes: Tensor,
    tensors: list[Tensor],
    decoder: str,
    mode: str,
    dtype: torch.dtype,
    padding_idx: int,
) -> Tensor:
    return ids.new_empty((offsets.shape[0], _plan(decoder).dim), dtype=dtype)


def _gradients(grad: Tensor, make: Callable[[list[Tensor]], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of the float tensors among the inputs, and something empty for the others: the gathers' own."""
    leaves = [value.detach().requires_grad_(value.is_floating_point()) for value in inputs]
    if not any(leaf.requires_grad for leaf in leaves):
        return [leaf.new_empty(0) for leaf in leaves]
    with _autograd():
        result = make(leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, grad.to(result.dtype), allow_unused=True))
    made = []
    for leaf in leaves:
        value = next(found) if leaf.requires_grad else leaf.new_empty(0)
        made.append(torch.zeros_like(leaf) if value is None else value)
    return made


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd, also where the operator was called below it, as torch's own checks and modes do."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _lookup_backward(
    grad: Tensor, ids: Tensor, codes: Tensor, tensors: list[Tensor], decoder: str, padding_idx: int
) -> list[Tensor]:
    if padding_idx >= 0:
        grad = grad.masked_fill((ids == padding_idx)[..., None], 0)
    return _gradients(grad, lambda leaves: gather(ids, codes, leaves, decoder), tensors)


def _pool_backward(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    codes: Tensor,
    tensors: list[Tensor],
    decoder: str,
    mode: str,
    padding_idx: int,
) -> list[Tensor]:
    padding = padding_idx if padding_idx >= 0 else None
    weights = [] if per_sample_weights is None else [per_sample_weights]

    def make(leaves: list[Tensor]) -> Tensor:
        rows = gather(ids, codes, leaves[: len(tensors)], decoder)
        return pool_gathered(rows, ids, offsets, leaves[-1] if weights else None, mode, padding)

    return _gradients(grad, make, [*tensors, *weights])


def _backward_fake(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) if t.is_floating_point() else t.new_empty(0) for t in inputs]


def _float_gradients(found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """A gradient for each input, none for integers."""
    return [value if t.is_floating_point() else None for value, t in zip(found, inputs, strict=True)]


def _keep_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, codes, tensors, ctx.decoder, _, ctx.padding_idx = inputs
    ctx.save_for_backward(ids, codes, *tensors)


def _differentiate_lookup(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, codes, *tensors = ctx.saved_tensors
    found = torch.ops.vqrs.lookup_backward(grad, ids, codes, tensors, ctx.decoder, ctx.padding_idx)
    return None, None, _float_gradients(found, tensors), None, None, None


def _keep_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, offsets, weights, codes, tensors, ctx.decoder, ctx.mode, _, ctx.padding_idx = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(ids, offsets, codes, *tensors, *([weights] if ctx.weighted else []))


def _differentiate_pool(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, offsets, codes, *tensors = ctx.saved_tensors
    weights = tensors.pop() if ctx.weighted else None
    found = torch.ops.vqrs.pool_backward(
        grad, ids, offsets, weights, codes, tensors, ctx.decoder, ctx.mode, ctx.padding_idx
    )
    of_weights = found[-1] if ctx.weighted else None
    of_tensors = _float_gradients(found[: len(tensors)], tensors)
    return None, None, of_weights, None, of_tensors, None, None, None, None


_LIBRARY.impl("lookup", _lookup_cpu, "CPU")
_LIBRARY.impl("pool", _pool_cpu, "CPU")
_LIBRARY.impl("lookup", _lookup_cuda, "CUDA")
_LIBRARY.impl("pool", _pool_by(_gather_cuda), "CUDA")
for _device in ("MPS", "XPU"):
    _LIBRARY.impl("lookup", _lookup_gathered, _device)
    _LIBRARY.impl("pool", _pool_by(gather), _device)
_LIBRARY.impl("lookup_backward", _lookup_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("pool_backward", _pool_backward, "CompositeExplicitAutograd")
torch.library.register_fake("vqrs::lookup", _lookup_fake, lib=_LIBRARY)
torch.library.register_fake("vqrs::pool", _pool_fake, lib=_LIBRARY)
torch.library.register_fake("vqrs::lookup_backward", lambda *args: _backward_fake(args[3]), lib=_LIBRARY)
torch.library.register_fake(
    "vqrs::pool_backward",
    lambda *args: _backward_fake([*args[5], *([] if args[3] is None else [args[3]])]),
    lib=_LIBRARY,
)
torch.library.register_autograd("vqrs::lookup", _differentiate_lookup, setup_context=_keep_lookup, lib=_LIBRARY)
torch.library.register_autograd("vqrs::pool", _differentiate_pool, setup_context=_keep_pool, lib=_LIBRARY)
