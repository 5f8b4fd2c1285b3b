"""The scan in plain JAX, token by token: no (B, T, E, N) table exists. The backward pass runs each chunk again, then
walks it from its last token, with s_t the state's gradient and e_t that of the exponent dt_t A:

    s_t = dy_t C_t^T + exp(dt_{t+1} A) s_{t+1}      e_t = s_t exp(dt_t A) h_{t-1}       dA = sum_t e_t dt_t
    d(dt u)_t = s_t B_t      d dt_t = e_t A + u_t d(dt u)_t      dB_t = s_t^T (dt u)_t      dC_t = h_t^T dy_t

States lie as (B, N, E): what is elementwise runs along the channels; sums are products, or add rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch

F32 = jnp.float32


@jax.custom_vjp
def step_sizes(raw: Float[Array, "*b E"], bias: Float[Array, " E"]) -> Float[Array, "*b E"]:
    """softplus(raw + bias) in float32. Its gradient is rounded to raw's dtype before the bias sums it: as one float32
    array for both, it would be written and read once more."""
    return jax.nn.softplus(raw.astype(F32) + bias)


def _step_sizes_backward(kept: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    raw, bias = kept
    d_raw = (d * jax.nn.sigmoid(raw.astype(F32) + bias)).astype(raw.dtype)
    return d_raw, d_raw.astype(F32).sum(range(raw.ndim - 1))


step_sizes.defvjp(lambda raw, bias: (step_sizes(raw, bias), (raw, bias)), _step_sizes_backward)


def selective_scan(
    u: Array, dt: Array, A: Array, B: Array, C: Array, state: Array | None, reset: Array | None, chunk: int
) -> tuple[Array, Array]:
    batch, T, E = u.shape
    Q = min(chunk, T)
    chunks = -(-T // Q)
    start = jnp.zeros((batch, A.shape[1], E), F32) if state is None else state.astype(F32).swapaxes(1, 2)
    forget = jnp.zeros((batch, T), F32) if reset is None else reset

    def by_chunk(a: Array) -> Array:
        """(B, T, ...) -> (chunks, Q, B, ...). A token of padding has dt = 0: it neither decays nor adds."""
        a = jnp.pad(a.astype(F32), ((0, 0), (0, chunks * Q - T), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a, 0, 1).reshape(chunks, Q, batch, *a.shape[2:])

    y, final = _scan(A.astype(F32).T, start, *(by_chunk(a) for a in (u, dt, B, C)), 1.0 - by_chunk(forget))
    y = jnp.moveaxis(y.reshape(chunks * Q, batch, E)[:T], 0, 1)
    return y.astype(u.dtype), final.swapaxes(1, 2)


@jax.custom_vjp
def _scan(A: Array, start: Array, *xs: Array) -> tuple[Array, Array]:
    return _forward(A, start, *xs)[0]


def _forward(A: Array, start: Array, *xs: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """xs: u, dt (chunks, Q, B, E), B, C (chunks, Q, B, N), keep (chunks, Q, B)."""

    def token(h: Array, x: Any) -> tuple[Array, Array]:
        u, dt, B, C, keep = x
        h = _decay(A, dt, keep) * h + (dt * u)[:, None] * B[..., None]
        return h, _over_states(h * C[..., None])

    def run_chunk(h: Array, xs: Any) -> tuple[Array, tuple[Array, Array]]:
        after, y = _walk(token, h, xs)
        return after, (y, h)

    final, (y, starts) = jax.lax.scan(run_chunk, start, xs)
    return (y, final), (A, starts, *xs)


def _backward(kept: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    A, starts, *xs = kept
    dy, d_final = cotangents

    def again(h: Array, x: Any) -> tuple[Array, Array]:
        u, dt, B, keep = x
        return _decay(A, dt, keep) * h + (dt * u)[:, None] * B[..., None], h

    def token(carry: Any, x: Any) -> Any:
        later, dA = carry
        h, dy, u, dt, B, C, keep = x
        decay, added = _decay(A, dt, keep), dt * u
        s = dy[:, None] * C[..., None] + later
        later = decay * s
        e = later * h
        d_added = jnp.einsum("bne,bn->be", s, B, precision="highest")
        dB = jnp.einsum("bne,be->bn", s, added, precision="highest")
        dC = jnp.einsum("bne,be->bn", decay * h + added[:, None] * B[..., None], dy, precision="highest")
        return (later, dA + e * dt[:, None]), (d_added * dt, d_added * u + _over_states(e * A), dB, dC)

    def run_chunk(carry: Any, xs: Any) -> Any:
        start, dy, u, dt, B, C, keep = xs
        _, before = _walk(again, start, (u, dt, B, keep))
        return _walk(token, carry, (before, dy, u, dt, B, C, keep), reverse=True)

    (d_start, dA), d_xs = jax.lax.scan(run_chunk, (d_final, jnp.zeros_like(d_final)), (starts, dy, *xs), reverse=True)
    return dA.sum(0), d_start, *d_xs, None


_scan.defvjp(_forward, _backward)


def _walk(token: Callable[..., Any], carry: Any, xs: Any, reverse: bool = False) -> Any:
    """`jax.lax.scan` over a chunk. On a GPU a pass of the loop costs more than its arithmetic, so 8 tokens are one; on
    CPUs XLA would then work out the exponentials of a token again for each token behind it."""
    unroll = 1 if dispatch.device().platform == "cpu" else min(8, len(xs[0]))
    return jax.lax.scan(token, carry, xs, reverse=reverse, unroll=unroll)


def _decay(A: Array, dt: Array, keep: Array) -> Array:
    return jnp.exp(dt[:, None] * A) * keep[:, None, None]


def _over_states(x: Array) -> Array:
    """(B, N, E) -> (B, E), in halves: XLA's own sum over an axis not the last runs one number at a time on CPUs."""
    while x.shape[1] % 2 == 0:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x.sum(1)
