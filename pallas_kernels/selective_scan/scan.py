"""The scan by kernels, for Hopper or for TPUs: padding, populations, and which gradient is whose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import population
from pallas_kernels.selective_scan import xla

F32 = jnp.float32
NEVER = -1e30  # the exponent of a decay that forgets all


class Form(NamedTuple):
    """A device's kernels: u, dt (rows, T, E), A (members, E, N), of so many rows each, B, C (rows, T, N), the state
    (rows, E, N), and where there are documents what a token adds to the exponents of its decays (rows, T)."""

    # (u, dt, A, B, C, start, *forget, keep) -> [y, final state, states as `backward` wants them]
    forward: Callable[..., Any]
    # (u, dt, A, B, C, states, dy, d final, *forget) -> [du, d dt, dA for each row, dB and dC for each block of
    # channels, as second axis, d start]
    backward: Callable[..., Any]
    sizes: Callable[[int, int, int], tuple[int, int, int]]  # T, E, N as the kernels take them
    # Whether they take raw steps, in bfloat16 or float32, with `bias` (members, E); `backward` then gives that of each
    # row, last.
    raw: bool = False


def selective_scan(
    form: Form, u: Array, dt: Array, A: Array, B: Array, C: Array, state: Array | None, reset: Array | None,
    bias: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    """As `selective_scan`. Channels, states and tokens are padded to the sizes of the kernels."""
    (batch, T, E), N = u.shape, A.shape[1]
    tokens, channels, width = form.sizes(T, E, N)
    if bias is None or not form.raw:
        dt, bias = (dt if bias is None else xla.step_sizes(dt, bias)).astype(F32), None
    elif dt.dtype != jnp.bfloat16:
        dt = dt.astype(F32)

    def padded(a: Array, *sizes: int, fill: float = 0.0) -> Array:
        pads = [(0, size - have) for size, have in zip(sizes, a.shape[1:], strict=True)]
        return jnp.pad(a, ((0, 0), *pads), constant_values=fill) if any(p for _, p in pads) else a

    start = jnp.zeros((batch, E, N), F32) if state is None else state.astype(F32)
    # A token of padding has a step of 0: it neither decays nor adds.
    arrays = [padded(u, tokens, channels), padded(dt, tokens, channels, fill=0.0 if bias is None else NEVER)]
    arrays += [padded(A.astype(F32)[None], channels, width)]
    arrays += [padded(a.astype(F32), tokens, width) for a in (B, C)]
    arrays += [padded(start, channels, width)]
    forget = None if reset is None else padded(jnp.where(reset, NEVER, 0.0).astype(F32), tokens)
    scanned: Any = _scan(form, *arrays, None if bias is None else padded(bias.astype(F32)[None], channels), forget)
    y, final = scanned
    return y[:, :T, :E], final[:, :E, :N]


SHARED = (2, 6)  # A and the bias


def _given(kernel: Callable[..., Any], arguments: int, **how: Any) -> Callable[..., Any]:
    """`kernel`, with what may be missing behind so many arguments: bias, forget."""

    def run(*args: Any) -> Any:
        bias, forget = args[arguments:]
        named = {} if bias is None else {"bias": bias}
        return kernel(*args[:arguments], *([] if forget is None else [forget]), **named, **how)

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(form: Form, *args: Any) -> Any:
    y, final = population.folded(_given(form.forward, 6, keep=False), shared=SHARED)(*args)
    return y, final


def _scan_forward(form: Form, *args: Any) -> Any:
    y, final, states = population.folded(_given(form.forward, 6, keep=True), shared=SHARED)(*args)
    return (y, final), (*args[:5], states, *args[6:])


def _scan_backward(form: Form, kept: Any, cotangents: Any) -> Any:
    *arrays, bias, forget = kept
    run = population.folded(_given(form.backward, 8), shared=(2, 8))
    du, ddt, dA, dB, dC, d_start, *d_bias = run(*arrays, *cotangents, bias, forget)
    d_forget = None if forget is None else jnp.zeros_like(forget)
    d_bias = d_bias[0].sum(0, keepdims=True) if d_bias else None
    return du, ddt, dA.sum(0, keepdims=True), dB.sum(1), dC.sum(1), d_start, d_bias, d_forget


_scan.defvjp(_scan_forward, _scan_backward)
