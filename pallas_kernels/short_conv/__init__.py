"""The short causal convolution of recurrent mixers, one filter a channel, with silu behind it."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.short_conv import reference, xla


def short_conv(
    x: Float[Array, "B T E"],
    past: Float[Array, "B K-1 E"],
    taps: Float[Array, "K E"],
    bias: Float[Array, " E"],
    seen: Bool[Array, "B K-1 T"] | None = None,
    *,
    kernels: str = "auto",
) -> Float[Array, "B T E"]:
    """silu(bias + sum_j taps_j x_{t-K+1+j}), in x's dtype; the last tap takes the current token. `past` (x's dtype) is
    x before the first token. Where `seen` is false at (j, t), tap j is left out for token t: what it would reach
    belongs to another document. None: every token sees all K - 1 before it.

    Precision: sums are float32. By the kernels silu and the gradient through it are float32, by the plain form, which
    is also what the kernels leave fewer than 8 tokens to, they are in x's dtype. FLOPs: 2 K E a token. Memory between
    the passes: the inputs alone; the backward pass works the sums out again.
    Raises `ValueError` for `kernels` of no form; `dispatch.Unsupported`, which is one too, where the form that
    `kernels` names does not take the arguments.
    Source: Fu et al. 2022 (arXiv 2212.14052); in this place and with silu, Gu & Dao 2023 (arXiv 2312.00752), figure 3.
    """
    own = {"mosaic_gpu": dispatch.refusals("short_conv", x, taps)["mosaic_gpu"]}
    chosen = dispatch.choose("short_conv", kernels, own)
    if chosen in own:
        return dispatch.form("short_conv", chosen).short_conv(x, past, taps, bias, seen)
    return (reference if chosen == "reference" else xla).short_conv(x, past, taps, bias, seen)
