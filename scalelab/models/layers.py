"""What blocks are made of: normalisation, rotary embedding, soft cap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from scalelab.models.part import Part
from scalelab.models.spec import Spec
from scalelab.parametrization import Tensor


def rms_norm(x: Float[Array, "*b D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*b D"]:
    """scale * x / sqrt(mean(x^2) + eps), statistics in float32, result in x's dtype (Zhang & Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


class Norm(Part):
    """RMSNorm, or LayerNorm with gain and bias, over the width. LayerNorm's variance is biased, mean((x - mean)^2)."""

    scale: nnx.Param
    bias: nnx.Param

    @staticmethod
    def tensors(spec: Spec, options: None = None) -> dict[str, Tensor]:
        gain = {"scale": Tensor((spec.width,), "vector", fill=1.0)}
        return gain if spec.norm == "rmsnorm" else gain | {"bias": Tensor((spec.width,), "vector")}

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        if self.spec.norm == "rmsnorm":
            return rms_norm(x, self.scale[...], self.spec.norm_eps)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.spec.norm_eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


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


def soft_cap(x: Float[Array, "*s"], cap: float) -> Float[Array, "*s"]:
    """cap * tanh(x / cap); the identity for cap 0."""
    return cap * jnp.tanh(x / cap) if cap else x
