"""The scan by kernels, for Hopper or for TPUs: padding, populations, and which gradient is whose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import population

F32 = jnp.float32
NEVER = -1e30  # the exponent of a decay that forgets all


class Form(NamedTuple):
    """A device's kernels: u, dt (rows, T, E), A (members, E, N), of so many rows each, B, C (rows, T, N), the state
    (rows, E, N), and where there are documents what a token adds to the exponents of its decays (rows, T)."""

    forward: Callable[
        ..., Any
    ]  # (u, dt, A, B, C, start, *forget, keep) -> [y, final state, states as `backward` wants them]
    # (u, dt, A, B, C, states, dy, d final, *forget) -> [du, d dt, dA for each row, dB and dC for each block of
    # channels, as second axis, d start]
    backward: Callable[..., Any]
    sizes: Callable[[int, int, int], tuple[int, int, int]]  # T, E, N as the kernels take them


def selective_scan(
    form: Form, u: Array, dt: Array, A: Array, B: Array, C: Array, state: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    """As `xla.selective_scan`. Channels, states and tokens are padded to the sizes of the kernels."""
    (batch, T, E), N = u.shape, A.shape[1]
    tokens, channels, width = form.sizes(T, E, N)

    def padded(a: Array, *sizes: int) -> Array:
        pads = [(0, size - have) for size, have in zip(sizes, a.shape[1:], strict=True)]
        return jnp.pad(a, ((0, 0), *pads)) if any(p for _, p in pads) else a

    start = jnp.zeros((batch, E, N), F32) if state is None else state.astype(F32)
    # A token of padding has dt = 0: it neither decays nor adds.
    arrays = [padded(a, tokens, channels) for a in (u, dt.astype(F32))]
    arrays += [padded(A.astype(F32)[None], channels, width)]
    arrays += [padded(a.astype(F32), tokens, width) for a in (B, C)]
    arrays += [padded(start, channels, width)]
    forget = [] if reset is None else [padded(jnp.where(reset, NEVER, 0.0).astype(F32), tokens)]
    scanned: Any = _scan(form, *arrays, *forget)
    y, final = scanned
    return y[:, :T, :E], final[:, :E, :N]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(form: Form, *args: Array) -> Any:
    y, final = population.folded(partial(form.forward, keep=False), shared=(2,))(*args)
    return y, final


def _scan_forward(form: Form, *args: Array) -> Any:
    y, final, states = population.folded(partial(form.forward, keep=True), shared=(2,))(*args)
    return (y, final), (*args[:5], states, *args[6:])


def _scan_backward(form: Form, kept: Any, cotangents: Any) -> Any:
    found = population.folded(form.backward, shared=(2,))(*kept[:6], *cotangents, *kept[6:])
    du, ddt, dA, dB, dC, d_start = found
    d_forget = [jnp.zeros_like(a) for a in kept[6:]]
    return du, ddt, dA.sum(0, keepdims=True), dB.sum(1), dC.sum(1), d_start, *d_forget


_scan.defvjp(_scan_forward, _scan_backward)
