"""Causal softmax attention over grouped heads: cuDNN's on GPUs, JAX's splash attention on TPUs, plain JAX elsewhere."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_groups
from pallas_kernels.attention import cudnn, reference, splash
from pallas_kernels.attention.xla import attend, causal, visible

__all__ = ["attention", "cached", "visible"]


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K Hk d"],
    v: Float[Array, "B K Hk d"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    window: int = 0,
    cap: float = 0.0,
    scale: float | None = None,
    kernels: str = "auto",
) -> Float[Array, "B T H d"]:
    """y_t = sum_s softmax_s(cap(scale q_t . k_s)) v_s over the keys that token t sees; in v's dtype.

    The last T keys are the tokens' own: t sees those up to itself, at most `window` of them, itself included (0: all),
    and of its own document where there are `segment_ids`. The K - T keys before them everyone sees (learned prefixes).
    Query head h reads key-value head floor(h Hk / H). cap(x) = c tanh(x / c) for c = `cap` > 0. The scale is
    1 / sqrt(d) by default.

    Precision: products of q's dtype accumulated in float32; softmax in float32.
    FLOPs: 2 H d T (T + 1) forward, 5 / 2 of that backward (score products again, and four gradients); the plain form
    runs the full square, 4 H d T K, and its backward pass keeps the weights, B H T K numbers of q's dtype. cuDNN and
    splash keep O(B H T); masks of documents and prefixes cost cuDNN a B T K table of q's dtype.
    Raises `ValueError` for key-value heads whose number does not divide that of the query heads, and for `kernels` of
    no form; `dispatch.Unsupported`, which is one too, where the form that `kernels` names does not take the arguments.
    Source: Vaswani et al. 2017; Ainslie et al. 2023 (arXiv 2305.13245); Dao et al. 2022 (arXiv 2205.14135).
    """
    check_groups(k.shape[2], q.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forms = {
        "cudnn": lambda: cudnn.refusal(q, k, cap),
        "splash": lambda: splash.refusal(q, k),
    }
    run = {"cudnn": cudnn.attention, "splash": splash.attention, "xla": causal, "reference": reference.attention}
    return run[dispatch.choose("attention", kernels, forms)](q, k, v, segment_ids, window, cap, scale)


def cached(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B K Hk d"],
    v: Float[Array, "B K Hk d"],
    mask: Bool[Array, "#B T K"],
    *,
    cap: float = 0.0,
    scale: float | None = None,
    kernels: str = "auto",
) -> Float[Array, "B T H d"]:
    """As `attention`, of T tokens that see what `mask` says of keys in any order: those of a cache and their own.

    Plain JAX everywhere: 4 H d K FLOPs a token. For one token the time is that of reading the cache; for a prompt on an
    accelerator there is a warning.
    """
    dispatch.choose("attention over a cache", kernels, {}, plain_is_fast=q.shape[1] == 1)
    return attend(q, k, v, mask, cap, scale)
