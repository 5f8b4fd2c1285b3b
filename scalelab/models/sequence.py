"""What recurrent mixers share: the causal short convolution, and where documents begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import short_conv as conv

F32 = jnp.float32


def short_conv(
    parts: Sequence[Float[Array, "B T _"]],
    taps: Float[Array, "K E"],
    bias: Float[Array, " E"] | None,
    past: Float[Array, "B K-1 E"],
    segments: Int[Array, "B T"] | None,
    past_segments: Int[Array, "B K-1"],
    per_row: Callable[..., Callable[..., Array]],
) -> tuple[list[Array], Float[Array, "B K-1 E"], Int[Array, "B K-1"]]:
    """y_t = silu(bias + sum_j taps_j x_{t-K+1+j}), per channel; the last tap takes the current token. Taps that would
    reach into another document are left out. The channels of `parts`, one after the other, are the E: what is used
    apart need not be written together. Returns y of each part (its dtype, summed in float32) and the last K - 1 inputs
    with their segments, which are what the next tokens need. `per_row`: the mixer's."""
    (K, E), (B, T, _) = taps.shape, parts[0].shape
    documents = segments is not None
    if segments is None:
        segments = jnp.broadcast_to(past_segments[:, -1:] if K > 1 else 0, (B, T))
    all_segments = jnp.concatenate([past_segments, segments], axis=1)
    if documents:
        seen = jnp.stack([all_segments[:, j : j + T] == segments for j in range(K)], axis=1)[:, :-1]
        visible = past
    else:  # another document can only be in the past
        seen, visible = None, jnp.where((past_segments == segments[:, :1])[..., None], past, 0)
    bias = jnp.zeros(E, F32) if bias is None else bias
    convolve = per_row(conv.short_conv, shared=(2, 3))
    cuts = np.cumsum([x.shape[-1] for x in parts[:-1]])
    pasts, ys = [], []
    for x, *own in zip(parts, *(jnp.split(a, cuts, axis=-1) for a in (past, visible, taps, bias)), strict=True):
        pasts.append(jnp.concatenate([own[0].astype(x.dtype), x], axis=1)[:, T:])
        ys.append(convolve(x, own[1].astype(x.dtype), *own[2:], seen))
    return ys, jnp.concatenate(pasts, axis=-1), all_segments[:, T:]


def no_past(batch: int, length: int, channels: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The `past` and `past_segments` of a convolution before the first token."""
    return jnp.zeros((batch, length - 1, channels), dtype), jnp.zeros((batch, length - 1), jnp.int32)


def beginnings(segments: Int[Array, "B T"] | None, last: Int[Array, " B"] | None) -> Bool[Array, "B T"] | None:
    """Which tokens begin a document, given the segment of the token before the first (None: there is none)."""
    if segments is None:
        return None
    before = segments[:, :1] if last is None else last[:, None]
    return segments != jnp.concatenate([before, segments[:, :-1]], axis=1)
