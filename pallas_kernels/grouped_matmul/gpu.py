"""Grouped products on Hopper GPUs: one persistent kernel per form, in bfloat16, accumulated in float32.

A block has three warpgroups. One copies, by TMA, the operands of the steps to come into a ring of slots in shared
memory, across the ends of output tiles, so that the tensor cores do not wait for memory where a tile ends; two
multiply, each half of the rows of the output tile.

    product  tile: 128 rows of x, some columns. Steps: of each group with rows there, all of D. Rows of other groups
             are set to zero in the slot, so that the sum over groups is right and each tile is stored once, whole.
    outer    tile: some of dw[g]. Steps: the group's rows, 64 at a time; rows of other groups are set to zero.

Loads begin at multiples of 64 rows, as TMA into tiled shared memory needs, wherever groups begin.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch

F32, I32 = jnp.float32, jnp.int32
ROWS = 128  # of an output tile of `product`, and of a tile of the layout
HALF = ROWS // 2  # rows of a warpgroup: one wgmma
DEPTH = 64  # of a step
CHUNK = 64  # columns stored at a time
SMS = 132  # of an H100; where there is none
PRODUCER = 2  # the warpgroup that copies
SLOTS = {64: 6, 128: 6, 192: 4, 256: 4}  # of the ring: what shared memory holds, by the width of an output tile


def refusal(x: Array, w: Array) -> str:
    """Why the kernels do not take rows x (..., t, D) with w (G, D, F); of tiles, t must be ROWS."""
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {x.dtype} with {w.dtype}"
    if any(n % 16 for n in w.shape[1:]):
        return f"takes matrices whose sides are multiples of 16, not {w.shape[1]} x {w.shape[2]}"
    if x.ndim == 3 and x.shape[1] != ROWS:
        return f"takes tiles of {ROWS} rows, not {x.shape[1]}"
    return "" if x.size and w.size else "takes no empty arrays"


def grouped_matmul(x: Float[Array, "N t D"], w: Float[Array, "G D F"], group: Int[Array, " N"]) -> Array:
    groups = jnp.arange(w.shape[0])
    start, end = (
        ROWS * jnp.sum(mine, axis=0, dtype=I32) for mine in (group[:, None] < groups, group[:, None] <= groups)
    )
    y: Any = rows_matmul(x.reshape(-1, x.shape[-1]), w, start, end, True)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def ragged_matmul(x: Float[Array, "M D"], w: Float[Array, "G D F"], sizes: Int[Array, " G"]) -> Array:
    groups = jnp.arange(w.shape[0])
    end = jnp.sum(jnp.where(groups <= groups[:, None], sizes, 0), axis=1, dtype=I32)
    return rows_matmul(x, w, end - sizes.astype(I32), end, False)


# ------------------------------------------------------------------------------------------- gradients and batches


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def rows_matmul(x: Array, w: Array, start: Array, end: Array, aligned: bool) -> Array:
    return _product(False, aligned)(x, w, start, end)


def _forward(x, w, start, end, aligned):
    return rows_matmul(x, w, start, end, aligned), (x, w, start, end)


def _backward(aligned, saved, dy):
    x, w, start, end = saved
    dx = _product(True, aligned)(dy, w, start, end)
    return dx, _outer(aligned)(x, dy, start, end), None, None


rows_matmul.defvjp(_forward, _backward)


def _product(transposed: bool, aligned: bool):
    """`product` that takes a leading axis by making one long batch of it."""
    f = jax.custom_batching.custom_vmap(functools.partial(product, transposed=transposed, aligned=aligned))

    @f.def_vmap
    def batched(P, are, x, w, start, end):
        x, start, end = _one_batch(P, (are[0], *are[2:]), x, start, end)
        if are[1]:
            w = jnp.tile(w, (1, start.size // (P * w.shape[1]), 1, 1))  # where groups share matrices in turn
            w = w.reshape(-1, *w.shape[2:])
        return f(x, w, start, end).reshape(P, x.shape[0] // P, -1), True

    return f


def _outer(aligned: bool):
    """`outer`, likewise."""
    f = jax.custom_batching.custom_vmap(functools.partial(outer, aligned=aligned))

    @f.def_vmap
    def batched(P, are, x, dy, start, end):
        dy = dy if are[1] else jnp.broadcast_to(dy, (P, *dy.shape))
        x, start, end = _one_batch(P, (are[0], *are[2:]), x, start, end)
        dw = f(x, dy.reshape(x.shape[0], -1), start, end)
        return dw.reshape(P, -1, *dw.shape[1:]), True

    return f


def _one_batch(P, are, x, start, end):
    x, start, end = (a if b else jnp.broadcast_to(a, (P, *a.shape)) for a, b in zip((x, start, end), are, strict=True))
    before = jnp.arange(P, dtype=I32)[:, None] * x.shape[1]
    return x.reshape(-1, x.shape[-1]), (start + before).reshape(-1), (end + before).reshape(-1)


# --------------------------------------------------------------------------------------------------------- kernels


def width_of(columns: int) -> int:
    """Columns of an output tile: the width whose tiles take least time, where to fetch a tile's rows costs as much as
    32 more columns; of equal ones the narrower."""
    return min(SLOTS, key=lambda n: -(-columns // n) * (n + 32))


def product(x, w, start, end, *, transposed=False, aligned=False):
    """y (R, F): row r of group g, start[g] <= r < end[g], is x[r] w[g], with w[g]^T where `transposed`; rows of no
    group are zero. Groups in order; matrix g mod G where there are more groups than matrices. `aligned`: groups begin
    and end at multiples of ROWS."""
    if short := -x.shape[0] % 8:  # of what TMA moves
        x = jnp.pad(x, ((0, short), (0, 0)))
        return product(x, w, start, end, transposed=transposed, aligned=aligned)[:-short]
    (R, D), G, F = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    width = width_of(F)
    windows, columns, steps = -(-R // ROWS), -(-F // width), -(-D // DEPTH)
    edges = jnp.arange(windows, dtype=I32)[:, None] * ROWS
    first = jnp.sum(end <= edges, axis=1, dtype=I32)  # of the groups with rows in a window, and the last one
    last = jnp.sum(start < edges + ROWS, axis=1, dtype=I32) - 1

    def split(tile):
        return lax.div(tile, I32(columns)), lax.rem(tile, I32(columns))

    def steps_of(refs, tile, body, carry):
        i, _ = split(tile)
        first, last, start, end = refs[:4]

        def group(g, carry):
            lo, hi = start[g] - i * ROWS, end[g] - i * ROWS
            here = jnp.where(lo < hi, I32(steps), I32(0))
            return lax.fori_loop(0, here, lambda k, carry: body((g, k, lo, hi), carry), carry)

        return lax.fori_loop(first[i], last[i] + 1, group, carry)

    def copy(refs, tile, step, a, b, barrier):
        (i, n), (g, k, _, _) = split(tile), step
        x, w = refs[4:6]
        deep, wide = pl.ds(k * DEPTH, DEPTH), pl.ds(n * width, width)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(i * ROWS, ROWS), deep], a, barrier)
        of = w.at[lax.rem(g, I32(G))]
        plgpu.copy_gmem_to_smem(of.at[wide, deep] if transposed else of.at[deep, wide], b, barrier)

    def multiply(acc, wg, step, a, b):
        _, _, lo, hi = step
        mine, at = a.at[pl.ds(wg * HALF, HALF)], wg * HALF
        if not aligned:
            pl.when((lo > 0) | (hi < ROWS))(lambda: keep(mine, lo - at, hi - at))
        plgpu.wgmma(acc, mine, b.transpose((1, 0)) if transposed else b)

    def target(refs, tile):
        i, n = split(tile)
        return refs[6].at[pl.ds(i * ROWS, ROWS), pl.ds(n * width, width)]

    shapes = (ROWS, DEPTH), (width, DEPTH) if transposed else (DEPTH, width)
    out = jax.ShapeDtypeStruct((R, F), x.dtype)
    parts = (steps_of, copy, multiply, target)
    run = call("grouped_product", out, shapes, windows * columns, parts, width, swizzle(D, F))
    return run(first, last, start, end, x, w)


def outer(x, dy, start, end, *, aligned=False):
    """dw (G, D, F): the sum over rows start[g] <= r < end[g] of x[r]^T dy[r]. `aligned`: as for `product`."""
    if short := -x.shape[0] % 8:
        x, dy = (jnp.pad(a, ((0, short), (0, 0))) for a in (x, dy))
    (_, D), F, G = x.shape, dy.shape[1], start.size
    width = width_of(F)
    high, wide = -(-D // ROWS), -(-F // width)
    largest_first = jnp.argsort(start - end).astype(I32)  # so that no block ends with a large one while others wait

    def split(refs, tile):
        g, rest = lax.div(tile, I32(high * wide)), lax.rem(tile, I32(high * wide))
        return refs[4][g], lax.rem(rest, I32(high)), lax.div(rest, I32(high))

    def steps_of(refs, tile, body, carry):
        g = split(refs, tile)[0]
        start, end = refs[0][g], refs[1][g]
        first = lax.div(start, I32(DEPTH))
        behind = jnp.where(start < end, lax.div(end + DEPTH - 1, I32(DEPTH)), first)
        return lax.fori_loop(first, behind, lambda k, c: body((k, start - k * DEPTH, end - k * DEPTH), c), carry)

    def copy(refs, tile, step, a, b, barrier):
        (_, d, f), k = split(refs, tile), step[0]
        rows = pl.ds(k * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(refs[2].at[rows, pl.ds(d * ROWS, ROWS)], a, barrier)
        plgpu.copy_gmem_to_smem(refs[3].at[rows, pl.ds(f * width, width)], b, barrier)

    def multiply(acc, wg, step, a, b):
        _, lo, hi = step
        mine = a.at[:, pl.ds(wg * HALF, HALF)]
        if not aligned:
            pl.when((lo > 0) | (hi < DEPTH))(lambda: keep(mine, lo, hi))
        plgpu.wgmma(acc, mine.transpose((1, 0)), b)

    def target(refs, tile):
        g, d, f = split(refs, tile)
        return refs[5].at[g, pl.ds(d * ROWS, ROWS), pl.ds(f * width, width)]

    shapes = (DEPTH, ROWS), (DEPTH, width)
    out = jax.ShapeDtypeStruct((G, D, F), x.dtype)
    parts = (steps_of, copy, multiply, target)
    return call("grouped_outer", out, shapes, G * high * wide, parts, width, swizzle(D, F))(
        start, end, x, dy, largest_first
    )


def keep(rows: Any, lo: Array, hi: Array) -> None:
    """Sets the rows of a slot outside of [lo, hi) to zero."""
    x = plgpu.load(rows, layout=plgpu.Layout.WGMMA)  # pyright: ignore[reportCallIssue]
    row = plgpu.broadcasted_iota(I32, x.shape, 0, layout=plgpu.Layout.WGMMA)
    rows[...] = jnp.where((row >= lo) & (row < hi), x, jnp.zeros_like(x))
    plgpu.commit_smem()


def swizzle(*minor: int) -> tuple:
    """The widest that divides the rows of both operands."""
    by = next((by for by in (128, 64, 32) if all(2 * n % by == 0 for n in minor)), 0)
    return (plgpu.TilingTransform((8, by // 2)), plgpu.SwizzleTransform(by)) if by else ()


def call(name, out, shapes, tiles, parts, width, layout):
    """The kernel: refs -> for each output tile, the sum over its steps, stored at its target."""
    steps_of, copy, multiply, target = parts
    stages, chunks = SLOTS[width], width // CHUNK
    blocks = min(2 if dispatch.interpret() else cores(), tiles)

    def kernel(*refs):
        *refs, a, b, stage, full, empty = refs
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        rounds = lax.div(tiles - block + I32(blocks - 1), I32(blocks))

        def reader():
            plgpu.set_max_registers(40, action="decrease")

            def fetch(n, done):
                def body(step, done):
                    slot = lax.rem(done, I32(stages))
                    pl.when(done >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    copy(refs, block + n * blocks, step, a.at[slot], b.at[slot], full.at[slot])
                    return done + 1

                return steps_of(refs, block + n * blocks, body, done)

            done = lax.fori_loop(0, rounds, fetch, I32(0))

            def drain(n, _):
                plgpu.barrier_wait(empty.at[lax.rem(n, I32(stages))])

            lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, None)  # all slots have been read

        def multiplier():
            plgpu.set_max_registers(232, action="increase")

            def one_tile(n, before):
                def accumulate(acc):
                    def body(step, done):
                        slot = lax.rem(done, I32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        multiply(acc, wg, step, a.at[slot], b.at[slot])
                        plgpu.wgmma_wait(1)  # the product before this one has read its slot
                        pl.when(done > before)(lambda: free(done - 1))
                        return done + 1

                    done = steps_of(refs, block + n * blocks, body, before)
                    plgpu.wgmma_wait(0)
                    pl.when(done > before)(lambda: free(done - 1))
                    return acc[...], done

                total, done = pl.run_scoped(accumulate, accumulator)
                store(total, target(refs, block + n * blocks).at[pl.ds(wg * HALF, HALF)], n * chunks)
                return done

            def free(n):
                plgpu.barrier_arrive(empty.at[lax.rem(n, I32(stages))])

            def store(total, to, before):
                for n in range(chunks):
                    # In turn across tiles too: the store before this one may still read its half of the stage.
                    at = stage.at[wg, lax.rem(before + n, I32(2))]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    at[...] = total[:, n * CHUNK : (n + 1) * CHUNK].astype(at.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(at, to.at[:, pl.ds(n * CHUNK, CHUNK)])

            lax.fori_loop(0, rounds, one_tile, I32(0))
            plgpu.wait_smem_to_gmem(0)

        lax.cond(wg == PRODUCER, reader, multiplier)

    accumulator = plgpu.ACC((HALF, width), F32)  # pyright: ignore[reportPrivateImportUsage]
    kernel.__name__ = name
    ring = [plgpu.SMEM((stages, *shape), out.dtype, transforms=layout) for shape in shapes]
    stage = plgpu.SMEM((2, 2, HALF, CHUNK), out.dtype, transforms=layout)
    barriers = [plgpu.Barrier(num_arrivals=2, num_barriers=stages) for _ in ("full", "empty")]
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[*ring, stage, *barriers],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
    )


def cores() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else SMS
