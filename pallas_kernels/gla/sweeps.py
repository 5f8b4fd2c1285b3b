"""GLA by a walk over the chunks. The scores of all of them come first, side by side: in XLA, or by a kernel of the
device's own."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import chunk_walk, dispatch
from pallas_kernels.chunks import by_head
from pallas_kernels.gla import xla


def gla(
    form: chunk_walk.Form, own: Any, q: Array, k: Array, v: Array, log_decay: Array, state: Array | None,
    reset: Array | None, kernels: str,
) -> tuple[Array, Array]:  # fmt: skip
    """`own`: the module of the device's kernel, if it has one, which takes what the walk takes."""
    (T, _, dv), dk = v.shape[1:], k.shape[-1]
    if own and dispatch.choose("gla_chunks", kernels, {own.NAME: lambda: ""}) == own.NAME:
        read, write, weights, carried = own.in_chunks(q.astype(v.dtype), k.astype(v.dtype), log_decay, reset)
        v_chunks = by_head(v, form.L)
    else:
        # Not kept for the backward pass: copies of q and k, and their decays, for every size of blocks.
        in_chunks = jax.checkpoint(xla.in_chunks, prevent_cse=False, static_argnums=5)
        read, write, v_chunks, weights, carried = in_chunks(q, k, v, log_decay, reset, form.L)
    out, final = chunk_walk.recurrence(form, read, write, None, v_chunks, weights, carried, state, T)
    return out[..., :dv], final[:, :, :dk, :dv]
