"""The gradients of the weighted gate on Hopper, in Mosaic GPU: every array is read or written once.

A warpgroup has 64 rows at a time and walks their columns in pieces of 64, of gate, up and gradient alike, which arrive
by TMA; what is written lies over what was read, and leaves by TMA. Four threads share a row, as in the result of a
matrix product, so the sum over its columns, the gradient of its weight, is nearly all inside of threads.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat, dispatch
from pallas_kernels.grouped_matmul.gpu import cores, swizzle
from pallas_kernels.grouped_matmul.xla import F32
from pallas_kernels.population import folded

SIDE = 64  # rows, and columns, of a piece
SLOTS = 3  # pieces in shared memory: one that is worked on, one that arrives, and one that arrives or leaves
AT_WORK = 3  # blocks that a multiprocessor has at once, by their 72 kB
WGMMA = plgpu.Layout.WGMMA


def fits(both: Array) -> bool:
    """Whether the kernel takes such an array."""
    rows, columns = math.prod(both.shape[:-1]), both.shape[-1] // 2
    return both.dtype == jnp.bfloat16 and rows > 0 and rows % SIDE == columns % SIDE == 0


def gradients(
    both: Float[Array, "*b 2*F"], w: Float[Array, "*b"], d: Float[Array, "*b F"]
) -> tuple[Float[Array, "*b 2*F"], Float[Array, "*b"]]:
    flat = both.reshape(-1, both.shape[-1]), w.astype(F32).reshape(-1), d.astype(both.dtype).reshape(-1, d.shape[-1])
    d_both, d_w = folded(_gradients)(*flat)
    return d_both.reshape(both.shape), d_w.reshape(w.shape)


def _gradients(both: Float[Array, "R 2*F"], w: Float[Array, " R"], d: Float[Array, "R F"]) -> tuple[Array, Array]:
    R, F = d.shape
    pieces, tiles = F // SIDE, R // SIDE
    blocks = min(tiles, 2 if dispatch.interpret() else AT_WORK * cores())

    def kernel(both_g, w_g, d_g, d_both_g, d_w_g, gate_s, up_s, d_s, arrived):
        block = lax.axis_index("block")
        mine = lax.div(tiles - 1 - block, jnp.int32(blocks)) + 1

        def rows_of(n: Any) -> Any:
            return pl.ds((block + n * blocks) * SIDE, SIDE)

        def halves(g: Any, i: Any) -> list[Any]:
            """Of the i-th piece: where its gate and its up are."""
            n, column = lax.div(i, jnp.int32(pieces)), lax.rem(i, jnp.int32(pieces)) * SIDE
            return [g.at[rows_of(n), pl.ds(first + column, SIDE)] for first in (0, F)]

        def fetch(i: Any) -> None:
            slot = lax.rem(i, jnp.int32(SLOTS))
            for g, s in zip((*halves(both_g, i), halves(d_g, i)[0]), (gate_s, up_s, d_s), strict=True):
                plgpu.copy_gmem_to_smem(g, s.at[slot], arrived.at[slot])

        for i in range(SLOTS - 1):
            pl.when(i < mine * pieces)(lambda i=i: fetch(jnp.int32(i)))

        def one_tile(n: Any, _: None) -> None:
            weight = lax.broadcast_in_dim(compat.gpu_load(w_g.at[rows_of(n)], WGMMA.reduce(1)), (SIDE, SIDE), (0,))

            def one_piece(j: Any, d_w: Array) -> Array:
                i = n * pieces + j
                slot = lax.rem(i, jnp.int32(SLOTS))
                plgpu.barrier_wait(arrived.at[slot])
                gate, up, d = (compat.gpu_load(s.at[slot], WGMMA).astype(F32) for s in (gate_s, up_s, d_s))
                root = lax.rsqrt(1.0 + jnp.exp2(gate * -math.log2(math.e)))
                sigmoid = root * root  # a quotient would be exact, in ten instructions
                silu = gate * sigmoid
                d_up = silu * d
                gate_s[slot] = (weight * ((sigmoid + silu * (1.0 - sigmoid)) * (up * d))).astype(both.dtype)
                up_s[slot] = (weight * d_up).astype(both.dtype)
                plgpu.commit_smem()
                for s, g in zip((gate_s, up_s), halves(d_both_g, i), strict=True):
                    plgpu.copy_smem_to_gmem(s.at[slot], g, commit_group=False)
                plgpu.commit_smem_to_gmem_group()

                @pl.when(i + SLOTS - 1 < mine * pieces)
                def _() -> None:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for all but what has just begun to leave
                    fetch(i + SLOTS - 1)

                return d_w + jnp.sum(d_up * up, axis=1)

            none = plgpu.layout_cast(jnp.zeros((SIDE,), F32), WGMMA.reduce(1))
            compat.gpu_store(d_w_g.at[rows_of(n)], lax.fori_loop(0, pieces, one_piece, none))

        lax.fori_loop(0, mine, one_tile, None)
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(both.shape, both.dtype), jax.ShapeDtypeStruct(w.shape, F32)],
        scratch_types=[
            *[plgpu.SMEM((SLOTS, SIDE, SIDE), both.dtype, transforms=swizzle(SIDE))] * 3,
            plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
        ],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="weighted_swiglu_backward",
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        # Threads read and write what is theirs; the copy out comes after `commit_smem`, which is a barrier.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return tuple(run(both, w, d))
