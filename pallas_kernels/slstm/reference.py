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
    reset = jnp.zeros((B, T), bool) if reset is None else reset

    def token(before, x):
        gates, new = x
        empty = (0.0, 0.0, 0.0, EMPTY)
        h, c, n, m = (jnp.where(new[:, None, None], e, a) for e, a in zip(empty, before, strict=True))
        i, f, z, o = (gates[:, :, g] + jnp.einsum("bhd,hde->bhe", h, recurrent[g]) for g in range(4))
        m = jax.lax.stop_gradient(jnp.maximum(jax.nn.log_sigmoid(f) + m, i))
        c = jax.nn.sigmoid(f) * c + jnp.exp(i) * jnp.tanh(z)
        n = jax.nn.sigmoid(f) * n + jnp.exp(i)
        h = jax.nn.sigmoid(o) * c / n
        return (h, c, n, m), h

    xs = jnp.moveaxis(gates, 1, 0), jnp.moveaxis(reset, 1, 0)
    (h, c, n, m), out = jax.lax.scan(token, (h, c * jnp.exp(m), n * jnp.exp(m), m), xs)
    return jnp.moveaxis(out, 0, 1), (h, c * jnp.exp(-m), n * jnp.exp(-m), m)
