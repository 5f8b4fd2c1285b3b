"""The scan on Hopper, in Mosaic GPU: a warpgroup walks all tokens of `BLOCK` channels of a row, states in registers.

No matrix unit helps. The states of a block, (channels, N), are spread over 4 warps, then over 8 x 4 lanes, so that the
sum over N of the output and the sum over channels of dB and dC are both partly inside a thread; channels are kept as
(warp, channel), and sums over them never leave a warp until a tile of tokens is done. Tokens arrive in tiles by TMA,
two in flight.

The forward pass writes the state before every tile. The backward pass walks the tiles from the last to the first: it
runs the tile forward again and keeps the states before every few (`span`) in shared memory, then takes these spans
from the last to the first, each once more forward, its states and decays in registers, and then backward. dB and dC
are sums over channels: inside a block here, over the blocks in XLA.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.selective_scan import scan
from pallas_kernels.selective_scan.scan import F32

WARPS = 4
LANES = 4  # lanes of a warp that share a channel
BLOCK = 64  # channels of a thread block
WIDTH = BLOCK // WARPS  # of them, a warp's
TILE = 32  # tokens staged at a time; the state before each tile is kept for the backward pass
LARGEST_STATE = 32


def refusal(u: Array, A: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    if u.dtype not in (jnp.bfloat16, F32):
        return f"takes bfloat16 and float32, not {u.dtype}"
    return "" if A.shape[1] <= LARGEST_STATE else f"takes at most {LARGEST_STATE} states a channel, not {A.shape[1]}"


def sizes(T: int, E: int, N: int) -> tuple[int, int, int]:
    """As the kernels take them."""
    return -(-T // TILE) * TILE, -(-E // BLOCK) * BLOCK, max(8, 1 << (N - 1).bit_length())


# ----------------------------------------------------------------------------------------------- what both passes share


def span(N: int) -> int:
    """Tokens that are written out one after the other, so that one's loads and sums hide behind another's arithmetic.
    The backward pass holds their states and decays in registers, of which more states leave fewer."""
    return min(8, 128 // N)


def layout(N: int) -> Any:
    """Of (4 warps, channels, N): `LANES` lanes share a channel, each has some neighbouring states of some neighbouring
    channels."""
    channels, states = WIDTH * LANES // 32, N // LANES
    tiles = ((WARPS, WIDTH, N), (channels, states)) + (((4,),) if states > 4 else ())
    shift = len(tiles) - 2
    whole = TiledLayout(
        plgpu.Tiling(tiles), (-5 - shift,), (-4 - shift, -3 - shift), -1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(whole.tiling, whole.warp_dims, whole.lane_dims, whole.vector_dim)


def over(v: Array, shape: tuple[int, ...], *axes: int) -> Array:
    """v's axes laid along these of `shape`, repeated along the others."""
    return lax.broadcast_in_dim(v, shape, axes)


def by_warp(a: Array, axis: int) -> Array:
    """Channels along `axis` become (warps, channels of a warp)."""
    return a.reshape(*a.shape[:axis], -1, WIDTH, *a.shape[axis + 1 :])


def launch(body: Any, name: str, out: Any, scratch: Any, grid: tuple[int, int]) -> Any:
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*o) for o in out],
        scratch_types=scratch,
        grid=grid,
        grid_names=("row", "block"),
        kernel_name=name,
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        # No thread reads from shared memory what another wrote, but after `commit_smem`, which is a barrier.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )


# -------------------------------------------------------------------------------------------------------------- forward


def forward(u, dt, A, B, C, start, *forget, keep):
    """[y, final state, and where `keep` the state before each tile]."""
    (rows, T, E), N = u.shape, A.shape[2]
    tiles, members, shape = T // TILE, rows // A.shape[0], (WARPS, WIDTH, N)
    spread, group = layout(N), span(N)

    def kernel(*refs):
        u_g, dt_g, A_g, B_g, C_g, start_g, *refs = refs
        forget_g, refs = refs[: len(forget)], refs[len(forget) :]
        y_g, final_g, *refs = refs
        states_g, refs = (refs[0], refs[1:]) if keep else (None, refs)
        u_s, dt_s, B_s, C_s, y_s, h_s, arrived, *forget_s = refs
        row, b = lax.axis_index("row"), lax.axis_index("block")
        mine = pl.ds(b * WARPS, WARPS)

        def fetch(i, slot):
            tokens = pl.ds(i * TILE, TILE)
            pairs = [(u_g.at[row, tokens, mine], u_s), (dt_g.at[row, tokens, mine], dt_s)]
            pairs += [(B_g.at[row, tokens], B_s), (C_g.at[row, tokens], C_s)]
            pairs += [(g.at[row, tokens], s) for g, s in zip(forget_g, forget_s, strict=True)]
            for g, s in pairs:
                plgpu.copy_gmem_to_smem(g, s.at[slot], arrived.at[slot])

        def read(ref, *axes):
            return compat.gpu_load(ref, spread.reduce(axes) if axes else spread)

        for i in range(min(2, tiles)):
            fetch(i, i)
        rates = read(A_g.at[row // members, mine])

        def token(slot, t, h):
            step = read(dt_s.at[slot, t], 2)
            exponent = over(step, shape, 0, 1) * rates
            if forget:
                exponent += forget_s[0][slot, t]
            added = over(step * read(u_s.at[slot, t], 2).astype(F32), shape, 0, 1)
            return jnp.exp2(exponent) * h + added * over(read(B_s.at[slot, t], 0, 1), shape, 2)

        def some_tokens(slot, first, h):
            """The outputs come last: sums over lanes are slow to arrive, and hold back what is written after them."""
            seen = []
            for t in range(group):
                h = token(slot, first + t, h)
                seen.append(h * over(read(C_s.at[slot, first + t], 0, 1), shape, 2))
            for t in range(group):
                y_s[first + t] = jnp.sum(seen[t], axis=2).astype(u.dtype)
            return h

        def one_tile(i, h):
            slot = lax.rem(i, 2)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if states_g is not None:
                h_s[...] = h
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(h_s, states_g.at[row, i, mine])
            h = lax.fori_loop(0, TILE // group, lambda k, h: some_tokens(slot, k * group, h), h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_s, y_g.at[row, pl.ds(i * TILE, TILE), mine])

            @pl.when(i + 2 < tiles)
            def _():
                fetch(i + 2, slot)

            return h

        h = lax.fori_loop(0, tiles, one_tile, read(start_g.at[row, mine]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        h_s[...] = h
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(h_s, final_g.at[row, mine])
        plgpu.wait_smem_to_gmem(0)

    warps = E // WIDTH
    out = [((rows, T, warps, WIDTH), u.dtype), ((rows, warps, WIDTH, N), F32)]
    out += [((rows, tiles, warps, WIDTH, N), F32)] if keep else []
    scratch = [plgpu.SMEM((2, TILE, WARPS, WIDTH), a.dtype) for a in (u, dt)]
    scratch += [plgpu.SMEM((2, TILE, N), F32) for _ in "BC"]
    scratch += [plgpu.SMEM((TILE, WARPS, WIDTH), u.dtype), plgpu.SMEM(shape, F32)]
    scratch += [plgpu.Barrier(num_arrivals=4 + len(forget), num_barriers=2)]
    scratch += [plgpu.SMEM((2, TILE), F32) for _ in forget]
    run = launch(kernel, "selective_scan_forward", out, scratch, (rows, E // BLOCK))
    rates = by_warp(A * math.log2(math.e), 1)
    y, final, *states = run(*(by_warp(a, 2) for a in (u, dt)), rates, B, C, by_warp(start, 1), *forget)
    return [y.reshape(u.shape), final.reshape(start.shape), *(s.reshape(rows, tiles, E, N) for s in states)]


# ------------------------------------------------------------------------------------------------------------- backward


def backward(u, dt, A, B, C, states, dy, d_final, *forget):
    (rows, T, E), N = u.shape, A.shape[2]
    tiles, members, shape = T // TILE, rows // A.shape[0], (WARPS, WIDTH, N)
    spread, group = layout(N), span(N)
    spans = TILE // group

    def kernel(*refs):
        u_g, dt_g, A_g, B_g, C_g, states_g, dy_g, d_final_g, *refs = refs
        forget_g, refs = refs[: len(forget)], refs[len(forget) :]
        du_g, ddt_g, dA_g, dB_g, dC_g, d_start_g, *refs = refs
        u_s, dt_s, dy_s, B_s, C_s, h_s, du_s, ddt_s, dB_s, dC_s, kept_s, sums_s, arrived, *forget_s = refs
        row, b = lax.axis_index("row"), lax.axis_index("block")
        mine = pl.ds(b * WARPS, WARPS)

        def fetch(i, slot):
            tokens = pl.ds(i * TILE, TILE)
            pairs = [(g.at[row, tokens, mine], s) for g, s in ((u_g, u_s), (dt_g, dt_s), (dy_g, dy_s))]
            pairs += [(B_g.at[row, tokens], B_s), (C_g.at[row, tokens], C_s)]
            pairs += [(g.at[row, tokens], s) for g, s in zip(forget_g, forget_s, strict=True)]
            pairs += [(states_g.at[row, i, mine], h_s)]
            for g, s in pairs:
                plgpu.copy_gmem_to_smem(g, s.at[slot], arrived.at[slot])

        def read(ref, *axes):
            return compat.gpu_load(ref, spread.reduce(axes) if axes else spread)

        for i in range(min(2, tiles)):
            fetch(tiles - 1 - i, i)
        log2_rates = read(A_g.at[row // members, mine])

        def decay(slot, t):
            exponent = over(read(dt_s.at[slot, t], 2), shape, 0, 1) * log2_rates
            return jnp.exp2(exponent + forget_s[0][slot, t] if forget else exponent)

        def added(slot, t):
            return read(dt_s.at[slot, t], 2) * read(u_s.at[slot, t], 2).astype(F32)

        def token(slot, t, h):
            a = decay(slot, t)
            return a, a * h + over(added(slot, t), shape, 0, 1) * over(read(B_s.at[slot, t], 0, 1), shape, 2)

        def keep_spans(slot, k, h):
            kept_s[k] = h
            for t in range(group):
                _, h = token(slot, k * group + t, h)
            return h

        def one_span(slot, k, carry):
            g, dA = carry
            h, first, states, decays = read(kept_s.at[k]), k * group, [], []
            states.append(h)
            for t in range(group):
                a, h = token(slot, first + t, h)
                states.append(h)
                decays.append(a)
            for t in reversed(range(group)):
                now = first + t
                step, x = read(dt_s.at[slot, now], 2), read(u_s.at[slot, now], 2).astype(F32)
                dy = over(read(dy_s.at[slot, now], 2).astype(F32), shape, 0, 1)
                g += dy * over(read(C_s.at[slot, now], 0, 1), shape, 2)
                dC_s[:, now] = jnp.sum(dy * states[t + 1], axis=1)
                dB_s[:, now] = jnp.sum(g * over(step * x, shape, 0, 1), axis=1)
                d_added = jnp.sum(g * over(read(B_s.at[slot, now], 0, 1), shape, 2), axis=2)
                g *= decays[t]
                d_exponent = g * states[t]
                dA += d_exponent * over(step, shape, 0, 1)
                du_s[now] = (d_added * step).astype(u.dtype)
                ddt_s[now] = d_added * x + jnp.sum(d_exponent * log2_rates, axis=2) * math.log(2)
            return g, dA

        def one_tile(i, carry):
            slot, place = lax.rem(i, 2), tiles - 1 - i
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            lax.fori_loop(0, spans, functools.partial(keep_spans, slot), read(h_s.at[slot]))
            carry = lax.fori_loop(0, spans, lambda k, c: one_span(slot, spans - 1 - k, c), carry)
            plgpu.commit_smem()
            for part, total in ((dB_s, 0), (dC_s, 1)):
                sums_s[total] = sum((compat.gpu_load(part.at[w]) for w in range(1, WARPS)), part[0])
            plgpu.commit_smem()
            tokens = pl.ds(place * TILE, TILE)
            plgpu.copy_smem_to_gmem(du_s, du_g.at[row, tokens, mine])
            plgpu.copy_smem_to_gmem(ddt_s, ddt_g.at[row, tokens, mine])
            plgpu.copy_smem_to_gmem(sums_s.at[0], dB_g.at[row, b, tokens])
            plgpu.copy_smem_to_gmem(sums_s.at[1], dC_g.at[row, b, tokens])

            @pl.when(i + 2 < tiles)
            def _():
                fetch(place - 2, slot)

            return carry

        zero = plgpu.layout_cast(jnp.zeros(shape, F32), spread)
        g, dA = lax.fori_loop(0, tiles, one_tile, (read(d_final_g.at[row, mine]), zero))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for k, (last, g_ref) in enumerate(((g, d_start_g), (dA, dA_g))):
            kept_s[k] = last
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(kept_s.at[k], g_ref.at[row, mine])
        plgpu.wait_smem_to_gmem(0)

    warps, blocks = E // WIDTH, E // BLOCK
    out = [((rows, T, warps, WIDTH), u.dtype), ((rows, T, warps, WIDTH), F32), ((rows, warps, WIDTH, N), F32)]
    out += [((rows, blocks, T, N), F32) for _ in "BC"] + [((rows, warps, WIDTH, N), F32)]
    scratch = [plgpu.SMEM((2, TILE, WARPS, WIDTH), a.dtype) for a in (u, dt, dy)]
    scratch += [plgpu.SMEM((2, TILE, N), F32) for _ in "BC"] + [plgpu.SMEM((2, *shape), F32)]
    scratch += [plgpu.SMEM((TILE, WARPS, WIDTH), dtype) for dtype in (u.dtype, F32)]
    scratch += [plgpu.SMEM((WARPS, TILE, N), F32) for _ in "BC"]
    scratch += [plgpu.SMEM((max(2, spans), *shape), F32), plgpu.SMEM((2, TILE, N), F32)]
    scratch += [plgpu.Barrier(num_arrivals=6 + len(forget), num_barriers=2)]
    scratch += [plgpu.SMEM((2, TILE), F32) for _ in forget]
    run = launch(kernel, "selective_scan_backward", out, scratch, (rows, blocks))
    wide = [by_warp(a, 2) for a in (u, dt, dy)]
    tall = [by_warp(A * math.log2(math.e), 1), by_warp(states, 2), by_warp(d_final, 1)]
    du, ddt, dA, dB, dC, d_start = run(*wide[:2], tall[0], B, C, tall[1], wide[2], tall[2], *forget)
    return [du.reshape(u.shape), ddt.reshape(dt.shape), dA.reshape(rows, E, N), dB, dC, d_start.reshape(rows, E, N)]


FORM = scan.Form(forward, backward, sizes)
selective_scan = functools.partial(scan.selective_scan, FORM)
