from functools import partial

import jax
import pytest

from pallas_kernels import compat


@pytest.fixture(autouse=True)
def _exact_products():
    """Accelerators round float32 products by default; these tests compare to 1e-5."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def _no_races(monkeypatch, capfd):
    """The interpreters follow what waits for what, also where a copy happens to be early enough."""
    for name in ("gpu_interpreter", "tpu_interpreter"):
        monkeypatch.setattr(compat, name, partial(getattr(compat, name), detect_races=True))
    yield
    assert "race" not in capfd.readouterr().out.lower()
