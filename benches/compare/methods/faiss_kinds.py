"""The quantizers of Faiss: product codes train on all rows for 25 iterations unless told otherwise.

``nbytes`` counts what decoding needs; ``value_bytes`` is 4 as Faiss stores codebooks and rotations, or 2 as float16
would, which changes no error that is compared.
"""

from abc import ABC, abstractmethod
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray


class FaissMethod(ABC):
    """What the quantizers of Faiss share; ``make`` builds one."""

    library = f"faiss {faiss.__version__}"
    value_bytes = 4
    train_rows: int | None = None
    """At most so many random rows train; None for all."""

    def __init__(self, **settings: object) -> None:
        self.settings: dict[str, object] = {"class": type(self).__name__, **settings}

    def fit(self, x: NDArray[np.float32]) -> None:
        if self.train_rows is not None and len(x) > self.train_rows:
            x = x[np.sort(np.random.default_rng(0).choice(len(x), self.train_rows, replace=False))]
        self.quantizer = self.make(*x.shape)
        self.quantizer.train(x)

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self.quantizer.compute_codes(x)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.quantizer.decode(codes)

    def nbytes(self, n_rows: int) -> int:
        return n_rows * self.quantizer.code_size + self.decoder_values() * self.value_bytes

    @abstractmethod
    def make(self, n_rows: int, n_features: int) -> Any:
        """The untrained quantizer."""

    @abstractmethod
    def decoder_values(self) -> int:
        """Float32 values that decoding needs."""


class Product(FaissMethod):
    def __init__(self, n_subvectors: int, n_bits: int) -> None:
        super().__init__(n_subvectors=n_subvectors, n_bits=n_bits, niter=25)

    def make(self, n_rows: int, n_features: int) -> "faiss.ProductQuantizer":
        quantizer = faiss.ProductQuantizer(n_features, self.settings["n_subvectors"], self.settings["n_bits"])
        quantizer.cp.niter = self.settings["niter"]
        quantizer.cp.max_points_per_centroid = n_rows
        return quantizer

    def decoder_values(self) -> int:
        return faiss.vector_to_array(self.quantizer.centroids).size


class Residual(FaissMethod):
    """Its default training, which samples 65,536 of the sums that its beam keeps; all of them take it 17 minutes."""

    def __init__(self, n_stages: int, n_bits: int, beam_width: int) -> None:
        super().__init__(n_stages=n_stages, n_bits=n_bits, beam_width=beam_width)

    def make(self, n_rows: int, n_features: int) -> "faiss.ResidualQuantizer":
        quantizer = faiss.ResidualQuantizer(n_features, self.settings["n_stages"], self.settings["n_bits"])
        quantizer.max_beam_size = self.settings["beam_width"]
        return quantizer

    def decoder_values(self) -> int:
        return faiss.vector_to_array(self.quantizer.codebooks).size


class ProductResidual(FaissMethod):
    """Residual codes of each of ``n_subvectors`` parts."""

    def __init__(self, n_subvectors: int, n_stages: int, n_bits: int) -> None:
        super().__init__(n_subvectors=n_subvectors, n_stages=n_stages, n_bits=n_bits)

    def make(self, n_rows: int, n_features: int) -> "faiss.ProductResidualQuantizer":
        settings = (self.settings[name] for name in ("n_subvectors", "n_stages", "n_bits"))
        return faiss.ProductResidualQuantizer(n_features, *settings)

    def decoder_values(self) -> int:
        return self.settings["n_stages"] * self.quantizer.d << self.settings["n_bits"]


class LocalSearch(FaissMethod):
    """Additive codes by iterated local search, with the library's own 25 iterations."""

    def __init__(self, n_codebooks: int, n_bits: int) -> None:
        super().__init__(n_codebooks=n_codebooks, n_bits=n_bits)

    def make(self, n_rows: int, n_features: int) -> "faiss.LocalSearchQuantizer":
        return faiss.LocalSearchQuantizer(n_features, self.settings["n_codebooks"], self.settings["n_bits"])

    def decoder_values(self) -> int:
        return self.settings["n_codebooks"] * self.quantizer.d << self.settings["n_bits"]


class Rotated(FaissMethod):
    """A linear transform in front of a quantizer; the matrix is counted."""

    transform: Any

    def fit(self, x: NDArray[np.float32]) -> None:
        self.n_features = x.shape[1]
        self.mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        self.learn_rotation(x - self.mean)
        super().fit(self.transform.apply(x - self.mean))

    @abstractmethod
    def learn_rotation(self, x: NDArray[np.float32]) -> None:
        """Sets ``transform`` from rows without their mean."""

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        return super().encode(self.transform.apply(x - self.mean))

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.transform.reverse_transform(super().decode(codes)) + self.mean

    def decoder_values(self) -> int:
        return self.n_features * (self.n_features + 1)


class OptimizedProduct(Rotated):
    """Product codes behind a rotation that is learned in 25 iterations on 20,480 rows: more of either takes hours, and
    changes the third digit.
    """

    def __init__(self, n_subvectors: int, n_bits: int) -> None:
        super().__init__(n_subvectors=n_subvectors, n_bits=n_bits, niter=25, rotation_rows=20_480)

    def learn_rotation(self, x: NDArray[np.float32]) -> None:
        self.transform = faiss.OPQMatrix(self.n_features, self.settings["n_subvectors"])
        self.transform.pq = self._inner = self.make(*x.shape)
        self.transform.niter, self.transform.max_train_points = self.settings["niter"], self.settings["rotation_rows"]
        self.transform.train(x)

    def make(self, n_rows: int, n_features: int) -> "faiss.ProductQuantizer":
        return faiss.ProductQuantizer(n_features, self.settings["n_subvectors"], self.settings["n_bits"])

    def decoder_values(self) -> int:
        return super().decoder_values() + faiss.vector_to_array(self.quantizer.centroids).size


class RotatedLevels(Rotated):
    """Levels of a normal distribution (``QT_nbit_eden``) behind a random rotation, each row scaled to unit variance and
    given the least-squares scale in float16, which Faiss leaves to its caller.
    """

    def __init__(self, n_bits: int) -> None:
        super().__init__(n_bits=n_bits)

    def learn_rotation(self, x: NDArray[np.float32]) -> None:
        self.transform = faiss.RandomRotationMatrix(self.n_features, self.n_features)
        self.transform.init(1)

    def make(self, n_rows: int, n_features: int) -> Any:
        name = f"QT_{self.settings['n_bits']}bit_eden"
        return faiss.ScalarQuantizer(n_features, getattr(faiss.ScalarQuantizer, name))

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        y = self.transform.apply(x - self.mean)
        norms = np.linalg.norm(y, axis=1, keepdims=True)
        unit = y * (np.sqrt(self.n_features) / np.maximum(norms, 1e-30))
        codes = self.codes_of(unit)
        levels = self.levels_of(codes)
        scales = (y * levels).sum(axis=1) / np.maximum((levels**2).sum(axis=1), 1e-30)
        return np.hstack([codes, scales.astype(np.float16)[:, None].view(np.uint8)])

    def codes_of(self, unit: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self.quantizer.compute_codes(unit)

    def levels_of(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.quantizer.decode(np.ascontiguousarray(codes))

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        scales = np.ascontiguousarray(codes[:, -2:]).view(np.float16).astype(np.float32)
        return self.transform.reverse_transform(self.levels_of(codes[:, :-2]) * scales) + self.mean

    def nbytes(self, n_rows: int) -> int:
        return n_rows * (self.quantizer.code_size + 2) + self.decoder_values() * self.value_bytes


class RaBitQ(RotatedLevels):
    """Its codes of 1 to 9 bits, read back with the least-squares scale of each row in two bytes. Faiss keeps 8 to 20
    bytes of factors a row for its estimates, and its own ``decode`` reads the signs alone; this is its best.
    """

    def make(self, n_rows: int, n_features: int) -> Any:
        return faiss.RaBitQuantizer(n_features, faiss.METRIC_L2, self.settings["n_bits"])

    def codes_of(self, unit: NDArray[np.float32]) -> NDArray[np.uint8]:
        codes = self.quantizer.compute_codes(unit)
        size, n_bits = -(-self.n_features // 8), self.settings["n_bits"]
        extra = -(-self.n_features * (n_bits - 1) // 8)
        start = size + (8 if n_bits == 1 else 12)
        return np.hstack([codes[:, :size], codes[:, start : start + extra]])

    def levels_of(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        size, extra_bits = -(-self.n_features // 8), self.settings["n_bits"] - 1
        signs = np.unpackbits(codes[:, :size], axis=1, count=self.n_features, bitorder="little").astype(np.float32)
        if extra_bits == 0:
            return 2 * signs - 1
        count = self.n_features * extra_bits
        bits = np.unpackbits(codes[:, size:], axis=1, count=count, bitorder="little")
        bits = bits.reshape(len(codes), self.n_features, extra_bits)
        extra = bits @ (1 << np.arange(extra_bits)).astype(np.float32)
        return signs * 2**extra_bits + extra - (2 ** (extra_bits + 1) - 1) / 2

    def nbytes(self, n_rows: int) -> int:
        code_bytes = -(-self.n_features // 8) + -(-self.n_features * (self.settings["n_bits"] - 1) // 8)
        return n_rows * (code_bytes + 2) + self.decoder_values() * self.value_bytes


class Scalar(FaissMethod):
    """``dtype`` is the ending of Faiss's name: 8bit, 4bit, fp16, bf16. Ranges are the extremes of each column."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype=dtype)

    def make(self, n_rows: int, n_features: int) -> "faiss.ScalarQuantizer":
        return faiss.ScalarQuantizer(n_features, getattr(faiss.ScalarQuantizer, f"QT_{self.settings['dtype']}"))

    def decoder_values(self) -> int:
        return faiss.vector_to_array(self.quantizer.trained).size
