"""The chunked cell in plain JAX: matrix products inside chunks, worked on side by side; a scan passes the state on.

Every chunk's contribution to the state is formed in units of its own largest gate, so that the scan over chunks has
only two exponentials of non-positive numbers to take.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.chunks import chunked

F32 = jnp.float32
EMPTY = -1e30  # m of an empty state: exp(EMPTY - x) is 0 for every x that occurs, and nothing is inf - inf


def mlstm(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: Any, reset: Array | None, chunk: int, eps: float
) -> tuple[Array, Array, Array, Array]:
    (B, T, H, dk), dv = q.shape, v.shape[-1]
    Q = min(chunk, T)
    q = chunked((q.astype(F32) * dk**-0.5).astype(v.dtype), Q)
    k, v = chunked(k.astype(v.dtype), Q), chunked(v, Q)
    i = chunked(i.astype(F32), Q, fill=EMPTY)  # a token of padding neither decays the state nor adds to it
    b = jnp.cumsum(chunked(jax.nn.log_sigmoid(f.astype(F32)), Q), axis=2)  # (B, N, Q, H), inclusive
    seen = jnp.tril(jnp.ones((Q, Q), bool))[None, None]
    last = b[:, :, -1]  # (B, N, H)
    to_end = last[:, :, None] - b + i  # log weight of a token in the state at the end of its chunk
    carried, entering = last, b  # log decay of the state that enters the chunk, to its end and to each token
    if reset is not None:
        document = jnp.cumsum(chunked(reset, Q), axis=2)  # numbered inside the chunk; 0 began before it
        seen = seen & (document[:, :, :, None] == document[:, :, None, :])
        first = (document == 0)[..., None]
        to_end = jnp.where((document == document[:, :, -1:])[..., None], to_end, EMPTY)
        entering = jnp.where(first, entering, EMPTY)
        carried = jnp.where(first[:, :, -1], carried, EMPTY)

    # ---- the states at the beginnings of chunks
    largest = jax.lax.stop_gradient(to_end.max(axis=2))  # (B, N, H)
    weighted = (k.astype(F32) * jnp.exp(to_end - largest[:, :, None])[..., None]).astype(v.dtype)
    added = jnp.einsum("bnshk,bnshv->bnhkv", weighted, v, preferred_element_type=F32)
    added_n = jnp.sum(weighted.astype(F32), axis=2)
    if state is None:
        state = (jnp.zeros((B, H, dk, dv), F32), jnp.zeros((B, H, dk), F32), jnp.full((B, H), EMPTY, F32))

    def pass_on(before: Any, x: Any) -> tuple[Any, Any]:
        C, n, m = before
        decay, largest, add, add_n = x
        after = jax.lax.stop_gradient(jnp.maximum(decay + m, largest))
        keep, new = jnp.exp(decay + m - after), jnp.exp(largest - after)
        return (
            keep[..., None, None] * C + new[..., None, None] * add,
            keep[..., None] * n + new[..., None] * add_n,
            after,
        ), before

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (carried, largest, added, added_n))
    final, before = jax.lax.scan(pass_on, tuple(a.astype(F32) for a in state), xs)
    C, n, m = (jnp.moveaxis(a, 0, 1) for a in before)  # (B, N, H, ...)

    # ---- inside the chunks
    log_d = jnp.where(seen[..., None], b[:, :, :, None] - b[:, :, None] + i[:, :, None], EMPTY)  # (B, N, t, s, H)
    inherited = entering + m[:, :, None]  # (B, N, Q, H)
    m_t = jax.lax.stop_gradient(jnp.maximum(log_d.max(axis=3), inherited))
    d = jnp.exp(jnp.moveaxis(log_d - m_t[:, :, :, None], -1, 2))  # (B, N, H, t, s)
    weights = jnp.einsum("bnthk,bnshk->bnhts", q, k, preferred_element_type=F32) * d
    h = jnp.einsum("bnhts,bnshv->bnthv", weights.astype(v.dtype), v, preferred_element_type=F32)
    r = jnp.exp(inherited - m_t)[..., None]
    h += r * jnp.einsum("bnthk,bnhkv->bnthv", q, C.astype(v.dtype), preferred_element_type=F32)
    norm = jnp.moveaxis(jnp.sum(weights, axis=-1), 2, 3) + r[..., 0] * jnp.sum(q.astype(F32) * n[:, :, None], axis=-1)
    h /= (jnp.maximum(jnp.abs(norm), jnp.exp(jnp.minimum(-m_t, 80.0))) + eps)[..., None]
    return h.reshape(B, -1, H, dv)[:, :T].astype(v.dtype), *final
