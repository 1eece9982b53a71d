"""What users pass, turned into what the compiled module takes.

Values, shapes and parameters are judged in Rust; here only containers, dtypes, strides and devices are.
"""

from __future__ import annotations

import operator
import reprlib
import sys
from collections.abc import Iterator, Mapping
from numbers import Integral, Number
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from vqrs import _core
from vqrs._interrupt import LARGE, interruptible

_MAX_JOBS = 2**31 - 1
"""The compiled module starts far fewer threads."""

RandomState: TypeAlias = int | np.random.RandomState | np.random.Generator | None


def as_matrix(values: Any, name: str = "X", *, min_rows: int = 1) -> NDArray[np.float32]:
    """Rows of float32, C-contiguous; no copy where the input is that already.

    Parameters
    ----------
    values : array-like of shape (n_rows, n_features)
        A numpy array or memory map of any real dtype and strides, a torch CPU tensor, a DLPack object, a pandas frame,
        or nested lists.
    name : str, default="X"
        What error messages call it.
    min_rows : int, default=1
        Fewer rows are refused.

    Returns
    -------
    ndarray of shape (n_rows, n_features), float32

    Raises
    ------
    TypeError
        Sparse input, or a dtype that is no real number.
    ValueError
        Not two-dimensional, too few rows, no columns, complex numbers, text, or values beyond float32. NaN and infinity
        pass: the compiled module refuses them.

    Examples
    --------
    >>> from vqrs._validation import as_matrix
    >>> as_matrix([[1, 2], [3, 4]])
    array([[1., 2.],
           [3., 4.]], dtype=float32)
    """
    array = as_array(values, name)
    if array.ndim != 2:
        raise ValueError(
            f"Expected 2D array, got {array.ndim}D array instead for {name} (shape={array.shape}). Reshape your data "
            "using array.reshape(1, -1) if it is a single row, or array.reshape(-1, 1) if it is a single column."
        )
    if array.shape[0] < min_rows:
        raise ValueError(
            f"Found array with {array.shape[0]} sample(s) (shape={array.shape}) for {name} "
            f"while a minimum of {min_rows} is required."
        )
    if array.shape[1] < 1:
        raise ValueError(f"Found array with 0 feature(s) (shape={array.shape}) while a minimum of 1 is required.")
    return _as_float32(array, name)


def as_codes(values: Any, row_bytes: int) -> NDArray[np.uint8]:
    """Codes as ``transform`` returned them: uint8 of shape (n_rows, row_bytes), C-contiguous.

    Raises
    ------
    TypeError
        Another dtype than uint8.
    ValueError
        Another width than ``row_bytes``.
    """
    codes = _container_to_array(values, "codes")
    if codes.dtype != np.uint8:
        raise TypeError(f"codes must be uint8, as transform returns them, not {codes.dtype}.")
    if codes.ndim != 2 or codes.shape[1] != row_bytes:
        raise ValueError(
            f"codes must have shape (n_rows, {row_bytes}), as transform returns them here, not {codes.shape}."
        )
    return np.ascontiguousarray(codes)


def as_weights(sample_weight: ArrayLike | None, n_rows: int) -> NDArray[np.float64] | None:
    """One float64 weight a row; None stays None, and a number is repeated.

    Raises
    ------
    ValueError
        Not one-dimensional, or not one weight a row. Negative, non-finite and all-zero weights are refused in Rust.
    """
    if sample_weight is None:
        return None
    if isinstance(sample_weight, Number):
        try:
            return np.full(n_rows, sample_weight, dtype=np.float64)
        except OverflowError as error:
            raise ValueError(
                "sample_weight is a number beyond float64: weights matter only by their ratios."
            ) from error
    weights = as_array(sample_weight, "sample_weight")
    if weights.ndim != 1:
        raise ValueError(
            f"Sample weights must be 1D array or scalar, got {weights.ndim}D array (shape={weights.shape})."
        )
    if weights.shape != (n_rows,):
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(n_rows,)}: one weight a row.")
    return np.ascontiguousarray(weights, dtype=np.float64)


def as_seed(random_state: RandomState) -> int:
    """An unsigned 64-bit seed: an int itself, else one draw from a generator, and from numpy's global one for None.

    Raises
    ------
    ValueError
        A negative int, one of more than 64 bits, or another type.

    Examples
    --------
    >>> from vqrs._validation import as_seed
    >>> as_seed(7)
    7
    """
    if random_state is None:
        # The generator behind np.random.seed, so that scripts which seed it repeat.
        random_state = np.random.mtrand._rand  # type: ignore[attr-defined]
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**64, dtype=np.uint64))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**64, dtype=np.uint64))
    if isinstance(random_state, Integral) and 0 <= random_state < 2**64:
        return int(random_state)
    raise ValueError(
        f"random_state={random_state!r} cannot be used to seed: pass None, an int in [0, 2**64), "
        "a numpy RandomState or a numpy Generator."
    )


def as_size(value: int, name: str) -> int:
    """A size in 64 bits.

    Raises
    ------
    TypeError
        Not an int.
    ValueError
        One of more bits.
    """
    size = operator.index(value)
    if size.bit_length() > 63:
        raise ValueError(f"{name} has {size.bit_length()} bits: sizes have up to 63")
    return size


def as_jobs(n_jobs: int | None) -> int | None:
    """Number of threads; None leaves the choice to the compiled module, and -1 is all, -2 all but one, as in joblib.

    Raises
    ------
    TypeError
        Not an int.
    ValueError
        Zero.
    """
    if n_jobs is None:
        return None
    if not isinstance(n_jobs, Integral) or isinstance(n_jobs, bool):
        raise TypeError(f"n_jobs must be None or an int, not {n_jobs!r}.")
    if n_jobs == 0:
        raise ValueError("n_jobs=0 has no meaning: pass a number of threads, -1 for all, or None for the default.")
    if n_jobs > 0:
        return min(int(n_jobs), _MAX_JOBS)
    return max(1, _core.hardware()["threads"] + 1 + int(n_jobs))


def as_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Plain Python values of parameters.

    Numpy scalars, as parameter grids make them, are unwrapped; a quantizer becomes its kind with its parameters.
    """
    return {name: _as_parameter(name, value) for name, value in parameters.items()}


def _as_parameter(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if name == "residual" and value is not None and not isinstance(value, Mapping):
        if isinstance(value, type) or not hasattr(value, "_core_parameters"):
            raise TypeError(f"residual must be a quantizer or None, not {value!r}")
        return {"kind": value._kind, "parameters": value._core_parameters()}
    return value


def as_array(values: Any, name: str = "X") -> NDArray[Any]:
    """An array of real numbers of any shape, strides and dtype, without a copy where possible.

    Raises
    ------
    TypeError
        Sparse input, or a dtype that is no real number.
    ValueError
        Complex numbers or text.
    """
    array = _container_to_array(values, name)
    if array.dtype.kind == "O":
        try:
            array = array.astype(np.float64)
        except OverflowError as error:
            raise ValueError(f"{name} holds a number beyond float64: scale the data down first.") from error
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} has dtype {array.dtype}.")
    if array.dtype.kind in "US":
        raise ValueError(f"{name} holds text (dtype {array.dtype}), numbers are needed: convert it first.")
    # Also true of the dtypes of the package ml_dtypes (bfloat16, float8), which have no kind of their own.
    if not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise TypeError(f"{name} has dtype {array.dtype}, which is no real number.")
    return array


def as_ids(ids: Any, n_rows: int) -> NDArray[Any]:
    """Row numbers as the compiled module takes them, or names, in the shape that they were given.

    Parameters
    ----------
    ids : int, str, or array-like of either
        As in ``Table.lookup``. A mask becomes the numbers of its rows.
    n_rows : int
        Rows of the table.

    Returns
    -------
    ndarray
        C-contiguous int64 or int32, which may still be out of range; or an array of str, of dtype object.

    Raises
    ------
    IndexError
        Ids that are no array, masked, of another type, or beyond 64 bits; the message names the first bad position,
        counted in the flattened ids.

    Examples
    --------
    >>> from vqrs._validation import as_ids
    >>> as_ids([3, -1], 5), as_ids([True, False, True], 3), as_ids("a", 5)
    (array([ 3, -1]), array([0, 2]), array('a', dtype=object))
    """
    if isinstance(ids, bool):
        raise IndexError(f"a table cannot be indexed by {ids}: pass a row number, or a mask of one bool a row")
    array = _ids_to_array(ids)
    kind = array.dtype.kind
    if kind == "b":
        if array.shape != (n_rows,):
            raise IndexError(f"a boolean mask must have shape ({n_rows},), one bool a row, not {array.shape}")
        return np.flatnonzero(array).astype(np.int64, copy=False)
    if array.size == 0 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int64)  # numpy makes float64 of an empty list
    elif kind not in "iu":
        return _ids_one_by_one(ids, array, n_rows)
    if _may_pass_int64(array) and (beyond := array >= n_rows).any():
        position = int(np.argmax(beyond))
        raise _id_error(int(array.flat[position]), position, n_rows)
    return np.require(array, array.dtype if array.dtype == np.int32 else np.int64, ("C", "A"))


def _ids_to_array(ids: Any) -> NDArray[Any]:
    if isinstance(ids, np.ma.MaskedArray) and np.ma.is_masked(ids):
        position = np.flatnonzero(np.ma.getmaskarray(ids))[0]
        raise IndexError(f"ids are masked at position {position}: a row that is not there cannot be looked up")
    try:
        return np.asarray(ids)
    except RuntimeError as error:  # of torch: sparse, nested, or with a gradient
        raise IndexError(f"ids of type {type(ids).__name__} are no array of row numbers: {error}") from error
    except (ValueError, OverflowError) as error:
        if not isinstance(ids, (list, tuple)):
            raise IndexError(f"ids of type {type(ids).__name__} are no array of row numbers: {error}") from error
        raise IndexError(f"ids are ragged at position {_ragged_position(ids)}: {error}") from error


def _ragged_position(ids: list[Any] | tuple[Any, ...]) -> int:
    """The first element whose shape is not that of those before it."""
    first: tuple[int, ...] | None = None
    for position, element in enumerate(ids):
        try:
            shape = np.shape(element)
        except (ValueError, OverflowError):
            return position
        if first not in (None, shape):
            return position
        first = shape
    return 0


def _ids_one_by_one(ids: Any, array: NDArray[Any], n_rows: int) -> NDArray[Any]:
    """Ids that numpy has no integer type for: names, integers of any size, and what is neither."""
    values = _elements(ids, array)
    found: list[Any] = []
    if array.size == 0 and array.dtype.kind not in "OTU":
        raise IndexError(f"rows are looked up by integers, a boolean mask or names, not by {array.dtype}")
    for position, value in enumerate(values):
        if isinstance(value, str):
            element: Any = value
        elif isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise IndexError(
                f"rows are looked up by integers, a boolean mask or names, not by {array.dtype}: position {position} "
                f"holds {reprlib.repr(value)}, a {type(value).__name__}"
            )
        else:
            element = value.__index__()
            if not -n_rows <= element < n_rows:
                raise _id_error(element, position, n_rows)
        if found and isinstance(element, str) is not isinstance(found[0], str):
            raise IndexError(f"ids are row numbers or names, not both: position {position} holds {reprlib.repr(value)}")
        found.append(element)
    return np.array(found, object if found and isinstance(found[0], str) else np.int64).reshape(array.shape)


def _elements(values: Any, array: NDArray[Any]) -> Iterator[Any]:
    """The values as they were given: numpy makes a float of an integer that stands beside one."""
    if isinstance(values, np.ndarray):
        return map(_plain, array.flat)
    return iter(np.asarray(values, dtype=object).flat)


def _plain(value: Any) -> Any:
    # Times become plain numbers, which they must not be taken for.
    return value.item() if isinstance(value, np.generic) and value.dtype.kind not in "mM" else value


def _may_pass_int64(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "u" and array.dtype.itemsize == 8  # in any order of bytes


def _id_error(number: int, position: int, n_rows: int) -> IndexError:
    shown = str(number) if number.bit_length() <= 1024 else f"of {number.bit_length()} bits"
    return IndexError(
        f"id {shown} at position {position} is out of range for a table of {n_rows} rows: ids are integers from "
        f"{-n_rows} to {n_rows - 1}"
    )


def as_offsets(offsets: Any) -> NDArray[np.int64]:
    """Where bags begin, C-contiguous; whether they rise is looked at in Rust.

    Raises
    ------
    ValueError
        Not integers in one dimension, masked, or beyond 64 bits; the message names the first bad position.
    """
    if isinstance(offsets, np.ma.MaskedArray) and np.ma.is_masked(offsets):
        raise ValueError(f"offsets are masked at position {np.flatnonzero(np.ma.getmaskarray(offsets))[0]}")
    array = np.asarray(offsets)
    if array.ndim != 1:
        raise ValueError(f"offsets must be integers in one dimension, not {array.dtype} of shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        for position, value in enumerate(_elements(offsets, array)):
            if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
                raise ValueError(
                    f"offsets must be integers in one dimension, not {array.dtype}: position {position} holds "
                    f"{reprlib.repr(value)}"
                )
            if not 0 <= value.__index__() < 2**63:
                raise ValueError(f"offsets has a number beyond the ids at position {position}")
        array = np.array([value.__index__() for value in _elements(offsets, array)], np.int64)
    if _may_pass_int64(array) and (beyond := array > np.iinfo(np.int64).max).any():
        position = int(np.argmax(beyond))
        raise ValueError(f"offsets has {array[position]} at position {position}, which is beyond the ids")
    return np.require(array, np.int64, ("C", "A"))


def as_factors(weights: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One factor for each id of bags, flattened; as they are, NaN and infinity too.

    Raises
    ------
    TypeError
        Sparse input, or a dtype that is no real number.
    ValueError
        Another shape than that of the ids, or a finite value that float32 cannot hold.
    """
    factors = as_array(weights, "weights")
    if factors.shape != shape:
        raise ValueError(f"weights have shape {factors.shape}, expected {shape}, that of the ids")
    try:
        with np.errstate(over="raise"):
            return np.require(factors.reshape(-1), np.float32, ("C", "A"))
    except FloatingPointError:
        beyond = np.isfinite(factors) & (np.abs(factors) > np.finfo(np.float32).max)
        position = int(np.argmax(beyond))
        raise ValueError(
            f"weights has {factors.flat[position]} at position {position}, which is out of the range of float32"
        ) from None


def is_frame(values: Any) -> bool:
    """Whether it is a data frame (pandas, polars): columns with names."""
    return hasattr(values, "columns") and hasattr(values, "to_numpy")


def _container_to_array(values: Any, name: str) -> NDArray[Any]:
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{name} has masked values: fill them first, for example with {name}.filled(0).")
    if isinstance(values, np.ndarray):
        return np.asarray(values)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        return _torch_to_array(values, name)
    if hasattr(values, "toarray") and hasattr(values, "nnz"):
        raise TypeError(
            f"Sparse data was passed for {name}, but dense data is required. Use '{name}.toarray()' to convert it."
        )
    if hasattr(values, "dtypes") and is_frame(values):
        return _frame_to_array(values)
    if hasattr(values, "__dlpack__") and not hasattr(values, "__array__"):
        return np.from_dlpack(values)
    return np.asarray(values)


def _torch_to_array(tensor: Any, name: str) -> NDArray[Any]:
    torch = sys.modules["torch"]
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"Sparse data was passed for {name}, but dense data is required. Use '{name}.to_dense()'.")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on device {tensor.device}: move it to the CPU with {name}.cpu() first.")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    # numpy has no bfloat16 or float8.
    return tensor.float().numpy() if _unknown_to_numpy(tensor) else tensor.numpy()


def _unknown_to_numpy(tensor: Any) -> bool:
    return tensor.is_floating_point() and str(tensor.dtype) not in ("torch.float16", "torch.float32", "torch.float64")


def _frame_to_array(frame: Any) -> NDArray[Any]:
    array = np.asarray(frame)
    if array.dtype.kind == "O" and not all(isinstance(dtype, np.dtype) for dtype in frame.dtypes):
        # pandas' nullable dtypes: missing values become NaN, which is then refused with its row and column.
        return frame.to_numpy(dtype=np.float64, na_value=np.nan)
    return array


def _as_float32(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    try:
        return interruptible(_required, array) if array.nbytes > LARGE else _required(array)
    except FloatingPointError:
        raise _overflow_error(array, name) from None


def _required(array: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="raise"):  # here, because older numpy keeps it for each thread
        return np.require(array, np.float32, ["C_CONTIGUOUS", "ALIGNED"])


def _overflow_error(array: NDArray[Any], name: str) -> ValueError:
    largest: DTypeLike = np.finfo(np.float32).max
    row, column = np.argwhere(np.isfinite(array) & (np.abs(array) > largest))[0]
    return ValueError(
        f"{name} has {array[row, column]!s} at row {row}, column {column}, which is out of the range of float32 "
        f"(largest magnitude {largest:.2e}): scale the data down first."
    )
