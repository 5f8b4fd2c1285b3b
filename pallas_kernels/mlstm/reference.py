"""The cell as it is written, one token after the other, in float32. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY = -1e30  # m of an empty state: exp(EMPTY - x) is 0 for every x that occurs


def mlstm(q, k, v, i, f, state=None, reset=None, eps=1e-6):
    """As `mlstm`; all float32; returns h and (C, n, m)."""
    q, k, v, i, f = (a.astype(jnp.float32) for a in (q, k, v, i, f))
    (B, T, H, dk), dv = q.shape, v.shape[-1]
    if state is None:
        state = (jnp.zeros((B, H, dk, dv)), jnp.zeros((B, H, dk)), jnp.full((B, H), EMPTY))
    reset = jnp.zeros((B, T), bool) if reset is None else reset

    def token(before, x):
        C, n, m = before
        q, k, v, i, f, new = x
        m = jnp.where(new[:, None], EMPTY, m)
        log_f = jax.nn.log_sigmoid(f)
        m_t = jax.lax.stop_gradient(jnp.maximum(log_f + m, i))
        keep, add = jnp.exp(log_f + m - m_t), jnp.exp(i - m_t)
        C = keep[..., None, None] * C + add[..., None, None] * k[..., :, None] * v[..., None, :]
        n = keep[..., None] * n + add[..., None] * k
        q = q / jnp.sqrt(dk)
        bound = jnp.maximum(jnp.abs(jnp.sum(n * q, -1)), jnp.exp(-m_t))
        return (C, n, m_t), jnp.sum(C * q[..., None], -2) / (bound + eps)[..., None]

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, i, f, reset))
    state, h = jax.lax.scan(token, tuple(state), xs)
    return jnp.moveaxis(h, 0, 1), state
