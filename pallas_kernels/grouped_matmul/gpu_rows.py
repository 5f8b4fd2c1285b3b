"""Copies of rows on Hopper GPUs: TMA moves each from its place to shared memory, and many together to theirs.

XLA's gather works an address out for every element, which takes twice as long as the bytes do.

Every row is wanted by several groups. In the order of the places, a group after the other, it would be read for each of
them anew; tiles of places are taken in the order of their first rows, so that it is still in the cache.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch

SHARED = 48 * 1024  # bytes of a block: four share a multiprocessor, which hides how long a row takes to arrive
LARGEST = 256  # what one copy takes along an axis
ALIGNED = 8  # columns: 16 bytes
TILE = 128  # places that are taken one after the other: a tile of the mixture's layout, whose rows are of one group


@jax.custom_batching.custom_vmap
def gather(x: Float[Array, "n D"], index: Int[Array, "*i"]) -> Float[Array, "*i D"]:
    """x[index]; zero where the index is n or more. D is a multiple of 16."""
    n, D = x.shape
    inner = max(d for d in range(ALIGNED, LARGEST + 1, ALIGNED) if D % d == 0)
    rows = max(2**i for i in range(6) if 2**i * 2 * D <= SHARED or i == 0)
    shape, flat = (D // inner, inner), index.reshape(-1).astype(jnp.int32)
    flat = jnp.pad(flat, (0, -flat.size % TILE))
    order = jnp.argsort(flat[::TILE])  # of equal ones the first place first
    blocks = TILE // rows  # of a tile

    def kernel(x_g, none_g, index_g, order_g, y_g, rows_s, arrived):
        block = lax.axis_index("block")
        first = order_g[lax.div(block, jnp.int32(blocks))] * TILE + lax.rem(block, jnp.int32(blocks)) * rows
        # All indices before the first copy, behind which the compiler would move no load.
        for i, source in enumerate([index_g[first + i] for i in range(rows)]):
            for there, row in ((source < n, x_g.at[source]), (source >= n, none_g)):
                pl.when(there)(partial(plgpu.copy_gmem_to_smem, row, rows_s.at[i], arrived))
        plgpu.barrier_wait(arrived)
        plgpu.copy_smem_to_gmem(rows_s, y_g.at[pl.ds(first, rows)])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((flat.size, *shape), x.dtype),
        scratch_types=[plgpu.SMEM((rows, *shape), x.dtype), plgpu.Barrier(num_arrivals=rows)],
        grid=(flat.size // rows,),
        grid_names=("block",),
        kernel_name="gather_rows",
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    y = run(x.reshape(n, *shape), jnp.zeros(shape, x.dtype), flat, order.astype(jnp.int32))
    return y[: index.size].reshape(*index.shape, D)


@gather.def_vmap
def _population(size: int, batched: list[bool], x: Array, index: Array) -> tuple[Array, bool]:
    index = index if batched[1] else jnp.broadcast_to(index, (size, *index.shape))
    if batched[0]:
        n = x.shape[1]
        own = index + n * jnp.arange(size).reshape(-1, *[1] * (index.ndim - 1))
        index, x = jnp.where(index < n, own, size * n), x.reshape(-1, x.shape[-1])
    return gather(x, index), True
