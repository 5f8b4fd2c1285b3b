"""The chunked form in plain JAX: runs anywhere, and is what accelerated versions fall back to.

Inside a chunk every token's scores with the earlier ones are a matrix product, decayed by differences of one cumulative
sum; between chunks a scan carries the state. Chunks are worked on side by side; only the states wait for each other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

F32 = jnp.float32


def gated_recurrence(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None, chunk: int
) -> tuple[Array, Array]:
    (B, T, H, dv), (G, dk) = v.shape, k.shape[2:]
    Q = min(chunk, T)
    C = -(-T // Q)

    def chunked(a: Array) -> Array:
        """(B, T, ...) -> (B, C, Q, ...). A token of padding neither decays the state nor adds to it."""
        a = jnp.pad(a, ((0, 0), (0, C * Q - T), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(B, C, Q, *a.shape[2:])

    q, k, v = (chunked(a.astype(v.dtype)) for a in (q, k, v))
    b = jnp.cumsum(chunked(log_decay.astype(F32)), axis=2)  # (B, C, Q, H), inclusive
    seen = jnp.tril(jnp.ones((Q, Q), bool))[None, None]
    from_start = to_end = jnp.ones((B, C, Q), bool)
    if reset is not None:
        document = jnp.cumsum(chunked(reset), axis=2)  # numbered inside the chunk; 0 began before it
        seen = seen & (document[:, :, :, None] == document[:, :, None, :])
        from_start, to_end = document == 0, document == document[:, :, -1:]
    # exp only of what is not above 0: mask, then exponentiate
    gap = jnp.where(seen[..., None], b[:, :, :, None] - b[:, :, None], -jnp.inf)  # (B, C, t, s, H)
    decay = jnp.exp(jnp.moveaxis(gap, -1, 2))  # (B, C, H, t, s)
    scores = jnp.einsum("bctgk,bcsgk->bcgts", q, k, preferred_element_type=F32)
    weights = (scores[:, :, :, None] * decay.reshape(B, C, G, H // G, Q, Q)).reshape(B, C, H, Q, Q)
    out = jnp.einsum("bchts,bcshv->bcthv", weights.astype(v.dtype), v, preferred_element_type=F32)

    def per_head(a: Array, scale: Array) -> Array:
        """(B, C, Q, G, dk) of the groups -> (B, C, Q, H, dk), scaled."""
        scaled = a.reshape(B, C, Q, G, 1, dk) * scale.reshape(B, C, Q, G, H // G, 1)
        return scaled.reshape(B, C, Q, H, dk).astype(v.dtype)

    left = jnp.exp(b[:, :, -1:] - b)  # of a token's contribution at the end of its chunk
    carried = jnp.exp(b[:, :, -1])  # of the state that enters the chunk
    entering = jnp.exp(b)
    if reset is not None:
        left = jnp.where(to_end[..., None], left, 0.0)
        carried = jnp.where(from_start[:, :, -1:], carried, 0.0)
        entering = jnp.where(from_start[..., None], entering, 0.0)
    added = jnp.einsum("bcshk,bcshv->bchkv", per_head(k, left), v, preferred_element_type=F32)
    start = jnp.zeros((B, H, dk, dv), F32) if state is None else state.astype(F32)

    def pass_on(S: Array, x: Any) -> tuple[Array, Array]:
        keep, new = x
        return keep[..., None, None] * S + new, S

    final, before = jax.lax.scan(pass_on, start, (jnp.moveaxis(carried, 1, 0), jnp.moveaxis(added, 1, 0)))
    before = jnp.moveaxis(before, 0, 1).astype(v.dtype)
    out += jnp.einsum("bcthk,bchkv->bcthv", per_head(q, entering), before, preferred_element_type=F32)
    return out.reshape(B, C * Q, H, dv)[:, :T].astype(v.dtype), final


def step(q: Array, k: Array, v: Array, log_decay: Array, state: Array) -> tuple[Array, Array]:
    H = v.shape[1]
    q, k = (jnp.repeat(a.astype(F32), H // a.shape[1], axis=1) for a in (q, k))
    state = jnp.exp(log_decay.astype(F32))[..., None, None] * state + k[..., :, None] * v.astype(F32)[..., None, :]
    return jnp.sum(state * q[..., :, None], axis=-2).astype(v.dtype), state
