"""The delta rule on Hopper: triangular systems and scores of all chunks side by side, by a kernel of their own
(`delta_chunks` to `dispatch`) or XLA, then a walk over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import chunk_walk, dispatch
from pallas_kernels.delta_rule import chunks, xla
from pallas_kernels.gated_recurrence.walk import L

WIDEST = 192  # keys: beside a wider state, addresses of shared memory spill from the registers


def refusal(q: Array, v: Array) -> str:
    """Why the kernel does not take these arguments; "" where it does."""
    return chunk_walk.refusal(q, v, WIDEST)


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None, state: Array | None, reset: Array | None,
    kernels: str = "auto",
) -> tuple[Array, Array]:  # fmt: skip
    (T, _, dv), dk = v.shape[1:], k.shape[-1]
    if dispatch.choose("delta_chunks", kernels, {"mosaic_gpu": lambda: chunks.refusal(q, v)}) == "mosaic_gpu":
        read, write, erase, U, weights, carried = chunks.in_chunks(q, k, v, beta, log_decay, reset)
    else:
        # Of what is worked out before the walk, the inverses alone are kept for the backward pass.
        keep = jax.checkpoint_policies.save_only_these_names("inverse")
        in_chunks = jax.checkpoint(xla.in_chunks, policy=keep, prevent_cse=False, static_argnums=6)
        read, write, W, U, weights, carried = in_chunks(q, k, v, beta, log_decay, reset, L)
        erase = -W
    carried = jnp.broadcast_to(carried, (*carried.shape[:3], read.shape[-1]))
    out, final = chunk_walk.recurrence(read, write, erase, U, weights, carried, state, T)
    return out[..., :dv], final[:, :, :dk, :dv]
