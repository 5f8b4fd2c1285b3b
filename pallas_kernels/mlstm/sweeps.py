"""The cell by the kernels of `gated_recurrence`, whose gates take the input gate and the stabiliser as well.

With m as a constant, C_t is a gated recurrence in which token s weighs exp(b_t - b_s + i_s - m_t) at token t, b the sum
of log forget gates: 2^(to_t - of_s), the scale of q within `to`. The normaliser is the sum of the same weights with
q k^T, which the kernel adds up for the tokens of a chunk; n itself, one vector a chunk, is passed on outside by a
product over all pairs of chunks. Backwards, 1 / (the divisor) goes into `to`, so that no array of values is scaled, and
the gradient of the normaliser is a number that is added to every product d_h v^T of a token.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from pallas_kernels.gated_recurrence import sweeps
from pallas_kernels.gated_recurrence.sweeps import F32, Form, chunked, padded, widened
from pallas_kernels.mlstm.xla import EMPTY

LOG2E = math.log2(math.e)


def mlstm(
    form: Form, q: Array, k: Array, v: Array, i: Array, f: Array, state: Any, reset: Array | None, eps: float
) -> tuple[Array, Array, Array, Array]:
    (B, T, H, dk), dv = q.shape, v.shape[-1]
    if state is None:
        state = (jnp.zeros((B, H, dk, dv), F32), jnp.zeros((B, H, dk), F32), jnp.full((B, H), EMPTY, F32))

    q, k, v = (widened(padded(a.astype(v.dtype), form.L), form.L) for a in (q, k, v))
    # a token of padding neither decays the state nor adds to it
    i, log_f = padded(i.astype(F32), form.L, EMPTY), padded(jax.nn.log_sigmoid(f.astype(F32)), form.L)
    reset = None if reset is None else padded(reset, form.L)
    C, n, m = (a.astype(F32) for a in state)
    C, n = widened(C, form.L, axes=2), widened(n, form.L)
    results: Any = _run(form, eps, dk, q, k, v, i, log_f, C, n, m, reset)
    h, C, n, m = results
    return h[:, :T, :, :dv], C[:, :, :dk, :dv], n[..., :dk], m


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(form: Form, eps: float, dk: int, *arguments: Any) -> Any:
    return _forward(form, eps, dk, *arguments)[0]


def _forward(
    form: Form, eps: float, dk: int, q: Array, k: Array, v: Array, i: Array, log_f: Array, C: Array, n: Array, m: Array,
    reset: Any,
) -> Any:  # fmt: skip
    gates, between, m_t, last_m = _gates(i, log_f, m, reset, dk, form.L)
    added = _over_tokens(gates["left"], k, between.shape[-1] - 1)
    n_all = _product("bhcj,bhjk->bhck", between, jnp.concatenate([n[:, :, None], added], axis=2))
    starts = n_all[:, :, :-1]
    inherited = gates["entering"] * _along(q, starts)
    bound = jnp.exp(jnp.minimum(-m_t, 80.0))
    swept = form.sweep(q, k, v, gates | {"inherited": inherited, "bound": bound}, C, eps=eps)
    h, norm = swept["out"], swept["norm"]
    kept = q, k, v, h, gates, starts, between, norm, bound, C, n
    return (h, swept["final"], n_all[:, :, -1], last_m), kept


def _backward(form: Form, eps: float, dk: int, kept: Any, cotangents: Any) -> Any:
    q, k, v, h, gates, starts, between, norm, bound, C, n = kept
    d_h, d_C, d_n, _ = cotangents
    divisor = jnp.maximum(jnp.abs(norm), bound) + eps
    along_h = jnp.moveaxis(jnp.sum(d_h.astype(F32) * h.astype(F32), axis=-1), 1, 2)
    bias = jnp.where(jnp.abs(norm) >= bound, -jnp.sign(norm) * along_h, 0.0)
    entering = gates["entering"] / divisor
    gates = gates | {"to": gates["to"] - jnp.log2(divisor), "entering": entering, "bias": bias}

    d_starts = jnp.concatenate([_over_tokens(entering * bias, q, starts.shape[2]), d_n[:, :, None]], axis=2)
    d_added = _product("bhcj,bhck->bhjk", between, d_starts)
    d_n = d_added[:, :, 0]
    d_q, along_k, d_k, d_v, d_log_f, d_C = sweeps.gradients(
        form, q, k, v, gates, C, d_h, d_C, shares=(starts, d_added[:, :, 1:])
    )
    d_m = jnp.sum(C * d_C, axis=(2, 3)) + jnp.sum(n * d_n, axis=2)
    return d_q, d_k, d_v, jnp.moveaxis(along_k, 1, 2), jnp.moveaxis(d_log_f, 1, 2), d_C, d_n, d_m, None


_run.defvjp(_forward, _backward)


def _gates(i: Array, log_f: Array, m: Array, reset: Array | None, dk: int, L: int) -> Any:
    """The kernel's gates; the decay of n from the beginning of one chunk, or the state's, to that of a later one
    (B, H, C + 1, C + 1); m per token (B, H, T); the last m (B, H)."""
    i, b = chunked(i, L), jnp.cumsum(chunked(log_f, L), axis=-1)  # (B, H, C, L)
    seen = jnp.tril(jnp.ones((L, L), bool))
    entering, to_end, documents = b, b[..., -1:] - b + i, {}
    if reset is not None:
        document = jnp.cumsum(chunked(reset, L), axis=-1)[:, None]  # numbered inside the chunk; 0 began before it
        seen = seen & (document[..., :, None] == document[..., None, :])
        entering = jnp.where(document == 0, entering, EMPTY)
        to_end = jnp.where(document == document[..., -1:], to_end, EMPTY)
        documents = sweeps.documents_of(document, b.shape)

    # Sums over the chunks between two, each taken apart: differences of one sum would drown in those of resets.
    carried = entering[..., -1]  # (B, H, C)
    at = jnp.arange(carried.shape[-1] + 1)
    later = at[:, None] > at
    gap = jnp.cumsum(jnp.where(later, jnp.pad(carried, ((0, 0), (0, 0), (1, 0)))[..., None], 0.0), axis=2)
    gap = jnp.where(later | (at[:, None] == at), gap, -jnp.inf)
    largest = jnp.concatenate([m[..., None], to_end.max(axis=-1)], axis=-1)
    m_all = jnp.max(gap + largest[..., None, :], axis=-1)  # (B, H, C + 1), at the beginnings of chunks and the end
    between = jnp.exp(gap + m_all[..., None, :] - m_all[..., None])
    before, after = m_all[..., :-1, None], m_all[..., 1:, None]

    own = jnp.max(jnp.where(seen, (i - b)[..., None, :], -jnp.inf), axis=-1)
    m_t = jnp.maximum(b + own, entering + before)
    gates = {
        "to": (b - m_t) * LOG2E - 0.5 * math.log2(dk),
        "of": (b - i) * LOG2E,
        "entering": jnp.exp(entering + before - m_t) * dk**-0.5,
        "left": jnp.exp(to_end - after),
        "carried": jnp.broadcast_to(jnp.exp(carried[..., None] + before - after), b.shape),
    }
    gates, m_t = jax.tree.map(lambda a: a.reshape(*b.shape[:2], -1), (gates | documents, m_t))
    return gates, between, m_t, m_all[..., -1]


def _by_chunk(a: Array, C: int) -> Array:
    """(B, T, H, ...) -> (B, C, L, H, ...)."""
    return a.reshape(a.shape[0], C, -1, *a.shape[2:])


def _as_it_is(a: Array) -> Array:
    """Held to the order of its axes: XLA would otherwise write the large arrays below, transposed, in float32."""
    return with_layout_constraint(a, Layout(tuple(range(a.ndim))))


def _over_tokens(weights: Array, a: Array, C: int) -> Array:
    """Weighted sums over the tokens of chunks: (B, H, T), (B, T, H, d) -> (B, H, C, d)."""
    weights = _by_chunk(jnp.moveaxis(weights, 1, 2), C)
    sums = jnp.sum(_as_it_is(weights[..., None] * _by_chunk(a, C).astype(F32)), axis=2)
    return jnp.moveaxis(_as_it_is(sums), 1, 2)


def _along(a: Array, b: Array) -> Array:
    """Every token's product with a vector of its chunk: (B, T, H, d), (B, H, C, d) -> (B, H, T)."""
    products = jnp.sum(_as_it_is(_by_chunk(a, b.shape[2]).astype(F32) * jnp.moveaxis(b, 1, 2)[:, :, None]), axis=-1)
    return jnp.moveaxis(_as_it_is(products).reshape(a.shape[:3]), 1, 2)


_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
