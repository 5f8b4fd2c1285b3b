"""The chunked form in plain JAX: runs anywhere, and is what accelerated versions fall back to.

Inside a chunk every token's scores with the earlier ones are a matrix product, decayed by differences of one cumulative
sum; between chunks a scan carries the state. Chunks are worked on side by side; only the states wait for each other.
Heads stand before tokens throughout: with heads last, XLA's CPU backend took three times as long where they share keys.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.chunks import by_head, documents, per_head

F32 = jnp.float32


def gated_recurrence(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None, chunk: int
) -> tuple[Array, Array]:
    # Only the inputs are kept for the backward pass: to work the chunks out again costs less than to write scores and
    # decays of every layer into a scan's stack and read them back.
    return jax.checkpoint(functools.partial(_forward, chunk=chunk), prevent_cse=False)(q, k, v, log_decay, state, reset)


def _forward(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None, chunk: int
) -> tuple[Array, Array]:
    (B, T, H, dv), (G, dk) = v.shape, k.shape[2:]
    Q = min(chunk, T)
    R = H // G  # heads of a group
    q, k, v = (by_head(a.astype(v.dtype), Q) for a in (q, k, v))
    b = jnp.cumsum(by_head(log_decay.astype(F32), Q), axis=3)  # (B, C, H, Q), inclusive
    seen = jnp.tril(jnp.ones((Q, Q), bool))
    last = b[..., -1:]
    # what is left of: a token's contribution at the end of its chunk; the state entering, at its end and at each token
    left, carried, entering = jnp.exp(last - b), jnp.exp(last), jnp.exp(b)
    if reset is not None:
        document = documents(reset, Q)
        seen = seen & (document[..., :, None] == document[..., None, :])
        left = jnp.where(document == document[..., -1:], left, 0.0)
        carried = jnp.where(document[..., -1:] == 0, carried, 0.0)
        entering = jnp.where(document == 0, entering, 0.0)
    # exp only of what is not above 0: mask, then exponentiate
    decay = jnp.exp(jnp.where(seen, b[..., :, None] - b[..., None, :], -jnp.inf))  # (B, C, H, t, s)
    scores = jnp.einsum("bcgtk,bcgsk->bcgts", q, k, preferred_element_type=F32)
    weights = (per_head(scores, H) * decay).astype(v.dtype)
    out = jnp.einsum("bchts,bchsv->bchtv", weights, v, preferred_element_type=F32)

    # Decays go with the values, not with the keys, which may be shared: heads of a group stand beside each other in
    # one product with their key.
    def beside(a: Array) -> Array:
        """(B, C, H, m, n) -> (B, C, G, m, R n)."""
        a = jnp.moveaxis(a.reshape(B, -1, G, R, *a.shape[3:]), 3, 4)
        return a.reshape(*a.shape[:4], -1)

    def apart(a: Array) -> Array:
        """(B, C, G, m, R n) -> (B, C, H, m, n)."""
        a = jnp.moveaxis(a.reshape(*a.shape[:4], R, -1), 4, 3)
        return a.reshape(B, -1, H, *a.shape[4:])

    writing = beside((v * left[..., None]).astype(v.dtype))
    added = apart(jnp.einsum("bcgsk,bcgsv->bcgkv", k, writing, preferred_element_type=F32))
    start = jnp.zeros((B, H, dk, dv), F32) if state is None else state.astype(F32)

    def pass_on(S: Array, x: Any) -> tuple[Array, Array]:
        keep, new = x
        return keep[..., None] * S + new, S

    final, before = jax.lax.scan(pass_on, start, (jnp.moveaxis(carried, 1, 0), jnp.moveaxis(added, 1, 0)))
    before = beside(jnp.moveaxis(before, 0, 1).astype(v.dtype))
    out += entering[..., None] * apart(jnp.einsum("bcgtk,bcgkv->bcgtv", q, before, preferred_element_type=F32))
    return jnp.moveaxis(out, 2, 3).reshape(B, -1, H, dv)[:, :T].astype(v.dtype), final
