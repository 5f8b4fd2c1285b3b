"""The chunked form in plain JAX.

A score is sum_i q_ti k_si exp(b_ti - b_si), b the cumulative sum of g in the chunk. Its exponential cannot leave the
sum over the channels i, and exp(b_t) exp(-b_s) overflows. But any point p from s to t splits it into exp(b_t - b_p)
exp(b_p - b_s), both at most 1. Cut the chunk into pairs of neighbouring blocks of h tokens, for h = 1, 2, 4 ... Q / 2:
every t > s lies for exactly one h in the two blocks of one pair, and the end of the first block is their p. So the
scores are log2(Q) matrix products, each masked to its pairs, and the diagonal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.chunks import by_head, documents

F32 = jnp.float32


def gla(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None, chunk: int
) -> tuple[Array, Array]:
    (B, T, H, dv), dk = v.shape, k.shape[-1]
    read, write, v, weights, carried = in_chunks(q, k, v, log_decay, reset, min(chunk, 1 << (T - 1).bit_length()))
    out = jnp.einsum("bchts,bchsv->bchtv", weights, v, preferred_element_type=F32)
    added = jnp.einsum("bchsk,bchsv->bchkv", write, v, preferred_element_type=F32)
    start = jnp.zeros((B, H, dk, dv), F32) if state is None else state.astype(F32)

    def pass_on(S: Array, x: Any) -> tuple[Array, Array]:
        keep, new = x
        return keep[..., None] * S + new, S

    final, before = jax.lax.scan(pass_on, start, (jnp.moveaxis(carried, 1, 0), jnp.moveaxis(added, 1, 0)))
    before = jnp.moveaxis(before, 0, 1).astype(v.dtype)
    out += jnp.einsum("bchtk,bchkv->bchtv", read, before, preferred_element_type=F32)
    return jnp.moveaxis(out, 2, 3).reshape(B, -1, H, dv)[:, :T].astype(v.dtype), final


def in_chunks(q: Array, k: Array, v: Array, log_decay: Array, reset: Array | None, Q: int) -> tuple[Array, ...]:
    """What needs no state, of all chunks of Q tokens: the decayed queries and keys that read and write it, the values,
    the scores (B, C, H, t, s), and what the state keeps of itself (B, C, H, dk), float32."""
    q, k, v = (by_head(a.astype(v.dtype), Q) for a in (q, k, v))
    b = jnp.cumsum(by_head(log_decay.astype(F32), Q), axis=3)
    last = b[:, :, :, -1:]
    weights = scores(q, k, b)
    entering, left, carried = jnp.exp(b), jnp.exp(last - b), jnp.exp(last[..., 0, :])
    if reset is not None:
        document = documents(reset, Q)
        weights = jnp.where(document[..., :, None] == document[..., None, :], weights, 0.0)
        entering = jnp.where((document == 0)[..., None], entering, 0.0)
        left = jnp.where((document == document[..., -1:])[..., None], left, 0.0)
        carried = jnp.where((document == 0)[..., -1:], carried, 0.0)
    return (q * entering).astype(v.dtype), (k * left).astype(v.dtype), v, weights.astype(v.dtype), carried


def scores(q: Array, k: Array, b: Array) -> Array:
    """(B, C, H, Q, dk), b inclusive cumulative sums of the log decays -> (B, C, H, t, s) in float32; 0 where s > t."""
    Q, dk = q.shape[-2:]
    t = np.arange(Q)
    out = jnp.eye(Q) * jnp.sum(q.astype(F32) * k.astype(F32), axis=-1, keepdims=True)
    h = 1
    while h < Q:
        pairs = b.reshape(*b.shape[:3], Q // (2 * h), 2, h, dk)
        towards = jnp.array([-1.0, 1.0])[:, None, None] * (pairs - pairs[..., :1, -1:, :])
        e = jnp.exp(towards).reshape(b.shape)
        product = jnp.einsum(
            "bchtk,bchsk->bchts", (q * e).astype(q.dtype), (k * e).astype(k.dtype), preferred_element_type=F32
        )
        block = t // h
        out = jnp.where((block[:, None] == block + 1) & (block % 2 == 0), product, out)
        h *= 2
    return out
