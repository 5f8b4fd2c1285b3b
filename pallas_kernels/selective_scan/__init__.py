"""Mamba-1's selective scan: a linear recurrence with its own decay for every (channel, state) pair."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_chunk
from pallas_kernels.selective_scan import reference, xla


def selective_scan(
    u: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    state: Float[Array, "B E N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    bias: Float[Array, " E"] | None = None,
    *,
    chunk: int = 64,
    kernels: str = "auto",
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t^T, y_t = h_t C_t, elementwise over (E, N); returns (y in u's dtype,
    h_T in float32). dt >= 0 and A <= 0 in float32; with a `bias` the steps are softplus(dt + bias) instead, of dt in
    any dtype and of any sign. `state` is h_0 (zero if none); where `reset` is true h_{t-1} counts as zero.

    All arithmetic is float32; the gradient of raw steps is in their dtype. FLOPs: 7 E N a token (dt A, exp, (dt u) B,
    multiply-add, multiply-add with C) plus E. The kernels for GPUs form the steps themselves, others are given them.
    Memory between the passes: the states at the borders of chunks, T / Q of them (Q = `chunk`; in the kernels 8 on
    GPUs, 4 with more than 16 states, and 128 on TPUs); the backward pass runs each chunk again.
    Raises `ValueError` for a chunk below 1, and `kernels` of no form; `dispatch.Unsupported`, which is one too, where
    the form that `kernels` names does not take the arguments.
    Source: Gu & Dao 2023 (arXiv 2312.00752).
    """
    check_chunk(chunk)
    choice = dispatch.choose("selective_scan", kernels, dispatch.refusals("selective_scan", u, A))
    if choice in dispatch.MODULES:
        return dispatch.form("selective_scan", choice).selective_scan(u, dt, A, B, C, state, reset, bias)
    if bias is not None:
        dt = xla.step_sizes(dt, bias)
    if choice == "reference":
        out, final = reference.selective_scan(u, dt, A, B, C, state, reset)
        return out.astype(u.dtype), final
    return xla.selective_scan(u, dt, A, B, C, state, reset, chunk)
