"""The recurrence by kernels, for Hopper or for TPUs: the arrays as the kernels have them, and the gradient of R.

A head's rows of the batch go in blocks. The gradient of R sums over all tokens: one product, in XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import population
from pallas_kernels.slstm.xla import EMPTY

F32 = jnp.float32


class Form(NamedTuple):
    """A device's kernels. Their arrays end in (rows, d) or in (d, rows), as `side` says; R is (heads, 4, d before, d
    after); keep (members, tiles, T, rows), which may be left out, is 0 where a document begins."""

    # (wx (heads, tiles, T, 4), R, start (heads, tiles, 4) the states h, c, n, m, *keep, save) -> [h (heads, tiles, T),
    # the last states; and where `save` the raw gates and the states c, n, m (heads, tiles, T, 3) before each token]
    forward: Callable[..., Any]
    # (raw, states, R, dh, d last, of which h's is in dh already, *keep) -> [the gates' gradients, those of the first
    # states]
    backward: Callable[..., Any]
    rows: Callable[[int], int]  # of a block, of a batch
    side: int  # the axis of the rows
    unit: int  # the kernels take heads of a multiple of so many units


def slstm(
    form: Form, gates: Array, recurrent: Array, state: tuple[Array, ...] | None, reset: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    """As `xla.slstm`."""
    B, _, H, _, d = gates.shape
    empty = jnp.zeros((B, H, d), F32)
    start = jnp.stack((empty, empty, empty, empty + EMPTY) if state is None else tuple(state), axis=2)
    keep = [] if reset is None else [1.0 - reset.astype(F32)]

    def wide(a: Array, axes: int = 1) -> Array:
        """Units to a multiple: those added have gates, and so outputs, of 0."""
        pads = [(0, 0)] * (a.ndim - axes) + [(0, -d % form.unit)] * axes
        return jnp.pad(a.astype(F32), pads) if d % form.unit else a.astype(F32)

    scanned: Any = _scan(form, wide(gates), wide(recurrent, 2), wide(start), *keep)
    h, last = scanned
    return h[..., :d], tuple(last[:, :, k, :d] for k in range(4))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(form: Form, gates: Array, R: Array, start: Array, *keep: Array) -> Any:
    h, last = _forward(form, gates, R, start, *keep, save=False)
    return untiled(h, 2, gates, form), untiled(last, 1, gates, form)


def _forward(form: Form, gates: Array, R: Array, start: Array, *keep: Array, save: bool) -> Any:
    run = population.folded(partial(form.forward, save=save), shared=(3,))
    return run(tiled(gates, 2, form), by_head(R), tiled(start, 1, form), *(rows_of(a, form) for a in keep))


def _scan_forward(form: Form, gates: Array, R: Array, start: Array, *keep: Array) -> Any:
    h, last, raw, states = _forward(form, gates, R, start, *keep, save=True)
    h = untiled(h, 2, gates, form)
    return (h, untiled(last, 1, gates, form)), (raw, states, R, h, start[:, :, 0], *keep)


def _scan_backward(form: Form, kept: Any, cotangents: Any) -> Any:
    (raw, states, R, h, first, *keep), (dh, d_last) = kept, cotangents
    dh = dh.at[:, -1].add(d_last[:, :, 0])
    run = population.folded(form.backward, shared=(5,))
    blocks = tiled(dh, 2, form), tiled(d_last, 1, form), *(rows_of(a, form) for a in keep)
    d_gates, d_start = run(raw, states, by_head(R), *blocks)
    d_gates, d_start = untiled(d_gates, 2, h, form), untiled(d_start, 1, h, form)
    before = jnp.concatenate([first[:, None], h[:, :-1]], axis=1)
    if keep:
        before *= keep[0][:, :, None, None]
    # "high": three passes of bfloat16 on TPUs, TF32 on GPUs
    dR = jnp.einsum("bthd,bthge->hdge", before, d_gates, precision="high", preferred_element_type=F32)
    return d_gates, jnp.transpose(dR, (2, 0, 1, 3)), d_start, *(jnp.zeros_like(a) for a in keep)


_scan.defvjp(_scan_forward, _scan_backward)


# ----------------------------------------------------------------------------------------- how the kernels have arrays


def rows_of(keep: Array, form: Form) -> Array:
    """(B, T) -> (1, tiles, T, rows)."""
    return jnp.swapaxes(padded(keep, form), 1, 2)[None]


def padded(a: Array, form: Form) -> Array:
    """(B, ...) -> (tiles, rows, ...)."""
    rows = form.rows(a.shape[0])
    a = jnp.pad(a, ((0, -a.shape[0] % rows), *((0, 0),) * (a.ndim - 1)))
    return a.reshape(-1, rows, *a.shape[1:])


def tiled(a: Array, heads: int, form: Form) -> Array:
    """(B, ..., H, ..., d), heads at axis `heads` -> (H, tiles, ..., rows and d)."""
    return jnp.moveaxis(padded(a, form), (heads + 1, 1), (0, form.side))


def untiled(a: Array, heads: int, like: Array, form: Form) -> Array:
    """The inverse; `like` has as many rows as is wanted."""
    a = jnp.moveaxis(a, (0, form.side), (heads + 1, 1))
    return a.reshape(-1, *a.shape[2:])[: like.shape[0]]


def by_head(R: Array) -> Array:
    """(4, H, d, d) -> (H, 4, d, d)."""
    return jnp.swapaxes(R, 0, 1)


# ----------------------------------------------------------------------------------------- elementwise, in any kernel


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def tanh(x: Array) -> Array:
    return 2.0 * sigmoid(2.0 * x) - 1.0


def log_sigmoid(x: Array) -> Array:
    return jnp.minimum(x, 0.0) - jnp.log(1.0 + jnp.exp(-jnp.abs(x)))


def parts(i: Array, f: Array, m: Array) -> tuple[Array, Array, Array]:
    """What is left of the old memory, what is taken of the new, and the next m. One of the two is 1."""
    old = log_sigmoid(f) + m
    smaller = jnp.exp(-jnp.abs(old - i))
    return jnp.where(old >= i, 1.0, smaller), jnp.where(old >= i, smaller, 1.0), jnp.maximum(old, i)
