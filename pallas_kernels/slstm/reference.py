"""The cell without a stabiliser, as the recurrence is defined, one token after the other. For tests: exp(i) must not
overflow."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY = -1e30  # m of an empty state: exp(EMPTY) is 0


def slstm(gates, recurrent, state=None, reset=None):
    """As `slstm`; m, which nothing here needs, is followed aside."""
    B, T, H, _, d = gates.shape
    zero = jnp.zeros((B, H, d))
    h, c, n, m = (zero, zero, zero, zero + EMPTY) if state is None else state
    c, n = c * jnp.exp(m), n * jnp.exp(m)
    out = []
    for t in range(T):
        if reset is not None:
            new = reset[:, t, None, None]
            h, c, n, m = (jnp.where(new, empty, a) for empty, a in ((0.0, h), (0.0, c), (0.0, n), (EMPTY, m)))
        i, f, z, o = (gates[:, t, :, g] + jnp.einsum("bhd,hde->bhe", h, recurrent[g]) for g in range(4))
        m = jax.lax.stop_gradient(jnp.maximum(jax.nn.log_sigmoid(f) + m, i))
        c = jax.nn.sigmoid(f) * c + jnp.exp(i) * jnp.tanh(z)
        n = jax.nn.sigmoid(f) * n + jnp.exp(i)
        h = jax.nn.sigmoid(o) * c / n
        out.append(h)
    return jnp.stack(out, axis=1), (h, c * jnp.exp(-m), n * jnp.exp(-m), m)
