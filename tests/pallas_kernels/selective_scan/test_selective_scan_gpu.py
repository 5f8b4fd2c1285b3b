"""The Mosaic GPU kernels, interpreted, against the reference; what they compile to is checked for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.selective_scan import reference, selective_scan
from tests.pallas_kernels.selective_scan import kernel_checks as checks

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.fixture
def small_tiles(monkeypatch):
    """Interpretation is slow."""
    from pallas_kernels.selective_scan import gpu

    monkeypatch.setattr(gpu, "TILE", 8)


def kernel(*args):
    return selective_scan(*args, kernels="mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "rates", "documents"),
    [
        ((1, 11, 70, 5), jnp.float32, "mild", True),  # a tile and 3 tokens, a block and 6 channels
        ((1, 11, 3, 32), jnp.float32, "fast", False),  # less than a block; two tiles of two spans
        ((2, 1, 8, 16), jnp.bfloat16, "mild", True),  # one token
        ((1, 4, 8, 8), jnp.float32, "still", True),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(small_tiles, shape, dtype, rates, documents):
    checks.equals_the_reference("mosaic_gpu", shape, dtype, rates, documents)


@pytest.mark.parametrize(
    ("shape", "dtype", "raw", "documents"),
    [
        ((2, 11, 70, 5), jnp.float32, jnp.float32, True),
        ((1, 19, 8, 16), jnp.bfloat16, jnp.bfloat16, False),  # three tiles
        ((1, 9, 3, 32), jnp.float32, jnp.bfloat16, False),
    ],
)
def test_raw_steps(small_tiles, shape, dtype, raw, documents):
    checks.equals_the_reference("mosaic_gpu", shape, dtype, "mild", documents, raw=raw)


def test_steps_are_right_whatever_their_size():
    """And their slopes, which are worked out of them."""
    from pallas_kernels.selective_scan import gpu

    x = jnp.concatenate([jnp.linspace(-30, 30, 4001), jnp.asarray([-1e30])])
    exact = np.asarray(x, np.float64)
    with np.errstate(over="ignore"):  # 1 / inf is the zero that is meant
        sigmoid = 1 / (1 + np.exp(-exact))
    np.testing.assert_allclose(gpu.softplus(x), np.log1p(np.exp(exact)), rtol=5e-6)
    np.testing.assert_allclose(gpu.slope(gpu.softplus(x)), sigmoid, rtol=5e-6)


def test_without_a_state_and_its_cotangent(small_tiles):
    """What a training step asks for: no initial state, the last one unused."""
    (*arrays, _), (dy, _), _ = checks.inputs(1, 5, 8, 8)

    def loss(f):
        return jax.grad(lambda *a: jnp.sum(f(*a)[0] * dy), argnums=range(5))(*arrays)

    with dispatch.interpreted():
        got = loss(kernel)
    for a, b in zip(got, loss(reference.selective_scan), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shared", [(2,), (0, 3), (2, 6), (1, 6)])
def test_a_population_equals_its_members(small_tiles, shared):
    checks.a_population_equals_its_members("mosaic_gpu", shared)


@pytest.mark.parametrize(("dtype", "N", "documents"), [(jnp.bfloat16, 16, False), (jnp.float32, 32, True)])
def test_lowers_for_cuda_at_training_shapes_with_remat(dtype, N, documents):
    text = checks.lowered_gradients("mosaic_gpu", "cuda", dtype, N, documents)
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text


def test_refuses_by_name_what_it_does_not_take():
    (u, *rest), _, _ = checks.inputs(1, 4, 8, 33)
    with pytest.raises(dispatch.Unsupported, match="at most 32 states"):
        kernel(u, *rest)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        kernel(u.astype(jnp.float16), *rest)
