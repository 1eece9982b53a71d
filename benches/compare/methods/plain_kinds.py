"""The scalar formats that model libraries use, in plain numpy: int4 and int8 by row and block, NF4."""

import numpy as np
from numpy.typing import NDArray

# The levels of QLoRA's NormalFloat (T. Dettmers et al., 2023).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)


class Plain:
    """Levels of each row or block between its extremes, with float16 scales; a short last block is padded."""

    library = "numpy"

    def __init__(self, dtype: str, block: int | None) -> None:
        self.settings: dict[str, object] = {"dtype": dtype, "block": block}
        self.dtype, self.block = dtype, block

    def fit(self, x: NDArray[np.float32]) -> None:
        self.n_features = x.shape[1]
        self.width = self.block or self.n_features
        self.n_blocks = -(-self.n_features // self.width)

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Decoded values as bytes: what is compared is their error and the bytes that ``nbytes`` counts."""
        padding = self.n_blocks * self.width - self.n_features
        blocks = np.pad(x, ((0, 0), (0, padding)), mode="edge").reshape(len(x), self.n_blocks, self.width)
        decoded = self.rounded(blocks).reshape(len(x), -1)[:, : self.n_features]
        return np.ascontiguousarray(decoded, dtype=np.float32).view(np.uint8)

    def rounded(self, blocks: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.dtype == "nf4":
            largest = np.abs(blocks).max(axis=2, keepdims=True).astype(np.float16).astype(np.float32)
            scaled = blocks / np.maximum(largest, 1e-30)
            return NF4[np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled)] * largest
        top = 2 ** int(self.dtype.removeprefix("int")) - 1
        low = blocks.min(axis=2, keepdims=True).astype(np.float16).astype(np.float32)
        step = ((blocks.max(axis=2, keepdims=True) - low) / top).astype(np.float16).astype(np.float32)
        return low + step * np.clip(np.rint((blocks - low) / np.maximum(step, 1e-30)), 0, top)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return codes.view(np.float32)

    def nbytes(self, n_rows: int) -> int:
        bits, scales = (4, 2) if self.dtype == "nf4" else (int(self.dtype.removeprefix("int")), 4)
        return n_rows * (-(-self.n_features * bits // 8) + self.n_blocks * scales)
