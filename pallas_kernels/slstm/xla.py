"""The cell in plain JAX, token by token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

EMPTY = -1e30  # m of an empty state: exp(EMPTY - x) is 0 for every x that occurs


def slstm(
    gates: Array, recurrent: Array, state: tuple[Array, ...] | None, reset: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    B, T, H, _, d = gates.shape
    empty = jnp.zeros((B, H, d), jnp.float32)
    start = (empty, empty, empty, jnp.full_like(empty, EMPTY)) if state is None else tuple(state)
    reset = jnp.zeros((B, T), bool) if reset is None else reset

    def token(before: tuple[Array, ...], x: Any) -> tuple[tuple[Array, ...], Array]:
        raw, new = x
        h, c, n, m = (
            jnp.where(new[:, None, None], fresh, a) for fresh, a in zip((0, 0, 0, EMPTY), before, strict=True)
        )
        i, f, z, o = jnp.moveaxis(raw, 2, 0) + jnp.einsum("bhd,ghde->gbhe", h, recurrent, precision="highest")
        log_f = jax.nn.log_sigmoid(f)
        m_t = jax.lax.stop_gradient(jnp.maximum(log_f + m, i))
        keep, add = jnp.exp(log_f + m - m_t), jnp.exp(i - m_t)
        c, n = keep * c + add * jnp.tanh(z), keep * n + add
        h = jax.nn.sigmoid(o) * c / n
        return (h, c, n, m_t), h

    after, h = jax.lax.scan(token, start, (jnp.moveaxis(gates, 1, 0), jnp.moveaxis(reset, 1, 0)))
    return jnp.moveaxis(h, 0, 1), after
