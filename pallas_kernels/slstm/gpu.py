"""The recurrence on Hopper, in Mosaic GPU: all tokens inside one kernel, state and recurrent weights on the chip.

One thread block has one head and `ROWS` rows of the batch, a warpgroup for each 64 units. The products are transposed,
gates (units, rows) = R_g (units, units before) h (units before, rows), so that the few rows are the narrow side of the
matrix unit's tile and R is its left operand, which may stay in registers all the time. What the warpgroups tell each
other in a step, h forward and the gates' gradients backward, passes through shared memory in bfloat16 as a high and a
low part, side by side as twice the rows: 16 bits of mantissa for no more time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import compat, dispatch
from pallas_kernels.slstm.xla import EMPTY

F32, BF16 = jnp.float32, jnp.bfloat16
GATES = 4
WIDTHS = (64, 128, 192)  # of a head
UNITS = 64  # of a warpgroup: the height of the matrix unit's tile
ROWS = 8  # of the batch in a block
WGMMA = plgpu.Layout.WGMMA


def refusal(gates: Array) -> str:
    """Why the kernels do not take these arguments; "" where they do."""
    if not compat.MOSAIC_GPU:
        return f"needs JAX {compat.MOSAIC_GPU_SINCE} or later"
    d = gates.shape[-1]
    return "" if d in WIDTHS else f"takes heads of width {', '.join(map(str, WIDTHS))}, not {d}"


def slstm(gates: Array, recurrent: Array, state: tuple[Array, ...] | None, reset: Array | None) -> Any:
    """As `xla.slstm`. The batch is padded to whole tiles of rows."""
    B, _, _, H, d = gates.shape
    empty = jnp.zeros((B, H, d), F32)

    def tiled(a: Array) -> Array:
        """(B, ...) -> (tiles, ..., rows)."""
        a = jnp.pad(a.astype(F32), ((0, -B % ROWS), *((0, 0),) * (a.ndim - 1)))
        return jnp.moveaxis(a.reshape(-1, ROWS, *a.shape[1:]), 1, -1)

    def untiled(a: Array) -> Array:
        """(heads, tiles, ..., d, rows) -> (B, ..., heads, d)."""
        a = jnp.moveaxis(a, (1, -1, 0), (0, 1, -2))
        return a.reshape(-1, *a.shape[2:])[:B]

    start = jnp.stack((empty, empty, empty, empty + EMPTY) if state is None else tuple(state), axis=1)
    keep = None if reset is None else tiled(1.0 - reset.astype(F32))[None]
    by_head = (jnp.moveaxis(tiled(gates), -3, 0), jnp.moveaxis(recurrent, 1, 0), jnp.moveaxis(tiled(start), -3, 0))
    h, last = _scan(*by_head, keep)
    last = untiled(last)
    return untiled(h), tuple(last[:, k] for k in range(4))


@jax.custom_vjp
def _scan(wx, R, start, keep):
    h, last = forward(wx, jnp.swapaxes(R, 2, 3).astype(BF16), start, keep, save=False)
    return h, last


def _scan_forward(wx, R, start, keep):
    h, last, raw, states = forward(wx, jnp.swapaxes(R, 2, 3).astype(BF16), start, keep, save=True)
    return (h, last), (raw, states, R, h, start, keep)


def _scan_backward(kept, cotangents):
    (raw, states, R, h, start, keep), (dh, d_last) = kept, cotangents
    d_wx, d_start = backward(raw, states, R.astype(BF16), dh.at[:, :, -1].add(d_last[:, :, 0]), d_last, keep)
    before = jnp.concatenate([start[:, :, :1], h[:, :, :-1]], axis=2)
    if keep is not None:
        before *= keep[0, :, :, None]
    dR = jnp.einsum("hxtdr,hxtger->hgde", before, d_wx, preferred_element_type=F32)
    return d_wx, dR.astype(R.dtype), d_start, None if keep is None else jnp.zeros_like(keep)


_scan.defvjp(_scan_forward, _scan_backward)


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def tanh(x: Array) -> Array:
    return 2.0 * sigmoid(2.0 * x) - 1.0


def log_sigmoid(x: Array) -> Array:
    return jnp.minimum(x, 0.0) - jnp.log(1.0 + jnp.exp(-jnp.abs(x)))


def in_registers(d: int, held: int | None) -> int:
    """Of how many gates R is in registers. Wider heads have their share of them used up by two gates, and the others
    in shared memory; interpreters know no left operand in registers."""
    if dispatch.interpret():
        return 0
    return (GATES if d <= 128 else 2) if held is None else held


def read(ref: Any) -> Array:
    return plgpu.load(ref, layout=WGMMA, optimized=False)


def weights(R_g: Any, R_s: Any, ready: Any, head: Any, w: Any, held: int, kstep: int) -> list[list[Any]]:
    """This warpgroup's rows of each gate's matrix, in pieces of `kstep` columns: of the last `held` gates in registers,
    of the others in shared memory."""
    d = R_g.shape[-1]
    rows, pieces = pl.ds(w * UNITS, UNITS), [slice(k, k + kstep) for k in range(0, d, kstep)]
    shared = GATES - held
    if shared:

        @pl.when(w == 0)
        def _():
            for g in range(shared):
                plgpu.copy_gmem_to_smem(R_g.at[head, g], R_s.at[g], ready)

        plgpu.barrier_wait(ready)
    mine = [[R_s.at[g, rows, p] for p in pieces] for g in range(shared)]
    for g in range(shared, GATES):
        whole = plgpu.load(R_g.at[head, g, rows], layout=WGMMA, optimized=False)
        mine.append([whole[:, p] for p in pieces])
    return mine


def publish(parts: list[tuple[Any, Array]], w: Any, everyone: Any) -> None:
    """Writes this warpgroup's units of some (2 rows, d) buffers, as high and low parts, and waits for the others'."""
    for ref, value in parts:
        high = value.astype(BF16)
        low = (value - high.astype(F32)).astype(BF16)
        for k, part in enumerate((high, low)):
            to = ref.at[pl.ds(k * ROWS, ROWS), pl.ds(w * UNITS, UNITS)]
            to.transpose((1, 0))[...] = part
    plgpu.commit_smem()
    plgpu.barrier_arrive(everyone)
    plgpu.barrier_wait(everyone)


def products(left: list[list[Any]], right: list[Any], kstep: int) -> list[Array]:
    """left[g] right[g]^T for each gate, (units, rows). Pieces go gate by gate, so that no two in a row wait for each
    other's sum."""

    def run(*sums):
        for k in range(len(left[0])):
            for total, a, b in zip(sums, left, right, strict=True):
                plgpu.wgmma(total, a[k], b.at[:, pl.ds(k * kstep, kstep)].transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return [s[...] for s in sums]

    both = pl.run_scoped(run, *[plgpu.ACC((UNITS, 2 * ROWS), F32)] * GATES)
    return [s[:, :ROWS] + s[:, ROWS:] for s in both]


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


def operand(shape: tuple[int, ...], kstep: int) -> Any:
    """Shared memory that the matrix unit reads."""
    width = min(kstep, 64)
    return plgpu.SMEM(shape, BF16, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)))


def forward(wx, R, start, keep, *, save, held=None, kstep=64, stages=None):
    """wx (heads, tiles, T, 4, d, rows), R (heads, 4, d after, d before) in bfloat16, start (heads, tiles, 4, d, rows)
    the states h, c, n, m; keep (members, tiles, T, rows), 0 where a document begins, or None. Gives h and the last
    states, and where `save` the raw gates and the states c, n, m before each token."""
    heads, tiles, T, _, d, rows = wx.shape
    stages, groups, held = min(stages or (4 if d <= 128 else 2), T), d // UNITS, in_registers(d, held)
    keeps = [] if keep is None else [keep]

    def kernel(*refs):
        wx_g, R_g, start_g, *refs = refs
        keep_g, refs = refs[: len(keeps)], refs[len(keeps) :]
        h_g, last_g, *refs = refs
        saved, refs = (refs[:2], refs[2:]) if save else ((), refs)
        wx_s, h_s, R_s, arrived, ready, everyone = refs
        head, tile, w = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
        units = pl.ds(w * UNITS, UNITS)

        def fetch(t, slot):
            plgpu.copy_gmem_to_smem(wx_g.at[head, tile, t], wx_s.at[slot], arrived.at[slot])

        @pl.when(w == 0)
        def _():
            for t in range(stages):
                fetch(t, t)

        left = weights(R_g, R_s, ready, head, w, held, kstep)
        h, *states = (read(start_g.at[head, tile, k, units]) for k in range(4))
        publish([(h_s.at[0], h)], w, everyone)

        def token(t, states):
            slot = lax.rem(t, stages)
            recurrent = products(left, [h_s.at[lax.rem(t, 2)]] * GATES, kstep)
            plgpu.barrier_wait(arrived.at[slot])
            if keeps:
                row = plgpu.load(
                    keep_g[0].at[head // (heads // keeps[0].shape[0]), tile, t], layout=WGMMA.reduce(0), optimized=False
                )
                old = lax.broadcast_in_dim(row, (UNITS, rows), (1,))
                recurrent = [old * r for r in recurrent]
                c, n, m = states
                states = old * c, old * n, old * m + (1.0 - old) * EMPTY
            c, n, m = states
            raw = [read(wx_s.at[slot, g, units]) + r for g, r in enumerate(recurrent)]
            i, f, z, o = raw
            log_f = log_sigmoid(f)
            m_t = jnp.maximum(log_f + m, i)
            old_part, new_part = jnp.exp(log_f + m - m_t), jnp.exp(i - m_t)
            c_t, n_t = old_part * c + new_part * tanh(z), old_part * n + new_part
            h = sigmoid(o) * c_t / n_t
            publish([(h_s.at[lax.rem(t + 1, 2)], h)], w, everyone)
            h_g[head, tile, t, units] = h
            if save:
                for g in range(GATES):
                    saved[0][head, tile, t, g, units] = raw[g]
                for k, state in enumerate((c, n, m)):
                    saved[1][head, tile, t, k, units] = state

            @pl.when((w == 0) & (t + stages < T))
            def _():
                fetch(t + stages, slot)

            @pl.when(t == T - 1)
            def _():
                for k, state in enumerate((h, c_t, n_t, m_t)):
                    last_g[head, tile, k, units] = state

            return c_t, n_t, m_t

        lax.fori_loop(0, T, token, tuple(states))

    out = [(heads, tiles, T, d, rows), start.shape]
    out += [wx.shape, (heads, tiles, T, 3, d, rows)] if save else []
    scratch = [plgpu.SMEM((stages, GATES, d, rows), F32), operand((2, 2 * rows, d), kstep)]
    scratch += [operand((max(1, GATES - held), d, d) if held < GATES else (1, 8, 64), kstep)]
    scratch += [
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=max(1, GATES - held)),
        plgpu.Barrier(num_arrivals=groups),
    ]
    return launch(kernel, "slstm_forward", out, scratch, (heads, tiles), d)(wx, R, start, *keeps)


def backward(raw, states, R, dh, d_last, keep, *, held=None, kstep=64, stages=None, buffers=None):
    """The mirrored loop. raw and states as `forward` saved them, R (heads, 4, d before, d after) in bfloat16, dh
    (heads, tiles, T, d, rows), d_last (heads, tiles, 4, d, rows) of the last states, of which h's is in dh already.
    Gives the gates' gradients (heads, tiles, T, 4, d, rows) and those of the first h, c, n, m."""
    heads, tiles, T, _, d, rows = raw.shape
    stages, groups, held = min(stages or (3 if d <= 128 else 1), T), d // UNITS, in_registers(d, held)
    buffers = buffers or (2 if d <= 128 else 1)
    keeps = [] if keep is None else [keep]

    def kernel(*refs):
        raw_g, states_g, R_g, dh_g, d_last_g, *refs = refs
        keep_g, refs = refs[: len(keeps)], refs[len(keeps) :]
        d_gates_g, d_start_g, raw_s, states_s, dh_s, d_gates_s, R_s, arrived, ready, everyone, done = refs
        head, tile, w = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
        units = pl.ds(w * UNITS, UNITS)

        def fetch(t, slot):
            for g, s in ((raw_g, raw_s), (states_g, states_s), (dh_g, dh_s)):
                plgpu.copy_gmem_to_smem(g.at[head, tile, t], s.at[slot], arrived.at[slot])

        @pl.when(w == 0)
        def _():
            for i in range(stages):
                fetch(T - 1 - i, i)

        left = weights(R_g, R_s, ready, head, w, held, kstep)
        zero = plgpu.layout_cast(jnp.zeros((UNITS, rows), F32), WGMMA)

        def token(index, carry):
            dh, dc, dn, _ = carry
            slot, t = lax.rem(index, stages), T - 1 - index
            plgpu.barrier_wait(arrived.at[slot])
            i, f, z, o = (read(raw_s.at[slot, g, units]) for g in range(GATES))
            c, n, m = (read(states_s.at[slot, k, units]) for k in range(3))
            dh += read(dh_s.at[slot, units])
            log_f = log_sigmoid(f)
            m_t = jnp.maximum(log_f + m, i)
            old_part, new_part = jnp.exp(log_f + m - m_t), jnp.exp(i - m_t)
            value, out = tanh(z), sigmoid(o)
            c_t, over_n = old_part * c + new_part * value, 1.0 / (old_part * n + new_part)
            h = out * c_t * over_n
            dc += dh * out * over_n
            dn -= dh * h * over_n
            d_old = (dc * c + dn * n) * old_part
            gates = [
                (dc * value + dn) * new_part,
                d_old * sigmoid(-f),
                dc * new_part * (1.0 - value * value),
                dh * h * (1.0 - out),
            ]
            if buffers == 1:

                @pl.when(index > 0)
                def _():
                    plgpu.barrier_wait(done)

            publish([(d_gates_s.at[lax.rem(index, buffers), g], gate) for g, gate in enumerate(gates)], w, everyone)
            for g, gate in enumerate(gates):
                d_gates_g[head, tile, t, g, units] = gate

            @pl.when((w == 0) & (index + stages < T))
            def _():
                fetch(t - stages, slot)

            into = products(left, [d_gates_s.at[lax.rem(index, buffers), g] for g in range(GATES)], kstep)
            if buffers == 1:
                plgpu.barrier_arrive(done)
            before = [(into[0] + into[1]) + (into[2] + into[3]), dc * old_part, dn * old_part, d_old]
            if keeps:
                row = plgpu.load(
                    keep_g[0].at[head // (heads // keeps[0].shape[0]), tile, t], layout=WGMMA.reduce(0), optimized=False
                )
                old = lax.broadcast_in_dim(row, (UNITS, rows), (1,))
                before = [old * b for b in before]
            return tuple(before)

        end = (zero, *(read(d_last_g.at[head, tile, k, units]) for k in (1, 2)), zero)
        first = lax.fori_loop(0, T, token, end)
        if buffers == 1:
            plgpu.barrier_wait(done)
        for k, d_state in enumerate(first):
            d_start_g[head, tile, k, units] = d_state

    out = [raw.shape, (heads, tiles, 4, d, rows)]
    scratch = [plgpu.SMEM((stages, k, d, rows), F32) for k in (4, 3)] + [plgpu.SMEM((stages, d, rows), F32)]
    scratch += [operand((buffers, GATES, 2 * rows, d), kstep)]
    scratch += [operand((max(1, GATES - held), d, d) if held < GATES else (1, 8, 64), kstep)]
    scratch += [plgpu.Barrier(num_arrivals=3, num_barriers=stages), plgpu.Barrier(num_arrivals=max(1, GATES - held))]
    scratch += [plgpu.Barrier(num_arrivals=groups) for _ in range(2)]
    run = launch(kernel, "slstm_backward", out, scratch, (heads, tiles), d)
    return run(raw, states, R, dh, d_last, *keeps)
