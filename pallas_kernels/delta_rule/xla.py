"""The chunked form in plain JAX (the WY representation of a product of Householder-like matrices).

Token t writes Vn_t = beta_t (v_t - R_t^T k_t), and R_t holds what the tokens before it wrote: inside a chunk that is a
triangular system, (I + A) Vn = beta (v - e^b k^T S) with A_ts = beta_t e^{b_t - b_s} k_t . k_s for s < t, b the sum of
g so far. It is solved for U (of beta v) and W (of beta e^b k) in all chunks side by side; then a scan over chunks
passes the state S on, Vn = U - W S.

The solution is by forward substitution, by rows and then by blocks, which is exact where (I - A)(I + A^2)(I + A^4) ...
is not: powers of A grow like binomial coefficients where keys repeat. (LAPACK's triangular solver, one chunk after the
other on one core, took ten times as long and more.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from pallas_kernels.chunks import by_head, documents, per_head

F32 = jnp.float32
BLOCK = 16  # rows of a triangular system that are solved one after the other


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None, state: Array | None, reset: Array | None,
    chunk: int,
) -> tuple[Array, Array]:  # fmt: skip
    (B, T, H, dv), dk = v.shape, k.shape[-1]
    read, write, W, U, weights, carried = in_chunks(q, k, v, beta, log_decay, reset, min(chunk, T))
    start = jnp.zeros((B, H, dk, dv), F32) if state is None else state.astype(F32)

    def pass_on(S: Array, x: Any) -> tuple[Array, Any]:
        U, W, write, keep = x
        new = U - jnp.einsum("bhtk,bhkv->bhtv", W, S.astype(v.dtype), preferred_element_type=F32)
        new = new.astype(v.dtype)
        after = keep * S + jnp.einsum("bhtk,bhtv->bhkv", write, new, preferred_element_type=F32)
        return after, (S.astype(v.dtype), new)

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (U, W, write, carried[..., None]))
    final, (before, new) = jax.lax.scan(pass_on, start, xs)
    before, new = jnp.moveaxis(before, 0, 1), jnp.moveaxis(new, 0, 1)
    out = jnp.einsum("bchts,bchsv->bchtv", weights, new, preferred_element_type=F32)
    out += jnp.einsum("bchtk,bchkv->bchtv", read, before, preferred_element_type=F32)
    return jnp.moveaxis(out, 2, 3).reshape(B, -1, H, dv)[:, :T].astype(v.dtype), final


def in_chunks(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None, reset: Array | None, Q: int
) -> tuple[Array, ...]:
    """What needs no state, of all chunks of Q tokens: the decayed queries and keys that read and write it, W, U
    (float32), the scores (B, C, H, t, s), and what the state keeps of itself (B, C, H, 1), float32."""
    H, dv = v.shape[2:]
    q, k, v = (by_head(a.astype(v.dtype), Q) for a in (q, k, v))
    beta = by_head(beta.astype(F32), Q)[..., None]
    seen = jnp.tril(jnp.ones((Q, Q), bool))
    first = final_document = None
    if reset is not None:
        document = documents(reset, Q)
        seen = seen & (document[..., :, None] == document[..., None, :])
        first, final_document = (document == 0)[..., None], (document == document[..., -1:])[..., None]
    # exp only of what is not above 0: mask, then exponentiate
    if log_decay is None:
        decay = jnp.where(seen, 1.0, 0.0)
        entering = left = jnp.ones((1, 1, 1, Q, 1), F32)
    else:
        b = jnp.cumsum(by_head(log_decay.astype(F32), Q), axis=3)  # (B, C, H, Q), inclusive
        decay = jnp.exp(jnp.where(seen, b[..., :, None] - b[..., None, :], -jnp.inf))
        entering, left = jnp.exp(b)[..., None], jnp.exp(b[..., -1:] - b)[..., None]
    carried = entering[..., -1, :]  # of the state that enters the chunk
    if first is not None and final_document is not None:
        entering, left = jnp.where(first, entering, 0.0), jnp.where(final_document, left, 0.0)
        carried = jnp.where(first[..., -1, :], carried, 0.0)

    keys = per_head(k, H)
    A = beta * decay * per_head(jnp.einsum("bcgtk,bcgsk->bcgts", k, k, preferred_element_type=F32), H)
    right = jnp.concatenate([beta * v.astype(F32), beta * entering * keys.astype(F32)], axis=-1)
    solved: Any = solve(jnp.tril(A, -1), right)
    scores = decay * per_head(jnp.einsum("bcgtk,bcgsk->bcgts", q, k, preferred_element_type=F32), H)
    read, write = (per_head(q, H) * entering).astype(v.dtype), (keys * left).astype(v.dtype)
    W, weights = solved[..., dv:].astype(v.dtype), scores.astype(v.dtype)
    return read, write, W, solved[..., :dv], weights, jnp.broadcast_to(carried, (*A.shape[:3], 1))


@jax.custom_vjp
def solve(A: Array, right: Array) -> Array:
    """X with (I + A) X = right, A (..., Q, Q) strictly lower, float32."""
    return _solve_forward(A, right)[0]


def _solve_forward(A: Array, right: Array) -> tuple[Array, Any]:
    """By the inverse: the backward pass needs it transposed."""
    inverse = checkpoint_name(invert(A), "inverse")
    solved = product("...ts,...sr->...tr", inverse, right)
    return solved, (inverse, solved)


def invert(A: Array) -> Array:
    """(I + A)^-1: in halves, of which the inverse is [[X, 0], [-Y B X, Y]] with B below the diagonal, down to blocks of
    `BLOCK`; those row after row for all systems at once."""
    Q = A.shape[-1]
    if Q > BLOCK and Q % 2 == 0:
        h = Q // 2
        X, Y = invert(jnp.stack([A[..., :h, :h], A[..., h:, h:]]))
        below = -product("...ts,...su->...tu", Y, product("...ts,...su->...tu", A[..., h:, :h], X))
        return jnp.concatenate([jnp.pad(X, (*((0, 0),) * (X.ndim - 1), (0, h))), jnp.concatenate([below, Y], -1)], -2)

    def row(t: Array, inverse: Array) -> Array:
        above = product("...s,...sr->...r", jax.lax.dynamic_index_in_dim(A, t, -2, keepdims=False), inverse)
        own = jax.lax.dynamic_index_in_dim(inverse, t, -2, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(inverse, own - above, t, -2)

    return jax.lax.fori_loop(1, Q, row, jnp.broadcast_to(jnp.eye(Q, dtype=F32), A.shape))


def _solve_backward(saved: Any, d_solved: Array) -> tuple[Array, Array]:
    inverse, solved = saved
    d_right = product("...ts,...tr->...sr", inverse, d_solved)
    return -jnp.tril(product("...tr,...sr->...ts", d_right, solved), -1), d_right


solve.defvjp(_solve_forward, _solve_backward)
product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # errors of a row enter all rows below it
