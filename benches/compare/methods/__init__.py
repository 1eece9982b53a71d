"""One small class a peer: ``fit``, ``encode``, ``decode``, ``nbytes``. A new one is a class and a line of a plan."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Method(Protocol):
    """What is compared."""

    library: str
    settings: dict[str, object]
    """Everything that was asked for, for the record."""

    def fit(self, x: NDArray[np.float32]) -> None:
        """Learns from x of shape (n_rows, n_features)."""

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes, uint8 (n_rows, bytes a row)."""

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The rows that codes stand for."""

    def nbytes(self, n_rows: int) -> int:
        """Bytes of a table of that many rows, all that reading needs counted."""
