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

BF16, F32 = jnp.bfloat16, jnp.float32


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


def full_product(x: Float[Array, "*b n"], w: Float[Array, "n m"]) -> Float[Array, "*b m"]:
    """x w in float32, w float32: for gates and routers. Of x in bfloat16 on tensor cores, which know no float32: w, or
    the gradient, is the sum of three numbers in bfloat16, so that one product with all three loses nothing but what
    sums in float32 lose. dx is rounded to x's dtype. Infinite numbers in bfloat16 give NaN."""
    if x.dtype == BF16:
        return _full_product(x, w)
    return jnp.matmul(x.astype(F32), w, precision="highest")


@jax.custom_vjp
def _full_product(x: Float[Array, "*b n"], w: Float[Array, "n m"]) -> Float[Array, "*b m"]:
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), jnp.concatenate(pieces(w), axis=1), preferred_element_type=F32)
    return _sum_of_pieces(y).reshape(*x.shape[:-1], -1)


def _full_product_backward(kept: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    (x, w), d = kept, d.reshape(-1, d.shape[-1])
    (d1, d2, d3), (w1, w2, _) = pieces(d), pieces(w)
    # The products left out are below 2^-16 of the whole, and dx is rounded to 2^-9.
    dx = jnp.matmul(jnp.concatenate([d1, d1, d2], axis=1), jnp.concatenate([w1, w2, w1], axis=1).T)
    rows = x.reshape(-1, x.shape[-1])
    dw = jnp.matmul(rows.T, jnp.concatenate([d1, d2, d3], axis=1), preferred_element_type=F32)
    return dx.reshape(x.shape), _sum_of_pieces(dw)


_full_product.defvjp(lambda x, w: (_full_product(x, w), (x, w)), _full_product_backward)


def pieces(a: Float[Array, "*s"]) -> list[Array]:
    """Three numbers in bfloat16 that add up to each number in float32, largest first."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)  # XLA may drop a cast there and back
        parts.append(part.astype(BF16))
        a = a - part
    return parts


def _sum_of_pieces(y: Float[Array, "b 3*m"]) -> Float[Array, "b m"]:
    high, middle, low = jnp.split(y, 3, axis=1)
    return high + (middle + low)


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
