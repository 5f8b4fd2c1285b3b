"""The delta rule by a walk over the chunks: the triangular systems and scores of all of them come first, side by side
in XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import chunk_walk
from pallas_kernels.delta_rule import xla


def delta_rule(
    form: chunk_walk.Form, q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None, state: Array | None,
    reset: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    # Of what is worked out before the walk, the inverses alone are kept for the backward pass.
    keep = jax.checkpoint_policies.save_only_these_names("inverse")
    in_chunks = jax.checkpoint(xla.in_chunks, policy=keep, prevent_cse=False, static_argnums=6)
    read, write, W, U, weights, carried = in_chunks(q, k, v, beta, log_decay, reset, form.L)
    carried = jnp.broadcast_to(carried, (*carried.shape[:3], k.shape[-1]))
    return chunk_walk.recurrence(form, read, write, -W, U, weights, carried, state, v.shape[1])
