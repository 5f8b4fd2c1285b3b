"""What the kernels for every kind of device are given."""

import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels.kernel_checks import GATES, cotangents_of


def inputs(T, B=1, G=1, H=1, dk=64, dv=64, gates="mild", highest=1.0, dtype=jnp.bfloat16, seed=0):
    """(q, k, v, beta, state), with the log decays before the state if there are `gates`; cotangents; documents. Keys of
    length 1, beta up to `highest`."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.float32(rng.normal(size=shape))

    k = normal(B, T, G, dk)
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    q, k, v = (a.astype(dtype) for a in (normal(B, T, G, dk) * dk**-0.5, k, normal(B, T, H, dv)))
    beta, state = jnp.float32(rng.uniform(0, highest, size=(B, T, H))), normal(B, H, dk, dv)
    g = [jnp.float32(rng.uniform(*GATES[gates], size=(B, T, H)))] if gates else []
    reset = jnp.asarray(rng.random((B, T)) < 0.05).at[:, T // 2].set(True)
    return (q, k, v, beta, *g, state), cotangents_of(v, state, rng), reset


def of(f, reset=None):
    """`f` of arrays as `inputs` has them."""

    def run(q, k, v, beta, *rest, **options):
        *g, state = rest
        return f(q, k, v, beta, g[0] if g else None, state, reset, **options)

    return run
