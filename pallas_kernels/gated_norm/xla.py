"""The gated norm in plain JAX."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

F32 = jnp.float32


def gated_norm(y: Array, u: Array, z: Array, skip: Array, gain: Array, groups: int, eps: float) -> Array:
    """As `gated_norm`."""

    # The inputs alone are kept: working h out again costs less than writing it, and reading it.
    @partial(jax.checkpoint, prevent_cse=False)
    def norm(y: Array, u: Array, z: Array, skip: Array, gain: Array) -> Array:
        by_head = (*y.shape[:-1], skip.shape[0], -1)
        # The product of two bfloat16 is exact in float32. Theirs would have D's gradient added up in bfloat16.
        skipped = skip.astype(y.dtype).astype(F32)[:, None] * u.reshape(by_head).astype(F32)
        h = ((y + skipped.astype(y.dtype).reshape(y.shape)) * jax.nn.silu(z)).astype(F32)
        by_group = h.reshape(*h.shape[:-1], groups, -1)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(by_group), axis=-1, keepdims=True) + eps)
        return ((by_group * scale).reshape(h.shape) * gain).astype(y.dtype)

    return norm(y, u, z, skip, gain)
