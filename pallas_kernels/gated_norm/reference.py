"""The gated norm as it is written, in float32. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gated_norm(y, u, z, skip, gain, groups, eps):
    """As `gated_norm`, differentiated by JAX."""
    skips = jnp.repeat(skip.astype(jnp.float32), y.shape[-1] // len(skip))
    h = (y.astype(jnp.float32) + skips * u) * jax.nn.silu(z.astype(jnp.float32))
    of_groups = jnp.stack(jnp.split(h, groups, axis=-1), axis=-2)
    n = of_groups / jnp.sqrt(jnp.mean(of_groups**2, axis=-1, keepdims=True) + eps)
    return (n.reshape(h.shape) * gain).astype(y.dtype)
