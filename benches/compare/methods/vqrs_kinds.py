"""The quantizers of vqrs."""

import numpy as np
from numpy.typing import NDArray

import vqrs


class Vqrs:
    """A quantizer by the name of its class."""

    library = f"vqrs {vqrs.__version__}"

    def __init__(self, estimator: str, **settings: object) -> None:
        self.settings: dict[str, object] = {"estimator": estimator, **settings}
        self.quantizer = getattr(vqrs, estimator)(**settings)

    def fit(self, x: NDArray[np.float32]) -> None:
        self.quantizer.fit(x)

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self.quantizer.transform(x)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.quantizer.inverse_transform(codes)

    def nbytes(self, n_rows: int) -> int:
        return self.quantizer.estimate(n_rows, self.quantizer.n_features_in_)
