"""The mLSTM cell of xLSTM: a gated recurrence with exponential input gate, normaliser and stabiliser, in chunks."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_chunk
from pallas_kernels.mlstm import reference, xla


class State(NamedTuple):
    """C and n are in units of e^m: two states are the same where C e^m and n e^m are."""

    C: Float[Array, "B H dk dv"]
    n: Float[Array, "B H dk"]
    m: Float[Array, "B H"]


def mlstm(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T H dv"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: State | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    chunk: int = 64,
    kernels: str = "auto",
    eps: float = 1e-6,
) -> tuple[Float[Array, "B T H dv"], State]:
    """With m_t = max(logsig(f_t) + m_{t-1}, i_t) and q' = q / sqrt(dk):

        C_t = exp(logsig(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T      (n alike, with k_t)
        h_t = C_t^T q'_t / (max(|n_t . q'_t|, exp(-m_t)) + eps)

    Returns (h in v's dtype, the state after it in float32). i and f are pre-activations; where `reset` is true the
    state before counts as empty. Without a state, m starts at minus infinity: h depends on it through eps alone.

    Precision: gates, sums, exponentials, normaliser and states are float32; products take their operands in v's dtype
    and accumulate in float32. m is a constant to the backward pass, h being independent of it but for eps.
    FLOPs per token and head, c = (Q + 1) / 2: 2 (dk + dv) c + 4 dk dv + 2 dk dv / Q + 4 dk; the plain form runs the
    full square, Q in place of c, and pads T to whole chunks, as do the kernels, where Q is 64 on Hopper and 128 on
    TPUs, and which pad widths to multiples of Q too.
    Memory between the passes, by the kernels: the inputs, h, the states given, and in float32 7 numbers (9 with
    documents) a token, n at every chunk and (T / Q)^2 decays between chunks, a head.
    Raises `ValueError` for a chunk below 1, and `kernels` of no form; `dispatch.Unsupported`, which is one too, where
    the form that `kernels` names does not take the arguments.
    Source: Beck et al. 2024 (arXiv 2405.04517), Beck et al. 2025 (arXiv 2503.14376).
    """
    check_chunk(chunk)
    chosen = dispatch.choose("mlstm", kernels, dispatch.refusals("mlstm", q, v))
    if chosen == "reference":
        h, after = reference.mlstm(q, k, v, i, f, state, reset, eps)
        return h.astype(v.dtype), State(*after)
    if chosen in dispatch.MODULES:
        h, C, n, m = dispatch.form("mlstm", chosen).mlstm(q, k, v, i, f, state, reset, eps)
    else:
        h, C, n, m = xla.mlstm(q, k, v, i, f, state, reset, chunk, eps)
    return h, State(C, n, m)
