"""Attention as it is written, in float32. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.xla import seen


def attention(q, k, v, segment_ids=None, window=0, cap=0.0, scale=None):
    """As `attention`; float32 inside."""
    H = q.shape[2]
    mask = seen(q.shape[1], k.shape[1], segment_ids, window)[:, None]
    q32, k32, v32 = (a.astype(jnp.float32) for a in (q, k, v))
    k32, v32 = (jnp.repeat(a, H // a.shape[2], axis=2) for a in (k32, v32))
    scores = jnp.einsum("bthd,bshd->bhts", q32, k32) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v32).astype(v.dtype)
