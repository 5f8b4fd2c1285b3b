"""What recurrent mixers share: the causal short convolution, and where documents begin."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scalelab.models.layers import pointwise


def short_conv(
    x: Float[Array, "B T E"],
    taps: Float[Array, "K E"],
    bias: Float[Array, " E"] | None,
    past: Float[Array, "B K-1 E"],
    segments: Int[Array, "B T"] | None,
    past_segments: Int[Array, "B K-1"],
    activation: Callable[[Array], Array] = jax.nn.silu,
) -> tuple[Float[Array, "B T E"], Float[Array, "B K-1 E"], Int[Array, "B K-1"]]:
    """y_t = activation(bias + sum_j taps_j x_{t-K+1+j}), per channel; the last tap takes the current token. Taps that
    would reach into another document are left out. Returns y (x's dtype, summed in float32) and the last K - 1 inputs
    with their segments, which are what the next tokens need. Of the inside nothing is kept for the backward pass."""
    K, T = taps.shape[0], x.shape[1]
    padded = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    if segments is None:
        segments = jnp.broadcast_to(past_segments[:, -1:] if K > 1 else 0, x.shape[:2])
        whole = K == 1
    else:
        whole = False
    padded_segments = jnp.concatenate([past_segments, segments], axis=1)

    @pointwise
    def convolve(padded: Array, taps: Array) -> Array:
        y = jnp.zeros(x.shape, jnp.float32)
        for j in range(K):
            term = taps[j].astype(jnp.float32) * padded[:, j : j + T].astype(jnp.float32)
            if j < K - 1 and not whole:
                term = jnp.where((padded_segments[:, j : j + T] == segments)[..., None], term, 0.0)
            y += term
        return activation((y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype))

    return convolve(padded, taps), padded[:, T:], padded_segments[:, T:]


def no_past(batch: int, length: int, channels: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The `past` and `past_segments` of a convolution before the first token."""
    return jnp.zeros((batch, length - 1, channels), dtype), jnp.zeros((batch, length - 1), jnp.int32)


def beginnings(segments: Int[Array, "B T"] | None, last: Int[Array, " B"] | None) -> Bool[Array, "B T"] | None:
    """Which tokens begin a document, given the segment of the token before the first (None: there is none)."""
    if segments is None:
        return None
    before = segments[:, :1] if last is None else last[:, None]
    return segments != jnp.concatenate([before, segments[:, :-1]], axis=1)
