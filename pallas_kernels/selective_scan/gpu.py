"""The scan on Hopper, in Mosaic GPU: a warpgroup walks all tokens of `BLOCK` channels of a row, states in registers.

No matrix unit helps. The states of a block, (channels, N), are spread over 4 warps, then over 8 x 4 lanes, so that the
sum over N of the output and the sum over channels of dB and dC are both partly inside a thread. What is left of the
backward pass' sums goes through shared memory: the threads write their parts of a span of tokens, then read them back
in another layout and add: a store and a load of up to four numbers each, where shuffles take two instructions a number
and round. The forward pass, which has few, is faster with shuffles. Tokens arrive in tiles by TMA, two in flight.

Raw steps become steps once a tile, where each thread has numbers of its own: in the recurrence four threads share one.

The forward pass writes the state before every span. The backward pass takes the spans from the last to the first, each
once more forward, its states and decays in registers, and then backward. dB and dC are sums over channels: inside a
block here, over the blocks in XLA.
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
TILE = 32  # tokens staged at a time
LARGEST_STATE = 32


def refusal(u: Array, A: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    if u.dtype not in (jnp.bfloat16, F32):
        return f"takes bfloat16 and float32, not {u.dtype}"
    return "" if A.shape[1] <= LARGEST_STATE else f"takes at most {LARGEST_STATE} states a channel, not {A.shape[1]}"


def sizes(T: int, E: int, N: int) -> tuple[int, int, int]:
    """As the kernels take them."""
    return -(-T // TILE) * TILE, -(-E // BLOCK) * BLOCK, max(4 * LANES, 1 << (N - 1).bit_length())


# ----------------------------------------------------------------------------------------------- what both passes share


def span(N: int) -> int:
    """Tokens that are written out one after the other, between which the state is kept for the backward pass. It holds
    their states and decays in registers, of which more states leave fewer."""
    return min(8, 128 // N)


def state_shape(N: int) -> tuple[int, ...]:
    """Of a block's states: (warps, a thread's channels, lanes, lanes, a thread's states of a channel)."""
    return WARPS, WIDTH * LANES // 32, 32 // LANES, LANES, N // LANES


def tiled(shape: tuple[int, ...], warps: int, lanes: tuple[int, ...], longest: int) -> Any:
    """A thread has all of the last axis, in pieces of `longest` numbers, and of those that are neither `warps` nor
    `lanes`."""
    tiles = (shape,) + (((longest,),) if shape[-1] > longest else ())
    shift = len(shape) + len(tiles) - 1
    whole = TiledLayout(
        plgpu.Tiling(tiles), (warps - shift,), tuple(i - shift for i in lanes), -1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(whole.tiling, whole.warp_dims, whole.lane_dims, whole.vector_dim)


def layout(N: int) -> Any:
    """Of the states. A thread's channels are apart: with `over_channels` their sum is without a zero to start from."""
    warps, _, *lanes = state_shape(N)
    return tiled((warps, 1, *lanes), 0, (2, 3), 4)


def sums_layout(N: int) -> Any:
    """Of (tokens, *state_shape without a thread's states): a thread has all that is to be added up."""
    return tiled((2, *state_shape(N)[:4]), 1, (0, 2, 3), LANES)


def over(v: Array, shape: tuple[int, ...], *axes: int) -> Array:
    """v's axes laid along these of `shape`, repeated along the others."""
    return lax.broadcast_in_dim(v, shape, axes)


def split(a: Array, axis: int, N: int) -> Array:
    """Channels along `axis`, and states behind them, become those of `state_shape`."""
    _, *channels, lanes, states = state_shape(N)
    return a.reshape(*a.shape[:axis], -1, *channels, *((lanes, states) if a.ndim == axis + 2 else ()))


def readers(N: int) -> tuple[Any, Any, Any]:
    """What reads states, a number for each channel over their shape, and a number for each state over it."""
    shape, spread = state_shape(N), layout(N)

    def wide(ref):
        return over(compat.gpu_load(ref, spread.reduce((3, 4))).astype(F32), shape, 0, 1, 2)

    def tall(ref):
        return over(compat.gpu_load(ref, spread.reduce((0, 1, 2))), shape, 3, 4)

    return functools.partial(compat.gpu_load, layout=spread), wide, tall


def softplus(x: Array) -> Array:
    """Of small e log(1 + e) by its series: the fast logarithm is off by 2^-22, whatever its size."""
    e = jnp.exp2(jnp.abs(x) * -math.log2(math.e))
    series = e * (1.0 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5)))))
    return jnp.maximum(x, 0.0) + jnp.where(e < 1 / 16, series, jnp.log(1.0 + e))


def slope(step: Array) -> Array:
    """Of softplus where it is `step`: 1 - exp(-step), of small steps by the series."""
    series = step * (1.0 - step * (1 / 2 - step * (1 / 6 - step * (1 / 24))))
    return jnp.where(step < 1 / 16, series, 1.0 - jnp.exp2(step * -math.log2(math.e)))


def steps_of(dt: Any, bias: Any, to: Any, N: int) -> Any:
    """A tile's steps: dt or, where there is a bias, softplus of both, in `to`; each is worked out by one thread."""
    if not bias:
        return dt
    by_channel, shape = sums_layout(N), (TILE, *state_shape(N)[:3])
    raw = compat.gpu_load(dt, by_channel.reduce((4,))).astype(F32)
    raw += over(compat.gpu_load(bias[0], by_channel.reduce((0, 4))), shape, 1, 2, 3)
    compat.gpu_store(to[0], softplus(raw))
    plgpu.commit_smem()
    return to[0]


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


def forward(u, dt, A, B, C, start, *forget, keep, bias=None):
    """[y, final state, and where `keep` the state before each span]."""
    (rows, T, E), N = u.shape, A.shape[2]
    biased = [] if bias is None else [split(bias, 1, N)]
    tiles, members, group = T // TILE, rows // A.shape[0], span(N)
    shape, spans = state_shape(N), TILE // group
    read, wide, tall = readers(N)

    def kernel(*refs):
        u_g, dt_g, A_g, B_g, C_g, start_g, *refs = refs
        forget_g, refs = refs[: len(forget)], refs[len(forget) :]
        bias_g, refs = refs[: len(biased)], refs[len(biased) :]
        y_g, final_g, *refs = refs
        states_g, refs = (refs[0], refs[1:]) if keep else (None, refs)
        u_s, dt_s, B_s, C_s, y_s, arrived, *refs = refs
        forget_s, steps_s = refs[: len(forget)], refs[len(forget) :]
        row, b = lax.axis_index("row"), lax.axis_index("block")
        mine = pl.ds(b * WARPS, WARPS)
        own_bias = [g.at[row // (rows // len(a)), mine] for g, a in zip(bias_g, biased, strict=True)]

        def fetch(i, slot):
            tokens = pl.ds(i * TILE, TILE)
            pairs = [(g.at[row, tokens, mine], s) for g, s in ((u_g, u_s), (dt_g, dt_s))]
            pairs += [(g.at[row, tokens], s) for g, s in zip((B_g, C_g, *forget_g), (B_s, C_s, *forget_s), strict=True)]
            for g, s in pairs:
                plgpu.copy_gmem_to_smem(g, s.at[slot], arrived.at[slot])

        for i in range(min(2, tiles)):
            fetch(i, i)
        log2_rates = read(A_g.at[row // members, mine])

        def one_span(i, slot, steps, k, h):
            if states_g is not None:
                compat.gpu_store(states_g.at[row, i * spans + k, mine], h)
            first, seen = k * group, []
            for token in range(group):
                now = first + token
                step = wide(steps.at[now])
                exponent = step * log2_rates
                decay = jnp.exp2(exponent + forget_s[0][slot, now] if forget else exponent)
                h = decay * h + step * wide(u_s.at[slot, now]) * tall(B_s.at[slot, now])
                seen.append(h * tall(C_s.at[slot, now]))
            # Last: sums over lanes are slow to arrive, and hold back what is written after them.
            for token in range(group):
                y_s[first + token] = jnp.sum(jnp.sum(seen[token], axis=4), axis=3).astype(u.dtype)
            return h

        def one_tile(i, h):
            slot = lax.rem(i, 2)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            steps = steps_of(dt_s.at[slot], own_bias, steps_s, N)
            h = lax.fori_loop(0, spans, functools.partial(one_span, i, slot, steps), h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_s, y_g.at[row, pl.ds(i * TILE, TILE), mine])

            @pl.when(i + 2 < tiles)
            def _():
                fetch(i + 2, slot)

            return h

        compat.gpu_store(final_g.at[row, mine], lax.fori_loop(0, tiles, one_tile, read(start_g.at[row, mine])))
        plgpu.wait_smem_to_gmem(0)

    all_states = (E // WIDTH, *shape[1:])
    out = [((rows, T, *all_states[:3]), u.dtype), ((rows, *all_states), F32)]
    out += [((rows, T // group, *all_states), F32)] if keep else []
    scratch = [plgpu.SMEM((2, TILE, *shape[:3]), a.dtype) for a in (u, dt)]
    scratch += [plgpu.SMEM((2, TILE, *shape[3:]), F32) for _ in "BC"]
    scratch += [plgpu.SMEM((TILE, *shape[:3]), u.dtype)]
    scratch += [plgpu.Barrier(num_arrivals=4 + len(forget), num_barriers=2)]
    scratch += [plgpu.SMEM((2, TILE), F32) for _ in forget]
    scratch += [plgpu.SMEM((TILE, *shape[:3]), F32) for _ in biased]
    run = launch(kernel, "selective_scan_forward", out, scratch, (rows, E // BLOCK))
    log2_rates, start = (split(a, 1, N) for a in (A * math.log2(math.e), start))
    B, C = (a.reshape(rows, T, *shape[3:]) for a in (B, C))
    y, final, *states = run(split(u, 2, N), split(dt, 2, N), log2_rates, B, C, start, *forget, *biased)
    return [y.reshape(rows, T, E), final.reshape(rows, E, N), *(s.reshape(rows, T // group, E, N) for s in states)]


# ------------------------------------------------------------------------------------------------------------- backward


def backward(u, dt, A, B, C, states, dy, d_final, *forget, bias=None):
    (rows, T, E), N = u.shape, A.shape[2]
    biased = [] if bias is None else [split(bias, 1, N)]
    tiles, members, group = T // TILE, rows // A.shape[0], span(N)
    shape, added_up, spans = state_shape(N), sums_layout(N), TILE // group
    read, wide, tall = readers(N)
    add = functools.partial(functools.reduce, jnp.add)
    every = plgpu.Layout.WG_STRIDED((2 * group, *shape[3:]), vec_size=2 * group * N // 128)

    def kernel(*refs):
        u_g, dt_g, A_g, B_g, C_g, states_g, dy_g, d_final_g, *refs = refs
        forget_g, refs = refs[: len(forget)], refs[len(forget) :]
        bias_g, refs = refs[: len(biased)], refs[len(biased) :]
        du_g, ddt_g, dA_g, dBC_g, d_start_g, *refs = refs
        d_bias_g, refs = refs[: len(biased)], refs[len(biased) :]
        u_s, dt_s, dy_s, B_s, C_s, by_state_s, by_channel_s, arrived, *refs = refs
        forget_s, steps_s = refs[: len(forget)], refs[len(forget) :]
        row, b = lax.axis_index("row"), lax.axis_index("block")
        mine = pl.ds(b * WARPS, WARPS)
        own_bias = [g.at[row // (rows // len(a)), mine] for g, a in zip(bias_g, biased, strict=True)]

        def fetch(i, slot):
            tokens = pl.ds(i * TILE, TILE)
            pairs = [(g.at[row, tokens, mine], s) for g, s in ((u_g, u_s), (dt_g, dt_s), (dy_g, dy_s))]
            pairs += [(g.at[row, tokens], s) for g, s in zip((B_g, C_g, *forget_g), (B_s, C_s, *forget_s), strict=True)]
            for g, s in pairs:
                plgpu.copy_gmem_to_smem(g, s.at[slot], arrived.at[slot])

        def over_channels(x):
            """Sums over a thread's own, one by one: `jnp.sum` would add a zero."""
            return add(x[:, c : c + 1] for c in range(shape[1]))

        for i in range(min(2, tiles)):
            fetch(tiles - 1 - i, i)
        log2_rates = read(A_g.at[row // members, mine])

        def one_span(place, slot, all_steps, k, carry):
            h, g, dA, *d_bias = carry
            past, decays, steps, added = [h], [], [], []
            first, here = k * group, place * spans + k
            before = read(states_g.at[row, jnp.maximum(here - 1, 0), mine])  # on its way while this span is worked on
            for t in range(group):
                now = first + t
                step = wide(all_steps.at[now])
                exponent = step * log2_rates
                a = jnp.exp2(exponent + forget_s[0][slot, now] if forget else exponent)
                steps.append(step)
                added.append(step * wide(u_s.at[slot, now]))
                h = a * h + added[t] * tall(B_s.at[slot, now])
                past.append(h)
                decays.append(a)
            plgpu.commit_smem()
            for t in reversed(range(group)):
                now = first + t
                dy = wide(dy_s.at[slot, now])
                g += dy * tall(C_s.at[slot, now])
                by_state_s[:, :, :, 2 * t] = over_channels(g * added[t])
                by_state_s[:, :, :, 2 * t + 1] = over_channels(dy * past[t + 1])
                by_channel_s[0, t] = jnp.sum(g * tall(B_s.at[slot, now]), axis=4)
                g *= decays[t]
                d_exponent = g * past[t]
                dA += d_exponent * steps[t]
                by_channel_s[1, t] = jnp.sum(d_exponent * log2_rates, axis=4)
            plgpu.commit_smem()
            parts = [[by_state_s.at[w, 0, c, pl.ds(0, 2 * group)] for c in range(shape[2])] for w in range(WARPS)]
            totals = [add(compat.gpu_load(part, every) for part in of_warp) for of_warp in parts]
            compat.gpu_store(dBC_g.at[row, b, pl.ds(here * 2 * group, 2 * group)], add(totals))
            d_added, d_exponent = (jnp.sum(compat.gpu_load(by_channel_s.at[i], added_up), axis=4) for i in range(2))
            tokens = pl.ds(first, group)
            step, x = (compat.gpu_load(s, added_up.reduce((4,))) for s in (all_steps.at[tokens], u_s.at[slot, tokens]))
            compat.gpu_store(du_g.at[row, pl.ds(here * group, group), mine], (d_added * step).astype(u.dtype))
            d_step = d_added * x.astype(F32) + d_exponent * math.log(2)
            if biased:
                d_step = d_step * slope(step)
                d_bias = [d_bias[0] + jnp.sum(d_step, axis=0)]
            compat.gpu_store(ddt_g.at[row, pl.ds(here * group, group), mine], d_step.astype(dt.dtype))
            return before, g, dA, *d_bias

        def one_tile(i, carry):
            slot, place = lax.rem(i, 2), tiles - 1 - i
            plgpu.barrier_wait(arrived.at[slot])
            steps = steps_of(dt_s.at[slot], own_bias, steps_s, N)
            carry = lax.fori_loop(0, spans, lambda k, c: one_span(place, slot, steps, spans - 1 - k, c), carry)
            plgpu.commit_smem()

            @pl.when(i + 2 < tiles)
            def _():
                fetch(place - 2, slot)

            return carry

        zero = plgpu.layout_cast(jnp.zeros(shape, F32), layout(N))
        last = read(states_g.at[row, tiles * spans - 1, mine])
        of_channel = added_up.reduce((0, 4))
        none = [plgpu.layout_cast(jnp.zeros(shape[:3], F32), of_channel) for _ in biased]
        _, g, dA, *d_bias = lax.fori_loop(0, tiles, one_tile, (last, read(d_final_g.at[row, mine]), zero, *none))
        compat.gpu_store(d_start_g.at[row, mine], g)
        compat.gpu_store(dA_g.at[row, mine], dA)
        for to, sums in zip(d_bias_g, d_bias, strict=True):
            compat.gpu_store(to.at[row, mine], sums)

    blocks, all_states = E // BLOCK, (E // WIDTH, *shape[1:])
    out = [((rows, T, *all_states[:3]), a.dtype) for a in (u, dt)] + [((rows, *all_states), F32)]
    out += [((rows, blocks, 2 * T, *shape[3:]), F32), ((rows, *all_states), F32)]
    out += [((rows, *all_states[:3]), F32) for _ in biased]
    scratch = [plgpu.SMEM((2, TILE, *shape[:3]), a.dtype) for a in (u, dt, dy)]
    scratch += [plgpu.SMEM((2, TILE, *shape[3:]), F32) for _ in "BC"]
    # One row more than is used, lest the 8 lanes that write at once meet in a bank.
    scratch += [plgpu.SMEM((WARPS, 1, shape[2], 2 * group + 1, *shape[3:]), F32)]
    scratch += [plgpu.SMEM((2, group, *shape[:4]), F32)]
    scratch += [plgpu.Barrier(num_arrivals=5 + len(forget), num_barriers=2)]
    scratch += [plgpu.SMEM((2, TILE), F32) for _ in forget]
    scratch += [plgpu.SMEM((TILE, *shape[:3]), F32) for _ in biased]
    run = launch(kernel, "selective_scan_backward", out, scratch, (rows, blocks))
    u, dt, states, dy = (split(a, 2, N) for a in (u, dt, states, dy))
    log2_rates, d_final = (split(a, 1, N) for a in (A * math.log2(math.e), d_final))
    B, C = (a.reshape(rows, T, *shape[3:]) for a in (B, C))
    du, ddt, dA, dBC, d_start, *d_bias = run(u, dt, log2_rates, B, C, states, dy, d_final, *forget, *biased)
    dB, dC = jnp.unstack(dBC.reshape(rows, blocks, T, 2, N), axis=3)
    du, ddt = (a.reshape(rows, T, E) for a in (du, ddt))
    d_bias = [a.reshape(rows, E) for a in d_bias]
    return [du, ddt, dA.reshape(rows, E, N), dB, dC, d_start.reshape(rows, E, N), *d_bias]


FORM = scan.Form(forward, backward, sizes, raw=True)
selective_scan = functools.partial(scan.selective_scan, FORM)
