"""Types of the compiled module ``vqrs._core``.

The border only converts: arrays must already be C-contiguous and of the dtype named here. Parameters, shapes, ids and
files are checked in Rust, which raises ``ValueError``, ``IndexError``, ``TypeError``, ``OSError`` and its children,
``TableError`` and its children, or ``InternalError``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

__version__: str

class TableError(ValueError): ...
class TableCorruptError(TableError): ...
class TableVersionError(TableError): ...
class InternalError(RuntimeError): ...

Progress = Callable[[str, int, int], object]
"""Called now and then from the calling thread with (stage, done, total)."""

def kinds() -> list[dict[str, Any]]:
    """One dict a quantizer: ``name``, ``about``, ``form``, ``parameters`` (name -> default)."""

def hardware() -> dict[str, Any]:
    """``simd`` (path in use), ``available`` (paths this CPU has), ``threads``, ``architecture``."""

def intact_at(addresses: list[int]) -> None:
    """Raises TableCorruptError where memory at one of these addresses is that of a mapped file that was found cut."""

def estimate(kind: str, parameters: Mapping[str, Any], n_rows: int, n_features: int) -> int:
    """Bytes of the table's file (names and user metadata aside)."""

def fit(
    kind: str,
    parameters: Mapping[str, Any],
    x: NDArray[np.float32],
    *,
    sample_weight: NDArray[np.float64] | None = None,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: Progress | None = None,
    keep_better_codes: bool = False,
) -> tuple[Codec, NDArray[np.uint8]]:
    """Learns from x of shape (n, d). Returns the codec and the codes of x, uint8 (n, row_bytes), equal to
    ``codec.encode(x)``; with ``keep_better_codes`` a row keeps the code that the fit found where that is better."""

@final
class Codec:
    """A quantizer with the decoder it learned."""

    kind: str
    form: str
    parameters: dict[str, Any]
    dim: int
    row_bytes: int
    n_iter: int
    relative_error: float
    """Of the rows it was fitted on, with the codes that ``fit`` returned."""
    notes: list[str]
    """What the fit had to shrink; the caller raises each as a ``ConvergenceWarning``."""
    def encode(
        self, x: NDArray[np.float32], *, n_jobs: int | None = None, progress: Progress | None = None
    ) -> NDArray[np.uint8]: ...
    def decode(self, codes: NDArray[np.uint8], *, n_jobs: int | None = None) -> NDArray[np.float32]: ...
    def description(self) -> str:
        """The decoder as a JSON object: ``form`` and what the form needs."""
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The decoder's tensors as stored (bfloat16 as uint16)."""
    def books(self) -> list[NDArray[np.float32]]:
        """For form "books": each codebook as float32 (entries, width), the scale applied, padding entries left out."""
    def to_parts(self) -> tuple[str, dict[str, NDArray[Any]]]:
        """A JSON string and tensors from which ``from_parts`` makes an equal codec (for pickle)."""
    @staticmethod
    def from_parts(description: str, tensors: Mapping[str, NDArray[Any]]) -> Codec: ...

@final
class Table:
    """A decoder with its codes, in memory or mapped."""

    @staticmethod
    def open(path: str, verify: Literal["header", "lazy", "full"], mode: Literal["mmap", "read"]) -> Table: ...
    @staticmethod
    def from_codec(
        codec: Codec,
        codes: NDArray[np.uint8],
        *,
        errors: Mapping[str, float],
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Table:
        """``errors`` holds at least ``relative``; see ``info``."""
    @staticmethod
    def from_parts(
        description: str,
        tensors: Mapping[str, NDArray[Any]],
        codes: NDArray[np.uint8],
        *,
        errors: Mapping[str, float],
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        borrow: bool = False,
    ) -> Table:
        """A table in memory from JSON text with its kind, parameters and decoder, the decoder's tensors, and codes, which
        are copied unless the table may ``borrow`` the array."""
    @staticmethod
    def from_groups(
        codecs: Sequence[Codec],
        codes: Sequence[NDArray[np.uint8]],
        group_of: NDArray[np.uint8],
        *,
        kind: str,
        parameters: Mapping[str, Any],
        errors: Mapping[str, float],
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Table:
        """A table in memory of groups of rows with a codec each: ``group_of`` tells each row's, ``codes`` are the groups'
        own, their rows in the order of the table."""
    def with_tensors(self, tensors: Mapping[str, NDArray[Any]]) -> Table:
        """The same codes, names and metadata with other values in the decoder's tensors (same names and shapes;
        float32 values are rounded to the stored type). ``relative_error`` becomes NaN: it is no longer known."""
    def with_metadata(self, names: Sequence[str] | None, metadata: Mapping[str, str]) -> Table: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def form(self) -> str: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the file, written or not."""
    @property
    def path(self) -> str | None: ...
    @property
    def mapped(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    @property
    def relative_error(self) -> float: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def names(self) -> list[str] | None: ...
    def find(self, name: str) -> int | None:
        """Row of a name, None if there is none. The first of equal names."""
    def codec(self) -> Codec:
        """The codec inside: encodes new rows."""
    def info(self) -> str:
        """JSON object: everything in the header (kind, form, parameters, rows, dim, errors, version, tensors, ...)."""
    def lookup(
        self,
        ids: Any,
        out: Any = None,
        n_jobs: int | None = None,
        dtype: str | None = None,
    ) -> Any:
        """Rows of C-contiguous int32 or int64 ids of any shape: (*ids.shape, dim), float32 unless ``out`` or ``dtype``
        says float16 or bfloat16 (as uint16). None, and nothing done, if ids or out is no such array.
        Negative ids count from the end."""
    def decode(
        self,
        start: int,
        stop: int,
        out: Any = None,
        n_jobs: int | None = None,
        dtype: str | None = None,
    ) -> Any:
        """Rows start..stop."""
    def pool(
        self,
        ids: Any,
        offsets: NDArray[np.int64],
        weights: NDArray[np.float32] | None,
        mode: Literal["sum", "mean", "max"],
        out: Any = None,
        n_jobs: int | None = None,
        dtype: str | None = None,
    ) -> Any:
        """Bag b is ids[offsets[b]:offsets[b + 1]] of the flattened ids, the last one up to the end; empty bags give zeros.
        (len(offsets), dim); dtypes as in ``lookup``."""
    def lookup_at(self, ids: int, count: int, wide: bool, out: int, dtype: str, threads: int) -> None:
        """``lookup`` between addresses, for tensors of torch: ``count`` ids (int64 if ``wide``, else int32) into as many
        rows of float32, float16 or bfloat16. The caller answers for the memory. Negative ids are refused. No more
        than ``threads`` work at it."""
    def pool_at(
        self,
        ids: int,
        count: int,
        wide: bool,
        offsets: int | None,
        bags: int,
        weights: int | None,
        mode: Literal["sum", "mean", "max"],
        out: int,
        dtype: str,
        threads: int,
    ) -> None:
        """``pool`` between addresses: offsets are int64 (None: bags of equal size), weights float32."""
    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        metric: Literal["inner_product", "l2", "cosine"],
        n_jobs: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Best k rows of each query by exact scan: (scores or squared distances, ids), each (n_queries, min(k, n_rows)), best
        first, ties by lower id. inner_product and cosine: larger is better; l2: squared distance, smaller is better."""
    def codes(self) -> NDArray[np.uint8]:
        """(n_rows, row_bytes), zero-copy: keeps the mapping alive. Writing to it changes this process's copy only."""
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The decoder's tensors, zero-copy (bfloat16 as uint16)."""
    def intact(self) -> None:
        """Raises TableCorruptError where the mapped file was found cut: for those who read ``codes`` themselves, before
        (so that a cut does not end the process) and after."""
    def save(self, path: str, *, durable: bool = True, n_jobs: int | None = None) -> int:
        """Writes the file; returns its bytes."""
    def verify(self, n_jobs: int | None = None) -> None:
        """Every byte of a file's table against its checksums, and every scale inside rows; raises TableCorruptError."""
    def close(self) -> None: ...

@final
class TableWriter:
    """Streams a table to a file in bounded memory."""

    def __new__(
        cls,
        path: str,
        codec: Codec,
        *,
        names: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> TableWriter: ...
    def write(
        self,
        x: NDArray[np.float32],
        *,
        sample_weight: NDArray[np.float64] | None = None,
        n_jobs: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Encodes and appends a block of rows, float32 (n, dim)."""
    def finish(self, errors: Mapping[str, float] | None = None) -> int:
        """Completes the file under its name; returns its bytes. The relative errors are measured on the way;
        ``errors`` adds others, for example ``gaussian_bound``."""
    def abort(self) -> None:
        """Removes what was written."""

def check_rows(x: NDArray[np.float32], sample_weight: NDArray[np.float64] | None = None) -> None:
    """Refuses rows and weights that a fit refuses: not finite, too large, negative."""

def reconstruction_errors(
    x: NDArray[np.float32],
    codes: NDArray[np.uint8],
    codec: Codec,
    sample_weight: NDArray[np.float64] | None = None,
    n_jobs: int | None = None,
) -> dict[str, float]:
    """``relative`` (squared error over squared norm), ``centred`` (over the squared norm after removing the mean row;
    not for rows that are all equal) and, with weights, ``weighted``."""

def kmeans_fit(
    x: NDArray[np.float32],
    n_clusters: int,
    *,
    init: str | NDArray[np.float32] | None = None,
    n_init: int = 1,
    sample_weight: NDArray[np.float64] | None = None,
    max_iter: int = 300,
    tol: float = 1e-4,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    batch_size: int | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: Progress | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32], float, int, int]:
    """(centers, labels, inertia, n_iter, distinct): ``init`` None is "k-means++", ``distinct`` < n_clusters when seeding ran out of distinct rows."""

def kmeans_predict(
    x: NDArray[np.float32], centers: NDArray[np.float32], metric: str, n_jobs: int | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Labels and squared distances (cosine: 1 - cosine) of the nearest centres; exact arg-min, ties to the lowest index."""

def kmeans_transform(
    x: NDArray[np.float32], centers: NDArray[np.float32], metric: str, n_jobs: int | None = None
) -> NDArray[np.float32]:
    """Distances (not squared; cosine: 1 - cosine) to all centres, float32 (n, k)."""
