"""Softmax attention in plain JAX, under any mask: what runs on a CPU, while decoding, and where nothing faster fits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(query: Int[Array, " T"], key: Int[Array, " K"], window: int) -> Bool[Array, "T K"]:
    """Causal, and within the window (0: none), which counts the token itself."""
    mask = key <= query[:, None]
    return mask & (key > query[:, None] - window) if window else mask


def seen(T: int, K: int, segment_ids: Int[Array, "B T"] | None, window: int) -> Bool[Array, "#B T K"]:
    """Which keys each token sees, as in `attention`."""
    index = jnp.arange(T)
    mask = visible(index, index, window)[None]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.pad(mask, ((0, 0), (0, 0), (K - T, 0)), constant_values=True)


def causal(q: Array, k: Array, v: Array, segment_ids: Array | None, window: int, cap: float, scale: float) -> Array:
    return attend(q, k, v, seen(q.shape[1], k.shape[1], segment_ids, window), cap, scale)


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K Hk d"],
    v: Float[Array, "B K Hk d"],
    mask: Bool[Array, "#B T K"],
    cap: float = 0.0,
    scale: float | None = None,
) -> Float[Array, "B T H d"]:
    """softmax(cap(scale q k^T), masked) v; scores and softmax in float32. Every query must see a key. The scale is
    1 / sqrt(d) by default.

    The full square of scores is computed, 4 H d K FLOPs per query, and the backward pass keeps the weights.
    """
    (B, T, H, d), (K, Hk) = q.shape, k.shape[1:3]
    # One batch axis in front; the query heads that share keys are more rows of the same product.
    q = q.reshape(B, T, Hk, H // Hk, d).transpose(0, 2, 3, 1, 4).reshape(B * Hk, -1, d)
    k, v = (a.transpose(0, 2, 1, 3).reshape(B * Hk, K, d) for a in (k, v))
    y: Any = _softmax_attention(q, k, v, mask, cap, d**-0.5 if scale is None else scale)
    return y.reshape(B, H, T, d).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _softmax_attention(
    q: Float[Array, "b r d"],
    k: Float[Array, "b K d"],
    v: Float[Array, "b K d"],
    mask: Bool[Array, "#B T K"],
    cap: float,
    scale: float,
) -> Float[Array, "b r d"]:
    """b = B Hk; the rows r of each are (H / Hk) T queries. Scores outside the mask are replaced, not added to: of the
    sum with a constant mask, XLA for CPUs makes NaN in JAX 0.12.

    A backward pass of its own, since that of autodiff multiplies float32 by bfloat16, and contracts over the rows of
    a T x T matrix in an order that XLA's CPU backend runs three times slower.
    """
    return _attention_forward(q, k, v, mask, cap, scale)[0]


def _attention_forward(q: Array, k: Array, v: Array, mask: Array, cap: float, scale: float) -> tuple[Array, Any]:
    scores = jnp.einsum("brd,bkd->brk", q, k, preferred_element_type=jnp.float32) * scale
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    slope = (1 - jnp.square(scores / cap)).astype(q.dtype) if cap else None
    by_row = (mask.shape[0], -1, *mask.shape[1:])
    scores = jnp.where(mask[:, None], scores.reshape(by_row), jnp.finfo(jnp.float32).min / 2).reshape(scores.shape)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = jnp.einsum("brk,bkd->brd", weights, v, preferred_element_type=jnp.float32) / total
    return y.astype(v.dtype), (q, k, v, weights, total, y.astype(v.dtype), slope)


def _attention_backward(cap: float, scale: float, saved: Any, dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, total, y, slope = saved
    f32 = jnp.float32
    dy = dy / total
    delta = jnp.sum(dy * y, axis=-1, keepdims=True)
    dy = dy.astype(v.dtype)
    dv = jnp.einsum("brd,brk->bdk", dy, weights, preferred_element_type=f32)
    ds = weights * (jnp.einsum("brd,bkd->brk", dy, v, preferred_element_type=f32) - delta)
    ds = (ds * slope if cap else ds).astype(q.dtype)
    dq = jnp.einsum("brk,bkd->brd", ds, k, preferred_element_type=f32) * scale
    dk = jnp.einsum("brd,brk->bdk", q, ds, preferred_element_type=f32) * scale
    dk, dv = dk.transpose(0, 2, 1), dv.transpose(0, 2, 1)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_softmax_attention.defvjp(_attention_forward, _attention_backward)
