"""The recurrence on Hopper, in Mosaic GPU: all tokens inside one kernel, state and recurrent weights on the chip.

One thread block has one head and `ROWS` rows of the batch, a warpgroup for each 64 units. The products are transposed,
gates (units, rows) = R_g (units, units before) h (units before, rows), so that the few rows are the narrow side of the
matrix unit's tile and R is its left operand, which may stay in registers all the time. What the warpgroups tell each
other in a step, h forward and the gates' gradients backward, passes through shared memory in bfloat16 as a high and a
low part, side by side as twice the rows: 16 bits of mantissa for no more time.

A step is a product, then arithmetic that waits for it, then the exchange. All else happens while the matrix unit is
busy: forward, what is written for the backward pass; backward, all that does not depend on dh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.slstm.recurrence import F32, parts, sigmoid, tanh
from pallas_kernels.slstm.xla import EMPTY

BF16 = jnp.bfloat16
GATES = 4
UNITS = 64  # of a warpgroup: the height of the matrix unit's tile
ROWS = 8  # of the batch in a block
DEPTH = 64  # of a piece of a product
SUMS = 2  # accumulators of the backward product, which wait for each other the less the more there are
WGMMA = plgpu.Layout.WGMMA


# ----------------------------------------------------------------------------------------------- what both passes share


def in_registers(d: int) -> int:
    """Of how many gates R is in registers. Wider heads have their share of them used up by two gates, and the others
    in shared memory; interpreters know no left operand in registers."""
    return 0 if dispatch.interpret() else GATES if d <= 128 else 2


def read(ref: Any) -> Array:
    return compat.gpu_load(ref, WGMMA)


def along_units(ref: Any) -> Array:
    """(rows,) -> (units, rows)."""
    row = compat.gpu_load(ref, WGMMA.reduce(0))
    return lax.broadcast_in_dim(row, (UNITS, ROWS), (1,))


def weights(R_g: Any, R_s: Any, ready: Any, head: Any, w: Any) -> list[list[Any]]:
    """This warpgroup's rows of each gate's matrix, in pieces of `DEPTH` columns: of the last gates in registers, of the
    others in shared memory."""
    d = R_g.shape[-1]
    rows, pieces = pl.ds(w * UNITS, UNITS), [slice(k, k + DEPTH) for k in range(0, d, DEPTH)]
    shared = GATES - in_registers(d)
    if shared:

        @pl.when(w == 0)
        def _():
            for g in range(shared):
                plgpu.copy_gmem_to_smem(R_g.at[head, g], R_s.at[g], ready)

        plgpu.barrier_wait(ready)
    mine = [[R_s.at[g, rows, p] for p in pieces] for g in range(shared)]
    for g in range(shared, GATES):
        whole = read(R_g.at[head, g, rows])
        mine.append([whole[:, p] for p in pieces])
    return mine


def publish(
    values: list[tuple[Any, Array]], w: Any, everyone: Any, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Writes this warpgroup's units of some (2 rows, d) buffers, as high and low parts, and waits for the others'."""
    for ref, value in values:
        high = value.astype(BF16)
        low = (value - high.astype(F32)).astype(BF16)
        for k, part in enumerate((high, low)):
            to = ref.at[pl.ds(k * ROWS, ROWS), pl.ds(w * UNITS, UNITS)]
            to.transpose((1, 0))[...] = part
    plgpu.commit_smem()
    plgpu.barrier_arrive(everyone)
    meanwhile()
    plgpu.barrier_wait(everyone)


def multiply(sums: Sequence[Any], left: list[list[Any]], right: list[Any]) -> None:
    """Begins to add left[g] right[g]^T for each gate g to a sum, in turn. Pieces go gate by gate, so that those in a
    row wait little for each other."""
    for k in range(len(left[0])):
        for g, (a, b) in enumerate(zip(left, right, strict=True)):
            plgpu.wgmma(sums[g % len(sums)], a[k], b.at[:, pl.ds(k * DEPTH, DEPTH)].transpose((1, 0)))


def result(total: Any, after: int = 0) -> Array:
    """(units, rows), once no more than `after` pieces, begun later, are under way."""
    both = plgpu.wgmma_accumulator_load(total, wait_n=after)
    return both[:, :ROWS] + both[:, ROWS:]


def with_sums(count: int, run: Any) -> Any:
    kind = plgpu.ACC((UNITS, 2 * ROWS), F32)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(run, *[kind] * count)


def operand(shape: tuple[int, ...]) -> Any:
    """Shared memory that the matrix unit reads."""
    return plgpu.SMEM(shape, BF16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def shared_weights(d: int) -> Any:
    gates = GATES - in_registers(d)
    return operand((gates, d, d) if gates else (1, 8, 64)), plgpu.Barrier(num_arrivals=max(1, gates))


def launch(body: Any, name: str, out: Any, scratch: Any, grid: tuple[int, int], d: int) -> Any:
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, F32) for shape in out],
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile"),
        num_threads=d // UNITS,
        thread_name="wg",
        kernel_name=name,
        interpret=compat.gpu_interpreter() if dispatch.interpret() else None,
        # A thread reads from shared memory what another wrote only after `publish`, which is a barrier.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )


# -------------------------------------------------------------------------------------------------------------- forward


def forward(wx, R, start, *keep, save):
    heads, tiles, T, _, d, rows = wx.shape
    stages = min(4 if d <= 128 else 2, T)

    def kernel(*refs):
        wx_g, R_g, start_g, *refs = refs
        keep_g, refs = refs[: len(keep)], refs[len(keep) :]
        h_g, last_g, *refs = refs
        (raw_g, states_g), refs = (refs[:2], refs[2:]) if save else ((None, None), refs)
        wx_s, h_s, R_s, ready, arrived, everyone = refs
        head, tile, w = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
        units = pl.ds(w * UNITS, UNITS)

        def fetch(t, slot):
            plgpu.copy_gmem_to_smem(wx_g.at[head, tile, t], wx_s.at[slot], arrived.at[slot])

        @pl.when(w == 0)
        def _():
            for t in range(stages):
                fetch(t, t)

        left = weights(R_g, R_s, ready, head, w)
        h, *states = (read(start_g.at[head, tile, k, units]) for k in range(4))
        publish([(h_s.at[0], h)], w, everyone)

        def token(t, states):
            slot = lax.rem(t, stages)

            def run(*sums):
                before = h_s.at[lax.rem(t, 2)]
                multiply(sums[:2], left[:2], [before] * 2)
                multiply(sums[2:], left[2:], [before] * 2)
                c, n, m = states
                plgpu.barrier_wait(arrived.at[slot])
                fresh = [read(wx_s.at[slot, g, units]) for g in range(GATES)]
                old = None
                if keep:
                    old = along_units(keep_g[0].at[head // (heads // keep[0].shape[0]), tile, t])
                    c, n, m = old * c, old * n, old * m + (1.0 - old) * EMPTY
                if states_g is not None:
                    for k, state in enumerate((c, n, m)):
                        states_g[head, tile, t, k, units] = state

                def raw(g, after):
                    recurrent = result(sums[g], after)
                    return fresh[g] + (recurrent if old is None else old * recurrent)

                later = len(sums[2:]) * len(left[0])  # z and o are multiplied meanwhile
                i, f = raw(0, later), raw(1, later)
                old_part, new_part, m_t = parts(i, f, m)
                z, o = raw(2, 0), raw(3, 0)
                c_t, n_t = old_part * c + new_part * tanh(z), old_part * n + new_part
                return c_t / (n_t * (1.0 + jnp.exp(-o))), (c_t, n_t, m_t), (i, f, z, o)

            h, states, raw = with_sums(GATES, run)

            def write():
                h_g[head, tile, t, units] = h
                if raw_g is not None:
                    for g in range(GATES):
                        raw_g[head, tile, t, g, units] = raw[g]

            publish([(h_s.at[lax.rem(t + 1, 2)], h)], w, everyone, write)

            @pl.when((w == 0) & (t + stages < T))
            def _():
                fetch(t + stages, slot)

            @pl.when(t == T - 1)
            def _():
                for k, state in enumerate((h, *states)):
                    last_g[head, tile, k, units] = state

            return states

        lax.fori_loop(0, T, token, tuple(states))

    out = [(heads, tiles, T, d, rows), start.shape]
    out += [wx.shape, (heads, tiles, T, 3, d, rows)] if save else []
    scratch = [plgpu.SMEM((stages, GATES, d, rows), F32), operand((2, 2 * rows, d)), *shared_weights(d)]
    scratch += [plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=d // UNITS)]
    run = launch(kernel, "slstm_forward", out, scratch, (heads, tiles), d)
    return run(wx, jnp.swapaxes(R, -1, -2).astype(BF16), start, *keep)


# ------------------------------------------------------------------------------------------------------------- backward


def backward(raw, states, R, dh, d_last, *keep):
    """The mirrored loop."""
    heads, tiles, T, _, d, rows = raw.shape
    stages, buffers = (min(3, T + 1), 2) if d <= 128 else (1, 1)

    def kernel(*refs):
        raw_g, states_g, R_g, dh_g, d_last_g, *refs = refs
        keep_g, refs = refs[: len(keep)], refs[len(keep) :]
        d_gates_g, d_start_g, raw_s, states_s, dh_s, d_gates_s, R_s, ready, arrived, everyone, done = refs
        head, tile, w = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
        units = pl.ds(w * UNITS, UNITS)

        def fetch(index):
            """Index T, which has no token, fetches the first one again: each step prepares the one after it."""
            slot = lax.rem(index, stages)
            for g, s in ((raw_g, raw_s), (states_g, states_s), (dh_g, dh_s)):
                plgpu.copy_gmem_to_smem(g.at[head, tile, jnp.maximum(T - 1 - index, 0)], s.at[slot], arrived.at[slot])

        @pl.when(w == 0)
        def _():
            for index in range(stages):
                fetch(jnp.int32(index))

        left = weights(R_g, R_s, ready, head, w)

        def prepare(index):
            slot = lax.rem(index, stages)
            plgpu.barrier_wait(arrived.at[slot])
            i, f, z, o = (read(raw_s.at[slot, g, units]) for g in range(GATES))
            c, n, m = (read(states_s.at[slot, k, units]) for k in range(3))
            old_part, new_part, _ = parts(i, f, m)
            value, out = tanh(z), sigmoid(o)
            c_t, over_n = old_part * c + new_part * value, 1.0 / (old_part * n + new_part)
            dc_dh = out * over_n
            h = dc_dh * c_t
            return (
                read(dh_s.at[slot, units]), dc_dh, h * over_n, c, n, old_part, new_part, value, sigmoid(-f),
                h * (1.0 - out),
            )  # fmt: skip

        def token(index, carry):
            dh, dc, dn, _, prepared = carry
            fresh, dc_dh, dn_dh, c, n, old_part, new_part, value, closed, do = prepared
            t = T - 1 - index
            dh += fresh
            dc += dh * dc_dh
            dn -= dh * dn_dh
            d_old = (dc * c + dn * n) * old_part
            gates = [
                (dc * value + dn) * new_part,
                d_old * closed,
                dc * new_part * (1.0 - value * value),
                dh * do,
            ]
            if buffers == 1:

                @pl.when(index > 0)
                def _():
                    plgpu.barrier_wait(done)

            def write():
                for g, gate in enumerate(gates):
                    d_gates_g[head, tile, t, g, units] = gate

            mine = d_gates_s.at[lax.rem(index, buffers)]
            publish([(mine.at[g], gate) for g, gate in enumerate(gates)], w, everyone, write)

            @pl.when((w == 0) & (index + stages <= T))
            def _():
                fetch(index + stages)

            def run(*sums):
                multiply(sums, left, [mine.at[g] for g in range(GATES)])
                prepared = prepare(index + 1)
                return sum((result(s) for s in sums[1:]), result(sums[0])), prepared

            into, prepared = with_sums(SUMS, run)
            if buffers == 1:
                plgpu.barrier_arrive(done)
            before = [into, dc * old_part, dn * old_part, d_old]
            if keep:
                old = along_units(keep_g[0].at[head // (heads // keep[0].shape[0]), tile, t])
                before = [old * b for b in before]
            return *before, prepared

        zero = plgpu.layout_cast(jnp.zeros((UNITS, rows), F32), WGMMA)
        end = (zero, *(read(d_last_g.at[head, tile, k, units]) for k in (1, 2)), zero)
        *first, _ = lax.fori_loop(0, T, token, (*end, prepare(jnp.int32(0))))
        if buffers == 1:
            plgpu.barrier_wait(done)
        for k, d_state in enumerate(first):
            d_start_g[head, tile, k, units] = d_state

    out = [raw.shape, (heads, tiles, 4, d, rows)]
    scratch = [plgpu.SMEM((stages, k, d, rows), F32) for k in (4, 3)] + [plgpu.SMEM((stages, d, rows), F32)]
    scratch += [operand((buffers, GATES, 2 * rows, d)), *shared_weights(d)]
    scratch += [plgpu.Barrier(num_arrivals=3, num_barriers=stages)]
    scratch += [plgpu.Barrier(num_arrivals=d // UNITS) for _ in range(2)]
    run = launch(kernel, "slstm_backward", out, scratch, (heads, tiles), d)
    return run(raw, states, R.astype(BF16), dh, d_last, *keep)
