"""What recurrent mixers share: the causal short convolution, and where documents begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

F32 = jnp.float32


def short_conv(
    parts: Sequence[Float[Array, "B T _"]],
    taps: Float[Array, "K E"],
    bias: Float[Array, " E"] | None,
    past: Float[Array, "B K-1 E"],
    segments: Int[Array, "B T"] | None,
    past_segments: Int[Array, "B K-1"],
    activation: Callable[[Array], Array] = jax.nn.silu,
) -> tuple[list[Array], Float[Array, "B K-1 E"], Int[Array, "B K-1"]]:
    """y_t = activation(bias + sum_j taps_j x_{t-K+1+j}), per channel; the last tap takes the current token. Taps that
    would reach into another document are left out. The channels of `parts`, one after the other, are the E: what is
    used apart need not be written together. Returns y of each part (its dtype, summed in float32) and the last K - 1
    inputs with their segments, which are what the next tokens need. Of the inside nothing is kept for the backward
    pass."""
    (K, E), (B, T, _) = taps.shape, parts[0].shape
    if segments is None:
        segments = jnp.broadcast_to(past_segments[:, -1:] if K > 1 else 0, (B, T))
    all_segments = jnp.concatenate([past_segments, segments], axis=1)
    seen = jnp.stack([all_segments[:, j : j + T] == segments for j in range(K)])[..., None]
    bias = jnp.zeros(E, F32) if bias is None else bias
    cuts = np.cumsum([x.shape[-1] for x in parts[:-1]])
    pasts, ys = [], []
    for x, *own in zip(parts, *(jnp.split(a, cuts, axis=-1) for a in (past, taps, bias)), strict=True):
        padded = jnp.concatenate([own[0].astype(x.dtype), x], axis=1)
        pasts.append(padded[:, T:])
        ys.append(_convolve(activation, padded, *own[1:], seen))
    return ys, jnp.concatenate(pasts, axis=-1), all_segments[:, T:]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation: Any, padded: Array, taps: Array, bias: Array, seen: Array) -> Array:
    return activation(_sums(padded, taps, bias, seen).astype(padded.dtype))


def _sums(padded: Array, taps: Array, bias: Array, seen: Array) -> Array:
    y = bias.astype(F32)
    for j in range(len(taps)):
        y += taps[j].astype(F32) * jnp.where(seen[j], padded[:, j : j + seen.shape[2]].astype(F32), 0.0)
    return y


def _forward(activation: Any, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _convolve(activation, *arguments), arguments


def _backward(activation: Any, kept: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    """Through the activation once, then to every tap: with the derived one a small Mamba-2's whole step took a quarter
    longer on CPUs."""
    padded, taps, bias, seen = kept
    K, _, T, _ = seen.shape
    # Else the compiler finds the forward pass' sums again, and keeps them for this one.
    sums = _sums(padded, jax.lax.optimization_barrier(taps), bias, seen)
    _, pull = jax.vjp(lambda y: activation(y.astype(padded.dtype)), sums)
    (d_y,) = pull(d_out)

    def over_tokens(a: Array) -> Array:
        return jnp.sum(jnp.sum(a, axis=1), axis=0)  # one after the other: faster on CPUs

    d_padded, d_taps = jnp.zeros(padded.shape, F32), []
    for j in range(K):
        here = jnp.where(seen[j], d_y, 0.0)
        d_padded += jnp.pad(taps[j].astype(F32) * here, ((0, 0), (j, K - 1 - j), (0, 0)))
        d_taps.append(over_tokens(here * padded[:, j : j + T].astype(F32)))
    d_taps, d_bias = jnp.stack(d_taps).astype(taps.dtype), over_tokens(d_y).astype(bias.dtype)
    return d_padded.astype(padded.dtype), d_taps, d_bias, None


_convolve.defvjp(_forward, _backward)


def no_past(batch: int, length: int, channels: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The `past` and `past_segments` of a convolution before the first token."""
    return jnp.zeros((batch, length - 1, channels), dtype), jnp.zeros((batch, length - 1), jnp.int32)


def beginnings(segments: Int[Array, "B T"] | None, last: Int[Array, " B"] | None) -> Bool[Array, "B T"] | None:
    """Which tokens begin a document, given the segment of the token before the first (None: there is none)."""
    if segments is None:
        return None
    before = segments[:, :1] if last is None else last[:, None]
    return segments != jnp.concatenate([before, segments[:, :-1]], axis=1)
