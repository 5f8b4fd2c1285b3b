"""The delta rule by a walk over the chunks. The triangular systems and scores of all of them come first, side by side:
in XLA, or by a kernel of the device's own, which is an operation of its own to `dispatch`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import chunk_walk, dispatch
from pallas_kernels.delta_rule import xla


def delta_rule(
    form: chunk_walk.Form, own: Any, q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None,
    state: Array | None, reset: Array | None, kernels: str,
) -> tuple[Array, Array]:  # fmt: skip
    """`own`: the module of the device's kernel, if it has one."""
    (T, _, dv), dk = v.shape[1:], k.shape[-1]
    if own and dispatch.choose("delta_chunks", kernels, {own.NAME: partial(own.refusal, q, v)}) == own.NAME:
        read, write, erase, U, weights, carried = own.in_chunks(q, k, v, beta, log_decay, reset)
    else:
        # Of what is worked out before the walk, the inverses alone are kept for the backward pass.
        keep = jax.checkpoint_policies.save_only_these_names("inverse")
        in_chunks = jax.checkpoint(xla.in_chunks, policy=keep, prevent_cse=False, static_argnums=6)
        read, write, W, U, weights, carried = in_chunks(q, k, v, beta, log_decay, reset, form.L)
        erase = -W
    carried = jnp.broadcast_to(carried, (*carried.shape[:3], read.shape[-1]))
    out, final = chunk_walk.recurrence(form, read, write, erase, U, weights, carried, state, T)
    return out[..., :dv], final[:, :, :dk, :dv]
