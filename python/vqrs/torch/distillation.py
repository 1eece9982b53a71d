"""``distill``: tune what a compressed model can still change, so that its outputs come back to the whole model's."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

import vqrs
from vqrs._progress import printed_progress
from vqrs.torch.embedding import _TableModule
from vqrs.torch.forms import Decoder

__all__ = ["Distillation", "distill", "output_loss"]

MEASURED_BATCHES = 8
"""Batches of the loader that are measured where no validation is given."""

LEAST_SCALE = 1e-3
"""Steps of values near zero (a bias, a mean) are those of values of this size."""

Loss = Callable[[Any, Any, Any], Tensor]
Layers = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


@dataclass
class Distillation:
    """What :func:`distill` did.

    Attributes
    ----------
    loss_before, loss_after : float
        Loss on the validation, of the tables as they would be stored. ``loss_after`` is never above ``loss_before``.
    n_steps, best_step : int
        Steps that were made, and the one after which the student was best: 0 is the start.
    history : list of dict
        One a measurement: ``step``, ``training`` (mean loss of the steps since the one before; None at the start) and
        ``validation``.
    tuned : dict of str to int
        Number of values of each parameter that was tuned, by its name in the student.
    left : list of str
        Tables that have nothing to train, such as those of float16.

    Examples
    --------
    >>> print(vqrs.torch.Distillation(0.2, 0.1, 40, 30, history=[], tuned={"0.decoder.codebooks_0": 1024}))
    loss 0.2 before, 0.1 after step 30 of 40; 1,024 values tuned
    """

    loss_before: float
    loss_after: float
    n_steps: int
    best_step: int
    history: list[dict[str, Any]] = field(repr=False)
    tuned: dict[str, int] = field(repr=False)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        after = f"{self.loss_after:.4g} after step {self.best_step} of {self.n_steps}"
        return f"loss {self.loss_before:.4g} before, {after}; {sum(self.tuned.values()):,} values tuned"


def distill(
    student: nn.Module,
    teacher: Callable[..., Any] | None,
    loader: Iterable[Any],
    *,
    loss: Loss | None = None,
    validation: Iterable[Any] | None = None,
    layers: Layers | None = None,
    lr: float = 0.01,
    epochs: int | None = None,
    max_steps: int | None = None,
    measure_every: int | None = None,
    patience: int | None = None,
    max_norm: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    forward: Callable[[Any, Any], Any] | None = None,
    random_state: int | None = 0,
    progress: bool | Callable[[str, int, int], Any] = False,
) -> Distillation:
    """Tune the tables of a compressed model against the outputs of the whole one, in place.

    Codebooks, scales, levels, means and rotations of every ``vqrs.torch`` module are tuned, and with ``layers`` other
    parameters too; codes stay as they are, and so do the bytes. Frozen modules are made trainable for the time of the
    tuning and frozen again. What is measured is always what would be stored: values rounded to the types of the table.
    The best measured state is kept.

    Parameters
    ----------
    student : torch.nn.Module
        A model with ``vqrs.torch`` modules, as ``compress_`` leaves it. It may be such a module itself.
    teacher : torch.nn.Module, callable or None
        The whole model: make it by ``copy.deepcopy(model)`` before ``compress_(model)``. It gets no gradients. None
        where ``loss`` needs no teacher; ``loss`` then gets None for its output.
    loader : iterable of batches
        A DataLoader or a list; it is read once an epoch. A batch that is a mapping is passed as ``model(**batch)``, a
        tuple or list as ``model(*batch)``, anything else as ``model(batch)``. Tensors move to the model's device.
    loss : callable, optional
        ``loss(student_output, teacher_output, batch)``, a scalar tensor: the task's own loss, for example. None:
        :func:`output_loss`, the squared error of all outputs relative to the teacher's.
    validation : iterable of batches, optional
        What the student is measured on, by the mean of the batches' losses; read once and held. None: the first 8
        batches of ``loader``, which are trained on as well.
    layers : str, sequence of str or callable, optional
        What is tuned beside the tables: names of modules or parameters of the student, in which ``*`` stands for
        anything (``"encoder.layer.0"``, ``"*.LayerNorm"``), or ``layers(name, parameter)``, true where to tune.
    lr : float, default=0.01
        Size of a step relative to the values: each parameter's rate is ``lr`` times its root mean square. It falls in a
        straight line to zero where the number of steps is known.
    epochs : int, optional
        Passes over ``loader``: 1 by default, or as many as ``max_steps`` needs.
    max_steps : int, optional
        Most steps.
    measure_every : int, optional
        Steps between two measurements. None: an epoch. The end is measured as well.
    patience : int, optional
        Measurements in a row without a new best, after which tuning stops early. None: it does not.
    max_norm : float, optional
        Largest norm of the gradients of a step, which are scaled down to it. None: any.
    optimizer : callable, default=torch.optim.Adam
        Makes the optimizer of a list of parameter groups, each with its own ``lr``.
    forward : callable, optional
        ``forward(model, batch)``: how both models are called, if not as ``loader`` says.
    random_state : int or None, default=0
        Seeds torch for the time of the tuning (the order of a shuffling loader, dropout of a loss); the state of
        torch's generators is the old one afterwards. None: they run on.
    progress : bool or callable, default=False
        True prints a line; a callable gets (stage, done, total).

    Returns
    -------
    Distillation
        Losses before and after, the history, what was tuned.

    Raises
    ------
    ValueError
        If the student has no ``vqrs.torch`` module, or nothing to tune; if teacher and student share what is tuned; if
        the loader is empty; if outputs do not fit each other.
    FloatingPointError
        If the loss is not finite. The student is then as it was, as after any other error.

    Warns
    -----
    UserWarning
        If no measurement was below the first: the student is as it was.

    Notes
    -----
    Both models run in evaluation mode, so that dropout does not blur what is compared; modes and ``requires_grad`` are
    the old ones afterwards, and ``grad`` of what was tuned is None. The same seed gives the same result on the same
    machine with the same number of threads.

    See Also
    --------
    vqrs.torch.Embedding.to_table : The table of the tuned values, to be saved.

    Examples
    --------
    >>> import copy, torch, vqrs.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Embedding(400, 16), torch.nn.Linear(16, 4))
    >>> teacher = copy.deepcopy(model)
    >>> model[0] = vqrs.torch.Embedding.from_pretrained(model[0], method="product", n_bits=4, random_state=0)
    >>> batches = torch.arange(400).split(50)
    >>> result = vqrs.torch.distill(model, teacher, batches, epochs=20)
    >>> result.loss_after < result.loss_before
    True
    >>> model[0].trainable, model[0].to_table().kind
    (False, 'product')
    """
    counts = {"epochs": epochs, "max_steps": max_steps, "measure_every": measure_every, "patience": patience}
    _check_arguments(loader, teacher, loss, lr, counts)
    tables = {name: module for name, module in student.named_modules() if isinstance(module, _TableModule)}
    if not tables:
        raise ValueError(
            f"the student, a {type(student).__name__}, has no vqrs.torch module to tune: compress its embeddings "
            "first, with vqrs.torch.compress_(student, ratio=…)"
        )
    chosen = _chosen_layers(student, layers)
    _refuse_shared(teacher, tables, chosen)
    call, compare = forward or _forward, loss or output_loss
    device = next(iter(tables.values())).codes.device
    of_teacher = _device_of(teacher, device)

    def loss_of(batch: Any) -> Tensor:
        batch = _moved(batch, device)
        target = None
        if teacher is not None:
            with torch.no_grad():
                target = _moved(call(teacher, _moved(batch, of_teacher)), device)
        value = compare(call(student, batch), target, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError("the loss must be a tensor of one value: average it over the batch")
        if not math.isfinite(float(value.detach())):
            raise FloatingPointError(
                f"the loss is {float(value.detach())} after {n_steps} steps: "
                + (f"lower lr={lr:g} or give max_norm=1.0" if n_steps else "look at the models' outputs and at loss=")
                + "; the student is as it was"
            )
        return value.reshape(())

    def measure() -> float:
        with _stored(tuned), torch.no_grad():
            return math.fsum(float(loss_of(batch)) for batch in measured) / len(measured)

    n_steps = best_step = measured_since = 0
    history: list[dict[str, Any]] = []
    losses: list[float] = []
    with _seeded(random_state, device), _kept_modes(student, teacher):
        measured = list(itertools.islice(loader, MEASURED_BATCHES) if validation is None else validation)
        if not measured:
            raise ValueError(f"the {'loader' if validation is None else 'validation'} is empty: it must yield batches")
        total = _number_of_steps(loader, epochs, max_steps)
        frozen = {name: module._table for name, module in tables.items() if not module.trainable}
        tuned, left = _made_trainable(tables, needed=not chosen)
        parameters = _parameters(student, tuned) | chosen
        start = best = _values(parameters)
        stored: dict[int, vqrs.Table] = {}
        try:
            loss_before = least = measure()
            history.append({"step": 0, "training": None, "validation": least})
            for value in parameters.values():
                value.requires_grad_(True)
            steps = optimizer([{"params": [value], "lr": lr * _scale(value)} for value in parameters.values()])
            rates = [group["lr"] for group in steps.param_groups]
            with printed_progress("distill", bool(progress) and not callable(progress)) as line:
                tell = progress if callable(progress) else line
                for batch, epoch_ends, all_ends in _batches(loader, epochs, max_steps):
                    for group, rate in zip(steps.param_groups, rates, strict=True):
                        group["lr"] = rate * (1 - n_steps / total if total else 1)
                    loss_value = loss_of(batch)
                    if not loss_value.requires_grad:
                        raise ValueError(
                            "the loss does not depend on what is tuned: batches must reach the compressed embeddings, "
                            "and neither forward nor loss may detach the student's output"
                        )
                    steps.zero_grad(set_to_none=True)
                    loss_value.backward()
                    if max_norm is not None:
                        nn.utils.clip_grad_norm_(parameters.values(), max_norm)
                    steps.step()
                    n_steps += 1
                    losses.append(float(loss_value.detach()))
                    if tell is not None:
                        tell(f"loss {losses[-1]:.4g}, step", n_steps, total or n_steps)
                    if not (all_ends or (epoch_ends if measure_every is None else n_steps % measure_every == 0)):
                        continue
                    found = measure()
                    history.append({"step": n_steps, "training": math.fsum(losses) / len(losses), "validation": found})
                    losses.clear()
                    if found < least:
                        least, best, best_step, measured_since = found, _values(parameters), n_steps, 0
                    else:
                        measured_since += 1
                    if measured_since == patience:
                        break
        except BaseException:
            best = start
            raise
        finally:
            _write(parameters, best)
            for name, table in frozen.items():
                if best is not start and name not in left:  # modules of one table keep one
                    table = stored.setdefault(id(table), tables[name].to_table())
                _adopt(tables[name], table, trainable=False)
    if best_step == 0:
        warnings.warn(
            f"no step brought the loss below {loss_before:.4g}, and the student is as it was: lower lr={lr:g}, or tune "
            "for longer or on more batches",
            stacklevel=2,
        )
    sizes = {name: value.numel() for name, value in parameters.items()}
    return Distillation(loss_before, least, n_steps, best_step, history, sizes, left)


def output_loss(student: Any, teacher: Any, batch: Any = None) -> Tensor:
    """Squared error of a model's outputs relative to the teacher's: 0 where they are equal, 1 for zeros.

    Parameters
    ----------
    student, teacher : tensor, or mapping, tuple or list of outputs
        Of the same structure, such as the outputs of transformers. Float tensors are compared, each relative to its
        own squared norm, and averaged; single values (a loss that the model returns) and all else are left out.
    batch : optional
        Where it is a mapping with an ``attention_mask`` of shape (n, length), tensors of shape (n, length, …) are
        compared where the mask is not zero.

    Returns
    -------
    Tensor of shape ()

    Raises
    ------
    ValueError
        If the outputs differ in structure or shape, or hold no float tensor.

    Examples
    --------
    >>> output_loss({"logits": torch.tensor([1.0, 1.0])}, {"logits": torch.tensor([1.0, 2.0])})
    tensor(0.2000)
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    errors = []
    for found, wanted in _pairs(student, teacher, "the output"):
        wanted = wanted.to(found.dtype)
        if mask is not None and found.shape[:2] == mask.shape:
            found, wanted = found[mask != 0], wanted[mask != 0]
        square = wanted.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        errors.append((found - wanted).float().square().mean() / square)
    if not errors:
        raise ValueError(
            f"the outputs, of {type(student).__name__}, hold no float tensor to compare: give loss=, which gets both"
        )
    return torch.stack(errors).mean()


def _pairs(student: Any, teacher: Any, place: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Float tensors of more than a single value that stand at the same place of both outputs."""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        if student.shape != teacher.shape:
            raise ValueError(
                f"{place} of the student has shape {tuple(student.shape)}, that of the teacher {tuple(teacher.shape)}: "
                "give loss=, which gets both"
            )
        if student.is_floating_point() and student.dim():
            yield student, teacher
    elif isinstance(student, Mapping) and isinstance(teacher, Mapping):
        if set(student) != set(teacher):
            raise ValueError(f"{place} of the student has {sorted(student)}, that of the teacher {sorted(teacher)}")
        for key in student:
            yield from _pairs(student[key], teacher[key], f"{place}[{key!r}]")
    elif isinstance(student, (tuple, list)) and isinstance(teacher, (tuple, list)):
        if len(student) != len(teacher):
            raise ValueError(f"{place} of the student has {len(student)} parts, that of the teacher {len(teacher)}")
        for number, (found, wanted) in enumerate(zip(student, teacher, strict=True)):
            yield from _pairs(found, wanted, f"{place}[{number}]")
    elif teacher is None or type(student) is not type(teacher):
        raise ValueError(
            f"{place} of the student is of {type(student).__name__}, that of the teacher of {type(teacher).__name__}: "
            "give a teacher of the same outputs, or loss="
        )


def _forward(model: Any, batch: Any) -> Any:
    """A model called with a batch as such batches mostly are."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _moved(values: Any, device: torch.device) -> Any:
    """The same with its tensors on the device, in mappings (as plain ones), tuples and lists."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, Mapping):
        return {key: _moved(value, device) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        return [_moved(value, device) for value in values]
    return values


def _device_of(model: Any, otherwise: torch.device) -> torch.device:
    """Where a model is: it may be a callable without parameters."""
    if not isinstance(model, nn.Module):
        return otherwise
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), otherwise)


def _check_arguments(loader: Any, teacher: Any, loss: Any, lr: float, counts: Mapping[str, int | None]) -> None:
    if isinstance(loader, Iterator):
        raise TypeError("loader is an iterator, which can be read once only: pass a DataLoader or a list of batches")
    if teacher is None and loss is None:
        raise ValueError("without a teacher there is nothing to compare with: give teacher=, or loss= of the task")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr={lr} is not allowed: must be above 0")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} is not allowed: must be at least 1")


def _chosen_layers(student: nn.Module, layers: Layers | None) -> dict[str, nn.Parameter]:
    """Parameters that are tuned beside the tables."""
    if layers is None:
        return {}
    own = {
        id(value) for module in student.modules() if isinstance(module, _TableModule) for value in module.parameters()
    }
    named = {name: value for name, value in student.named_parameters() if id(value) not in own}
    if callable(layers):
        return {name: value for name, value in named.items() if layers(name, value)}
    chosen: dict[str, nn.Parameter] = {}
    for pattern in [layers] if isinstance(layers, str) else layers:
        found = {n: v for n, v in named.items() if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not found:
            some = ", ".join(itertools.islice(named, 8))
            raise ValueError(f"layers={pattern!r} fits no parameter of the student; it has {some or 'none'}, …")
        chosen |= found
    return chosen


def _refuse_shared(teacher: Any, tables: Mapping[str, nn.Module], chosen: Mapping[str, nn.Parameter]) -> None:
    """What is tuned must not change the teacher as well."""
    if not isinstance(teacher, nn.Module):
        return
    modules, values = set(teacher.modules()), {id(value) for value in teacher.parameters()}
    shared = [name for name, module in tables.items() if module in modules]
    shared += [name for name, value in chosen.items() if id(value) in values]
    if shared:
        raise ValueError(
            f"the teacher shares {shared[0] or 'its table'!r} with the student, and would change as that is tuned: "
            "make it by copy.deepcopy(model) before the model is compressed"
        )


def _number_of_steps(loader: Any, epochs: int | None, max_steps: int | None) -> int | None:
    """How many there will be; None where the loader cannot tell its length."""
    if max_steps is not None and epochs is None:
        return max_steps
    try:
        whole = len(loader) * (epochs or 1)
    except TypeError:
        return None
    return whole if max_steps is None else min(whole, max_steps)


def _batches(loader: Iterable[Any], epochs: int | None, max_steps: int | None) -> Iterator[tuple[Any, bool, bool]]:
    """Batches, whether an epoch ends with each, and whether all ends."""
    n_steps, n_epochs = 0, epochs or (math.inf if max_steps is not None else 1)
    for epoch in itertools.count(1):
        batches = iter(loader)
        batch = next(batches, None)
        if batch is None:
            raise ValueError("the loader is empty: it must yield batches at every pass")
        while batch is not None:
            following = next(batches, None)
            n_steps += 1
            all_ends = n_steps == max_steps or (following is None and epoch == n_epochs)
            yield batch, following is None, all_ends
            if all_ends:
                return
            batch = following


@contextmanager
def _seeded(random_state: int | None, device: torch.device) -> Iterator[None]:
    """Torch's generators start from the seed, and go on as before afterwards."""
    if random_state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random_state)
        yield


@contextmanager
def _kept_modes(student: nn.Module, teacher: Any) -> Iterator[None]:
    """Evaluation mode, and gradients to nothing in the student; all as before afterwards."""
    models = [model for model in (student, teacher) if isinstance(model, nn.Module)]
    modes = [(module, module.training) for model in models for module in model.modules()]
    required = [(value, value.requires_grad) for value in student.parameters()]
    try:
        for model in models:
            model.eval()
        student.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
            if isinstance(module, _TableModule):
                module.decoder.train(mode)
        for value, flag in required:
            value.requires_grad_(flag)


def _adopt(module: _TableModule, table: vqrs.Table, decoder: Decoder | None = None, *, trainable: bool) -> None:
    """The same module reads this table, frozen or trainable: whoever holds the module sees no other."""
    module.trainable = trainable
    module._adopt(table, decoder)


@contextmanager
def _stored(tables: Iterable[_TableModule]) -> Iterator[None]:
    """For a while, the tables are read as they would be stored."""
    held = [(module, module._table, module.decoder) for module in tables]
    stored = [module.to_table() for module, _, _ in held]
    try:
        for (module, _, _), table in zip(held, stored, strict=True):
            _adopt(module, table, trainable=False)
        yield
    finally:
        for module, table, decoder in held:
            _adopt(module, table, decoder, trainable=True)


def _made_trainable(tables: Mapping[str, _TableModule], needed: bool) -> tuple[list[_TableModule], list[str]]:
    """The tables, trainable, and the names of those that have nothing to train."""
    left: dict[str, ValueError] = {}
    decoders: dict[int, Decoder] = {}
    for name, module in tables.items():
        table = module._table
        if module.trainable:
            continue
        try:
            _adopt(module, table, decoders.get(id(table)), trainable=True)
            decoders[id(table)] = module.decoder  # of all modules that read the table
        except ValueError as error:
            _adopt(module, table, trainable=False)
            left[name] = error
    if needed and len(left) == len(tables):
        raise next(iter(left.values()))
    return [module for name, module in tables.items() if name not in left], list(left)


def _parameters(student: nn.Module, tuned: Iterable[_TableModule]) -> dict[str, nn.Parameter]:
    """What tables train, by their names in the student."""
    own = {id(value) for module in tuned for value in module.parameters()}
    return {name: value for name, value in student.named_parameters() if id(value) in own}


def _scale(value: Tensor) -> float:
    """Root mean square of the values, which steps are relative to."""
    return max(float(value.detach().float().square().mean().sqrt()), LEAST_SCALE)


def _values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
            parameter.grad = None
