"""The quantizers of Faiss: product codes train on all rows for 25 iterations."""

from abc import ABC, abstractmethod
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray


class FaissMethod(ABC):
    """What the quantizers of Faiss share; ``make`` builds one."""

    library = f"faiss {faiss.__version__}"

    def __init__(self, **settings: object) -> None:
        self.settings: dict[str, object] = {"class": type(self).__name__, **settings}

    def fit(self, x: NDArray[np.float32]) -> None:
        self.quantizer = self.make(*x.shape)
        self.quantizer.train(x)

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self.quantizer.compute_codes(x)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.quantizer.decode(codes)

    def nbytes(self, n_rows: int) -> int:
        return n_rows * self.quantizer.code_size + self.decoder_values() * 4

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


class Scalar(FaissMethod):
    """``dtype`` is the ending of Faiss's name: 8bit, 4bit, fp16, bf16. Ranges are the extremes of each column."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype=dtype)

    def make(self, n_rows: int, n_features: int) -> "faiss.ScalarQuantizer":
        return faiss.ScalarQuantizer(n_features, getattr(faiss.ScalarQuantizer, f"QT_{self.settings['dtype']}"))

    def decoder_values(self) -> int:
        return faiss.vector_to_array(self.quantizer.trained).size
