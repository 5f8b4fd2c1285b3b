"""The gate of the experts' rows, weighted, in plain XLA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul.xla import F32

Gradients = Callable[[Array, Array, Array], tuple[Array, Array]]  # (both, w, d) -> those of both and w


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_swiglu(gradients: Gradients, both: Float[Array, "*b 2*F"], w: Float[Array, "*b"]) -> Float[Array, "*b F"]:
    gate, up = jnp.split(both.astype(F32), 2, axis=-1)
    return (w[..., None] * (jax.nn.silu(gate) * up)).astype(both.dtype)


def _forward(gradients: Gradients, both: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return weighted_swiglu(gradients, both, w), (both, w)


def _backward(gradients: Gradients, kept: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    return gradients(*kept, d)


weighted_swiglu.defvjp(_forward, _backward)


def gradients(both: Array, w: Array, d: Array) -> tuple[Array, Array]:
    """Of both, rounded once, and of w, in float32."""
    (gate, up), d = jnp.split(both.astype(F32), 2, axis=-1), d.astype(F32)
    sigmoid = jax.nn.sigmoid(gate)
    d_up = gate * sigmoid * d
    d_gate = (sigmoid + gate * sigmoid * (1 - sigmoid)) * up * d
    d_both = w[..., None] * jnp.concatenate([d_gate, d_up], axis=-1)
    return d_both.astype(both.dtype), jnp.sum(d_up * up, axis=-1)
