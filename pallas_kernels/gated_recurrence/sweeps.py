"""The recurrence by sweeps of a kernel (`walk`), one for Hopper and one for TPUs. Its gradients are the same recurrence
with the inputs in other roles, so one kernel does both passes: with dS the gradient of the state, which runs from the
last token to the first,

    dv_s = sum_(t >= s) D_ts (k_s . q_t) do_t + D_s dS k_s       reversed, q and k swapped, do for v
    dq_t = sum_(s <= t) D_ts (do_t . v_s) k_s + D_t S do_t       do for q, v for k, k for v, the state transposed
    dk_s = sum_(t >= s) D_ts (v_s . do_t) q_t + D_s dS v_s       reversed, v for q, do for k, q for v, transposed

A decay's gradient is a sum over the pairs of tokens on its two sides, with those inside the chunk, those that came by
the state and those in the states at the chunk's ends kept apart: as differences of sums over the whole sequence they
would carry the rounding errors of all of it.

A walk is one sweep over the chunks of all heads, forward or `reverse`:

    walk(q (B T Hq K), k (B T Hk K), v (B T Hv V), gates, state (B H K V), reverse, weigh, keep, against, share, eps)

Arrays of fewer heads than the state are shared by groups. Gates, each (B, Hg, C L): the weight of token s at token t of
its chunk is 2^(to_t - of_s), that of the state before the chunk `entering`, that of a token at the chunk's end `left`;
the state keeps `carried` of itself, read from the chunk's last token. Where there are documents, their numbers, twice:
Mosaic GPU makes one of two loads from one place, and finds no layout for what is then both a column and a row. With
`inherited` and `bound` every output is divided by max(|sum of its weights with q k^T, and inherited|, bound) + eps; the
sum is norm (B, H, C L). With `bias` a number for each q, or k if `reverse`, is added to its products q k^T, and `share`
(B, H, C, V) is the row that this gives the state.

It returns out (B, T, H, V), in v's dtype, and final (B, H, K, V), the state after it. With `weigh` (B, T, Hw, V), sums
(B, H, N, 2, C L): its product with what came of the state, and with the rest of out, over one of N blocks of columns.
With `keep`, states at the beginning of every chunk, in v's dtype, in the form in which another walk takes them as
`against`. With `against`, cross (B, H, N, C, some): its product with the state before each chunk, summed in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import population

F32 = jnp.float32
LEAST = 1e-30  # weight that counts as none
Gates = dict[str, Float[Array, "B Hg C*L"]]


class Form(NamedTuple):
    """A device's walk."""

    walk: Callable[..., dict[str, Array]]
    L: int  # tokens of a chunk, of which the widths of heads are multiples too
    unit: int  # the walk takes a multiple of so many tokens
    widest: Callable[[int], int]  # values of a head worked on at once in the backward pass, of so many
    # gradients of keys that heads share, without walks (`gpu_shared`), and whether it takes such widths
    shared: Callable[..., dict[str, Array]] | None = None
    shared_fit: Callable[[int, int], bool] = lambda dk, dv: False

    def sums_heads(self, q: Array, v: Array) -> bool:
        """Whether `shared` is for such queries and values."""
        return self.shared is not None and q.shape[2] < v.shape[2] and self.shared_fit(q.shape[3], v.shape[3])

    def sweep(
        self, q: Array, k: Array, v: Array, gates: Gates, state: Array, *, arrays: Any = None, **options: Any
    ) -> dict[str, Array]:
        """The walk, of a population too: one more axis is more rows of the batch. `arrays`: those taken by name."""
        walk = population.folded(lambda named, *a: self.walk(*a, **named, **options))
        return walk(arrays or {}, q, k, v, gates, state)


def gated_recurrence(
    form: Form, q: Array, k: Array, v: Array, log_decay: Array, state: Array | None, reset: Array | None,
    weight: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    (B, T, H, dv), dk = v.shape, q.shape[-1]
    state = jnp.zeros((B, H, dk, dv), F32) if state is None else state.astype(F32)
    q, k, v = (widened(padded(a.astype(v.dtype), form.unit), form.L) for a in (q, k, v))
    reset = None if reset is None else padded(reset, form.unit)
    log_decay = padded(log_decay.astype(F32), form.unit)
    if weight is not None:
        weight = padded(jnp.log2(jnp.maximum(weight.astype(F32), LEAST)), form.unit)
    swept: Any = _recurrence(form, q, k, v, log_decay, weight, widened(state, form.L, axes=2), reset)
    out, final = swept
    return out[:, :T, :, :dv], final[:, :, :dk, :dv]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(form: Form, *arguments: Any) -> Any:
    form = form._replace(shared=None)  # no gradients: no states are wanted
    return _forward(form, *arguments)[0]


def _forward(
    form: Form, q: Array, k: Array, v: Array, log_decay: Array, weight: Array | None, state: Array, reset: Array | None
) -> Any:
    swept = form.sweep(q, k, v, gates_of(log_decay, weight, reset, form.L), state, keep=form.sums_heads(q, v))
    return (swept["out"], swept["final"]), (q, k, v, log_decay, weight, state, reset, swept.get("states"))


def _backward(form: Form, kept: Any, cotangents: Any) -> Any:
    q, k, v, log_decay, weight, state, reset, states = kept
    gates = gates_of(log_decay, weight, reset, form.L)
    if states is None:
        found = gradients(form, q, k, v, gates, state, *cotangents)
    else:
        found = gradients_of_shared_keys(form, q, k, v, gates, states, *cotangents)
    d_q, along_k, d_k, d_v, d_log_decay, d_state = found
    d_log_decay, along_k = (jnp.moveaxis(a[..., : v.shape[1]], 1, 2) for a in (d_log_decay, along_k))
    # of the logarithm of w: what a token wrote is proportional to w and to k alike
    d_weight = None if weight is None else along_k * math.log(2)
    return d_q, d_k, d_v, d_log_decay, d_weight, d_state, None


_recurrence.defvjp(_forward, _backward)


def gradients(
    form: Form, q: Array, k: Array, v: Array, gates: Gates, state: Array, d_out: Array, d_final: Array,
    shares: Any = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Of q, k, v, log decays (B, H, C L) and the state; and k . dk per token. `shares` go with a bias in the gates: the
    rows at the beginning of each chunk, and their gradients at its end, both (B, H, C, dk)."""
    (B, _, H, dv), dk = v.shape, q.shape[-1]
    pieces = dv // form.widest(dv)

    def split(a: Array) -> Array:
        """(B, T, H, dv) -> (B, T, H pieces, dv / pieces)."""
        return a.reshape(*a.shape[:2], H * pieces, dv // pieces)

    def split_state(a: Array) -> Array:
        """(B, H, dk, dv) -> (B, H pieces, dv / pieces, dk)."""
        return jnp.swapaxes(a, 2, 3).reshape(B, H * pieces, dv // pieces, dk)

    def whole(a: Array) -> Array:
        """Sums over the pieces of a head and blocks of columns."""
        return a.reshape(B, H, -1, *a.shape[3:]).sum(axis=2)

    swept = form.sweep(k, q, d_out, gates, d_final, reverse=True)
    d_v, d_state = swept["out"], swept["final"]
    if shares is not None:  # each piece has its part of the bias, all have the share
        gates = gates | {"bias": gates["bias"] / pieces}
    before, after = ({}, {}) if shares is None else ({"share": shares[0]}, {"share": shares[1] / pieces})
    v, d_out, state, d_final = split(v), split(d_out), split_state(state), split_state(d_final)
    d_q = form.sweep(d_out, v, k, gates, state, arrays={"weigh": q} | before, keep=True)
    arrays = {"weigh": k, "against": d_q["states"]} | after
    d_k = form.sweep(v, d_out, q, gates, d_final, arrays=arrays, reverse=True)

    q_sums, k_sums = whole(d_q["sums"]), whole(d_k["sums"])
    cross = whole(d_k["cross"]).sum(axis=-1)
    if shares is not None:
        cross += jnp.sum(shares[0] * shares[1], axis=-1)
    d_log_decay = _decay_gradient(gates["carried"], q_sums, k_sums, cross)
    return of_groups(d_q["out"], q), k_sums.sum(axis=2), of_groups(d_k["out"], k), d_v, d_log_decay, d_state


def gradients_of_shared_keys(
    form: Form, q: Array, k: Array, v: Array, gates: Gates, states: Array, d_out: Array, d_final: Array
) -> tuple[Array, ...]:
    """As `gradients`, with the states before each chunk, where heads share keys. What a token writes into the state is
    in proportion to k and to v alike, so of what comes by the state k . dk is v . dv, which the walk for d_v gives."""
    swept = form.sweep(k, q, d_out, gates, d_final, arrays={"weigh": v}, reverse=True, keep=True)
    assert form.shared
    found = population.folded(form.shared)(q, k, v, d_out, gates, states, swept["states"])
    k_sums = jnp.stack([swept["sums"][:, :, :, 0].sum(axis=2), found["k_sums"]], axis=2)
    d_log_decay = _decay_gradient(gates["carried"], found["q_sums"], k_sums, found["cross"].sum(axis=-1))
    return found["d_q"], k_sums.sum(axis=2), found["d_k"], swept["out"], d_log_decay, swept["final"]


def padded(a: Array, unit: int, fill: float = 0.0) -> Array:
    """Tokens to a multiple."""
    short = -a.shape[1] % unit
    return jnp.pad(a, ((0, 0), (0, short), *((0, 0),) * (a.ndim - 2)), constant_values=fill) if short else a


def widened(a: Array, unit: int, axes: int = 1) -> Array:
    """The last axes to multiples; zeros in keys and values add nothing."""
    wider = [(0, -n % unit if i >= a.ndim - axes else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, wider) if any(more for _, more in wider) else a


def chunked(a: Array, L: int) -> Array:
    """(B, T, ...) -> (B, ..., C, L)."""
    a = padded(a, L)
    return jnp.moveaxis(a.reshape(a.shape[0], -1, L, *a.shape[2:]), (1, 2), (-2, -1))


def gates_of(log_decay: Array, weight: Array | None, reset: Array | None, L: int) -> Gates:
    """`weight`: log2 of it."""
    b = jnp.cumsum(chunked(log_decay, L), axis=-1)  # (B, H, C, L), inclusive
    entering, left = jnp.exp(b), jnp.exp(b[..., -1:] - b)
    exponent = b * math.log2(math.e)
    documents = {}
    if reset is not None:
        document = jnp.cumsum(chunked(reset, L), axis=-1)[:, None]  # numbered inside the chunk; 0 began before it
        entering = jnp.where(document == 0, entering, 0.0)
        left = jnp.where(document == document[..., -1:], left, 0.0)
        documents = documents_of(document, b.shape)
    of = exponent
    if weight is not None:
        weight = chunked(weight, L)
        of, left = exponent - weight, left * jnp.exp2(weight)
    gates = {"to": exponent, "of": of, "entering": entering, "left": left, "carried": entering} | documents
    return {name: a.reshape(*b.shape[:2], -1) for name, a in gates.items()}


def documents_of(document: Array, shape: Any) -> Gates:
    document = jnp.broadcast_to(document.astype(F32), shape)
    return {"document_to": document, "document_of": document}


def _decay_gradient(carried: Array, q_sums: Array, k_sums: Array, cross: Array) -> Array:
    """(B, H, C L): the decay between tokens t - 1 and t weighs the pairs (s, u) with s < t <= u.

    The sums hold q_u . dq_u and k_s . dk_s, each apart for what came by the state and for the tokens of the chunk.
    """
    B, H, C = cross.shape
    q_sums, k_sums = (a.reshape(B, H, 2, C, -1) for a in (q_sums, k_sums))
    across = carried.reshape(B, H, C, -1)[..., -1] * cross  # from before the chunk to after it
    after = q_sums[:, :, 0] + q_sums[:, :, 1] - k_sums[:, :, 1]
    before = k_sums[:, :, 0]
    d = jnp.flip(jnp.cumsum(jnp.flip(after, -1), axis=-1), -1) + jnp.cumsum(before, axis=-1) - before
    return (d + across[..., None]).reshape(carried.shape)


def of_groups(d: Array, like: Array) -> Array:
    """Sums over the heads that share a key."""
    if d.shape == like.shape:
        return d
    (B, T, G, dk) = like.shape
    return d.reshape(B, T, G, -1, dk).astype(F32).sum(axis=3).astype(like.dtype)
