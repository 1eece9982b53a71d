"""``Embedding`` and ``EmbeddingBag``: torch's own modules over a compressed table."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import vqrs
from vqrs import _core
from vqrs.torch import training
from vqrs.torch.forms import FORMS, Decoder, decoder_from_parts
from vqrs.torch.operators import (
    ID_DTYPES,
    as_arrays,
    check_offsets,
    describe,
    pool_gathered,
    read_bags,
    read_rows,
    remember,
    without_padding,
)
from vqrs.torch.training import Reassignment

__all__ = ["Embedding", "EmbeddingBag"]

Self = TypeVar("Self", bound="_TableModule")
KEPT_PASSES = 32
"""Backward passes whose gradients of rows are kept apart: bounds the memory that they take until ``reassign``."""
BLOCK = 65_536
"""Rows that are decoded at once where all are wanted: bounds the memory that unpacked codes take."""


class _TableModule(nn.Module):
    """A table as a torch module: what ``Embedding`` and ``EmbeddingBag`` share.

    The buffer ``codes`` is the table's memory (or its mapping), the module ``decoder`` the form that reads it. A
    module whose codes are on the CPU never owns a second copy of them.
    """

    codes: Tensor
    decoder: Decoder
    _output: Tensor
    # Plain attributes beside the buffers that say the same: torch finds those ten times more slowly.
    _table: vqrs.Table
    _core: _core.Table
    _core_codes: Tensor
    _reads_core: bool
    _row_dtype: torch.dtype
    _text: str
    _names: list[str]
    _operators: bool = True
    """Whether compiled and exported programs call the operators of vqrs; else they hold torch's own gathers."""
    _TORCHS: ClassVar[tuple[str, ...]] = ()
    """Arguments of torch's own ``from_pretrained`` behind ``freeze``, in its order: all attributes of its module."""
    max_norm: None = None
    scale_grad_by_freq: Literal[False] = False

    def __init__(
        self,
        shape: tuple[int, int],
        table: vqrs.Table | None,
        weight: Tensor | None,
        compression: dict[str, Any],
        *,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        sparse: bool,
        trainable: bool,
        straight_through: bool,
        device: Any,
        dtype: torch.dtype | str | None,
    ) -> None:
        super().__init__()
        _refuse_unsupported(max_norm, scale_grad_by_freq)
        if straight_through and not trainable:
            raise ValueError("straight_through=True needs trainable=True: frozen rows have no gradient to keep")
        if isinstance(dtype, str):
            compression, dtype = compression | {"dtype": dtype}, None
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = _padding_row(padding_idx, self.num_embeddings)
        self.norm_type = norm_type
        self.sparse = sparse
        self.trainable = trainable
        self.straight_through = straight_through
        self._row_gradients: list[tuple[Tensor, Tensor]] = []
        self._codes_shared = True
        self._compression = compression if table is None else None
        if table is None:
            if weight is None:
                weight = nn.Embedding(*shape, self.padding_idx, device="cpu", dtype=dtype).weight
            device, dtype = device or weight.device, dtype or weight.dtype
            if tuple(weight.shape) != shape:
                raise ValueError(f"the weight has shape {tuple(weight.shape)}, expected {shape}")
            table = _compress(weight, compression)
        elif compression:
            raise TypeError(f"a table is there already, it takes no {', '.join(sorted(compression))}")
        # Empty: its dtype is the output's, and follows .half(), .to() and .double() as parameters do.
        output = torch.empty(0, dtype=dtype or torch.get_default_dtype(), device="cpu")
        self.register_buffer("_output", output, persistent=False)
        self._adopt(table)
        self.to(device)

    # ---- where it comes from -----------------------------------------------------------------------------------

    @classmethod
    def from_table(
        cls: type[Self],
        table: vqrs.Table | str | os.PathLike[str],
        *,
        mmap: bool = True,
        trainable: bool = False,
        freeze: bool | None = None,
        verify: Literal["header", "lazy", "full"] = "header",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> Self:
        """Make the module of a table, or of a table's file.

        Parameters
        ----------
        table : Table or path
            A table keeps its bytes where they are: the module shares them. Closing the table ends the module.
        mmap : bool, default=True
            Whether a file is mapped (``vqrs.open``'s ``mode="mmap"``) or read into memory (``mode="read"``).
        trainable : bool, default=False
            Whether codebooks, scales and offsets become parameters.
        freeze : bool, optional
            Torch's name for ``not trainable``.
        verify : {"header", "lazy", "full"}, default="header"
            What to check of a file, as in ``vqrs.open``.
        device : optional
            Where codes and decoder go. The CPU by default, where codes are not copied.
        dtype : torch.dtype, optional
            Of the rows that ``forward`` returns. Torch's default dtype by default.
        **arguments
            Of the module itself: ``padding_idx``, and for bags ``mode`` and ``include_last_offset``.

        Returns
        -------
        The module

        Raises
        ------
        ValueError
            If an argument is not supported, or ``trainable`` is asked of a table with nothing to train.
        TableError
            If the file is not a sound table.
        """
        if not isinstance(table, vqrs.Table):
            table = vqrs.open(table, verify=verify, mode="mmap" if mmap else "read")
        trainable = _trainable(trainable, freeze)
        make: Any = cls  # the arguments are those of the child
        return make(*table.shape, trainable=trainable, device=device, dtype=dtype, _table=table, **arguments)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        embeddings: Any,
        freeze: bool | None = None,
        *torchs: Any,
        trainable: bool = False,
        **arguments: Any,
    ) -> Self:
        """Compress a weight, or a module of torch.

        Parameters
        ----------
        embeddings : tensor or array of shape (n, d) and any float dtype, torch.nn.Embedding or torch.nn.EmbeddingBag
            The weight, or the module that has it. Of a module, ``padding_idx``, ``sparse`` (and for bags ``mode`` and
            ``include_last_offset``) are taken over unless given. The result is on the weight's device and returns rows
            of its dtype, unless ``device`` and ``dtype`` are given.
        freeze : bool, optional
            Torch's name for ``not trainable``.
        *torchs
            Further arguments in the order of torch's own ``from_pretrained``.
        trainable : bool, default=False
            Whether codebooks, scales and offsets become parameters.
        **arguments
            How to compress, as in ``vqrs.compress`` (``ratio=``, ``nbytes=``, ``max_error=``, ``method=`` and its
            parameters), and arguments of the module itself.

        Returns
        -------
        The module

        Raises
        ------
        ValueError
            If an argument (or what the module was made with) is not supported.

        Examples
        --------
        >>> import torch, vqrs.torch
        >>> pretrained = torch.nn.Embedding(300, 16, padding_idx=0)
        >>> small = vqrs.torch.Embedding.from_pretrained(pretrained, method="scalar", dtype="int8")
        >>> small(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])
        >>> small.padding_idx
        0
        """
        trainable = _trainable(trainable, freeze)
        if len(torchs) > len(cls._TORCHS):
            raise TypeError(f"from_pretrained takes at most {2 + len(cls._TORCHS)} arguments by position, as torch's")
        positional = dict(zip(cls._TORCHS, torchs, strict=False))
        if twice := positional.keys() & arguments.keys():
            raise TypeError(f"from_pretrained got {', '.join(sorted(twice))} both by position and by name")
        arguments |= positional
        if isinstance(embeddings, nn.Module):
            # How gradients are scaled is of no concern to rows that have none.
            names = set(cls._TORCHS) - (set() if trainable else {"scale_grad_by_freq"})
            arguments = {name: getattr(embeddings, name) for name in names if hasattr(embeddings, name)} | arguments
            embeddings = embeddings.weight
        weight = torch.as_tensor(embeddings)
        if weight.dim() != 2:
            raise ValueError(f"a weight must have two dimensions, rows and columns, not shape {tuple(weight.shape)}")
        make: Any = cls
        return make(*weight.shape, trainable=trainable, _weight=weight, **arguments)

    # ---- what it holds -----------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """All rows, decoded: a tensor of shape (n, d). Made anew at every read; differentiable if trainable."""
        if self._reads_core and self._buffers["codes"] is self._core_codes and _is_eager(self.codes):
            return read_rows(self._core, self.embedding_dim, torch.arange(self.num_embeddings), self._row_dtype)
        blocks = torch.arange(self.num_embeddings, device=self.codes.device).split(BLOCK)
        return torch.cat([self._gather(block).to(self.dtype) for block in blocks])

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that the module returns. ``.half()``, ``.to(dtype)`` and ``.double()`` change it."""
        return self._output.dtype

    def to_table(self) -> vqrs.Table:
        """The table of the present values.

        Returns
        -------
        Table
            Frozen: the table inside. Trainable: a new one with the trained values, rounded to the types that the table
            stores; its ``relative_error`` is NaN, since the rows are meant to differ from those that were compressed.
            Names and metadata are kept.

        Raises
        ------
        ValueError
            If a trained value is not finite or cannot be stored.
        """
        self._codes_shared = True  # with who gets the table
        if not self.trainable:
            return self._table
        core = self._table._core
        try:
            old_codes = _as_tensor(core.codes())
            tensors, codes = self.decoder.stored_values(old_codes)
            if codes is not old_codes:
                core = _core.Table.from_parts(
                    core.info(),
                    core.tensors(),
                    codes.numpy(),
                    errors={"relative": math.nan},
                    names=core.names(),
                    metadata=core.metadata,
                )
            core = core.with_tensors(as_arrays(tensors)) if tensors else core
        finally:
            self._notice_cuts()  # the cause of other errors, whose place its own takes
        return vqrs.Table(core)

    def extra_repr(self) -> str:
        """Rows, columns, kind, bytes and ratio: what printing the module shows."""
        table = self._table
        text = f"{self.num_embeddings}, {self.embedding_dim}, kind={table.kind}, nbytes={table.nbytes}"
        text += f", ratio={table.ratio:.2f}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        for name in ("sparse", "trainable", "straight_through"):
            if getattr(self, name):
                text += f", {name}=True"
        return text

    # ---- reading -----------------------------------------------------------------------------------------------

    def _calls_operators(self) -> bool:
        """Whether rows come from the operators: in programs traced for the CPU, and on CUDA devices in eager use.

        In programs for other devices, and for trainable values, torch's own gathers are fused into what stands around.
        """
        if self.trainable or not self._operators or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return False
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return self._reads_core if traced else self.codes.is_cuda

    def _reads(self) -> tuple[Tensor, list[Tensor], str]:
        """What the operators read: codes, the decoder's tensors, and the text that describes them."""
        held = {**dict(self.decoder.named_parameters()), **dict(self.decoder.named_buffers())}
        return self.codes, [held[name] for name in self._names], self._text

    def _gather(self, ids: Tensor) -> Tensor:
        """Rows of one-dimensional ids, by torch's own operators."""
        self._notice_cuts()
        rows = self.decoder(F.embedding(ids, self.codes) if self.decoder.rows_apart else self.codes, ids)
        self._notice_cuts()
        self._keep_gradient(ids, rows)
        if self.padding_idx is None or not self.trainable:
            return rows
        return torch.where((ids == self.padding_idx)[:, None], rows.detach(), rows)

    def _notice_cuts(self) -> None:
        """Before and after torch itself reads the codes: a mapped file that was cut is an error, not the end of the
        process and not zeros. Programs that are traced cannot be told.
        """
        if self.codes.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self._core.intact()

    def _check_ids(self, ids: Tensor) -> None:
        """Refuse the ids that torch's own modules refuse."""
        if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES:
            found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids must be a tensor of int32 or int64, not {found}")
        if not _is_eager(ids) or ids.numel() == 0:  # another device checks by itself, without a wait for it
            return
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= self.num_embeddings:
            flat = ids.reshape(-1)
            position = int(((flat < 0) | (flat >= self.num_embeddings)).nonzero()[0])
            raise IndexError(
                f"id {int(flat[position])} at position {position} is out of range for a table of "
                f"{self.num_embeddings} rows (negative ids are refused, as torch does)"
            )

    # ---- training ----------------------------------------------------------------------------------------------

    def _keep_gradient(self, ids: Tensor, rows: Tensor) -> None:
        """With ``straight_through``, note what reaches these rows in the backward pass."""
        if not (self.straight_through and rows.requires_grad):
            return

        def keep(gradient: Tensor) -> None:
            self._row_gradients.append((ids.detach(), gradient.detach()))
            if len(self._row_gradients) > KEPT_PASSES:
                self._row_gradients[:] = [self.row_gradients()]

        rows.register_hook(keep)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of parameters, and those of rows that ``straight_through`` keeps."""
        super().zero_grad(set_to_none)
        self._row_gradients.clear()

    def row_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of rows since the last ``reassign`` or ``zero_grad``, as ``straight_through=True`` keeps them.

        They add up over steps: ``zero_grad`` of an optimizer, or of a model around this module, leaves them.

        Returns
        -------
        ids : int64 tensor of shape (m,)
            Rows that were looked up, rising, each once. The padding row is not among them.
        gradients : tensor of shape (m, d)
            Of the loss by the row that ``forward`` gave, summed over all its places.
        """
        if not self._row_gradients:
            return self.codes.new_empty(0, dtype=torch.int64), self._output.new_empty(0, self.embedding_dim)
        ids = torch.cat([ids.reshape(-1).long() for ids, _ in self._row_gradients])
        gradients = torch.cat([gradient for _, gradient in self._row_gradients])
        kept, place = torch.unique(ids, return_inverse=True)
        total = gradients.new_zeros(len(kept), self.embedding_dim).index_add_(0, place, gradients)
        if self.padding_idx is not None:
            kept, total = kept[kept != self.padding_idx], total[kept != self.padding_idx]
        return kept, total

    def reassign(
        self,
        ids: Tensor | None = None,
        target: Tensor | None = None,
        *,
        learning_rate: float | None = None,
        n_jobs: int | None = None,
    ) -> Reassignment:
        """Choose the codes of rows anew, for the present codebooks and scales.

        Training moves codebooks; which entries a row picks stays as it was when the table was made. This chooses again,
        by the quantizer that made the table, and takes the new code of a row where it is nearer to the target and
        leaves the old one otherwise, so that no row moves away. Scales and values that live in a row are chosen with
        its code. Parameters stay the objects that optimizers hold.

        Parameters
        ----------
        ids : integer tensor of shape (m,), optional
            Rows to choose for, each once. All rows by default; with ``learning_rate``, those that have a gradient.
        target : float tensor of shape (m, d), optional
            What the rows should be: rows of an uncompressed table, for example.
        learning_rate : float, optional
            Instead of ``target``, for modules with ``straight_through=True``: the target is the present row less
            ``learning_rate`` times its gradient, which is the straight-through estimator [1]_. The gradients are
            forgotten thereafter. One step must be long enough to reach another entry: the codes are all that remembers.
        n_jobs : int, optional
            Threads. The result does not depend on them.

        Returns
        -------
        Reassignment
            How many rows were chosen for and changed, and the error before and after.

        Raises
        ------
        ValueError
            If the targets do not fit, are not finite, or there are none, or the table is one of groups of rows
            (``MixedPrecisionQuantizer``), which has no encoder of its own.
        IndexError
            If an id is out of range.

        Notes
        -----
        A table's file is never written: the first change makes a copy of the codes in memory, which the module then
        owns. ``state_dict``, ``to_table`` and lookups see the new codes, as do modules of one weight that ``compress_``
        has given one table; tables that were made before do not change.

        References
        ----------
        .. [1] Y. Bengio, N. Léonard, A. Courville. Estimating or propagating gradients through stochastic neurons for
           conditional computation, 2013. arXiv:1308.3432.

        Examples
        --------
        >>> import torch, vqrs.torch
        >>> weight = torch.linspace(-1, 1, 64).reshape(16, 4)
        >>> embedding = vqrs.torch.Embedding.from_pretrained(
        ...     weight, method="product", n_subvectors=2, n_bits=3, trainable=True, random_state=0
        ... )
        >>> outcome = embedding.reassign(target=weight.flip(0))
        >>> outcome.n_rows, outcome.n_changed, outcome.error_after < outcome.error_before
        (16, 16, True)
        """
        if (target is None) == (learning_rate is None):
            raise ValueError(
                "reassign needs either target=, what the rows should be, or learning_rate=, the step along the "
                "gradients that straight_through=True keeps"
            )
        if not self.decoder.rows_apart:
            raise ValueError(
                f"reassign cannot encode a table of kind {self._table.kind!r}, whose groups of rows have a quantizer "
                "each: make a table of one kind, or compress the new rows"
            )
        if all(self._table.kind != kind["name"] for kind in _core.kinds()):
            raise ValueError(f"reassign cannot encode a table of kind {self._table.kind!r}: no quantizer made it")
        if learning_rate is not None:
            ids, target = self._step(ids, learning_rate)
        ids = torch.arange(self.num_embeddings) if ids is None else ids.detach().cpu().long()
        assert target is not None
        self._check_targets(ids, target)
        target = target.detach().cpu()
        if not bool(target.isfinite().all()):
            raise ValueError("the target has NaN or infinity")
        tensors = {name: tensor.cpu() for name, tensor in self.decoder.stored_tensors().items()}
        codec = _core.Codec.from_parts(self._table._core.info(), as_arrays(tensors))
        origin = self.__dict__.get("_origin")
        tied = [one for one in origin.modules if one is not self and one._core is self._core] if origin else []
        outcome = training.reassign(self, codec, ids, target, n_jobs)
        self._row_gradients.clear()
        self._table = vqrs.Table(self._core)  # another object: who keeps decoded rows makes them anew
        for one in tied:
            one._adopt(self._table, self.decoder if self.trainable and one.trainable else None)
        return outcome

    def _step(self, ids: Tensor | None, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Rows that have a gradient, all or those among the ids, and where a step along it leads."""
        if not self.straight_through:
            raise ValueError("learning_rate= needs a module with straight_through=True, which keeps gradients of rows")
        found, gradients = self.row_gradients()
        if ids is not None:
            wanted = torch.isin(found, ids.to(found.device))
            found, gradients = found[wanted], gradients[wanted]
        with torch.no_grad():
            return found, self._gather(found) - learning_rate * gradients

    def _check_targets(self, ids: Tensor, target: Tensor) -> None:
        if ids.dim() != 1:
            raise ValueError(f"ids to reassign must have one dimension, not {ids.dim()}")
        self._check_ids(ids)
        if len(torch.unique(ids)) < len(ids):
            raise ValueError("an id is given twice: each row can have one target")
        expected = len(ids), self.embedding_dim
        if tuple(target.shape) != expected or not target.is_floating_point():
            raise ValueError(f"the target has shape {tuple(target.shape)} and {target.dtype}, not {expected} of floats")

    def _own_codes(self) -> Tensor:
        """Codes that nobody else reads, made on first use: uint8 (n, row_bytes) on the CPU, the table's own memory."""
        if self._codes_shared:
            core = self._table._core
            core = _core.Table.from_parts(
                core.info(),
                core.tensors(),
                core.codes(),
                errors={"relative": math.nan},
                names=core.names(),
                metadata=core.metadata,
            )
            self._notice_cuts()
            self._adopt(vqrs.Table(core), self.decoder)
            self._codes_shared = False
        return _as_tensor(self._table.codes)

    # ---- states ------------------------------------------------------------------------------------------------

    def _adopt(self, table: vqrs.Table, decoder: Decoder | None = None) -> None:
        """Read from this table from now on, by its decoder or the given one."""
        codes = _as_tensor(table.codes)
        if decoder is None:
            tensors = {name: _as_tensor(array) for name, array in table._core.tensors().items()}
            decoder = decoder_from_parts(table.info()["decoder"], tensors, codes, self.trainable)
        if "decoder" in self._modules:
            _keep_parameters(self.decoder, decoder)
        for module in decoder.modules():
            if isinstance(module, Decoder):
                module.sparse = self.sparse
        device = self._output.device
        self._table = table
        self._codes_shared = True
        self.register_buffer("codes", codes.to(device))
        self.decoder = decoder.to(device)
        self._take_note()

    def _take_note(self) -> None:
        """Keep plain copies of what every call asks."""
        self._core = self._table._core
        self._core_codes = self.codes
        self._reads_core = not self.trainable and self.codes.is_cpu
        self._row_dtype = self._output.dtype
        self._text, self._names = describe(self._table.info()["decoder"], self.decoder)
        self._core.intact()  # what was copied to another device was whole
        if self._reads_core:
            codes, tensors, text = self._reads()
            remember(codes, tensors, text, self._core)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _TableModule:
        super()._apply(fn, recurse)
        if self.codes.is_cpu:
            self.codes = _as_tensor(self._table.codes)  # back from another device: the table's memory, not a copy
        self._take_note()
        return self

    def get_extra_state(self) -> Tensor:
        """What ``state_dict`` holds beside codes and decoder: JSON text that says how to read them, as uint8."""
        info = self._table.info()
        state = {
            **{key: info[key] for key in ("kind", "parameters", "decoder")},
            "errors": info["errors"],
            "trainable": self.trainable,
        }
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a state of this class (of any kind, frozen or trained), or the weight of a plain torch module."""
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            if "codes" in own and "_extra_state" in own:
                self._load_codes(own)
                unexpected_keys.extend(
                    prefix + key for key in own if not re.match(r"(codes|_extra_state)$|decoder\.", key)
                )
            elif "weight" in own:
                self._load_weight(own["weight"])
            else:
                expected = ["codes", "_extra_state", *(f"decoder.{name}" for name in self.decoder.state_dict())]
                missing_keys.extend(prefix + key for key in expected if key not in own)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: the state cannot be loaded: {error}")

    def _load_codes(self, state: dict[str, Tensor]) -> None:
        """Become the table of a state: the same rows, whatever the kind and size of either."""
        described = json.loads(state["_extra_state"].cpu().numpy().tobytes())
        description, codes = described["decoder"], state["codes"].detach().cpu()
        self._check_shape((len(codes), description["dim"]))
        names = [key for key in state if key.startswith("decoder.")]
        tensors = {name.removeprefix("decoder."): state[name].detach().cpu().clone() for name in names}
        decoder = FORMS[description["form"]](description, tensors, described["trainable"])
        stored, codes = decoder.stored_values(codes)
        arrays = as_arrays(stored)
        core = _core.Table.from_parts(
            json.dumps(described), arrays, codes.contiguous().numpy(), errors=described["errors"]
        )
        exact = decoder if self.trainable and described["trainable"] else None  # what a table would round
        self._adopt(vqrs.Table(core), exact)

    def _load_weight(self, weight: Tensor) -> None:
        """Compress the weight of a plain torch module as this module's own was."""
        if self._compression is None:
            raise ValueError(
                "the state holds a plain weight and this module was made from a table, so that it cannot tell how to "
                "compress: load the weight into a torch module and use from_pretrained"
            )
        self._check_shape(tuple(weight.shape))
        self._adopt(_compress(weight, self._compression))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        expected = (self.num_embeddings, self.embedding_dim)
        if shape != expected:
            raise ValueError(f"the state holds a table of shape {shape}, this module one of shape {expected}")

    def __getstate__(self) -> dict[str, Any]:
        """All but the codes: they come back with the table, which a file's table reopens by its path."""
        buffers = {name: buffer for name, buffer in self._buffers.items() if name != "codes"}
        state = {name: value for name, value in self.__dict__.items() if name not in ("_core", "_core_codes")}
        return state | {"_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.register_buffer("codes", _as_tensor(self._table.codes).to(self._output.device))
        self._take_note()


class Embedding(_TableModule):
    """Compressed rows by their ids: takes the place of ``torch.nn.Embedding``.

    Without a table it compresses what ``torch.nn.Embedding`` would start from: the weight that torch's generator draws,
    or ``_weight``. Mostly one of the class methods :meth:`from_table` and :meth:`from_pretrained` is what you want.

    Parameters
    ----------
    num_embeddings : int
        Rows.
    embedding_dim : int
        Columns.
    padding_idx : int, optional
        A row that gets no gradient. It returns what the table holds, which for a row of zeros need not be zeros.
    max_norm, scale_grad_by_freq
        Torch's arguments, refused unless at their defaults: rows share their codebooks, so that none can be scaled
        or trained on its own.
    norm_type : float, default=2.0
        Of ``max_norm``, and without effect like it.
    sparse : bool, default=False
        Whether codebooks, and scales and values that rows train of their own, get sparse gradients, for
        ``torch.optim.SparseAdam``, ``SGD`` and ``Adagrad``. What all rows share (a mean, a rotation, the scales of
        columns) keeps dense ones. Without effect on a frozen module.
    _weight : tensor of shape (num_embeddings, embedding_dim), optional
        What to compress.
    _freeze : bool, optional
        Torch's name for ``not trainable``.
    device : optional
        Where codes and decoder go.
    dtype : torch.dtype, optional
        Of the rows that ``forward`` returns; ``.half()`` and its kind change it. Decoding is done in float32. Text,
        such as ``"int8"``, is no dtype of torch's: it is the parameter of ``method="scalar"``.
    trainable : bool, default=False
        Whether codebooks, scales and offsets are parameters (float32, in the units of the rows). Frozen, the module has
        no parameters, and on the CPU the compiled core looks up.
    straight_through : bool, default=False
        Whether a trainable module keeps the gradients of the rows that it returns, for :meth:`reassign`.
    **compression
        As in ``vqrs.compress``: ``ratio=``, ``nbytes=``, ``max_error=``, ``method=`` and its parameters.

    Attributes
    ----------
    weight : tensor of shape (n, d)
        All rows, decoded at every read.
    codes : uint8 tensor of shape (n, row_bytes)
        The table's own memory, or the mapping of its file.
    decoder : torch.nn.Module
        Codebooks, scales and offsets.

    Notes
    -----
    ``state_dict`` holds codes, decoder and how to read them; it loads into any module of the same shape, whatever its
    kind. A trained state that is loaded into a frozen module is rounded as ``to_table`` does. The ``state_dict`` of
    a ``torch.nn.Embedding`` is compressed as the module's own weight was, which takes as long as it did. Row names and
    metadata are not part of a state. Copies and pickles of a module whose table is a file reopen that file.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> embedding = vqrs.torch.Embedding(500, 16, method="product", n_subvectors=4, n_bits=4, trainable=True)
    >>> rows = embedding(torch.tensor([[1, 2], [3, 499]]))
    >>> rows.shape
    torch.Size([2, 2, 16])
    >>> rows.sum().backward()
    >>> embedding.decoder.codebooks_0.grad.shape
    torch.Size([4, 16, 4])
    """

    _TORCHS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | str | None = None,
        *,
        trainable: bool = False,
        straight_through: bool = False,
        _table: vqrs.Table | None = None,
        **compression: Any,
    ) -> None:
        super().__init__(
            (num_embeddings, embedding_dim),
            _table,
            _weight,
            compression,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            trainable=_trainable(trainable, _freeze),
            straight_through=straight_through,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Look rows up.

        Parameters
        ----------
        input : int32 or int64 tensor of any shape
            Ids, from 0 to ``num_embeddings - 1``.
        out : contiguous CPU tensor of shape (*input.shape, embedding_dim), optional
            Filled and returned, in its own dtype: float32, float16 or bfloat16. From about 32 MiB on, memory that is
            used again saves more time than the lookup takes. For frozen modules on the CPU.

        Returns
        -------
        Tensor of shape (*input.shape, embedding_dim) and dtype ``self.dtype``

        Raises
        ------
        IndexError
            If an id is negative or beyond the last row. On other devices it is torch that finds out.
        TypeError
            If ids are neither int32 nor int64.
        ValueError
            If ``out`` cannot be filled.
        """
        if self._reads_core and self._buffers["codes"] is self._core_codes and _is_eager(input):
            return read_rows(self._core, self.embedding_dim, input, self._row_dtype, out, self._core_codes)
        _refuse_out(out)
        self._check_ids(input)
        if self._calls_operators():
            rows: Tensor = torch.ops.vqrs.lookup(input, *self._reads(), self.dtype, -1)
            return rows
        return self._gather(input.reshape(-1)).to(self.dtype).reshape(*input.shape, self.embedding_dim)


class EmbeddingBag(_TableModule):
    """Sums, means or maxima of bags of compressed rows: takes the place of ``torch.nn.EmbeddingBag``.

    Parameters are those of :class:`Embedding`, in the order of torch's own, and:

    Parameters
    ----------
    mode : {"mean", "sum", "max"}, default="mean"
        What is made of the rows of a bag.
    include_last_offset : bool, default=False
        Whether ``offsets`` has one more entry, the end of the last bag: the number of ids.
    padding_idx : int, optional
        An id that bags leave out.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> bag = vqrs.torch.EmbeddingBag.from_pretrained(torch.eye(4), method="scalar", dtype="float16", mode="sum")
    >>> bag(torch.tensor([0, 1, 3]), torch.tensor([0, 2]))
    tensor([[1., 1., 0., 0.],
            [0., 0., 0., 1.]])
    """

    _TORCHS = (
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "include_last_offset",
        "padding_idx",
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Literal["sum", "mean", "max"] = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | str | None = None,
        *,
        trainable: bool = False,
        straight_through: bool = False,
        _table: vqrs.Table | None = None,
        **compression: Any,
    ) -> None:
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode={mode!r} is not allowed: must be 'sum', 'mean' or 'max'")
        super().__init__(
            (num_embeddings, embedding_dim),
            _table,
            _weight,
            compression,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            trainable=trainable,
            straight_through=straight_through,
            device=device,
            dtype=dtype,
        )
        self.mode: Literal["sum", "mean", "max"] = mode
        self.include_last_offset = include_last_offset

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Pool rows.

        Parameters
        ----------
        input : int32 or int64 tensor of shape (n_bags, n_ids_of_a_bag) or (n_ids,)
            Ids. Two-dimensional: each row is a bag.
        offsets : integer tensor of shape (n_bags,), or (n_bags + 1,) with ``include_last_offset``
            Where each bag begins in one-dimensional ids: from 0, never falling.
        per_sample_weights : float tensor of the shape of input, optional
            Factor of each row; of ``mode="sum"`` alone. It gets a gradient where it requires one.
        out : contiguous CPU tensor of shape (n_bags, embedding_dim), optional
            As in :meth:`Embedding.forward`.

        Returns
        -------
        Tensor of shape (n_bags, embedding_dim) and dtype ``self.dtype``; zeros for an empty bag

        Raises
        ------
        IndexError
            If an id is negative or beyond the last row.
        ValueError
            If offsets or weights do not fit the ids, or ``out`` cannot be filled.
        TypeError
            If ids or offsets are neither int32 nor int64.
        """
        eager = self._reads_core and self._buffers["codes"] is self._core_codes and _is_eager(input)
        if eager and input.dim() == 2 and offsets is None and per_sample_weights is None and self.padding_idx is None:
            bags = self._core, self.embedding_dim, input, None, None
            return read_bags(*bags, self.mode, self._row_dtype, out, self._core_codes)
        if not eager or self.padding_idx is not None or input.dtype not in ID_DTYPES:
            self._check_ids(input)  # else the core looks at them, in the same pass
        offsets = self._bag_offsets(input, offsets)
        ids, weights = input.reshape(-1), self._flat_weights(input, per_sample_weights)
        differentiable = weights is not None and weights.requires_grad and torch.is_grad_enabled()
        if eager and not differentiable:
            if self.padding_idx is not None:
                ids, offsets, weights = without_padding(ids, offsets, weights, self.padding_idx)
            bags = self._core, self.embedding_dim, ids, offsets, weights
            return read_bags(*bags, self.mode, self._row_dtype, out, self._core_codes)
        _refuse_out(out)
        if eager or self._calls_operators():
            codes, tensors, text = self._reads()
            padding = -1 if self.padding_idx is None else self.padding_idx
            pooled: Tensor = torch.ops.vqrs.pool(
                ids, offsets, weights, codes, tensors, text, self.mode, self.dtype, padding
            )
            return pooled
        if _is_eager(ids) and _is_eager(offsets):
            check_offsets(offsets, len(ids))
        rows = self._gather(ids)
        return pool_gathered(rows, ids, offsets, weights, self.mode, self.padding_idx).to(self.dtype)

    def _bag_offsets(self, ids: Tensor, offsets: Tensor | None) -> Tensor:
        if ids.dim() == 2:
            if offsets is not None:
                raise ValueError(
                    "offsets cannot be given with two-dimensional ids: each of their rows is a bag already"
                )
            n_bags, n_ids = ids.shape
            return torch.arange(0, n_bags * n_ids, n_ids, device=ids.device) if n_ids else ids.new_zeros(n_bags).long()
        if ids.dim() != 1:
            raise ValueError(f"ids of bags must have one or two dimensions, not {ids.dim()}")
        if offsets is None or offsets.dim() != 1:
            raise ValueError("one-dimensional ids need one-dimensional offsets, which say where each bag begins")
        if offsets.dtype not in ID_DTYPES:
            raise TypeError(f"offsets must be a tensor of int32 or int64, not {offsets.dtype}")
        if not self.include_last_offset:
            return offsets.long()
        if _is_eager(offsets) and (len(offsets) == 0 or offsets[-1] != len(ids)):
            raise ValueError(f"with include_last_offset the last offset must be {len(ids)}, the number of ids")
        return offsets[:-1].long()

    def _flat_weights(self, ids: Tensor, weights: Tensor | None) -> Tensor | None:
        if weights is None:
            return None
        if self.mode != "sum":
            raise ValueError(f"per_sample_weights need mode='sum', this module has mode={self.mode!r}")
        if weights.shape != ids.shape:
            raise ValueError(f"per_sample_weights have shape {tuple(weights.shape)}, the ids {tuple(ids.shape)}")
        return weights.reshape(-1)

    def extra_repr(self) -> str:
        """Rows, columns, mode, kind, bytes and ratio: what printing the module shows."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


def _keep_parameters(old: Decoder, new: Decoder) -> None:
    """Move new values into the old parameters where all have the same shapes: optimizers hold those."""
    held, values = dict(old.named_parameters()), dict(new.named_parameters())
    if {name: value.shape for name, value in held.items()} == {name: value.shape for name, value in values.items()}:
        for name, parameter in held.items():
            with torch.no_grad():
                parameter.copy_(values[name])
            holder, _, own = name.rpartition(".")
            setattr(new.get_submodule(holder), own, parameter)


def _is_eager(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read here and now: on the CPU, and no mode of torch's is to see the call."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.is_cpu
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def _refuse_out(out: Tensor | None) -> None:
    if out is not None:
        raise ValueError("out= is for frozen modules whose codes and ids are on the CPU, outside of compiled programs")


def _compress(weight: Tensor, compression: Mapping[str, Any]) -> vqrs.Table:
    if not weight.is_floating_point():
        raise TypeError(f"a weight must be of a float dtype, not {weight.dtype}")
    return vqrs.compress(weight.detach().cpu(), **compression)


def _trainable(trainable: bool, freeze: bool | None) -> bool:
    if trainable and freeze:
        raise ValueError("freeze=True and trainable=True contradict each other: give one of them")
    return trainable if freeze is None else not freeze


def _padding_row(padding_idx: int | None, n_rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -n_rows <= padding_idx < n_rows:
        raise ValueError(f"padding_idx={padding_idx} is not allowed: the table has {n_rows} rows")
    return padding_idx % n_rows


def _refuse_unsupported(max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None:
        raise ValueError(
            f"max_norm={max_norm} is not supported, rows share their codebooks: scale the weight, then compress it"
        )
    if scale_grad_by_freq:
        raise ValueError("scale_grad_by_freq=True is not supported: weight the loss of each sample instead")


def _as_tensor(array: NDArray[Any]) -> Tensor:
    """The same memory as a tensor; numpy has no bfloat16, which stands as uint16 there."""
    if array.size == 0:  # at the address of what follows in the file, which torch.save takes for the same storage
        array = array.copy()
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
