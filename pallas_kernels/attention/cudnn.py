"""cuDNN's fused attention, through `jax.nn`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.attention.xla import seen

DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(q: Array, k: Array, cap: float) -> str:
    """What `jax.nn` and cuDNN refuse, with gradients and under a mask."""
    d, before = q.shape[-1], k.shape[1] - q.shape[1]
    capability = dispatch.device().capability
    widest = 128 if capability and tuple(map(int, capability.split("."))) < (9, 0) else 256
    if q.dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {q.dtype}"
    if d % 8 or d > widest:
        return f"takes head widths that are multiples of 8 up to {widest}, not {d}"
    if before % 2:
        return f"takes an even number of keys before the tokens' own, not {before}"
    return "has no soft cap" if cap else ""


def attention(q: Array, k: Array, v: Array, segment_ids: Array | None, window: int, cap: float, scale: float) -> Array:
    T, K = q.shape[1], k.shape[1]
    if T % 2:  # cuDNN takes even lengths: one more token behind the others, which none of them sees
        q, k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, 1)), mode="edge")
        return attention(q, k, v, segment_ids, window, cap, scale)[:, :T]
    if segment_ids is None and T == K:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )  # fmt: skip
    # cuDNN aligns its causal mask to the first key: with keys before the tokens' own, the mask says it all.
    mask = seen(T, K, segment_ids, window)[:, None]
    mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))  # a bias of batch 1 would get a gradient
    return jax.nn.dot_product_attention(q, k, v, scale=scale, mask=mask, is_causal=T == K, implementation="cudnn")
