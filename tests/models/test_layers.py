"""Products of gates and routers: of bfloat16 by pieces as exact as in float32, of float32 as they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalelab.models.layers import full_product

BF16, F32 = jnp.bfloat16, jnp.float32


def inputs(dtype, n=96, m=7, shape=(3, 50), seed=0):
    """x, w and the gradient of x w, over five orders of magnitude."""
    rng = np.random.default_rng(seed)

    def spread(*shape):
        return rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))

    return jnp.asarray(spread(*shape, n), dtype), jnp.asarray(spread(n, m), F32), jnp.asarray(spread(*shape, m), F32)


def with_gradients(x, w, d, f=full_product):
    y, back = jax.vjp(f, x, w)
    return y, *back(d)


def exact(x, w, d):
    x, w, d = (np.asarray(a, np.float64) for a in (x, w, d))
    return x @ w, d @ w.T, np.einsum("btn,btm->nm", x, d)


def error(found, want):
    return np.linalg.norm(np.asarray(found, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("n", [16, 96, 1000])
def test_of_bfloat16_is_as_exact_as_float32(n):
    arguments = inputs(BF16, n)
    y, dx, dw = jax.jit(with_gradients)(*arguments)
    want_y, want_dx, want_dw = exact(*arguments)
    assert (y.dtype, dx.dtype, dw.dtype) == (F32, BF16, F32)
    assert error(y, want_y) < 3e-7
    assert error(dw, want_dw) < 3e-7
    # dx as good as rounded once: one piece of the gradient or of w would be another rounding
    assert error(dx, want_dx) < 1.01 * error(want_dx.astype(BF16), want_dx)


def test_of_float32_is_the_plain_product():
    arguments = inputs(F32)
    plain = jax.jit(lambda *a: with_gradients(*a, f=lambda x, w: jnp.matmul(x, w, precision="highest")))
    for found, want in zip(jax.jit(with_gradients)(*arguments), plain(*arguments), strict=True):
        np.testing.assert_array_equal(found, want)


def test_many_runs_and_layers():
    """Under vmap, and recomputed in a loop."""
    x, w, d = (jnp.stack(pair) for pair in zip(inputs(BF16), inputs(BF16, seed=1), strict=True))

    def layers(x, w):
        layer = jax.checkpoint(lambda total, w: (total + full_product(x, w), None))
        return jax.lax.scan(layer, jnp.zeros((*x.shape[:-1], w.shape[-1])), jnp.stack([w, 2 * w]))[0]

    for f, scale in ((full_product, 1), (layers, 3)):
        found = jax.jit(jax.vmap(lambda x, w, d, f=f: with_gradients(x, w, d, f)))(x, w, d)
        for run in range(2):
            for own, want in zip(found, exact(x[run], w[run], d[run]), strict=True):
                assert error(own[run], scale * want) < (2**-8 if own.dtype == BF16 else 3e-7)
