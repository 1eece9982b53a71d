"""Folders of models with compressed tables, as transformers and sentence-transformers keep them.

A table stays a file of its own beside ``config.json``, from which it is mapped. The config says where: under
``quantization_config``, so that transformers' own ``from_pretrained`` reads the folder once it was told of vqrs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import vqrs
from vqrs.torch.embedding import Embedding, EmbeddingBag, _TableModule
from vqrs.torch.model import (
    _exchange,
    _Origin,
    _survey,
    _take_over,
    _tell_transformers,
    compressed_modules,
)
from vqrs.torch.tied import ScaledEmbedding, TiedLinear

__all__ = ["from_pretrained", "load_state_dict_", "register_with_transformers", "save_pretrained"]

M = TypeVar("M", bound=nn.Module)

METHOD = "vqrs"
"""Our name under ``quantization_config``."""

SUFFIX = ".vqrs.safetensors"
"""What the names of table files end in."""

INDEX = "vqrs.json"
"""Where the tables of a model that is not of transformers are described."""

WEIGHTS = "model.safetensors"

CLASSES: dict[str, Any] = {"Embedding": Embedding, "EmbeddingBag": EmbeddingBag, "ScaledEmbedding": ScaledEmbedding}


# ---- the doors -----------------------------------------------------------------------------------------------------


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **arguments: Any) -> None:
    """Save a model with compressed tables to a folder: each table in a file of its own, from which it is mapped.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers or sentence-transformers, saved by its own ``save_pretrained``, or any other module,
        whose ``state_dict`` goes to ``model.safetensors`` and whose tables are described in ``vqrs.json``.
    folder : path-like
        Where to; made if it is not there. A table's file has the name of its module, as in
        ``embeddings.word_embeddings.vqrs.safetensors``.
    **arguments
        Of the model's own ``save_pretrained``.

    Raises
    ------
    ValueError
        The model has no compressed module, or one in a part that is saved in a way of its own.
    ImportError
        transformers is older than version 5; safetensors is missing.

    Notes
    -----
    The folder is a normal one for a model hub: ``huggingface_hub.upload_folder(folder_path=…, repo_id=…)``. A trainable
    table is rounded to the types that its file stores, as ``to_table`` does.

    See Also
    --------
    from_pretrained : Loads the folder.

    Examples
    --------
    >>> import tempfile, torch, vqrs.torch
    >>> def new():
    ...     return torch.nn.Sequential(torch.nn.Embedding(5000, 16), torch.nn.Linear(16, 2))
    >>> model = new()
    >>> report = vqrs.torch.compress_(model, method="scalar", dtype="int8")
    >>> folder = tempfile.mkdtemp()
    >>> vqrs.torch.save_pretrained(model, folder)
    >>> again = vqrs.torch.from_pretrained(folder, model=new())
    >>> ids = torch.tensor([[3, 1, 4]])
    >>> torch.equal(again(ids), model(ids)), again[0].to_table().path.endswith("0.vqrs.safetensors")
    (True, True)
    """
    if not any(True for _ in compressed_modules(model)):
        raise ValueError("the model has no compressed embedding: call compress_ first, or the model's own saving")
    inner = _transformers_models(model)
    if not hasattr(model, "save_pretrained"):
        if inner:
            raise ValueError(f"save the model of transformers inside by itself: {', '.join(inner)}")
        _save_plain(model, Path(folder), **arguments)
        return
    with contextlib.ExitStack() as stack:
        if inner:
            register_with_transformers()
        for part in inner.values():
            stack.enter_context(_tables_beside(part))
        for part in _saved_parts(model, inner):
            stack.enter_context(_tables_beside_part(part))
        saving: Any = model
        saving.save_pretrained(os.fspath(folder), **arguments)


def from_pretrained(
    folder: str | os.PathLike[str],
    *arguments: Any,
    model: nn.Module | None = None,
    model_class: Any = None,
    **keywords: Any,
) -> Any:
    """Load a folder of :func:`save_pretrained`; its tables are mapped, not read.

    Parameters
    ----------
    folder : path-like or str
        The folder, or a name on a model hub, which huggingface_hub downloads first.
    *arguments, **keywords
        Of the ``from_pretrained`` of transformers, or of ``SentenceTransformer``.
    model : torch.nn.Module, optional
        For models of other libraries: a new model of the same structure, not compressed, that is filled in place.
    model_class : class, optional
        Of transformers, such as ``AutoModel``. By default that which was saved.

    Returns
    -------
    torch.nn.Module
        A model of transformers, a ``SentenceTransformer``, or ``model``.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or no model in it.
    TypeError
        A model of another library without ``model=``.
    TableError
        A table is damaged.

    Examples
    --------
    >>> import tempfile, torch, vqrs.torch
    >>> model, folder = torch.nn.Sequential(torch.nn.EmbeddingBag(5000, 16)), tempfile.mkdtemp()
    >>> report = vqrs.torch.compress_(model, method="scalar", dtype="int4")
    >>> vqrs.torch.save_pretrained(model, folder)
    >>> again = vqrs.torch.from_pretrained(folder, model=torch.nn.Sequential(torch.nn.EmbeddingBag(5000, 16)))
    >>> again[0].to_table().kind, again[0].to_table().path == f"{folder}/0.vqrs.safetensors"
    ('scalar', True)
    """
    path = Path(folder)
    if not path.is_dir():
        path = Path(_downloaded(folder))
    if (path / INDEX).exists() and not (path / "modules.json").exists():
        if model is None:
            raise TypeError(f"{path} holds the weights of a model that vqrs cannot build: pass a new one as model=")
        return _load_plain(model, path)
    if model is not None:
        raise TypeError("model= is for folders with vqrs.json; this one holds a model of transformers")
    pipeline = (path / "modules.json").exists()
    if not pipeline and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has neither {INDEX} nor modules.json nor config.json")
    register_with_transformers()
    if pipeline:
        from sentence_transformers import SentenceTransformer

        loaded = SentenceTransformer(os.fspath(path), *arguments, **keywords)
        _fill_parts(loaded, path)
        return loaded
    import transformers

    if model_class is None:
        saved = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or [None]
        model_class = getattr(transformers, saved[0] or "", transformers.AutoModel)
    return model_class.from_pretrained(os.fspath(path), *arguments, **keywords)


def load_state_dict_(model: M, state_dict: Mapping[str, Any], strict: bool = True) -> M:
    """Load the ``state_dict`` of a compressed model into a model that is not compressed, in place.

    Embeddings that are tables in the state become modules of :mod:`vqrs.torch`, with the layers tied to them; all else
    is ``model.load_state_dict``. A model that is compressed already takes such a state by that method alone.

    Parameters
    ----------
    model : torch.nn.Module
        The model, tied as it was before it was compressed.
    state_dict : mapping of str to tensor
        From ``state_dict()`` of a compressed model, perhaps by way of ``safetensors.torch.load_file``.
    strict : bool, default=True
        Whether keys that are missing or too many are errors, as in torch.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        A table stands where the model has no embedding of its shape. The model is as it was.
    RuntimeError
        What torch itself finds wrong with the other keys.

    Examples
    --------
    >>> import torch, vqrs.torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5000, 16))
    >>> report = vqrs.torch.compress_(model, method="scalar", dtype="int8")
    >>> fresh = torch.nn.Sequential(torch.nn.Embedding(5000, 16))
    >>> _ = vqrs.torch.load_state_dict_(fresh, model.state_dict())
    >>> torch.equal(fresh[0].weight, model[0].weight)
    True
    """
    states = _table_states(state_dict)

    def make(name: str) -> _TableModule:
        try:
            return _module_of_state(states[name], _trainable_state(states[name]))
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the state of {name} cannot be loaded: {error}") from error

    known = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _TableModule)}
    _exchange(model, _table_exchanges(model, set(states) - known, make))
    _tell_transformers(model)
    model.load_state_dict(state_dict, strict=strict)
    return model


def register_with_transformers() -> None:
    """Tell transformers of vqrs, so that its own ``from_pretrained`` (and ``SentenceTransformer``) load folders with
    compressed tables. :func:`compress_`, :func:`save_pretrained` and :func:`from_pretrained` do it by themselves; a
    process that calls none of them needs it before it loads.

    Raises
    ------
    ImportError
        transformers is missing, or older than version 5.

    Examples
    --------
    >>> import importlib.util, vqrs.torch
    >>> if importlib.util.find_spec("transformers"):
    ...     vqrs.torch.register_with_transformers()
    """
    try:
        import transformers
        from transformers.quantizers import auto
    except ImportError as error:
        raise ImportError("this needs transformers 5 or newer: pip install 'transformers>=5'") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"this needs transformers 5 or newer, found {transformers.__version__}")
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        config, quantizer = _transformers_classes()
        auto.register_quantization_config(METHOD)(config)
        auto.register_quantizer(METHOD)(quantizer)


# ---- tables of a model, described ----------------------------------------------------------------------------------


def _described(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a fresh model needs to get its tables: by the first name of each module."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    origins: dict[tuple[int, int], str] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, module in compressed_modules(model):
        heads = [
            place
            for head in model.modules()
            if isinstance(head, TiedLinear) and head.embedding is module
            for place in names[id(head)]
        ]
        # A module that has got another table since is not tied any more.
        origin = id(module.__dict__.get("_origin", module)), id(module._core)
        about: dict[str, Any] = {"class": _class_name(module), "arguments": _arguments(module)}
        if origin in origins:
            about["table_of"] = origins[origin]
        origins.setdefault(origin, name)
        if len(names[id(module)]) > 1:
            about["names"] = names[id(module)][1:]
        found[name] = about | ({"heads": heads} if heads else {})
    return found


def _class_name(module: _TableModule) -> str:
    return next(name for name, one in CLASSES.items() if type(module) is one)


def _arguments(module: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"padding_idx": module.padding_idx, "trainable": module.trainable}
    if module.trainable:
        arguments["sparse"] = module.sparse
    if isinstance(module, EmbeddingBag):
        arguments |= {"mode": module.mode, "include_last_offset": module.include_last_offset}
    if isinstance(module, ScaledEmbedding):
        scale = module.embed_scale
        arguments["embed_scale"] = float(scale)
        if isinstance(scale, Tensor):
            arguments["embed_scale_dtype"] = str(scale.dtype).removeprefix("torch.")
    return arguments


def _made(about: Mapping[str, Any], table: vqrs.Table, device: Any, dtype: torch.dtype) -> _TableModule:
    """The module of a description."""
    arguments = dict(about["arguments"])
    kind = arguments.pop("embed_scale_dtype", None)
    if kind is not None:
        arguments["embed_scale"] = torch.tensor(arguments["embed_scale"], dtype=getattr(torch, kind))
    made: _TableModule = CLASSES[about["class"]].from_table(table, device=device, dtype=dtype, **arguments)
    return made


def _write_tables(model: nn.Module, folder: Path, described: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Save the tables; the descriptions with the names of their files."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _files_of(folder)
    found = {}
    for name, about in described.items():
        own = dict(about)
        if "table_of" not in about:
            own["file"] = (name or "table") + SUFFIX
            module: Any = model.get_submodule(name)
            module.to_table().save(folder / own["file"])
        found[name] = own
    kept = {about.get("file") for about in found.values()}
    for file in before - kept:  # of a model that was saved here before
        (folder / file).unlink(missing_ok=True)
    return found


def _files_of(folder: Path) -> set[str]:
    """The table files that the descriptions in a folder name; others there are not ours."""
    found: set[str] = set()
    for name in (INDEX, "config.json"):
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8"))
            described = (said if name == INDEX else said["quantization_config"])["tables"]
            found |= {file for one in described if (file := _file_of(described, one)) is not None}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or not of ours
            continue
    return found


def _file_of(described: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    about = described[described[name].get("table_of", name)]
    file = about.get("file")
    if file is not None and (os.path.basename(file) != file or not file.endswith(SUFFIX)):
        raise ValueError(f"the file of a table must be a plain name that ends in {SUFFIX}, not {file!r}")
    return file


@contextlib.contextmanager
def _states_without_tables(model: nn.Module, empty: bool = False) -> Iterator[None]:
    """``state_dict`` leaves the tables out, or has an empty weight for each."""

    def drop(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        if empty:
            state_dict[f"{prefix}weight"] = torch.empty(0, module.embedding_dim, dtype=module.dtype)

    handles = [module._register_state_dict_hook(drop) for _, module in compressed_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- states --------------------------------------------------------------------------------------------------------


def _table_states(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of each table in a state, by the name of its module."""
    found: dict[str, dict[str, Any]] = {}
    for key in state_dict:
        if re.search(r"(^|\.)_extra_state$", key) and key.removesuffix("_extra_state") + "codes" in state_dict:
            prefix = key.removesuffix("_extra_state")
            own = re.compile(re.escape(prefix) + r"(codes|_extra_state|decoder\..*)")
            found[prefix.removesuffix(".")] = {
                name.removeprefix(prefix): value for name, value in state_dict.items() if own.fullmatch(name)
            }
    return found


def _trainable_state(state: Mapping[str, Any]) -> bool:
    return bool(json.loads(state["_extra_state"].cpu().numpy().tobytes())["trainable"])


def _module_of_state(state: dict[str, Any], trainable: bool) -> Embedding:
    """An embedding with the table of a state."""
    any_table = vqrs.compress(np.zeros((2, 1), np.float32), method="kmeans", n_clusters=1)
    module = Embedding.from_table(any_table, trainable=trainable)
    described = json.loads(state["_extra_state"].cpu().numpy().tobytes())
    module.num_embeddings, module.embedding_dim = len(state["codes"]), described["decoder"]["dim"]
    module._load_codes(state)
    return module


def _table_exchanges(
    model: nn.Module, names: set[str], make: Callable[[str], _TableModule]
) -> list[tuple[nn.Module, nn.Module]]:
    """Torch's embeddings of these names, and the layers tied to them, with modules over the tables of what ``make``
    gives.
    """
    weights = {name: weight for weight in _survey(model, False) for name in weight.all_names}
    missing = sorted(name for name in names if name not in weights)
    if missing:
        raise ValueError(
            f"there are tables for {', '.join(missing)}, where the model has no torch.nn.Embedding or EmbeddingBag: it "
            f"has {', '.join(weights) or 'none'}"
        )
    exchanges: list[tuple[nn.Module, nn.Module]] = []
    for weight in {id(weights[name]): weights[name] for name in sorted(names)}.values():
        if weight.skipped is not None and "meta device" not in weight.skipped:
            raise ValueError(f"{weight.name} cannot become a table: {weight.skipped}")
        name = next(name for name in weight.all_names if name in names)
        module = make(name)
        if (module.num_embeddings, module.embedding_dim) != weight.shape:
            raise ValueError(
                f"{name} has a table of shape {(module.num_embeddings, module.embedding_dim)}, the model a weight of "
                f"shape {weight.shape}"
            )
        weight.table = module._table
        exchanges += weight.replacements(module.trainable, keep_original=False)
    return exchanges


# ---- models of no library ------------------------------------------------------------------------------------------


def _save_plain(model: nn.Module, folder: Path, **arguments: Any) -> None:
    if arguments:
        raise TypeError(
            f"{', '.join(map(repr, arguments))}: arguments are for models with a save_pretrained of their own"
        )
    if isinstance(model, _TableModule):
        raise TypeError("the model is a single table: save to_table() of it")
    from safetensors.torch import save_model

    described = _write_tables(model, folder, _described(model))
    with _states_without_tables(model):
        save_model(model, os.fspath(folder / WEIGHTS))
    _write_index(folder, described)


def _write_index(folder: Path, described: Mapping[str, dict[str, Any]]) -> None:
    text = json.dumps({"version": 1, "tables": described}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _load_plain(model: M, folder: Path) -> M:
    from safetensors.torch import load_model

    described = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tables"]
    names = {name for name, about in described.items() if "table_of" not in about}

    def make(name: str) -> _TableModule:
        file = _file_of(described, name)
        assert file is not None, "files of folders are named"
        return _made(described[name], vqrs.open(folder / file), "cpu", torch.get_default_dtype())

    exchanges = _table_exchanges(model, names, make)
    replaced = {id(old) for old, _ in exchanges}
    without = {
        f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if id(module) in replaced
    }
    missing, unexpected = load_model(model, os.fspath(folder / WEIGHTS), strict=False)
    if wrong := sorted((set(missing) - without) | set(unexpected)):
        raise RuntimeError(f"{folder} holds another model: keys missing or too many are {', '.join(wrong)}")
    _exchange(model, exchanges)
    _tell_transformers(model)
    return model


# ---- modules of sentence-transformers that have tables of their own -------------------------------------------------


def _saved_parts(model: nn.Module, inner: Mapping[str, Any]) -> list[Any]:
    """The modules of a pipeline that save themselves and hold tables outside of models of transformers."""
    found = []
    for name, part in model.named_children():
        outside = [one for one, _ in compressed_modules(part) if not _inside(f"{name}.{one}", inner)]
        if outside and not hasattr(part, "save"):
            raise ValueError(
                f"{name}.{outside[0]} is in a part whose folder has no place for a table: save its to_table() and the "
                "rest apart"
            )
        if outside:
            found.append(part)
    return found


@contextlib.contextmanager
def _tables_beside_part(part: Any) -> Iterator[None]:
    """``save`` of a module such as ``StaticEmbedding`` keeps its tables in files of their own. Its weight is saved
    empty: loaded without us, the module has no row and says so at the first lookup.
    """
    saves = part.save

    def save_with_tables(self: Any, output_path: Any, *arguments: Any, **keywords: Any) -> None:
        folder = Path(output_path)
        described = _write_tables(self, folder, _described(self))
        _write_index(folder, described)
        with _states_without_tables(self, empty=True):
            saves(output_path, *arguments, **keywords)

    part.save = types.MethodType(save_with_tables, part)
    try:
        yield
    finally:
        del part.save


def _fill_parts(model: Any, folder: Path) -> None:
    """Put tables into the modules of a pipeline that were saved with them."""
    for entry in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        place, part = folder / entry["path"], model[entry["idx"]]
        if not (place / INDEX).exists():
            continue
        described = json.loads((place / INDEX).read_text(encoding="utf-8"))["tables"]
        exchanges = []
        for name, about in described.items():
            file = _file_of(described, name)
            assert file is not None, "files of folders are named"
            old: Any = part.get_submodule(name)
            if len(old.weight):  # another model was saved over it
                continue
            new = _made(about, vqrs.open(place / file), old.weight.device, old.weight.dtype)
            old.num_embeddings = new.num_embeddings
            _take_over(old, new)
            exchanges.append((old, new))
            if getattr(part, "num_embeddings", None) == 0:
                part.num_embeddings = new.num_embeddings
        _exchange(model, exchanges)


# ---- transformers --------------------------------------------------------------------------------------------------


def _transformers_models(model: nn.Module) -> dict[str, Any]:
    """The outermost models of transformers in a model that hold a table, by their names."""
    import sys

    if "transformers" not in sys.modules:
        return {}
    from transformers import PreTrainedModel

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not _inside(name, found):
            found[name] = module
    return {name: part for name, part in found.items() if any(True for _ in compressed_modules(part))}


def _inside(name: str, parts: Mapping[str, Any]) -> bool:
    return any(part in ("", name) or name.startswith(f"{part}.") for part in parts)


def update_transformers_models(model: nn.Module) -> None:
    """Bring the models of transformers inside a model in line with the tables that they have now.

    Weights that are no parameters any more must not be tied by name (``tie_weights``), and the config has to say that
    there are tables, so that the model's own ``save_pretrained`` writes a folder that can be loaded.
    """
    try:
        register_with_transformers()
    except ImportError:  # an older one has other ways to tie
        return
    from transformers import PreTrainedModel

    outermost: list[str] = []
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        _leave_out_ties(part)
        if _inside(name, dict.fromkeys(outermost)):
            continue
        outermost.append(name)
        described = _described(part)
        if described:
            part.config.quantization_config = {"quant_method": METHOD, "tables": described}
        elif _method_of(getattr(part.config, "quantization_config", None)) == METHOD:
            del part.config.quantization_config
            for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
                part.__dict__.pop(attribute, None)
            for module in part.modules():
                if isinstance(module, PreTrainedModel):
                    module.config.__dict__.pop("_is_quantized", None)


def _method_of(config: Any) -> str | None:
    return config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)


def _leave_out_ties(part: Any) -> None:
    """Let a model tie by name what are parameters, and nothing else; without tables, what its class says."""
    weights = [
        f"{name}.weight"
        for name, module in part.named_modules(remove_duplicate=False)
        if isinstance(module, _TableModule | TiedLinear | _Place)
    ]
    known: dict[str, str] = part.__dict__.pop("_vqrs_tied", None) or dict(getattr(part, "all_tied_weights_keys", {}))
    part.__dict__.pop("_tied_weights_keys", None)
    if not weights:
        part.all_tied_weights_keys = known
        return
    by_class = part._tied_weights_keys or {}
    part._vqrs_tied = known
    part.all_tied_weights_keys = {to: of for to, of in known.items() if to not in weights and of not in weights}

    def ours(pattern: str) -> bool:
        return any(re.search(f"^{pattern}", weight) for weight in weights)

    shared = _shared_tensors(part)
    part._tied_weights_keys = {to: of for to, of in by_class.items() if not ours(to) and not ours(of)} | shared
    part.all_tied_weights_keys |= shared


def _shared_tensors(part: nn.Module) -> dict[str, str]:
    """The tensors of tables that stand in a state more than once, by the names of the first."""
    firsts: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in part.named_modules(remove_duplicate=False):
        if isinstance(module, _TableModule):
            first = firsts.setdefault(id(module.__dict__.get("_origin", module)), name)
            if first != name:
                tensors = [key for key in module.state_dict() if key != "_extra_state"]
                found |= {f"{name}.{key}": f"{first}.{key}" for key in tensors}
    return found


@contextlib.contextmanager
def _tables_beside(part: Any) -> Iterator[None]:
    """``save_pretrained`` of a model of transformers, whoever calls it, keeps its tables in files of their own."""
    saves = part.save_pretrained

    def save_with_tables(self: Any, save_directory: Any, *arguments: Any, **keywords: Any) -> Any:
        config = self.config.quantization_config
        tables = _write_tables(self, Path(save_directory), _described(self))
        self.config.quantization_config = {"quant_method": METHOD, "tables": tables}
        try:
            with _states_without_tables(self):
                return saves(save_directory, *arguments, **keywords)
        finally:
            self.config.quantization_config = config

    part.save_pretrained = types.MethodType(save_with_tables, part)
    try:
        yield
    finally:
        del part.save_pretrained


class _Place(nn.Module):
    """Where a table will be, while transformers loads everything else."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        # Follows the device and dtype that the model gets; not part of a state.
        self.register_buffer("output", torch.empty(0), persistent=False)

    @property
    def weight(self) -> Tensor:
        """For models that ask for its shape, or would initialize it: no values, and those were initialized."""
        empty = torch.empty(self.num_embeddings, self.embedding_dim, device="meta")
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        return empty


@functools.cache
def _transformers_classes() -> tuple[Any, Any]:
    """Our config and loader in the terms of transformers, which is imported only when it is used."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class TableConfig(QuantizationConfigMixin):
        """``quantization_config`` of a model with compressed tables."""

        def __init__(self, tables: dict[str, Any] | None = None, **_: Any) -> None:
            self.quant_method = METHOD
            self.tables = tables or {}

    class TableLoader(HfQuantizer):
        """Puts compressed tables where a model of transformers has embeddings."""

        requires_calibration = False

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
        ) -> Any:
            self.files = checkpoint_files or []
            self.places = _clear_places(model, self.quantization_config.tables)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            described = self.quantization_config.tables
            _fill_places(model, self.places, described, self.files)
            return model

        def _dequantize(self, model: Any, dtype: Any = None) -> Any:
            from vqrs.torch.model import decompress_

            return decompress_(model)

    for made in (TableConfig, TableLoader):
        made.__qualname__ = made.__name__  # where pickle looks for them: a loaded model holds both
    return TableConfig, TableLoader


def __getattr__(name: str) -> Any:
    if name in ("TableConfig", "TableLoader"):
        return _transformers_classes()[name == "TableLoader"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _clear_places(model: Any, described: Mapping[str, Any]) -> list[tuple[str, nn.Module, _Place, list[Any]]]:
    """Exchange embeddings for empty places and their heads for layers that read them: for each the name of its table,
    the old module, the place, and the old and new heads.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found, exchanges = [], []
    for name, about in described.items():
        here = _name_here(name, modules, model.base_model_prefix)
        if here is None:
            raise ValueError(
                f"config.json has a table for {name!r}, which {type(model).__name__} does not have: load the "
                "class that was saved"
            )
        prefix, old = here.removesuffix(name), modules[here]
        place = _Place((old.num_embeddings, old.embedding_dim))
        heads: list[Any] = []
        for head_name in about.get("heads", []):
            place_of_head = _name_here(head_name, modules, model.base_model_prefix)
            if place_of_head is None:  # a model without the head, from the folder of one with it
                continue
            head = modules[place_of_head]
            tied = TiedLinear(place, head.bias)  # type: ignore[arg-type]  # for now
            _take_over(head, tied)
            heads.append(tied)
            exchanges.append((head, tied))
        exchanges.append((old, place))
        for other in about.get("names", []):
            shared = modules.get(prefix + other)
            if shared is not None and shared is not old:
                exchanges.append((shared, place))
        found.append((name, old, place, heads))
    _exchange(model, exchanges)
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            _leave_out_ties(part)
    # Of the plain save_pretrained: read by us, not by transformers.
    names = [one for name, about in described.items() for one in (name, *about.get("names", []))]
    ignored = {rf"(^|\.){re.escape(name)}\.(codes|_extra_state|decoder\..*)$" for name in names}
    model._keys_to_ignore_on_load_unexpected = (model._keys_to_ignore_on_load_unexpected or set()) | ignored
    return found


def _name_here(name: str, modules: Mapping[str, Any], prefix: str) -> str | None:
    """The name in this class: with or without the base model's in front."""
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((one for one in names if one in modules), None)


def _fill_places(
    model: Any,
    places: list[tuple[str, nn.Module, _Place, list[Any]]],
    described: Mapping[str, Any],
    files: list[str],
) -> None:
    """Put the tables where their places are."""
    made: dict[str, tuple[_TableModule, _Origin]] = {}
    exchanges: list[tuple[nn.Module, nn.Module]] = []
    for name, old, place, heads in places:
        first = described[name].get("table_of", name)
        table = made[first][0]._table if first in made else _table_of(model, described, name, files)
        expected = place.num_embeddings, place.embedding_dim
        if table.shape != expected:
            raise ValueError(f"{name} has a table of shape {table.shape}, the model a weight of shape {expected}")
        new = _made(described[name], table, place.output.device, place.output.dtype)
        if first in made and new.trainable:
            new.decoder = made[first][0].decoder
        _take_over(old, new)
        origin = made[first][1] if first in made else _Origin()
        origin.add(new)
        _fill_shell(new)
        made[name] = new, origin
        for head in heads:
            head._held = (new,)
        exchanges.append((place, new))
    _exchange(model, exchanges)
    update_transformers_models(model)


def _fill_shell(module: _TableModule) -> None:
    """A module that transformers made without values has a scale without value: it gets ours."""
    shell = module.__dict__["_shell"][0]
    shell.training = False
    if isinstance(module, ScaledEmbedding) and isinstance(shell._buffers.get("embed_scale"), Tensor):
        shell._buffers = {**shell._buffers, "embed_scale": torch.as_tensor(module.embed_scale)}


def _table_of(model: Any, described: Mapping[str, Any], name: str, files: list[str]) -> vqrs.Table:
    """The table of a folder: mapped from its file, or of the state that a plain ``save_pretrained`` wrote."""
    file = _file_of(described, name)
    if file is not None:
        here = os.path.join(os.path.dirname(files[0]), file) if files else file
        if not os.path.exists(here):
            from transformers.utils import cached_file

            here = cached_file(model.config.name_or_path, file)
        return vqrs.open(here)
    from safetensors import safe_open

    state: dict[str, Any] = {}
    first = described[name].get("table_of", name)
    sharing = [one for one, about in described.items() if about.get("table_of", one) == first]
    names = [name for one in sharing for name in (one, *described[one].get("names", []))]
    own = re.compile(rf"(?:|.*\.)(?:{'|'.join(map(re.escape, names))})\.(codes|_extra_state|decoder\..*)")
    for path in files:
        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # no mapping
                if found := own.fullmatch(key):
                    state[found[1]] = opened.get_tensor(key)
    if "codes" not in state:
        raise ValueError(f"the files of the model have no table for {name!r}")
    return _module_of_state(state, _trainable_state(state)).to_table()


def _downloaded(name: str | os.PathLike[str]) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"there is no folder {os.fspath(name)!r}") from error
    try:
        return snapshot_download(os.fspath(name))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder {os.fspath(name)!r}, and no such model can be had: {error}"
        ) from error
