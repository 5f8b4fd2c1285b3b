"""The recurrence as it is written, one token after the other, in float32. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gla(q, k, v, log_decay, state=None, reset=None):
    """As `gla`; all float32."""
    (B, T, H, dv), dk = v.shape, k.shape[-1]
    q, k, v, g = (a.astype(jnp.float32) for a in (q, k, v, log_decay))
    state = jnp.zeros((B, H, dk, dv), jnp.float32) if state is None else state.astype(jnp.float32)
    reset = jnp.zeros((B, T), bool) if reset is None else reset

    def token(S, x):
        q, k, v, g, new = x
        before = jnp.where(new[:, None, None, None], 0.0, jnp.exp(g)[..., None] * S)
        S = before + k[..., :, None] * v[..., None, :]
        return S, jnp.sum(S * q[..., :, None], axis=-2)

    state, out = jax.lax.scan(token, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, g, reset)))
    return jnp.moveaxis(out, 0, 1), state
