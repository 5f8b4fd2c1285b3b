"""GLA on Hopper: the scores of all chunks side by side in XLA, then a walk over them."""

from __future__ import annotations

import jax
from jaxtyping import Array

from pallas_kernels import chunk_walk
from pallas_kernels.gated_recurrence.walk import L
from pallas_kernels.gla import xla

WIDEST = 256  # keys: the state takes half of a thread's registers


def refusal(q: Array, v: Array) -> str:
    """Why the kernel does not take these arguments; "" where it does."""
    return chunk_walk.refusal(q, v, WIDEST)


def gla(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    # Not kept for the backward pass: copies of q and k, and their decays, for every size of blocks.
    in_chunks = jax.checkpoint(xla.in_chunks, prevent_cse=False, static_argnums=5)
    read, write, v_chunks, weights, carried = in_chunks(q, k, v, log_decay, reset, L)
    return chunk_walk.recurrence(read, write, None, v_chunks, weights, carried, state, v.shape[1])
