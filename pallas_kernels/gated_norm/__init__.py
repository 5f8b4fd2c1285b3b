"""Mamba-2's gated norm: the skip, the gate and RMSNorm behind it, in one pass over the channels."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_groups
from pallas_kernels.gated_norm import reference, xla


def gated_norm(
    y: Float[Array, "B T E"],
    u: Float[Array, "B T E"],
    z: Float[Array, "B T E"],
    skip: Float[Array, " H"],
    gain: Float[Array, " E"],
    *,
    groups: int = 1,
    eps: float,
    kernels: str = "auto",
) -> Float[Array, "B T E"]:
    """gain h / sqrt(mean(h^2) + eps) of h = (y + D u) silu(z), in y's dtype. `skip` is D: one number for each of H
    heads, of E / H neighbouring channels. The mean is over the channels of each of `groups` groups, which divide the
    heads.

    Precision: the mean and what follows it are float32. By the kernel all before it is, too; by the plain form the skip
    and the gate are in y's dtype. The kernel's gradient of u is that of y, rounded to y's dtype, times D.
    FLOPs: about 12 E a token. Memory between the passes: the inputs alone; the backward pass works h out again.
    One token a row, as in decoding, is plain on every device; so is everything on TPUs.
    Raises `ValueError` for groups that do not divide the heads, and `kernels` of no form; `dispatch.Unsupported`, which
    is one too, where the form that `kernels` names does not take the arguments.
    Source: Dao & Gu 2024 (arXiv 2405.21060), figure 6, with the gate before the norm as in the code published with it.
    """
    check_groups(groups, skip.shape[0])
    several = y.shape[1] > 1
    own = {"mosaic_gpu": dispatch.refusals("gated_norm", y, u, z, groups)["mosaic_gpu"]} if several else {}
    chosen = dispatch.choose("gated_norm", kernels, own, plain_is_fast=not several)
    if chosen in own:
        return dispatch.form("gated_norm", chosen).gated_norm(y, u, z, skip, gain, groups, eps)
    return (reference if chosen == "reference" else xla).gated_norm(y, u, z, skip, gain, groups, eps)
