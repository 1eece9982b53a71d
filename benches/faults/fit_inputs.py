"""What callers pass to estimators (R16): every value, dtype, stride and container that can be met, and weights."""

import collections
import contextlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from . import Fault, Outcome

DOCUMENTED = (ValueError, TypeError, MemoryError)

T = TypeVar("T")


class Draw(Protocol):
    """Where choices come from: hypothesis, which makes a failing example smaller, or numpy where that is missing."""

    def among(self, choices: list[T]) -> T:
        """One of them."""

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""


class FromNumpy:
    """Choices by a generator."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random

    def among(self, choices: list[T]) -> T:
        return choices[int(self.random.integers(len(choices)))]

    def between(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))


class FromHypothesis:
    """Choices by hypothesis."""

    def __init__(self, data: Any) -> None:
        from hypothesis import strategies

        self.data, self.strategies = data, strategies

    def among(self, choices: list[T]) -> T:
        return choices[self.between(0, len(choices) - 1)]

    def between(self, low: int, high: int) -> int:
        return self.data.draw(self.strategies.integers(low, high))


# ---- rows ----------------------------------------------------------------------------------------------------------


def with_one(value: float) -> Callable[[np.random.Generator, tuple[int, int]], np.ndarray]:
    def make(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        x = random.normal(size=shape)
        if x.size:
            x.flat[random.integers(x.size)] = value
        return x

    return make


def scaled(scale: float) -> Callable[[np.random.Generator, tuple[int, int]], np.ndarray]:
    return lambda random, shape: random.normal(size=shape) * scale


CONTENTS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": scaled(1),
    "zeros": lambda random, shape: np.zeros(shape),
    "negative zeros": lambda random, shape: -np.zeros(shape),
    "all equal": lambda random, shape: np.full(shape, random.normal()),
    "nearly equal": lambda random, shape: 1 + 1e-7 * random.integers(-1, 2, shape),
    "far from zero": lambda random, shape: 1e6 + random.normal(size=shape),
    "duplicates": lambda random, shape: random.normal(size=(2, shape[1]))[random.integers(0, 2, shape[0])],
    "one hot": lambda random, shape: (random.random(shape) < 0.2).astype(float),
    "NaN": with_one(np.nan),
    "infinity": with_one(np.inf),
    "minus infinity": with_one(-np.inf),
    "one 1e14": with_one(1e14),
    "one 1e-40": with_one(1e-40),
    "one 1e30": with_one(1e30),
    "1e30": scaled(1e30),
    "1e38": scaled(1e38),
    "1e300": scaled(1e300),
    "the largest": lambda random, shape: random.choice([-1e15, 1e15], shape),
    "near the largest": scaled(3e14),
    "large": scaled(1e9),
    "1e-6": scaled(1e-6),
    "1e-20": scaled(1e-20),
    "1e-30": scaled(1e-30),
    "1e-38": scaled(1e-38),
    "subnormal": scaled(1e-41),
    "smallest": lambda random, shape: random.integers(-1, 2, shape) * 1.4e-45,
    "rows of all scales": lambda random, shape: (
        random.normal(size=shape) * 10.0 ** random.integers(-44, 15, (shape[0], 1))
    ),
    "columns of all scales": lambda random, shape: (
        random.normal(size=shape) * 10.0 ** random.integers(-44, 15, (1, shape[1]))
    ),
    "all scales": lambda random, shape: random.normal(size=shape) * 10.0 ** random.integers(-44, 15, shape),
    "integers": lambda random, shape: random.integers(-3, 4, shape).astype(float),
}

SHAPES = [(1, 1), (1, 7), (2, 1), (3, 2), (5, 4), (9, 3), (16, 8), (20, 5), (40, 9), (0, 3), (3, 0)]
DTYPES = ["f4", "f8", "f2", ">f4", ">f8", "i1", "i4", ">i8", "u1", "u8", "?", "g", "O", "c8", "U4", "S3", "M8[s]", "V8"]


def transposed(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T).T


def stepped(x: np.ndarray) -> np.ndarray:
    spaced = np.zeros((2 * x.shape[0], 3 * x.shape[1]), x.dtype)
    spaced[::2, 1::3] = x
    return spaced[::2, 1::3]


def backwards(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]


def repeated(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x[:1], x.shape)


def unaligned(x: np.ndarray) -> np.ndarray:
    if x.dtype.hasobject:
        return x
    memory = np.zeros(x.nbytes + 1, np.uint8)
    inside = memory[1:].view(x.dtype).reshape(x.shape)
    inside[...] = x
    return inside


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.setflags(write=False)
    return x


LAYOUTS = [np.asarray, transposed, stepped, backwards, repeated, unaligned, read_only]


class OnlyDlpack:
    """An array of another library."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = np.ascontiguousarray(x)

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self.x.__dlpack_device__()


def ragged(x: np.ndarray) -> Any:
    return [list(row)[: 1 + number] for number, row in enumerate(x)]


def frame(x: np.ndarray) -> Any:
    import pandas

    return pandas.DataFrame(x, columns=[f"c{column}" for column in range(x.shape[1])])


def mixed_frame(x: np.ndarray) -> Any:
    return frame(x).assign(text="a")


def nullable_frame(x: np.ndarray) -> Any:
    return frame(x).convert_dtypes()


def sparse(x: np.ndarray) -> Any:
    import scipy.sparse

    return scipy.sparse.csr_matrix(x)


def tensor(x: np.ndarray) -> Any:
    import torch

    return torch.tensor(x.astype(np.float32))


def half_tensor(x: np.ndarray) -> Any:
    return tensor(x).bfloat16()


def bfloat16(x: np.ndarray) -> Any:
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16)


CONTAINERS: list[tuple[str | None, Callable[[np.ndarray], Any]]] = [
    (None, lambda x: x.tolist()),
    (None, lambda x: [tuple(row) for row in x]),
    (None, lambda x: x[0] if len(x) else x.ravel()),
    (None, lambda x: x[None]),
    (None, lambda x: np.ma.array(x, mask=x > 1)),
    (None, lambda x: np.ma.array(x)),
    (None, np.matrix),
    (None, OnlyDlpack),
    (None, ragged),
    (None, lambda x: None),
    (None, lambda x: "rows"),
    (None, lambda x: object()),
    (None, lambda x: iter(x)),
    (None, lambda x: float(x.sum())),
    ("scipy", sparse),
    ("pandas", frame),
    ("pandas", mixed_frame),
    ("pandas", nullable_frame),
    ("ml_dtypes", bfloat16),
]
TORCH = [tensor, half_tensor]


def draw_rows(draw: Draw) -> tuple[str, Any, np.ndarray]:
    """In words, as the caller has them, and their values."""
    content, shape = draw.among(list(CONTENTS)), draw.among(SHAPES)
    random = np.random.default_rng(draw.between(0, 2**16))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = CONTENTS[content](random, shape)
        form = draw.between(0, 3)
        if form == 0:
            return f"{content} {shape}", values.astype(np.float32), values
        if form < 3:
            dtype, layout = draw.among(DTYPES if form == 1 else DTYPES[:5]), draw.among(LAYOUTS)
            x = layout(values.astype(dtype) if dtype[0] not in "MV" else np.zeros(shape, dtype))
            return f"{content} {shape} {dtype} {getattr(layout, '__name__', 'plain')}", x, values
        known = [make for module, make in CONTAINERS if module is None or importlib.util.find_spec(module)]
        number = draw.between(0, len(known) - 1)
        return f"{content} {shape} container {number}", known[number](values), values


def draw_weights(draw: Draw, n_rows: int) -> tuple[str, Any]:
    random = np.random.default_rng(draw.between(0, 2**16))
    even = random.random(n_rows)
    one = np.arange(n_rows) == (draw.between(0, n_rows - 1) if n_rows else 0)
    forms: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "even": lambda: even,
        "counts": lambda: random.integers(0, 5, n_rows),
        "zeros": lambda: np.zeros(n_rows),
        "one zero": lambda: np.where(one, 0, even),
        "only one": lambda: one.astype(float),
        "one negative": lambda: np.where(one, -1, even),
        "one NaN": lambda: np.where(one, np.nan, even),
        "one infinite": lambda: np.where(one, np.inf, even),
        "1e300": lambda: even * 1e300,
        "1e250": lambda: np.full(n_rows, 1e250),
        "one 1e200": lambda: np.where(one, 1e200, even),
        "1e-300": lambda: even * 1e-300,
        "smallest": lambda: np.full(n_rows, 5e-324),
        "all scales": lambda: 10.0 ** random.integers(-300, 200, n_rows),
        "float16": lambda: even.astype(np.float16),
        "bools": lambda: one,
        "list": even.tolist,
        "number": lambda: 2.0,
        "zero": lambda: 0,
        "NaN": lambda: np.nan,
        "text": lambda: ["a"] * n_rows,
        "complex": lambda: even * 1j,
        "one too many": lambda: np.ones(n_rows + 1),
        "two axes": lambda: np.ones((n_rows, 1)),
        "masked": lambda: np.ma.array(even, mask=one),
        "unaligned": lambda: unaligned(even),
        "objects": lambda: even.astype(object),
        "true": lambda: True,
    }
    name = "none" if draw.between(0, 1) else draw.among(list(forms))
    return name, forms[name]()


# ---- estimators ----------------------------------------------------------------------------------------------------

BOOKS = ["float16", "bfloat16", "float32", "int8"]
ROTATIONS = [None, None, None, None, "random", "dense", "pca", "auto"]
SHARED = {"center": [False, False, True], "rotation": ROTATIONS, "rotation_dtype": ["float16", "int8", "float32"]}
LEVELS = ["float16", "bfloat16", "float8", "int8", "int6", "int4", "int2", "nf4", "float4", "free4"]

PARAMETERS: dict[str, dict[str, list[Any]]] = {
    "kmeans": {"n_clusters": [1, 2, 5, 300], "codebook_dtype": BOOKS, "tol": [1e-4, 0.0]},
    "product": {"n_subvectors": [1, 2, 3, 8, 50], "n_bits": [1, 3, 8], "codebook_dtype": BOOKS},
    "optimized-product": {"n_subvectors": [1, 2, 3], "n_bits": [1, 3], "codebook_dtype": BOOKS[:3]},
    "residual": {"n_stages": [1, 2, 3], "n_bits": [1, 3], "codebook_dtype": BOOKS, "beam_width": [1, 4]},
    "product-residual": {"n_subvectors": [1, 2, 3], "n_stages": [1, 2], "n_bits": [1, 3], "codebook_dtype": BOOKS[:3]},
    "additive": {"n_codebooks": [1, 2, 3], "n_bits": [1, 3], "n_rounds": [1, 2], "codebook_dtype": BOOKS},
    "tree": {"branching": [2, 3], "depth": [1, 2, 3], "beam_width": [1, 4], "codebook_dtype": BOOKS},
    "scalar": {
        "dtype": LEVELS,
        "granularity": ["row", "column", "block"],
        "block_size": [1, 3, 64],
        "symmetric": [True, False],
        "scale_dtype": ["float16", "float8", "bfloat16", "float32"],
    },
    "low-rank": {"n_components": [1, 2, 5], "dtype": LEVELS, "granularity": ["row", "column"]},
    "trellis": {"n_bits": [0.5, 1, 2, 3.3], "state_bits": [4, 6, 8], "bit_allocation": ["uniform", "variance"]},
    "rotated": {"n_bits": [1, 2, 4, 5, 8], "estimator": ["reconstruction", "unbiased"]},
    "sparse": {"density": [0.1, 0.3, 0.5, 0.8], "dtype": ["float16", "float32", "int8", "bfloat16"]},
    "deduplicating": {"codebook_dtype": ["float32", "float16", "bfloat16"], "tolerance": [0.0, 1e-9, 0.1]},
}
ITERATIONS = {"max_iter": 2, "n_iter": 2, "n_refinements": 1, "n_rounds": 2}


def draw_estimator(draw: Draw, kind: str) -> Any:
    import vqrs
    from vqrs import quantizers

    if kind == "KMeans":
        metric, init = draw.among(["euclidean", "cosine"]), draw.among(["k-means++", "random"])
        return vqrs.KMeans(
            draw.among([1, 2, 4, 30]),
            metric=metric,
            init=init,
            n_init=1,
            max_iter=draw.among([1, 3]),
            batch_size=draw.among([None, 4]),
            max_samples=draw.among([None, 8]),
            random_state=0,
            n_jobs=1,
        )
    if kind == "mixed":
        own = [
            vqrs.ScalarQuantizer("int2"),
            vqrs.ScalarQuantizer(draw.among(["int4", "float16"])),
            vqrs.VectorQuantizer(2),
        ]
        by = draw.among(["auto", "norm", "sample_weight", "importance"])
        return vqrs.MixedPrecisionQuantizer(
            own[: draw.between(1, 3)], n_bits=draw.among([2.0, 8.0, 32.0]), by=by, random_state=0
        )
    cls = next(getattr(quantizers, name) for name in quantizers.__all__ if getattr(quantizers, name)._kind == kind)
    known = cls().get_params(deep=False)
    values = {
        name: draw.among(choices) for name, choices in PARAMETERS[kind].items() if name in known and draw.between(0, 2)
    }
    if draw.between(0, 3) == 0:
        values |= {name: draw.among(choices) for name, choices in SHARED.items() if name in known}
    if draw.between(0, 9) == 0 and "residual" in known:
        values["residual"] = draw.among(
            [vqrs.ScalarQuantizer("int4"), vqrs.ProductQuantizer(2, 2), vqrs.VectorQuantizer(3)]
        )
    values |= {name: value for name, value in ITERATIONS.items() if name in known and name not in values}
    values |= {name: 0 for name in ("random_state",) if name in known}
    return cls(**values, n_jobs=1)


class Example(NamedTuple):
    """One fit, in words."""

    estimator: Any
    rows: str
    weights: str

    def __str__(self) -> str:
        return f"{' '.join(str(self.estimator).split())} on {self.rows}, weights {self.weights}"


@contextlib.contextmanager
def only_documented(what: str, problems: list[str]) -> Iterator[None]:
    """Errors that the documentation names pass, if they say something; all else is a problem."""
    try:
        yield
    except DOCUMENTED as error:
        if len(str(error)) < 10:
            problems.append(f"{what}: {type(error).__name__} without words: {error}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problems.append(f"{what}: {type(error).__name__}: {error}")


FITTED: collections.Counter[str] = collections.Counter()
"""Examples that were fitted: a library that refuses all inputs would hold every promise."""


def check(draw: Draw, kind: str) -> list[str]:
    """One example; what did not hold."""
    from sklearn.exceptions import ConvergenceWarning

    rows, x, values = draw_rows(draw)
    n_rows = len(x) if isinstance(x, np.ndarray) and x.ndim else len(values)
    weights, sample_weight = draw_weights(draw, n_rows)
    estimator = draw_estimator(draw, kind)
    problems: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ConvergenceWarning)
        # scikit-learn's own, where names were fitted and arrays follow.
        warnings.filterwarnings("ignore", "X does not have valid feature names, but .* was fitted", UserWarning)
        fitted = False
        with only_documented("fit", problems):
            estimator.fit(x, sample_weight=sample_weight)
            fitted = True
        if fitted:
            FITTED[kind] += 1
            finite("attributes", attributes(estimator), problems)
            use = use_clusters if kind == "KMeans" else use_codes
            use(draw, estimator, x, sample_weight, problems)
    return [f"{Example(estimator, rows, weights)}: {problem}" for problem in problems]


def attributes(estimator: Any) -> list[Any]:
    found = [value for name, value in vars(estimator).items() if name.endswith("_") and not name.startswith("_")]
    return [value for value in found if isinstance(value, (float, np.ndarray, list)) and not of_names(value)]


def of_names(value: Any) -> bool:
    return (isinstance(value, np.ndarray) and value.dtype.kind == "O") or (
        isinstance(value, list) and any(isinstance(entry, tuple) for entry in value)
    )


def finite(what: str, found: Any, problems: list[str]) -> None:
    if isinstance(found, (list, tuple)):
        for entry in found:
            finite(what, entry, problems)
    elif found is not None and not np.isfinite(np.asarray(found, np.float64)).all():
        problems.append(f"{what}: NaN or infinity: {str(found)[:100]}")


def use_codes(draw: Draw, quantizer: Any, x: Any, sample_weight: Any, problems: list[str]) -> None:
    """Encodes, decodes and keeps the rows that were fitted, and others."""
    if quantizer.relative_error_ < 0:
        problems.append(f"relative_error_ {quantizer.relative_error_}")
    codes = quantizer.transform(x)
    decoded = quantizer.inverse_transform(codes)
    finite("decoded", decoded, problems)
    if (
        decoded.shape != (len(codes), quantizer.n_features_in_)
        or decoded.dtype != np.float32
        or codes.dtype != np.uint8
    ):
        problems.append(f"decoded {decoded.dtype} {decoded.shape} of {len(codes)} codes")
    with only_documented("score", problems):
        finite("score", quantizer.score(x, sample_weight=sample_weight), problems)
    with only_documented("compress", problems):
        table = quantizer.compress(x, sample_weight=sample_weight)
        finite("table", table.to_numpy(), problems)
        known = table.info()["errors"]
        finite(
            f"errors {known}",
            [np.nan if error is None else error for name, error in known.items() if name != "above_bound_db"],
            problems,
        )
    others = draw.between(0, 5)
    random = np.random.default_rng(draw.between(0, 2**16))
    dim = quantizer.n_features_in_
    if others == 0:
        with only_documented("transform of others", problems):
            with np.errstate(all="ignore"):
                other = CONTENTS[draw.among(list(CONTENTS))](random, (3, dim)).astype(np.float32)
            finite("others", quantizer.inverse_transform(quantizer.transform(other)), problems)
    elif others == 1:
        with only_documented("transform of another width", problems):
            quantizer.transform(random.normal(size=(2, dim + 1)))
            problems.append("another width was encoded")
    elif others == 2:
        with only_documented("any codes", problems):
            any_codes = random.integers(0, 256, (4, quantizer.row_bytes_), dtype=np.uint8)
            finite("any codes", quantizer.inverse_transform(any_codes), problems)
    elif others == 3:
        wrong = [codes.astype(np.int64), codes[:, :-1], np.hstack([codes, codes[:, :1]]), codes[0], None, [[1.5]], "a"]
        with only_documented("wrong codes", problems):
            quantizer.inverse_transform(draw.among(wrong))
            if codes.shape[1]:
                problems.append("wrong codes were decoded")


def use_clusters(draw: Draw, kmeans: Any, x: Any, sample_weight: Any, problems: list[str]) -> None:
    """Predicts for the rows that were fitted, and goes on with others."""
    finite("distances", kmeans.transform(x), problems)
    labels = kmeans.predict(x)
    if len(labels) and not 0 <= labels.min() <= labels.max() < kmeans.n_clusters:
        problems.append(f"labels {labels}")
    with only_documented("score", problems):
        finite("score", kmeans.score(x, sample_weight=sample_weight), problems)
    random = np.random.default_rng(draw.between(0, 2**16))
    for _ in range(2):
        with only_documented("partial_fit", problems):
            batch = CONTENTS[draw.among(list(CONTENTS))](random, (4, kmeans.n_features_in_))
            weights = draw_weights(draw, 4)[1]
            kmeans.partial_fit(batch, sample_weight=weights)
            finite("after partial_fit", attributes(kmeans), problems)


# ---- counting ------------------------------------------------------------------------------------------------------


def kinds() -> list[str]:
    import vqrs

    return [*(entry["name"] for entry in vqrs.kinds()), "mixed", "KMeans"]


def fits(count: int, random: np.random.Generator, folder: Path) -> Outcome:
    """As many of each kind."""
    import sklearn

    FITTED.clear()
    outcome, each = Outcome(), -(-count // len(kinds()))
    backend = through_hypothesis if importlib.util.find_spec("hypothesis") else through_numpy
    # The estimators' own checks of parameters take longer than a fit of so few rows; they are tested elsewhere.
    with sklearn.config_context(skip_parameter_validation=True):
        for kind in kinds():
            backend(kind, each, int(random.integers(2**32)), outcome)
    for kind in kinds():
        outcome.add(FITTED[kind] >= each // 25, f"{kind}: only {FITTED[kind]} of {each} examples could be fitted")
    outcome.note = f"{len(kinds())} kinds, {each:,} examples each, {backend.__name__.replace('_', ' ')}"
    return outcome


def through_numpy(kind: str, count: int, seed: int, outcome: Outcome) -> None:
    random = np.random.default_rng(seed)
    for _ in range(count):
        problems = check(FromNumpy(random), kind)
        outcome.add(not problems, "; ".join(problems[:3]))


def through_hypothesis(kind: str, count: int, seed: int, outcome: Outcome) -> None:
    import hypothesis
    from hypothesis import HealthCheck, Phase, strategies

    tried = itertools.count()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @hypothesis.given(strategies.data())
    def examples(data: Any) -> None:
        problems = check(FromHypothesis(data), kind)
        next(tried)
        assert not problems, "; ".join(problems[:3])

    try:
        examples()
    except Exception as error:
        outcome.add(False, error)
    outcome.tried += next(tried)
    outcome.held = outcome.tried - len(outcome.failures)


FAULTS = [
    Fault(
        "R16",
        "fits on NaN, infinity, subnormal, huge, equal, too few rows; every dtype, stride, container and weight",
        "a result without NaN or infinity, or ValueError, TypeError or MemoryError in words; no stray warning",
        fits,
        600,
        150_000,
        slow=True,
        needs=lambda: None if importlib.util.find_spec("sklearn") else "scikit-learn is not installed",
    ),
]
