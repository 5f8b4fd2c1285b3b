"""JAX's splash attention for TPUs (`jax.experimental.pallas.ops.tpu`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dispatch

LANES = 128
BLOCK = 512  # of queries and keys, at most


def refusal(q: Array, k: Array) -> str:
    T, K = q.shape[1], k.shape[1]
    if K != T:
        return "has no keys before the tokens' own"
    return "" if T % LANES == 0 else f"takes lengths that are multiples of {LANES}, not {T}"


def attention(q: Array, k: Array, v: Array, segment_ids: Array | None, window: int, cap: float, scale: float) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H, d = q.shape[1:]
    causal: Any = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    block = next(b for b in (BLOCK, 256, LANES) if T % b == 0)
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([causal] * H),
        block_sizes=kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1, q_seq_shards=1, attn_logits_soft_cap=cap or None, interpret=dispatch.interpret(),
    )  # fmt: skip
    # The kernel wants the width of a head to fill the lanes, and its own scale in the queries.
    wide = [(0, 0), (0, 0), (0, 0), (0, -d % LANES)]
    q, k, v = (jnp.pad(jnp.swapaxes(a, 1, 2), wide) for a in ((q * scale).astype(q.dtype), k, v))
    documents = None if segment_ids is None else kernel.SegmentIds(segment_ids, segment_ids)
    y: Any = jax.vmap(run)(q, k, v, documents)
    return jnp.swapaxes(y, 1, 2)[..., :d].astype(v.dtype)
