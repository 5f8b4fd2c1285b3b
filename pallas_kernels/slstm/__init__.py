"""The sLSTM cell of xLSTM: a scalar memory whose gates see the output before, so that tokens follow one another."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.slstm import reference, xla


class State(NamedTuple):
    """c and n are in units of e^m: two states are the same where h, c e^m and n e^m are."""

    h: Float[Array, "B H d"]
    c: Float[Array, "B H d"]
    n: Float[Array, "B H d"]
    m: Float[Array, "B H d"]


def slstm(
    gates: Float[Array, "B T H 4 d"],
    recurrent: Float[Array, "4 H d d"],
    state: State | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    kernels: str = "auto",
) -> tuple[Float[Array, "B T H d"], State]:
    """With raw_g = g_t + h_{t-1} R_g for each of the gates i, f, z, o, in this order, and everything elementwise else:

        m_t = max(logsig(raw_f) + m_{t-1}, raw_i)
        c_t = exp(logsig(raw_f) + m_{t-1} - m_t) c_{t-1} + exp(raw_i - m_t) tanh(raw_z)     (n alike, with 1)
        h_t = sigma(raw_o) c_t / n_t

    Returns (h, the state after it), all float32. R_g is (units before, units after) per head. Without a state the
    memory is empty; where `reset` is true the state before counts as empty. m is a constant to the backward pass: h
    does not depend on it.

    Precision: float32, but the kernel for GPUs rounds `recurrent` to bfloat16, and h and the gates' gradients to 16
    bits of mantissa on their way into the products. FLOPs a token: 8 H d^2. Memory between the passes: 8 numbers a
    unit and token; the kernels for TPUs pad d to a multiple of 128.
    Raises `ValueError` for `kernels` of no form; `dispatch.Unsupported`, which is one too, where the form that
    `kernels` names does not take the arguments.
    Source: Beck et al. 2024 (arXiv 2405.04517); state and R on the chip for all tokens: Poeppel et al. 2024 (arXiv
    2412.07752).
    """
    choice = dispatch.choose("slstm", kernels, dispatch.refusals("slstm", gates))
    run = {"reference": reference.slstm, "xla": xla.slstm}.get(choice) or dispatch.form("slstm", choice).slstm
    h, after = run(gates, recurrent, state, reset)
    return h, State(*after)
