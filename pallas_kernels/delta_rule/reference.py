"""The delta rule as it is written, one token after the other, in float32. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def delta_rule(q, k, v, beta, log_decay=None, state=None, reset=None):
    """As `delta_rule`; all float32."""
    (B, T, H, dv), dk = v.shape, k.shape[-1]
    q, k = (jnp.repeat(a.astype(jnp.float32), H // a.shape[2], axis=2) for a in (q, k))
    v, beta = v.astype(jnp.float32), beta.astype(jnp.float32)
    g = jnp.zeros((B, T, H), jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    state = jnp.zeros((B, H, dk, dv), jnp.float32) if state is None else state.astype(jnp.float32)
    reset = jnp.zeros((B, T), bool) if reset is None else reset

    def token(S, x):
        q, k, v, beta, g, new = x
        S = jnp.where(new[:, None, None, None], 0.0, jnp.exp(g)[..., None, None] * S)
        error = v - jnp.sum(S * k[..., :, None], axis=-2)
        S = S + beta[..., None, None] * k[..., :, None] * error[..., None, :]
        return S, jnp.sum(S * q[..., :, None], axis=-2)

    state, out = jax.lax.scan(token, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, beta, g, reset)))
    return jnp.moveaxis(out, 0, 1), state
