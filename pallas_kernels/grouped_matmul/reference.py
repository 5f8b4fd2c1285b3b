"""Each row times the matrix of its group, in float32, without tiles. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rows_matmul(x, w, group):
    """x (M, D), w (G, D, F), group (M,) -> (M, F); rows of group G give zero."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)

    def add(y, one):
        g, w_g = one
        return y + jnp.matmul(jnp.where((group == g)[:, None], x, 0), w_g, precision="highest"), None

    return jax.lax.scan(add, jnp.zeros((x.shape[0], w.shape[2])), (jnp.arange(len(w)), w))[0]


def grouped_matmul(x, w, group):
    N, t, D = x.shape
    return rows_matmul(x.reshape(N * t, D), w, jnp.repeat(group, t)).reshape(N, t, -1).astype(x.dtype)


def ragged_matmul(x, w, sizes):
    group = jnp.sum(jnp.arange(x.shape[0])[:, None] >= jnp.cumsum(sizes), axis=1)
    return rows_matmul(x, w, group).astype(x.dtype)
