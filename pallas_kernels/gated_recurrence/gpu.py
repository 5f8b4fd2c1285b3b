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

from pallas_kernels.gated_recurrence.walk import F32, Gates, L, walk

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
    swept = sweep(q, k, v, _gates(log_decay, reset), state)
    return (swept["out"], swept["final"]), (q, k, v, log_decay, state, reset)


def _backward(kept: Any, cotangents: Any) -> Any:
    q, k, v, log_decay, state, reset = kept
    d_q, _, d_k, d_v, d_log_decay, d_state = gradients(q, k, v, _gates(log_decay, reset), state, *cotangents)
    return d_q, d_k, d_v, jnp.moveaxis(d_log_decay[..., : v.shape[1]], 1, 2), d_state, None


_recurrence.defvjp(_forward, _backward)


def gradients(
    q: Array, k: Array, v: Array, gates: Gates, state: Array, d_out: Array, d_final: Array, shares: Any = None
) -> tuple[Array, ...]:
    """Of q, k, v, log decays (B, H, C L) and the state; and k . dk per token. `shares` go with a bias in the gates: the
    rows at the beginning of each chunk, and their gradients at its end, both (B, H, C, dk)."""
    (B, _, H, dv), dk = v.shape, q.shape[-1]
    pieces = dv // (WIDEST_BACK if dv % WIDEST_BACK == 0 else L)

    def split(a: Array) -> Array:
        """(B, T, H, dv) -> (B, T, H pieces, dv / pieces)."""
        return a.reshape(*a.shape[:2], H * pieces, dv // pieces)

    def split_state(a: Array) -> Array:
        """(B, H, dk, dv) -> (B, H pieces, dv / pieces, dk)."""
        return jnp.swapaxes(a, 2, 3).reshape(B, H * pieces, dv // pieces, dk)

    def whole(a: Array) -> Array:
        """Sums over the pieces of a head and blocks of columns."""
        return a.reshape(B, H, -1, *a.shape[3:]).sum(axis=2)

    swept = sweep(k, q, d_out, gates, d_final, reverse=True)
    d_v, d_state = swept["out"], swept["final"]
    if shares is not None:  # each piece has its part of the bias, all have the share
        gates = gates | {"bias": gates["bias"] / pieces}
    before, after = ({}, {}) if shares is None else ({"share": shares[0]}, {"share": shares[1] / pieces})
    v, d_out, state, d_final = split(v), split(d_out), split_state(state), split_state(d_final)
    d_q = sweep(d_out, v, k, gates, state, weigh=q, keep=True, **before)
    d_k = sweep(v, d_out, q, gates, d_final, reverse=True, weigh=k, against=d_q["states"], **after)

    q_sums, k_sums = whole(d_q["sums"]), whole(d_k["sums"])
    cross = whole(d_k["cross"]).sum(axis=-1)
    if shares is not None:
        cross += jnp.sum(shares[0] * shares[1], axis=-1)
    d_log_decay = _decay_gradient(gates["carried"], q_sums, k_sums, cross)
    return _of_groups(d_q["out"], q), k_sums.sum(axis=2), _of_groups(d_k["out"], k), d_v, d_log_decay, d_state


def chunked(a: Array, fill: float = 0.0) -> Array:
    """(B, T, ...) -> (B, ..., C, L)."""
    B, T = a.shape[:2]
    a = jnp.pad(a, ((0, 0), (0, -T % L), *((0, 0),) * (a.ndim - 2)), constant_values=fill)
    return jnp.moveaxis(a.reshape(B, -1, L, *a.shape[2:]), (1, 2), (-2, -1))


def _gates(log_decay: Array, reset: Array | None) -> Gates:
    b = jnp.cumsum(chunked(log_decay), axis=-1)  # (B, H, C, L), inclusive
    entering, left = jnp.exp(b), jnp.exp(b[..., -1:] - b)
    exponent = b * math.log2(math.e)
    documents = {}
    if reset is not None:
        document = jnp.cumsum(chunked(reset), axis=-1)[:, None]  # numbered inside the chunk; 0 began before it
        entering = jnp.where(document == 0, entering, 0.0)
        left = jnp.where(document == document[..., -1:], left, 0.0)
        documents = documents_of(document, b.shape)
    gates = {"to": exponent, "of": exponent, "entering": entering, "left": left, "carried": entering} | documents
    return {name: a.reshape(*b.shape[:2], -1) for name, a in gates.items()}


def documents_of(document: Array, shape: Any) -> Gates:
    document = jnp.broadcast_to(document.astype(F32), shape)
    return {"document_to": document, "document_of": document}


def _decay_gradient(carried: Array, q_sums: Array, k_sums: Array, cross: Array) -> Array:
    """(B, H, C L): the decay between tokens t - 1 and t weighs the pairs (s, u) with s < t <= u.

    The sums hold q_u . dq_u and k_s . dk_s, each apart for what came by the state and for the tokens of the chunk.
    """
    q_sums, k_sums = (a.reshape(*a.shape[:3], -1, L) for a in (q_sums, k_sums))
    across = carried.reshape(*cross.shape, L)[..., -1] * cross  # (B, H, C): from before the chunk to after it
    after = q_sums[:, :, 0] + q_sums[:, :, 1] - k_sums[:, :, 1]
    before = k_sums[:, :, 0]
    d = jnp.flip(jnp.cumsum(jnp.flip(after, -1), axis=-1), -1) + jnp.cumsum(before, axis=-1) - before
    return (d + across[..., None]).reshape(carried.shape)


def _of_groups(d: Array, like: Array) -> Array:
    """Sums over the heads that share a key."""
    if d.shape == like.shape:
        return d
    (B, T, G, dk) = like.shape
    return d.reshape(B, T, G, -1, dk).astype(F32).sum(axis=3).astype(like.dtype)


# ----------------------------------------------------------------------------------------------- populations


def sweep(q: Array, k: Array, v: Array, gates: Gates, state: Array, **options: Any) -> dict[str, Array]:
    """`walk`, over one more axis as over more rows of the batch."""
    arrays = {name: options.pop(name) for name in ("weigh", "against", "share") if name in options}

    @jax.custom_batching.custom_vmap
    def call(arrays: Any, *arguments: Any) -> dict[str, Array]:
        return walk(*arguments, **arrays, **options)

    @call.def_vmap
    def _(size: int, batched: Any, *arguments: Any) -> Any:
        def fold(a: Array, has_axis: bool) -> Array:
            a = a if has_axis else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        arrays, *rest = jax.tree.map(fold, arguments, tuple(batched))
        swept = sweep(*rest, **arrays, **options)
        return {name: a.reshape(size, -1, *a.shape[1:]) for name, a in swept.items()}, dict.fromkeys(swept, True)

    return call(arrays, q, k, v, gates, state)
