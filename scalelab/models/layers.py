"""What blocks are made of: linear maps, normalisation, rotary embedding, soft cap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from scalelab.models.part import Part
from scalelab.models.spec import Spec
from scalelab.parametrization import Tensor


def pointwise(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with only its inputs kept for the backward pass. For cheap functions of big arrays: recomputing them costs less
    than writing what autodiff would keep and, in a scanned stack, copying it into the stack of all layers and out."""
    return jax.checkpoint(f, prevent_cse=False)


def linear(x: Float[Array, "*b n"], w: Array) -> Array:
    """x w over x's last and w's first axis, as one product of two matrices: its gradients run faster in XLA than those
    of a product with more axes."""
    y = x.reshape(-1, x.shape[-1]) @ w.reshape(w.shape[0], -1)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


def linears(x: Float[Array, "*b n"], w: Float[Array, "n m"], *widths: int) -> list[Array]:
    """x w in parts of so many columns, a product each: cutting one result up would have the backward pass write its
    gradient together again, and read it, which for wide parts costs as much as the product."""
    assert sum(widths) == w.shape[1]
    parts = []
    for part in jnp.split(w, np.cumsum(widths[:-1]), axis=1):
        parts.append(linear(x, part))
        x = jax.lax.optimization_barrier(x)  # else XLA joins the products again
    return parts


def rms_norm(x: Float[Array, "*b D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*b D"]:
    """scale * x / sqrt(mean(x^2) + eps), statistics in float32, result in x's dtype (Zhang & Sennrich 2019)."""

    @pointwise
    def norm(x: Array, scale: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        return (y * scale).astype(x.dtype)

    return norm(x, scale)


def layer_norm(x: Float[Array, "*b D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float) -> Array:
    """scale * (x - mean) / sqrt(variance + eps) + bias, variance biased and centred first; float32 inside."""

    @pointwise
    def norm(x: Array, scale: Array, bias: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        return (y * scale + bias).astype(x.dtype)

    return norm(x, scale, bias)


class Norm(Part):
    """RMSNorm, or LayerNorm with gain and bias or with a gain alone, over the width."""

    scale: nnx.Param
    bias: nnx.Param

    @staticmethod
    def tensors(spec: Spec, options: None = None) -> dict[str, Tensor]:
        gain = {"scale": Tensor((spec.width,), "vector", fill=1.0)}
        return gain | {"bias": Tensor((spec.width,), "vector")} if spec.norm == "layernorm" else gain

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        if self.spec.norm == "rmsnorm":
            return rms_norm(x, self.scale[...], self.spec.norm_eps)
        bias = self.bias[...] if self.spec.norm == "layernorm" else jnp.zeros_like(self.scale[...])
        return layer_norm(x, self.scale[...], bias, self.spec.norm_eps)


def rope(x: Float[Array, "B T H d"], positions: Int[Array, "#B T"], theta: float) -> Float[Array, "B T H d"]:
    """Rotary embedding, half-split: component j turns with j + d/2 by positions * theta^(-2j/d) (Su et al. 2021).

    Angles and the rotation in float32, result in x's dtype.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def scaled(x: Float[Array, "*s"], factor: float) -> Float[Array, "*s"]:
    """factor * x in x's dtype; x itself for factor 1."""
    return x if factor == 1 else (factor * x.astype(jnp.float32)).astype(x.dtype)


def soft_cap(x: Float[Array, "*s"], cap: float) -> Float[Array, "*s"]:
    """cap * tanh(x / cap); the identity for cap 0."""
    return cap * jnp.tanh(x / cap) if cap else x
