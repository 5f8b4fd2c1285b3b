"""The chunked gated linear recurrence with a decay for every key channel: GLA."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_chunk
from pallas_kernels.gla import reference, xla


def gla(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T H dv"],
    log_decay: Float[Array, "B T H dk"],
    state: Float[Array, "B H dk dv"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    chunk: int = 32,
    kernels: str = "auto",
) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, per head; returns (o in v's dtype, S_T in float32).

    g = `log_decay` <= 0, float32. `state` is S_0 (zero if none). Where `reset` is true S_{t-1} counts as zero: the
    first token of a document. `chunk` is a power of two.

    Precision: g, its sums and exponentials, and the states are float32; products take their operands in v's dtype and
    accumulate in float32. Only exponentials of non-positive numbers are formed.
    FLOPs per token and head, with c = (Q + 1) / 2 visible positions on average in a chunk of Q: 2 (dk + dv) c + 4 dk
    dv; chunked: 2 (log2(Q) dk + dv) Q + 4 dk dv, with T padded to whole chunks. By the kernels Q is 64 on Hopper and
    128 on TPUs, whatever `chunk` says.
    Memory between the passes, plain: log2(Q) + 3 copies of q and k, T Q log2(Q) scores a head, and T / Q states; by the
    kernels the inputs and, a head, T (2 dk + dv + Q) numbers and T / Q states in v's dtype, T / Q dk in float32. They
    pad widths to multiples of 64 on Hopper, of 16 on TPUs.
    Raises `ValueError` for a chunk that is no power of two, and `kernels` of no form; `dispatch.Unsupported`, which is
    one too, where the form that `kernels` names does not take the arguments.
    Source: Yang et al. 2023 (arXiv 2312.06635), whose secondary blocks are here those of every size 1, 2, 4 ... Q / 2.
    """
    check_chunk(chunk, power_of_two=True)
    chosen = dispatch.choose("gla", kernels, dispatch.refusals("gla", q, v))
    if chosen in dispatch.MODULES:
        return dispatch.form("gla", chosen).gla(q, k, v, log_decay, state, reset, kernels)
    if chosen == "reference":
        out, final = reference.gla(q, k, v, log_decay, state, reset)
        return out.astype(v.dtype), final
    return xla.gla(q, k, v, log_decay, state, reset, chunk)
