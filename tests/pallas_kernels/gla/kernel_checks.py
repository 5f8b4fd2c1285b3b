"""What the kernels for every kind of device are given."""

import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels.kernel_checks import GATES, cotangents_of


def inputs(T, B=1, H=1, dk=64, dv=64, gates="mild", dtype=jnp.bfloat16, seed=0):
    """(q, k, v, log_decay, state), the cotangents, documents."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    q, k, v = normal(B, T, H, dk, scale=dk**-0.5), normal(B, T, H, dk, scale=dk**-0.5), normal(B, T, H, dv)
    g = jnp.float32(rng.uniform(*GATES[gates], size=q.shape))
    state = jnp.float32(rng.normal(size=(B, H, dk, dv)))
    reset = jnp.asarray(rng.random((B, T)) < 0.05).at[:, T // 2].set(True)
    return (q, k, v, g, state), cotangents_of(v, state, rng), reset
