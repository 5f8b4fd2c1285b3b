"""Cross-entropy of a linear head, without ever holding all logits."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_chunk
from pallas_kernels.cross_entropy import reference, xla


def cross_entropy(
    x: Float[Array, "N D"],
    w: Float[Array, "D V"],
    labels: Int[Array, " N"],
    *,
    cap: float = 0.0,
    chunk: int = 1024,
    kernels: str = "auto",
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """z = x w, capped to c tanh(z / c) for c = `cap` > 0; returns (lse(z) - z_label, lse(z)), float32.

    Rows with a label below 0 are left out: both values are 0, and so are their gradients. Differentiable in x and w,
    through both values, so that a z-loss is a mean of lse**2 outside.

    Precision: w is cast to x's dtype; products accumulate in float32; logits, softmax and the gradient of w are
    float32 (the gradient of the logits is rounded to x's dtype before its products).
    Memory: at most `chunk` rows of logits at a time (and a remainder smaller than the number of chunks); between the
    passes only lse is kept, and the backward pass computes the logits again.
    FLOPs: 2 N D V forward, 6 N D V backward (2 of them recomputation).
    Sharding: a chunk holds every n-th row, so where N is a batch times a sequence with the batch sharded, each
    device works on its own rows in every chunk, and x stays where it is.
    Raises `ValueError` for a chunk below 1, and for `kernels` of no form.
    Source: rows in chunks, Hsu et al. 2024 (arXiv 2410.10989); logits computed again, Wijmans et al. 2024 (arXiv
    2411.09009); the cap, Gemma Team 2024 (arXiv 2408.00118).
    """
    check_chunk(chunk)
    if dispatch.choose("cross_entropy", kernels, {}, plain_is_fast=True) == "reference":
        return reference.cross_entropy(x, w, labels, cap)
    return xla.cross_entropy(x, w, labels, float(cap), int(chunk))
