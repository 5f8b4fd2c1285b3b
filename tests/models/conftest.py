import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # family.py


@pytest.fixture(autouse=True)
def _exact_products():
    """Accelerators round float32 products by default; these tests compare to 1e-5."""
    with jax.default_matmul_precision("highest"):
        yield
