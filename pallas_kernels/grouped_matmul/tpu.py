"""JAX's grouped products for TPUs (megablox, `jax.experimental.pallas.ops.tpu`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch

ROWS = LANES = 128


def refusal(x: Array, w: Array) -> str:
    """Why the kernels do not take rows x (..., D) with w (G, D, F)."""
    if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32, not {x.dtype} with {w.dtype}"
    if any(n % LANES for n in w.shape[1:]):
        return f"takes matrices whose sides are multiples of {LANES}, not {w.shape[1]} x {w.shape[2]}"
    return "" if x.size and w.size else "takes no empty arrays"


def grouped_matmul(x: Float[Array, "N t D"], w: Float[Array, "G D F"], group: Int[Array, " N"]) -> Array:
    sizes = x.shape[1] * jnp.sum(group[:, None] == jnp.arange(w.shape[0]), axis=0, dtype=jnp.int32)
    y: Any = ragged_matmul(x.reshape(-1, x.shape[-1]), w, sizes)
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def ragged_matmul(x: Float[Array, "M D"], w: Float[Array, "G D F"], sizes: Int[Array, " G"]) -> Array:
    return _product(False)(x, w, sizes)


def _forward(x: Array, w: Array, sizes: Array) -> tuple[Any, Any]:
    return ragged_matmul(x, w, sizes), (x, w, sizes)


def _backward(saved: Any, dy: Array) -> tuple[Any, Any, None]:
    x, w, sizes = saved
    return _product(True)(dy, w, sizes), _outer(x, dy, sizes), None


ragged_matmul.defvjp(_forward, _backward)


# The number of steps of the kernels hangs on the sizes: a population's members run one after the other.


def _product(transposed: bool) -> Any:
    return jax.custom_batching.sequential_vmap(partial(product, transposed=transposed))


def product(x: Array, w: Array, sizes: Array, *, transposed: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    D, F = w.shape[:0:-1] if transposed else w.shape[1:]
    y = gmm(
        padded(x), w, sizes.astype(jnp.int32), x.dtype, (ROWS, block(D), block(F)), transpose_rhs=transposed,
        interpret=dispatch.interpret(),
    )  # fmt: skip
    # What is past the sum is not written.
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), y[: x.shape[0]], 0)


@jax.custom_batching.sequential_vmap
def _outer(x: Array, dy: Array, sizes: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = ROWS, block(x.shape[1]), block(dy.shape[1])
    sizes = sizes.astype(jnp.int32)
    return tgmm(padded(x).T, padded(dy), sizes, x.dtype, tiling, interpret=dispatch.interpret())


def padded(x: Array) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, 0)))


def block(side: int) -> int:
    return next(n for n in (512, 256, LANES) if side % n == 0)
