"""Chunked cross-entropy in plain XLA: a scan over chunks of rows, each chunk's logits computed and dropped.

With g the cotangent of nll and h that of lse, softmax p and label y, the gradient of the logits of a row is
(g + h) p - g onehot(y), times 1 - (z / c)^2 under a cap c.

Chunk i holds rows i, i + n, i + 2n, ..: a reshape to (rows, n) keeps the leading axis leading, so rows sharded in
contiguous pieces (a batch) stay on their device, where chunks of contiguous rows would each live on one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    x: Float[Array, "N D"], w: Float[Array, "D V"], labels: Int[Array, " N"], cap: float, chunk: int
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    return _forward(x, w, labels, cap, chunk)[0]


def _forward(x: Array, w: Array, labels: Array, cap: float, chunk: int) -> tuple[tuple[Array, Array], Any]:
    head = w.astype(x.dtype)

    def body(carry: None, rows: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        x, labels = rows
        z = _logits(x, head, cap)
        lse = _logsumexp(z)
        # a label below 0 reads the first column, for nothing
        return carry, (lse, jnp.take_along_axis(z, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0])

    _, (lse, z_label) = _by_chunks(body, None, (x, labels), chunk)
    kept = labels >= 0
    return (jnp.where(kept, lse - z_label, 0.0), jnp.where(kept, lse, 0.0)), (x, w, labels, lse)


def _backward(cap: float, chunk: int, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    x, w, labels, lse = saved
    head = w.astype(x.dtype)
    d_nll, d_lse = (jnp.where(labels >= 0, d, 0.0) for d in cotangents)

    def body(dw: Array, rows: tuple[Array, ...]) -> tuple[Array, Array]:
        x, labels, lse, d_nll, d_lse = rows
        z = _logits(x, head, cap)
        dz = (d_nll + d_lse)[:, None] * jnp.exp(z - lse[:, None])
        dz = dz - jnp.where(_onehot(labels, z), d_nll[:, None], 0.0)
        if cap:
            dz = dz * (1 - jnp.square(z / cap))
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("nv,dv->nd", dz, head, preferred_element_type=jnp.float32)
        return dw + jnp.einsum("nd,nv->dv", x, dz, preferred_element_type=jnp.float32), dx.astype(x.dtype)

    dw, dx = _by_chunks(body, jnp.zeros(w.shape, jnp.float32), (x, labels, lse, d_nll, d_lse), chunk)
    return dx, dw.astype(w.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _logits(x: Float[Array, "n D"], head: Float[Array, "D V"], cap: float) -> Float[Array, "n V"]:
    z = jnp.einsum("nd,dv->nv", x, head, preferred_element_type=jnp.float32)
    return cap * jnp.tanh(z / cap) if cap else z


def _logsumexp(z: Float[Array, "n V"]) -> Float[Array, " n"]:
    """Without a shift of the sum behind the maximum: on accelerators one pass over the logits finds both."""
    if dispatch.device().platform == "cpu":  # where two passes, in vectors, are the faster ones
        top = jnp.max(z, axis=-1)
        return top + jnp.log(jnp.sum(jnp.exp(z - top[:, None]), axis=-1))

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        """Of (maximum, sum of exponentials less it) of two sets."""
        smaller = jnp.exp(-jnp.abs(a[0] - b[0]))
        return jnp.maximum(a[0], b[0]), jnp.where(a[0] > b[0], a[1] + smaller * b[1], smaller * a[1] + b[1])

    top, total = jax.lax.reduce((z, jnp.ones_like(z)), (jnp.finfo(z.dtype).min, jnp.zeros((), z.dtype)), join, (1,))
    return top + jnp.log(total)


def _onehot(labels: Int[Array, " n"], z: Float[Array, "n V"]) -> Array:
    return labels[:, None] == jax.lax.broadcasted_iota(labels.dtype, z.shape, 1)


def _by_chunks(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, chunk: int) -> tuple[Any, Any]:
    """Scans `body(carry, some rows) -> (carry, outputs of those rows)` over all rows, at most `chunk` at a time."""
    total = jax.tree.leaves(rows)[0].shape[0]
    n = -(-total // chunk)
    if n <= 1:
        return body(carry, rows)
    whole = total - total % n  # the few rows that remain are a smaller chunk of their own
    strided = jax.tree.map(lambda a: jnp.moveaxis(a[:whole].reshape(-1, n, *a.shape[1:]), 1, 0), rows)
    carry, out = jax.lax.scan(body, carry, strided)
    out = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(whole, *a.shape[2:]), out)
    if whole < total:
        carry, rest = body(carry, jax.tree.map(lambda a: a[whole:], rows))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
    return carry, out
