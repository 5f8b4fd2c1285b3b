"""The recurrence on Hopper."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.gated_recurrence import gpu_shared, sweeps
from pallas_kernels.gated_recurrence.walk import L, walk

WIDEST = 256  # keys: the state's 256 x 64 block takes half of a thread's registers
WIDEST_BACK = 128  # values, in the backward pass: wider heads are worked on as several of the same keys
# blocks of memory are moved by eights
FORM = sweeps.Form(
    walk, L, unit=8, widest=lambda dv: WIDEST_BACK if dv % WIDEST_BACK == 0 else L,
    shared=gpu_shared.gradients, shared_fit=gpu_shared.fits,
)  # fmt: skip
gated_recurrence = partial(sweeps.gated_recurrence, FORM)


def refusal(q: Array, v: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    dk = q.shape[-1]
    if v.dtype != jnp.bfloat16:
        return f"takes bfloat16 values, not {v.dtype}"
    return f"takes keys of a width up to {WIDEST}, not {dk}" if dk > WIDEST else ""
