"""The chunked delta rule, with or without a decay per head: DeltaNet and Gated DeltaNet."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_chunk, check_groups
from pallas_kernels.delta_rule import reference, xla


def delta_rule(
    q: Float[Array, "B T G dk"],
    k: Float[Array, "B T G dk"],
    v: Float[Array, "B T H dv"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None = None,
    state: Float[Array, "B H dk dv"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    chunk: int = 32,
    kernels: str = "auto",
) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
    """Per head, R_t = exp(g_t) S_{t-1}, S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T, o_t = S_t^T q_t; returns (o in v's
    dtype, S_T in float32).

    g = `log_decay` <= 0, 0 if none. Head h reads group floor(h G / H) of q and k; G divides H. beta |k|^2 in [0, 2]
    keeps the transition I - beta k k^T from growing anything. `state` is S_0 (zero if none). Where `reset` is true
    S_{t-1} counts as zero: the first token of a document.

    Precision: beta, g, its sums and exponentials, the triangular system and the states are float32; products take
    their operands in v's dtype and accumulate in float32. Only exponentials of non-positive numbers are formed.
    FLOPs per token and head, with c = (Q + 1) / 2 visible positions on average in a chunk of Q: 2 c (3 dk + 2 dv) + 6
    dk dv + Q^2 / 3. Chunked, everything runs in the full square, per token G 4 dk Q + H (2 Q (dk + 2 dv) + 6 dk dv +
    I), where I is 2 Q (Q - 1) for a Q up to 16 or odd and Q^2 / 2 more than that of Q / 2 for others, with T padded
    to whole chunks. By the kernels Q is 64 on Hopper and 128 on TPUs, whatever `chunk` says. Where one on Hopper works
    the chunks out too (`gpu_chunks.py`), the system's numbers are two of bfloat16 each, 16 bits, and per token it all
    takes H (8 Q dk + 6 Q dv + 6 dk dv + 60 Q^2).
    Memory between the passes, plain: T Q (2 G + 4 H) numbers a row, 3 copies of k and v, and T / Q states; by the
    kernels the inputs and, a head, T (3 dk + dv + Q) numbers and T / Q states in v's dtype, T Q + T / Q dk in float32.
    They pad widths to multiples of 64 on Hopper, of 16 on TPUs.
    Raises `ValueError` for a chunk below 1, a G that does not divide H, and `kernels` of no form;
    `dispatch.Unsupported`, which is one too, where the form that `kernels` names does not take the arguments.
    Source: Yang et al. 2024 (arXiv 2406.06484; gated: 2412.06464).
    """
    check_chunk(chunk)
    check_groups(k.shape[2], v.shape[2])
    chosen = dispatch.choose("delta_rule", kernels, dispatch.refusals("delta_rule", q, v))
    if chosen in dispatch.MODULES:
        return dispatch.form("delta_rule", chosen).delta_rule(q, k, v, beta, log_decay, state, reset, kernels)
    if chosen == "reference":
        out, final = reference.delta_rule(q, k, v, beta, log_decay, state, reset)
        return out.astype(v.dtype), final
    return xla.delta_rule(q, k, v, beta, log_decay, state, reset, chunk)
