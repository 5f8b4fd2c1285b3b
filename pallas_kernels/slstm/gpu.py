"""The recurrence on Hopper: the arrays as the kernels (`kernels.py`) have them, and the gradient of R.

A head's rows of the batch go in blocks of `ROWS`, which are the innermost axis there. The gradient of R sums over all
tokens: one product, in XLA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import compat
from pallas_kernels.slstm.kernels import ROWS, backward, forward
from pallas_kernels.slstm.xla import EMPTY

F32 = jnp.float32
WIDTHS = (64, 128, 192)  # of a head


def refusal(gates: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    if not compat.MOSAIC_GPU:
        return f"needs JAX {compat.MOSAIC_GPU_SINCE} or later"
    d = gates.shape[-1]
    return "" if d in WIDTHS else f"takes heads of width {', '.join(map(str, WIDTHS))}, not {d}"


def slstm(gates: Array, recurrent: Array, state: tuple[Array, ...] | None, reset: Array | None) -> Any:
    """As `xla.slstm`."""
    B, _, H, _, d = gates.shape
    empty = jnp.zeros((B, H, d), F32)
    start = jnp.stack((empty, empty, empty, empty + EMPTY) if state is None else tuple(state), axis=2)
    keep = None if reset is None else 1.0 - reset.astype(F32)
    h, last = _scan(gates.astype(F32), recurrent.astype(F32), start.astype(F32), keep)
    return h, tuple(last[:, :, k] for k in range(4))


@jax.custom_vjp
def _scan(gates, R, start, keep):
    h, last = forward(tiled(gates, 2), matrices(R, 3, 2), tiled(start, 1), rows_of(keep), save=False)
    return untiled(h, 2, gates), untiled(last, 1, gates)


def _scan_forward(gates, R, start, keep):
    h, last, raw, states = forward(tiled(gates, 2), matrices(R, 3, 2), tiled(start, 1), rows_of(keep), save=True)
    h = untiled(h, 2, gates)
    return (h, untiled(last, 1, gates)), (raw, states, R, h, start[:, :, 0], keep)


def _scan_backward(kept, cotangents):
    (raw, states, R, h, first, keep), (dh, d_last) = kept, cotangents
    dh = dh.at[:, -1].add(d_last[:, :, 0])
    d_gates, d_start = backward(raw, states, matrices(R, 2, 3), tiled(dh, 2), tiled(d_last, 1), rows_of(keep))
    d_gates, d_start = untiled(d_gates, 2, h), untiled(d_start, 1, h)
    before = jnp.concatenate([first[:, None], h[:, :-1]], axis=1)
    d_keep = None
    if keep is not None:
        before, d_keep = before * keep[:, :, None, None], jnp.zeros_like(keep)
    dR = jnp.einsum("bthd,bthge->hdge", before, d_gates, preferred_element_type=F32)
    return d_gates, jnp.transpose(dR, (2, 0, 1, 3)), d_start, d_keep


_scan.defvjp(_scan_forward, _scan_backward)


# ----------------------------------------------------------------------------------------- how the kernels have arrays


def rows_of(a: Array | None) -> Array | None:
    """(B, T) -> (1, tiles, T, rows)."""
    return None if a is None else jnp.swapaxes(padded(a), 1, 2)[None]


def padded(a: Array) -> Array:
    """(B, ...) -> (tiles, rows, ...)."""
    a = jnp.pad(a, ((0, -a.shape[0] % ROWS), *((0, 0),) * (a.ndim - 1)))
    return a.reshape(-1, ROWS, *a.shape[1:])


def tiled(a: Array, heads: int) -> Array:
    """(B, ..., H, ...), heads at axis `heads` -> (H, tiles, ..., rows)."""
    return jnp.moveaxis(padded(a), (heads + 1, 1), (0, -1))


def untiled(a: Array, heads: int, like: Array) -> Array:
    """The inverse; `like` has as many rows as is wanted."""
    a = jnp.moveaxis(a, (0, -1), (heads + 1, 1))
    return a.reshape(-1, *a.shape[2:])[: like.shape[0]]


def matrices(R: Array, *axes: int) -> Array:
    """(4, H, d, d) -> (H, 4, d, d) with these of its axes last, rounded."""
    return jnp.transpose(R, (1, 0, *axes)).astype(jnp.bfloat16)
