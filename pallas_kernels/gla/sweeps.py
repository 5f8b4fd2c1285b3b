"""GLA by a walk over the chunks: the scores of all of them come first, side by side in XLA."""

from __future__ import annotations

import jax
from jaxtyping import Array

from pallas_kernels import chunk_walk
from pallas_kernels.gla import xla


def gla(
    form: chunk_walk.Form, q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    # Not kept for the backward pass: copies of q and k, and their decays, for every size of blocks.
    in_chunks = jax.checkpoint(xla.in_chunks, prevent_cse=False, static_argnums=5)
    read, write, v_chunks, weights, carried = in_chunks(q, k, v, log_decay, reset, form.L)
    return chunk_walk.recurrence(form, read, write, None, v_chunks, weights, carried, state, v.shape[1])
