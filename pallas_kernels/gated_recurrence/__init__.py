"""The chunked gated linear recurrence with one decay per head: Mamba-2's SSD, simple GLA, Lightning attention."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_chunk, check_groups
from pallas_kernels.gated_recurrence import reference, xla


def gated_recurrence(
    q: Float[Array, "B T G dk"],
    k: Float[Array, "B T G dk"],
    v: Float[Array, "B T H dv"],
    log_decay: Float[Array, "B T H"],
    state: Float[Array, "B H dk dv"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    weight: Float[Array, "B T H"] | None = None,
    *,
    chunk: int = 64,
    kernels: str = "auto",
) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
    """S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T, o_t = S_t^T q_t, per head; returns (o in v's dtype, S_T in float32).

    g = `log_decay` <= 0 and w = `weight` > 0 (1 if none) are float32. Head h reads group floor(h G / H) of q and k; G
    divides H. `state` is S_0 (zero if none). Where `reset` is true S_{t-1} counts as zero: the first token of a
    document.

    Precision: g, its sums and exponentials, and the states are float32; products take their operands in v's dtype and
    accumulate in float32. Only exponentials of non-positive numbers are formed.
    FLOPs per token, with c = (Q + 1) / 2 visible positions on average in a chunk of Q: G 2 dk c + H (2 dv c + 4 dk dv
    + 2 dk dv / Q); the plain form runs the full square, Q in place of c, and pads T to whole chunks.
    Memory between the passes: the inputs; the backward pass works the chunks out again. On Hopper, where heads of 64
    values share keys, also T / Q states in v's dtype. Its temporaries are, plain: scores and decays of all chunks, T Q
    (G + H) numbers a row, and T / Q states; by the kernels, where Q is 64 on Hopper and 128 on TPUs: T / Q states and,
    where heads share keys otherwise, the gradients of q and k head by head. The kernels pad widths to multiples of 64
    on Hopper, of 128 on TPUs.
    Raises `ValueError` for a chunk below 1, a G that does not divide H, and `kernels` of no form;
    `dispatch.Unsupported`, which is one too, where the form that `kernels` names does not take the arguments.
    Source: Dao & Gu 2024 (arXiv 2405.21060); Yang et al. 2023 (arXiv 2312.06635).
    """
    check_chunk(chunk)
    check_groups(k.shape[2], v.shape[2])
    chosen = dispatch.choose("gated_recurrence", kernels, dispatch.refusals("gated_recurrence", q, v))
    if chosen in dispatch.MODULES:  # these have the weight among the decays, and never write weighted values
        return dispatch.form("gated_recurrence", chosen).gated_recurrence(q, k, v, log_decay, state, reset, weight)
    if chosen == "reference":
        out, final = reference.gated_recurrence(q, k, v, log_decay, state, reset, weight)
        return out.astype(v.dtype), final
    if weight is not None:
        v = (weight[..., None] * v).astype(v.dtype)
    return xla.gated_recurrence(q, k, v, log_decay, state, reset, chunk)
