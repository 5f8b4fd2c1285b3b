"""The recurrence as it is written, one token after the other, in float32. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gated_recurrence(q, k, v, log_decay, state=None, reset=None, weight=None):
    """As `gated_recurrence`; all float32."""
    (B, T, H, dv), dk = v.shape, k.shape[-1]
    q, k = (jnp.repeat(a.astype(jnp.float32), H // a.shape[2], axis=2) for a in (q, k))
    v = v.astype(jnp.float32) if weight is None else v.astype(jnp.float32) * weight[..., None]
    state = jnp.zeros((B, H, dk, dv), jnp.float32) if state is None else state.astype(jnp.float32)
    reset = jnp.zeros((B, T), bool) if reset is None else reset

    def token(S, x):
        q, k, v, g, new = x
        S = (
            jnp.where(new[:, None, None, None], 0.0, jnp.exp(g)[..., None, None] * S)
            + k[..., :, None] * v[..., None, :]
        )
        return S, jnp.sum(S * q[..., :, None], axis=-2)

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, log_decay.astype(jnp.float32), reset))
    state, out = jax.lax.scan(token, state, xs)
    return jnp.moveaxis(out, 0, 1), state
