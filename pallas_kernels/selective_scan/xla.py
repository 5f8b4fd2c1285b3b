"""The scan in plain JAX, token by token: no (B, T, E, N) table exists. The backward pass runs each chunk again."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

F32 = jnp.float32


def selective_scan(
    u: Array, dt: Array, A: Array, B: Array, C: Array, state: Array | None, reset: Array | None, chunk: int
) -> tuple[Array, Array]:
    batch, T, E = u.shape
    Q = min(chunk, T)
    chunks = -(-T // Q)
    start = jnp.zeros((batch, E, A.shape[1]), F32) if state is None else state.astype(F32)
    keep = jnp.ones((batch, T), F32) if reset is None else 1.0 - reset.astype(F32)

    def by_chunk(a: Array) -> Array:
        """(B, T, ...) -> (chunks, Q, B, ...). A token of padding has dt = 0: it neither decays nor adds."""
        a = jnp.pad(a.astype(F32), ((0, 0), (0, chunks * Q - T), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a, 0, 1).reshape(chunks, Q, batch, *a.shape[2:])

    padding = jnp.pad(keep, ((0, 0), (0, chunks * Q - T)), constant_values=1.0)
    keep = jnp.moveaxis(padding, 0, 1).reshape(chunks, Q, batch)

    @partial(jax.checkpoint, prevent_cse=False)
    def run_chunk(h: Array, xs: Any) -> tuple[Array, Array]:
        def token(h: Array, x: Any) -> tuple[Array, Array]:
            u, dt, B, C, keep = x
            decay = jnp.exp(dt[..., None] * A) * keep[:, None, None]
            h = decay * h + (dt * u)[..., None] * B[:, None]
            return h, jnp.sum(h * C[:, None], axis=-1)

        return jax.lax.scan(token, h, xs, unroll=min(8, Q))

    final, y = jax.lax.scan(run_chunk, start, (*(by_chunk(a) for a in (u, dt, B, C)), keep))
    y = jnp.moveaxis(y.reshape(chunks * Q, batch, E)[:T], 0, 1)
    return y.astype(u.dtype), final
