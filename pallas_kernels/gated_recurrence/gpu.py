"""The recurrence on Hopper. Its gradients are the same recurrence with the inputs in other roles, so one kernel
(`walk`) does both passes: with dS the gradient of the state, which runs from the last token to the first,

    dv_s = sum_(t >= s) D_ts (k_s . q_t) do_t + D_s dS k_s       reversed, q and k swapped, do for v
    dq_t = sum_(s <= t) D_ts (do_t . v_s) k_s + D_t S do_t       do for q, v for k, k for v, the state transposed
    dk_s = sum_(t >= s) D_ts (v_s . do_t) q_t + D_s dS v_s       reversed, v for q, do for k, q for v, transposed

A decay's gradient is a sum over the pairs of tokens on its two sides, with those inside the chunk, those that came by
the state and those in the states at the chunk's ends kept apart: as differences of sums over the whole sequence they
would carry the rounding errors of all of it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.gated_recurrence.walk import ENTERING, F32, L, walk

WIDEST = 256  # keys: the state's 256 x 64 block takes half of a thread's registers
WIDEST_BACK = 128  # values, in the backward pass: wider heads are worked on as several of the same keys


def refusal(q: Array, v: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    dk, dv = q.shape[-1], v.shape[-1]
    if v.dtype != jnp.bfloat16:
        return f"takes bfloat16 values, not {v.dtype}"
    if dk % L or dk > WIDEST:
        return f"takes keys of a width of {L}, {2 * L}, {3 * L} or {WIDEST}, not {dk}"
    return f"takes values of a width that is a multiple of {L}, not {dv}" if dv % L else ""


def gated_recurrence(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    (B, T, H, dv), dk = v.shape, q.shape[-1]
    state = jnp.zeros((B, H, dk, dv), F32) if state is None else state.astype(F32)
    short = -T % 8  # blocks of memory are moved by eights

    def pad(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, short), *((0, 0),) * (a.ndim - 2))) if short else a

    q, k, v = (pad(a.astype(v.dtype)) for a in (q, k, v))
    out, final = _recurrence(q, k, v, pad(log_decay.astype(F32)), state, None if reset is None else pad(reset))
    return out[:, :T], final


@jax.custom_vjp
def _recurrence(q: Array, k: Array, v: Array, log_decay: Array, state: Array, reset: Array | None) -> Any:
    return _forward(q, k, v, log_decay, state, reset)[0]


def _forward(q: Array, k: Array, v: Array, log_decay: Array, state: Array, reset: Array | None) -> Any:
    swept = _walk(q, k, v, _gates(log_decay, reset), state)
    return (swept["out"], swept["final"]), (q, k, v, log_decay, state, reset)


def _backward(kept: Any, cotangents: Any) -> Any:
    q, k, v, log_decay, state, reset = kept
    d_out, d_final = cotangents
    gates = _gates(log_decay, reset)
    d_v = _walk(k, q, d_out, gates, d_final, reverse=True)

    pieces = _pieces(v.shape[-1])
    v, d_out = (_split(a, pieces) for a in (v, d_out))
    state, d_final = (_split_state(a, pieces) for a in (state, d_final))
    d_q = _walk(d_out, v, k, gates, state, weigh=q, keep=True)
    d_k = _walk(v, d_out, q, gates, d_final, reverse=True, weigh=k, against=d_q["states"])
    d_log_decay = _decay_gradient(gates, d_q["sums"], d_k["sums"], d_k["cross"], log_decay.shape)
    return (
        _of_groups(d_q["out"], q),
        _of_groups(d_k["out"], k),
        d_v["out"],
        d_log_decay,
        d_v["final"],
        None,
    )


_recurrence.defvjp(_forward, _backward)


def _gates(log_decay: Array, reset: Array | None) -> Array:
    """(B, T, H) -> (B, H, R, C L): what the kernel wants to know of the decays; see `walk`."""
    B, T, H = log_decay.shape
    C = -(-T // L)

    def chunked(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, C * L - T), *((0, 0),) * (a.ndim - 2))).reshape(B, C, L, *a.shape[2:])

    b = jnp.cumsum(jnp.moveaxis(chunked(log_decay), 3, 1), axis=-1)  # (B, H, C, L), inclusive
    entering, left = jnp.exp(b), jnp.exp(b[..., -1:] - b)
    exponent = b * math.log2(math.e)
    gates = [exponent, exponent, entering, left]
    if reset is not None:
        document = jnp.cumsum(chunked(reset), axis=2)[:, None]  # numbered inside the chunk; 0 began before it
        entering = jnp.where(document == 0, entering, 0.0)
        left = jnp.where(document == document[..., -1:], left, 0.0)
        document = jnp.broadcast_to(document.astype(F32), b.shape)
        gates = [exponent, exponent, entering, left, document, document]
    return jnp.stack(gates, axis=2).reshape(B, H, len(gates), C * L)


def _decay_gradient(gates: Array, q_sums: Array, k_sums: Array, cross: Array, shape: Any) -> Array:
    """The decay between tokens t - 1 and t weighs the pairs (s, u) with s < t <= u.

    The sums hold q_u . dq_u and k_s . dk_s, each apart for what came by the state and for the tokens of the chunk.
    """
    B, T, H = shape
    C = gates.shape[3] // L

    def of_heads(a: Array) -> Array:
        return a.reshape(B, H, -1, *a.shape[3:]).sum(axis=2)  # the pieces of a head, and its blocks of columns

    q_sums, k_sums = (of_heads(a).reshape(B, H, 2, C, L) for a in (q_sums, k_sums))
    carried = gates[:, :, ENTERING].reshape(B, H, C, L)[..., -1]
    across = carried * of_heads(cross).sum(axis=-1)  # (B, H, C): from before the chunk to after it
    after = q_sums[:, :, 0] + q_sums[:, :, 1] - k_sums[:, :, 1]
    before = k_sums[:, :, 0]
    d = jnp.flip(jnp.cumsum(jnp.flip(after, -1), axis=-1), -1) + jnp.cumsum(before, axis=-1) - before
    d = (d + across[..., None]).reshape(B, H, C * L)[..., :T]
    return jnp.moveaxis(d, 1, 2)


def _of_groups(d: Array, like: Array) -> Array:
    """Sums over the heads that share a key."""
    if d.shape == like.shape:
        return d
    (B, T, G, dk) = like.shape
    return d.reshape(B, T, G, -1, dk).astype(F32).sum(axis=3).astype(like.dtype)


def _pieces(dv: int) -> int:
    return dv // (WIDEST_BACK if dv % WIDEST_BACK == 0 else L)


def _split(a: Array, pieces: int) -> Array:
    """(B, T, H, dv) -> (B, T, H pieces, dv / pieces)."""
    return a.reshape(*a.shape[:2], -1, a.shape[-1] // pieces)


def _split_state(a: Array, pieces: int) -> Array:
    """(B, H, dk, dv) -> (B, H pieces, dv / pieces, dk)."""
    B, H, dk, dv = a.shape
    return jnp.swapaxes(a, 2, 3).reshape(B, H * pieces, dv // pieces, dk)


# ----------------------------------------------------------------------------------------------- populations


def _walk(q: Array, k: Array, v: Array, gates: Array, state: Array, **options: Any) -> dict[str, Array]:
    """`walk`, over one more axis as over more rows of the batch."""
    arrays = {name: options.pop(name) for name in ("weigh", "against") if name in options}
    names = tuple(arrays)

    @jax.custom_batching.custom_vmap
    def call(*arguments: Array) -> dict[str, Array]:
        return walk(*arguments[:5], **dict(zip(names, arguments[5:], strict=True)), **options)

    @call.def_vmap
    def _(size: int, batched: Any, *arguments: Array) -> Any:
        def fold(a: Array, has_axis: bool) -> Array:
            a = a if has_axis else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        folded = [fold(a, has_axis) for a, has_axis in zip(arguments, batched, strict=True)]
        swept = _walk(*folded[:5], **dict(zip(names, folded[5:], strict=True)), **options)
        return {name: a.reshape(size, -1, *a.shape[1:]) for name, a in swept.items()}, dict.fromkeys(swept, True)

    return call(q, k, v, gates, state, *arrays.values())
