"""The gradients of the weighted gate on Hopper, in Mosaic GPU: every array is read or written once.

A warpgroup has a few whole rows at a time, whose gate, up and gradient arrive by TMA; what is written lies over what
was read, and leaves by TMA. Every warp has rows of its own, and a row lies over its 32 lanes: so the sum over the
row's columns, the gradient of its weight, stays inside of a warp, and memory is read and written in long runs.
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
from pallas_kernels.grouped_matmul.gpu import cores
from pallas_kernels.grouped_matmul.xla import F32
from pallas_kernels.population import folded

PIECE = 64  # columns that are worked on at once: two of each lane
WARPS = 4
SLOTS = 3  # tiles in shared memory: one that is worked on, one that arrives, and one that arrives or leaves
AT_WORK = 4  # blocks that a multiprocessor has at once, at most
SHARED = 220 * 1024  # bytes of a multiprocessor
# (rows, columns of a piece): rows over the warps, columns over the lanes
LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, PIECE), (2,))), (-3,), (-2,), -1)


def fits(both: Array) -> bool:
    """Whether the kernel takes such an array."""
    R, F = math.prod(both.shape[:-1]), both.shape[-1] // 2
    right = both.dtype == jnp.bfloat16 and R > 0 and R % (2 * WARPS) == F % PIECE == 0
    return right and bytes_of(WARPS, F) <= SHARED


def bytes_of(rows: int, F: int) -> int:
    """Of shared memory, of a block with tiles of so many rows."""
    return SLOTS * rows * F * 3 * 2


def gradients(
    both: Float[Array, "*b 2*F"], w: Float[Array, "*b"], d: Float[Array, "*b F"]
) -> tuple[Float[Array, "*b 2*F"], Float[Array, "*b"]]:
    flat = both.reshape(-1, both.shape[-1]), w.astype(F32).reshape(-1), d.astype(both.dtype).reshape(-1, d.shape[-1])
    d_both, d_w = folded(_gradients)(*flat)
    return d_both.reshape(both.shape), d_w.reshape(w.shape)


def _gradients(both: Float[Array, "R 2*F"], w: Float[Array, " R"], d: Float[Array, "R F"]) -> tuple[Array, Array]:
    R, F = d.shape
    rows = 2 * WARPS if 2 * bytes_of(2 * WARPS, F) <= SHARED else WARPS
    pieces, tiles = F // PIECE, R // rows
    at_work = min(AT_WORK, SHARED // bytes_of(rows, F))
    blocks = min(tiles, 2 if dispatch.interpret() else at_work * cores())

    def kernel(both_g, w_g, d_g, d_both_g, d_w_g, gate_s, up_s, d_s, arrived):
        block = lax.axis_index("block")
        mine = lax.div(tiles - 1 - block, jnp.int32(blocks)) + 1

        def rows_of(n: Any) -> Any:
            return pl.ds((block + n * blocks) * rows, rows)

        def fetch(n: Any) -> None:
            slot = lax.rem(n, jnp.int32(SLOTS))
            here = rows_of(n)
            for g, s in ((both_g.at[here, 0], gate_s), (both_g.at[here, 1], up_s), (d_g.at[here], d_s)):
                plgpu.copy_gmem_to_smem(g, s.at[slot], arrived.at[slot])

        for n in range(SLOTS - 1):
            pl.when(n < mine)(lambda n=n: fetch(jnp.int32(n)))

        def one_tile(n: Any, weight: Array) -> Array:
            slot = lax.rem(n, jnp.int32(SLOTS))
            later = weights(jnp.minimum(n + 1, mine - 1))  # on its way while this tile is worked on
            wide = lax.broadcast_in_dim(weight, (rows, PIECE), (0,))
            plgpu.barrier_wait(arrived.at[slot])
            d_w = plgpu.layout_cast(jnp.zeros((rows, PIECE), F32), LAYOUT)
            for j in range(pieces):
                refs = [s.at[slot, :, j] for s in (gate_s, up_s, d_s)]
                gate, up, d = (compat.gpu_load(ref, LAYOUT).astype(F32) for ref in refs)
                root = lax.rsqrt(1.0 + jnp.exp2(gate * -math.log2(math.e)))
                sigmoid = root * root  # a quotient would be exact, in ten instructions
                silu = gate * sigmoid
                d_up = silu * d
                refs[0][...] = (wide * ((sigmoid + silu * (1.0 - sigmoid)) * (up * d))).astype(both.dtype)
                refs[1][...] = (wide * d_up).astype(both.dtype)
                d_w += d_up * up
            plgpu.commit_smem()
            for half, s in enumerate((gate_s, up_s)):
                plgpu.copy_smem_to_gmem(s.at[slot], d_both_g.at[rows_of(n), half], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            compat.gpu_store(d_w_g.at[rows_of(n)], jnp.sum(d_w, axis=1))

            @pl.when(n + SLOTS - 1 < mine)
            def _() -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for all but what has just begun to leave
                fetch(n + SLOTS - 1)

            return later

        def weights(n: Any) -> Array:
            return compat.gpu_load(w_g.at[rows_of(n)], LAYOUT.reduce(1))

        lax.fori_loop(0, mine, one_tile, weights(jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((R, 2, pieces, PIECE), both.dtype), jax.ShapeDtypeStruct(w.shape, F32)],
        scratch_types=[
            *[plgpu.SMEM((SLOTS, rows, pieces, PIECE), both.dtype)] * 3,
            plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
        ],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="weighted_swiglu_backward",
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        # Threads read and write what is theirs; the copy out comes after `commit_smem`, which is a barrier.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    d_both, d_w = run(both.reshape(R, 2, pieces, PIECE), w, d.reshape(R, pieces, PIECE))
    return d_both.reshape(both.shape), d_w
