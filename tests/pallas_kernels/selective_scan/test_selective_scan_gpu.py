"""The Mosaic GPU kernels, interpreted, against the reference; what they compile to is checked for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.selective_scan import reference, selective_scan

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


@pytest.fixture
def small_tiles(monkeypatch):
    """Interpretation is slow."""
    from pallas_kernels.selective_scan import gpu

    monkeypatch.setattr(gpu, "TILE", 8)


def inputs(B, T, E, N, dtype=jnp.float32, rates="mild", seed=0):
    rng = np.random.default_rng(seed)
    low, high = {"mild": (1e-3, 1.0), "fast": (5.0, 60.0), "still": (0.0, 1e-6)}[rates]

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    u, dt = normal(B, T, E, dtype=dtype), jnp.float32(rng.uniform(low, high, size=(B, T, E)))
    A = -jnp.float32(rng.uniform(0.3, 3.0, size=(E, N)))
    arrays = u, dt, A, normal(B, T, N, dtype=dtype), normal(B, T, N, dtype=dtype), normal(B, E, N)
    return arrays, (normal(B, T, E, dtype=dtype), normal(B, E, N)), jnp.asarray(rng.random((B, T)) < 0.1)


def values_and_gradients(f, arrays, cotangents):
    out, pull = jax.vjp(f, *arrays)
    return *out, *pull(cotangents)


def kernel(*args):
    return selective_scan(*args, kernels="mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "rates", "documents"),
    [
        ((1, 11, 70, 5), jnp.float32, "mild", True),  # a tile and 3 tokens, a block and 6 channels
        ((1, 8, 3, 32), jnp.float32, "fast", False),  # less than a block; two spans
        ((2, 1, 8, 16), jnp.bfloat16, "mild", True),  # one token
        ((1, 4, 8, 8), jnp.float32, "still", True),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(small_tiles, shape, dtype, rates, documents):
    arrays, cotangents, reset = inputs(*shape, dtype, rates)
    reset = reset if documents else None
    with dispatch.interpreted():
        got = values_and_gradients(lambda *a: kernel(*a, reset), arrays, cotangents)
    exact = [a.astype(jnp.float32) for a in arrays], tuple(a.astype(jnp.float32) for a in cotangents)
    want = values_and_gradients(lambda *a: reference.selective_scan(*a, reset), *exact)
    for a, b, like in zip(got, want, (arrays[0], arrays[-1], *arrays), strict=True):
        assert a.dtype == like.dtype
        rough = 4e-3 if a.dtype == jnp.bfloat16 else 2e-6
        assert float(jnp.linalg.norm(a.astype(jnp.float32) - b)) <= rough * float(jnp.linalg.norm(b)) + 1e-30


def test_without_a_state_and_its_cotangent(small_tiles):
    """What a training step asks for: no initial state, the last one unused."""
    (*arrays, _), (dy, _), _ = inputs(1, 5, 8, 8)

    def loss(f):
        return jax.grad(lambda *a: jnp.sum(f(*a)[0] * dy), argnums=range(5))(*arrays)

    with dispatch.interpreted():
        got = loss(kernel)
    for a, b in zip(got, loss(reference.selective_scan), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shared", [(2,), (0, 3)])
def test_a_population_equals_its_members(small_tiles, shared):
    """Some inputs may be the same for all members."""
    members = [inputs(1, 3, 8, 8, seed=s) for s in (1, 2)]
    arrays = [m[0][i] if i in shared else jnp.stack([m[0][i] for m in members]) for i in range(6) for m in members[:1]]
    cotangents = tuple(jnp.stack([m[1][i] for m in members]) for i in range(2))
    axes = [None if i in shared else 0 for i in range(6)]

    def run(dy, dh, *arrays):
        return values_and_gradients(kernel, arrays, (dy, dh))

    with dispatch.interpreted():
        together = jax.vmap(run, in_axes=(0, 0, *axes))(*cotangents, *arrays)
        for k in range(2):
            alone = run(*(c[k] for c in cotangents), *(a if i in shared else a[k] for i, a in enumerate(arrays)))
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a[k], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "N", "documents"), [(jnp.bfloat16, 16, False), (jnp.float32, 32, True)])
def test_lowers_for_cuda_at_training_shapes_with_remat(dtype, N, documents):
    B, T, E = 4, 4096, 2048
    shapes = [((B, T, E), dtype), ((B, T, E), jnp.float32), ((E, N), jnp.float32), *[((B, T, N), dtype)] * 2]
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    reset = [jax.ShapeDtypeStruct((B, T), bool)] if documents else []

    @jax.checkpoint
    def block(*a):
        return jnp.sum(kernel(*a[:5], None, *a[5:])[0].astype(jnp.float32))

    text = jax.jit(jax.grad(block, argnums=range(5))).trace(*args, *reset).lower(lowering_platforms=("cuda",)).as_text()
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text


def test_refuses_by_name_what_it_does_not_take():
    (u, *rest), _, _ = inputs(1, 4, 8, 33)
    with pytest.raises(dispatch.Unsupported, match="at most 32 states"):
        kernel(u, *rest)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 and float32, not float16"):
        kernel(u.astype(jnp.float16), *rest)
